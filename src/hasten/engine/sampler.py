"""From logits to tokens, each request by its own parameters. Shapes: r rows, v vocabulary, k candidates.

A token is chosen by inverting the cumulative distribution at one uniform number, which depends on nothing but the
request's seed and the token's position: the rest of the batch and preemptions cannot change it.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from hasten.core.types import Logprob
from hasten.engine.sequence import Sequence

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_NOT_FINITE = "the model's logits are not finite: its values overflow this data type; compute in bf16 or fp32"


@dataclass(frozen=True)
class Sampled:
    """The next token of one sequence."""

    token_id: int
    logprob: float | None = None
    top: dict[int, Logprob] | None = None
    """The chosen token and the most probable ones, if the request asked for log-probabilities."""
    error: str | None = None
    """Why there is no token."""


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) for a seed and a position."""
    return (mix64(seed + position * _GOLDEN) >> 11) * 2.0**-53


def mix64(value: int) -> int:
    """64 bits, each of which depends on all bits of `value`. Source: Steele, Lea, Flood, SplitMix64, 2014."""
    state = (value + _GOLDEN) & _MASK
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
    return state ^ (state >> 31)


def sample(logits_rv: Tensor, sequences: list[Sequence], eos_token_ids: tuple[int, ...]) -> list[Sampled]:
    """The next token of each sequence, or an error for one whose logits are not finite."""
    if all(sequence.is_plain for sequence in sequences):
        best_r, tokens_r = logits_rv.max(-1)
        sampled = [Sampled(token) for token in tokens_r.tolist()]
    else:
        logits_rv = logits_rv.float()
        best_r = logits_rv.amax(-1)
        sampled = _sample_each(logits_rv, sequences, eos_token_ids)
    if not math.isfinite(float(best_r.sum())):
        finite = best_r.isfinite().tolist()
        sampled = [one if fine else Sampled(-1, error=_NOT_FINITE) for one, fine in zip(sampled, finite, strict=True)]
    return sampled


def _sample_each(logits_rv: Tensor, sequences: list[Sequence], eos_token_ids: tuple[int, ...]) -> list[Sampled]:
    adjusted_rv = _adjust(logits_rv, sequences, eos_token_ids)
    tokens_r = adjusted_rv.argmax(-1)
    drawn = [row for row, sequence in enumerate(sequences) if not sequence.params.greedy]
    if drawn:
        chosen = adjusted_rv if len(drawn) == len(sequences) else adjusted_rv[drawn]
        tokens_r[drawn] = _draw(chosen, [sequences[row] for row in drawn])
    return _with_logprobs(logits_rv, tokens_r, sequences)


def _adjust(logits_rv: Tensor, sequences: list[Sequence], eos_token_ids: tuple[int, ...]) -> Tensor:
    """Logits after penalties and banned tokens; the given ones are left as they are."""
    adjusted_rv = logits_rv
    for row, sequence in enumerate(sequences):
        params = sequence.params
        banned = _banned(sequence, eos_token_ids)
        if not banned and not params.has_penalty:
            continue
        if adjusted_rv is logits_rv:
            adjusted_rv = logits_rv.clone()
        if params.has_penalty:
            _penalize(adjusted_rv[row], sequence)
        if banned:
            adjusted_rv[row, banned] = float("-inf")
    return adjusted_rv


def _penalize(logits_v: Tensor, sequence: Sequence) -> None:
    """Apply a sequence's penalties in place. Sources: Keskar et al., CTRL, 2019 (repetition); OpenAI's API (others)."""
    params = sequence.params
    if params.repetition_penalty != 1:
        seen = torch.tensor(sequence.token_ids, device=logits_v.device).unique()
        values = logits_v[seen]
        logits_v[seen] = torch.where(values > 0, values / params.repetition_penalty, values * params.repetition_penalty)
    if sequence.output_len and (params.presence_penalty or params.frequency_penalty):
        seen, counts = torch.tensor(sequence.output_token_ids, device=logits_v.device).unique(return_counts=True)
        logits_v[seen] -= params.presence_penalty + params.frequency_penalty * counts


def _banned(sequence: Sequence, eos_token_ids: tuple[int, ...]) -> list[int]:
    """Tokens that must not come next."""
    params = sequence.params
    banned: list[int] = []
    if sequence.output_len < params.min_tokens:
        banned += [*eos_token_ids, *params.stop_token_ids]
    if params.bad_words_ids:
        output = sequence.output_token_ids
        for word in params.bad_words_ids:
            before = list(word[:-1])
            if not before or output[-len(before) :] == before:
                banned.append(word[-1])
    return banned


def _draw(logits_rv: Tensor, sequences: list[Sequence]) -> Tensor:
    """Tokens [r] drawn by temperature, min-p, top-k and top-p, in this order.

    Each filter keeps what is as probable as the last token it keeps, and the draw goes through the vocabulary in its
    own order: neither ties nor the filters of other rows can change which token a number stands for.
    """
    params = [sequence.params for sequence in sequences]
    vocab, device = logits_rv.shape[1], logits_rv.device

    def column(values: Iterable[float]) -> Tensor:
        return torch.tensor(list(values), dtype=torch.float64, device=device).unsqueeze(1)

    # fp64 for the temperature: a tiny one would overflow fp32 and leave no distribution to draw from.
    probs_rv = (logits_rv.double() / column(p.temperature for p in params)).softmax(-1)
    if any(p.min_p > 0 for p in params):
        floor_r1 = probs_rv.amax(-1, keepdim=True) * column(p.min_p for p in params)
        probs_rv = probs_rv.masked_fill(probs_rv < floor_r1, 0)
    top_k = [min(p.top_k, vocab) if p.top_k > 0 else vocab for p in params]
    cut = [row for row, p in enumerate(params) if top_k[row] < vocab or p.top_p < 1]
    if cut:
        floor_r1 = probs_rv.new_zeros(len(params), 1)
        floor_r1[cut] = _floor(probs_rv[cut], [top_k[row] for row in cut], column(params[row].top_p for row in cut))
        probs_rv = probs_rv.masked_fill(probs_rv < floor_r1, 0)
    cumulative_rv = probs_rv.cumsum(-1)
    points_r1 = column(uniform(sequence.seed, sequence.output_len) for sequence in sequences)
    places_r1 = torch.searchsorted(cumulative_rv, points_r1 * cumulative_rv[:, -1:], right=True)
    return places_r1.squeeze(1).clamp_(max=vocab - 1)


def _floor(probs_rv: Tensor, top_k: list[int], top_p_r1: Tensor) -> Tensor:
    """The least probability [r, 1] that top-k, and then top-p among what is left, keep."""
    sorted_rk = probs_rv.topk(max(top_k), dim=-1).values
    last_r1 = torch.tensor(top_k, device=probs_rv.device).unsqueeze(1) - 1
    cumulative_rk = sorted_rk.cumsum(-1)
    kept_rk = cumulative_rk - sorted_rk < top_p_r1 * cumulative_rk.gather(1, last_r1)
    kept_rk &= torch.arange(sorted_rk.shape[1], device=probs_rv.device) <= last_r1
    return sorted_rk.where(kept_rk, sorted_rk[:, :1]).amin(-1, keepdim=True)


def _with_logprobs(logits_rv: Tensor, tokens_r: Tensor, sequences: list[Sequence]) -> list[Sampled]:
    tokens = tokens_r.tolist()
    wanted = [row for row, sequence in enumerate(sequences) if sequence.params.logprobs is not None]
    sampled = [Sampled(token) for token in tokens]
    if wanted:
        count = max(sequences[row].params.logprobs or 0 for row in wanted)
        found = logprobs_of(logits_rv[wanted], [tokens[row] for row in wanted], count)
        for row, top in zip(wanted, found, strict=True):
            asked = sequences[row].params.logprobs or 0
            kept = {token: entry for token, entry in top.items() if entry.rank <= asked or token == tokens[row]}
            sampled[row] = Sampled(tokens[row], top[tokens[row]].logprob, kept)
    return sampled


def logprobs_of(logits_rv: Tensor, tokens: list[int], count: int) -> list[dict[int, Logprob]]:
    """For each row, the log-probability of the given token first and of the `count` most probable ones after it."""
    logprobs_rv = logits_rv.float().log_softmax(-1)
    chosen_r1 = logprobs_rv.gather(1, torch.tensor(tokens, device=logits_rv.device).unsqueeze(1))
    ranks = ((logprobs_rv > chosen_r1).sum(-1) + 1).tolist()
    values, ids = logprobs_rv.topk(min(count, logits_rv.shape[1]), dim=-1)
    rows = []
    for token, chosen, rank, top_values, top_ids in zip(
        tokens, chosen_r1.squeeze(1).tolist(), ranks, values.tolist(), ids.tolist(), strict=True
    ):
        top = {token: Logprob(chosen, rank)}
        for place, (value, other) in enumerate(zip(top_values, top_ids, strict=True)):
            top.setdefault(other, Logprob(value, place + 1))
        rows.append(top)
    return rows
