"""The matrix library's products of many rows where a fixed order is wanted: taken only where they have the same bits.

The library chooses among many programs by the shapes of the operands, and does not say in which order they add up. So
it is given few numbers of rows, and for each of them, and each shape of a weight, its products of random rows are
compared with those of the own kernel first. Where one bit differs, the own kernel goes on to compute these products.
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention
from torch import Tensor

from hasten.ops.gpu.compiling import compiles_only

_MIN_STEP, _MAX_STEP = 16, 128
"""Rows: the library's tiles have 128 of them at least where there are many."""
_MAX_ROWS = 8192
_MIN_WEIGHT = 1 << 22
"""Elements of a weight: products with smaller ones are too short for another order to show."""
_MIN_PART = 2048
"""Input features of a part: with fewer, adding up takes longer than the own kernel."""
_COMPARED = 1 << 20
"""Least number of outputs that are compared: another order changes one in a hundred to ten thousand."""
_ALIGNMENT = 256
"""Bytes; the library's choice depends on lower alignments."""

_agreed: dict[tuple[object, ...], bool] = {}

Product = Callable[[Tensor], Tensor]
"""A product with one weight."""


def padded_rows(rows: int) -> int:
    """How many rows to multiply so that `rows` of them are: up to an eighth more, so that there are few numbers."""
    step = min(_MAX_STEP, max(_MIN_STEP, 1 << max(0, (rows - 1).bit_length() - 4)))
    return -(-rows // step) * step


def row_counts(most: int) -> list[int]:
    """A number of rows for each that up to `most` of them are multiplied as."""
    counts = [padded_rows(1)]
    while counts[-1] < min(most, _MAX_ROWS):
        counts.append(padded_rows(counts[-1] + 1))
    return [min(count, most) for count in counts]


def with_room(like: Tensor, rows: int, *shape: int) -> Tensor:
    """New memory, [rows, *shape], with room behind it for the rows by which a product extends them, without a copy."""
    return like.new_empty(padded_rows(rows), *shape)[:rows]


def extended(x_th: Tensor, rows: int) -> Tensor:
    """`x_th` and further rows of any values, [rows, h]: a view where its memory goes on behind it, else a copy."""
    view = _extended_view(x_th, rows)
    return F.pad(x_th, (0, 0, 0, rows - x_th.shape[0])) if view is None else view


def _extended_view(x_th: Tensor, rows: int) -> Tensor | None:
    stored = x_th.untyped_storage().nbytes() // x_th.itemsize - x_th.storage_offset()
    if not x_th.is_contiguous() or rows * x_th.shape[1] > stored:
        return None
    return x_th.as_strided((rows, x_th.shape[1]), x_th.stride())


def given(x_th: Tensor) -> Tensor:
    """`x_th` as the library is given it: with further rows of any values where its memory goes on behind it.

    For a number of rows that it has not had yet it may choose a program that is not loaded, which waits until the
    device is idle; so it is given few numbers, and all of them before the first request.
    """
    rows = padded_rows(x_th.shape[0])
    view = _extended_view(x_th, rows) if 0 < x_th.shape[0] < rows <= _MAX_ROWS else None
    return x_th if view is None else view


def product(x_th: Tensor, weight_oh: Tensor, bias_o: Tensor | None, own: Product) -> Tensor | None:
    """`x @ weight.T + bias`, [t, o], with the same bits as `own(x)`; None where the library has others."""
    return _checked(x_th, weight_oh, bias_o, 1, partial(F.linear, weight=weight_oh, bias=bias_o), own)


def summed(x_th: Tensor, weight_oh: Tensor, parts: int, own: Product) -> Tensor | None:
    """`x @ weight.T` by parts of the input features that are added up in fp32, [1, t, o], or None: as in `product`."""
    if weight_oh.shape[1] // parts < _MIN_PART:
        return None
    return _checked(x_th, weight_oh, None, parts, partial(_by_parts, weight_oh=weight_oh, parts=parts), own)


def _by_parts(x_th: Tensor, weight_oh: Tensor, parts: int) -> Tensor:
    first, *others = zip(x_th.chunk(parts, dim=1), weight_oh.chunk(parts, dim=1), strict=True)
    total_to = torch.mm(first[0], first[1].t(), out_dtype=torch.float32)
    for x_tk, weight_ok in others:
        torch.addmm(total_to, x_tk, weight_ok.t(), out_dtype=torch.float32, out=total_to)
    return total_to.unsqueeze(0)


def _checked(
    x_th: Tensor, weight_oh: Tensor, bias_o: Tensor | None, parts: int, compute: Product, own: Product
) -> Tensor | None:
    rows = x_th.shape[0]
    padded = padded_rows(rows)
    operands = [x_th, weight_oh, *([] if bias_o is None else [bias_o])]
    aligned = all(operand.data_ptr() % _ALIGNMENT == 0 for operand in operands)
    if not (x_th.is_cuda and aligned and padded <= _MAX_ROWS and weight_oh.numel() >= _MIN_WEIGHT):
        return None
    key = (x_th.device.index, x_th.dtype, *weight_oh.shape, bias_o is None, parts, padded)
    if compiles_only():
        own(x_th)  # to be compiled: its results could not be compared
    elif key not in _agreed:
        _agreed[key] = _agree(x_th.new_empty(padded, x_th.shape[1]), weight_oh.shape[0], compute, own)
    if not _agreed.get(key, True):
        return None
    return compute(extended(x_th, padded))[..., :rows, :]


def _agree(x_th: Tensor, features: int, compute: Product, own: Product) -> bool:
    generator = torch.Generator(x_th.device).manual_seed(0)
    for _ in range(-(-_COMPARED // (x_th.shape[0] * features))):
        x_th.normal_(generator=generator)
        if not torch.equal(compute(x_th), own(x_th)):
            return False
    return True
