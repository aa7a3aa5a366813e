"""Weights in FasterTransformer's folders."""

import dataclasses
import filecmp
import logging
import math
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from hasten.checkpoint.faster_transformer.family import FileTensor
from hasten.checkpoint.faster_transformer.folder import Folder, family_of, read_folder
from hasten.checkpoint.faster_transformer.ini import CONFIG_INI
from hasten.checkpoint.hugging_face import read_hf_config
from hasten.checkpoint.manifest import Manifest
from hasten.checkpoint.ranked import RankedSource
from hasten.checkpoint.source import has_own_head, warn_of_head
from hasten.core.errors import CheckpointError, UnsupportedError
from hasten.core.model_config import ModelConfig
from hasten.models.registry import model_class
from hasten.models.weight_map import Tie, WeightSpec
from hasten.ops import TORCH_DTYPES

_log = logging.getLogger(__name__)


class FasterTransformerSource(RankedSource):
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
        self._tensors: dict[str, tuple[FileTensor, ...]] = {}
        """Those of each parameter, in the order of its parts."""
        for tensor in tensors:
            if not tensor.extra:
                self._tensors[tensor.spec.name] = (*self._tensors.get(tensor.spec.name, ()), tensor)
        self.files = tuple(folder / tensor.file(part) for tensor in tensors for part in range(tensor.parts(self.ranks)))
        self._check_files(tensors)
        if self.manifest is None and (problem := self.family.unclear(self.config, self.ranks)):
            raise UnsupportedError(f"{folder}: {problem}; convert the original checkpoint, or give its 1-gpu folder")

    def holds(self, spec: WeightSpec) -> bool:
        """Whether there is a file of a weight that the configuration ties to another."""
        name = self.family.tensors_of(spec)[0].file(0)
        return (self.folder / name).is_file() if self.manifest is None else name in self.manifest.files

    def repeats(self, tie: Tie) -> bool:
        """Whether the files of both are alike, in either layout of a head."""
        head, other = (self.folder / self._files(spec, 0)[0] for spec in (tie.spec, tie.to))
        return filecmp.cmp(head, other, shallow=False) or super().repeats(tie)

    def _needs(self, tensor: FileTensor) -> bool:
        """Whether a file must be there, or is."""
        return not tensor.extra or (self.folder / tensor.file(0)).is_file()

    def _check_files(self, tensors: Iterable[FileTensor]) -> None:
        own = {tensor.file(part): tensor for tensor in tensors for part in range(tensor.parts(self.ranks))}
        stray = {path.name for path in self.folder.glob(f"{self.family.prefix}*.bin")} - set(own)
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
        return self._tensors[spec.name][0].parts(self.ranks)

    def _in_files(self, spec: WeightSpec) -> WeightSpec:
        return self._tensors[spec.name][0].spec

    def _files(self, spec: WeightSpec, part: int) -> list[str]:
        return [tensor.file(part) for tensor in self._tensors[spec.name]]

    def _part(self, spec: WeightSpec, part: int) -> Tensor:
        stored = [self._stored(tensor, spec, part) for tensor in self._tensors[spec.name]]
        return stored[0] if len(stored) == 1 else torch.cat(stored)

    def _stored(self, tensor: FileTensor, spec: WeightSpec, part: int) -> Tensor:
        shape = tensor.shape(self.config, self.ranks)
        if self.manifest is None and self.family.transposed_head and spec.name == "head.weight":
            return self._map(tensor, part, shape[::-1]).t()
        return tensor.parameter(self._map(tensor, part, shape))

    def _map(self, tensor: FileTensor, part: int, shape: tuple[int, ...]) -> Tensor:
        path = self.folder / tensor.file(part)
        size, dtype = math.prod(shape), TORCH_DTYPES[self.config.dtype]
        return torch.from_file(str(path), shared=False, size=size, dtype=dtype).view(shape)


def _joined(facts: Folder, beside: ModelConfig, folder: Path) -> ModelConfig:
    """What config.json says, in the type of the files; CheckpointError where config.ini contradicts it."""
    ini = facts.config
    names = [] if family_of(beside.architecture) is facts.family else ["architecture"]
    for name in (
        *names,
        "num_layers",
        "hidden_size",
        "vocab_size",
        "attention",
        "encoder",
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


def open_faster_transformer(folder: Path) -> FasterTransformerSource:
    """The weights of `folder`, which a config.json in it, or beside it, may describe better than its config.ini."""
    facts = read_folder(folder)
    parent = folder.resolve().parent
    beside = next((path for path in (folder, parent) if (path / "config.json").is_file()), None)
    if beside is None:
        config = facts.config
        if facts.family.unsaid is not None:
            _log.warning("%s does not say %s", folder / CONFIG_INI, facts.family.unsaid)
    else:
        config = _joined(facts, facts.family.stored(read_hf_config(beside)), folder)
    source = FasterTransformerSource(folder, facts, config)
    if not has_own_head(source):
        return source
    if source.manifest is None and beside is not None:
        warn_of_head(beside / "config.json")
    return FasterTransformerSource(folder, facts, dataclasses.replace(source.config, tie_word_embeddings=False))
