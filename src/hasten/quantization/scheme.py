"""Schemes that quantize a model's weights while they are loaded.

A scheme knows one weight at a time, and neither layers nor models know the scheme: a layer says which parameters it
multiplies by, and hands `ops` whatever weight it was given. Shapes: h input features, o output features.
"""

from collections.abc import Mapping
from functools import cache
from typing import Protocol

import torch
import torch.nn as nn
from torch import Tensor

from hasten import ops
from hasten.core.dtypes import Quantization
from hasten.layers.linear import PackedModule
from hasten.quantization.eight_bit import FP8, INT8, W8A8
from hasten.quantization.int4 import Int4


class Scheme(Protocol):
    """A way to quantize weights."""

    @property
    def name(self) -> Quantization:
        """As the configuration has it."""
        ...

    def of(self, layer: PackedModule) -> "Scheme":
        """What a layer is quantized with; an embedding has what the head has that is tied to it."""
        ...

    def quantize(self, weight_oh: Tensor, name: str) -> ops.Weight:
        """A weight, on its device; CheckpointError with its `name` where it cannot be quantized."""
        ...


SCHEMES: Mapping[str, Scheme] = {scheme.name: scheme for scheme in (INT8, W8A8, FP8, Int4())}


def matrices(model: nn.Module) -> dict[str, PackedModule]:
    """The parameters that a model multiplies by and that may be quantized, each with the layer that does so."""
    names = {module: name for name, module in model.named_modules()}
    return {
        f"{names[owner]}.{parameter}": layer
        for layer in model.modules()
        if isinstance(layer, PackedModule)
        for owner, parameter in layer.matrices()
    }


class Quantizer:
    """Quantizes those of a model's parameters that are matrices to multiply by: linear layers, and the head.

    An embedding is quantized where the head is tied to it. Norms, biases, positions, routers and experts are not.
    """

    def __init__(self, scheme: Scheme, model: nn.Module) -> None:
        self.schemes = {name: scheme.of(layer) for name, layer in matrices(model).items()}
        """Of the parameters that are quantized, by name."""

    def __call__(self, name: str, weight: Tensor) -> ops.Weight:
        """The parameter `name` as the model is to have it."""
        scheme = self.schemes.get(name)
        return weight if scheme is None else scheme.quantize(weight, name)


def quantized_bytes(scheme: Quantization, rows: int, columns: int) -> int:
    """Of a weight of `rows` output features, from weights of one and of two that are really quantized."""
    of_one, of_two = (_bytes_of_rows(scheme, count, columns) for count in (1, 2))
    return of_one + (rows - 1) * (of_two - of_one)


@cache
def _bytes_of_rows(scheme: Quantization, rows: int, columns: int) -> int:
    return SCHEMES[scheme].quantize(torch.zeros(rows, columns), "a weight").nbytes
