"""Products of weights in bf16 on a CPU with instructions for them; sums are in fp32, and rounded once.

oneDNN gives results in bf16 alone. What is not rounded before more is computed with it takes two products, which is
as fast as one in fp32: that for the result, and that for what the result lacks.
"""

from functools import cache

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention
from torch import Tensor

from hasten.ops import reference
from hasten.ops.cpu.compiled_rows import compiled_rows
from hasten.ops.packed import FUSED, PACK_FOR_ROWS, PackedLinear

_Operands = tuple[Tensor, Tensor | None, Tensor | None]
"""Rows, weight and bias."""
_linear = torch.ops.mkldnn._linear_pointwise


@cache
def is_supported() -> bool:
    """Whether the processor multiplies bf16: AVX-512 BF16 or AMX; without these oneDNN takes longer than over fp32."""
    return torch.backends.mkldnn.is_available() and (
        torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    )


def pack_linear(weight_oh: Tensor) -> PackedLinear:
    """A weight in bf16, in oneDNN's layout."""
    blocked = torch.ops.mkldnn._reorder_linear_weight(weight_oh.contiguous(), PACK_FOR_ROWS)
    out_features, in_features = weight_oh.shape
    return PackedLinear(out_features, in_features, plain=None, blocked=blocked)


def is_packed(weight: PackedLinear) -> bool:
    """Whether it is a weight of `pack_linear`."""
    return weight.blocked is not None and weight.blocked.dtype == torch.bfloat16


def product(
    x_th: Tensor, weight: PackedLinear, bias_o: Tensor | None, activation: str | None, residual_to: Tensor | None
) -> Tensor:
    """[t, o] in the type of `x_th`, of which there is a row at least. In fp32 it has 16 bits, of `x_th` in bf16."""
    rows = x_th.shape[0]
    operands = _padded(x_th.bfloat16()), weight.blocked, None if bias_o is None else bias_o.bfloat16()
    if residual_to is not None:
        assert activation is None, "no layer has both"
        return _added(operands, _padded(residual_to))[:rows].to(x_th.dtype)
    if x_th.dtype == torch.bfloat16 and (activation is None or activation in FUSED):
        name, variant = FUSED.get(activation or "", ("none", ""))
        return _linear(*operands, name, [], variant)[:rows]
    out_to = _precise(operands)[:rows]
    return (out_to if activation is None else reference.activated(out_to, activation)).to(x_th.dtype)


def _padded(x_th: Tensor) -> Tensor:
    """With rows of zeros, up to a number of rows that oneDNN compiles a product for."""
    more = compiled_rows(x_th.shape[0]) - x_th.shape[0]
    return F.pad(x_th, (0, 0, 0, more)) if more else x_th  # without any, F.pad would copy


def _added(operands: _Operands, other_to: Tensor) -> Tensor:
    """The product and another tensor, rounded once where that is in bf16."""
    x_th, blocked, bias_o = operands
    if other_to.dtype != torch.bfloat16:
        return _linear(*operands, "none", [], "").float().add_(other_to)
    return _linear.binary(x_th, other_to.contiguous(), blocked, bias_o, "add")


def _precise(operands: _Operands) -> Tensor:
    """The product in fp32, to 16 bits: what oneDNN rounds to bf16, and what that lacks."""
    high_to = _linear(*operands, "none", [], "")
    return high_to.float().add_(_added(operands, high_to.neg()))
