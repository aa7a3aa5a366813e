"""Weights of 8 bits whose inputs have 8 bits, too: compressed-tensors' int-quantized and float-quantized, and fp8.

Models hold them as the files do, except those with scales of blocks, which become full precision. Each token's inputs
have a scale of their own: static ones, which files may have, are not used. Shapes: o output features, h input features.
"""

import math
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hasten.core.errors import ConfigError, UnsupportedError
from hasten.ops import QuantizedWeight, Weight
from hasten.quantization.formats.base import Module, find
from hasten.quantization.formats.scheme import Arguments
from hasten.quantization.stored import StoredWeight

_E4M3 = torch.float8_e4m3fn


@dataclass(frozen=True)
class EightBitQuantized:
    """W8A8 of int8 or of e4m3, with scales of output features, the whole weight or blocks; of int8 W8A16, too."""

    kind: str
    """`type` of the weights: int or float."""
    dtype: torch.dtype
    strategies: Sequence[str]
    required: Sequence[str] = ("weight", "weight_scale")
    optional: Sequence[str] = ("input_scale", "input_zero_point")

    def check(self, weights: Arguments, activations: Arguments | None) -> None:
        """See `Packing.check`."""
        self._check_kind(weights)
        if weights.strategy not in self.strategies:
            raise UnsupportedError(
                f"{weights.key}: strategy {weights.strategy!r}; {', '.join(self.strategies)} are supported"
            )
        if activations is not None:
            self._check_kind(activations)
        elif self.kind == "float":
            raise UnsupportedError(f"{weights.key}: weights of type float without input_activations are not supported")

    def _check_kind(self, arguments: Arguments) -> None:
        if (arguments.type, arguments.num_bits) != (self.kind, 8):
            found = f"{arguments.type} of num_bits {arguments.num_bits}"
            raise UnsupportedError(f"{arguments.key}: {found}; {self.kind} of 8 bits is supported")
        if not arguments.symmetric:
            raise UnsupportedError(f"{arguments.key}: symmetric false is not supported")

    def read(self, module: Module, weights: Arguments, activations: Arguments | None) -> StoredWeight:
        """See `Packing.read`."""
        if weights.strategy == "block":
            return read_blocks(module, "weight_scale", weights.block_structure, f"{weights.key}.block_structure")
        of_rows = weights.strategy == "channel"
        pack = _pack_weights if activations is None else _pack
        values = module.tensor("weight", module.shape, (self.dtype,), f"{weights.key}.type {weights.type}")
        scales = _row_scales(module, of_rows, f"{weights.key}.strategy {weights.strategy}")
        return StoredWeight(values, scales, pack)


INT_QUANTIZED = EightBitQuantized("int", torch.int8, ("tensor", "channel"))
FLOAT_QUANTIZED = EightBitQuantized("float", _E4M3, ("tensor", "channel", "block"))


class FP8:
    """`quant_method` fp8: e4m3 with scales of blocks, as DeepSeek's files have them, or of the whole weight."""

    name = "fp8"
    cache_dtype = _E4M3

    def __init__(self, raw: Mapping[str, Any]) -> None:
        if (kind := raw.get("fmt", "e4m3")) != "e4m3":
            raise UnsupportedError(f"fmt {kind!r} is not supported; e4m3 is")
        self.block = raw.get("weight_block_size")
        if self.block is not None and not _is_block(self.block):
            raise ConfigError(f"weight_block_size {self.block!r} is not two sizes")

    @property
    def is_held(self) -> bool:
        """See `Format.is_held`."""
        return self.block is None

    def find(self, module: str, names: Container[str]) -> Mapping[str, str] | None:
        """See `Format.find`; modules without a scale are not quantized."""
        scale = "weight_scale" if self.block is None else "weight_scale_inv"
        return find(module, names, ("weight", scale), ("input_scale",), self.name)

    def is_leftover(self, name: str) -> bool:
        """Scales of the key/value cache."""
        return name.endswith((".k_scale", ".v_scale"))

    def read(self, module: Module) -> StoredWeight:
        """See `Format.read`."""
        if self.block is not None:
            return read_blocks(module, "weight_scale_inv", self.block, "weight_block_size")
        values = module.tensor("weight", module.shape, (_E4M3,), self.name)
        return StoredWeight(values, _row_scales(module, False, f"{self.name} without weight_block_size"), _pack)


def read_blocks(module: Module, kind: str, block: Sequence[int] | None, key: str) -> StoredWeight:
    """A weight in e4m3 with a scale, called `kind`, for each block of output by input features."""
    if block is None or not _is_block(block):
        raise ConfigError(f"{key} {block!r} is not two sizes")
    out_features, in_features = module.shape
    rows, columns = block
    shape = math.ceil(out_features / rows), math.ceil(in_features / columns)
    scales = module.scales(kind, shape, f"{key} {list(block)}").repeat_interleave(rows, 0)[:out_features]
    values = module.tensor("weight", module.shape, (_E4M3,), key)
    return StoredWeight(values, scales, StoredWeight.dequantized, groups_h=torch.arange(in_features) // columns)


def _is_block(sizes: Any) -> bool:
    is_pair = isinstance(sizes, (list, tuple)) and len(sizes) == 2
    return is_pair and all(type(each) is int and each > 0 for each in sizes)


def _row_scales(module: Module, of_rows: bool, key: str) -> Tensor:
    """Scales [o, 1], of output features or of all."""
    out_features = module.shape[0]
    kind = "weight_scale"
    if not of_rows:
        shape = () if module.tensors[kind].dim() == 0 else (1,)
        return module.scales(kind, shape, key).reshape(1, 1).expand(out_features, 1)
    return module.scales(kind, (out_features, 1), key)


def _pack(stored: StoredWeight, dtype: torch.dtype) -> Weight:
    """Inputs are rounded to the type of the values."""
    return QuantizedWeight(stored.values, stored.scales[:, 0].float().contiguous(), dtype, stored.values.dtype)


def _pack_weights(stored: StoredWeight, dtype: torch.dtype) -> Weight:
    """Inputs stay as they are."""
    return QuantizedWeight(stored.values, stored.scales[:, 0].float().contiguous(), dtype)
