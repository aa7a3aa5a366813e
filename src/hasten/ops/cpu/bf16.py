"""Products of weights in bf16 by oneDNN, on a CPU with instructions for them, where there are no kernels for a CPU.

Inputs are rounded to bf16, and so are results: oneDNN gives no others. Sums are in fp32.
"""

from functools import cache

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention
from torch import Tensor

from hasten.ops import reference
from hasten.ops.cpu.compiled_rows import compiled_rows
from hasten.ops.packed import FUSED, PACK_FOR_ROWS, PackedLinear


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
    """`activation(x @ w.T + bias) + residual`, [t, o] in the type of `x_th`, of which there is a row at least."""
    rows = x_th.shape[0]
    more = compiled_rows(rows) - rows
    padded_th = F.pad(x_th.bfloat16(), (0, 0, 0, more)) if more else x_th.bfloat16()
    name, variant = FUSED.get(activation or "", ("none", ""))
    bias_o = None if bias_o is None else bias_o.bfloat16()
    product_to = torch.ops.mkldnn._linear_pointwise(padded_th, weight.blocked, bias_o, name, [], variant)
    out_to: Tensor = product_to[:rows].float()
    if activation is not None and activation not in FUSED:
        out_to = reference.activated(out_to, activation)
    return (out_to if residual_to is None else out_to.add_(residual_to)).to(x_th.dtype)
