"""Products with weights."""

from typing import TYPE_CHECKING, overload

import torch
from torch import Tensor

from hasten.core.model_config import Activation
from hasten.ops import cpu, native
from hasten.ops.packed import PackedLinear, Weight
from hasten.ops.partial_sum import PartialSum
from hasten.ops.rounding import Inputs

if TYPE_CHECKING:
    pass


def pack_linear(weight_oh: Weight, *, shared: bool = False) -> PackedLinear:
    """Lay out a weight [o, h] once for `linear` on the device that it is on; the weight itself may then be dropped.

    A `shared` weight stays in use elsewhere: it is not copied unless the device cannot compute on it as it is, or is
    several times as fast with another layout.
    """
    if weight_oh.is_cuda:
        from hasten.ops.gpu import matmul

        return matmul.pack_linear(weight_oh, shared)
    return cpu.products.pack_linear(weight_oh, shared)


def relocated(weight_oh: Weight) -> Weight:
    """A weight where its device reads it fastest: on a CPU with kernels a copy in large pages, else the weight itself.

    For weights that `linear` reads as they are; those that it has in a layout of its own are there already.
    """
    return weight_oh if weight_oh.is_cuda else cpu.products.relocated(weight_oh)


@overload
def linear(
    x_th: Inputs,
    weight: PackedLinear,
    bias_o: Tensor | None = None,
    *,
    activation: Activation | None = None,
    reader: None = None,
) -> Tensor: ...


@overload
def linear(
    x_th: Inputs,
    weight: PackedLinear,
    bias_o: Tensor | None = None,
    *,
    activation: Activation | None = None,
    reader: PackedLinear | None,
) -> Inputs: ...


def linear(
    x_th: Inputs,
    weight: PackedLinear,
    bias_o: Tensor | None = None,
    *,
    activation: Activation | None = None,
    reader: PackedLinear | None = None,
) -> Inputs:
    """`activation(x @ weight.T + bias)`, [t, o] in the type of `x_th`, summed in at least fp32.

    `reader`: the weight that alone multiplies the result, which may be rounded as that needs it.
    """
    if x_th.is_cuda:
        from hasten.ops.gpu import matmul

        return matmul.linear(x_th, weight, bias_o, activation, reader)
    assert isinstance(x_th, Tensor)
    return cpu.products.linear(x_th, weight, bias_o, activation)


@overload
def gated_linear(
    x_th: Inputs,
    weight: PackedLinear,
    bias_o: Tensor | None,
    gate: Activation,
    scale_1h: Tensor | None = None,
    reader: None = None,
) -> Tensor: ...


@overload
def gated_linear(
    x_th: Inputs,
    weight: PackedLinear,
    bias_o: Tensor | None,
    gate: Activation,
    scale_1h: Tensor | None = None,
    *,
    reader: PackedLinear | None,
) -> Inputs: ...


def gated_linear(
    x_th: Inputs,
    weight: PackedLinear,
    bias_o: Tensor | None,
    gate: Activation,
    scale_1h: Tensor | None = None,
    reader: PackedLinear | None = None,
) -> Inputs:
    """`gate(a) * b`, [t, o / 2], where `a` and `b` are the halves of `x @ weight.T + bias`.

    With `scale_1h`, times `sigmoid(x @ scale.T)`, computed in at least fp32. `reader`: see `linear`.
    Source: Shazeer, "GLU Variants Improve Transformer", 2020.
    """
    if x_th.is_cuda:
        from hasten.ops.gpu import gated

        return gated.gated_linear(x_th, weight, bias_o, gate, scale_1h, reader=reader)
    assert isinstance(x_th, Tensor)
    return cpu.products.gated_linear(x_th, weight, bias_o, gate, scale_1h)


def add_linear(
    x_th: Inputs,
    weight: PackedLinear,
    bias_o: Tensor | None,
    residual_to: Tensor | PartialSum | None,
    rows_t: Tensor | None = None,
) -> Tensor | PartialSum:
    """`residual + x @ weight.T + bias`, [t, o]; or what it is the sum of, where the norm that reads it adds for free.

    With `rows_t`, the residual has more rows and these are the ones to take. A residual may be the sum that another
    product left, as in a parallel residual; it then has these rows already.
    """
    if x_th.is_cuda:
        from hasten.ops.gpu import matmul

        parts = matmul.linear_parts(x_th, weight, whole=isinstance(residual_to, PartialSum))
        if isinstance(residual_to, PartialSum):
            return residual_to.plus(parts, bias_o)
        return PartialSum(parts, bias_o, residual_to, rows_t)
    assert isinstance(x_th, Tensor)
    return cpu.products.add_linear(x_th, weight, bias_o, residual_to, rows_t)


def linear_parts(x_th: Inputs, weight: PackedLinear, *, whole: bool = False) -> Tensor:
    """`x @ weight.T`, [t, o]; or, where that is faster, parts of it to be added up, [parts, t, o] in fp32.

    `whole`: it is the second product of a sum, which in a fixed order must not be in parts.
    """
    if x_th.is_cuda:
        from hasten.ops.gpu import matmul

        return matmul.linear_parts(x_th, weight, whole=whole)
    assert isinstance(x_th, Tensor)
    return cpu.products.linear(x_th, weight, None, None)


def linear_into(x_th: Tensor, weight: PackedLinear, out_to: Tensor) -> None:
    """Write `x @ weight.T` of many rows into `out_to`, [t, o]; the weight is in full precision."""
    assert not weight.is_quantized
    if x_th.is_cuda:
        from hasten.ops.gpu import matmul

        matmul.linear_into(x_th, weight, out_to)
    else:
        out_to.copy_(cpu.products.linear(x_th, weight, None, None))


def cpu_multiplies(dtype: torch.dtype) -> bool:
    """Whether there are products of weights in a floating-point type, so that one gains by it."""
    if dtype == torch.bfloat16:
        return native.kernels() is not None or cpu.bf16.is_supported()
    return dtype == torch.float32
