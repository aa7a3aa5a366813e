"""Schemes that quantize a model's weights while they are loaded.

A scheme knows one weight at a time, and neither layers nor models know the scheme: a layer says which parameters it
multiplies by, and hands `ops` whatever weight it was given. Shapes: h input features, o output features.
"""

from collections.abc import Mapping
from typing import Protocol

import torch.nn as nn
from torch import Tensor

from hasten import ops
from hasten.core.config import Quantization
from hasten.layers.linear import PackedModule
from hasten.quantization.int8 import Int8


class Scheme(Protocol):
    """A way to quantize weights."""

    name: Quantization

    def quantize(self, weight_oh: Tensor, name: str) -> ops.QuantizedWeight:
        """A weight, on its device; CheckpointError with its `name` where it cannot be quantized."""
        ...


SCHEMES: Mapping[str, Scheme] = {scheme.name: scheme for scheme in (Int8(),)}


class Quantizer:
    """Quantizes those of a model's parameters that are matrices to multiply by: linear layers, and the head.

    An embedding is quantized where the head is tied to it. Norms, biases, positions, routers and experts are not.
    """

    def __init__(self, scheme: Scheme, model: nn.Module) -> None:
        self.scheme = scheme
        names = {module: name for name, module in model.named_modules()}
        layers = (module for module in model.modules() if isinstance(module, PackedModule))
        self.names = {f"{names[owner]}.{parameter}" for layer in layers for owner, parameter in layer.matrices()}
        """Of the parameters that are quantized."""

    def __call__(self, name: str, weight: Tensor) -> ops.Weight:
        """The parameter `name` as the model is to have it."""
        return self.scheme.quantize(weight, name) if name in self.names else weight
