"""Lazy readers of checkpoints behind one small class: Hugging Face, FasterTransformer, ranked safetensors, random.

Files are memory-mapped: opening reads headers alone, and a shard costs the pages that it touches.
"""

import dataclasses
import filecmp
import json
import logging
import math
import pickle
import re
import zlib
from abc import ABC, abstractmethod
from collections.abc import Container, Iterable, Iterator, Mapping
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from threading import Lock
from typing import Any, ClassVar, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from hasten.checkpoint.cache_ranges import read_ranges
from hasten.checkpoint.faster_transformer.family import FileTensor
from hasten.checkpoint.faster_transformer.folder import Folder, read_folder
from hasten.checkpoint.faster_transformer.ini import CONFIG_INI
from hasten.checkpoint.hub import ADAPTER
from hasten.checkpoint.manifest import MANIFEST, Manifest
from hasten.core.config import (
    AttentionConfig,
    ClassifierConfig,
    EncoderConfig,
    ExpertsConfig,
    ModelConfig,
    QKNorm,
    Quantization,
    RopeConfig,
)
from hasten.core.errors import CheckpointError, ConfigError, HastenError, UnsupportedError
from hasten.models import hf_config
from hasten.models.encoder_decoder import EncoderDecoder
from hasten.models.generation_config import TOKENS_OF_OUTPUTS, not_applied
from hasten.models.registry import architecture_of, model_class
from hasten.models.weight_map import SAME, StoredTensor, Tie, WeightMap, WeightSpec
from hasten.ops import TORCH_DTYPES, Weight
from hasten.parallel.shard import overlap, resplit, shard_shape, split
from hasten.quantization import stored as stored_weight
from hasten.quantization.formats import registry as formats
from hasten.quantization.formats.base import Format, Module
from hasten.quantization.formats.files import METHODS
from hasten.quantization.stored import StoredWeight

_log = logging.getLogger(__name__)

RANK_FOLDER = re.compile(r"([1-9]\d*)-gpu")
"""Name of the folder that holds the files of so many ranks."""
RANK_FILE = "rank-{:05d}-of-{:05d}.safetensors"
"""Name of one rank's file in a ranked safetensors folder."""
METADATA_KEY = "hasten"
"""Entry of a rank file's metadata: JSON with version, ranks, rank, model and eos_token_ids."""
METADATA_VERSION = 1
_RANK_FILES = "rank-*-of-*.safetensors"
_HF_FILES = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
_WEIGHTS_AT_ONCE = 24
_MATRIX = 2
"""Axes of the weight of a linear layer; experts' weights are stacked along a third."""
_FLOATS = frozenset({torch.float64, *TORCH_DTYPES.values()})


class Source(ABC):
    """A checkpoint whose tensors are read when asked for, in hasten's layout."""

    kind: str
    """What the log calls its format."""
    label: str
    """The same, short, for `HF >> FT`."""
    manifest: Manifest | None = None
    ranks: int = 1
    """Shards that the files themselves hold."""
    quantization: Quantization | None = None
    """What the files, which are in full precision, are to be quantized with while they are loaded."""
    format: Format | None = None
    """How the files hold quantized weights; None: they are in full precision."""
    stored_quantization: str | None = None
    """The format's name, where the model holds weights as the files do."""

    def __init__(self, folder: Path, config: ModelConfig, weight_map: WeightMap) -> None:
        self.folder = folder
        self.config = _with_known_tokens(config, folder)
        self.weight_map = weight_map
        self.specs = weight_map.specs
        self.files: tuple[Path, ...] = ()
        self.generation_eos: tuple[int, ...] | None = None
        """End tokens that generation_config.json set when the checkpoint was converted."""

    @abstractmethod
    def shard(self, spec: WeightSpec, rank: int, size: int) -> Tensor:
        """Rank `rank`'s shard of `size`, in the stored type; often a view of a mapped file."""

    def weight(self, spec: WeightSpec, rank: int, size: int, dtype: torch.dtype) -> Weight:
        """Rank `rank`'s shard of `size`, contiguous: quantized where the files hold it so, else in `dtype`."""
        return self.shard(spec, rank, size).to(dtype).contiguous()

    def holds(self, spec: WeightSpec) -> bool:
        """Whether the files hold a weight that the configuration ties to another."""
        return False

    def repeats(self, tie: Tie) -> bool:
        """Whether a tied weight that the files hold has the same values as the one it is tied to."""
        return _equal(self.shard(tie.spec, 0, 1), self.shard(tie.to, 0, 1))

    def files_for(self, spec: WeightSpec, rank: int, size: int) -> Iterable[str]:
        """Names of the manifest's files that `shard` reads."""
        return ()

    def batches(self) -> Iterator[tuple[WeightSpec, ...]]:
        """All weights, grouped by the file that holds them, so that a reader needs one file open at a time."""
        yield self.specs

    def cache_ranges(self) -> Mapping[str, Tensor] | None:
        """Greatest keys and values of each head, [2, m] in fp32, by the name of the model's attention module.

        None where the files do not have them. CheckpointError and UnsupportedError name the tensor or key.
        """
        return None

    def release(self) -> None:  # noqa: B027 - a source may have nothing to close
        """Close the files that are open; they open again when they are needed."""


_COMPARED_AT_ONCE = 64 << 20
"""Bytes of each of two tensors that are compared at a time."""


def _equal(one: Tensor, other: Tensor) -> bool:
    """Whether two matrices hold the same values, whatever their types; stops soon after the first difference."""
    if one.data_ptr() == other.data_ptr() and one.dtype is other.dtype and one.stride() == other.stride():
        return True
    rows = max(1, _COMPARED_AT_ONCE // max(1, one[:1].nbytes))
    return all(
        bool((one[start : start + rows] == other[start : start + rows]).all()) for start in range(0, len(one), rows)
    )


def known_tokens(ids: tuple[int, ...], vocab_size: int, what: str) -> tuple[int, ...]:
    """The ids that a model can produce; a warning names the others, which are ignored as in transformers."""
    if unknown := [token for token in ids if not 0 <= token < vocab_size]:
        _log.warning("%s %s is not in the vocabulary of %d tokens; it is ignored", what, unknown, vocab_size)
    return tuple(token for token in ids if 0 <= token < vocab_size)


def _with_known_tokens(config: ModelConfig, folder: Path) -> ModelConfig:
    def known(name: str, *ids: int | None) -> tuple[int, ...]:
        given = tuple(token for token in ids if token is not None)
        return known_tokens(given, config.vocab_size, f"{folder}: {name}")

    return dataclasses.replace(
        config,
        bos_token_id=next(iter(known("bos_token_id", config.bos_token_id)), None),
        eos_token_ids=known("eos_token_id", *config.eos_token_ids),
        pad_token_id=next(iter(known("pad_token_id", config.pad_token_id)), None),
    )


def _has_own_head(source: Source) -> bool:
    """Whether the files hold a head other than the embedding to which the configuration ties it."""
    tie = source.weight_map.head_tie
    if tie is None or not source.holds(tie.spec):
        return False
    return not source.repeats(tie)


def _warn_of_head(path: Path) -> None:
    _log.warning(
        "%s ties the language model head to the embedding (tie_word_embeddings), but the weights have a head that "
        "differs from it: that head is used",
        path,
    )


class _TensorFile(Protocol):
    def keys(self) -> Iterable[str]: ...
    def get_tensor(self, name: str) -> Tensor: ...


class _Pickle:
    """A `.bin` file of torch, mapped where its format allows it."""

    def __init__(self, path: Path) -> None:
        try:
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=_is_zip(path))
        except pickle.UnpicklingError as error:
            raise CheckpointError(
                f"{path} is damaged, or holds more than tensors, which hasten does not execute: save it as safetensors"
            ) from error
        # torch's readers raise whatever the damage leads to
        except Exception as error:
            what = f"{path} cannot be read as a torch file ({_first_line(error)})"
            raise CheckpointError(f"{what}; copy it again") from error
        if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
            raise CheckpointError(f"{path} does not hold a plain set of named tensors; save the model's state_dict()")
        self._state: dict[str, Tensor] = state

    def keys(self) -> Iterable[str]:
        """Names of the tensors."""
        return self._state.keys()

    def get_tensor(self, name: str) -> Tensor:
        """One tensor, without a gradient."""
        return self._state[name].detach()


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _is_zip(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(4) == b"PK\x03\x04"


def _open_safetensors(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt", device="cpu")
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing; copy it again") from None
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is truncated or damaged ({_first_line(error)}); copy it again") from error


def _check_names(where: Path, expected: Iterable[str], found: Iterable[str]) -> None:
    expected, found = set(expected), set(found)
    for names, what, advice in (
        (expected - found, "lacks", "the checkpoint is incomplete, or its config.json is of another model"),
        (found - expected, "holds unknown", "it belongs to another model, or to a version that hasten does not know"),
    ):
        if names:
            first, more = min(names), f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise CheckpointError(f"{where} {what} tensor {first!r}{more}; {advice}")


def _check_tensor(where: Path, name: str, tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    if tuple(tensor.shape) != shape:
        raise CheckpointError(
            f"{where}: tensor {name!r} has shape {tuple(tensor.shape)}, the configuration asks for {shape}"
        )
    if tensor.dtype not in _FLOATS:
        raise CheckpointError(f"{where}: tensor {name!r} has type {tensor.dtype}; hasten reads fp32, fp16 and bf16")
    return tensor


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
        self._open: dict[Path, _TensorFile] = {}
        self._lock = Lock()
        first = next(path for name in _HF_FILES if (path := folder / name).exists())
        self.pickled = ".bin" in first.name
        self.kind = "pytorch bin" if self.pickled else "safetensors"
        self._index = _read_index(first) if first.suffix == ".json" else None
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
        _check_names(where, expected, own)
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

    def _opened(self, path: Path) -> _TensorFile:
        with self._lock:
            if path not in self._open:
                tensors: _TensorFile = _Pickle(path) if self.pickled else _open_safetensors(path)
                if self._index is not None:
                    _check_names(path, (name for name, file in self._index.items() if file == path), tensors.keys())
                self._open[path] = tensors
            return self._open[path]

    def shard(self, spec: WeightSpec, rank: int, size: int) -> Tensor:
        """A view of the mapped file; what is fused here and not there, or in another order, is copied."""
        stored = [self._stored(source) for source in spec.sources]
        return spec.shard(stored, rank, size, self.config.attention)

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
        places = {kind: self._names[name] for kind, name in self._quantized[source.name].items()}
        tensors = {kind: self._opened(path).get_tensor(name) for kind, (name, path) in places.items()}
        kind, (name, path) = next(iter(places.items()))
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
        return _check_tensor(path, name, self._opened(path).get_tensor(name), source.shape(self.config))

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


def _read_index(path: Path) -> dict[str, Path]:
    weights = read_json(path).get("weight_map")
    if not isinstance(weights, dict) or not weights:
        raise CheckpointError(f"{path} has no weight_map; copy it again")
    files = sorted(set(weights.values()))
    for name in files:
        if not isinstance(name, str) or Path(name).name != name:
            raise CheckpointError(f"{path} names {name!r}, which is no file of its folder")
        if not (path.parent / name).is_file():
            tensor = min(tensor for tensor, file in weights.items() if file == name)
            raise CheckpointError(
                f"{path.parent / name} is missing, but {path.name} finds {tensor!r} in it; copy it again"
            )
    return {name: path.parent / file for name, file in weights.items()}


class _RankedSource(Source):
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
    def _file(self, spec: WeightSpec, part: int) -> str:
        """Name of the file that holds it."""

    def shard(self, spec: WeightSpec, rank: int, size: int) -> Tensor:
        """A view of the rank's own file where the files have as many ranks, divided in the same way."""
        config, stored = self.config, self._in_files(spec)
        part, parts = partial(self._part, stored), self._parts(stored)
        same = stored.split is spec.split
        place = (rank, size) if same else (0, 1)
        found = resplit(part, parts, stored.split, *place, config.attention, config.vocab_size)
        return found if same else split(found, spec.split, rank, size, config.attention)

    def files_for(self, spec: WeightSpec, rank: int, size: int) -> Iterable[str]:
        """The rank's own files, or those whose shards overlap its own."""
        stored = self._in_files(spec)
        place = (rank, size) if stored.split is spec.split else (0, 1)
        needed = overlap(stored.split, *place, self._parts(stored), self.config.vocab_size)
        return {self._file(stored, part) for part in needed}


class FasterTransformerSource(_RankedSource):
    """`N-gpu/` as FasterTransformer's converters or hasten's wrote it.

    Where FasterTransformer's own writes an untied head transposed, a manifest tells hasten's files from those.
    """

    kind = "fastertransformer"
    label = "FT"

    def __init__(self, folder: Path, facts: Folder, config: ModelConfig) -> None:
        super().__init__(folder, config, model_class(config.architecture).weight_map(config))
        self.manifest = Manifest.read(folder)
        self.ranks, self.model_name, self.family = facts.ranks, facts.model_name, facts.family
        self.quantization = facts.quantization
        specs, tie = self.specs, self.weight_map.head_tie
        if tie is not None and self.holds(tie.spec):
            specs = (*specs, tie.spec)
        tensors = tuple(filter(self._needs, self.family.tensors(specs, self.config, self.ranks)))
        self._tensors = {tensor.spec.name: tensor for tensor in tensors if not tensor.extra}
        self.files = tuple(folder / tensor.file(part) for tensor in tensors for part in range(tensor.parts(self.ranks)))
        self._check_files(tensors)
        if self.manifest is None and (problem := self.family.unclear(self.config, self.ranks)):
            raise UnsupportedError(f"{folder}: {problem}; convert the original checkpoint, or give its 1-gpu folder")

    def holds(self, spec: WeightSpec) -> bool:
        """Whether there is a file of a weight that the configuration ties to another."""
        name = self.family.tensor(spec).file(0)
        return (self.folder / name).is_file() if self.manifest is None else name in self.manifest.files

    def repeats(self, tie: Tie) -> bool:
        """Whether the files of both are alike, in either layout of a head."""
        head, other = (self.folder / self._file(spec, 0) for spec in (tie.spec, tie.to))
        return filecmp.cmp(head, other, shallow=False) or super().repeats(tie)

    def _needs(self, tensor: FileTensor) -> bool:
        """Whether a file must be there, or is."""
        return not tensor.extra or (self.folder / tensor.file(0)).is_file()

    def _check_files(self, tensors: Iterable[FileTensor]) -> None:
        own = {tensor.file(part): tensor for tensor in tensors for part in range(tensor.parts(self.ranks))}
        stray = {path.name for path in self.folder.glob("model.*.bin")} - set(own)
        if stray:
            raise CheckpointError(f"{self.folder / min(stray)} belongs to no weight of this model; move it elsewhere")
        for name, tensor in own.items():
            self._check_file(self.folder / name, tensor)

    def _check_file(self, path: Path, tensor: FileTensor) -> None:
        if not path.is_file():
            raise CheckpointError(f"{path} is missing; copy it, or convert the checkpoint again")
        shape = tensor.shape(self.config, self.ranks)
        wanted, found = math.prod(shape) * TORCH_DTYPES[self.config.dtype].itemsize, path.stat().st_size
        if wanted != found:
            raise CheckpointError(
                f"{path} has {found} bytes, but {wanted} are {shape} of {self.config.dtype}: "
                "it is truncated or of another model; copy or convert it again"
            )

    def _parts(self, spec: WeightSpec) -> int:
        return self._tensors[spec.name].parts(self.ranks)

    def _file(self, spec: WeightSpec, part: int) -> str:
        return self._tensors[spec.name].file(part)

    def _part(self, spec: WeightSpec, part: int) -> Tensor:
        tensor = self._tensors[spec.name]
        shape = tensor.shape(self.config, self.ranks)
        if self.manifest is None and self.family.transposed_head and spec.name == "head.weight":
            return self._map(tensor, part, shape[::-1]).t()
        return tensor.parameter(self._map(tensor, part, shape))

    def _map(self, tensor: FileTensor, part: int, shape: tuple[int, ...]) -> Tensor:
        path = self.folder / tensor.file(part)
        size, dtype = math.prod(shape), TORCH_DTYPES[self.config.dtype]
        return torch.from_file(str(path), shared=False, size=size, dtype=dtype).view(shape)


def _joined(ini: ModelConfig, beside: ModelConfig, folder: Path) -> ModelConfig:
    """What config.json says, in the type of the files; CheckpointError where config.ini contradicts it."""
    for name in (
        "architecture",
        "num_layers",
        "hidden_size",
        "vocab_size",
        "attention",
        "residual_after_norm",
        "parallel_residual",
        "norm_first",
        "final_norm",
    ):
        if getattr(ini, name) != getattr(beside, name):
            raise CheckpointError(
                f"{folder / CONFIG_INI} and config.json beside it differ in {name} "
                f"({getattr(ini, name)} and {getattr(beside, name)}): they are of different models"
            )
    return dataclasses.replace(beside, dtype=ini.dtype)


class RankedSafetensorsSource(_RankedSource):
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

    def _file(self, spec: WeightSpec, part: int) -> str:
        return self.files[part].name

    def _part(self, spec: WeightSpec, part: int) -> Tensor:
        with self._lock:
            if part not in self._open:
                tensors = _open_safetensors(self.files[part])
                _check_names(self.files[part], (spec.name for spec in self.specs), tensors.keys())
                self._open[part] = tensors
            tensors = self._open[part]
        shape = shard_shape(spec.shape(self.config), spec.split, self.ranks, self.config.attention)
        return _check_tensor(self.files[part], spec.name, tensors.get_tensor(spec.name), shape)

    def batches(self) -> Iterator[tuple[WeightSpec, ...]]:
        """A few weights at a time: a file holds some of every layer, so whole files would be the whole model."""
        for start in range(0, len(self.specs), _WEIGHTS_AT_ONCE):
            yield self.specs[start : start + _WEIGHTS_AT_ONCE]

    def release(self) -> None:
        """Forget the open files, and with them what is mapped."""
        with self._lock:
            self._open.clear()


def _rank_metadata(path: Path) -> dict[str, Any]:
    raw = (_open_safetensors(path).metadata() or {}).get(METADATA_KEY)
    if raw is None:
        raise CheckpointError(f"{path} was not written by hasten: its metadata has no {METADATA_KEY!r}")
    facts: dict[str, Any] = json.loads(raw)
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
        made: dict[str, Any] = {"forced_eos_token_ids": forced}
        made |= {"attention": attention, "layer_attention": layers, "experts": experts, "eos_token_ids": ends}
        made["classifier"] = _classifier_from_json(raw.get("classifier"))
        made["encoder"] = _encoder_from_json(raw.get("encoder"))
        return ModelConfig(**raw | made)
    except (TypeError, KeyError, ConfigError) as error:
        raise CheckpointError(f"{path}: its metadata does not describe a model ({error}); convert it again") from error


class DummySource(Source):
    """Random weights for a folder that has only config.json: the same whole tensors whatever the number of ranks."""

    kind = "dummy"
    label = "dummy"
    scale: ClassVar[float] = 0.02
    seed: ClassVar[int] = 0
    device = torch.device("cpu")
    """Where the weights are made: a GPU takes a second for what takes a CPU minutes, but other values come out."""

    def shard(self, spec: WeightSpec, rank: int, size: int) -> Tensor:
        """Ones for a norm, zeros for a bias, and for the rest values that the tensor's name decides."""
        shape, dtype = spec.shape(self.config), TORCH_DTYPES[self.config.dtype]
        if spec.init == "normal":
            generator = torch.Generator(self.device).manual_seed(self.seed + zlib.crc32(spec.name.encode()))
            whole = torch.empty(shape, device=self.device).normal_(0, self.scale, generator=generator).to(dtype)
        else:
            whole = torch.full(shape, float(spec.init == "ones"), dtype=dtype, device=self.device)
        return split(whole, spec.split, rank, size, self.config.attention)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; CheckpointError names the file and what is wrong."""
    raw = _json(path)
    if not isinstance(raw, dict):
        raise CheckpointError(f"{path} is not a JSON object; copy it again")
    return raw


def read_json_list(path: Path) -> list[Any]:
    """A JSON list from a file; CheckpointError names the file and what is wrong."""
    raw = _json(path)
    if not isinstance(raw, list):
        raise CheckpointError(f"{path} is not a JSON list; copy it again")
    return raw


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path.parent} has no {path.name}: is it the folder of a model?") from None
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON ({error}); copy it again") from error


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of a small `model.safetensors` or `pytorch_model.bin`; CheckpointError where neither is whole."""
    path = folder / "model.safetensors"
    if path.is_file():
        with _open_safetensors(path) as tensors:
            return {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118 - it is no dict
    path = folder / "pytorch_model.bin"
    if not path.is_file():
        raise CheckpointError(f"{folder} has no model.safetensors and no pytorch_model.bin; copy it again")
    pickled = _Pickle(path)
    return {name: pickled.get_tensor(name) for name in pickled.keys()}  # noqa: SIM118


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


MODULES = "modules.json"
"""What sentence-transformers writes next to a model that gives vectors."""
UNKNOWN = "%s: ignored, since hasten does not know what they change: %s"
NOT_APPLIED = "%s: not applied, since every request brings its own settings: %s"


def _is_ranked(folder: Path) -> bool:
    return any(folder.glob(_RANK_FILES))


def is_rank_folder(folder: Path) -> bool:
    """Whether `folder` looks like an `N-gpu` that a converter wrote."""
    return folder.is_dir() and any(((folder / CONFIG_INI).is_file(), (folder / MANIFEST).is_file(), _is_ranked(folder)))


def rank_folders(folder: Path) -> dict[int, Path]:
    """The `N-gpu` folders inside `folder`, by N."""
    found = {int(match[1]): path for path in folder.iterdir() if (match := RANK_FOLDER.fullmatch(path.name))}
    return {ranks: path for ranks, path in sorted(found.items()) if is_rank_folder(path)}


def _not_a_folder(path: Path) -> str:
    if not path.exists():
        return f"{path} is missing; give the folder of a checkpoint"
    if path.suffix.lower() == ".gguf":
        return f"{path}: GGUF is not supported; give a folder with config.json and safetensors or .bin files"
    if path.suffix in (".safetensors", ".bin", ".pt", ".pth"):
        return f"{path} has weights alone; give its folder, which must also hold config.json"
    return f"{path} is a file; give the folder of a checkpoint"


def open_source(path: Path, ranks: int = 1) -> Source:
    """Open a checkpoint folder of any kind; inside OUT, `N-gpu` with N = `ranks` is preferred.

    CheckpointError names the file, the tensor and what to do.
    """
    if not path.is_dir():
        raise CheckpointError(_not_a_folder(path))
    if (path / ADAPTER).is_file():
        raise UnsupportedError(
            f"{path / ADAPTER}: adapters are not supported; merge it into its base model and save that (PEFT's "
            "merge_and_unload)"
        )
    if _is_ranked(path):
        return RankedSafetensorsSource(path)
    if (path / CONFIG_INI).is_file():
        return _open_faster_transformer(path)
    if any((path / name).exists() for name in _HF_FILES):
        return _open_hugging_face(path)
    inside = rank_folders(path)
    if inside:
        return open_source(inside.get(ranks) or next(iter(inside.values())), ranks)
    if not (path / "config.json").is_file() and (gguf := min(path.glob("*.gguf"), default=None)) is not None:
        raise CheckpointError(_not_a_folder(gguf))
    read_hf_config(path)
    raise CheckpointError(f"{path} has no weights: none of {', '.join(_HF_FILES)}, and no N-gpu folder")


def _open_faster_transformer(folder: Path) -> FasterTransformerSource:
    facts = read_folder(folder)
    parent = folder.resolve().parent
    beside = next((path for path in (folder, parent) if (path / "config.json").is_file()), None)
    if beside is None:
        config = facts.config
        if facts.family.unsaid is not None:
            _log.warning("%s does not say %s", folder / CONFIG_INI, facts.family.unsaid)
    else:
        config = _joined(facts.config, facts.family.stored(read_hf_config(beside)), folder)
    source = FasterTransformerSource(folder, facts, config)
    if not _has_own_head(source):
        return source
    if source.manifest is None and beside is not None:
        _warn_of_head(beside / "config.json")
    return FasterTransformerSource(folder, facts, dataclasses.replace(source.config, tie_word_embeddings=False))


def _open_hugging_face(folder: Path) -> HuggingFaceSource:
    config, stored_format = read_hf_config(folder), read_format(folder)
    source = HuggingFaceSource(folder, config, model_class(config.architecture).weight_map(config), stored_format)
    if _has_own_head(source):
        _warn_of_head(folder / "config.json")
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


def open_dummy(path: Path, device: torch.device) -> DummySource:
    """Random weights, made on `device`, for the model that config.json of `path` describes."""
    config = read_hf_config(path)
    if (stored := read_format(path)) is not None and stored.is_held:
        raise UnsupportedError(
            f"{path / 'config.json'} has quantized weights, but random ones are in full precision: remove its "
            "quantization_config; --quantization quantizes them"
        )
    source = DummySource(path, config, model_class(config.architecture).weight_map(config))
    source.device = device
    return source
