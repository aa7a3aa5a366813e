"""Quantize a Hugging Face checkpoint: rounding to nearest, written in compressed-tensors' pack-quantized format."""

import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention
from safetensors.torch import save_file
from torch import Tensor

from hasten.checkpoint.hub import resolve_model
from hasten.checkpoint.sources import HuggingFaceSource, open_source, read_json
from hasten.checkpoint.target import SIDE_FILES
from hasten.core.config import Quantization
from hasten.core.errors import CheckpointError, ConfigError, UnsupportedError
from hasten.models.weight_map import StoredTensor
from hasten.parallel.shard import Split

BITS: Mapping[Quantization, int] = {"int4": 4, "int8": 8}
"""Schemes that can be written: int4 with scales of groups, int8 of output features."""
_GROUP_SIZES = (128, 64, 32, 16)
_LINEAR = (Split.COLUMN, Split.ROW, Split.QKV, Split.GATE_UP)


@dataclass(frozen=True)
class Summary:
    """What was written."""

    tensors: int
    """Quantized ones."""
    bytes_before: int
    bytes_after: int
    """Of all tensors."""
    error: float
    """Root mean square of the rounding errors, relative to that of the weights."""


def quantize(model: str, output: Path, scheme: Quantization, report: Callable[[int], None] = lambda _: None) -> Summary:
    """Write a quantized copy of a checkpoint, given as a folder or a Hugging Face id; on any error there is none.

    `report` is called with the bytes of each tensor that is done. At most one file of the input is held in memory, as
    it is written. CheckpointError, ConfigError and UnsupportedError say what is wrong
    and what to do.
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ConfigError(f"{output} exists; give a folder that is new or empty")
    source = open_source(resolve_model(model))
    if not isinstance(source, HuggingFaceSource):
        raise UnsupportedError(f"{source.folder} is {source.kind}; give the Hugging Face checkpoint")
    if source.format is not None:
        raise UnsupportedError(f"{source.folder} is quantized already ({source.format.name})")
    job = _Job(source, scheme)
    with _appears(output) as folder:
        for number, path in enumerate(source.files, 1):
            job.write(folder / _file(number, len(source.files)), path, report)
            source.release()
        job.finish(folder)
    return job.summary


def _file(number: int, count: int) -> str:
    return "model.safetensors" if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"


@contextmanager
def _appears(output: Path) -> Iterator[Path]:
    """A folder that becomes `output` at the end, or vanishes on an error."""
    output.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=".hasten-", dir=output.parent))
    try:
        folder.chmod(0o755)
        yield folder
        os.replace(folder, output)  # noqa: PTH105 - one that is there is empty
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


class _Job:
    """One checkpoint and what has been written of it."""

    def __init__(self, source: HuggingFaceSource, scheme: Quantization) -> None:
        self.source = source
        self.bits = BITS[scheme]
        self.linear = {
            stored.name: stored
            for spec in source.specs
            if spec.split in _LINEAR and len(spec.axes) == 2 and not spec.stack
            for stored in spec.sources
        }
        self.group_size = _group_size(self.linear.values(), source) if scheme == "int4" else None
        self.index: dict[str, str] = {}
        self.ignored: list[str] = []
        self.before = self.after = 0
        self.squares = self.errors = 0.0

    def write(self, target: Path, path: Path, report: Callable[[int], None]) -> None:
        """Write what one file holds."""
        written: dict[str, Tensor] = {}
        for base, name in self.source.tensors_in(path):
            tensor = self.source.stored_tensor(name, path)
            module = name.removesuffix(".weight")
            if base in self.linear:
                written |= {f"{module}.{kind}": part for kind, part in self._rounded(base, name, tensor).items()}
            else:
                written[name] = tensor.contiguous()
                if tensor.dim() > 1 and name != module:
                    self.ignored.append(module)
            self.before += tensor.nbytes
            report(tensor.nbytes)
        save_file(written, target, metadata={"format": "pt"})
        self.index |= dict.fromkeys(written, target.name)
        self.after += sum(tensor.nbytes for tensor in written.values())

    def _rounded(self, base: str, name: str, tensor: Tensor) -> dict[str, Tensor]:
        weight = (tensor.t() if self.linear[base].layout.transposed else tensor).float()
        dtype = tensor.dtype if tensor.dtype in (torch.float16, torch.bfloat16) else torch.float32
        values, scales = round_to_nearest(weight, self.bits, self.group_size or weight.shape[1], dtype)
        if not bool(scales.isfinite().all()):
            raise CheckpointError(f"tensor {name!r} has NaN or infinity: the checkpoint is damaged")
        steps = scales.float().repeat_interleave(self.group_size or weight.shape[1], 1)
        found = (values.float() - (1 << (self.bits - 1))) * steps
        self.squares += float(weight.square().sum())
        self.errors += float((found - weight).square().sum())
        return {
            "weight_packed": _words(values, self.bits),
            "weight_scale": scales,
            "weight_shape": torch.tensor(weight.shape),
        }

    def finish(self, folder: Path) -> None:
        """Write config.json, the index, and what else belongs to a checkpoint."""
        for name in SIDE_FILES:
            if (self.source.folder / name).is_file():
                shutil.copyfile(self.source.folder / name, folder / name)
        raw = read_json(self.source.folder / "config.json")
        _write(folder / "config.json", raw | {"quantization_config": self._config()})
        if len(self.source.files) > 1:
            total = {"total_size": self.after}
            _write(folder / "model.safetensors.index.json", {"metadata": total, "weight_map": self.index})

    def _config(self) -> dict[str, Any]:
        weights = {
            "num_bits": self.bits,
            "type": "int",
            "symmetric": True,
            "strategy": "channel" if self.group_size is None else "group",
            "group_size": self.group_size,
            "dynamic": False,
            "actorder": None,
            "block_structure": None,
            "observer": "minmax",
        }
        group = {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None}
        return {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "quantization_status": "compressed",
            "config_groups": {"group_0": group},
            "ignore": sorted({*self.ignored, "lm_head"}),
            "kv_cache_scheme": None,
        }

    @property
    def summary(self) -> Summary:
        """What was written."""
        error = math.sqrt(self.errors / self.squares) if self.squares else 0.0
        return Summary(len(self.linear), self.before, self.after, error)


def _group_size(linear: Iterable[StoredTensor], source: HuggingFaceSource) -> int:
    widths = {each.shape(source.config)[0 if each.layout.transposed else 1] for each in linear}
    size = next((size for size in _GROUP_SIZES if all(width % size == 0 for width in widths)), None)
    if size is None:
        raise UnsupportedError(
            f"int4 needs input features that are a multiple of {_GROUP_SIZES[-1]}, and some layers have "
            f"{', '.join(map(str, sorted(widths)))}; use int8"
        )
    return size


def round_to_nearest(weight_oh: Tensor, bits: int, size: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Values without sign [o, h] in uint8, and scales [o, g] in `dtype`, of a weight in fp32 whose groups divide it."""
    middle = 1 << (bits - 1)
    grouped = weight_oh.unflatten(1, (-1, size))
    scales = (grouped.abs().amax(2) / (middle - 0.5)).to(dtype)
    steps = scales.float().masked_fill(scales == 0, 1.0).unsqueeze(2)
    values = (grouped / steps).round_().clamp_(-middle, middle - 1).add_(middle)
    return values.flatten(1).to(torch.uint8), scales


def _words(values: Tensor, bits: int) -> Tensor:
    """Values in words of 32 bits along the rows, the first in the lowest bits, with zeros at the end."""
    octets = values if bits == 8 else F.pad(values, (0, values.shape[1] % 2)).unflatten(1, (-1, 2))
    octets = octets if bits == 8 else octets[:, :, 0] | (octets[:, :, 1] << 4)
    return F.pad(octets, (0, -octets.shape[1] % 4)).contiguous().view(torch.int32)


def _write(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
