"""FasterTransformer's folder for BLOOM: names, shapes and config.ini of `N-gpu/`.

A file is headerless, in C order. Matrices are stored (in, out), a fused QKV as (in, 3, out / ranks).
"""

import configparser
import json
import logging
import re
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from hasten.core.config import AttentionConfig, DTypeName, ModelConfig, dtype_name
from hasten.core.errors import CheckpointError, ConfigError, UnsupportedError
from hasten.models.weight_map import WeightSpec
from hasten.parallel.shard import Split, shard_shape

_log = logging.getLogger(__name__)

CONFIG_INI = "config.ini"
_SPLIT = frozenset({Split.COLUMN, Split.ROW, Split.QKV})
_MODULES = {
    "embedding_norm": "pre_decoder_layernorm",
    "layers.{}.input_norm": "layers.{}.input_layernorm",
    "layers.{}.attention.qkv": "layers.{}.attention.query_key_value",
    "layers.{}.attention.dense": "layers.{}.attention.dense",
    "layers.{}.post_norm": "layers.{}.post_attention_layernorm",
    "layers.{}.mlp.up": "layers.{}.mlp.dense_h_to_4h",
    "layers.{}.mlp.down": "layers.{}.mlp.dense_4h_to_h",
    "final_norm": "final_layernorm",
    "head": "lm_head",
}
"""FasterTransformer's names of BLOOM's modules."""
_EMBEDDING = "embedding.weight"
_LAYER = re.compile(r"(?<=layers\.)\d+")
_ARCHITECTURE = "BloomForCausalLM"


def has_format(architecture: str) -> bool:
    """Whether hasten reads and writes an architecture in FasterTransformer's format."""
    return architecture == _ARCHITECTURE


def weight_name(spec: WeightSpec) -> str:
    """A weight's name in a folder, without `model.` before and the rank and `.bin` behind."""
    if spec.name == _EMBEDDING:
        return "wte"
    module, _, kind = spec.name.rpartition(".")
    layer = _LAYER.search(module)
    name = _MODULES[_LAYER.sub("{}", module)]
    return f"{name.format(layer[0]) if layer else name}.{kind}"


def is_split(spec: WeightSpec) -> bool:
    """Whether a weight has a file for each rank (also when there is only one)."""
    return spec.split in _SPLIT


def is_transposed(spec: WeightSpec) -> bool:
    """Whether a file holds the transpose of hasten's layout."""
    return is_split(spec) and len(spec.axes) == 2


def file_name(spec: WeightSpec, rank: int) -> str:
    """Name of the file with a rank's shard, or with the whole where FasterTransformer does not split."""
    name = weight_name(spec)
    return f"model.{name}.{rank}.bin" if is_split(spec) else f"model.{name}.bin"


def file_shape(spec: WeightSpec, config: ModelConfig, ranks: int) -> tuple[int, ...]:
    """Shape of a file as FasterTransformer sees it."""
    shape = spec.shape(config)
    if not is_split(spec):
        return shape
    out, *into = shard_shape(shape, spec.split, ranks, config.attention)
    return (*into, 3, out // 3) if spec.split is Split.QKV else (*into, out)


def from_file(spec: WeightSpec, stored: Tensor) -> Tensor:
    """A shard in hasten's layout, as a view of a file's flat values in the shape `file_shape`."""
    if spec.split is Split.QKV:
        stored = stored.flatten(-2)
    return stored.t() if is_transposed(spec) else stored


def config_ini(config: ModelConfig, model_name: str, ranks: int, dtype: DTypeName) -> str:
    """Text of config.ini, byte for byte as FasterTransformer's converter writes it."""
    residual = "post" if config.residual_after_norm else "pre"
    ends = config.eos_token_ids
    values: dict[str, object] = {
        "model_name": model_name,
        "num_layer": config.num_layers,
        "head_num": config.attention.num_heads,
        "inter_size": config.intermediate_size,
        "size_per_head": config.attention.head_size,
        "vocab_size": config.vocab_size,
        "tensor_para_size": ranks,
        "weight_data_type": dtype,
        "model_variant": f"bloom-{residual}",
        "layernorm_eps": config.norm_eps,
        "layernorm_type": f"{residual}_layernorm",
        "activation_type": "Gelu",
        "has_positional_encoding": False,
        "has_pre_decoder_layernorm": True,
        "has_post_decoder_layernorm": True,
        "use_attention_linear_bias": True,
        "start_id": config.bos_token_id,
        "end_id": None if not ends else ends[0] if len(ends) == 1 else list(ends),
    }
    return "[gpt]\n" + "".join(f"{name}={value}\n" for name, value in values.items()) + "\n"


@dataclass(frozen=True)
class IniFacts:
    """What config.ini says."""

    config: ModelConfig
    ranks: int
    model_name: str


def read_config_ini(path: Path) -> IniFacts:
    """Read config.ini; CheckpointError names what is wrong.

    It does not say whether the head is tied: it is unless there is a file of a head that differs.
    """
    parser = configparser.ConfigParser(interpolation=None)
    try:
        parser.read_string(path.read_text(encoding="utf-8"), source=str(path))
        section = parser["gpt"]
        _check_kind(section, path)
        return IniFacts(_model_config(section), int(section["tensor_para_size"]), section.get("model_name", ""))
    except KeyError as error:
        raise CheckpointError(f"{path} lacks {error.args[0]!r}; convert the checkpoint again") from error
    except (configparser.Error, ValueError, ConfigError, OSError) as error:
        raise CheckpointError(f"{path} cannot be read as FasterTransformer's config.ini: {error}") from error


_OF_BLOOM = {
    "activation_type": "Gelu",
    "use_attention_linear_bias": "True",
    "has_positional_encoding": "False",
    "has_pre_decoder_layernorm": "True",
    "has_post_decoder_layernorm": "True",
}
"""Keys of config.ini that are alike in every BLOOM."""
_LAYERNORM_TYPES = ("pre_layernorm", "post_layernorm")


def _check_kind(section: configparser.SectionProxy, path: Path) -> None:
    """UnsupportedError names the key that says that this is no BLOOM; a warning names keys that are not known."""
    for name, value in _OF_BLOOM.items():
        # what other models lack altogether
        found = section.get(name, "False" if name == "use_attention_linear_bias" else value)
        if found.lower() != value.lower():
            raise UnsupportedError(
                f"{path}: not a BLOOM model ({name} is {found}); hasten reads no other kind from "
                "FasterTransformer's format"
            )
    kind = section.get("layernorm_type", _LAYERNORM_TYPES[0])
    if kind not in _LAYERNORM_TYPES:
        raise UnsupportedError(f"{path}: layernorm_type {kind!r} is not one of {', '.join(_LAYERNORM_TYPES)}")
    known = {*_OF_BLOOM, *_READ, "layernorm_type", "model_variant"}
    if unknown := sorted(set(section) - known):
        _log.warning("%s: ignored, since hasten does not know what they change: %s", path, ", ".join(unknown))


_READ = frozenset(
    """
    model_name num_layer head_num inter_size size_per_head vocab_size tensor_para_size weight_data_type layernorm_eps
    start_id end_id
    """.split()
)


def _ids(text: str) -> tuple[int, ...]:
    if text == "None":
        return ()
    ids = json.loads(text)
    return tuple(int(i) for i in ids) if isinstance(ids, list) else (int(ids),)


def _model_config(section: configparser.SectionProxy) -> ModelConfig:
    heads, head_size = int(section["head_num"]), int(section["size_per_head"])
    start = _ids(section.get("start_id", "1"))
    return ModelConfig(
        architecture=_ARCHITECTURE,
        num_layers=int(section["num_layer"]),
        hidden_size=heads * head_size,
        intermediate_size=int(section["inter_size"]),
        vocab_size=int(section["vocab_size"]),
        attention=AttentionConfig(num_heads=heads, num_kv_heads=heads, head_size=head_size),
        norm_eps=float(section.get("layernorm_eps", "1e-5")),
        residual_after_norm=section.get("layernorm_type", "pre_layernorm") == "post_layernorm",
        dtype=dtype_name(section["weight_data_type"]),
        bos_token_id=start[0] if start else None,
        eos_token_ids=_ids(section.get("end_id", "2")),
    )
