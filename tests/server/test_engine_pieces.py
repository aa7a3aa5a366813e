"""Large outputs in pieces, put together again by the reader's ticket."""

import asyncio
import random
from collections.abc import Iterable
from copy import deepcopy

import pytest

from hasten.core import types
from hasten.core.errors import EngineError
from hasten.core.types import CompletionOutput, FinishReason, RequestOutput
from hasten.server.engine.coalescer import OutputCoalescer
from hasten.server.engine.pieces import MAX_COST, cost, split
from hasten.server.engine.ticket import Progress, Ticket
from hasten.server.engine.wire import CompletionDelta, Logprob, Output, PooledData


def entries(rng: random.Random, count: int, width: int) -> list[dict[int, Logprob]]:
    return [
        {token: Logprob(-rng.random(), token + 1, str(token)) for token in range(first, first + width)}
        for first in range(count)
    ]


def output(rng: random.Random) -> Output:
    """Of some completions with any number of tokens and log-probabilities, and perhaps those of the prompt."""
    width, deltas = rng.choice([0, 1, 5]), []
    for index in range(rng.randint(1, 4)):
        count = rng.choice([0, 1, 30, 200])
        delta = CompletionDelta(index, list(range(count)), "x" * count, entries(rng, count, width) if width else None)
        delta.cumulative_logprob = -float(count)
        if rng.random() < 0.5:
            delta.finish_reason, delta.stop_reason = FinishReason.STOP, "x"
        deltas.append(delta)
    prompt = [None, *entries(rng, rng.choice([0, 70]), width or 1)] if rng.random() < 0.5 else None
    return Output(7, deltas, rng.random() < 0.5, prompt)


def read(outputs: Iterable[Output]) -> Progress:
    """What a reader gets who reads after each of them: nothing before the last."""

    async def whole() -> Progress:
        ticket = Ticket(7, (1, 2), 1, bytearray(), arrived=0.5, begun=1.0)
        reading = asyncio.create_task(ticket.read())
        *before, last = outputs
        for piece in before:
            ticket.push(piece)
            ticket.wake()
            await asyncio.sleep(0)
            assert not reading.done()
        ticket.push(last)
        ticket.wake()
        return await reading

    return asyncio.run(whole())


@pytest.mark.parametrize("seed", range(40))
def test_pieces_are_the_whole(seed: int) -> None:
    rng = random.Random(seed)
    whole, most = output(rng), rng.choice([3, 50, 1000])
    pieces = split(deepcopy(whole), most)
    assert all(cost(piece) <= max(most, 1 + 10 * 5) for piece in pieces)
    assert [piece.partial for piece in pieces] == [True] * (len(pieces) - 1) + [False]
    assert read(pieces) == read([whole])


def test_who_lacks_the_last_piece_gets_the_error_that_ended_the_request() -> None:
    async def check() -> None:
        ticket = Ticket(7, (1, 2), 1, bytearray())
        ticket.push(Output(7, [CompletionDelta(0, [1], "a")], False))
        assert (await ticket.read()).completions[0].text == "a"
        ticket.push(Output(7, [CompletionDelta(0, [2], "b")], False, partial=True))
        ticket.fail(EngineError("it died"))
        with pytest.raises(EngineError, match="it died"):
            await ticket.read()

    asyncio.run(check())


def test_what_is_small_stays_as_it_is() -> None:
    result = Output(7, [CompletionDelta(0, [1, 2], "ab")], False)
    assert split(result) == [result]
    assert split(result)[0] is result


def large(number: int, count: int) -> RequestOutput:
    """The whole output of a request, with log-probabilities."""
    logprobs = [{token: types.Logprob(-1.0, token, None) for token in range(20)} for _ in range(count)]
    completion = CompletionOutput(0, "x", list(range(count)), logprobs=logprobs, finish_reason=FinishReason.LENGTH)
    return RequestOutput(str(number), None, [5], [completion], finished=True)


def small(number: int, count: int) -> RequestOutput:
    return RequestOutput(str(number), None, [5], [CompletionOutput(0, "", list(range(count)))])


def put(coalescer: OutputCoalescer, output: RequestOutput) -> None:
    coalescer.put(int(output.request_id), lambda: output, finished=output.finished)


def test_a_large_output_delays_no_other_and_is_sent_as_fast_as_the_server_takes_it() -> None:
    coalescer = OutputCoalescer(window=2)
    coalescer.begin(1, stream=False)
    coalescer.begin(2, stream=True)
    put(coalescer, large(1, 2000))
    tokens, messages = 0, 0
    for count in range(1, 100):
        put(coalescer, small(2, count))
        outputs = coalescer.take(everything=True)
        coalescer.sent()
        assert sum(map(cost, outputs)) <= MAX_COST
        assert [output.completions[0].token_ids for output in outputs if output.id == 2] == [[count - 1]]
        pieces = [output for output in outputs if output.id == 1]
        tokens += sum(len(piece.completions[0].token_ids) for piece in pieces)
        messages += bool(pieces)
        if pieces and not pieces[-1].partial:
            assert pieces[-1].finished
            break
        if count % 2 == 0:  # the window is full
            assert not coalescer.goes_on
            coalescer.acknowledge(2, 0.0, 0.0)
        assert coalescer.goes_on
    assert tokens == 2000
    assert messages == 5
    assert not coalescer.goes_on


def test_a_request_that_is_forgotten_is_sent_no_further() -> None:
    coalescer = OutputCoalescer(window=100)
    for number in (1, 2):
        coalescer.begin(number, stream=False)
        put(coalescer, large(number, 2000))
    assert {output.id for output in coalescer.take(everything=True)} == {1}
    coalescer.forget(1)
    assert {output.id for output in coalescer.take(everything=True)} == {2}


def test_many_small_outputs_at_once_are_several_messages() -> None:
    coalescer = OutputCoalescer(window=100)
    for number in range(30):
        coalescer.begin(number, stream=False)
        put(coalescer, large(number, 100))  # each costs 20,100
    found: list[int] = []
    while not found or coalescer.goes_on:
        outputs = coalescer.take(everything=True)
        assert sum(map(cost, outputs)) <= MAX_COST
        found += [output.id for output in outputs]
    assert sorted(found) == list(range(30))


def test_numbers_of_a_text_come_in_pieces() -> None:
    data = random.Random(0).randbytes(48 * 700 * 4)
    whole = Output(7, [], True, pooled=PooledData(data, rows=700))
    pieces = split(whole, 500)
    assert len(pieces) > 3
    assert max(map(cost, pieces)) <= 501
    assert [piece.partial for piece in pieces] == [True] * (len(pieces) - 1) + [False]
    progress = read(pieces)
    assert progress.finished
    assert progress.pooled == PooledData(data, rows=700)
