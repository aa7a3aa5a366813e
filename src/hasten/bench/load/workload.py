"""The requests of a load: conversations of one turn or more, random or from a data set, and when they are due."""

import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import cycle, islice, takewhile

from hasten.bench.load.arrivals import AT_ONCE, arrival_times, at_rate
from hasten.bench.load.datasets import Exchange, TraceEntry, read_conversations, read_prompts, read_trace
from hasten.bench.load.lengths import Lengths
from hasten.bench.load.prompts import PromptWriter
from hasten.core.errors import ConfigError

DEFAULT_PROMPT_LENGTH, DEFAULT_OUTPUT_LENGTH = Lengths(128, 128), Lengths(128, 128)
_SINGLE = Lengths(1, 1)
_DEFAULT_PROMPTS = 100
_BLOCK = 512
"""Tokens of a prompt that one hash id of a trace stands for."""

Prompt = str | list[int]


@dataclass(frozen=True, slots=True)
class Turn:
    """What a user says in a conversation, and how many tokens the answer may have."""

    prompt: Prompt
    output_length: int


@dataclass(frozen=True, slots=True)
class Conversation:
    """Turns, each sent once the answer to the one before is complete."""

    turns: Sequence[Turn]
    at: float = 0.0
    """Seconds after the start at which the first turn is due."""


@dataclass(frozen=True, kw_only=True)
class WorkloadOptions:
    """What is sent."""

    dataset: str = "random"
    path: str | None = None
    """File of the data set; of random prompts there is none."""
    prompt_length: Lengths | None = None
    """Of random prompts, in tokens of a turn, without the shared prefix."""
    output_length: Lengths | None = None
    """None: what the data set says."""
    turns: Lengths = _SINGLE
    shared_prefix: int = 0
    """Tokens that all random prompts begin with."""
    seed: int = 0

    def __post_init__(self) -> None:
        if (self.dataset == "random") != (self.path is None):
            raise ConfigError("--dataset-path is the file of a --dataset other than random; give both or neither")
        if self.dataset != "random" and (self.shared_prefix or self.prompt_length):
            raise ConfigError("--prompt-length and --shared-prefix are of random prompts; a data set has its own")
        if self.dataset in ("prompts", "trace") and self.turns != _SINGLE:
            raise ConfigError(f"--turns has no meaning for the dataset {self.dataset}: its prompts are single ones")


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """When conversations are due, and how many there are."""

    rate: float | None
    """Conversations per second; infinite: all at once; None: a trace's own times."""
    process: str = "poisson"
    num_prompts: int | None = None
    duration: float | None = None
    """Seconds in which conversations begin."""

    def __post_init__(self) -> None:
        if self.at_once and self.duration is not None and self.num_prompts is None:
            raise ConfigError(
                "--duration alone does not limit the requests of an infinite rate: give --num-prompts, too"
            )

    @property
    def at_once(self) -> bool:
        """Whether all conversations are due at the start."""
        return self.rate == AT_ONCE

    @property
    def name(self) -> float | str:
        """The rate as results have it."""
        return "trace" if self.rate is None else "inf" if self.at_once else self.rate

    def times(self, rng: random.Random) -> Iterator[float]:
        """Arrival times."""
        limit = self.num_prompts or (_DEFAULT_PROMPTS if self.duration is None else None)
        assert self.rate is not None
        return self.within(islice(arrival_times(self.rate, self.process, rng), limit))

    def within(self, times: Iterable[float]) -> Iterator[float]:
        """Times up to the duration. What is due at once may have to wait, and its client looks at the clock itself."""
        end = AT_ONCE if self.duration is None else self.duration
        return takewhile(lambda at: at < end, times)


class Workload:
    """A source of conversations, the same for the same seed. Each run has others than those before it.

    `takes_ids`: whether the API takes token ids. Random prompts are ids then, unless a conversation has several turns,
    whose answers are texts. ConfigError for a data set that cannot be sent.
    """

    def __init__(self, options: WorkloadOptions, writer: PromptWriter, *, takes_ids: bool) -> None:
        self._options = options
        self._writer = writer
        self._as_ids = takes_ids and options.turns.high == 1
        self._trace = read_trace(options.path) if options.dataset == "trace" and options.path else []
        exchanges = _read(options)
        self._given = cycle(exchanges)
        prompts = [each.prompt for several in exchanges for each in several] + [each.prompt for each in self._trace]
        if not takes_ids and any(isinstance(prompt, list) for prompt in prompts):
            raise ConfigError(f"{options.path} has prompts of token ids, which the API openai alone takes")

    def plan(self, run: int, schedule: Schedule) -> list[Conversation]:
        """The conversations of one run in the order of their times."""
        rng = random.Random(f"{self._options.seed}/{run}")
        if self._options.dataset == "trace":
            return self._replayed(run, schedule, rng)
        times = schedule.times(random.Random(f"{self._options.seed}/{run}/times"))
        if self._options.dataset == "random":
            return [replace(self._random(rng), at=at) for at in times]
        return [Conversation(self._turns(next(self._given), rng), at) for at in times]

    @cached_property
    def _prefix(self) -> Prompt:
        """What all prompts begin with, in all runs."""
        return self._prompt(self._options.shared_prefix, random.Random(f"{self._options.seed}/prefix"))

    def _prompt(self, length: int, rng: random.Random) -> Prompt:
        return self._writer.ids(length, rng) if self._as_ids else self._writer.text(length, rng)

    def _random(self, rng: random.Random) -> Conversation:
        lengths = self._options.prompt_length or DEFAULT_PROMPT_LENGTH
        outputs = self._options.output_length or DEFAULT_OUTPUT_LENGTH
        turns = [
            Turn(self._prompt(lengths.draw(rng), rng), outputs.draw(rng)) for _ in range(self._options.turns.draw(rng))
        ]
        if self._options.shared_prefix:
            turns[0] = replace(turns[0], prompt=_joined(self._prefix, turns[0].prompt))
        return Conversation(turns)

    def _turns(self, exchanges: Sequence[Exchange], rng: random.Random) -> list[Turn]:
        count = self._options.turns.draw(rng)
        return [Turn(each.prompt, self._output_length(each, rng)) for each in exchanges[:count]]

    def _output_length(self, exchange: Exchange, rng: random.Random) -> int:
        if self._options.output_length is not None:
            return self._options.output_length.draw(rng)
        if exchange.output_length is not None:
            return exchange.output_length
        if exchange.answer is None or not self._writer.has_tokenizer:
            raise ConfigError(
                f"{self._options.path} does not say how long all answers are: give --output-length"
                + ("" if self._writer.has_tokenizer else ", or --tokenizer to count their tokens")
            )
        return max(1, self._writer.count(exchange.answer))

    def _replayed(self, run: int, schedule: Schedule, rng: random.Random) -> list[Conversation]:
        entries = self._trace[: schedule.num_prompts]
        times = [entry.at - entries[0].at for entry in entries]
        due = schedule.within(times if schedule.rate is None else at_rate(times, schedule.rate))
        blocks = f"{self._options.seed}/{run}/block"
        return [
            Conversation([Turn(self._traced(entry, blocks, rng), self._traced_length(entry, rng))], at)
            for entry, at in zip(entries, due, strict=False)
        ]

    def _traced_length(self, entry: TraceEntry, rng: random.Random) -> int:
        return entry.output_length if self._options.output_length is None else self._options.output_length.draw(rng)

    def _traced(self, entry: TraceEntry, blocks: str, rng: random.Random) -> Prompt:
        """A trace entry's prompt: its own, or blocks that are equal where their hash ids are, and a random rest."""
        if entry.prompt is not None:
            return entry.prompt
        left, parts = entry.input_length, list[Prompt]()
        for number in entry.hash_ids:
            if left > 0:
                parts.append(self._prompt(min(left, _BLOCK), random.Random(f"{blocks}/{number}")))
                left -= _BLOCK
        if left > 0:
            parts.append(self._prompt(left, rng))
        return _joined(*parts)


def _read(options: WorkloadOptions) -> list[list[Exchange]]:
    """The data set's conversations."""
    if options.path is None or options.dataset not in ("sharegpt", "prompts"):
        return []
    return read_conversations(options.path) if options.dataset == "sharegpt" else read_prompts(options.path)


def _joined(*parts: Prompt) -> Prompt:
    if all(isinstance(part, str) for part in parts):
        return " ".join(part for part in parts if isinstance(part, str))
    return [token for part in parts if not isinstance(part, str) for token in part]
