"""What an engine's process tells of requests, and when.

A message to a client costs the server and the client CPU time, which the engine may want as well: with many streams, a
message for every token would take a third of a small machine. So tokens of many streams are told a few at a time.
"""

import os

from hasten.core.types import CompletionOutput, RequestOutput
from hasten.server.engine.wire import CompletionDelta, Output

_MESSAGES_PER_CORE, _MOST_MESSAGES = 200, 2000
"""A second, of all streams together: less than a tenth of the cores, and less than one thread can send."""


def messages_per_second() -> int:
    """How many messages to clients this machine should have to send."""
    return min(_MOST_MESSAGES, _MESSAGES_PER_CORE * len(os.sched_getaffinity(0)))


class Deltas:
    """How much of each completion of one request the server has."""

    def __init__(self) -> None:
        self.is_first = True
        """Whether it has nothing yet."""
        self._sent: dict[int, tuple[int, int]] = {}
        """Index -> (tokens, characters)."""
        self._ended: set[int] = set()

    def take(self, number: int, output: RequestOutput) -> Output:
        """What is new in `output`."""
        deltas = [delta for completion in output.outputs if (delta := self._delta(completion)) is not None]
        prompt_logprobs, self.is_first = output.prompt_logprobs if self.is_first else None, False
        return Output(number, deltas, output.finished, prompt_logprobs)

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
            None if completion.logprobs is None else completion.logprobs[tokens:],
            completion.cumulative_logprob,
            completion.finish_reason,
            completion.stop_reason,
        )


class News:
    """Outputs of requests that the server is not told yet."""

    def __init__(self, per_second: float) -> None:
        self._per_second = per_second
        self._deltas: dict[int, Deltas] = {}
        self._streams: set[int] = set()
        self._outputs: dict[int, RequestOutput] = {}
        self._told = 0.0
        """When the server was told of all there was."""

    def begin(self, number: int, *, stream: bool) -> None:
        """There is a new request, which wants its tokens one by one or all at its end."""
        self._deltas[number] = Deltas()
        if stream:
            self._streams.add(number)

    def forget(self, number: int) -> None:
        """Nobody wants to know of a request any more."""
        self._deltas.pop(number, None)
        self._streams.discard(number)
        self._outputs.pop(number, None)

    def put(self, output: RequestOutput) -> None:
        """There is more of a request: this is all of it so far."""
        self._outputs[int(output.request_id)] = output

    def is_due(self, now: float) -> bool:
        """Whether it is time to tell of all there is; `now` in seconds."""
        return now - self._told >= len(self._streams) / self._per_second

    def take(self, now: float, *, everything: bool) -> list[Output]:
        """What to tell now: the first and the last of a request at once, the rest with `everything`."""
        if everything:
            self._told = now
        return [self._take(number) for number in list(self._outputs) if everything or self._is_urgent(number)]

    def _is_urgent(self, number: int) -> bool:
        return self._outputs[number].finished or self._deltas[number].is_first

    def _take(self, number: int) -> Output:
        output = self._outputs.pop(number)
        told = self._deltas[number].take(number, output)
        if output.finished:
            self.forget(number)
        return told
