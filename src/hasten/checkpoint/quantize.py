"""Write a Hugging Face checkpoint again with quantized linear layers, in compressed-tensors' formats.

A `Rounding` says what the linear layers of a part of the model become, in hasten's layout; here they go back to the
layout of the files, and everything else is copied. Shapes: o output features, h input features.
"""

import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from hasten.checkpoint.files import read_json
from hasten.checkpoint.hub import resolve_model
from hasten.checkpoint.hugging_face import HuggingFaceSource
from hasten.checkpoint.sources import open_source
from hasten.checkpoint.target import appearing, clear_errors, copy_side_files
from hasten.core.dtypes import Quantization
from hasten.core.errors import CheckpointError, UnsupportedError
from hasten.core.model_config import ModelConfig
from hasten.models.weight_map import WeightSpec
from hasten.parallel.shard import Split
from hasten.quantization.formats.written import LEAST_GROUP, WRITTEN, WrittenScheme
from hasten.quantization.grid import RoundedWeight

_LINEAR = (Split.COLUMN, Split.ROW, Split.QKV, Split.GATE_UP)
_MATRIX = 2
_LAYER = re.compile(r"layers\.\d+\.")
_FILE_BYTES = 5_000_000_000
"""Of tensors in a file, which are in memory until it is written."""

Report = Callable[[int], None]
"""Gets the bytes, in the input, of tensors that are done."""
Change = RoundedWeight | Tensor
"""What a parameter becomes: quantized, or other values in full precision."""


class Rounding(Protocol):
    """A way to quantize the linear layers of a model, part by part and from its beginning to its end."""

    def changes(self, specs: Sequence[WeightSpec]) -> Mapping[str, Change]:
        """What parameters of a part become, by name: all of its linear layers, in hasten's layout, and others."""
        ...

    @property
    def error(self) -> str:
        """How far the model has been moved, in words for a closing line."""
        ...


@dataclass
class Errors:
    """Sums of squared errors, and of what they are errors of."""

    squares: float = 0.0
    of: float = 0.0

    def add(self, error: Tensor, of: Tensor) -> None:
        """Count the elements of a tensor of errors."""
        self.squares += float(error.square().sum())
        self.of += float(of.square().sum())

    def add_outputs(self, error_oh: Tensor, weight_oh: Tensor, hessian_hh: Tensor) -> None:
        """Count the outputs of a layer, by the mean of the outer products of its inputs and its weight's errors."""
        self.squares += float(((error_oh @ hessian_hh) * error_oh).sum())
        self.of += float(((weight_oh @ hessian_hh) * weight_oh).sum())

    @property
    def relative(self) -> float:
        """Root mean square, in units of what they are errors of."""
        return (self.squares / self.of) ** 0.5 if self.of else 0.0


class ToNearest:
    """Rounds each weight for itself, with scales by the largest magnitudes."""

    def __init__(self, source: HuggingFaceSource, scheme: WrittenScheme) -> None:
        self._source, self._scheme = source, scheme
        self._errors = Errors()

    def changes(self, specs: Sequence[WeightSpec]) -> Mapping[str, RoundedWeight]:
        """See `Rounding.changes`."""
        return {spec.name: self._rounded(spec) for spec in specs if is_linear(spec)}

    def _rounded(self, spec: WeightSpec) -> RoundedWeight:
        stored = self._source.shard(spec, 0, 1)
        weight_oh = stored.float()
        check_finite(spec, weight_oh)
        grid = self._scheme.grid
        rounded = grid.rounded(weight_oh, grid.scales(weight_oh, self._scheme.scale_dtype(stored.dtype)))
        self._errors.add(rounded.dequantized() - weight_oh, weight_oh)
        return rounded

    @property
    def error(self) -> str:
        """See `Rounding.error`."""
        return f"rounding error {self._errors.relative:.2%} of the weights' root mean square"


@dataclass(frozen=True)
class Summary:
    """What was written."""

    tensors: int
    """Quantized weights of the files."""
    bytes_before: int
    bytes_after: int
    """Of all tensors."""
    error: str
    """How far the model was moved."""
    kept_experts: bool
    """Whether there are experts, which stay in full precision."""


def is_linear(spec: WeightSpec) -> bool:
    """Whether a weight is one that is quantized: of a linear layer other than the head, and not of experts."""
    return spec.split in _LINEAR and len(spec.axes) == _MATRIX and not spec.stack


def check_finite(spec: WeightSpec, weight: Tensor) -> None:
    """CheckpointError where a weight has NaN or infinity."""
    if not bool(weight.isfinite().all()):
        raise CheckpointError(f"tensor {spec.stored_names} has NaN or infinity: the checkpoint is damaged")


def open_unquantized(model: str) -> HuggingFaceSource:
    """The Hugging Face checkpoint of a folder or an id on the hub; UnsupportedError where it is not to be quantized."""
    source = open_source(resolve_model(model))
    if not isinstance(source, HuggingFaceSource):
        raise UnsupportedError(f"{source.folder} is {source.kind}; give the Hugging Face checkpoint")
    if source.format is not None:
        raise UnsupportedError(
            f"{source.folder} is quantized already ({source.format.name}); give the full-precision checkpoint"
        )
    return source


def scheme_for(source: HuggingFaceSource, name: Quantization) -> WrittenScheme:
    """A scheme with groups that fit a model; UnsupportedError where none do."""
    shapes = [spec.shape(source.config) for spec in source.specs if is_linear(spec)]
    widths = sorted({shape[1] for shape in shapes})
    scheme = WRITTEN[name].with_groups_for(widths)
    if scheme is None:
        raise UnsupportedError(
            f"{name} needs input features that are a multiple of {LEAST_GROUP}, and some layers have "
            f"{', '.join(map(str, widths))}; use int8"
        )
    return scheme


def parts_of(specs: Sequence[WeightSpec]) -> Iterator[tuple[WeightSpec, ...]]:
    """What comes before the layers, layer by layer, and what comes after them."""
    layers: dict[str, list[WeightSpec]] = {}
    before: list[WeightSpec] = []
    after: list[WeightSpec] = []
    for spec in specs:
        found = _LAYER.match(spec.name)
        if found is not None:
            layers.setdefault(found[0], []).append(spec)
        else:
            (after if layers else before).append(spec)
    yield from (tuple(part) for part in (before, *layers.values(), after) if part)


def write_quantized(
    source: HuggingFaceSource, output: Path, scheme: WrittenScheme, rounding: Rounding, report: Report = lambda _: None
) -> Summary:
    """Write a checkpoint with quantized linear layers; on any error, and on a kill, there is no OUT.

    CheckpointError, ConfigError and UnsupportedError say what is wrong and what to do.
    """
    with clear_errors(str(output), report) as notify, appearing(output) as folder:
        writer = _Writer(source, scheme, folder)
        for specs in parts_of(source.specs):
            changes = rounding.changes(specs)
            notify(sum(writer.add(spec, changes.get(spec.name)) for spec in specs))
            source.release()
        notify(writer.add_rest())
        writer.finish()
    experts = source.config.experts is not None
    return Summary(writer.tensors, writer.bytes_before, writer.bytes_after, rounding.error, experts)


def stored_rows(spec: WeightSpec, config: ModelConfig) -> Tensor:
    """For each row of a parameter [o], the row of the stored tensors, end to end, that it comes from: int64."""
    counts = [source.shape(config)[1 if source.layout.transposed else 0] for source in spec.sources]
    rows = torch.arange(sum(counts)).split(counts)
    return spec.shard(rows, 0, 1, config.attention)


class _Writer:
    """What has been written of a checkpoint."""

    def __init__(self, source: HuggingFaceSource, scheme: WrittenScheme, folder: Path) -> None:
        self._source, self._scheme, self._folder = source, scheme, folder
        self._pending: dict[str, Tensor] = {}
        self._files: list[list[str]] = []
        """Names of the tensors of each file."""
        self._left = set(source.stored_names)
        self._taken: set[str] = set()
        """Names in the files of what was copied: a tied embedding may be stored as the head."""
        self._ignored: list[str] = []
        self.tensors = self.bytes_before = self.bytes_after = 0

    def add(self, spec: WeightSpec, change: Change | None) -> int:
        """Take a parameter, as it is stored or as it has become; bytes of what is stored."""
        bases = [source.name for source in spec.sources]
        before = sum(self._take(base) for base in bases)
        if isinstance(change, RoundedWeight):
            self._add_rounded(spec, change)
        elif change is not None:
            (base,) = bases
            self._put(self._source.stored_name(base), change)
        else:
            for base in bases:
                self._copy(base)
        return before

    def _take(self, base: str) -> int:
        self._left.discard(base)
        if self._source.stored_name(base) in self._taken:
            return 0
        nbytes = self._source.stored_tensor(base).nbytes
        self.bytes_before += nbytes
        return nbytes

    def _add_rounded(self, spec: WeightSpec, weight: RoundedWeight) -> None:
        order = stored_rows(spec, self._source.config).argsort()
        numbers = weight.numbers.cpu().view(torch.uint8)[order].view(weight.numbers.dtype)
        scales = weight.scales.cpu()[order]
        start = 0
        for source in spec.sources:
            rows = slice(start, start + source.shape(self._source.config)[1 if source.layout.transposed else 0])
            start = rows.stop
            module = self._source.stored_name(source.name).removesuffix(".weight")
            part = RoundedWeight(numbers[rows], scales[rows], weight.group_size)
            for kind, tensor in self._scheme.tensors(part).items():
                self._put(f"{module}.{kind}", tensor)
            self.tensors += 1

    def _copy(self, base: str) -> None:
        name, tensor = self._source.stored_name(base), self._source.stored_tensor(base)
        if name in self._taken:
            return
        self._taken.add(name)
        self._put(name, tensor)
        module = name.removesuffix(".weight")
        if tensor.dim() > 1 and name != module:
            self._ignored.append(module)

    def _put(self, name: str, tensor: Tensor) -> None:
        self._pending[name] = tensor.cpu().contiguous()
        self.bytes_after += tensor.nbytes
        if sum(each.nbytes for each in self._pending.values()) >= _FILE_BYTES:
            self._flush()

    def _flush(self) -> None:
        if not self._pending:
            return
        path = self._folder / f"part-{len(self._files)}.safetensors"
        try:
            save_file(self._pending, path, metadata={"format": "pt"})
        except SafetensorError as error:
            number = re.search(r"os error (\d+)", str(error))
            if number is None:
                raise CheckpointError(f"cannot write {path}: {error}") from error
            raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error
        self._files.append(list(self._pending))
        self._pending = {}

    def add_rest(self) -> int:
        """Copy what the files hold and no parameter is read from, such as a head that repeats the embedding."""
        before = 0
        for base in sorted(self._left):
            before += self._take(base)
            self._copy(base)
        return before

    def finish(self) -> None:
        """Write what is left, and config.json last."""
        self._flush()
        count = len(self._files)
        index: dict[str, str] = {}
        for number, names in enumerate(self._files):
            file = "model.safetensors" if count == 1 else f"model-{number + 1:05d}-of-{count:05d}.safetensors"
            (self._folder / f"part-{number}.safetensors").rename(self._folder / file)
            index |= dict.fromkeys(names, file)
        if count > 1:
            total = {"total_size": self.bytes_after}
            _write(self._folder / "model.safetensors.index.json", {"metadata": total, "weight_map": index})
        copy_side_files(self._source.folder, self._folder)
        raw = read_json(self._source.folder / "config.json")
        _write(self._folder / "config.json", raw | {"quantization_config": self._scheme.config(self._ignored)})


def _write(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
