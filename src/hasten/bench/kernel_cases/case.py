"""A case: a kernel and its reference on the same inputs."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from hasten.ops import (
    HeadTransform,
    PackedExperts,
    PackedLinear,
    PartialSum,
)

TOLERANCE = {torch.float16: 2.0**-9, torch.bfloat16: 2.0**-6}
"""Largest error, relative to values above 1 and absolute for those below: two units in the last place."""
FP8_TOLERANCE = 0.02
"""The same of products in fp8, which matrix units add up in about 14 bits."""
A_STEP = {"fp8": 0.13, "int8": 1.0}
"""The same of values in a cache of 8 bits, where a little may make them the next one."""
EPS = 1e-5
Outputs = Tensor | tuple[Tensor, ...]
Run = Callable[[], Outputs]


@dataclass(frozen=True)
class Call:
    """An op on inputs of its own."""

    kernel: Run
    reference: Run
    exact: Run
    """The reference on the same values in fp32."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """An op at one size."""

    op: str
    """What launches the kernel."""
    shape: str
    make: Callable[[], Call]
    nbytes: float
    """What has to be read and written at least."""
    flops: float = 0
    tolerance: float | None = None
    """None for what its type allows."""
    waits: bool = False
    """Whether the host has to wait within the reference, which no graph allows."""

    @property
    def name(self) -> str:
        """What `--only` looks at."""
        return f"{self.op} {self.shape}"


def rows_text(count: int) -> str:
    """A number of rows, as it is shown."""
    return "1 row" if count == 1 else f"{count} rows"


def call(kernel: Callable[..., Outputs], definition: Callable[..., Outputs], *inputs: Any) -> Call:
    """A kernel and its definition on the same inputs."""
    return Call(
        partial(kernel, *inputs), partial(definition, *inputs), lambda: definition(*(_wide(value) for value in inputs))
    )


def _wide(value: Any) -> Any:
    """The same values in fp32, but for caches of 8 bits."""
    if isinstance(value, Tensor):
        return value.float() if value.is_floating_point() and value.itemsize > 1 else value
    if isinstance(value, HeadTransform):
        return replace(value, query_norm_d=_wide(value.query_norm_d), key_norm_d=_wide(value.key_norm_d))
    if isinstance(value, PackedLinear):
        return replace(value, plain=_wide(value.plain))
    if isinstance(value, PackedExperts):
        held = ("gate_up", "down", "gate_up_bias", "down_bias")
        return replace(value, **{name: _wide(getattr(value, name)) for name in held})
    if isinstance(value, PartialSum):
        terms = ("parts", "bias", "residual", "added", "added_bias")
        return replace(value, **{name: _wide(getattr(value, name)) for name in terms})
    return value
