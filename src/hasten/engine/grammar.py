"""Grammars compiled by llguidance, which is imported with the first one. Never imports torch or numpy.

Each grammar is first compiled within limits, in a process of its own (`grammar_trial.py`), and then for use, on a
thread of its own.
"""

import threading
import time
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import cached_property
from itertools import count
from queue import SimpleQueue
from typing import TYPE_CHECKING, Protocol

from hasten.core.cpus import available_cpus
from hasten.core.errors import ConfigError, EngineError, HastenError, InvalidRequestError
from hasten.core.extras import require_extra
from hasten.core.types import SamplingParams
from hasten.engine.grammar_text import GrammarText, Vocabulary, thread_with_large_stack
from hasten.engine.grammar_trial import GrammarLimits, GrammarTrial

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

_MOST_CHARACTERS = {"choice": 1 << 20}
_MOST_CHARACTERS_ELSE = 64 * 1024
"""Longest grammar, before its cost is looked at."""
_DEFAULT_LIMITS = GrammarLimits()
_KEPT = 64
"""Grammars that stay compiled, or known to be wrong."""
_MOST_PENDING = 16
"""Grammars that wait to be compiled: each may take the whole limit of time."""
_MOST_MATCHERS, _MORE_MATCHERS_S = 16, 0.02
"""Times that a grammar is compiled for use, and seconds of CPU time after which it is not compiled once more. With a
vocabulary of 250,880 tokens, one matcher finds the masks of 256 sequences inside strings in 23 ms, on one CPU."""


@dataclass(frozen=True)
class Grammar:
    """A compiled grammar, several times over: copies of a matcher share a lock, and find their masks one by one."""

    matchers: "tuple[LLMatcher, ...]"
    """At its start; to be copied, each for some of the sequences."""
    words: int
    """Of 32 tokens each, in a mask of the vocabulary."""
    _turns: Iterator[int] = field(default_factory=count, compare=False)

    def next_matcher(self) -> tuple[int, "LLMatcher"]:
        """A copy for a new sequence, and the number of the matcher that it shares its lock with."""
        number = next(self._turns) % len(self.matchers)
        return number, self.matchers[number].deep_copy()


@dataclass
class _Job:
    text: GrammarText
    future: "Future[Grammar]"
    wanted: int = 1
    """Requests that wait for it."""


class GrammarCompiler:
    """Grammars for one model and its tokenizer, compiled on a thread; the latest stay compiled."""

    def __init__(
        self,
        tokenizer: "_HasJson | None",
        vocab_size: int,
        eos_token_ids: Sequence[int],
        limits: GrammarLimits = _DEFAULT_LIMITS,
    ) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._eos_token_ids = tuple(eos_token_ids)
        self._limits = limits
        self._lock = threading.Lock()
        """For what the thread and its callers both change."""
        self._kept: OrderedDict[tuple[str, bytes], tuple[Grammar | HastenError, int]] = OrderedDict()
        """With the bytes that each takes."""
        self._jobs: dict[tuple[str, bytes], _Job] = {}
        self._queue: SimpleQueue[_Job | None] = SimpleQueue()
        self._thread: threading.Thread | None = None
        self._trial: GrammarTrial | None = None
        self._vocabulary: LLTokenizer | None = None
        self._closed = False

    def compile(self, params: SamplingParams) -> "Future[Grammar] | None":
        """What constrains the output, as soon as it is compiled; None where nothing does.

        The future has an InvalidRequestError where the grammar cannot be compiled, takes more than the limits, or there
        is no tokenizer that it can be applied to. EngineError where too many wait already.
        """
        text = GrammarText.of(params)
        if text is None:
            return None
        with self._lock:
            known = self._kept.get(text.key)
            if known is not None:
                self._kept.move_to_end(text.key)
                return _done(known[0])
            job = self._jobs.get(text.key)
            if job is not None:
                job.wanted += 1
                return job.future
            error = self._refusal(text)
            if error is not None:
                return _done(error)
            job = self._jobs[text.key] = _Job(text, Future())
        self._queue.put(job)
        return job.future

    def _refusal(self, text: GrammarText) -> HastenError | None:
        """Why a grammar is not even looked at."""
        if self._closed:
            return EngineError("the grammars' compiler is closed")
        if self._tokenizer is None:
            return InvalidRequestError("constrained output needs a tokenizer; give --tokenizer-path")
        if not self._eos_token_ids:
            return InvalidRequestError("constrained output needs an end token, and the model's config has none")
        most = _MOST_CHARACTERS.get(text.kind, _MOST_CHARACTERS_ELSE)
        if len(text.text) > most:
            return InvalidRequestError(f"{text.kind} has {len(text.text)} characters, more than {most}")
        if len(self._jobs) >= _MOST_PENDING:
            return EngineError(f"{len(self._jobs)} grammars wait to be compiled already; try again later")
        if self._thread is None:
            try:
                require_extra("grammar", "output constrained by a schema, expression or grammar")
            except ConfigError as error:
                return error
            self._thread = thread_with_large_stack(self._run)
        return None

    def compiled(self, params: SamplingParams) -> Grammar | None:
        """What constrains the output, once it is compiled; raises what `compile`'s future has."""
        future = self.compile(params)
        try:
            return None if future is None else future.result()
        except KeyboardInterrupt:
            self.withdraw(params)
            raise

    def withdraw(self, params: SamplingParams) -> None:
        """One request less that waits for its grammar; what nobody waits for is not compiled."""
        text = GrammarText.of(params)
        assert text is not None, "it waits for one"
        with self._lock:
            job = self._jobs.get(text.key)
            if job is None:
                return
            job.wanted -= 1
            if job.wanted == 0 and job.future.cancel():
                del self._jobs[text.key]

    def close(self) -> None:
        """End the thread and the process, whatever they do."""
        with self._lock:
            self._closed = True
            trial, self._trial = self._trial, None
            started = self._thread is not None
        if started:
            self._queue.put(None)
        if trial is not None:
            trial.kill()

    def _run(self) -> None:
        """The thread: one grammar after the other."""
        while (job := self._queue.get()) is not None:
            if not job.future.set_running_or_notify_cancel():
                continue
            result: Grammar | HastenError
            size = 0
            try:
                result, size = self._compile_text(job.text)
            except HastenError as error:
                result = error
            except Exception as error:
                result = EngineError(f"the grammar's compiler failed: {error!r}")
            with self._lock:
                self._jobs.pop(job.text.key, None)
                if not isinstance(result, EngineError):
                    self._keep(job.text.key, result, size)
            if isinstance(result, HastenError):
                job.future.set_exception(result)
            else:
                job.future.set_result(result)

    def _keep(self, key: tuple[str, bytes], result: Grammar | HastenError, size: int) -> None:
        self._kept[key] = (result, size)
        while len(self._kept) > 1 and (
            len(self._kept) > _KEPT or sum(entry[1] for entry in self._kept.values()) > self._limits.memory
        ):
            self._kept.popitem(last=False)

    def _compile_text(self, text: GrammarText) -> tuple[Grammar, int]:
        """A grammar that came through the trial, and its bytes."""
        if self._vocabulary is None:
            self._vocabulary = self._described.load()
        size = self._running_trial().run(text)
        matchers = [text.compile(self._vocabulary)]
        most = min(available_cpus(), _MOST_MATCHERS)
        # The first takes several times as long as the others, which find what it left in memory.
        end = time.thread_time() + _MORE_MATCHERS_S
        while len(matchers) < most and time.thread_time() < end:
            matchers.append(text.compile(self._vocabulary))
        words = -(-self._vocabulary.vocab_size // 32)
        return Grammar(tuple(matchers), words), size * len(matchers)

    def _running_trial(self) -> GrammarTrial:
        """The trial, started again where a grammar ended it: without the lock, since starting it takes seconds."""
        trial = self._trial
        if trial is not None and not trial.ended:
            return trial
        trial = GrammarTrial(self._described, self._limits)
        with self._lock:
            if not self._closed:
                self._trial = trial
                return trial
        trial.kill()
        raise EngineError("the grammars' compiler is closed")

    @cached_property
    def _described(self) -> Vocabulary:
        """Of the tokenizer, whose JSON is written once: that takes the time of several steps, which wait for it."""
        assert self._tokenizer is not None, "checked where it came"
        size = max(self._vocab_size, self._tokenizer.vocab_size)
        return Vocabulary(self._tokenizer.to_json(), size, self._eos_token_ids)


class _HasJson(Protocol):
    """A tokenizer, seen from here."""

    @property
    def vocab_size(self) -> int:
        """Tokens it knows."""

    def to_json(self) -> str:
        """The text of its tokenizer.json."""


def _done(result: Grammar | HastenError) -> "Future[Grammar]":
    future: Future[Grammar] = Future()
    if isinstance(result, HastenError):
        future.set_exception(result)
    else:
        future.set_result(result)
    return future
