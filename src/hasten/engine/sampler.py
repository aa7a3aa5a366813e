"""From logits to tokens, each request by its own parameters. Shapes: r rows, v vocabulary, k candidates.

A token is chosen by inverting the cumulative distribution at one uniform number, which depends on nothing but the
request's seed and the token's position: the rest of the batch and preemptions cannot change it.
"""

from dataclasses import dataclass
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor

from hasten import ops
from hasten.core.types import Logprob
from hasten.engine.beam import Candidate, candidate_count
from hasten.engine.constraint import allowed_next
from hasten.engine.sequence import Sequence
from hasten.ops.transfer import send

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_NOT_FINITE = "the model's logits are not finite: its values overflow this data type; compute in bf16 or fp32"
_NOTHING_ALLOWED = (
    "no token may come next: what the request bans or allows (bad_words, bad_words_ids, min_tokens, "
    "allowed_token_ids, its grammar) excludes the whole vocabulary"
)


@dataclass(frozen=True)
class Sampled:
    """The next token of one sequence."""

    token_id: int
    logprob: float | None = None
    top: dict[int, Logprob] | None = None
    """The chosen token and the most probable ones, if the request asked for log-probabilities."""
    error: str | None = None
    """Why there is no token."""
    candidates: list[Candidate] | None = None
    """For a beam, the tokens that may come next, the most probable first."""


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) for a seed and a position."""
    return (mix64(seed + position * _GOLDEN) >> 11) * 2.0**-53


def mix64(value: int) -> int:
    """64 bits, each of which depends on all bits of `value`. Source: Steele, Lea, Flood, SplitMix64, 2014."""
    state = (value + _GOLDEN) & _MASK
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
    return state ^ (state >> 31)


class Choice:
    """The next token of each sequence, chosen on the device and on its way to the host."""

    def __init__(
        self,
        tokens_r: Tensor,
        tops: "_Tops | None" = None,
        asked: dict[int, int] | None = None,
        beams: "_Continuations | None" = None,
        restricted: "_Restricted | None" = None,
    ) -> None:
        self.tokens = tokens_r
        """int32 [r] on the device, -1 where no logit is finite."""
        self._asked = asked or {}
        """Row -> how many log-probabilities its request asks for; `tops` has those rows in this order."""
        self._beams = {} if beams is None else beams.counts
        """Row -> how many candidates it looks at, for rows of beams."""
        continuations = () if beams is None else (beams.values_rk, beams.ids_rk)
        self._restricted = () if restricted is None else restricted.rows
        finite = () if restricted is None else (restricted.finite_r,)
        self._copy = ops.HostCopy([tokens_r, *finite, *continuations, *(() if tops is None else tops)])

    @classmethod
    def of_tokens(cls, tokens_r: Tensor) -> "Choice":
        """Tokens chosen elsewhere, int32 [r], for sequences that ask for nothing else."""
        return cls(tokens_r)

    def collect(self) -> list[Sampled]:
        """The tokens, or an error for a sequence without any finite logit. Waits until the device has chosen."""
        tokens_r, *tops = self._copy.wait()
        tokens: list[int] = tokens_r.tolist()
        errors: dict[int, str] = {}
        if self._restricted:
            finite_r, *tops = tops
            flags = zip(self._restricted, finite_r.tolist(), strict=True)
            errors = {row: _NOTHING_ALLOWED for row, finite in flags if finite}
        candidates: dict[int, list[Candidate]] = {}
        if self._beams:
            values_rk, ids_rk, *tops = tops
            pairs = zip(self._beams.items(), ids_rk.tolist(), values_rk.tolist(), strict=True)
            candidates = {row: list(zip(ids[:count], values, strict=False)) for (row, count), ids, values in pairs}
        found: dict[int, dict[int, Logprob]] = {}
        if self._asked:
            rows = _entries([tokens[row] for row in self._asked], _Tops(*tops))
            found = dict(zip(self._asked, rows, strict=True))
        return [
            self._sampled(row, token, found.get(row), candidates.get(row))
            if token >= 0
            else Sampled(token, error=errors.get(row, _NOT_FINITE))
            for row, token in enumerate(tokens)
        ]

    def _sampled(
        self, row: int, token: int, top: dict[int, Logprob] | None, candidates: list[Candidate] | None
    ) -> Sampled:
        if top is None:
            return Sampled(token, candidates=candidates)
        kept = {other: entry for other, entry in top.items() if entry.rank <= self._asked[row] or other == token}
        return Sampled(token, top[token].logprob, kept)


def sample(logits_rv: Tensor, sequences: list[Sequence], eos_token_ids: tuple[int, ...]) -> Choice:
    """Choose the next token of each sequence, without waiting for the device but for penalties."""
    adjusted_rv = _adjust(logits_rv, sequences, eos_token_ids)
    adjusted_rv = _constrain(_keep_allowed(adjusted_rv, sequences), sequences)
    drawn = [row for row, sequence in enumerate(sequences) if sequence.beams is None and not sequence.params.greedy]
    tokens_r = _draw(adjusted_rv, sequences) if len(drawn) == len(sequences) else ops.greedy(adjusted_rv)
    if 0 < len(drawn) < len(sequences):
        rows = ops.to_device(drawn, torch.int64, logits_rv.device)
        drawn_r = _draw(adjusted_rv.index_select(0, rows), [sequences[row] for row in drawn])
        tokens_r.index_copy_(0, rows, drawn_r)
    asked = {
        row: sequence.params.logprobs for row, sequence in enumerate(sequences) if sequence.params.logprobs is not None
    }
    beams = _continuations(logits_rv, sequences, eos_token_ids)
    restricted = _restricted(logits_rv, sequences)
    if not asked:
        return Choice(tokens_r, beams=beams, restricted=restricted)
    rows = ops.to_device(list(asked), torch.int64, logits_rv.device)
    tops = _tops(logits_rv.index_select(0, rows), tokens_r.index_select(0, rows), max(asked.values()))
    return Choice(tokens_r, tops, asked, beams, restricted)


class _Restricted(NamedTuple):
    """Rows whose requests exclude tokens, and whether the model's own logits of each are finite."""

    rows: list[int]
    finite_r: Tensor


def _restricted(logits_rv: Tensor, sequences: list[Sequence]) -> _Restricted | None:
    rows = [row for row, sequence in enumerate(sequences) if _excludes_tokens(sequence)]
    if not rows:
        return None
    own_rv = logits_rv.index_select(0, ops.to_device(rows, torch.int64, logits_rv.device))
    return _Restricted(rows, own_rv.amax(-1).isfinite())


def _excludes_tokens(sequence: Sequence) -> bool:
    params = sequence.params
    excludes = params.bad_words_ids or params.allowed_token_ids or sequence.output_len < params.min_tokens
    return bool(excludes) or sequence.constraint is not None


class _Continuations(NamedTuple):
    """The most probable tokens after each beam of a batch."""

    counts: dict[int, int]
    """Row -> how many of its entries count."""
    values_rk: Tensor
    ids_rk: Tensor


def _continuations(
    logits_rv: Tensor, sequences: list[Sequence], eos_token_ids: tuple[int, ...]
) -> _Continuations | None:
    """Candidates of the beams among the sequences. Penalties and bans act on log-probabilities, as in transformers."""
    counts = {
        row: candidate_count(sequence.params, eos_token_ids)
        for row, sequence in enumerate(sequences)
        if sequence.beams is not None
    }
    if not counts:
        return None
    rows = ops.to_device(list(counts), torch.int64, logits_rv.device)
    logprobs_rv = logits_rv.index_select(0, rows).float().log_softmax(-1)
    adjusted_rv = _adjust(logprobs_rv, [sequences[row] for row in counts], eos_token_ids)
    return _Continuations(counts, *adjusted_rv.topk(max(counts.values()), dim=-1))


def _adjust(logits_rv: Tensor, sequences: list[Sequence], eos_token_ids: tuple[int, ...]) -> Tensor:
    """Logits after penalties and banned tokens; the given ones are left as they are."""
    adjusted_rv = logits_rv
    for row, sequence in enumerate(sequences):
        params = sequence.params
        banned = _banned(sequence, eos_token_ids)
        if not banned and not params.has_penalty and not params.logit_bias:
            continue
        if adjusted_rv is logits_rv:
            adjusted_rv = logits_rv.to(torch.float32, copy=True)
        if params.has_penalty:
            _penalize(adjusted_rv[row], sequence)
        if params.logit_bias:
            biased = ops.to_device(list(params.logit_bias), torch.int64, logits_rv.device)
            biases = ops.to_device(list(params.logit_bias.values()), torch.float32, logits_rv.device)
            adjusted_rv[row].index_add_(0, biased, biases)
        if banned:
            adjusted_rv[row].index_fill_(0, ops.to_device(banned, torch.int64, logits_rv.device), float("-inf"))
    return adjusted_rv


def _keep_allowed(logits_rv: Tensor, sequences: list[Sequence]) -> Tensor:
    """Logits with -inf for tokens outside a request's `allowed_token_ids`; the given ones are left as they are."""
    allowed = {row: sequence.params.allowed_token_ids for row, sequence in enumerate(sequences)}
    allowed = {row: ids for row, ids in allowed.items() if ids}
    if not allowed:
        return logits_rv
    device = logits_rv.device
    rows = ops.to_device(list(allowed), torch.int64, device)
    owners = ops.to_device([k for k, ids in enumerate(allowed.values()) for _ in ids], torch.int64, device)
    tokens = ops.to_device(list(chain.from_iterable(allowed.values())), torch.int64, device)
    chosen_kv = logits_rv.index_select(0, rows)
    kept_kv = torch.full_like(chosen_kv, float("-inf"))
    kept_kv[owners, tokens] = chosen_kv[owners, tokens]
    return logits_rv.index_copy(0, rows, kept_kv)


def _constrain(logits_rv: Tensor, sequences: list[Sequence]) -> Tensor:
    """Logits with -inf where a sequence's grammar does not allow a token; the given ones are left as they are."""
    constraints = {
        row: sequence.constraint for row, sequence in enumerate(sequences) if sequence.constraint is not None
    }
    if not constraints:
        return logits_rv
    device = logits_rv.device
    words_kw = send({"words": allowed_next(list(constraints.values()))}, device)["words"]
    bits_kv = (words_kw.unsqueeze(-1) >> torch.arange(32, device=device)).bitwise_and_(1).flatten(1)
    rows = ops.to_device(list(constraints), torch.int64, device)
    chosen_kv = logits_rv.index_select(0, rows)
    chosen_kv.masked_fill_(bits_kv[:, : logits_rv.shape[1]] == 0, float("-inf"))
    return logits_rv.index_copy(0, rows, chosen_kv)


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
    """Tokens [r] drawn by each sequence's parameters."""
    params = [sequence.params for sequence in sequences]
    draws = ops.Draws.of(
        temperature=[p.temperature for p in params],
        top_k=[max(p.top_k, 0) for p in params],
        top_p=[p.top_p for p in params],
        min_p=[p.min_p for p in params],
        point=[uniform(sequence.seed, sequence.output_len) for sequence in sequences],
        device=logits_rv.device,
    )
    return ops.draw(logits_rv, draws)


class _Tops(NamedTuple):
    """Log-probabilities of one token a row, and of the most probable ones."""

    chosen_r: Tensor
    ranks_r: Tensor
    values_rk: Tensor
    ids_rk: Tensor


def _tops(logits_rv: Tensor, tokens_r: Tensor, count: int) -> _Tops:
    """Log-probabilities of the given tokens, any where there is none, and of the `count` most probable ones."""
    logprobs_rv = logits_rv.float().log_softmax(-1)
    chosen_r1 = logprobs_rv.gather(1, tokens_r.long().clamp(min=0).unsqueeze(1))
    ranks_r = (logprobs_rv > chosen_r1).sum(-1) + 1
    values_rk, ids_rk = logprobs_rv.topk(min(count, logits_rv.shape[1]), dim=-1)
    return _Tops(chosen_r1.squeeze(1), ranks_r, values_rk, ids_rk)


def _entries(tokens: list[int], tops: _Tops) -> list[dict[int, Logprob]]:
    rows = []
    for token, chosen, rank, values, ids in zip(tokens, *(tensor.tolist() for tensor in tops), strict=True):
        top = {token: Logprob(chosen, rank)}
        for place, (value, other) in enumerate(zip(values, ids, strict=True)):
            top.setdefault(other, Logprob(value, place + 1))
        rows.append(top)
    return rows


def logprobs_of(logits_rv: Tensor, tokens: list[int], count: int) -> list[dict[int, Logprob]]:
    """For each row, the log-probability of the given token first and of the `count` most probable ones after it."""
    tokens_r = ops.to_device(tokens, torch.int64, logits_rv.device)
    return _entries(tokens, _tops(logits_rv, tokens_r, count))
