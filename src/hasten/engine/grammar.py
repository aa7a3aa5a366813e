"""Grammars compiled by llguidance, which is imported with the first one. Never imports torch or numpy.

How long compiling takes, and how much memory, cannot be seen in a grammar, and the compiler cannot be interrupted. So
each grammar is compiled in a process of its own first (`python -m hasten.engine.grammar`), which the system ends at the
limits of CPU time and memory; what comes through is then compiled for use, on a thread that holds up nobody.
"""

import contextlib
import hashlib
import json
import math
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, Protocol

from hasten.core.cpus import available_cpus
from hasten.core.errors import ConfigError, EngineError, HastenError, InvalidRequestError
from hasten.core.extras import require_extra
from hasten.core.types import SamplingParams

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

_MOST_CHARACTERS = {"choice": 1 << 20}
_MOST_CHARACTERS_ELSE = 64 * 1024
"""Longest grammar, before its cost is looked at."""
_STACK_BYTES = 512 << 20
"""Of the compiling thread, of which only those used become memory: the compiler recurses as deep as rules refer to each
other, and a grammar of the greatest length has been seen to need more than the usual 8 MiB, whose end would end the
process."""
_KEPT = 64
"""Grammars that stay compiled, or known to be wrong."""
_MOST_PENDING = 16
"""Grammars that wait to be compiled: each may take the whole limit of time."""
_PATIENCE = 20.0
"""Seconds for one of CPU time, after which the trial's process is taken to hang."""
_START_S = 120.0
"""In which the trial's process must be ready."""
_OUT_OF_FUEL = "lexer precomputation failed"
"""What the compiler says of expressions beyond its own limit, with advice for its callers."""
_MOST_MATCHERS, _MORE_MATCHERS_S = 8, 0.02
"""Times that a grammar is compiled for use, and seconds that all but the first may take. With a vocabulary of 250,880
tokens and a schema of strings, one matcher finds the masks of 256 sequences in 23 ms, and eight in a third of that."""
_WHITESPACE = " "
"""At most this between JSON's marks: small models may never leave whitespace by themselves."""
_KINDS = ("json_schema", "regex", "grammar", "choice")


@dataclass(frozen=True)
class GrammarLimits:
    """What compiling one grammar may take."""

    seconds: int = 5
    """Of CPU time."""
    memory: int = 1 << 30
    """Bytes; those that stay compiled take no more than this either, all together."""


@dataclass(frozen=True)
class Vocabulary:
    """What llguidance must know of a tokenizer."""

    tokenizer_json: str
    size: int
    eos_token_ids: tuple[int, ...]

    def load(self) -> "LLTokenizer":
        """As llguidance's own object; InvalidRequestError where it cannot be used."""
        from llguidance import LLTokenizer

        try:
            return LLTokenizer(self.tokenizer_json, self.size, list(self.eos_token_ids))
        except ValueError as error:
            raise InvalidRequestError(f"the tokenizer cannot be used for constrained output: {error}") from error


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


@dataclass(frozen=True)
class Text:
    """A grammar as it was written."""

    kind: str
    text: str

    @classmethod
    def of(cls, params: SamplingParams) -> "Text | None":
        """What constrains the output; None where nothing does."""
        kind = next((kind for kind in _KINDS if getattr(params, kind)), None)
        if kind is None:
            return None
        given = getattr(params, kind)
        return cls(kind, given if isinstance(given, str) else json.dumps(given))

    @property
    def key(self) -> tuple[str, bytes]:
        """Equal grammars have equal ones."""
        return self.kind, hashlib.sha256(self.text.encode(errors="surrogatepass")).digest()

    def compile(self, vocabulary: "LLTokenizer") -> "LLMatcher":
        """A matcher at its start. InvalidRequestError where there is none. To be called where the stack is large."""
        from llguidance import LLMatcher, LLParserLimits

        limits = LLParserLimits(verbose_errors=False)
        try:
            made = LLMatcher(vocabulary, self._source(), log_level=0, limits=limits)
        except ValueError as error:
            raise InvalidRequestError(f"{self.kind} cannot be compiled: {one_line(str(error))}") from error
        if made.is_error():
            message = one_line(made.get_error())
            if _OUT_OF_FUEL in message:
                raise InvalidRequestError(f"{self.kind} is too expensive: its expressions have too many states")
            raise InvalidRequestError(f"{self.kind} cannot be compiled: {message}")
        begun = made.deep_copy()
        begun.compute_bitmask()
        if begun.is_error():  # a contradiction that shows only here
            raise InvalidRequestError(f"{self.kind} cannot be satisfied: {one_line(begun.get_error())}")
        return made

    def _source(self) -> str:
        """What llguidance compiles."""
        from llguidance import LLMatcher

        if self.kind == "json_schema":
            schema = "{}" if self.text == "true" else self.text  # options can be set only on an object
            return LLMatcher.grammar_from_json_schema(schema, overrides={"whitespace_pattern": _WHITESPACE})
        if self.kind == "regex":
            return LLMatcher.grammar_from_regex(self.text)
        if self.kind == "choice":  # one terminal: a rule may have 2000 alternatives, a terminal any number
            return "start: CHOICE\nCHOICE: " + " | ".join(json.dumps(choice) for choice in json.loads(self.text))
        return LLMatcher.grammar_from_lark(self.text)


def one_line(message: str) -> str:
    """The message without the parser's state, which follows it."""
    return " ".join(message.partition("\n<")[0].split())[:300]


@dataclass
class _Job:
    text: Text
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
        limits: GrammarLimits = GrammarLimits(),
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
        self._trial: _Trial | None = None
        self._vocabulary: LLTokenizer | None = None
        self._closed = False

    def compile(self, params: SamplingParams) -> "Future[Grammar] | None":
        """What constrains the output, as soon as it is compiled; None where nothing does.

        The future has an InvalidRequestError where the grammar cannot be compiled, takes more than the limits, or there
        is no tokenizer that it can be applied to. EngineError where too many wait already.
        """
        text = Text.of(params)
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

    def _refusal(self, text: Text) -> HastenError | None:
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
            self._thread = _big_thread(self._run)
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
        text = Text.of(params)
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
            made: Grammar | HastenError
            size = 0
            try:
                made, size = self._made(job.text)
            except HastenError as error:
                made = error
            except Exception as error:
                made = EngineError(f"the grammar's compiler failed: {error!r}")
            with self._lock:
                self._jobs.pop(job.text.key, None)
                if not isinstance(made, EngineError):
                    self._keep(job.text.key, made, size)
            if isinstance(made, HastenError):
                job.future.set_exception(made)
            else:
                job.future.set_result(made)

    def _keep(self, key: tuple[str, bytes], made: Grammar | HastenError, size: int) -> None:
        self._kept[key] = (made, size)
        while len(self._kept) > 1 and (
            len(self._kept) > _KEPT or sum(entry[1] for entry in self._kept.values()) > self._limits.memory
        ):
            self._kept.popitem(last=False)

    def _made(self, text: Text) -> tuple[Grammar, int]:
        """A grammar that came through the trial, and its bytes."""
        assert self._tokenizer is not None, "checked where it came"
        described = Vocabulary(
            self._tokenizer.to_json(), max(self._vocab_size, self._tokenizer.vocab_size), self._eos_token_ids
        )
        if self._vocabulary is None:
            self._vocabulary = described.load()
        with self._lock:
            if self._trial is None or self._trial.ended:
                self._trial = _Trial(described, self._limits)
            trial = self._trial
        size = trial.run(text)
        began = time.perf_counter()
        matchers = [text.compile(self._vocabulary)]
        affordable = int(_MORE_MATCHERS_S / max(time.perf_counter() - began, 1e-6))
        more = min(available_cpus() - 1, _MOST_MATCHERS - 1, affordable)
        matchers += (text.compile(self._vocabulary) for _ in range(more))
        words = -(-self._vocabulary.vocab_size // 32)
        return Grammar(tuple(matchers), words), size * len(matchers)


class _HasJson(Protocol):
    """A tokenizer, seen from here."""

    @property
    def vocab_size(self) -> int:
        """Tokens it knows."""

    def to_json(self) -> str:
        """The text of its tokenizer.json."""


def _done(made: Grammar | HastenError) -> "Future[Grammar]":
    future: Future[Grammar] = Future()
    if isinstance(made, HastenError):
        future.set_exception(made)
    else:
        future.set_result(made)
    return future


def _big_thread(run: Callable[[], None]) -> threading.Thread:
    usual = threading.stack_size(_STACK_BYTES)
    try:
        thread = threading.Thread(target=run, name="compile-grammars", daemon=True)
        thread.start()
    finally:
        threading.stack_size(usual)
    return thread


class _Trial:
    """The process that compiles a grammar first. It starts with the first grammar, and again where it was ended."""

    def __init__(self, vocabulary: Vocabulary, limits: GrammarLimits) -> None:
        self._limits = limits
        self._asking = threading.Lock()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "hasten.engine.grammar"],
            stdin=subprocess.PIPE,  # its end is the process's end
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,  # the compiler's last words say less than the status
            start_new_session=True,
        )
        described = [vocabulary.tokenizer_json, vocabulary.size, vocabulary.eos_token_ids]
        try:
            self._ask([*described, limits.seconds, limits.memory], _START_S)
        except _EndedError as error:
            raise EngineError(f"the process that compiles grammars did not start: status {error.status}") from None

    @property
    def ended(self) -> bool:
        """Whether it takes no more grammars."""
        return self._process.poll() is not None

    def run(self, text: Text) -> int:
        """Compile a grammar; the bytes that it takes. InvalidRequestError where it is wrong or too expensive."""
        try:
            error, size = self._ask([text.kind, text.text], _PATIENCE * self._limits.seconds)
        except _EndedError as ended:
            raise InvalidRequestError(f"{text.kind} is too expensive: {self._why(ended.status)}") from None
        if error:
            raise InvalidRequestError(error)
        return int(size)

    def _ask(self, message: Any, seconds: float) -> Any:
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        killer = threading.Timer(seconds, process.kill)
        killer.start()
        with self._asking:
            try:
                with contextlib.suppress(BrokenPipeError):
                    process.stdin.write(json.dumps(message).encode() + b"\n")
                    process.stdin.flush()
                answer = process.stdout.readline()
            finally:
                killer.cancel()
        if not answer.endswith(b"\n"):
            self.kill()
            raise _EndedError(process.returncode)
        return json.loads(answer)

    def _why(self, status: int) -> str:
        limits = self._limits
        if -status in (signal.SIGXCPU, signal.SIGKILL):
            return f"compiling it takes more than {limits.seconds} s (max_grammar_seconds); make it smaller"
        return f"compiling it takes more than {limits.memory >> 20} MiB of memory (max_grammar_memory); make it smaller"

    def kill(self) -> None:
        """End it, whatever it does."""
        self._process.kill()
        self._process.wait()
        with self._asking:  # it has its answer: the end
            for pipe in (self._process.stdin, self._process.stdout):
                assert pipe is not None
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()


class _EndedError(Exception):
    """The process ended before it answered."""

    def __init__(self, status: int) -> None:
        super().__init__(status)
        self.status = status


def _memory(field: int) -> int:
    """Bytes: field 0 all that is mapped, field 1 what is in memory."""
    return int(Path("/proc/self/statm").read_text("ascii").split()[field]) * os.sysconf("SC_PAGE_SIZE")


def _trial_main() -> None:
    """The trial's process: a vocabulary with limits, then one grammar after the other, each a line of JSON."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    tokenizer_json, size, eos_token_ids, seconds, memory = json.loads(sys.stdin.readline())
    vocabulary = Vocabulary(tokenizer_json, size, tuple(eos_token_ids)).load()
    # the stack of this thread, the allocator's own for it, and what is there already are not the grammar's
    most = _memory(0) + (128 << 20) + memory
    resource.setrlimit(resource.RLIMIT_AS, (most, resource.RLIM_INFINITY))
    _say([None, 0])
    for line in sys.stdin:
        before = _memory(1)
        used = resource.getrusage(resource.RUSAGE_SELF)
        until = math.ceil(used.ru_utime + used.ru_stime) + seconds
        resource.setrlimit(resource.RLIMIT_CPU, (until, resource.RLIM_INFINITY))
        try:
            made = Text(*json.loads(line)).compile(vocabulary)
        except InvalidRequestError as error:
            _say([str(error), 0])
            continue
        _say([None, max(0, _memory(1) - before)])
        del made


def _say(answer: Any) -> None:
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    for ignored in (signal.SIGINT, signal.SIGTERM):
        signal.signal(ignored, signal.SIG_IGN)  # it ends with its standard input
    _big_thread(_trial_main).join()
