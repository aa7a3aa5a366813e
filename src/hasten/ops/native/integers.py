"""Products with weights of 8 and 4 bits in panels: launches of `code/integers.py` and `code/tiles.py`.

Shapes: t tokens, h input features, o output features, k columns, g groups of columns, d digits.
"""

import math
from functools import cache

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention
from torch import Tensor

from hasten.ops.grouped import Columns
from hasten.ops.native import compiled, pages
from hasten.ops.native.launch import Kernel, empty, launch
from hasten.ops.native.products import ACTIVATIONS
from hasten.ops.packed import IntegerPanels

_WIDTH = 32
"""Output features of a panel."""
_UNIT = 8
"""Columns whose bytes stand side by side for each output feature, four and four."""
_MULTIPLE = 16
"""Columns of a group come in multiples of this number."""
_MOST_COLUMNS = 1 << 16
"""Of a group: sums of their products fit into int32, of bytes up to 255 by numbers up to 127."""
_integers = Kernel("integers", "19q", "bytes")
_round_rows = Kernel("round_rows", "12q", "bytes")
_TILE = 16
"""Rows of int8 that stand together for the kernel of many rows."""
_STEP = 64
"""Most columns of them that do."""
_MOST_WITHOUT_TILES = 8
"""Rows of int8 that the other kernel takes at a time; beyond them tiles are faster."""


@cache
def tiles() -> Kernel | None:
    """The kernel of many rows; None on a processor without AMX, or where the system gives none to this process."""
    return Kernel("tiles", "20q", "bytes") if compiled.multiplies_tiles() and torch.cpu._init_amx() else None


def fits(columns: int, group_size: int) -> bool:
    """Whether the kernels multiply weights with groups of this size."""
    return group_size <= _MOST_COLUMNS and (group_size == columns or group_size % _MULTIPLE == 0)


def pack(
    values_ok: Tensor,
    scales_go: Tensor,
    zeros_go: Tensor | None,
    *,
    bits: int,
    digits: int,
    columns: Columns | None = None,
) -> IntegerPanels:
    """A weight `(values - zeros) * scales` in panels; without zeros they are all in the middle.

    Values are whole numbers of 0 to 2^`bits` - 1 in uint8. `digits`: how many numbers of int8 an input becomes.
    """
    outputs, inputs = values_ok.shape
    size = inputs // len(scales_go)
    values_ok = F.pad(values_ok, (0, -inputs % _MULTIPLE, 0, -outputs % _WIDTH))
    units = values_ok.view(-1, _WIDTH, values_ok.shape[1] // _UNIT, 2, _UNIT // 2).permute(0, 2, 3, 1, 4)
    if bits == 4:
        units = units[:, :, 0] | units[:, :, 1] << 4
    return IntegerPanels(
        pages.copied(units),
        _in_panels(scales_go.float()),
        None if zeros_go is None else _in_panels(zeros_go.int()),
        bits,
        1 << bits - 1,
        digits,
        size + -size % _MULTIPLE,
        columns or Columns(),
    )


def _in_panels(numbers_go: Tensor) -> Tensor:
    """Numbers of output features and groups as a product reads them: [panels, g, 32]."""
    padded_go = F.pad(numbers_go, (0, -numbers_go.shape[1] % _WIDTH))
    return padded_go.view(len(padded_go), -1, _WIDTH).transpose(0, 1).contiguous()


def product(
    x_th: Tensor,
    weight: IntegerPanels,
    outputs: int,
    bias_o: Tensor | None,
    activation: str | None,
    residual_to: Tensor | None,
    rows_t: Tensor | None,
) -> Tensor:
    """`activation(x @ w.T + bias) + residual[rows]`: [t, o]."""
    x_th = weight.columns.of(x_th)
    (rows, inputs), groups, group, digits = x_th.shape, weight.scales.shape[1], weight.group_size, weight.digits
    width, lines = groups * group, rows * digits
    by_tiles = tiles() if lines > _MOST_WITHOUT_TILES else None
    side, step = (1, width) if by_tiles is None else (_TILE, math.gcd(group, _STEP))
    # the memory of a recording is of numbers in fp32
    numbers, sums, units_t = empty(lines + -lines % side, width // 4), empty(lines, groups), empty(rows)
    sizes = (rows, inputs, groups, group, digits)
    launch(_round_rows, 8 * lines * width, *sizes, x_th, x_th.stride(0), numbers, units_t, sums, side, step)
    out_to = empty(rows, outputs)
    stride = 0 if residual_to is None else residual_to.stride(0)
    code = 0 if activation is None else ACTIVATIONS[activation]
    weights = (weight.values, weight.bits, weight.zero, weight.scales, weight.zeros)
    operands = (rows, outputs, groups, group, digits, numbers, units_t, sums, *weights, bias_o)
    endings = (residual_to, stride, rows_t, out_to, code)
    operations = lines * width * outputs // 4
    if by_tiles is None:
        launch(_integers, operations, *operands, *endings)
    else:
        launch(by_tiles, operations // 4, *operands, *endings, step)
    return out_to
