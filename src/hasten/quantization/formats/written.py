"""Schemes that checkpoints are written with, in compressed-tensors' formats: grids, tensors, and what config.json says.

Shapes: o output features, h input features, g groups of input features.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from hasten.core.dtypes import Quantization
from hasten.quantization.formats.pack_quantized import words
from hasten.quantization.grid import E4M3, Grid, RoundedWeight


@dataclass(frozen=True)
class WrittenScheme:
    """How linear layers are written."""

    name: Quantization
    grid: Grid
    format: str
    """pack-quantized, int-quantized or float-quantized."""

    @property
    def rounds_to(self) -> torch.dtype | None:
        """What inputs are rounded to, each token with a scale of its own; None: they stay as they are."""
        return None if self.format == "pack-quantized" else self.grid.dtype

    def scale_dtype(self, weight: torch.dtype) -> torch.dtype:
        """The type of scales of a weight that is stored in a type.

        Scales of packed weights have its 16 bits, which kernels multiply with; others are read in fp32, and in 16 bits
        a row's largest value would miss the end of the grid.
        """
        return weight if self.rounds_to is None and weight.itemsize == _SIXTEEN_BITS else torch.float32

    def with_groups_for(self, widths: Iterable[int]) -> "WrittenScheme | None":
        """The scheme with the largest groups, up to its own, that divide the input features of all layers; or None."""
        if self.grid.group_size is None:
            return self
        sizes = (size for size in _GROUP_SIZES if all(width % size == 0 for width in set(widths)))
        size = next(sizes, None)
        return None if size is None else replace(self, grid=replace(self.grid, group_size=size))

    def tensors(self, weight: RoundedWeight) -> Mapping[str, Tensor]:
        """A layer's tensors by what they are called behind its name."""
        if self.format != "pack-quantized":
            return {"weight": weight.numbers, "weight_scale": weight.scales}
        unsigned = (weight.numbers + (1 << (self.grid.bits - 1))).to(torch.uint8)
        return {
            "weight_packed": words(unsigned, self.grid.bits),
            "weight_scale": weight.scales,
            "weight_shape": torch.tensor(weight.numbers.shape),
        }

    def config(self, ignored: Iterable[str]) -> dict[str, Any]:
        """`quantization_config`; `ignored`: modules that stay in full precision."""
        common = {
            "num_bits": self.grid.bits,
            "type": "float" if self.grid.dtype == E4M3 else "int",
            "symmetric": True,
            "actorder": None,
            "block_structure": None,
        }
        weights = common | {
            "strategy": "channel" if self.grid.group_size is None else "group",
            "group_size": self.grid.group_size,
            "dynamic": False,
            "observer": "minmax",
        }
        inputs = common | {"strategy": "token", "group_size": None, "dynamic": True, "observer": None}
        group = {
            "targets": ["Linear"],
            "weights": weights,
            "input_activations": None if self.rounds_to is None else inputs,
            "output_activations": None,
        }
        return {
            "quant_method": "compressed-tensors",
            "format": self.format,
            "quantization_status": "compressed",
            "config_groups": {"group_0": group},
            "ignore": sorted({*ignored, "lm_head"}),
            "kv_cache_scheme": None,
        }


_SIXTEEN_BITS = 2
_GROUP_SIZES = (128, 64, 32, 16)
WRITTEN: Mapping[str, WrittenScheme] = {
    scheme.name: scheme
    for scheme in (
        WrittenScheme("int4", Grid(4, group_size=_GROUP_SIZES[0]), "pack-quantized"),
        WrittenScheme("int8", Grid(8), "pack-quantized"),
        WrittenScheme("w8a8", Grid(8), "int-quantized"),
        WrittenScheme("fp8", Grid(8, E4M3), "float-quantized"),
    )
}
LEAST_GROUP = _GROUP_SIZES[-1]
