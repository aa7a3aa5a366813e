"""Tokens drawn, log-probabilities and the greatest numbers of rows: launches of `code/draw.py` and `code/logprobs.py`.

Rows are of fp32 numbers that stand side by side.
"""

import threading

import torch
from torch import Tensor

from hasten.ops.draws import Draws
from hasten.ops.logprobs import TopLogprobs
from hasten.ops.native.launch import Kernel, empty, launch, recordings

MOST_COUNTED = 64
"""Greatest numbers up to which they are kept in order while a row is read."""
_draw = Kernel("draw", "11q")
_logprobs = Kernel("logprobs", "13q")
_largest = Kernel("largest", "7q")
_log_softmax = Kernel("log_softmax", "5q")


_most_threads = torch.get_num_threads()
"""That a recording may be run on, unless there are more when it is made."""


class _Scratch(threading.local):
    """Memory of one thread that launches kernels, kept for the next launch."""

    numbers = torch.empty(0)

    def take(self, size: int) -> Tensor:
        """So many fp32 numbers, whatever they are; those of a recording are its own."""
        if recordings.current is not None:
            return empty(size)
        if self.numbers.numel() < size:
            with torch.inference_mode(False):
                self.numbers = torch.empty(size)
        return self.numbers


_scratch = _Scratch()


def draw(logits_rv: Tensor, draws: Draws) -> Tensor:
    """`hasten.ops.draw`."""
    rows, width = logits_rv.shape
    tokens_r, size = empty(rows).view(torch.int32), -(-width // 64) * 64
    threads = min(rows, max(torch.get_num_threads(), _most_threads))
    scratch = _scratch.take(4 * size * threads)
    x = (rows, width, logits_rv, logits_rv.stride(0))
    row_step, step = draws.packed_r5.stride()
    parameters = (draws.packed_r5, row_step, step)
    launch(_draw, 64 * rows * width, *x, *parameters, scratch, size, threads, tokens_r)
    return tokens_r


def top_logprobs(logits_rv: Tensor, tokens_r: Tensor, count: int) -> TopLogprobs:
    """`hasten.ops.top_logprobs` with up to `MOST_COUNTED` tokens a row."""
    rows, width = logits_rv.shape
    count = min(count, width)
    chosen_r, values_rk = empty(rows), empty(rows, count)
    ranks_r, ids_rk = (each.view(torch.int32) for each in (empty(rows), empty(rows, count)))
    _launch_logprobs(logits_rv, tokens_r, count, None, ranks_r, chosen_r, 1, values_rk, ids_rk, count)
    return TopLogprobs(chosen_r, ranks_r, values_rk, ids_rk)


def packed_logprobs(logits_rv: Tensor, tokens_r: Tensor, count: int) -> Tensor:
    """`hasten.ops.packed_logprobs` with up to `MOST_COUNTED` tokens a row."""
    rows, width = logits_rv.shape
    count = min(count, width)
    words = 3 + 2 * count
    packed_rw = empty(rows, words).view(torch.int32)
    first = packed_rw.data_ptr()
    token, rank, chosen, values, ids = (first + 4 * word for word in (0, 1, 2, 3, 3 + count))
    _launch_logprobs(logits_rv, tokens_r, count, token, rank, chosen, words, values, ids, words)
    return packed_rw


def _launch_logprobs(
    logits_rv: Tensor,
    tokens_r: Tensor,
    count: int,
    copies: int | None,
    ranks: int | Tensor,
    chosen: int | Tensor,
    stride: int,
    values: int | Tensor,
    ids: int | Tensor,
    top_stride: int,
) -> None:
    """`copies`: of the tokens. What rows have of each stands `stride` numbers apart, or `top_stride`."""
    rows, width = logits_rv.shape
    x = (rows, width, logits_rv, logits_rv.stride(0), tokens_r, count)
    launch(_logprobs, 64 * rows * width, *x, copies, ranks, chosen, stride, values, ids, top_stride)


def log_softmax(logits_rv: Tensor) -> Tensor:
    """`hasten.ops.log_softmax`."""
    rows, width = logits_rv.shape
    out_rv = empty(rows, width)
    launch(_log_softmax, 64 * rows * width, rows, width, logits_rv, logits_rv.stride(0), out_rv)
    return out_rv


def largest(x_rv: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """`hasten.ops.largest` of up to `MOST_COUNTED` numbers a row."""
    rows, width = x_rv.shape
    count = min(count, width)
    values_rk, ids_rk = empty(rows, count), empty(rows, count).view(torch.int32)
    launch(_largest, 8 * rows * width, rows, width, x_rv, x_rv.stride(0), count, values_rk, ids_rk)
    return values_rk, ids_rk
