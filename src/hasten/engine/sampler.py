"""From logits to tokens, each request by its own parameters. Shapes: r rows, v vocabulary, k candidates.

A token is chosen by inverting the cumulative distribution at one uniform number (`points.py`), which depends on nothing
but the request's seed and the token's position: the rest of the batch and preemptions cannot change it.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from hasten import ops
from hasten.engine.batch import PromptRun
from hasten.engine.beam import BeamStep
from hasten.engine.beam_choice import BeamLayout, BeamRecords, beam_steps
from hasten.engine.edits import RowEdits
from hasten.engine.history import CountedRows, TokenHistory
from hasten.engine.recorded_choice import ChoiceStep, Chosen, Masks, as_rows
from hasten.engine.sampled_batch import SampledBatch
from hasten.engine.sequence import Sequence

_CPU = torch.device("cpu")
_NOT_FINITE = "the model's logits are not finite: its values overflow this data type; compute in bf16 or fp32"
_NOTHING_ALLOWED = (
    "no token may come next: what the request bans or allows (bad_words, bad_words_ids, min_tokens, "
    "allowed_token_ids, its grammar) excludes the whole vocabulary"
)


@dataclass(slots=True)
class Sampled:
    """The next token of one sequence."""

    token_id: int
    top: bytes | None = None
    """The chosen token and the most probable ones, if the request wants log-probabilities: a
    `LogprobRow.packed`."""
    error: str | None = None
    """Why there is no token."""
    beams: BeamStep | None = None
    """How a search goes on, with the first of its beams."""


class Choice:
    """The next token of each sequence, chosen on the device and on its way to the host."""

    def __init__(
        self,
        chosen: Chosen,
        logprobs: dict[int, int] | None = None,
        layout: BeamLayout | None = None,
        sequences: list[Sequence] | None = None,
    ) -> None:
        """`logprobs`: row -> how many log-probabilities its request asks for."""
        self._chosen, self._layout = chosen, layout
        self._logprobs = logprobs or {}
        self._sequences = sequences or []
        """Those of the rows, where a request may have excluded tokens."""
        self._copy = chosen.copy()
        # on a CPU the tokens are there, in memory that the next choice may overwrite
        self._sampled = None if self._copy.is_under_way else self._collected()

    @property
    def chosen(self) -> Tensor:
        """int32 on the device: a row of tokens, below 0 where there is none (`ops.greedy`).

        With beams as in `ops.BeamChoice`.
        """
        chosen = self._chosen
        return chosen.tokens_r.unsqueeze(0) if chosen.beams is None else chosen.beams.chosen_2b

    def collect(self) -> list[Sampled]:
        """The tokens, or an error for a sequence without any finite logit. Waits until the device has chosen."""
        return self._collected() if self._sampled is None else self._sampled

    def _collected(self) -> list[Sampled]:
        tokens_r, *others = self._copy.arrays()
        tokens: list[int] = tokens_r.tolist()
        sampled = list(map(Sampled, tokens, self._tops(len(tokens)))) if self._logprobs else list(map(Sampled, tokens))
        if min(tokens, default=0) < 0:
            sampled = [
                each if each.token_id >= 0 else self._none(row, each.token_id) for row, each in enumerate(sampled)
            ]
        if self._layout is not None and self._chosen.beams is not None:
            arrays = others[: len(self._chosen.beams)]
            for row, step in beam_steps(self._layout.by_row, arrays).items():
                sampled[row].beams = step
                if step.best.logprobs[0] == -math.inf and sampled[row].error is None:
                    sampled[row] = self._none(row, ops.NONE_LEFT)
        return sampled

    def _tops(self, rows: int) -> list[bytes | None]:
        """What each row has of log-probabilities."""
        found = _cut(self._chosen.packed_rows(), list(self._logprobs.values()))
        if len(found) == rows:
            return [*found]
        tops: list[bytes | None] = [None] * rows
        for row, top in zip(self._logprobs, found, strict=True):
            tops[row] = top
        return tops

    def seconds_after(self, earlier: "Choice") -> float | None:
        """Seconds on the device between the ends of an earlier choice and this one, both collected; None on a CPU."""
        return self._copy.seconds_after(earlier._copy)

    def _none(self, row: int, token: int) -> Sampled:
        excluded = token == ops.NONE_LEFT and any(map(_excludes_tokens, self._sequences[row : row + 1]))
        return Sampled(token, error=_NOTHING_ALLOWED if excluded else _NOT_FINITE)


class Sampler:
    """Chooses the next tokens of a rank's batches, and keeps what the next choice needs to know of them."""

    def __init__(self, eos_token_ids: tuple[int, ...], device: torch.device) -> None:
        self._eos_token_ids = eos_token_ids
        self._history = TokenHistory(device)
        self._records = BeamRecords(eos_token_ids, device)
        self._edits: dict[int, RowEdits] = {}
        """By the sequence's key."""
        self._batch: SampledBatch | None = None
        """Of the last step."""
        self._none_chosen = torch.zeros(1, dtype=torch.int32, device=device)

    def release(self, key: int) -> None:
        """Forget the sequence with this key, which has ended."""
        self._history.release(key)
        self._records.release(key)
        self._edits.pop(key, None)

    def prepare(self, logits_rv: Tensor, sequences: list[Sequence], chosen_r: Tensor | None = None) -> "PreparedChoice":
        """Begin to choose the next token of each sequence, without waiting for the device.

        `chosen_r` are the tokens that the previous step chose, at the sequences' `pending_row`; needed where any
        sequence has a pending token. The logits are this choice's: they may be changed.
        """
        batch = self._batch
        if batch is None or batch.sequences != sequences:
            edits = [self._own(sequence) for sequence in sequences]
            batch = self._batch = SampledBatch(sequences, edits, logits_rv.device)
        chosen_r = self._none_chosen if chosen_r is None else chosen_r
        is_next = batch.note_step()
        prepared = self._again(batch, logits_rv, chosen_r) if is_next and batch.prepared is not None else None
        if prepared is None:
            prepared = PreparedChoice(self._laid_out(batch, logits_rv, chosen_r, is_next=is_next), batch)
            batch.prepared = prepared if batch.is_constant else None
        if batch.has_penalties:
            self._history.record()
        return prepared

    def _again(self, batch: SampledBatch, logits_rv: Tensor, chosen_r: Tensor) -> "PreparedChoice | None":
        """The last choice with the numbers of the next one, where those are all that changes."""
        last = batch.prepared
        assert last is not None
        if last.step.logits_rv is not logits_rv or last.step.chosen_r is not chosen_r:
            return None
        if last.step.counted is not None:
            self._history.follow_up(last.step.counted, is_next=True)
        if last.step.counts is not self._history.counts:
            return None
        batch.draws(_CPU, is_next=True)
        return last

    def _laid_out(self, batch: SampledBatch, logits_rv: Tensor, chosen_r: Tensor, *, is_next: bool) -> ChoiceStep:
        device, successors = logits_rv.device, batch.successors
        layout = self._records.layout(batch.sequences, successors, device) if batch.beams else None
        counted = self._counted(batch, successors, layout, is_next=is_next)
        history = self._history
        edits, beam_edits = (
            rows.edits(history.slots, device) if rows else None for rows in (batch.edited, batch.edited_beams)
        )
        return ChoiceStep(
            logits_rv=logits_rv,
            chosen_r=chosen_r,
            draws=batch.draws(device, is_next=is_next),
            edits=edits,
            beam_edits=beam_edits,
            beam_masks=batch.masked_beams.masks(logits_rv),
            counts=history.counts,
            counted=counted,
            layout=layout,
            states=self._records.states,
        )

    def _own(self, sequence: Sequence) -> RowEdits:
        own = self._edits.get(sequence.key)
        if own is None:
            own = self._edits[sequence.key] = RowEdits(sequence.params, self._eos_token_ids)
        return own

    def _counted(
        self, batch: SampledBatch, successors: list[Sequence], layout: BeamLayout | None, *, is_next: bool
    ) -> CountedRows | None:
        """Whose tokens are counted, of all that get one, with all their tokens counted; None without penalties."""
        if not batch.has_penalties:
            return None
        counted = batch.counted
        if counted is None or successors is not batch.sequences:
            counted = self._history.rows_of(successors)
            if layout is not None:
                device = self._history.counts.ids_sw.device
                counted.followed = ops.FollowedCounts.of(counted.all_slots, layout.families, device)
        if successors is batch.sequences:
            batch.counted = counted
        self._history.follow_up(counted, is_next=is_next)
        return counted


class PreparedChoice:
    """The choice of a batch's next tokens, up to what depends on tokens that only the device knows yet: grammars.

    All else about the sequences is as it was when the choice was prepared.
    """

    def __init__(self, step: ChoiceStep, batch: SampledBatch) -> None:
        self.step, self._batch = step, batch
        self._begun = None if batch.can_record else self._begin()

    def choose(self) -> Choice:
        """Choose the tokens. The sequences' grammars must have accepted all tokens before."""
        step, batch = self.step, self._batch
        masks = batch.masked.masks(step.logits_rv)
        if self._begun is not None:
            chosen = self._chosen(*self._begun, masks)
        else:
            chosen = batch.recorded.choose(step, masks, lambda: self._chosen(*self._begin(), masks))
        return Choice(chosen, batch.logprobs, step.layout, batch.sequences)

    def _begin(self) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
        """The edited logits, and of beams the most probable tokens and their log-probabilities."""
        step, batch = self.step, self._batch
        logits_rv = edited_rv = step.logits_rv
        if step.edits is not None:
            is_free = not batch.logprobs and logits_rv.dtype == torch.float32 and logits_rv.is_contiguous()
            edited_rv = ops.edit_logits(logits_rv, step.edits, step.counts, step.chosen_r, in_place=is_free)
        if batch.has_forced:
            edited_rv = _forced(edited_rv, batch.single)
        return edited_rv, None if step.layout is None else self._candidates(step.layout)

    def _candidates(self, layout: BeamLayout) -> tuple[Tensor, Tensor]:
        """What may follow each beam. All that changes logits acts on log-probabilities, as in transformers."""
        step, batch, count = self.step, self._batch, layout.searches.max_keep
        (own_rv,) = _selected(batch.beam_rows, step.logits_rv)
        forced = batch.has_forced and any(beam.forced_next for beam in batch.beams.values())
        if not forced and step.beam_masks is None and step.beam_edits is None:
            _, _, values_rk, ids_rk = ops.top_logprobs(own_rv, layout.no_tokens[: len(own_rv)], count)
            return values_rk.contiguous(), ids_rk.contiguous()
        edited_rv = ops.log_softmax(own_rv)
        if step.beam_edits is not None:
            edited_rv = ops.edit_logits(edited_rv, step.beam_edits, step.counts, step.chosen_r, in_place=True)
        edited_rv = _forced(edited_rv, batch.beams) if forced else edited_rv
        if step.beam_masks is not None:
            edited_rv = ops.mask_logits(edited_rv, *step.beam_masks)
        values_rk, ids_rk = ops.largest(edited_rv, count)
        if forced:
            # behind what is forced come tokens that no beam may go on with, and that must not end one either
            ids_rk = ids_rk.where(values_rk > float("-inf"), ids_rk[:, :1])
        return values_rk.contiguous(), ids_rk.contiguous()

    def _chosen(self, edited_rv: Tensor, candidates: tuple[Tensor, Tensor] | None, masks: Masks | None) -> Chosen:
        step, batch = self.step, self._batch
        tokens_r = self._tokens(edited_rv if masks is None else ops.mask_logits(edited_rv, *masks))
        beams, logprobs_rw = None, None
        if step.layout is not None and candidates is not None:
            beams = step.layout.choose(step.states, *candidates, tokens_r, edited_rv.shape[1])
        if step.counted is not None:
            tokens_b = tokens_r
            if beams is not None:
                tokens_b, parents_b = beams.chosen_2b
                if step.counted.followed is not None:
                    ops.follow_counts(step.counts, step.counted.followed, parents_b)
            ops.count_tokens(step.counts, step.counted.slots_b, tokens_b)
        if batch.logprobs:
            own_rv, own_r = _selected(list(batch.logprobs), step.logits_rv, tokens_r)
            logprobs_rw = ops.packed_logprobs(own_rv, own_r, max(batch.logprobs.values()))
        return Chosen(tokens_r, logprobs_rw, beams)

    def _tokens(self, logits_rv: Tensor) -> Tensor:
        """The next token of each row, drawn or the most probable one."""
        if self.step.draws is None:
            return ops.greedy(logits_rv)
        drawn = self._batch.drawn
        if len(drawn) == logits_rv.shape[0]:
            return ops.draw(logits_rv, self.step.draws)
        tokens_r = ops.greedy(logits_rv)
        rows = ops.to_device(drawn, torch.int64, logits_rv.device)
        return tokens_r.index_copy_(0, rows, ops.draw(logits_rv.index_select(0, rows), self.step.draws))


def _forced(logits_rv: Tensor, sequences: dict[int, Sequence]) -> Tensor:
    """Logits with 0 for the tokens that are forced in a row, and minus infinity for its others, as in transformers."""
    forced = [(row, token) for row, sequence in sequences.items() for token in sequence.forced_next]
    if not forced:
        return logits_rv
    rows, tokens = ops.to_device(list(zip(*forced, strict=True)), torch.int64, logits_rv.device)
    logits_rv = logits_rv.index_fill(0, rows, float("-inf"))
    logits_rv[rows, tokens] = 0
    return logits_rv


def _excludes_tokens(sequence: Sequence) -> bool:
    params = sequence.params
    return bool(params.bad_words_ids or params.allowed_token_ids or params.min_tokens or params.is_constrained)


def _selected(rows: list[int], *tensors: Tensor) -> list[Tensor]:
    """These rows of each tensor; the tensors themselves where that is all of them."""
    if len(rows) == tensors[0].shape[0]:
        return list(tensors)
    index = ops.to_device(rows, torch.int64, tensors[0].device)
    return [tensor.index_select(0, index) for tensor in tensors]


def draw_every_way(logits_rv: Tensor) -> None:
    """Choose a token of each row with and without filters, for what is compiled by it."""
    rows = len(logits_rv)
    even, none = [1.0] * rows, [0] * rows
    for top_p in (1.0, 0.9):
        draws = ops.Draws.of(
            temperature=even, top_k=none, top_p=[top_p] * rows, min_p=none, point=none, device=logits_rv.device
        )
        ops.draw(logits_rv, draws)


def _cut(rows: list[bytes], counts: list[int]) -> list[bytes]:
    """Rows of `ops.packed_logprobs`, each with no more than its `counts` most probable tokens."""
    most = (len(rows[0]) // 4 - 3) // 2
    if min(counts) >= most:
        return rows
    ids = 4 * (3 + most)
    sizes = [4 * min(count, most) for count in counts]
    return [row[: 12 + size] + row[ids : ids + size] for row, size in zip(rows, sizes, strict=True)]


class PromptLogprobs:
    """Log-probabilities of prompts' tokens, computed piece by piece and on their way to the host."""

    def __init__(self, runs: list[PromptRun]) -> None:
        self._runs = runs
        self._counts = [sequence.params.prompt_logprobs or 0 for sequence, _, rows in runs for _ in rows]
        self._tokens: list[int] = []
        """What follows each position; whatever, where that is the prompt's last."""
        for sequence, first, rows in runs:
            own = sequence.token_ids[first + 1 : min(first + 1 + len(rows), sequence.prompt_len)]
            self._tokens += own + [0] * (len(rows) - len(own))
        self._pieces: list[tuple[slice, ops.HostCopy]] = []

    def __bool__(self) -> bool:
        return bool(self._pieces)

    def add(self, piece: slice, logits_rv: Tensor) -> None:
        """Take the logits of a piece of the runs' rows."""
        tokens_r = ops.to_device(self._tokens[piece], torch.int32, logits_rv.device)
        copy = ops.HostCopy([ops.packed_logprobs(logits_rv, tokens_r, max(self._counts[piece]))])
        self._pieces.append((piece, copy))

    def collect(self) -> Iterator[tuple[Sequence, int, list[bytes]]]:
        """For each run its first position, and log-probabilities of the tokens behind its own; waits for the device.

        They are packed (`LogprobRow.packed`).
        """
        found: list[bytes] = []
        for piece, copy in self._pieces:
            found += _cut(as_rows(copy.arrays()[0]).tolist(), self._counts[piece])
        begin = 0
        for sequence, first, rows in self._runs:
            yield sequence, first, found[begin : begin + min(len(rows), sequence.prompt_len - 1 - first)]
            begin += len(rows)
