"""From logits to tokens, each request by its own parameters. Shapes: r rows, v vocabulary, k candidates.

A token is chosen by inverting the cumulative distribution at one uniform number, which depends on nothing but the
request's seed and the token's position: the rest of the batch and preemptions cannot change it.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor

from hasten import ops
from hasten.core.types import Logprob
from hasten.engine.beam import Candidate, candidate_count
from hasten.engine.constraint import allowed_next
from hasten.engine.edits import RowEdits
from hasten.engine.history import TokenHistory
from hasten.engine.sequence import Sequence
from hasten.ops.transfer import send

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_NOT_FINITE = "the model's logits are not finite: its values overflow this data type; compute in bf16 or fp32"
_NOTHING_ALLOWED = (
    "no token may come next: what the request bans or allows (bad_words, bad_words_ids, min_tokens, "
    "allowed_token_ids, its grammar) excludes the whole vocabulary"
)


TextOf = Callable[[int], str]
"""The text of a token id."""


@dataclass(slots=True)
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
        tops: ops.TopLogprobs | None = None,
        asked: dict[int, int] | None = None,
        beams: "_Continuations | None" = None,
        restricted: frozenset[int] = frozenset(),
    ) -> None:
        self.tokens = tokens_r
        """int32 [r] on the device, below 0 where there is none (`ops.greedy`)."""
        self._asked = asked or {}
        """Row -> how many log-probabilities its request asks for; `tops` has those rows in this order."""
        self._beams = {} if beams is None else beams.counts
        """Row -> how many candidates it looks at, for rows of beams."""
        continuations = () if beams is None else (beams.values_rk, beams.ids_rk)
        self._restricted = restricted
        """Rows whose requests exclude tokens."""
        self._copy = ops.HostCopy([tokens_r, *continuations, *(() if tops is None else tops)])

    @classmethod
    def of_tokens(cls, tokens_r: Tensor) -> "Choice":
        """Tokens chosen elsewhere, int32 [r], for sequences that ask for nothing else."""
        return cls(tokens_r)

    def collect(self, text_of: TextOf | None = None) -> list[Sampled]:
        """The tokens, or an error for a sequence without any finite logit. Waits until the device has chosen."""
        tokens_r, *tops = self._copy.wait()
        tokens: list[int] = tokens_r.tolist()
        sampled = [Sampled(token) if token >= 0 else self._none(row, token) for row, token in enumerate(tokens)]
        if self._beams:
            values_rk, ids_rk, *tops = tops
            pairs = zip(self._beams.items(), ids_rk.tolist(), values_rk.tolist(), strict=True)
            for (row, count), ids, values in pairs:
                sampled[row].candidates = list(zip(ids[:count], values, strict=False))
        if self._asked:
            chosen = [tokens[row] for row in self._asked]
            rows = _entries(chosen, list(self._asked.values()), ops.TopLogprobs(*tops), text_of)
            for row, token, top in zip(self._asked, chosen, rows, strict=True):
                if token >= 0:
                    sampled[row].top, sampled[row].logprob = top, top[token].logprob
        return sampled

    def _none(self, row: int, token: int) -> Sampled:
        excluded = token == ops.NONE_LEFT and row in self._restricted
        return Sampled(token, error=_NOTHING_ALLOWED if excluded else _NOT_FINITE)


class Sampler:
    """Chooses the next tokens of a rank's batches, and keeps what the next choice needs to know of them."""

    def __init__(self, eos_token_ids: tuple[int, ...], device: torch.device) -> None:
        self._eos_token_ids = eos_token_ids
        self._history = TokenHistory(device)
        self._edits: dict[int, RowEdits] = {}
        """By the sequence's key."""
        self._none_chosen = torch.zeros(1, dtype=torch.int32, device=device)

    def release(self, key: int) -> None:
        """Forget the sequence with this key, which has ended."""
        self._history.release(key)
        self._edits.pop(key, None)

    def sample(self, logits_rv: Tensor, sequences: list[Sequence], chosen_r: Tensor | None = None) -> Choice:
        """Choose the next token of each sequence, without waiting for the device.

        `chosen_r` are the tokens that the previous step chose, at the sequences' `pending_row`; needed where any
        sequence has a pending token.
        """
        slots = self._history.slots_of(sequence for sequence in sequences if sequence.params.has_penalty)
        adjusted_rv = _keep_allowed(self._edit(logits_rv, sequences, slots, chosen_r), sequences)
        adjusted_rv = _constrain(adjusted_rv, sequences)
        single = [sequence.beams is None for sequence in sequences]
        drawn = [row for row, sequence in enumerate(sequences) if single[row] and not sequence.params.greedy]
        tokens_r = _choose(adjusted_rv, sequences, drawn)
        if slots:
            # Which token a beam goes on with is known only once all beams of its search have candidates.
            counted = [slots.get(sequence.key, -1) if single[row] else -1 for row, sequence in enumerate(sequences)]
            self._history.record(counted, tokens_r)
        asked = {
            row: sequence.params.logprobs
            for row, sequence in enumerate(sequences)
            if sequence.params.logprobs is not None
        }
        beams = self._continuations(logits_rv, sequences)
        restricted = frozenset(row for row, sequence in enumerate(sequences) if _excludes_tokens(sequence))
        tops = None
        if asked:
            own_rv, own_r = _selected(list(asked), logits_rv, tokens_r)
            tops = ops.top_logprobs(own_rv, own_r, max(asked.values()))
        return Choice(tokens_r, tops, asked, beams, restricted)

    def _edit(
        self,
        logits_rv: Tensor,
        sequences: list[Sequence],
        slots: dict[int, int],
        chosen_r: Tensor | None,
    ) -> Tensor:
        """Logits after penalties, biases and bans; the given ones are left as they are."""
        edits = ops.EditList()
        for row, sequence in enumerate(sequences):
            own = self._edits.get(sequence.key)
            if own is None:
                own = self._edits[sequence.key] = RowEdits(sequence.params, self._eos_token_ids)
            if own.any:
                edits.add(
                    row,
                    slot=slots.get(sequence.key, -1),
                    penalties=own.penalties,
                    bias_ids=own.bias_ids,
                    biases=own.biases,
                    bans=own.bans(sequence),
                    chosen=sequence.pending_row if sequence.pending else 0,
                )
        if not edits.rows:
            return logits_rv
        chosen_r = self._none_chosen if chosen_r is None else chosen_r
        return ops.edit_logits(logits_rv, edits.to(logits_rv.device), self._history.counts, chosen_r)

    def _continuations(self, logits_rv: Tensor, sequences: list[Sequence]) -> "_Continuations | None":
        """Candidates of the beams. Penalties and bans act on log-probabilities, as in transformers."""
        counts = {
            row: candidate_count(sequence.params, self._eos_token_ids)
            for row, sequence in enumerate(sequences)
            if sequence.beams is not None
        }
        if not counts:
            return None
        (own_rv,) = _selected(list(counts), logits_rv)
        beams = [sequences[row] for row in counts]
        slots = self._history.slots_of(beam for beam in beams if beam.params.has_penalty)
        adjusted_rv = self._edit(own_rv.float().log_softmax(-1), beams, slots, None)
        return _Continuations(counts, *adjusted_rv.topk(max(counts.values()), dim=-1))


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


def _selected(rows: list[int], *tensors: Tensor) -> list[Tensor]:
    """These rows of each tensor; the tensors themselves where that is all of them."""
    if len(rows) == tensors[0].shape[0]:
        return list(tensors)
    index = ops.to_device(rows, torch.int64, tensors[0].device)
    return [tensor.index_select(0, index) for tensor in tensors]


def _choose(logits_rv: Tensor, sequences: list[Sequence], drawn: list[int]) -> Tensor:
    """The next token of each row: drawn for the rows of `drawn`, the most probable one for the others."""
    if len(drawn) == len(sequences):
        return _draw(logits_rv, sequences)
    tokens_r = ops.greedy(logits_rv)
    if drawn:
        rows = ops.to_device(drawn, torch.int64, logits_rv.device)
        tokens_r.index_copy_(0, rows, _draw(logits_rv.index_select(0, rows), [sequences[row] for row in drawn]))
    return tokens_r


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


def _entries(
    tokens: list[int], counts: list[int], tops: ops.TopLogprobs, text_of: TextOf | None
) -> list[dict[int, Logprob]]:
    """For each row, its token first and then the others of its `counts` most probable ones."""
    rows = []
    columns = zip(tokens, counts, *(tensor.tolist() for tensor in tops), strict=True)
    for token, count, chosen, rank, values, ids in columns:
        top = {token: Logprob(chosen, rank, None if text_of is None or token < 0 else text_of(token))}
        for index in range(min(count, len(ids))):
            other = ids[index]
            if other != token:
                top[other] = Logprob(values[index], index + 1, None if text_of is None else text_of(other))
        rows.append(top)
    return rows


class PromptLogprobs:
    """Log-probabilities of prompts' tokens, computed piece by piece and on their way to the host."""

    def __init__(self) -> None:
        self._pieces: list[tuple[list[tuple[Sequence, int]], list[int], ops.HostCopy]] = []

    def __bool__(self) -> bool:
        return bool(self._pieces)

    def add(self, positions: list[tuple[Sequence, int]], logits_rv: Tensor) -> None:
        """Take the logits at a sequence's position in each row."""
        # Nothing of the prompt follows its last position.
        tokens = [s.token_ids[at + 1] if at + 1 < s.prompt_len else 0 for s, at in positions]
        count = max(sequence.params.prompt_logprobs or 0 for sequence, _ in positions)
        tokens_r = ops.to_device(tokens, torch.int32, logits_rv.device)
        self._pieces.append((positions, tokens, ops.HostCopy(ops.top_logprobs(logits_rv, tokens_r, count))))

    def collect(self, text_of: TextOf | None = None) -> Iterator[tuple[Sequence, int, dict[int, Logprob]]]:
        """Each position with the entries of the token that follows it; waits for the device."""
        for positions, tokens, copy in self._pieces:
            counts = [sequence.params.prompt_logprobs or 0 for sequence, _ in positions]
            rows = _entries(tokens, counts, ops.TopLogprobs(*copy.wait()), text_of)
            for (sequence, at), row in zip(positions, rows, strict=True):
                if at + 1 < sequence.prompt_len:
                    yield sequence, at, row
