"""Folders whose files hold the shards of ranks, and those of them that are in safetensors."""

from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property, partial
from pathlib import Path
from threading import Lock
from typing import Any

from torch import Tensor

from hasten.checkpoint.files import check_names, check_tensor, open_safetensors
from hasten.checkpoint.manifest import Manifest
from hasten.checkpoint.source import Source
from hasten.core.errors import CheckpointError, ConfigError
from hasten.core.model_config import (
    AttentionConfig,
    ClassifierConfig,
    EncoderConfig,
    ExpertsConfig,
    MaskedWordsConfig,
    ModelConfig,
    QKNorm,
    RopeConfig,
)
from hasten.core.text import from_json
from hasten.models.registry import model_class
from hasten.models.weight_map import WeightSpec
from hasten.parallel.shard import overlap, resplit, shard_shape, split

RANK_FILE = "rank-{:05d}-of-{:05d}.safetensors"
"""Name of one rank's file in a ranked safetensors folder."""
METADATA_KEY = "hasten"
"""Entry of a rank file's metadata: JSON with version, ranks, rank, model and eos_token_ids."""
METADATA_VERSION = 1
_RANK_FILES = "rank-*-of-*.safetensors"
_WEIGHTS_AT_ONCE = 24


def is_ranked(folder: Path) -> bool:
    """Whether `folder` has files of ranks in safetensors."""
    return any(folder.glob(_RANK_FILES))


class RankedSource(Source):
    """Files that hold the shards of `ranks` ranks; any other number of ranks is served by splitting anew."""

    def _parts(self, spec: WeightSpec) -> int:
        """Shards that a weight is stored as."""
        return self.ranks

    def _in_files(self, spec: WeightSpec) -> WeightSpec:
        """The weight as these files divide it, which may not be the way that is asked for."""
        return self._own.get(spec.name, spec)

    @cached_property
    def _own(self) -> dict[str, WeightSpec]:
        return {spec.name: spec for spec in self.specs}

    @abstractmethod
    def _part(self, spec: WeightSpec, part: int) -> Tensor:
        """One stored shard, in hasten's layout."""

    @abstractmethod
    def _files(self, spec: WeightSpec, part: int) -> list[str]:
        """Names of the files that hold it."""

    def shard(self, spec: WeightSpec, rank: int, size: int) -> Tensor:
        """A view of the rank's own file where the files have as many ranks, divided in the same way."""
        config, stored = self.config, self._in_files(spec)
        part, parts = partial(self._part, stored), self._parts(stored)
        same = stored.split is spec.split
        wanted = (rank, size) if same else (0, 1)
        found = resplit(part, parts, stored.split, *wanted, config.attention, config.vocab_size)
        return found if same else split(found, spec.split, rank, size, config.attention)

    def files_for(self, spec: WeightSpec, rank: int, size: int) -> Iterable[str]:
        """The rank's own files, or those whose shards overlap its own."""
        stored = self._in_files(spec)
        wanted = (rank, size) if stored.split is spec.split else (0, 1)
        needed = overlap(stored.split, *wanted, self._parts(stored), self.config.vocab_size)
        return {name for part in needed for name in self._files(stored, part)}


class RankedSafetensorsSource(RankedSource):
    """`N-gpu/` with one safetensors file a rank, in hasten's names and layout, complete without config.json."""

    kind = "ranked safetensors"
    label = "safetensors"

    def __init__(self, folder: Path) -> None:
        first = min(folder.glob(_RANK_FILES))
        facts = _rank_metadata(first)
        config = _config_from_json(facts["model"], first)
        super().__init__(folder, config, model_class(config.architecture).weight_map(config))
        self.manifest = Manifest.read(folder)
        self.ranks = int(facts["ranks"])
        eos = facts.get("eos_token_ids")
        self.generation_eos = None if eos is None else tuple(eos)
        self.files = tuple(folder / RANK_FILE.format(rank, self.ranks) for rank in range(self.ranks))
        for path in self.files:
            if not path.is_file():
                raise CheckpointError(f"{path} is missing; copy it, or convert the checkpoint again")
        self._open: dict[int, Any] = {}
        self._lock = Lock()

    def _files(self, spec: WeightSpec, part: int) -> list[str]:
        return [self.files[part].name]

    def _part(self, spec: WeightSpec, part: int) -> Tensor:
        with self._lock:
            if part not in self._open:
                tensors = open_safetensors(self.files[part])
                check_names(self.files[part], (spec.name for spec in self.specs), tensors.keys())
                self._open[part] = tensors
            tensors = self._open[part]
        shape = shard_shape(spec.shape(self.config), spec.split, self.ranks, self.config.attention)
        return check_tensor(self.files[part], spec.name, tensors.get_tensor(spec.name), shape)

    def batches(self) -> Iterator[tuple[WeightSpec, ...]]:
        """A few weights at a time: a file holds some of every layer, so whole files would be the whole model."""
        for start in range(0, len(self.specs), _WEIGHTS_AT_ONCE):
            yield self.specs[start : start + _WEIGHTS_AT_ONCE]

    def release(self) -> None:
        """Forget the open files, and with them what is mapped."""
        with self._lock:
            self._open.clear()


def _rank_metadata(path: Path) -> dict[str, Any]:
    raw = (open_safetensors(path).metadata() or {}).get(METADATA_KEY)
    if raw is None:
        raise CheckpointError(f"{path} was not written by hasten: its metadata has no {METADATA_KEY!r}")
    try:
        facts: Any = from_json(raw)
    except ValueError as error:
        raise CheckpointError(f"{path} is damaged: its metadata {METADATA_KEY!r} is not JSON ({error})") from None
    if not isinstance(facts, dict):
        raise CheckpointError(f"{path} is damaged: its metadata {METADATA_KEY!r} is not a JSON object")
    if facts.get("version") != METADATA_VERSION:
        raise CheckpointError(f"{path}: version {facts.get('version')} is not known; use a newer hasten")
    return facts


_OLD_QK_NORMS: Mapping[Any, QKNorm | None] = {True: "rms", False: None}
"""What files say that were written when there was one kind."""


def _attention_from_json(raw: dict[str, Any]) -> AttentionConfig:
    rope = raw.get("rope")
    if rope is not None:
        factors = {name: tuple(rope.get(name, ())) for name in ("short_factor", "long_factor")}
        rope = RopeConfig(**rope | factors)
    if raw.get("position") == "relative":
        raw = raw | {"position": "learned"}  # as files say that were written when biases by distance implied these
    kind = raw.get("qk_norm")
    return AttentionConfig(**{**raw, "rope": rope, "qk_norm": _OLD_QK_NORMS.get(kind, kind)})


def _experts_from_json(raw: dict[str, Any] | None) -> ExpertsConfig | None:
    return None if raw is None else ExpertsConfig(**{**raw, "dense_layers": tuple(raw["dense_layers"])})


def _classifier_from_json(raw: dict[str, Any] | None) -> ClassifierConfig | None:
    return None if raw is None else ClassifierConfig(**{**raw, "labels": tuple(raw["labels"])})


def _encoder_from_json(raw: dict[str, Any] | None) -> EncoderConfig | None:
    return None if raw is None else EncoderConfig(**{**raw, "attention": _attention_from_json(raw["attention"])})


def _config_from_json(raw: dict[str, Any], path: Path) -> ModelConfig:
    try:
        layers = tuple(_attention_from_json(each) for each in raw.get("layer_attention", ()))
        attention = _attention_from_json(raw["attention"])
        experts = _experts_from_json(raw.get("experts"))
        ends = tuple(raw["eos_token_ids"])
        forced = tuple(raw.get("forced_eos_token_ids", ()))
        fields: dict[str, Any] = {"forced_eos_token_ids": forced}
        fields |= {"attention": attention, "layer_attention": layers, "experts": experts, "eos_token_ids": ends}
        fields["classifier"] = _classifier_from_json(raw.get("classifier"))
        words = raw.get("masked_words")
        fields["masked_words"] = None if words is None else MaskedWordsConfig(**words)
        fields["encoder"] = _encoder_from_json(raw.get("encoder"))
        return ModelConfig(**raw | fields)
    except (TypeError, KeyError, ConfigError) as error:
        raise CheckpointError(f"{path}: its metadata does not describe a model ({error}); convert it again") from error
