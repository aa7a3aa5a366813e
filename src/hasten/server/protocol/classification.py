"""Triton's classification: the largest values of an output as text, `value:index`."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from hasten.server.types import Tensor, invalid

_NUMBERS = ("UINT8", "UINT16", "UINT32", "UINT64", "INT8", "INT16", "INT32", "INT64", "FP32", "FP64")


def classify(tensor: Tensor, classes: int, *, batched: bool) -> Tensor:
    """The `classes` largest values of a tensor, or of each row of its first axis if it is `batched`: BYTES [rows, n].

    The largest comes first, of equal ones the one with the smaller index. INVALID for what is no number.
    """
    if tensor.datatype not in _NUMBERS:
        raise invalid(f"class result not available for output due to unsupported type '{tensor.datatype}'")
    rows = tensor.data.reshape(tensor.shape[0] if batched and tensor.shape else 1, -1)
    kept = min(classes, rows.shape[1])
    texts: NDArray[Any] = np.empty((len(rows), kept), dtype=object)
    for at, row in enumerate(rows):
        texts[at] = _largest(row, kept)
    shape = texts.shape if batched else texts.shape[1:]
    return Tensor(tensor.name, "BYTES", shape, texts.reshape(shape))


def _largest(row: NDArray[Any], count: int) -> list[bytes]:
    floating = row.dtype.kind == "f"
    # a complement turns integers round where a minus would overflow
    order = np.argsort(-row if floating else ~row, kind="stable")[:count]
    return [(f"{row[at]:f}:{at}" if floating else f"{row[at]}:{at}").encode() for at in order.tolist()]
