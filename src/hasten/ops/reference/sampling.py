"""From logits to tokens and their log-probabilities."""

from collections.abc import Callable

import torch
from torch import Tensor

from hasten.ops.draws import NONE_LEFT, Draws
from hasten.ops.logprobs import TopLogprobs

_LAST = (1 << 31) - 1
"""The last token that there may be."""


def greedy(logits_rv: Tensor) -> Tensor:  # noqa: D103
    best_r, tokens_r = logits_rv.max(-1)
    return where_finite(tokens_r, best_r)


def greedy_keys(logits_rv: Tensor, first: int) -> Tensor:
    """The bits of the greatest logit as an integer of the same order, above how far its token is from the last."""
    if logits_rv.shape[1] == 0:
        logits_rv = logits_rv.new_full((logits_rv.shape[0], 1), float("-inf"))
    best_r, tokens_r = logits_rv.float().max(-1)
    bits_r = (best_r.nan_to_num(float("inf"), float("inf"), float("-inf")) + 0.0).view(torch.int32)
    image_r = bits_r ^ ((bits_r >> 31) & _LAST)
    return (image_r.long() << 32) | (_LAST - first - tokens_r)


def tokens_of_keys(keys_r: Tensor) -> Tensor:  # noqa: D103
    image_r = (keys_r >> 32).int()
    best_r = (image_r ^ ((image_r >> 31) & _LAST)).view(torch.float32)
    return where_finite(_LAST - (keys_r & _LAST), best_r)


def where_finite(tokens_r: Tensor, best_r: Tensor) -> Tensor:
    """The tokens as int32, and what stands for none where a row's greatest logit is not finite."""
    return tokens_r.where(best_r.isfinite(), -1).masked_fill(best_r == float("-inf"), NONE_LEFT).int()


def draw(logits_rv: Tensor, draws: Draws) -> Tensor:  # noqa: D103
    return where_finite(drawn_indices(filtered(logits_rv, draws), draws), logits_rv.amax(-1))


def drawn_indices(probs_rv: Tensor, draws: Draws) -> Tensor:
    """Where the cumulative distribution of what is left of each row reaches its point, [r]."""
    cumulative_rv = probs_rv.cumsum(-1)
    drawn_r1 = torch.searchsorted(cumulative_rv, draws.point_r1 * cumulative_rv[:, -1:], right=True)
    return drawn_r1.squeeze(1).clamp_(max=probs_rv.shape[1] - 1)


def floor(probs_rv: Tensor, top_k_r1: Tensor, top_p_r1: Tensor) -> Tensor:
    """The least probability [r, 1] that top-k, and then top-p among what is left, keep.

    What is as probable as the last of the k is left as well, and counts for top-p.
    """
    sorted_rk = probs_rv.topk(int(top_k_r1.max()), dim=-1).values
    left_rv = probs_rv * (probs_rv >= sorted_rk.gather(1, top_k_r1 - 1))
    kept_rk = sorted_rk.cumsum(-1).sub_(sorted_rk) < top_p_r1 * left_rv.sum(-1, keepdim=True)
    kept_rk &= torch.arange(sorted_rk.shape[1], device=sorted_rk.device) < top_k_r1
    return sorted_rk.gather(1, kept_rk.sum(-1, keepdim=True).clamp_(min=1) - 1)


def probabilities(logits_rv: Tensor, draws: Draws) -> Tensor:
    """What `draw` draws from without filters, in fp64: a tiny temperature would leave no distribution in fp32."""
    return logits_rv.to(torch.float64, copy=True).div_(draws.temperature_r1).softmax(-1)


def filtered(logits_rv: Tensor, draws: Draws) -> Tensor:
    """What `draw` draws from: probabilities before the filters, and 0 for tokens that a filter drops."""
    probs_rv = probabilities(logits_rv, draws)
    if not draws.filters:
        return probs_rv
    probs_rv *= probs_rv >= probs_rv.amax(-1, keepdim=True) * draws.min_p_r1
    vocab = logits_rv.shape[1]
    top_k_r1 = draws.top_k_r1.long().clamp(max=vocab)
    top_k_r1 = top_k_r1.where(top_k_r1 > 0, vocab)
    floor_r1 = floor(probs_rv, top_k_r1, draws.top_p_r1).where((top_k_r1 < vocab) | (draws.top_p_r1 < 1), 0)
    return probs_rv.mul_(probs_rv >= floor_r1)


def largest(x_rv: Tensor, count: int) -> tuple[Tensor, Tensor]:  # noqa: D103
    vocab = x_rv.shape[1]
    values_rk, ids_rk = x_rv.topk(min(count + 1, vocab), dim=-1)
    # topk takes any among equals, and others for another count
    tied_r = (values_rk[:, 1:] == values_rk[:, :-1]).any(-1)
    if bool(tied_r.any()):
        ids_rk[tied_r] = _keys(x_rv[tied_r]).topk(values_rk.shape[1], dim=-1).indices
    return values_rk[:, :count], ids_rk[:, :count].int()


def _keys(x_rv: Tensor) -> Tensor:
    """Distinct numbers in the order of fp32 ones, and among equals the first one's the greatest: int64."""
    bits_rv = (x_rv.float() + 0.0).view(torch.int32).long()  # -0 + 0 is 0
    images_rv = bits_rv ^ ((bits_rv >> 31) & 0x7FFFFFFF)
    return (images_rv << 32) - torch.arange(x_rv.shape[1], device=x_rv.device)


def top_logprobs(  # noqa: D103
    logits_rv: Tensor,
    tokens_r: Tensor,
    count: int,
    largest: Callable[[Tensor, int], tuple[Tensor, Tensor]] = largest,
) -> TopLogprobs:
    logits_rv = logits_rv.float()
    logprobs_rv = logits_rv.log_softmax(-1)
    tokens_r1 = tokens_r.long().clamp(min=0).unsqueeze(1)
    ranks_r = (logits_rv > logits_rv.gather(1, tokens_r1)).sum(-1, dtype=torch.int32) + 1
    _, ids_rk = largest(logits_rv, count)
    return TopLogprobs(
        logprobs_rv.gather(1, tokens_r1).squeeze(1), ranks_r, logprobs_rv.gather(1, ids_rk.long()), ids_rk
    )
