"""Writers of the two formats that hasten makes; each file in blocks, cast first, in C order."""

import json
import math
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from threading import Event
from typing import ClassVar, Literal

import torch
from torch import Tensor

from hasten.checkpoint.faster_transformer.family import Family, FileTensor
from hasten.checkpoint.faster_transformer.ini import CONFIG_INI, ini_text
from hasten.checkpoint.manifest import Manifest, Piece, PieceHasher, pieces_of
from hasten.checkpoint.ranked import METADATA_KEY, METADATA_VERSION, RANK_FILE
from hasten.checkpoint.source import Source
from hasten.core.dtypes import DTypeName
from hasten.core.errors import CheckpointError
from hasten.models.weight_map import WeightSpec
from hasten.ops import TORCH_DTYPES
from hasten.parallel.shard import WHOLE, shard_shape

Format = Literal["fastertransformer", "safetensors"]
BLOCK = 4 << 20
"""Bytes, about, that a writer holds of one shard: small enough for a cache, so that the transpose stays in it."""
_ALIGN = 64


class StoppedError(Exception):
    """Another writer failed; this one gave up."""


@dataclass(frozen=True)
class Part:
    """One shard of one weight, and where it goes."""

    spec: WeightSpec
    rank: int
    size: int
    """Ranks that the format splits it over: 1 where a file holds it whole for all of them."""
    split: bool
    """Whether each rank has a shard of its own, be there only one."""
    name: str
    """Its name in the log."""
    file: str
    shape: tuple[int, ...]
    """As the file has it."""
    offset: int
    nbytes: int
    transposed: bool
    """Whether the file holds the transpose of `values`."""
    values: Callable[[Source], Tensor]
    """In hasten's layout."""


class Writer(ABC):
    """Knows every part of the output beforehand; parts may be written in any order and by several threads."""

    format: ClassVar[Format]
    label: ClassVar[str]

    def __init__(self, source: Source, folder: Path, ranks: int, dtype: DTypeName) -> None:
        self.source = source
        self.folder = folder
        self.ranks = ranks
        self.dtype = dtype
        self.parts: dict[str, list[Part]] = {spec.name: [] for spec in source.specs}
        self._pieces: dict[tuple[str, int], tuple[Piece, ...]] = {}
        self._lay_out()

    @abstractmethod
    def _lay_out(self) -> None:
        """Fill `parts`, in the order of ranks within a weight."""

    @abstractmethod
    def start(self) -> None:
        """Write what comes before the weights."""

    @property
    def nbytes(self) -> int:
        """Bytes of all weights."""
        return sum(part.nbytes for parts in self.parts.values() for part in parts)

    def _nbytes(self, shape: tuple[int, ...]) -> int:
        return math.prod(shape) * TORCH_DTYPES[self.dtype].itemsize

    def write(self, part: Part, stop: Event) -> None:
        """Cast and write one part; CheckpointError for a value that the type cannot hold."""
        hasher = PieceHasher()
        shard = part.values(self.source)
        file = os.open(self.folder / part.file, os.O_WRONLY | os.O_CREAT, 0o666)
        try:
            offset = part.offset
            for block in _blocks(shard, TORCH_DTYPES[self.dtype], part.transposed):
                if stop.is_set():
                    raise StoppedError
                _check_finite(block, part.spec, self.source, self.dtype)
                data = memoryview(block.reshape(-1).view(torch.uint8).numpy().data)
                _write_all(file, data, offset)
                hasher.update(data)
                offset += len(data)
        finally:
            os.close(file)
        self._pieces[part.file, part.offset] = hasher.pieces()

    def finish(self) -> None:
        """Write the manifest, when all parts are written."""
        files: dict[str, tuple[Piece, ...]] = {}
        for name, offset in sorted(self._pieces):
            files[name] = files.get(name, ()) + self._pieces[name, offset]
        Manifest(self.format, self.ranks, self.dtype, files).write(self.folder)


def _blocks(shard: Tensor, dtype: torch.dtype, transposed: bool) -> Iterator[Tensor]:
    """The shard's values in the order of the file, as contiguous blocks of about `BLOCK` bytes."""
    axis = 1 if transposed else 0
    length = shard.shape[axis]
    step = max(1, BLOCK * length // (shard.numel() * dtype.itemsize))
    for start in range(0, length, step):
        block = shard.narrow(axis, start, min(step, length - start)).to(dtype).contiguous()
        yield block.t().contiguous() if transposed else block


def _check_finite(block: Tensor, spec: WeightSpec, source: Source, dtype: DTypeName) -> None:
    if not all(math.isfinite(float(end)) for end in block.aminmax()):
        stored = source.shard(spec, 0, 1)
        largest = float(stored.nan_to_num(0, math.inf, -math.inf).abs().max())
        if stored.isnan().any() or math.isinf(largest):
            what = "not a number" if stored.isnan().any() else "an infinity"
            raise CheckpointError(
                f"tensor {spec.stored_names} holds {what}: the checkpoint is damaged, or its training diverged"
            )
        raise CheckpointError(
            f"tensor {spec.stored_names} holds {largest:g}, which {dtype} cannot; "
            f"convert with -dt {'bf16 or fp32' if dtype == 'fp16' else 'fp32'}"
        )


def _write_all(file: int, data: memoryview, offset: int) -> None:
    while data:
        written = os.pwrite(file, data, offset)
        data, offset = data[written:], offset + written


class FasterTransformerWriter(Writer):
    """One headerless file a weight or shard, and config.ini, as FasterTransformer's converters write them."""

    format: ClassVar[Format] = "fastertransformer"
    label = "FT"

    def __init__(
        self, source: Source, folder: Path, ranks: int, dtype: DTypeName, family: Family, model_name: str
    ) -> None:
        self.family = family
        self.model_name = model_name
        super().__init__(source, folder, ranks, dtype)

    def _lay_out(self) -> None:
        for tensor in self.family.tensors(self.source.specs, self.source.config, self.ranks):
            size = tensor.parts(self.ranks)
            self.parts[tensor.spec.name] += [self._part(tensor, rank, size) for rank in range(size)]

    def _part(self, tensor: FileTensor, rank: int, size: int) -> Part:
        shape = tensor.shape(self.source.config, self.ranks)
        return Part(
            spec=tensor.spec,
            rank=rank,
            size=size,
            split=tensor.is_split,
            name=tensor.name,
            file=tensor.file(rank),
            shape=shape,
            offset=0,
            nbytes=self._nbytes(shape),
            transposed=tensor.is_transposed,
            values=lambda source: tensor.values(source.shard, rank, size, TORCH_DTYPES[self.dtype]),
        )

    def start(self) -> None:
        """Write config.ini."""
        sections = self.family.sections(self.source.config, self.model_name, self.ranks, self.dtype)
        text = ini_text(sections, spaced=self.family.spaced).encode()
        (self.folder / CONFIG_INI).write_bytes(text)
        self._pieces[CONFIG_INI, 0] = pieces_of(text)


class RankedSafetensorsWriter(Writer):
    """One safetensors file a rank, in hasten's names and layout; its metadata describes the model."""

    format: ClassVar[Format] = "safetensors"
    label = "safetensors"
    _TYPES: ClassVar[dict[DTypeName, str]] = {"fp32": "F32", "fp16": "F16", "bf16": "BF16"}

    def __init__(
        self, source: Source, folder: Path, ranks: int, dtype: DTypeName, eos_token_ids: tuple[int, ...] | None
    ) -> None:
        self.eos_token_ids = eos_token_ids
        self._headers: list[bytes] = []
        super().__init__(source, folder, ranks, dtype)

    def _lay_out(self) -> None:
        for rank in range(self.ranks):
            config = self.source.config
            shapes = {
                spec: shard_shape(spec.shape(config), spec.split, self.ranks, config.attention)
                for spec in self.source.specs
            }
            header = self._header(rank, shapes)
            self._headers.append(header)
            offset = len(header)
            for spec, shape in shapes.items():
                file = RANK_FILE.format(rank, self.ranks)
                part = self._part(spec, rank, file, shape, offset)
                self.parts[spec.name].append(part)
                offset += part.nbytes

    def _part(self, spec: WeightSpec, rank: int, file: str, shape: tuple[int, ...], offset: int) -> Part:
        return Part(
            spec=spec,
            rank=rank,
            size=self.ranks,
            split=spec.split not in WHOLE,
            name=spec.name,
            file=file,
            shape=shape,
            offset=offset,
            nbytes=self._nbytes(shape),
            transposed=False,
            values=lambda source: source.shard(spec, rank, self.ranks),
        )

    def _header(self, rank: int, shapes: dict[WeightSpec, tuple[int, ...]]) -> bytes:
        model = {**asdict(self.source.config), "dtype": self.dtype}
        facts = {"version": METADATA_VERSION, "ranks": self.ranks, "rank": rank, "model": model}
        facts["eos_token_ids"] = self.eos_token_ids
        entries: dict[str, object] = {"__metadata__": {"format": "pt", METADATA_KEY: json.dumps(facts)}}
        start = 0
        for spec, shape in shapes.items():
            stop = start + math.prod(shape) * TORCH_DTYPES[self.dtype].itemsize
            entries[spec.name] = {"dtype": self._TYPES[self.dtype], "shape": shape, "data_offsets": [start, stop]}
            start = stop
        text = json.dumps(entries, separators=(",", ":")).encode()
        text += b" " * (-(8 + len(text)) % _ALIGN)
        return len(text).to_bytes(8, "little") + text

    def start(self) -> None:
        """Write the headers."""
        for rank, header in enumerate(self._headers):
            name = RANK_FILE.format(rank, self.ranks)
            (self.folder / name).write_bytes(header)
            self._pieces[name, 0] = pieces_of(header)
