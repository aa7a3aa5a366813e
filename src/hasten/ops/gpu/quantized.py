"""Which kernel multiplies a quantized weight, and whether its rows are rounded before.

A single row is multiplied as `byte_dots.py` says where weights are integers, more rows by weights of 8 bits with scales
of output features as `rounded.py` does, and by those with scales of groups as `grouped.py` does.
"""

import torch
from torch import Tensor

from hasten.ops.gpu import byte_dots, grouped, rounded
from hasten.ops.gpu.endings import Projection
from hasten.ops.gpu.row_rounding import Rounding, rounding_of
from hasten.ops.packed import PackedLinear
from hasten.ops.rounding import Inputs


def holds(weight: PackedLinear) -> bool:
    """Whether the weight is quantized."""
    return weight.grouped is not None or weight.scales is not None


def serves(rows: int, dtype: torch.dtype, weight: PackedLinear, *, split: bool) -> bool:
    """Whether `product` is to be used for this number of rows of a type, and not a library."""
    if byte_dots.serves(rows, dtype, weight):
        return True
    if weight.grouped is not None:
        return grouped.serves(rows, dtype, weight.grouped)
    return rounded.serves(rows, dtype, weight, split=split)


def rounding_for(reader: PackedLinear, shape: tuple[int, int], like: Tensor) -> Rounding | None:
    """Where a kernel may store its rows rounded for the products with `reader`; None where these take rows as they are.

    `shape` is that of the rows, and `like` has their type and device.
    """
    if not holds(reader):
        return None
    alone = byte_dots.serves(shape[0], like.dtype, reader)
    if reader.grouped is not None:
        rounds = alone and reader.grouped.is_packed and reader.grouped.columns.are_inputs
    else:
        # a single row with a weight in int8 is rounded where it is multiplied
        several = not alone and rounded.serves(shape[0], like.dtype, reader, split=False)
        rounds = reader.inputs is not None or several
    return rounding_of(shape, like, reader.inputs, nibbles=reader.grouped is not None) if rounds else None


def product(
    x_th: Inputs,
    weight: PackedLinear,
    bias_o: Tensor | None,
    activation: str | None,
    to: Projection | None,
    *,
    split: bool,
) -> Tensor:
    """[t, o] in the type of `x_th`, with `to` the queries alone; with `split` maybe [splits, t, o] in fp32."""
    if byte_dots.serves(x_th.shape[0], x_th.dtype, weight):
        return byte_dots.product(x_th, weight, bias_o, activation, to)
    if weight.grouped is None:
        return rounded.product(x_th, weight, bias_o, activation, to, split=split)
    assert isinstance(x_th, Tensor)
    return grouped.product(x_th, weight.grouped, bias_o, activation, to, split=split)
