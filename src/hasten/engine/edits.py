"""What a request's parameters change about the logits of its next token: penalties, biases, bans and masks."""

from collections import defaultdict
from collections.abc import Iterable

import numpy as np

from hasten.core.types import SamplingParams
from hasten.engine.sequence import Sequence
from hasten.ops import Bans, EditList
from hasten.ops.plan import Integers

_ALWAYS = -1
"""In place of the token that a ban depends on."""


class RowEdits:
    """The edits of one sequence, prepared once: a step only looks up what depends on its tokens so far."""

    def __init__(self, params: SamplingParams, eos_token_ids: tuple[int, ...]) -> None:
        self.penalties = (params.repetition_penalty, params.presence_penalty, params.frequency_penalty)
        self.bias_ids: Integers = np.fromiter(params.logit_bias, np.int32, len(params.logit_bias))
        self.biases = np.fromiter(params.logit_bias.values(), np.float32, len(params.logit_bias))
        self.any = params.has_penalty or bool(params.logit_bias or params.bad_words_ids or params.min_tokens)
        self._min_tokens = params.min_tokens
        self.allowed = _mask_of(params.allowed_token_ids) if params.allowed_token_ids else None
        """Mask of the only tokens that may come next, as `ops.mask_logits` reads it; words behind it are 0."""
        self._stops = _bans((token, _ALWAYS) for token in (*eos_token_ids, *params.stop_token_ids))
        self._runs = _BannedRuns(params.bad_words_ids) if params.bad_words_ids else None
        self._joined: tuple[Bans, Bans] | None = None
        """Bans of runs, and the same with those of `_stops`."""
        self.is_constant = self._min_tokens == 0 and self._runs is None
        """Whether they are the same at every step."""

    def add_to(self, edits: EditList, row: int, slot: int, bans: Bans, chosen: int) -> None:
        """Edit a row: `EditList.add` says what the numbers are."""
        edits.add(
            row,
            slot=slot,
            penalties=self.penalties,
            bias_ids=self.bias_ids,
            biases=self.biases,
            bans=bans,
            chosen=chosen,
        )

    def bans(self, sequence: Sequence) -> Bans:
        """The tokens that must not come next. As long as no run has begun, it is the same object each time."""
        bans = _NONE if self._runs is None else self._runs.next(sequence)
        if self._min_tokens == 0 or sequence.output_len >= self._min_tokens:
            return bans
        if bans is _NONE:
            return self._stops
        if self._joined is None or self._joined[0] is not bans:
            self._joined = bans, _together(self._stops, bans)
        return self._joined[1]


class _BannedRuns:
    """Runs of tokens that must not be produced, by the token that has to come before their last one."""

    def __init__(self, given: Iterable[Iterable[int]]) -> None:
        runs = [tuple(run) for run in given]
        single = [(run[-1], _ALWAYS) for run in runs if len(run) == 1]
        self._single = _bans(single)
        self._single_and_pairs = _bans([*single, *((run[1], run[0]) for run in runs if len(run) == 2)])
        self._by_last: dict[int, list[tuple[int, ...]]] = defaultdict(list)
        self._by_last_but_one: dict[int, list[tuple[int, ...]]] = defaultdict(list)
        for run in runs:
            if len(run) > 1:
                self._by_last[run[-2]].append(run)
            if len(run) > 2:
                self._by_last_but_one[run[-3]].append(run)

    def next(self, sequence: Sequence) -> Bans:
        """The last tokens of runs whose other tokens end the output.

        Of a sequence with a pending token only the device knows the last one: its bans depend on that.
        """
        pending = sequence.pending > 0
        bans = self._single_and_pairs if pending else self._single
        known = len(sequence.token_ids) - sequence.prompt_len
        if known == 0:
            return bans
        runs = (self._by_last_but_one if pending else self._by_last).get(sequence.token_ids[-1], ())
        found = []
        for run in runs:
            before = run[: -2 if pending else -1]
            if len(before) <= known and tuple(sequence.token_ids[-len(before) :]) == before:
                found.append((run[-1], run[-2] if pending else _ALWAYS))
        if not found:
            return bans
        return _together(bans, _bans(found))


def _mask_of(tokens: Iterable[int]) -> Integers:
    """int32 words with a bit for each token: bit i of word w stands for token 32 * w + i."""
    ids = np.array(tuple(tokens), dtype=np.int64)
    mask = np.zeros(int(ids.max()) // 32 + 1, dtype=np.uint32)
    np.bitwise_or.at(mask, ids // 32, np.uint32(1) << (ids % 32).astype(np.uint32))
    return mask.view(np.int32)


def _bans(pairs: Iterable[tuple[int, int]]) -> Bans:
    array = np.array(list(pairs), dtype=np.int32).reshape(-1, 2)
    return Bans(np.ascontiguousarray(array[:, 0]), np.ascontiguousarray(array[:, 1]))


def _together(first: Bans, second: Bans) -> Bans:
    return Bans(np.concatenate((first.ids, second.ids)), np.concatenate((first.after, second.after)))


_NONE = _bans(())
