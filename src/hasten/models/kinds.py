"""Groups the layers of a model by kind, so that start-up work is done once for each kind."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, is_dataclass

import torch.nn as nn
from torch import Tensor

from hasten.models.base import CausalLM, Transformer


@contextmanager
def distinct_layers(model: Transformer) -> Iterator[None]:
    """A block in which a language model has the first layer of each kind alone; other models are left as they are.

    Layers are of a kind if they differ in nothing but the values of their tensors.
    """
    if not isinstance(model, CausalLM):
        yield
        return
    layers, first = model.layers, dict[object, str]()
    for name, layer in layers.items():
        first.setdefault(tuple((part, _structure(vars(module))) for part, module in layer.named_modules()), name)
    model.layers = nn.ModuleDict({name: layers[name] for name in first.values()})
    try:
        yield
    finally:
        model.layers = layers


def _structure(value: object) -> object:
    """What two layers of a kind have in common of an attribute: types, numbers, words, and shapes of tensors."""
    if isinstance(value, Tensor):
        return value.dtype, tuple(value.shape)
    if isinstance(value, bool | int | float | str | None):
        return type(value), value
    if isinstance(value, dict):
        return tuple((key, _structure(own)) for key, own in value.items())
    if isinstance(value, list | tuple):
        return type(value), *map(_structure, value)
    if is_dataclass(value) and not isinstance(value, type):
        return type(value), *(_structure(getattr(value, field.name)) for field in fields(value))
    return type(value)
