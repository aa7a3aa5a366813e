"""Hugging Face folders: what config.json says, and weights in safetensors or `.bin` files."""

import dataclasses
import logging
import math
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from threading import Lock
from typing import Any

import torch
from torch import Tensor

from hasten.checkpoint.cache_ranges import read_ranges
from hasten.checkpoint.files import (
    Pickle,
    TensorFile,
    check_names,
    check_tensor,
    open_safetensors,
    read_index,
    read_json,
)
from hasten.checkpoint.source import Source, has_own_head, warn_of_head
from hasten.core.errors import CheckpointError, ConfigError, HastenError
from hasten.core.model_config import ModelConfig
from hasten.models import hf_config
from hasten.models.encoder_decoder import EncoderDecoder
from hasten.models.generation_config import TOKENS_OF_OUTPUTS, not_applied
from hasten.models.registry import architecture_of, model_class
from hasten.models.weight_map import SAME, StoredTensor, WeightMap, WeightSpec
from hasten.ops import TORCH_DTYPES, Weight
from hasten.quantization import stored as stored_weight
from hasten.quantization.formats import registry as formats
from hasten.quantization.formats.base import Format, Module
from hasten.quantization.formats.files import METHODS
from hasten.quantization.stored import StoredWeight

_log = logging.getLogger(__name__)

HF_FILES = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
MODULES = "modules.json"
"""What sentence-transformers writes next to a model that gives vectors."""
UNKNOWN = "%s: ignored, since hasten does not know what they change: %s"
NOT_APPLIED = "%s: not applied, since every request brings its own settings: %s"
_MATRIX = 2
"""Axes of the weight of a linear layer; experts' weights are stacked along a third."""


class HuggingFaceSource(Source):
    """A Hugging Face folder: safetensors or `.bin`, one file or those that an index names."""

    label = "HF"

    def __init__(
        self, folder: Path, config: ModelConfig, weight_map: WeightMap, stored_format: Format | None = None
    ) -> None:
        super().__init__(folder, config, weight_map)
        self.format = stored_format
        self._quantized: dict[str, Mapping[str, str]] = {}
        """Names of quantized weights -> their stored tensors, by what they are."""
        self._leftover: dict[str, tuple[str, Path]] = {}
        """Names, without the prefix, of tensors that belong to no weight -> the name and the file that hold them."""
        self._open: dict[Path, TensorFile] = {}
        self._lock = Lock()
        first = next(path for name in HF_FILES if (path := folder / name).exists())
        self.pickled = ".bin" in first.name
        self.kind = "pytorch bin" if self.pickled else "safetensors"
        self._index = read_index(first) if first.suffix == ".json" else None
        names = self._index or dict.fromkeys(self._opened(first).keys(), first)
        self.files = tuple(dict.fromkeys(names.values()))
        self._names = self._own_names(first, names)
        for path in () if self.pickled else self.files:
            self._opened(path)
        if self.format is not None and any(map(self._is_held, self.specs)):
            self.stored_quantization = self.format.name

    def _is_held(self, spec: WeightSpec) -> bool:
        """Whether the model holds a weight quantized, as the files do, and not in full precision: experts are."""
        return len(spec.axes) == _MATRIX and all(source.name in self._quantized for source in spec.sources)

    def _own_names(self, where: Path, names: dict[str, Path]) -> dict[str, tuple[str, Path]]:
        """Base names, with or without the full model's prefix in the file, to the name and the file that hold them."""
        own: dict[str, tuple[str, Path]] = {}
        aliases: dict[str, tuple[str, Path]] = {}
        for name, path in names.items():
            base = name if name in self.weight_map.hf_unprefixed else name.removeprefix(self.weight_map.hf_prefix)
            if self.weight_map.ignores(base):
                continue
            if base in self.weight_map.hf_aliases:
                aliases[self.weight_map.hf_aliases[base]] = (name, path)
                continue
            if base in own:
                raise CheckpointError(f"{where} holds {base!r} twice, as {own[base][0]!r} and as {name!r}; remove one")
            own[base] = (name, path)
        own = aliases | own
        tie, tied = self.weight_map.head_tie, {}
        if tie is not None and (head := tie.spec.sources[0].name) in own:
            tied[head] = own.pop(head)
            # safetensors keeps one name of two tensors that share memory, and it may be the head's
            own.setdefault(tie.to.sources[0].name, tied[head])
        self.specs = tuple(spec.among(own) for spec in self.specs)
        expected = {
            name for spec in self.specs for source in spec.sources for name in self._tensors_of(source, own, where)
        }
        if self.format is not None:
            extra = {name for name in own if name not in expected and self.format.is_leftover(name)}
            self._leftover = {name: own.pop(name) for name in extra}
        check_names(where, expected, own)
        return own | tied

    def _tensors_of(self, source: StoredTensor, names: Container[str], where: Path) -> Iterable[str]:
        """Names of the tensors that a weight is read from."""
        if self.format is not None:
            try:
                found = self.format.find(source.name.removesuffix(".weight"), names)
            except CheckpointError as error:
                raise CheckpointError(f"{where} {error}") from error
            if found is not None:
                self._quantized[source.name] = found
                return found.values()
        return (source.name,)

    def holds(self, spec: WeightSpec) -> bool:
        """Whether the files hold a weight that the configuration ties to another."""
        return all(source.name in self._names for source in spec.sources)

    def _opened(self, path: Path) -> TensorFile:
        with self._lock:
            if path not in self._open:
                tensors: TensorFile = Pickle(path) if self.pickled else open_safetensors(path)
                if self._index is not None:
                    check_names(path, (name for name, file in self._index.items() if file == path), tensors.keys())
                self._open[path] = tensors
            return self._open[path]

    def shard(self, spec: WeightSpec, rank: int, size: int) -> Tensor:
        """A view of the mapped file; what is fused here and not there, or in another order, is copied."""
        stored = [self._on_device(source) for source in spec.sources]
        return spec.shard(stored, rank, size, self.config.attention)

    @property
    def plain_files(self) -> Sequence[Path]:
        """See Source."""
        return () if self.pickled or self.format is not None else self.files

    def _on_device(self, source: StoredTensor) -> Tensor:
        """A tensor of the files where it is wanted."""
        if source.name not in self._quantized:
            name, path = self._names[source.name]
            if (arrived := self.arrived(path, name)) is not None:
                return check_tensor(path, name, arrived, source.shape(self.config))
        return self.upload(self._stored(source))

    def weight(self, spec: WeightSpec, rank: int, size: int, dtype: torch.dtype) -> Weight:
        """See `Source.weight`; experts, and a weight whose parts are quantized in different ways, are dequantized."""
        if not self._is_held(spec):
            return super().weight(spec, rank, size, dtype)
        read = [self._read(source) for source in spec.sources]
        stored = [each for each in read if isinstance(each, StoredWeight)]
        assert len(stored) == len(read)
        if not all(stored[0].fits(other) for other in stored[1:]):
            _log.warning(
                "%s: %s are quantized in different ways; held in full precision", self.folder, spec.stored_names
            )
            return super().weight(spec, rank, size, dtype)
        part = stored_weight.shard(spec, stored, rank, size, self.config.attention)
        return part.pack(part, dtype)

    def cache_ranges(self) -> Mapping[str, Tensor] | None:
        """See `Source.cache_ranges`."""
        if self.format is None or not self._leftover or (dtype := self.format.cache_dtype) is None:
            return None
        return read_ranges(self.specs, self._leftover, self._scale_of_cache, self.config.attention, dtype)

    def _scale_of_cache(self, name: str) -> Tensor:
        stored, path = self._leftover[name]
        return self._opened(path).get_tensor(stored)

    @property
    def dequantized_bytes(self) -> int:
        """Bytes in 16 bits of the experts that the files hold quantized, and the model in full precision."""
        stacks = (spec for spec in self.specs if len(spec.axes) > _MATRIX)
        quantized = (spec for spec in stacks if any(source.name in self._quantized for source in spec.sources))
        return sum(2 * math.prod(spec.shape(self.config)) for spec in quantized)

    def _read(self, source: StoredTensor) -> StoredWeight | Tensor:
        """A quantized weight of the files."""
        assert self.format is not None
        files = {kind: self._names[name] for kind, name in self._quantized[source.name].items()}
        tensors = {kind: self._opened(path).get_tensor(name) for kind, (name, path) in files.items()}
        kind, (name, path) = next(iter(files.items()))
        module, shape = name.removesuffix(kind), replace(source, layout=SAME).shape(self.config)
        try:
            return self.format.read(Module(module[:-1], shape, tensors, separator=module[-1]))
        except CheckpointError as error:
            raise CheckpointError(f"{path}: {error}") from error

    def _stored(self, source: StoredTensor) -> Tensor:
        if source.name in self._quantized:
            found = self._read(source)
            if isinstance(found, Tensor):
                return found
            weight = found.dequantized(TORCH_DTYPES[self.config.dtype])
            return weight.t() if source.layout.transposed else weight
        name, path = self._names[source.name]
        return check_tensor(path, name, self._opened(path).get_tensor(name), source.shape(self.config))

    def _last_file(self, spec: WeightSpec) -> Path:
        names = (
            name
            for source in spec.sources
            for name in self._quantized.get(source.name, {source.name: source.name}).values()
        )
        return max(self._names[name][1] for name in names)

    def batches(self) -> Iterator[tuple[WeightSpec, ...]]:
        """Weights file by file, in the order of the files' names; one that lies in several comes with the last."""
        by_file: dict[Path, list[WeightSpec]] = {}
        for spec in self.specs:
            by_file.setdefault(self._last_file(spec), []).append(spec)
        yield from (tuple(by_file[path]) for path in sorted(by_file))

    def release(self) -> None:
        """Forget the open files, and with them what is mapped."""
        with self._lock:
            self._open.clear()

    @property
    def stored_names(self) -> Iterable[str]:
        """Names of all tensors that the files hold, without the base model's prefix."""
        return self._names

    def stored_name(self, base: str) -> str:
        """The name in the files of a tensor that is named without the base model's prefix."""
        return self._names[base][0]

    def stored_tensor(self, base: str) -> Tensor:
        """A tensor of the files, as it is, by its name without the base model's prefix."""
        name, path = self._names[base]
        return self._opened(path).get_tensor(name)

    def stored_dtype(self) -> torch.dtype:
        """Type of the first weight."""
        name, path = self._names[self.specs[0].sources[0].name]
        return self._opened(path).get_tensor(name).dtype


def read_hf_config(folder: Path) -> ModelConfig:
    """The model that config.json of `folder` describes; UnsupportedError for an architecture that hasten lacks."""
    path = folder / "config.json"
    raw = read_json(path)
    try:
        cls = model_class(architecture_of(raw))
        if issubclass(cls, EncoderDecoder):
            raw |= _tokens_of_outputs(folder)
        fields = hf_config.Fields(raw)
        config = cls.config_from_hf(fields)
    except HastenError as error:
        raise type(error)(f"{path}: {error}") from error
    except (TypeError, ValueError, ArithmeticError) as error:
        raise ConfigError(f"{path} has a value of the wrong kind: {error}") from error
    if config.task == "generate" and (folder / MODULES).is_file():
        # vectors need no head, which such a checkpoint may lack
        config = dataclasses.replace(config, task="embed", tie_word_embeddings=True)
    if unknown := fields.unknown(cls.hf_harmless):
        _log.warning(UNKNOWN, path, ", ".join(unknown))
    if settings := not_applied(raw, has_encoder=config.encoder is not None):
        _log.warning(NOT_APPLIED, path, ", ".join(settings))
    return config


def _tokens_of_outputs(folder: Path) -> dict[str, Any]:
    """What generation_config.json says of the tokens at both ends of an encoder-decoder's outputs."""
    path = folder / "generation_config.json"
    found = read_json(path) if path.is_file() else {}
    return {name: found[name] for name in TOKENS_OF_OUTPUTS if found.get(name) is not None}


def read_format(folder: Path) -> Format | None:
    """How the Hugging Face checkpoint in `folder` holds quantized weights; None: it is in full precision."""
    files = {name: read_json(folder / name) for name in METHODS if (folder / name).is_file()}
    try:
        return formats.format_of(read_json(folder / "config.json"), files)
    except HastenError as error:
        raise type(error)(f"{folder / 'config.json'}: {error}") from error


def _holds_words(folder: Path, config: ModelConfig) -> bool:
    """Whether the files have the head for masks that the architecture is named for; models of vectors may lack it."""
    first = next(path for name in HF_FILES if (path := folder / name).exists())
    if first.suffix == ".json":
        names = set(read_index(first))
    else:
        names = set((Pickle(first) if ".bin" in first.name else open_safetensors(first)).keys())
    specs = model_class(config.architecture).weight_map(config).specs
    words = {source.name for spec in specs if spec.name.startswith("masked_words.") for source in spec.sources}
    return not words.isdisjoint(names)


def open_hugging_face(folder: Path) -> HuggingFaceSource:
    """The weights of `folder`, with the head and in the type that the files have, whatever config.json says."""
    config, stored_format = read_hf_config(folder), read_format(folder)
    if config.masked_words is not None and not _holds_words(folder, config):
        config = dataclasses.replace(config, masked_words=None)
    source = HuggingFaceSource(folder, config, model_class(config.architecture).weight_map(config), stored_format)
    if has_own_head(source):
        warn_of_head(folder / "config.json")
        config = dataclasses.replace(source.config, tie_word_embeddings=False)
        source = HuggingFaceSource(folder, config, model_class(config.architecture).weight_map(config), stored_format)
    if hf_config.dtype(read_json(folder / "config.json")) is None:
        stored = source.stored_dtype()
        name = next((name for name, dtype in TORCH_DTYPES.items() if dtype is stored), config.dtype)
        source.config = dataclasses.replace(source.config, dtype=name)
    if size := source.dequantized_bytes:
        assert source.format is not None
        _log.warning(
            "%s: the experts are stored in %s and dequantized while they are loaded; in 16 bits they need %.1f GB, "
            "divided over the ranks",
            folder,
            source.format.name,
            size / 1e9,
        )
    return source
