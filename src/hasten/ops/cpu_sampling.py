"""Fast paths of the CPU for choosing tokens: numpy searches and sorts rows several times as fast as torch does."""

import numpy as np
import torch
from torch import Tensor

from hasten.ops import reference
from hasten.ops.draws import Draws

_FIRST = 1024
"""Most probable tokens that are sorted first: top-p seldom keeps more, and sorting a vocabulary takes longest."""

_FEW = 4
"""Part of a row up to which torch finds the greatest numbers sooner than numpy sorts all of them."""


def greedy(logits_rv: Tensor) -> Tensor:  # noqa: D103
    if logits_rv.dtype != torch.float32:
        return reference.greedy(logits_rv)
    return reference.where_finite(torch.from_numpy(logits_rv.numpy().argmax(-1)), logits_rv.amax(-1))


def draw(logits_rv: Tensor, draws: Draws) -> Tensor:  # noqa: D103
    return reference.drawn(reference.filtered(logits_rv, draws, _floor), logits_rv, draws)


def _floor(probs_rv: Tensor, top_k_r1: Tensor, top_p_r1: Tensor) -> Tensor:
    """`reference.floor`, for most rows from the first few probabilities alone."""
    vocab = probs_rv.shape[1]
    first_rk = _largest(probs_rv, min(_FIRST, int(top_k_r1.max())))
    count = first_rk.shape[1]
    last_r1 = first_rk.gather(1, top_k_r1.clamp(max=count) - 1).where(top_k_r1 < vocab, 0)
    left_r1 = (probs_rv * (probs_rv >= last_r1)).sum(-1, keepdim=True)
    floor_r1 = reference.floor_among(first_rk, left_r1, top_k_r1, top_p_r1)
    behind_r1 = (top_k_r1 < vocab) | (first_rk.cumsum(-1)[:, -1:] < top_p_r1 * left_r1)
    rows = ((top_k_r1 > count) & behind_r1).nonzero()[:, 0]
    if len(rows):
        floor_r1[rows] = reference.floor(probs_rv[rows], top_k_r1[rows], top_p_r1[rows])
    return floor_r1


def _largest(probs_rv: Tensor, count: int) -> Tensor:
    """The greatest numbers of each row, in descending order."""
    if _FEW * count <= probs_rv.shape[1]:
        return probs_rv.topk(count, dim=-1).values
    return torch.from_numpy(np.sort(probs_rv.numpy(), axis=-1)[:, : -count - 1 : -1].copy())
