"""Norms of rows, rows of tables, and multiples: launches of `code/norms.py`."""

from torch import Tensor

from hasten.ops.native.launch import Kernel, empty, launch

_norm = Kernel("norm", "7qd2q")
_gather = Kernel("gather", "5q")
_gather_bytes = Kernel("gather_bytes", "6q")
_scale = Kernel("scale", "2qd")


def norm(
    x_th: Tensor, weight_h: Tensor, bias_h: Tensor | None, eps: float, ids_t: Tensor | None, *, rms: bool, offset: bool
) -> Tensor:
    """Norms of rows [t, h], or of rows `ids_t` of a table: [t, h].

    `rms`: the root mean square norm; `offset`: weights are 1 more than these.
    """
    rows, width = len(x_th) if ids_t is None else len(ids_t), x_th.shape[1]
    out_th = empty(rows, width)
    launch(_norm, 8 * rows * width, rows, width, x_th, ids_t, weight_h, bias_h, out_th, eps, int(rms), int(offset))
    return out_th


def gather(ids_t: Tensor, table_vh: Tensor) -> Tensor:
    """Rows of a table: [t, h]."""
    rows, width = len(ids_t), table_vh.shape[1]
    out_th = empty(rows, width)
    launch(_gather, rows * width, rows, width, table_vh, ids_t, out_th)
    return out_th


def gather_bytes(ids_t: Tensor, table_vh: Tensor, scales_v: Tensor) -> Tensor:
    """Rows of a table in int8, each times its scale: [t, h]."""
    rows, width = len(ids_t), table_vh.shape[1]
    out_th = empty(rows, width)
    launch(_gather_bytes, 2 * rows * width, rows, width, table_vh, ids_t, scales_v, out_th)
    return out_th


def scale(x: Tensor, factor: float) -> Tensor:
    """A tensor of numbers that stand side by side, multiplied in place."""
    launch(_scale, x.numel(), x.numel(), x, factor)
    return x
