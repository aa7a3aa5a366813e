"""Products with weights in panels or in rows, and gated units: launches of `code/products.py` and `code/rows.py`."""

import torch
from torch import Tensor

from hasten.ops.native import pages
from hasten.ops.native.launch import Kernel, empty, launch

_WIDTH = 32
"""Output features of a panel."""
ACTIVATIONS = {"gelu_tanh": 1, "silu": 2, "relu": 3, "relu2": 4, "quick_gelu": 5, "gelu": 6}
"""Activations that a product computes of its results, by their number in the kernel."""
_product = Kernel("product", "13q")
_rows = Kernel("rows", "8q")
_gated = Kernel("gated", "5q")


def pack(weight_oh: Tensor) -> Tensor:
    """A weight in panels: [panels, h, 32]."""
    outputs, inputs = weight_oh.shape
    count = -(-outputs // _WIDTH)
    panels = pages.zeros((count, inputs, _WIDTH))
    whole = outputs // _WIDTH
    panels[:whole] = weight_oh[: whole * _WIDTH].view(whole, _WIDTH, inputs).transpose(1, 2)
    if whole < count:
        panels[whole, :, : outputs - whole * _WIDTH] = weight_oh[whole * _WIDTH :].t()
    return panels


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
    out_to = empty(rows, outputs)
    stride = 0 if residual_to is None else residual_to.stride(0)
    code = 0 if activation is None else ACTIVATIONS[activation]
    sizes = (rows, inputs, outputs, x_th, x_th.stride(0), panels, bias_o)
    launch(_product, rows * inputs * outputs, *sizes, residual_to, stride, rows_t, out_to, outputs, code)
    return out_to


def takes_rows(weight_oh: Tensor) -> bool:
    """Whether `product_of_rows` multiplies a weight."""
    return weight_oh.dtype == torch.float32 and weight_oh.is_contiguous() and weight_oh.shape[1] % 16 == 0


def product_of_rows(x_th: Tensor, weight_oh: Tensor, bias_o: Tensor | None) -> Tensor:
    """`x @ w.T + bias`: [t, o]."""
    (rows, inputs), outputs = x_th.shape, weight_oh.shape[0]
    out_to = empty(rows, outputs)
    sizes = (rows, inputs, outputs, x_th, x_th.stride(0))
    launch(_rows, rows * inputs * outputs, *sizes, weight_oh, bias_o, out_to)
    return out_to


def gated(x_to: Tensor, gate: str) -> Tensor:
    """`gate(a) * b` of the halves of rows: [t, o / 2]."""
    rows, width = x_to.shape[0], x_to.shape[1] // 2
    out_to = empty(rows, width)
    launch(_gated, 32 * rows * width, rows, width, x_to, out_to, ACTIVATIONS[gate])
    return out_to
