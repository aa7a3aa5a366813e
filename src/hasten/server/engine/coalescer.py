"""Which outputs go to the server with a step, and which are joined with those of later steps.

Nothing is held back for a fixed rate. The server acknowledges each message once it has written its outputs to their
streams. Once it is a window of messages behind, what comes is joined: a server that keeps up sends every token by
itself, and one that does not gets as much as it can send. The first and the last tokens of a request never wait.
"""

from array import array
from collections import deque
from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any

from hasten.core.types import (
    CompletionOutput,
    EmbeddingOutput,
    FailedOutput,
    FillMaskOutput,
    PooledOutput,
    PoolingOutput,
    PoolingRequestOutput,
    RequestOutput,
    ScoringOutput,
)
from hasten.server.engine.pieces import MAX_COST, cost, split
from hasten.server.engine.wire import CompletionDelta, FirstToken, Output, PooledData

EngineOutput = RequestOutput | PoolingRequestOutput[PooledOutput]

_STREAMS_SHARE = 1 / 40
"""Of the cores that engine and server compete for, so much may go to writing streams; more slows down all of them."""
_FLOWING_S = 0.1
"""Text that comes ten times a second flows for its readers: up to this, pauses are twice as long, and half as much goes
to writing."""


def pause_per_cpu_second(cores: float, engine_threads: int) -> float:
    """Seconds without a message to streams for each CPU second that the server spends on one.

    `cores`: of the machine, or the engine's part of them where several engines share it.
    0 where the server has a core of its own. Where the engine's threads want all cores, a message delays the tokens
    that it does not carry, by the time that it costs.
    """
    return 0.0 if engine_threads < cores else 1 / (_STREAMS_SHARE * cores)


class Deltas:
    """How much of each completion of one request the server has."""

    def __init__(self) -> None:
        self.is_first = True
        """Whether it has nothing yet."""
        self._sent: dict[int, tuple[int, int]] = {}
        """Index -> (tokens, characters)."""
        self._ended: set[int] = set()

    def take(self, number: int, output: EngineOutput) -> Output:
        """What is new in `output`."""
        if isinstance(output, PoolingRequestOutput):
            return Output(number, [], output.finished, pooled=_pooled(output.outputs))
        deltas = [delta for completion in output.outputs if (delta := self._delta(completion)) is not None]
        if not self.is_first:
            return Output(number, deltas, output.finished)
        self.is_first = False
        result = Output(number, deltas, output.finished, _on_wire(output.prompt_logprobs))
        if output.metrics.first_token_ts:
            result.first = FirstToken(output.metrics.first_token_ts, output.num_cached_tokens)
        return result

    def _delta(self, completion: CompletionOutput) -> CompletionDelta | None:
        index, tokens, characters = completion.index, *self._sent.get(completion.index, (0, 0))
        if completion.finish_reason is not None:
            if index in self._ended:
                return None
            self._ended.add(index)
        elif tokens == len(completion.token_ids):
            return None
        self._sent[index] = (len(completion.token_ids), len(completion.text))
        return CompletionDelta(
            index,
            completion.token_ids[tokens:],
            completion.text[characters:],
            _on_wire(completion.logprobs, tokens),
            completion.cumulative_logprob,
            completion.finish_reason,
            completion.stop_reason,
            None if completion.token_logprobs is None else completion.token_logprobs[tokens:],
        )


def _pooled(output: PooledOutput) -> PooledData:
    """What was made of a text, as it goes to the server."""
    if isinstance(output, FailedOutput):
        return PooledData(b"", error=output.error)
    if isinstance(output, PoolingOutput):
        return PooledData(output.data.numpy().tobytes(), rows=len(output.data))
    if isinstance(output, FillMaskOutput):
        pairs = [[word.token for word in words] + [word.score for word in words] for words in output.candidates]
        return PooledData(array("f", chain.from_iterable(pairs)).tobytes(), rows=len(pairs))
    if isinstance(output, EmbeddingOutput):
        return PooledData(output.tobytes())
    numbers = [output.score] if isinstance(output, ScoringOutput) else output.probs
    return PooledData(array("f", numbers).tobytes())


def _on_wire(logprobs: Sequence[Any] | None, begin: int = 0) -> Any:
    """Log-probabilities of the engine, which become those of the server by being encoded."""
    return None if logprobs is None else logprobs[begin:]


class OutputCoalescer:
    """Outputs of requests that the server does not have yet."""

    def __init__(self, pause_per_cpu_second: float = 0.0, window: int = 1) -> None:
        self._pause_per_cpu_second = pause_per_cpu_second
        self._window = window
        """Messages that the server may be behind before outputs are joined."""
        self._deltas: dict[int, Deltas] = {}
        self._streams: set[int] = set()
        self._news: dict[int, tuple[Callable[[], EngineOutput], bool]] = {}
        """What gives the output of a request, and whether it is finished."""
        self._rest: deque[Output] = deque()
        """Outputs, or pieces of them, that did not fit the messages before."""
        self._in_flight = 0
        """Messages that the server has not acknowledged."""
        self._next_at = 0.0
        """When streams that share their cores with the engine may have more."""

    def begin(self, number: int, *, stream: bool) -> None:
        """Register a request, which wants its tokens as they come or all at its end."""
        self._deltas[number] = Deltas()
        if stream:
            self._streams.add(number)

    def forget(self, number: int) -> None:
        """Drop a request that nobody reads any more."""
        self._deltas.pop(number, None)
        self._streams.discard(number)
        self._news.pop(number, None)
        if self._rest:
            self._rest = deque(output for output in self._rest if output.id != number)

    def put(self, number: int, shown: Callable[[], EngineOutput], *, finished: bool) -> None:
        """Take in that there is more of a request; `shown` gives all of it so far, and is called when that is sent."""
        self._news[number] = (shown, finished)

    def sent(self) -> None:
        """Count a message that went to the server."""
        self._in_flight += 1

    def acknowledge(self, messages: int, cpu_seconds: float, now: float) -> None:
        """The server has written messages to their streams, which cost it this CPU time."""
        self._in_flight -= messages
        pause = cpu_seconds * self._pause_per_cpu_second
        self._next_at = now + max(pause, min(_FLOWING_S, 2 * pause))

    def is_due(self, now: float) -> bool:
        """Whether all streams may have what there is; `now` in seconds.

        A single stream has nobody whose tokens its messages delay, so it pauses for nothing.
        """
        return self._in_flight < self._window and (now >= self._next_at or len(self._streams) <= 1)

    @property
    def has_news(self) -> bool:
        """Whether the server lacks anything."""
        return bool(self._news or self._rest)

    @property
    def goes_on(self) -> bool:
        """Whether a further message may have outputs that did not fit the last one."""
        return bool(self._rest) and self._in_flight < self._window

    def take(self, *, everything: bool) -> list[Output]:
        """The outputs to send now: the first and the last of a request, the rest with `everything`.

        What is too large for one message goes with this one and those after it, while the server keeps up with them.
        """
        taken, room = list[Output](), MAX_COST
        waiting = {output.id for output in self._rest}
        for number in list(self._news) if everything else self._urgent():
            output = self._take(number)
            size = cost(output)
            if size <= room and number not in waiting:
                taken.append(output)
                room -= size
            else:
                self._rest.extend(split(output))
        while self.goes_on and (not taken or cost(self._rest[0]) <= room):
            taken.append(self._rest.popleft())
            room -= cost(taken[-1])
        return taken

    def _urgent(self) -> list[int]:
        deltas = self._deltas
        return [number for number, (_, finished) in self._news.items() if finished or deltas[number].is_first]

    def _take(self, number: int) -> Output:
        output = self._news.pop(number)[0]()
        taken = self._deltas[number].take(number, output)
        if output.finished:
            self._deltas.pop(number)
            self._streams.discard(number)
        return taken
