"""Products with weights of 8 and 4 bits in panels: launches of `code/integers.py`.

Shapes: t tokens, h input features, o output features, k columns, g groups of columns, d digits.
"""

import torch.nn.functional as F  # noqa: N812 - torch's own convention
from torch import Tensor

from hasten.ops.native.launch import Kernel, empty, launch
from hasten.ops.native.products import ACTIVATIONS
from hasten.ops.packed import IntegerPanels

_WIDTH = 32
"""Output features of a panel."""
_UNIT = 8
"""Columns whose bytes stand side by side for each output feature, four and four."""
_PIECE = 1024
"""Most columns of a group of 4-bit weights: sums of their products with two digits fit into int32."""
MULTIPLE = 16
"""Columns of a group come in multiples of this number."""
MOST_COLUMNS = 1 << 16
"""Of a group of 8-bit weights: sums of their products fit into int32."""
_integers = Kernel("integers", "19q")
_round_rows = Kernel("round_rows", "10q")


def pack(
    values_ok: Tensor, scales_go: Tensor, zeros_go: Tensor | None, *, bits: int, zero: int, digits: int
) -> IntegerPanels:
    """A weight `(values - zeros) * scales` in panels.

    Values are whole numbers of 0 to 2^`bits` - 1 in uint8; `zero` is that of all of them where there are no `zeros_go`.
    `digits`: how many numbers of int8 an input becomes, 1 or 2. Groups have a multiple of 16 columns; one group alone
    may have any number.
    """
    outputs, columns = values_ok.shape
    groups = len(scales_go)
    values_ok = F.pad(values_ok, (0, -columns % MULTIPLE, 0, -outputs % _WIDTH))
    units = values_ok.view(-1, _WIDTH, values_ok.shape[1] // _UNIT, 2, _UNIT // 2).permute(0, 2, 3, 1, 4)
    if bits == 4:
        units = units[:, :, 0] | units[:, :, 1] << 4
    scales, zeros = (None if each is None else _in_panels(each) for each in (scales_go.float(), zeros_go))
    assert scales is not None
    return IntegerPanels(
        units.contiguous(),
        scales,
        None if zeros is None else zeros.int(),
        bits,
        zero,
        digits,
        values_ok.shape[1] // groups,
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
    (rows, inputs), groups, group, digits = x_th.shape, weight.scales.shape[1], weight.group_size, weight.digits
    width = digits * groups * group
    # the memory of a recording is of numbers in fp32
    numbers, sums, units_t = empty(rows, width // 4), empty(rows, digits * groups), empty(rows)
    sizes = (rows, inputs, groups, group, digits)
    launch(_round_rows, 8 * rows * width, *sizes, x_th, x_th.stride(0), numbers, units_t, sums)
    out_to = empty(rows, outputs)
    stride = 0 if residual_to is None else residual_to.stride(0)
    code = 0 if activation is None else ACTIVATIONS[activation]
    weights = (weight.values, weight.bits, weight.zero, weight.scales, weight.zeros)
    launch(
        _integers,
        rows * width * outputs // 4,
        rows,
        outputs,
        groups,
        group,
        digits,
        numbers,
        units_t,
        sums,
        *weights,
        bias_o,
        residual_to,
        stride,
        rows_t,
        out_to,
        code,
    )
    return out_to
