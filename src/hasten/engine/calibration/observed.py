"""What modules are seen to read and to give while they run. Shapes: t tokens of a batch, h input features."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
import torch.nn as nn
from torch import Tensor

from hasten.quantization.smoothing import Inputs

See = Callable[[Tensor], None]


@contextmanager
def reading(module: nn.Module, see: See) -> Iterator[None]:
    """Calls `see` with what a linear layer reads."""
    hook = module.register_forward_pre_hook(lambda _, args: see(args[0]))
    try:
        yield
    finally:
        hook.remove()


@contextmanager
def giving(norm: nn.Module, see: See) -> Iterator[None]:
    """Calls `see` with what a norm gives."""
    hook = norm.register_forward_hook(lambda _, _args, output: see(output[0]))
    try:
        yield
    finally:
        hook.remove()


@dataclass
class Products:
    """The products of input features with each other, over all tokens."""

    count: int = 0
    sum_hh: Tensor | None = None

    def add(self, x_th: Tensor) -> None:
        """Count a batch."""
        wide_th = x_th.float()
        self.count += len(wide_th)
        products_hh = wide_th.t() @ wide_th
        self.sum_hh = products_hh if self.sum_hh is None else self.sum_hh.add_(products_hh)

    @property
    def mean_hh(self) -> Tensor:
        """Their mean, in fp32."""
        assert self.sum_hh is not None
        return self.sum_hh / self.count


@dataclass
class Magnitudes:
    """Magnitudes of input features over all tokens, and some of the tokens themselves."""

    rows: int
    """Tokens of each batch that are kept."""
    count: int = 0
    sum_h: Tensor | None = None
    largest_h: Tensor | None = None
    kept: list[Tensor] = field(default_factory=list)

    def add(self, x_th: Tensor) -> None:
        """Count a batch."""
        wide_th = x_th.float()
        self.count += len(wide_th)
        sizes_th = wide_th.abs()
        sum_h, largest_h = sizes_th.sum(0), sizes_th.amax(0)
        self.sum_h = sum_h if self.sum_h is None else self.sum_h.add_(sum_h)
        self.largest_h = largest_h if self.largest_h is None else torch.maximum(self.largest_h, largest_h)
        self.kept.append(wide_th[:: max(1, len(wide_th) // self.rows)][: self.rows].clone())

    @property
    def inputs(self) -> Inputs:
        """As `smoothing_scales` takes them."""
        assert self.sum_h is not None
        assert self.largest_h is not None
        return Inputs(self.sum_h / self.count, self.largest_h, torch.cat(self.kept))
