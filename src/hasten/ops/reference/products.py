"""Products with weights."""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention
from torch import Tensor

from hasten.ops.grouped import GroupedWeight
from hasten.ops.packed import PackedLinear, QuantizedWeight, Weight
from hasten.ops.partial_sum import PartialSum
from hasten.ops.reference.norms import complete, wide
from hasten.ops.rounding import rounded


def pack_linear(weight_oh: Weight, shared: bool) -> PackedLinear:  # noqa: ARG001, D103
    if isinstance(weight_oh, QuantizedWeight):
        return PackedLinear(*weight_oh.shape, plain=weight_oh.values, scales=weight_oh.scales, inputs=weight_oh.inputs)
    if isinstance(weight_oh, GroupedWeight):
        return PackedLinear(*weight_oh.shape, plain=None, grouped=weight_oh)
    return PackedLinear(weight_oh.shape[0], weight_oh.shape[1], plain=weight_oh)


def dequantized(weight: PackedLinear, dtype: torch.dtype) -> Tensor:
    """The weight in `dtype`, [o, h]; one that is not quantized as it is."""
    if weight.grouped is not None:
        return weight.grouped.dequantized(dtype)
    assert weight.plain is not None
    if weight.scales is None:
        return weight.plain
    wide = torch.promote_types(dtype, torch.float32)
    values_oh = weight.plain[:, : weight.in_features]  # behind them are zeros
    return (values_oh.to(wide) * weight.scales.to(wide).unsqueeze(1)).to(dtype)


def linear(  # noqa: D103
    x_th: Tensor, weight: PackedLinear, bias_o: Tensor | None, activation: str | None
) -> Tensor:
    if weight.inputs is not None:
        x_th = rounded(x_th, weight.inputs).to(x_th.dtype)
    out_to = F.linear(x_th, dequantized(weight, x_th.dtype), bias_o)
    return out_to if activation is None else activated(out_to, activation)


def gated_linear(  # noqa: D103
    x_th: Tensor, weight: PackedLinear, bias_o: Tensor | None, gate: str, scale_1h: Tensor | None = None
) -> Tensor:
    gate_to, up_to = wide(linear(x_th, weight, bias_o, None)).chunk(2, dim=-1)
    inner_to = activated(gate_to, gate) * up_to
    if scale_1h is not None:
        inner_to = inner_to * F.linear(wide(x_th), wide(scale_1h)).sigmoid()
    return inner_to.to(x_th.dtype)


def activated(x: Tensor, name: str) -> Tensor:
    """An activation by its name, element by element.

    Sources: Hendrycks, Gimpel, "Gaussian Error Linear Units", 2016 (silu and all kinds of gelu); So et al., "Primer",
    2021 (relu2).
    """
    return _ACTIVATIONS[name](x)


_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
}


def add_linear(  # noqa: D103
    x_th: Tensor,
    weight: PackedLinear,
    bias_o: Tensor | None,
    residual_to: Tensor | PartialSum | None,
    rows_t: Tensor | None,
) -> Tensor:
    out_to = linear(x_th, weight, bias_o, None)
    if residual_to is None:
        return out_to
    if isinstance(residual_to, PartialSum):
        residual_to = complete(residual_to).to(out_to.dtype)
    return out_to + (residual_to if rows_t is None else residual_to[rows_t])
