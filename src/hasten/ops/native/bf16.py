"""Products with weights in bf16 in panels: launches of `code/bf16.py`, `code/rounded.py` and `code/pair_tiles.py`.

Shapes: t tokens, h input features, o output features. Sums are in fp32. Where the processor has AMX, it multiplies all
rows: up to 16 as two numbers of bf16 each, which have 16 bits together, since waiting for the weights takes longer
than multiplying them twice; more are rounded. With AVX-512 BF16 alone, more than 8 rows are rounded, and fewer
multiplied in fp32; without either all are.
"""

from functools import cache

import torch
from torch import Tensor

from hasten.ops.native import compiled, pages
from hasten.ops.native.launch import Kernel, empty, launch
from hasten.ops.native.products import ACTIVATIONS

_WIDTH = 32
"""Output features of a panel."""
_MULTIPLE = 32
"""Input features of a panel come in multiples of this number."""
_TILE_ROWS = 16
_FEW_ROWS = 8
"""Rows up to which one tile has room for both numbers of each, and AVX-512 BF16 is not used."""
_by_widening = Kernel("half_product", "12q", "bf16")
_gather = Kernel("gather_halves", "9q", "bf16")


def pack(weight_oh: Tensor) -> Tensor:
    """A weight in bf16 in panels: pairs of numbers, [panels, h / 2, 32] in int32."""
    outputs, inputs = weight_oh.shape
    panels = pages.zeros((-(-outputs // _WIDTH), -(-inputs // _MULTIPLE) * _MULTIPLE // 2, _WIDTH), torch.int32)
    whole = outputs // _WIDTH
    _fill(panels[:whole], weight_oh[: whole * _WIDTH].view(whole, _WIDTH, inputs))
    if whole < len(panels):
        _fill(panels[whole:, :, : outputs - whole * _WIDTH], weight_oh[whole * _WIDTH :].unsqueeze(0))
    return panels


def _fill(panels: Tensor, weight_poh: Tensor) -> None:
    """Put output features [panels, o, h] into panels."""
    if weight_poh.shape[2] % 2:
        weight_poh = torch.nn.functional.pad(weight_poh, (0, 1))
    pairs = weight_poh.contiguous().view(torch.int32)
    panels[:, : pairs.shape[2]] = pairs.transpose(1, 2)


def product(
    x_th: Tensor,
    panels: Tensor,
    outputs: int,
    bias_o: Tensor | None,
    activation: str | None,
    residual_to: Tensor | None,
    rows_t: Tensor | None,
) -> Tensor:
    """`activation(x @ w.T + bias) + residual[rows]`: [t, o]."""
    rows, inputs = x_th.shape
    stride = 0 if residual_to is None else residual_to.stride(0)
    code = 0 if activation is None else ACTIVATIONS[activation]
    work, kernel = rows * inputs * outputs, rounded_kernel()
    if kernel is None or (kernel is not _by_tiles() and rows <= _FEW_ROWS):
        out_to = empty(rows, outputs)
        operands = (rows, inputs, outputs, x_th, x_th.stride(0), panels, bias_o)
        launch(_by_widening, work, *operands, residual_to, stride, rows_t, out_to, code)
        return out_to
    lower = 0
    if kernel is _by_tiles() and rows <= _TILE_ROWS:
        lower = _FEW_ROWS if rows <= _FEW_ROWS else _TILE_ROWS
    blocks = -(-max(rows, 2 * lower) // _TILE_ROWS)
    # the memory of a recording is of numbers in fp32
    tiles = empty(blocks * _TILE_ROWS * panels.shape[1])
    launch(_round_to_tiles(), 8 * rows * inputs, rows, inputs, x_th, x_th.stride(0), lower, tiles)
    out_to = empty(rows, outputs)
    sizes = (rows, inputs, outputs, lower, tiles, panels, bias_o)
    launch(kernel, work, *sizes, residual_to, stride, rows_t, out_to, code)
    return out_to


@cache
def _by_tiles() -> Kernel | None:
    """With AMX, which a process must ask the system for."""
    return (
        Kernel("tiles_product", "12q", "bf16") if compiled.multiplies_pair_tiles() and torch.cpu._init_amx() else None
    )


@cache
def _by_pairs() -> Kernel | None:
    return Kernel("pairs_product", "12q", "bf16") if compiled.multiplies_pairs() else None


@cache
def _round_to_tiles() -> Kernel:
    return Kernel("round_to_tiles", "6q", "bf16")


def rounded_kernel() -> Kernel | None:
    """What multiplies rounded rows; None on a processor without instructions for them."""
    return _by_tiles() or _by_pairs()


def gather(ids_t: Tensor, table_vh: Tensor) -> Tensor:
    """Rows of a table in bf16 [v, h]: [t, h]."""
    width = table_vh.shape[1]
    return _gathered(ids_t, table_vh, width, (1, 2 * width, 0, 4))


def gather_from_panels(ids_t: Tensor, panels: Tensor, width: int) -> Tensor:
    """Rows of a table of `pack`, each of `width` numbers: [t, h]."""
    return _gathered(ids_t, panels, width, (_WIDTH, 4 * panels.shape[1] * _WIDTH, 4, 4 * _WIDTH))


def _gathered(ids_t: Tensor, table: Tensor, width: int, form: tuple[int, int, int, int]) -> Tensor:
    """Rows of a table, whose `form` is as `_gather_halves` has it."""
    rows = len(ids_t)
    out_th = empty(rows, width)
    launch(_gather, 4 * rows * width, rows, width, table, ids_t, *form, out_th)
    return out_th
