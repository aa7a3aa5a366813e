"""What FasterTransformer's folders of all families have in common: names, shapes and splits of their files.

A file is headerless, in C order. Matrices are stored (in, out), a fused QKV as (in, 3, out / ranks). A fused parameter
may also lie in several files, one for each of its parts.
"""

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from hasten.checkpoint.faster_transformer.ini import Section
from hasten.core.dtypes import DTypeName, dtype_name
from hasten.core.errors import UnsupportedError
from hasten.core.model_config import AttentionConfig, ModelConfig, Task
from hasten.models.weight_map import WeightSpec
from hasten.parallel.shard import Split, shard_shape

_SPLIT = frozenset({Split.COLUMN, Split.ROW, Split.QKV, Split.GATE_UP})
_LAYER = re.compile(r"(?<=layers\.)\d+")

Shards = Callable[[WeightSpec, int, int], Tensor]
"""Rank r's shard of n of a parameter, in the type that it is stored in."""
Derive = Callable[[Shards, torch.dtype], Tensor]
"""Whole values of a file, from those of the parameters and in the type of the files."""
LAYER_MODULES = {
    "layers.{}.input_norm": "layers.{}.input_layernorm",
    "layers.{}.attention.qkv": "layers.{}.attention.query_key_value",
    "layers.{}.attention.dense": "layers.{}.attention.dense",
    "layers.{}.post_norm": "layers.{}.post_attention_layernorm",
    "layers.{}.mlp.up": "layers.{}.mlp.dense_h_to_4h",
    "layers.{}.mlp.down": "layers.{}.mlp.dense_4h_to_h",
}
"""Names of a layer's modules, the same in every family."""
LAYERNORM_TYPES = ("pre_layernorm", "post_layernorm")
"""Values of a key of config.ini, of which the first is its default."""


@dataclass(frozen=True)
class FileTensor:
    """One tensor of a folder: a file, or where it is split one per rank, be there only one rank."""

    name: str
    """Without the rank and `.bin` behind."""
    spec: WeightSpec
    """The parameter that it holds, or whose shape it has."""
    part: int | None = None
    """Which source of a fused parameter it holds, the query, key or value, or a half; None: all of them."""
    derive: Derive | None = None
    """How its values come about where it does not hold the parameter's as they are."""
    restore: Callable[[Tensor], Tensor] | None = None
    """The inverse: the parameter's values from those of the file."""
    extra: bool = False
    """Whether no parameter is read from it: its values follow from other files'."""
    skipped_rows: int = 0
    """Rows of the parameter, the first ones, that the file lacks and no token needs."""

    @property
    def is_split(self) -> bool:
        """Whether each rank has a file of its own."""
        return self.spec.split in _SPLIT

    @property
    def is_transposed(self) -> bool:
        """Whether a file holds the transpose of hasten's layout."""
        return self.is_split and len(self.spec.axes) == 2

    def parts(self, ranks: int) -> int:
        """How many files it has."""
        return ranks if self.is_split else 1

    def file(self, rank: int) -> str:
        """Name of the file with a rank's shard, or with the whole where it is not split."""
        return f"{self.name}.{rank}.bin" if self.is_split else f"{self.name}.bin"

    def shape(self, config: ModelConfig, ranks: int) -> tuple[int, ...]:
        """Shape of a file as FasterTransformer sees it."""
        shape = self.spec.shape(config)
        if not self.is_split:
            return (shape[0] - self.skipped_rows, *shape[1:])
        out, *into = shard_shape(shape, self.spec.split, ranks, config.attention)
        if self.part is not None:
            return (*into, out // len(self.spec.sources))
        return (*into, 3, out // 3) if self.spec.split is Split.QKV else (*into, out)

    def values(self, shards: Shards, rank: int, size: int, dtype: torch.dtype) -> Tensor:
        """A shard to write, in hasten's layout."""
        values = shards(self.spec, rank, size) if self.derive is None else self.derive(shards, dtype)
        if self.part is not None:
            return values.chunk(len(self.spec.sources))[self.part]
        return values[self.skipped_rows :]

    def parameter(self, stored: Tensor) -> Tensor:
        """A parameter's shard in hasten's layout, or its part, from a file's values in the shape `shape`.

        It is a view if it can be.
        """
        if self.spec.split is Split.QKV and self.part is None:
            stored = stored.flatten(-2)
        shard = stored.t() if self.is_transposed else stored
        if self.skipped_rows:
            shard = torch.cat([shard.new_zeros(self.skipped_rows, *shard.shape[1:]), shard])
        return shard if self.restore is None else self.restore(shard)


class Family(ABC):
    """How a family of models lies in FasterTransformer's folders."""

    architecture: ClassVar[str]
    other_architectures: ClassVar[frozenset[str]] = frozenset()
    """Those that only a config.json next to a folder tells from the first."""
    tasks: ClassVar[frozenset[Task]] = frozenset({"generate"})
    """What its models are for."""
    label: ClassVar[str]
    """What messages call it."""
    section: ClassVar[str]
    """Of config.ini, the one by which a folder is recognized."""
    name_key: ClassVar[str] = "model_name"
    """Of what config.ini calls the model."""
    spaced: ClassVar[bool] = False
    """Whether config.ini has spaces around its equals signs."""
    prefix: ClassVar[str] = "model."
    """What names of files begin with."""
    of_all_ranks: ClassVar[str] = "model.layers.0.attention.dense.weight"
    """A tensor that every rank has a file of."""
    modules: ClassVar[Mapping[str, str]] = {}
    """FasterTransformer's names of modules, by hasten's."""
    parameters: ClassVar[Mapping[str, str]] = {"embedding.weight": "wte"}
    """The same of parameters whose name does not follow from their module's."""
    marks: ClassVar[Mapping[str, str]] = {}
    """Keys of config.ini by whose values a folder is known among those of its section."""
    fixed: ClassVar[Mapping[str, str]] = {}
    """Keys of config.ini that are alike in all models of the family; where one is left out, it is so too."""
    harmless: ClassVar[frozenset[str]] = frozenset()
    """Keys of config.ini that say nothing that others do not."""
    unsaid: ClassVar[str | None] = None
    """What config.ini does not say although models of the family differ in it, and what is then assumed."""
    always_head: ClassVar[bool] = False
    """Whether the runtime needs the head's file also where the head is tied to the embedding."""
    transposed_head: ClassVar[bool] = False
    """Whether FasterTransformer's own converter writes an untied head as (hidden, vocabulary)."""

    @abstractmethod
    def ini(self, config: ModelConfig, model_name: str, ranks: int, dtype: DTypeName) -> dict[str, object]:
        """Keys and values of config.ini's section, in order; `model_name` says where the model came from."""

    def sections(
        self, config: ModelConfig, model_name: str, ranks: int, dtype: DTypeName
    ) -> dict[str, dict[str, object]]:
        """All sections of config.ini, in order."""
        return {self.section: self.ini(config, model_name, ranks, dtype)}

    @abstractmethod
    def config(self, section: Section) -> ModelConfig:
        """What config.ini describes; what it does not say is as in the family's published models."""

    def why_not(self, config: ModelConfig) -> str | None:
        """What of a model FasterTransformer cannot compute; None if it can all."""
        return None

    def described(
        self, section: Section, attention: AttentionConfig, tokens: tuple[int, int], **more: Any
    ) -> ModelConfig:
        """The model of keys that every family has, and of `more`; `tokens`: start and end where there are no keys."""
        start = section.ids("start_id", tokens[0])
        return ModelConfig(
            architecture=self.architecture,
            num_layers=section.count("num_layer"),
            hidden_size=attention.num_heads * attention.head_size,
            intermediate_size=section.count("inter_size"),
            vocab_size=section.count("vocab_size"),
            attention=attention,
            dtype=dtype_name(section.text("weight_data_type")),
            bos_token_id=start[0] if start else None,
            eos_token_ids=section.ids("end_id", tokens[1]),
            **more,
        )

    def name(self, given: str, raw: Mapping[str, Any]) -> str:
        """What config.ini calls a model that was `given` as a folder or id and has `raw` as its config.json."""
        return given

    def stored(self, config: ModelConfig) -> ModelConfig:
        """A model of transformers as the files hold it."""
        return config

    def unclear(self, config: ModelConfig, ranks: int) -> str | None:
        """What FasterTransformer's own converters contradict each other in, for such a folder; None: in nothing."""
        return None

    def recognizes(self, section: Section) -> bool:
        """Whether a section of config.ini is of this family, among those that have its name."""
        return all(_says(section, key, value, absent=False) for key, value in self.marks.items())

    def check(self, section: Section) -> None:
        """UnsupportedError names the key that says that a folder is of no model of this family."""
        self.require(section, self.fixed)

    def require(self, section: Section, fixed: Mapping[str, str]) -> None:
        """UnsupportedError names a key whose value is another one; a key that is left out is right."""
        for key, value in fixed.items():
            if not _says(section, key, value, absent=True):
                raise UnsupportedError(
                    f"{section.path}: {key} is {section.text(key)}, but {value} in every {self.label}; hasten reads no "
                    f"other kind from [{section.name}]"
                )

    def unknown(self, section: Section) -> Iterable[str]:
        """Keys that hasten does not know."""
        return set(section.unread()) - self.harmless

    def tensors(self, specs: Iterable[WeightSpec], config: ModelConfig, ranks: int) -> Iterator[FileTensor]:
        """All tensors of a folder, in the order of the parameters."""
        embedding, has_head = None, False
        for spec in specs:
            yield from self.tensors_of(spec)
            embedding = spec if spec.name == "embedding.weight" else embedding
            has_head = has_head or spec.name == "head.weight"
        if self.always_head and not has_head and embedding is not None:
            yield FileTensor(f"{self.prefix}lm_head.weight", embedding, extra=True)

    def tensors_of(self, spec: WeightSpec) -> tuple[FileTensor, ...]:
        """The tensors that hold a parameter as it is, one or one for each of its parts."""
        if spec.name in self.parameters:
            return (FileTensor(f"{self.prefix}{self.parameters[spec.name]}", spec),)
        module, _, kind = spec.name.rpartition(".")
        layer = _LAYER.search(module)
        name = self.modules[_LAYER.sub("{}", module)]
        return (FileTensor(f"{self.prefix}{name.format(layer[0]) if layer else name}.{kind}", spec),)


def stored_tensors(spec: WeightSpec) -> tuple[FileTensor, ...]:
    """A file for each stored tensor of a parameter, under transformers' name."""
    fused = len(spec.sources) > 1
    return tuple(
        FileTensor(source.name, spec, part=part if fused else None) for part, source in enumerate(spec.sources)
    )


_FLAGS = {"True": True, "False": False}


def _says(section: Section, key: str, value: str, *, absent: bool) -> bool:
    """Whether a key has a value, in any form that the runtime reads; `absent` where there is no such key."""
    if key not in section:
        return absent
    if value in _FLAGS:
        return section.flag(key, False) is _FLAGS[value]
    return section.text(key).lower() == value.lower()


def attention_of(section: Section, **more: Any) -> AttentionConfig:
    """Attention with the heads that config.ini says, and of `more`."""
    heads = section.count("head_num")
    return AttentionConfig(num_heads=heads, num_kv_heads=heads, head_size=section.count("size_per_head"), **more)


def size_keys(config: ModelConfig, model_name: str) -> dict[str, object]:
    """Keys and values that most families begin with."""
    return {
        "model_name": model_name,
        "head_num": config.attention.num_heads,
        "size_per_head": config.attention.head_size,
        "inter_size": config.intermediate_size,
    }


def token_keys(config: ModelConfig) -> dict[str, object]:
    """Keys and values of the start and end tokens."""
    ends = config.eos_token_ids
    return {
        "start_id": config.bos_token_id,
        "end_id": None if not ends else ends[0] if len(ends) == 1 else list(ends),
    }
