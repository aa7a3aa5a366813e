"""The interface of checkpoint readers, and random weights behind the same interface."""

import dataclasses
import logging
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from hasten.checkpoint.manifest import Manifest
from hasten.core.dtypes import Quantization
from hasten.core.model_config import ModelConfig
from hasten.models.weight_map import Tie, WeightMap, WeightSpec
from hasten.ops import TORCH_DTYPES, Weight
from hasten.parallel.shard import split
from hasten.quantization.formats.base import Format

_log = logging.getLogger(__name__)


def _as_it_is(tensor: Tensor) -> Tensor:
    return tensor


def _nothing(_path: Path, _name: str) -> Tensor | None:
    return None


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
        self.upload: Callable[[Tensor], Tensor] = _as_it_is
        """Where whole tensors of the files are wanted, before they are put into hasten's layout: on a GPU that takes no
        time. As it is for a rank that needs parts of them."""
        self.arrived: Callable[[Path, str], Tensor | None] = _nothing
        """Tensors of the files that come to the device by another way, by file and name."""
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

    @property
    def plain_files(self) -> Sequence[Path]:
        """Files whose tensors a device may have as they are, in safetensors' form; none where there are no such."""
        return ()

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


def _equal(left: Tensor, right: Tensor) -> bool:
    """Whether two matrices hold the same values, whatever their types; stops soon after the first difference."""
    if left.data_ptr() == right.data_ptr() and left.dtype is right.dtype and left.stride() == right.stride():
        return True
    rows = max(1, _COMPARED_AT_ONCE // max(1, left[:1].nbytes))
    return all(
        bool((left[start : start + rows] == right[start : start + rows]).all()) for start in range(0, len(left), rows)
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
        forced_bos_token_id=next(iter(known("forced_bos_token_id", config.forced_bos_token_id)), None),
        forced_eos_token_ids=known("forced_eos_token_id", *config.forced_eos_token_ids),
    )


def has_own_head(source: Source) -> bool:
    """Whether the files hold a head other than the embedding to which the configuration ties it."""
    tie = source.weight_map.head_tie
    if tie is None or not source.holds(tie.spec):
        return False
    return not source.repeats(tie)


def warn_of_head(path: Path) -> None:
    """Log that the head of the weights is used, and not the tie that the configuration in `path` says."""
    _log.warning(
        "%s ties the language model head to the embedding (tie_word_embeddings), but the weights have a head that "
        "differs from it: that head is used",
        path,
    )


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
