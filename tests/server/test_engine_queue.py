"""The queue by itself, and in front of a real engine that runs one sequence."""

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
from tests.server.engine_helpers import LONG, SHORT, begin, collect, count, error_of, joined, stopped, until
from tests.waiting import LIMIT_S, attempts

from hasten.core.config import EngineConfig
from hasten.core.errors import EngineError
from hasten.core.types import FinishReason, SamplingParams
from hasten.server.engine.client import EngineClient
from hasten.server.engine.queue import QueueFullError, QueueLimits, QueueTimeoutError, QueueWaitError, RequestQueue
from hasten.server.engine.ticket import Progress, Ticket
from hasten.server.engine.wire import CompletionDelta, Logprob, Output


def ticket(number: int, *, width: int = 1, priority: int = 0) -> Ticket:
    return Ticket(number, (1, 2), width, bytearray(), priority)


def queue(places: int, limit: int = 0) -> RequestQueue:
    result = RequestQueue(QueueLimits(max_queue_size=limit))
    result.engines[0].attach(places, 0, 16)
    return result


def sent(requests: RequestQueue) -> list[int]:
    return [ticket.number for ticket in requests.assign_next()]


def test_the_engine_gets_what_it_can_run_and_an_eighth_more() -> None:
    requests = queue(16)
    for number in range(30):
        requests.put(ticket(number))
    assert sent(requests) == list(range(18))
    assert sent(requests) == []
    first = requests.engines[0].get(0)
    assert first is not None
    assert requests.remove(first)
    assert sent(requests) == [18]
    assert requests.num_waiting == 11


def test_order_is_by_priority_then_by_arrival() -> None:
    requests = queue(1)
    requests.put(ticket(0))
    assert sent(requests) == [0]
    for number, priority in enumerate([0, 3, 1, 2, 0, 1], start=1):
        requests.put(ticket(number, priority=priority))
    order = []
    while not requests.is_empty:
        order += sent(requests)
        oldest = min(number for number in range(10) if requests.engines[0].get(number))
        leaving = requests.engines[0].get(oldest)
        assert leaving is not None
        requests.remove(leaving)
    assert order == [3, 6, 1, 5, 4, 2]


def test_wide_requests_count_as_many_and_do_not_wait_for_an_empty_engine() -> None:
    requests = queue(8)
    requests.put(ticket(1, width=5))
    requests.put(ticket(2, width=5))
    requests.put(ticket(3))
    assert sent(requests) == [1, 2]
    wide = requests.engines[0].get(1)
    assert wide is not None
    requests.remove(wide)
    assert sent(requests) == [3]


def test_the_limit_counts_those_that_wait_here_and_in_the_engine() -> None:
    requests = queue(2, limit=3)
    for number in range(5):  # two run, one waits with the engine, two here
        requests.put(ticket(number))
        sent(requests)
    assert requests.num_waiting == 2
    with pytest.raises(QueueFullError, match="3 requests wait already, and max_queue_size is 3"):
        requests.put(ticket(5))
    begun = requests.engines[0].get(2)
    assert begun is not None
    begun.begin(0.0)
    requests.put(ticket(5))


def test_a_limit_refuses_nobody_who_need_not_wait() -> None:
    requests = queue(2, limit=1)
    for number in range(100):
        entered = ticket(number)
        requests.put(entered)
        assert sent(requests) == [number]
        requests.remove(entered)


def test_the_bytes_of_those_that_wait_are_limited() -> None:
    requests = RequestQueue(QueueLimits(max_queue_bytes=100))
    requests.engines[0].attach(1, 0, 16)

    def of(number: int, size: int) -> Ticket:
        result = ticket(number)
        result.frame = bytearray(size)
        return result

    requests.put(of(1, 1000))  # it need not wait
    assert sent(requests) == [1]
    waiting = [of(2, 60), of(3, 40)]
    for each in waiting:
        requests.put(each)
    with pytest.raises(QueueFullError, match="requests of 100 bytes wait already, and max_queue_bytes is 100"):
        requests.put(of(4, 1))
    requests.remove(waiting[0])
    requests.put(of(5, 60))
    with pytest.raises(QueueFullError):
        requests.put(of(6, 1))
    running = requests.engines[0].get(1)
    assert running is not None
    requests.remove(running)
    assert sent(requests) == [3, 5]
    requests.put(of(7, 40))
    requests.take_all()
    requests.put(of(8, 1))
    requests.put(of(9, 99))


def test_requests_leave_from_wherever_they_stand() -> None:
    requests = queue(1)
    tickets = [ticket(number, priority=number % 3) for number in range(6)]
    for each in tickets:
        requests.put(each)
    there = sent(requests)
    for each in tickets:
        assert (requests.remove(each) is not None) is (each.number in there)
        assert requests.remove(each) is None
    assert requests.is_empty
    requests.put(tickets[0])
    assert sent(requests) == [0]


def delta(index: int, tokens: list[int], reason: FinishReason | None = None) -> CompletionDelta:
    tops = [{token: Logprob(-1.0, 1)} for token in tokens]
    return CompletionDelta(index, tokens, "".join(map(str, tokens)), tops, -float(tokens[-1]), reason, None)


def test_what_a_slow_reader_has_not_taken_becomes_one_progress() -> None:
    async def read() -> tuple[Progress, Progress]:
        slow = ticket(1)
        slow.begin(slow.arrived + 0.25)
        slow.push(Output(1, [delta(0, [1])], False, [None]))
        slow.push(Output(1, [delta(1, [5]), delta(0, [2, 3])], False))
        first = await slow.read()
        slow.push(Output(1, [delta(0, [4], FinishReason.LENGTH)], True))
        return first, await slow.read()

    first, last = asyncio.run(read())
    assert first.completions == [delta(0, [1, 2, 3]), delta(1, [5])]
    assert (first.prompt_token_ids, first.prompt_logprobs, first.queue_seconds) == ((1, 2), [None], 0.25)
    assert (last.prompt_token_ids, last.prompt_logprobs, last.queue_seconds) == ((), None, None)
    assert last.completions == [delta(0, [4], FinishReason.LENGTH)]
    assert (first.finished, last.finished) == (False, True)


def test_an_error_comes_after_what_came_before_it() -> None:
    async def read() -> None:
        failing = ticket(1)
        failing.push(Output(1, [delta(0, [1])], False))
        failing.fail(EngineError("gone"))
        assert (await failing.read()).completions == [delta(0, [1])]
        with pytest.raises(EngineError, match="gone"):
            await failing.read()

    asyncio.run(read())


@pytest.fixture(scope="module")
def narrow(run: Any, demo_model: Path) -> Iterator[EngineClient]:
    """An engine that runs one sequence, and takes one more; six may wait."""
    config = EngineConfig.create(str(demo_model), max_num_seqs=1)
    client = run(EngineClient.start(config, QueueLimits(max_queue_size=6), name="narrow"))
    yield client
    run(client.close())


@asynccontextmanager
async def occupied(client: EngineClient) -> AsyncIterator[None]:
    """Meanwhile the engine has a request that it does not go on with: its process stands still until the end.

    It takes one more request, and does not count it as waiting before it goes on.
    """
    for _ in attempts("a request that is held before it has ended"):
        async with aclosing(await begin(client, [5], LONG)) as running:
            with stopped(client):
                await asyncio.sleep(0.05)  # what the process had sent is read
                if client.stats().running == 1:
                    yield
                    await running.aclose()
                    return


def test_more_than_may_wait_are_refused(run: Any, narrow: EngineClient) -> None:
    async def ask() -> None:
        async with asyncio.TaskGroup() as group:
            async with occupied(narrow):
                waiting = [group.create_task(collect(narrow, [number + 6], SHORT)) for number in range(6)]
                await until(lambda: narrow.stats().waiting == 5)
                with pytest.raises(QueueFullError, match="6 requests wait already, and max_queue_size is 6"):
                    await collect(narrow, [5], SHORT)
                waiting.pop().cancel()
                waiting.pop(0).cancel()
                await until(lambda: narrow.stats().waiting == 3)
                waiting.append(group.create_task(collect(narrow, [5], SHORT)))
                await until(lambda: narrow.stats().waiting == 4)
            done = [await task for task in waiting]
            assert [count(progress) for progress in done] == [4] * 5
            waited = [progress[0].queue_seconds or 0.0 for progress in done]
            assert min(waited) > 0
            assert waited[:4] == sorted(waited[:4])  # they came together

    run(ask())
    assert narrow.stats().waiting == 0


def test_who_waits_too_long_is_told_so(run: Any, narrow: EngineClient) -> None:
    async def ask() -> None:
        for _ in attempts("requests that expire behind one that goes on"):
            async with aclosing(await begin(narrow, [5], LONG)):  # what waits in the engine's process expires there
                narrow._queue.engines[0].attach(1, 0, 16)  # nothing is measured, so nobody is refused before
                began, refused = time.monotonic(), narrow.refused["queue_timeout"]
                requests = [collect(narrow, [number + 6], SHORT, timeout=0.05) for number in range(3)]
                errors = await asyncio.gather(*map(error_of, requests))
                assert time.monotonic() - began >= 0.05
                if (narrow.stats().running, narrow.stats().waiting) == (1, 0) and all(errors):
                    break
        for error in errors:  # the first of them waited in the engine's process
            assert isinstance(error, QueueTimeoutError)
            assert "not begun within 0.05 s" in str(error)
        assert narrow.refused["queue_timeout"] == refused + 3

    run(ask())


def test_who_would_wait_too_long_is_refused_at_once(run: Any, narrow: EngineClient) -> None:
    async def ask() -> None:
        for _ in attempts("a wait that is estimated and told while a request runs"):
            running = await begin(narrow, [5], LONG)
            await until(lambda: narrow.estimated_wait() is not None)
            waits = narrow.estimated_wait() or 0.0
            error = await error_of(collect(narrow, [6], SHORT, timeout=waits / 100)) if waits > 0.01 else None
            if error is not None and getattr(error, "retry_after", 0.0) > waits / 2:
                break
            await running.aclose()
        async with asyncio.TaskGroup() as group, aclosing(running):
            assert isinstance(error, QueueWaitError)
            assert "the request would wait for about" in str(error)
            assert narrow.refused["queue_wait"] >= 1
            patient = [group.create_task(collect(narrow, [at], SHORT, timeout=LIMIT_S)) for at in (7, 8)]
            await until(lambda: narrow.stats().waiting == 2 or all(task.done() for task in patient))
            await running.aclose()
            assert [count(await task) for task in patient] == [4, 4]
            assert narrow.estimated_wait() == 0

    run(ask())


def test_who_was_begun_in_time_is_not_timed_out(run: Any, narrow: EngineClient) -> None:
    """Although the engine can say so only after its first step, here one of more than a second."""
    prompt = [number % 1000 + 5 for number in range(2000)]
    params = SamplingParams(max_tokens=2, ignore_eos=True, prompt_logprobs=50)

    async def ask() -> None:
        engine = psutil.Process(narrow.replicas[0].pid)
        for _ in attempts("a request in its first step"):
            before = engine.cpu_times().user
            request = asyncio.create_task(collect(narrow, prompt, params, timeout=1000))
            await until(lambda before=before: engine.cpu_times().user > before + 0.2)  # type: ignore[misc]
            sent = list(narrow._queue.engines[0]._tickets.values())
            for each in sent:
                narrow._expire(each)
            assert joined(await request).completions[0].finish_reason is FinishReason.LENGTH
            if sent:
                break

    run(ask())


def test_order_of_those_who_wait(run: Any, narrow: EngineClient) -> None:
    finished: list[int] = []

    async def ask(priority: int) -> None:
        await collect(narrow, [priority + 5], SHORT, priority=priority, stream=False)
        finished.append(priority)

    async def ask_all() -> None:
        async with asyncio.TaskGroup() as group, occupied(narrow):
            for priority in (9, 3, 0, 2, 1, 4):
                group.create_task(ask(priority))
            await until(lambda: narrow.stats().waiting == 5)

    run(ask_all())
    assert finished == [9, 1, 0, 2, 3, 4]  # 9 was with the engine already, as next
