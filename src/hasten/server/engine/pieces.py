"""Large outputs in pieces: a message is encoded by the engine and decoded by the server at once, and holds up both."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from msgspec.structs import replace

from hasten.server.engine.wire import CompletionDelta, Logprob, Output, PooledData

if TYPE_CHECKING:
    from hasten.server.engine.ticket import Progress

MAX_COST = 100_000
"""Of the outputs of one message, where a token costs 1: some 10 ms to decode."""
_ENTRY_COST = 10
"""Of a log-probability."""
_BYTES_PER_TOKEN = 64
"""Of a vector's numbers: they are copied, and not looked at."""


def cost(output: "Output | Progress") -> int:
    """What an output takes to encode and to decode, in tokens."""
    total = 0
    for delta in output.completions:
        total += len(delta.token_ids) if delta.logprobs is None else _delta_cost(delta)
    if prompt := output.prompt_logprobs:
        total += len(prompt) * _token_cost(prompt[-1:])
    if output.pooled is not None:
        total += 1 + len(output.pooled.data) // _BYTES_PER_TOKEN
    return total


def _delta_cost(delta: CompletionDelta) -> int:
    tokens = len(delta.token_ids)
    return tokens if delta.logprobs is None else tokens * _token_cost(delta.logprobs)


def _token_cost(logprobs: Sequence[dict[int, Logprob] | None] | None) -> int:
    """Of a token, by the log-probabilities of the first."""
    return 1 + _ENTRY_COST * len((logprobs or [None])[0] or ())


def split(output: Output, most: int = MAX_COST) -> list[Output]:
    """An output as pieces that cost no more than `most` (or have one token), all but the last marked as partial."""
    if cost(output) <= most:
        return [output]
    pieces = [Output(output.id, [], False, part) for part in _prompt_parts(output, most)]
    pieces += [Output(output.id, [part], False) for delta in output.completions for part in _delta_parts(delta, most)]
    if output.pooled is not None:
        pieces += [Output(output.id, [], False, pooled=part) for part in _pooled_parts(output.pooled, most)]
    for piece in pieces:
        piece.partial = True
    pieces[-1].partial, pieces[-1].finished = False, output.finished
    pieces[0].first = output.first
    return pieces


def _prompt_parts(output: Output, most: int) -> Iterator[list[dict[int, Logprob] | None]]:
    logprobs = output.prompt_logprobs or []
    length = max(1, most // _token_cost(logprobs[-1:]))
    return (logprobs[begin : begin + length] for begin in range(0, len(logprobs), length))


def _delta_parts(delta: CompletionDelta, most: int) -> Iterator[CompletionDelta]:
    """Pieces of a delta; the first one has its text, the last one says how it ended."""
    if _delta_cost(delta) <= most:
        yield delta
        return
    length = max(1, most // _token_cost(delta.logprobs))
    text = delta.text
    for begin in range(0, len(delta.token_ids), length):
        end = begin + length
        logprobs = None if delta.logprobs is None else delta.logprobs[begin:end]
        own = None if delta.token_logprobs is None else delta.token_logprobs[begin:end]
        part = replace(delta, token_ids=delta.token_ids[begin:end], logprobs=logprobs, token_logprobs=own, text=text)
        if end < len(delta.token_ids):
            part.finish_reason = part.stop_reason = None
        text = ""
        yield part


def _pooled_parts(pooled: PooledData, most: int) -> Iterator[PooledData]:
    length = most * _BYTES_PER_TOKEN
    for begin in range(0, len(pooled.data), length):
        yield replace(pooled, data=pooled.data[begin : begin + length])
