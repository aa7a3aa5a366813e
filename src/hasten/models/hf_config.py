"""Hugging Face's config.json: its values, each read as what it must be, and what becomes of those that nobody reads.

A key is read by the model, or known to change nothing that a decoder computes, or refused by its name; whatever is
left is unknown, and a warning names it.
"""

import sys
from collections.abc import Iterator, Mapping, Set
from typing import Any, TypedDict

from hasten.core.dtypes import DTypeName, dtype_name
from hasten.core.errors import ConfigError, UnsupportedError
from hasten.core.model_config import Activation
from hasten.models.generation_config import SETTINGS

Raw = Mapping[str, Any]
_MOST = (1 << 31) - 1
"""Beyond any size of a model; products of two are shapes that torch can say."""
_LARGEST = sys.float_info.max

_BOOKKEEPING = frozenset(
    """
    _attn_implementation_autoset _commit_hash _from_model_config _name_or_path architectures attn_implementation
    chunk_size_feed_forward cross_attention_hidden_size add_cross_attention decoder_start_token_id dtype
    finetuning_task gradient_checkpointing id2label is_decoder is_encoder_decoder label2id model_type num_labels
    output_attentions output_hidden_states output_scores prefix problem_type return_dict return_dict_in_generate
    task_specific_params tie_encoder_decoder tokenizer_class torch_dtype torchscript transformers_version use_bfloat16
    use_cache bos_token_id eos_token_id pad_token_id unk_token_id sep_token_id cls_token_id mask_token_id
    is_matryoshka matryoshka_dimensions
    """.split()
)
"""Keys that transformers writes for every model, and that say nothing of what a decoder computes."""
_QUANTIZATION = frozenset({"quantization_config", "compression_config", "sparsity_config"})
"""Keys of any model that say how its weights are stored: `quantization/formats` reads them."""


class Fields(Raw):
    """The keys of a config.json, which remembers those that were read."""

    def __init__(self, raw: Raw) -> None:
        self._raw = raw
        self._read: set[str] = set()

    def __getitem__(self, name: str) -> Any:
        self._read.add(name)
        return self._raw[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._raw)

    def __len__(self) -> int:
        return len(self._raw)

    def unknown(self, harmless: Set[str]) -> list[str]:
        """Keys with a value that were not read and are not known to change nothing, sorted."""
        known = self._read | harmless | _BOOKKEEPING | SETTINGS.keys() | _QUANTIZATION
        return sorted(name for name, value in self._raw.items() if name not in known and value is not None)


def _require(condition: bool, name: str, value: Any, wanted: str) -> None:
    if not condition:
        raise ConfigError(f"{name} has a value of the wrong kind: {value!r:.80} is not {wanted}")


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def count(raw: Raw, *names: str, default: int | None = None) -> int:
    """A whole number from 1 to 2^31 - 1, under the first of its names that is there; the last name is today's."""
    values = {name: raw.get(name) for name in names}
    name = next((name for name, value in values.items() if value is not None), None)
    if name is None:
        if default is not None:
            return default
        raise ConfigError(f"config.json lacks {names[-1]!r}")
    value = raw[name]
    _require(_is_whole(value) and value > 0, name, value, "a whole number above 0")
    if value > _MOST:
        raise ConfigError(f"{name} cannot be right: it is above {_MOST}")
    return int(value)


def width_and_heads(
    raw: Raw, width: tuple[str, ...], heads: tuple[str, ...], default_heads: int | None = None
) -> tuple[int, int]:
    """The hidden size and the number of heads that divide it, each under the first of its names that is there."""
    hidden, number = count(raw, *width), count(raw, *heads, default=default_heads)
    if hidden % number:
        where, of = (next((name for name in names if raw.get(name) is not None), names[-1]) for names in (width, heads))
        raise ConfigError(f"{where} {hidden} is not a multiple of {of} {number}")
    return hidden, number


class Usual(TypedDict):
    """Fields of a `ModelConfig` that every family has under the same keys."""

    tie_word_embeddings: bool
    dtype: DTypeName
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    pad_token_id: int | None


def usual(raw: Raw, *, tied: bool, bos: int | None, eos: int | None, pad: int | None = None) -> Usual:
    """The fields that every family has under the same keys; the keywords are what a silent config.json stands for."""
    return Usual(
        tie_word_embeddings=flag(raw, "tie_word_embeddings", tied),
        dtype=dtype(raw) or "fp32",
        bos_token_id=token(raw, "bos_token_id", bos),
        eos_token_ids=tokens(raw, "eos_token_id", eos),
        pad_token_id=token(raw, "pad_token_id", pad),
    )


def fraction(raw: Raw, name: str, default: float) -> float:
    """A number between 0 and 1."""
    value = raw.get(name, default)
    _require(isinstance(value, float) and 0 < value < 1, name, value, "a number between 0 and 1")
    return float(value)


def number(raw: Raw, name: str, default: float) -> float:
    """A finite number above 0."""
    value = default if raw.get(name) is None else raw[name]
    _require(_is_number(value) and 0 < value <= _LARGEST, name, value, "a number above 0")
    return float(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def optional_count(raw: Raw, name: str, default: int | None) -> int | None:
    """A whole number above 0, or none where it is given as null."""
    return default if name not in raw else None if raw[name] is None else count(raw, name)


def activation(raw: Raw, name: str, default: str) -> Activation:
    """The activation of an MLP or of its gate; UnsupportedError names the key of another."""
    value = default if raw.get(name) is None else raw[name]
    if not isinstance(value, str) or value not in _ACTIVATIONS:
        raise UnsupportedError(
            f"{name} {value!r:.80} is not supported; supported are {', '.join(sorted(_ACTIVATIONS))}"
        )
    return _ACTIVATIONS[value]


_ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_accurate": "gelu_tanh",
    "gelu_python_tanh": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "quick_gelu": "quick_gelu",
    "relu": "relu",
    "relu2": "relu2",
}
"""The names of transformers."""


def flag(raw: Raw, name: str, default: bool) -> bool:
    """True or false."""
    value = default if raw.get(name) is None else raw[name]
    _require(isinstance(value, bool), name, value, "true or false")
    return bool(value)


def token(raw: Raw, name: str, default: int | None = None) -> int | None:
    """A token id, or none."""
    value = raw.get(name, default)
    _require(value is None or _is_whole(value), name, value, "a token id")
    return value


def tokens(raw: Raw, name: str, default: int | None) -> tuple[int, ...]:
    """Token ids, given as one, a list or none."""
    value = raw.get(name, default)
    ids = value if isinstance(value, list) else [] if value is None else [value]
    _require(all(map(_is_whole, ids)), name, value, "a token id or a list of them")
    return tuple(ids)


def dtype(raw: Raw) -> DTypeName | None:
    """Type of the weights, None where only they know it; `torch_dtype` is the key's old name."""
    name = "dtype" if raw.get("dtype") else "torch_dtype"
    value = raw.get(name)
    if not value or value == "auto":
        return None
    try:
        return dtype_name(str(value))
    except ConfigError as error:
        raise ConfigError(f"{name}: {error}") from error
