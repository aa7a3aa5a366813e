"""Fast paths of the CPU for choosing tokens: numpy searches and sorts rows several times as fast as torch does.

Shapes: r rows, v vocabulary, k greatest probabilities.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hasten.ops import native, reference
from hasten.ops.draws import Draws
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
    return reference.where_finite(torch.from_numpy(logits_rv.numpy().argmax(-1)), logits_rv.amax(-1))


def top_logprobs(logits_rv: Tensor, tokens_r: Tensor, count: int) -> TopLogprobs:  # noqa: D103
    return reference.top_logprobs(logits_rv, tokens_r, count, largest)


def largest(x_rv: Tensor, count: int) -> tuple[Tensor, Tensor]:  # noqa: D103
    count = min(count, x_rv.shape[1])
    if not 0 < count <= _FEW or x_rv.dtype != torch.float32:
        return reference.largest(x_rv, count)
    left: NDArray[np.float32] = x_rv.numpy().copy() if count > 1 else x_rv.numpy()
    rows = np.arange(len(left))
    values, ids = np.empty((len(left), count), np.float32), np.empty((len(left), count), np.int32)
    for place in range(count):
        ids[:, place] = found = left.argmax(-1)
        values[:, place] = left[rows, found]
        if place + 1 < count:
            left[rows, found] = -np.inf
    values_rk, ids_rk = torch.from_numpy(values), torch.from_numpy(ids)
    unsure = np.flatnonzero(values[:, -1] == -np.inf)  # what was taken out looks the same
    if len(unsure):
        values_rk[unsure], ids_rk[unsure] = reference.largest(x_rv[unsure], count)
    return values_rk, ids_rk


def draw(logits_rv: Tensor, draws: Draws) -> Tensor:  # noqa: D103
    return reference.drawn(reference.filtered(logits_rv, draws, _floor), logits_rv, draws)


def _floor(probs_rv: Tensor, top_k_r1: Tensor, top_p_r1: Tensor) -> Tensor:
    """`reference.floor`, for most rows from a few of the greatest probabilities alone."""
    limited_r1 = top_k_r1 < probs_rv.shape[1]
    first_rk = _greatest(probs_rv.numpy(), top_k_r1.numpy(), top_p_r1.numpy())
    left_rv = probs_rv
    if bool(limited_r1.any()):
        last_r1 = first_rk.gather(1, top_k_r1.where(limited_r1, 1) - 1).where(limited_r1, 0)
        left_rv = probs_rv * (probs_rv >= last_r1)
    left_r1 = left_rv.sum(-1, keepdim=True)
    floor_r1 = reference.floor_among(first_rk, left_r1, top_k_r1, top_p_r1)
    short_r1 = ~limited_r1 & (first_rk.cumsum(-1)[:, -1:] < top_p_r1 * left_r1)  # by rounding
    rows = short_r1.nonzero()[:, 0]
    if len(rows):
        floor_r1[rows] = reference.floor(probs_rv[rows], top_k_r1[rows], top_p_r1[rows])
    return floor_r1


def _greatest(probs: Floats, top_k: Integers, top_p: Floats) -> Tensor:
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
    return torch.from_numpy(greatest[:, ::-1].copy())


def _maxima(probs: Floats, count: int) -> Floats:
    """The maxima of at least `count` parts of each row, or all numbers if these are fewer, in ascending order."""
    rows, vocab = probs.shape
    size = max(1, vocab // count)
    parts = vocab // size
    maxima: Floats = probs[:, : size * parts].reshape(rows, size, parts).max(axis=1)
    maxima.sort(axis=-1)
    return maxima
