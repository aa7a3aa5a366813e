"""Products with weights, in the layout that a CPU multiplies fastest.

Weights in bf16 stay so where there are kernels, which widen them as they read them (`native/bf16.py`), or where the
processor multiplies them (`bf16.py`). Other half-precision weights are widened to fp32 when they are packed: without
instructions for them a CPU takes 20 times as long over a half-precision product (docs/performance-log.md), and the
products are then summed in fp32 as well. So are weights in fp8, of which a CPU has no products at all; weights in int8
stay so.
"""

from dataclasses import replace
from functools import cache

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention
from torch import Tensor

from hasten.ops import native, reference
from hasten.ops.cpu import bf16, fixed, grouped, int8
from hasten.ops.cpu.compiled_rows import compiled_rows
from hasten.ops.cpu.scratch import SCRATCH
from hasten.ops.grouped import GroupedWeight
from hasten.ops.order import order_is_fixed
from hasten.ops.packed import FUSED, PACK_FOR_ROWS, PackedLinear, QuantizedWeight, Weight
from hasten.ops.partial_sum import PartialSum
from hasten.ops.rounding import rounded

_SMALL_WEIGHT = 1 << 20
"""Weights of fewer elements keep a plain layout too: oneDNN takes longer to start than to multiply a few rows."""
_FEW_ROWS = 1


def pack_linear(weight_oh: Weight, shared: bool) -> PackedLinear:  # noqa: D103
    if isinstance(weight_oh, QuantizedWeight):
        if weight_oh.values.dtype == torch.int8:
            return int8.pack_linear(weight_oh)
        wide_oh = weight_oh.values.float().mul_(weight_oh.scales.unsqueeze(1))
        return replace(pack_linear(wide_oh, False), inputs=weight_oh.inputs)
    if isinstance(weight_oh, GroupedWeight):
        return grouped.pack_linear(weight_oh)
    kernels = None if order_is_fixed() else native.kernels()
    if weight_oh.dtype == torch.bfloat16 and kernels is not None:
        out_features, in_features = weight_oh.shape
        return PackedLinear(out_features, in_features, plain=None, halves=kernels.bf16.pack(weight_oh))
    if weight_oh.dtype == torch.bfloat16 and bf16.is_supported() and not order_is_fixed():
        return bf16.pack_linear(weight_oh)
    as_it_is = shared and weight_oh.dtype == torch.float32
    weight_oh = weight_oh.float().contiguous()
    out_features, in_features = weight_oh.shape
    if kernels is not None and not (as_it_is and weight_oh.numel() >= _SMALL_WEIGHT):
        return PackedLinear(out_features, in_features, plain=None, panels=kernels.products.pack(weight_oh))
    if kernels is not None and as_it_is and kernels.products.takes_rows(weight_oh):
        return PackedLinear(out_features, in_features, plain=weight_oh, by_rows=True)
    if as_it_is or not torch.backends.mkldnn.is_available():
        return PackedLinear(out_features, in_features, plain=weight_oh, fixed_order=order_is_fixed())
    plain = None
    if weight_oh.numel() < _SMALL_WEIGHT and not order_is_fixed():
        # The longer axis innermost: one row is then multiplied in up to half the time.
        plain = weight_oh if in_features > out_features else weight_oh.t().contiguous().t()
    blocked = torch.ops.mkldnn._reorder_linear_weight(weight_oh, PACK_FOR_ROWS)
    return PackedLinear(out_features, in_features, plain=plain, blocked=blocked, fixed_order=order_is_fixed())


def relocated(weight_oh: Weight) -> Weight:  # noqa: D103
    if not (native.are_installed() and isinstance(weight_oh, Tensor)) or weight_oh.dtype != torch.float32:
        return weight_oh
    return weight_oh if weight_oh.numel() < _SMALL_WEIGHT else native.pages.copied(weight_oh)


def linear(  # noqa: D103
    x_th: Tensor, weight: PackedLinear, bias_o: Tensor | None, activation: str | None
) -> Tensor:
    return _linear(x_th, weight, bias_o, activation, None)


def add_linear(  # noqa: D103
    x_th: Tensor,
    weight: PackedLinear,
    bias_o: Tensor | None,
    residual_to: Tensor | PartialSum | None,
    rows_t: Tensor | None,
) -> Tensor:
    if isinstance(residual_to, PartialSum):
        residual_to = reference.complete(residual_to).to(x_th.dtype)
    return _linear(x_th, weight, bias_o, None, residual_to, rows_t)


def gated_linear(  # noqa: D103
    x_th: Tensor, weight: PackedLinear, bias_o: Tensor | None, gate: str, scale_1h: Tensor | None = None
) -> Tensor:
    wide_th = x_th.float()
    kernels = native.kernels() if weight.has_kernel and scale_1h is None else None
    if kernels is not None and gate in kernels.products.ACTIVATIONS and weight.out_features % 32 == 0:
        both_to = _linear(wide_th, weight, bias_o, None, None)
        return kernels.products.gated(both_to, gate).to(x_th.dtype)
    gate_to, up_to = _linear(wide_th, weight, bias_o, None, None).chunk(2, dim=-1)
    if weight.fixed_order:
        inner_to = fixed.activated(gate_to, gate).mul_(up_to)
        if scale_1h is not None:
            inner_to.mul_(fixed.sigmoid((wide_th * scale_1h.float()).sum(-1, keepdim=True)))
        return inner_to.to(x_th.dtype)
    inner_to = reference.activated(gate_to, gate).mul_(up_to)
    if scale_1h is not None:
        inner_to.mul_(F.linear(wide_th, scale_1h.float()).sigmoid_())
    return inner_to.to(x_th.dtype)


def _linear(
    x_th: Tensor,
    weight: PackedLinear,
    bias_o: Tensor | None,
    activation: str | None,
    residual_to: Tensor | None,
    rows_t: Tensor | None = None,
) -> Tensor:
    dtype = x_th.dtype
    if x_th.shape[0] == 0:
        return x_th.new_empty(0, weight.out_features)
    if weight.has_kernel:
        return _by_kernel(x_th, weight, bias_o, activation, residual_to, rows_t)
    if residual_to is not None and rows_t is not None:
        residual_to = residual_to[rows_t]
    if bf16.is_packed(weight):
        return bf16.product(x_th, weight, bias_o, activation, residual_to)
    x_th = x_th.float()
    bias_o = None if bias_o is None else bias_o.float()
    if weight.scales is None and weight.inputs is not None:
        x_th = rounded(x_th, weight.inputs)
    if weight.scales is not None:
        out_to = int8.product(x_th, weight, weight.scales)
        out_to = out_to if bias_o is None else out_to.add_(bias_o)
    elif weight.grouped is not None or weight.blocked_groups is not None:
        out_to = grouped.product(x_th, weight)
        out_to = out_to if bias_o is None else out_to.add_(bias_o)
    elif weight.fixed_order:
        out_to = fixed.product(x_th, weight)
        out_to = out_to if bias_o is None else out_to.add_(bias_o)
    elif weight.by_rows:
        out_to = _rows(x_th, weight, bias_o)
    elif weight.blocked is None or (weight.plain is not None and x_th.shape[0] <= _FEW_ROWS):
        assert weight.plain is not None
        out_to = F.linear(x_th, weight.plain, bias_o)
    elif activation in FUSED and _fuses():
        out_to, activation = _blocked(x_th, weight.blocked, bias_o, *FUSED[activation]), None
    else:
        out_to = _blocked(x_th, weight.blocked, bias_o, "none", "")
    if activation is not None:
        out_to = _activated(out_to, activation, fixed_order=weight.fixed_order)
    if residual_to is not None:
        out_to = out_to.add_(residual_to)
    return out_to.to(dtype)


def _by_kernel(
    x_th: Tensor,
    weight: PackedLinear,
    bias_o: Tensor | None,
    activation: str | None,
    residual_to: Tensor | None,
    rows_t: Tensor | None,
) -> Tensor:
    """A product with a weight in panels."""
    kernels, integers = native.kernels(), native.integer_kernels()
    assert kernels is not None, "who packed it had them"
    products, dtype, x_th = kernels.products, x_th.dtype, x_th.float()
    if weight.inputs is not None:
        x_th = rounded(x_th, weight.inputs)
    x_th = x_th if x_th.stride(-1) == 1 else x_th.contiguous()
    bias_o, residual_to = (None if each is None else each.float().contiguous() for each in (bias_o, residual_to))
    fused = activation if activation in products.ACTIVATIONS else None
    operands = (weight.out_features, bias_o, fused, residual_to, rows_t)
    if weight.integers is not None and integers is not None:
        out_to = integers.product(x_th, weight.integers, *operands)
    elif weight.halves is not None:
        out_to = kernels.bf16.product(x_th, weight.halves, *operands)
    else:
        out_to = products.product(x_th, weight.panels, *operands)
    if activation is None or fused is not None:
        return out_to.to(dtype)
    assert residual_to is None, "no product has both"
    return _activated(out_to, activation, fixed_order=False).to(dtype)


def _rows(x_th: Tensor, weight: PackedLinear, bias_o: Tensor | None) -> Tensor:
    """A product of the kernels with a weight as it is."""
    kernels = native.kernels()
    assert kernels is not None, "who packed it had them"
    assert weight.plain is not None
    x_th = x_th if x_th.stride(-1) == 1 else x_th.contiguous()
    return kernels.products.product_of_rows(x_th, weight.plain, bias_o)


@cache
def _fuses() -> bool:
    """Whether oneDNN's activations are faster than passes of our own: with AVX-512, not with AVX2."""
    return torch.backends.cpu.get_cpu_capability() == "AVX512"


def _blocked(x_th: Tensor, weight: Tensor, bias_o: Tensor | None, activation: str, variant: str) -> Tensor:
    """A product with a weight in oneDNN's layout, and an activation by oneDNN's name."""
    rows = x_th.shape[0]
    more = compiled_rows(rows) - rows
    padded_th = F.pad(x_th, (0, 0, 0, more)) if more else x_th
    return torch.ops.mkldnn._linear_pointwise(padded_th, weight, bias_o, activation, [], variant)[:rows]


def _activated(x: Tensor, name: str, *, fixed_order: bool) -> Tensor:
    if fixed_order:
        return fixed.activated(x, name)
    return _gelu_tanh(x) if name == "gelu_tanh" else reference.activated(x, name)


def _gelu_tanh(x: Tensor) -> Tensor:
    """GELU's tanh form, written with the logistic function, which a CPU computes faster than tanh."""
    gate = torch.mul(x, x, out=SCRATCH.take("gelu", tuple(x.shape)))
    torch.addcmul(x, gate, x, value=0.044715, out=gate)
    return x.mul_(gate.mul_(1.5957691216057308).sigmoid_())
