"""The process that compiles each grammar first, within limits of CPU time and memory. Never imports torch or numpy.

How long compiling takes, and how much memory, cannot be seen in a grammar, and the compiler cannot be interrupted: the
system ends this process (`python -m hasten.engine.grammar_trial`) at the limits.
"""

import contextlib
import json
import math
import os
import resource
import signal
import subprocess
import sys
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hasten.core.errors import EngineError, InvalidRequestError
from hasten.engine.grammar_text import GrammarText, Vocabulary, thread_with_large_stack

_WALL_SECONDS_PER_CPU_SECOND = 20.0
"""A trial that takes longer, relative to its limit of CPU time, is taken to hang."""
_START_S = 120.0
"""In which the trial's process must be ready."""


@dataclass(frozen=True)
class GrammarLimits:
    """What compiling one grammar may take."""

    seconds: int = 5
    """Of CPU time."""
    memory: int = 1 << 30
    """Bytes; those that stay compiled take no more than this either, all together."""


class GrammarTrial:
    """The trial's process, seen from the engine's: one grammar at a time."""

    def __init__(self, vocabulary: Vocabulary, limits: GrammarLimits) -> None:
        self._limits = limits
        self._asking = threading.Lock()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "hasten.engine.grammar_trial"],
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

    def run(self, text: GrammarText) -> int:
        """Compile a grammar; the bytes that it takes. InvalidRequestError where it is wrong or too expensive."""
        try:
            error, size = self._ask([text.kind, text.text], _WALL_SECONDS_PER_CPU_SECOND * self._limits.seconds)
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


def _main() -> None:
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
            matcher = GrammarText(*json.loads(line)).compile(vocabulary)
        except InvalidRequestError as error:
            _say([str(error), 0])
            continue
        _say([None, max(0, _memory(1) - before)])
        del matcher


def _say(answer: Any) -> None:
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    for ignored in (signal.SIGINT, signal.SIGTERM):
        signal.signal(ignored, signal.SIG_IGN)  # it ends with its standard input
    thread_with_large_stack(_main).join()
