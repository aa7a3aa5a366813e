"""How many prompt tokens may join a step of decodes: as many as its predicted time allows. Never imports torch.

Rank 0 alone predicts and measures. The other ranks get the number with the message that begins the step.
"""

import math
import time
from bisect import bisect_left
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from itertools import islice

from hasten.engine.batch import Batch
from hasten.engine.scheduler import Scheduler
from hasten.engine.sequence import Sequence

_SMALLEST = 32
"""Prompt tokens up to which a step with prompts is assumed to take the same time."""
_TILE = 64
"""Prompt tokens for which attention reads the keys before them once."""
_RATE = 0.2
"""Part of a step's error that the model corrects at once."""
_MAX_ERROR = math.log(2)
"""Log of the largest ratio of measured to predicted time that counts: a stalled step moves the model no further."""
_FIRST_STEPS = 8
"""Steps that count in full and with more weight, since the first one of all may have been a slow one."""
_ALL_MEASURED, _MEASURED_ONE_IN = 64, 8
"""Steps without prompts are all measured at first, then one in eight: their time changes slowly, and to learn from each
would take 3% of those that take 0.4 ms."""
_MIN_RATIO = 2.0
"""Steps may take this many times what their decodes and the first prompt tokens take, whatever the target: prompts get
at least half of each step, and its fixed cost is spread over many tokens."""
_LATE_TARGETS, _LATE_PROMPTS = 2, 3
"""A prompt is late after this many targets and this many times its own computation, which the target may cost it."""
_MOST_LOOKED_AT = 512
"""Prompts looked at to find late ones: more wait only where no server limits them."""


@dataclass(frozen=True, slots=True)
class StepWork:
    """What the time of a step depends on."""

    rows: int
    """Sequences that compute a single token."""
    keys: int
    """Keys that attention reads, per layer: the context of each of `rows`, and of each tile of prompt tokens."""
    prompt_tokens: int
    """Tokens of all other sequences, and of encoders' inputs."""

    @classmethod
    def of(cls, batch: Batch) -> "StepWork":
        """The work of a batch that is not launched yet, so that its sequences have not advanced."""
        rows = keys = tokens = 0
        for sequence, count in zip(batch.sequences, batch.counts, strict=True):
            if count == 1:
                rows += 1
                keys += sequence.num_computed + 1
            else:
                tokens += count
                keys += (sequence.num_computed + count // 2) * count // _TILE
        for given in batch.inputs:
            count = len(given.token_ids)
            tokens += count
            keys += count * count // _TILE
        return cls(rows, keys, tokens)


class StepTimes:
    """A model of step times in seconds, learned from the steps themselves.

        time = fixed + per_row * rows + per_key * keys + extra(prompt tokens)

    `extra` is piecewise linear over powers of two; it has the cost of launching kernels one by one as well, so it need
    not begin at 0. Errors are corrected in proportion to what each term contributes to the prediction. No term needs a
    unit or a starting value for a device: the first step sets the scale.
    """

    def __init__(self, max_tokens: int) -> None:
        count = max(1, math.ceil(math.log2(max(1, max_tokens) / _SMALLEST)) + 1)
        self._sizes = [_SMALLEST << index for index in range(count)]
        self._extra = [0.0] * count
        self._fixed = self._per_row = self._per_key = 0.0
        self.observed = 0
        """Steps that have been measured."""

    def predict(self, work: StepWork) -> float:
        """Seconds of a step."""
        return self._fixed + self._per_row * work.rows + self._per_key * work.keys + self.extra(work.prompt_tokens)

    def extra(self, prompt_tokens: int) -> float:
        """Seconds by which this number of prompt tokens lengthens a step."""
        return sum(self._extra[index] * weight for index, weight in self._nodes(prompt_tokens))

    @property
    def seconds_per_prompt_token(self) -> float:
        """Of prompts in large steps."""
        return self._extra[-1] / self._sizes[-1]

    def max_prompt_tokens(self, work: StepWork, context: int, seconds: float) -> int:
        """Most prompt tokens behind `context` others that can join a step of decodes without exceeding `seconds`."""
        low, high = 0, self._sizes[-1]
        while low < high:
            tokens = (low + high + 1) // 2
            joined = StepWork(work.rows, work.keys + context * tokens // _TILE, tokens)
            if self.predict(joined) <= seconds:
                low = tokens
            else:
                high = tokens - 1
        return low

    def observe(self, work: StepWork, seconds: float) -> None:
        """Learn from a step that took `seconds`."""
        seconds = max(seconds, 1e-9)
        self.observed += 1
        if self.observed == 1:
            self._begin(work, seconds)
            return
        predicted = self.predict(work)
        error = math.log(seconds / predicted)
        if self.observed > _FIRST_STEPS:
            error = max(-_MAX_ERROR, min(_MAX_ERROR, error))
        nodes = self._nodes(work.prompt_tokens)
        terms = [self._fixed, self._per_row * work.rows, self._per_key * work.keys]
        terms += [self._extra[index] * weight for index, weight in nodes]
        # A step of gradient descent on the logs of the parameters, scaled so that the prediction moves by `_RATE`.
        rate = max(_RATE, 1 / self.observed) * error * predicted / sum(term * term for term in terms)
        factors = [math.exp(rate * term) for term in terms]
        self._fixed *= factors[0]
        self._per_row *= factors[1]
        self._per_key *= factors[2]
        for (index, _), factor in zip(nodes, factors[3:], strict=True):
            self._extra[index] *= factor
        for index, _ in nodes:
            self._reshape(index)

    def _begin(self, work: StepWork, seconds: float) -> None:
        """Explain the first step: three quarters of its time by its prompt tokens, if it has any."""
        self._fixed = seconds / 4 if work.prompt_tokens else seconds
        self._per_row, self._per_key = self._fixed / 256, self._fixed / 65536
        tokens = work.prompt_tokens or 4 * _SMALLEST
        self._extra = [3 * self._fixed * size / tokens for size in self._sizes]

    def _nodes(self, prompt_tokens: int) -> list[tuple[int, float]]:
        """Indices of the sizes around a number of prompt tokens, with their weights."""
        if prompt_tokens == 0:
            return []
        above = bisect_left(self._sizes, prompt_tokens)
        if above == 0:
            return [(0, 1.0)]
        if above == len(self._sizes):
            return [(above - 1, prompt_tokens / self._sizes[-1])]
        low, high = self._sizes[above - 1], self._sizes[above]
        weight = (prompt_tokens - low) / (high - low)
        return [(above - 1, 1 - weight), (above, weight)]

    def _reshape(self, index: int) -> None:
        """Let other sizes agree with one just corrected: more tokens take no less time, and each of them no more."""
        extra, sizes = self._extra, self._sizes
        value = extra[index]
        for other, size in enumerate(sizes):
            in_proportion = value * size / sizes[index]
            lowest, highest = sorted((value, in_proportion))
            extra[other] = max(lowest, min(highest, extra[other]))


@dataclass(frozen=True, slots=True)
class PacedStep:
    """A step whose time is to be measured."""

    work: StepWork
    limit: int | None
    """Prompt tokens that it was allowed to have."""
    began: float = field(default_factory=time.perf_counter)


@dataclass
class PacingStats:
    """Counters of the steps that computed prompts while others decoded."""

    mixed_steps: int = 0
    limited_steps: int = 0
    """Those that left prompt tokens for a later step because of the target."""
    mixed_seconds: float = 0.0
    predicted_mixed_seconds: float = 0.0
    """Time of the mixed steps, measured and predicted."""


class Pacer:
    """Chooses the number of prompt tokens of each step; without a target (0 seconds), all that fit."""

    def __init__(self, target: float, max_tokens: int) -> None:
        self._target = target
        self._decode_steps = 0
        """Steps that computed a token of each sequence, and nothing else."""
        self.times = StepTimes(max_tokens)
        self.stats = PacingStats()

    @property
    def has_target(self) -> bool:
        """Whether steps are to be predicted and measured."""
        return self._target > 0

    def prompt_tokens(self, scheduler: Scheduler, now: float) -> int | None:
        """The limit of the next step; None where there is none: nobody decodes, or nothing is known yet.

        `now` and `arrived`: seconds of one clock.
        """
        if not (self.has_target and self.times.observed):
            return None
        prompts = list(islice(scheduler.prompts(), _MOST_LOOKED_AT))
        if not prompts:
            return None
        contexts = [sequence.length for sequence in scheduler.running if _decodes(sequence)]
        if not contexts:
            return None
        decodes = StepWork(len(contexts), sum(contexts), 0)
        seconds = max(self._target, _MIN_RATIO * self.times.predict(replace(decodes, prompt_tokens=1)))
        seconds *= 1 + self._count_late(prompts, now)
        return max(1, self.times.max_prompt_tokens(decodes, prompts[0].num_computed, seconds))

    def due(self, sequence: Sequence, scheduler: Scheduler) -> int:
        """Where a new sequence stands among prompts: in order of arrival, with a target short ones before long ones.

        With a target it is due once as many prompt tokens have been computed as it has itself. So those that come later
        overtake it by no more tokens than that, and what is left of a long prompt is overtaken by shorter ones alone.
        """
        return scheduler.prompt_tokens + sequence.length + sequence.uncomputed_input if self.has_target else 0

    def begin(self, batch: Batch, limit: int | None) -> PacedStep | None:
        """The step that is about to compute `batch`, scheduled with `limit`; None if it need not be measured."""
        if not (self.has_target and batch.sequences):
            return None
        if not batch.inputs and batch.num_tokens == len(batch.sequences):
            self._decode_steps += 1
            if self.times.observed >= _ALL_MEASURED and self._decode_steps % _MEASURED_ONE_IN:
                return None
        return PacedStep(StepWork.of(batch), limit)

    def _count_late(self, prompts: Iterable[Sequence], now: float) -> int:
        per_token = self.times.seconds_per_prompt_token
        tolerated = _LATE_TARGETS * self._target
        # what computes a prompt anew, or tokens that a grammar forced, has begun to answer long ago
        new = (sequence for sequence in prompts if sequence.output_len == 0)
        lengths = ((s, s.length + s.uncomputed_input) for s in new)
        return sum(now - s.arrived > tolerated + _LATE_PROMPTS * per_token * length for s, length in lengths)

    def observe(self, step: PacedStep, seconds: float) -> None:
        """Learn from a step that took `seconds`."""
        work, stats = step.work, self.stats
        if work.rows and work.prompt_tokens and self.times.observed:
            stats.mixed_steps += 1
            stats.limited_steps += step.limit is not None and work.prompt_tokens >= step.limit
            stats.mixed_seconds += seconds
            stats.predicted_mixed_seconds += self.times.predict(work)
        self.times.observe(work, seconds)


def _decodes(sequence: Sequence) -> bool:
    """Whether a running sequence computes a token in the next step.

    Beams do not while the first of them computes their prompt. Later they do, although they have nothing to compute
    yet: their moves, which bring the next tokens, are applied after the limit is chosen.
    """
    return not sequence.is_prefilling and not (sequence.beams is not None and sequence.beams.scattered)
