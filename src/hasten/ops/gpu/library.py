"""The matrix library's products of many rows where a fixed order is wanted: taken only where they have the same bits.

The library chooses among many programs by the shapes of the operands, and does not say in which order they add up. So
it is given few numbers of rows, and for each of them, and each shape of a weight, its product of random rows is
compared with that of the own kernel once. Where one bit differs, the own kernel goes on to compute these products.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention
from torch import Tensor

_MIN_STEP = 16
_MAX_ROWS = 8192
_ALIGNMENT = 256
"""Bytes; the library's choice depends on lower alignments."""

_agreed: dict[tuple[object, ...], bool] = {}

Product = Callable[[Tensor], Tensor]
"""A product with one weight."""


def padded_rows(rows: int) -> int:
    """How many rows to multiply so that `rows` of them are: up to an eighth more, so that there are few numbers."""
    step = max(_MIN_STEP, 1 << max(0, (rows - 1).bit_length() - 4))
    return -(-rows // step) * step


def product(x_th: Tensor, weight_oh: Tensor, bias_o: Tensor | None, own: Product) -> Tensor | None:
    """`x @ weight.T + bias`, [t, o], with the same bits as `own(x)`; None where the library has others."""
    rows = x_th.shape[0]
    padded = padded_rows(rows)
    operands = [weight_oh, *([] if bias_o is None else [bias_o]), *([x_th] if padded == rows else [])]
    aligned = all(operand.data_ptr() % _ALIGNMENT == 0 for operand in operands)
    if padded > _MAX_ROWS or not x_th.is_cuda or not aligned:
        return None
    key = (x_th.device.index, x_th.dtype, *weight_oh.shape, bias_o is None, padded)
    if key not in _agreed:
        _agreed[key] = _agrees(x_th.new_empty(padded, x_th.shape[1]), weight_oh, bias_o, own)
    if not _agreed[key]:
        return None
    return F.linear(F.pad(x_th, (0, 0, 0, padded - rows)) if padded > rows else x_th, weight_oh, bias_o)[:rows]


def _agrees(x_th: Tensor, weight_oh: Tensor, bias_o: Tensor | None, own: Product) -> bool:
    x_th.normal_(generator=torch.Generator(x_th.device).manual_seed(0))
    return torch.equal(F.linear(x_th, weight_oh, bias_o), own(x_th))
