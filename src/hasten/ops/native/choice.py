"""The most probable token of each row: launches of `code/choice.py`."""

import torch
from torch import Tensor

from hasten.ops.native.launch import Kernel, empty, launch

_greedy = Kernel("greedy", "5q")


def greedy(logits_rv: Tensor) -> Tensor:
    """`hasten.ops.greedy` of rows of fp32 numbers that stand side by side."""
    rows, width = logits_rv.shape
    tokens_r = empty(rows).view(torch.int32)
    launch(_greedy, 2 * rows * width, rows, width, logits_rv, logits_rv.stride(0), tokens_r)
    return tokens_r
