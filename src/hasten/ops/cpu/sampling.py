"""Fast paths of the CPU for choosing tokens: kernels, or numpy, which searches and sorts far faster than torch.

Shapes: r rows, v vocabulary, k greatest probabilities.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hasten.ops import native, reference
from hasten.ops.draws import NONE_LEFT, Draws
from hasten.ops.logprobs import TopLogprobs
from hasten.ops.plan import Integers

Floats = NDArray[np.float64]

_FEW = 8
"""Numbers up to which taking out the greatest one by one is sooner done than partial sorting."""


def greedy(logits_rv: Tensor) -> Tensor:  # noqa: D103
    if logits_rv.dtype != torch.float32:
        return reference.greedy(logits_rv)
    kernels = native.kernels()
    if kernels is not None and logits_rv.stride(1) == 1:
        return kernels.choice.greedy(logits_rv)
    return _where_finite(logits_rv.numpy().argmax(-1), logits_rv)


def _where_finite(tokens: Integers, logits_rv: Tensor) -> Tensor:
    """`reference.where_finite`."""
    best = logits_rv.amax(-1).float().numpy()
    none = np.where(best == -np.inf, NONE_LEFT, -1)
    return torch.from_numpy(np.where(np.isfinite(best), tokens, none).astype(np.int32))


def top_logprobs(logits_rv: Tensor, tokens_r: Tensor, count: int) -> TopLogprobs:  # noqa: D103
    kernels = native.kernels()
    if kernels is not None and count <= kernels.sampling.MOST_COUNTED and logits_rv.stride(1) == 1:
        return kernels.sampling.top_logprobs(logits_rv.float(), tokens_r.contiguous(), count)
    return reference.top_logprobs(logits_rv, tokens_r, count, largest)


def packed_logprobs(logits_rv: Tensor, tokens_r: Tensor, count: int) -> Tensor:  # noqa: D103
    kernels = native.kernels()
    if kernels is not None and count <= kernels.sampling.MOST_COUNTED and logits_rv.stride(1) == 1:
        return kernels.sampling.packed_logprobs(logits_rv.float(), tokens_r.contiguous(), count)
    return reference.top_logprobs(logits_rv, tokens_r, count, largest).packed(tokens_r)


def largest(x_rv: Tensor, count: int) -> tuple[Tensor, Tensor]:  # noqa: D103
    count = min(count, x_rv.shape[1])
    kernels = native.kernels()
    if (
        kernels is not None
        and 0 < count <= kernels.sampling.MOST_COUNTED
        and x_rv.dtype == torch.float32
        and x_rv.stride(1) == 1
    ):
        return kernels.sampling.largest(x_rv, count)
    if not 0 < count <= _FEW or x_rv.dtype != torch.float32:
        return reference.largest(x_rv, count)
    left: NDArray[np.float32] = x_rv.numpy().copy() if count > 1 else x_rv.numpy()
    rows = np.arange(len(left))
    values, ids = np.empty((len(left), count), np.float32), np.empty((len(left), count), np.int32)
    for rank in range(count):
        ids[:, rank] = found = left.argmax(-1)
        values[:, rank] = left[rows, found]
        if rank + 1 < count:
            left[rows, found] = -np.inf
    values_rk, ids_rk = torch.from_numpy(values), torch.from_numpy(ids)
    unsure = np.flatnonzero(values[:, -1] == -np.inf)  # what was taken out looks the same
    if len(unsure):
        values_rk[unsure], ids_rk[unsure] = reference.largest(x_rv[unsure], count)
    return values_rk, ids_rk


def draw(logits_rv: Tensor, draws: Draws) -> Tensor:  # noqa: D103
    kernels = native.kernels()
    if kernels is not None and logits_rv.stride(1) == 1:
        return kernels.sampling.draw(logits_rv.float(), draws)
    probs_rv = reference.probabilities(logits_rv, draws)
    if draws.filters:
        filter_(probs_rv, draws)
    return _where_finite(reference.drawn_indices(probs_rv, draws).numpy(), logits_rv)


def filter_(probs_rv: Tensor, draws: Draws) -> None:
    """`reference.filtered`, in place."""
    probs: Floats = probs_rv.numpy()
    vocab = probs.shape[1]
    top_k, top_p, min_p = (column[:, np.newaxis] for column in draws.packed_r5.numpy().T[1:4])
    if (min_p > 0).any():
        probs *= probs >= probs.max(axis=-1, keepdims=True) * min_p
    top_k = np.where((top_k > 0) & (top_k < vocab), top_k, vocab).astype(np.int64)
    cut = ((top_k < vocab) | (top_p < 1))[:, 0]
    if cut.all():
        probs *= probs >= _floor(probs, top_k, top_p)
    elif cut.any():
        floor = np.zeros_like(top_p)
        floor[cut] = _floor(probs[cut], top_k[cut], top_p[cut])
        probs *= probs >= floor


def _floor(probs: Floats, top_k: Integers, top_p: Floats) -> Floats:
    """`reference.floor`, for most rows from a few of the greatest probabilities alone."""
    limited = top_k < probs.shape[1]
    first = _greatest(probs, top_k, top_p)
    left = probs
    if limited.any():
        last = np.where(limited, np.take_along_axis(first, np.where(limited, top_k, 1) - 1, axis=-1), 0)
        left = probs * (probs >= last)
    most = top_p * torch.from_numpy(left).sum(-1, keepdim=True).numpy()  # torch adds in another order than numpy
    sums = first.cumsum(axis=-1)
    kept = (sums - first < most) & (np.arange(first.shape[1]) < top_k)
    floor: Floats = np.take_along_axis(first, np.maximum(kept.sum(axis=-1, keepdims=True), 1) - 1, axis=-1)
    short = np.flatnonzero(~limited & (sums[:, -1:] < most))  # by rounding
    if len(short):
        rows = (torch.from_numpy(numbers[short]) for numbers in (probs, top_k, top_p))
        floor[short] = reference.floor(*rows).numpy()
    return floor


def _greatest(probs: Floats, top_k: Integers, top_p: Floats) -> Floats:
    """The greatest numbers of each row, in descending order and then zeros: all that the filters may keep.

    What is below an even division of what top-p drops adds up to less than that, so top-p keeps none of it. Of parts of
    a row, the k greatest maxima are k numbers of the row, so top-k keeps none that is below the last of them.
    """
    vocab = probs.shape[1]
    least = (1 - top_p) * probs.sum(-1, keepdims=True) / vocab
    limited = top_k < vocab
    most = int(top_k.max(initial=0, where=limited))
    if most:
        maxima = _maxima(probs, 2 * most)
        last = np.take_along_axis(maxima, -np.minimum(top_k, most), axis=-1)
        least = np.where(limited, last, least)
    held = probs >= np.maximum(least, np.finfo(np.float64).smallest_subnormal)
    counts = np.count_nonzero(held, axis=-1, keepdims=True)
    greatest = np.zeros((len(probs), max(1, most, int(counts.max()))))
    greatest[np.arange(greatest.shape[1]) < counts] = probs[held]
    greatest.sort(axis=-1)
    return greatest[:, ::-1]


def _maxima(probs: Floats, count: int) -> Floats:
    """The maxima of at least `count` parts of each row, or all numbers if these are fewer, in ascending order."""
    rows, vocab = probs.shape
    size = max(1, vocab // count)
    parts = vocab // size
    maxima: Floats = probs[:, : size * parts].reshape(rows, size, parts).max(axis=1)
    maxima.sort(axis=-1)
    return maxima
