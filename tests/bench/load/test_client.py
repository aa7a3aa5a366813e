import asyncio
import itertools
import os
import signal
import time
from array import array
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

import pytest
from tests.bench.load.scripted_server import Exchange, Script, Server, scripted, text, three_tokens, usage

from hasten.bench.load.client import ClientOptions, LoadClient, Ran, Run
from hasten.bench.load.processes import LoadClients, _divided
from hasten.bench.load.reply import Record
from hasten.bench.load.target import Target, find_target
from hasten.bench.load.workload import Conversation, Turn
from hasten.core.errors import EngineError


def target_of(server: Server, api: str = "openai", **extra: Any) -> Target:
    return find_target(api, server.url, None, {}, {"temperature": 0.0}, extra)


def single(*times: float) -> list[Conversation]:
    return [Conversation([Turn("once", 3)], at) for at in times]


def run(options: ClientOptions, conversations: list[Conversation], **more: Any) -> tuple[float, Ran]:
    """A run in this process; the time at which it began."""

    async def go() -> tuple[float, Ran]:
        client = LoadClient(options)
        part = Run(conversations=conversations, **more)
        prepared, start = client.prepared(part), time.perf_counter()
        try:
            return start, await client.run(part, prepared, start)
        finally:
            await client.aclose()

    return asyncio.run(go())


def ordered(records: list[Record]) -> list[Record]:
    return sorted(records, key=lambda record: record.due)


def by_arrival(server: Server) -> list[Exchange]:
    return sorted(server.completions, key=lambda exchange: exchange.arrived)


def test_the_times_of_a_request_are_those_of_the_server() -> None:
    with scripted() as server:
        start, ran = run(ClientOptions(target=target_of(server)), single(0.0))
        (record,), (exchange,) = ran.records, server.completions
    seen, sent = record.times, exchange.sent
    assert start <= record.due <= record.sent < exchange.arrived < sent[0]
    assert all(before < after for before, after in zip(sent[:3], seen, strict=True))
    assert seen[2] == record.last <= record.end
    assert (record.input_tokens, record.output_tokens, record.error) == (5, 3, "")
    assert exchange.body == {
        "model": "scripted",
        "temperature": 0.0,
        "stream": True,
        "stream_options": {"include_usage": True},
        "prompt": "once",
        "max_tokens": 3,
    }


def test_requests_are_sent_when_they_are_due_whatever_became_of_others() -> None:
    release = asyncio.Event()

    async def hold_the_first(script: Script) -> None:
        if len(server.completions) == 4:
            release.set()
        if script.exchange.body["prompt"] == "0":
            await release.wait()
        await three_tokens(script)

    conversations = [Conversation([Turn(f"{number}", 3)], number * 0.05) for number in range(4)]
    with scripted(hold_the_first) as server:
        start, ran = run(ClientOptions(target=target_of(server)), conversations)
    records = ordered(ran.records)
    exchanges = sorted(server.completions, key=lambda exchange: exchange.body["prompt"])
    assert [round(record.due - start, 6) for record in records] == [0.0, 0.05, 0.1, 0.15]
    assert all(record.due <= record.sent < each.arrived for record, each in zip(records, exchanges, strict=True))
    # the first was answered only after the last had arrived
    assert records[0].times[0] > max(exchange.arrived for exchange in exchanges)
    assert all(record.ready == record.due for record in records)


def most_at_once(records: list[Record]) -> int:
    changes = sorted([(record.sent, 1) for record in records] + [(record.end, -1) for record in records])
    return max(itertools.accumulate(step for _, step in changes))


def test_a_maximum_concurrency_holds_requests_back_and_says_so() -> None:
    with scripted() as server:
        start, ran = run(ClientOptions(target=target_of(server), max_concurrency=2), single(*[0.0] * 6))
    assert most_at_once(ran.records) == 2
    assert [record.due for record in ran.records] == [start] * 6
    held = [record for record in ran.records if record.ready > start]
    assert len(held) == 4
    ends = sorted(record.end for record in ran.records)
    assert all(record.ready >= ends[0] for record in held)


def test_without_a_rate_requests_are_due_when_another_has_ended() -> None:
    with scripted() as server:
        options = ClientOptions(target=target_of(server), max_concurrency=1)
        start, ran = run(options, single(*[0.0] * 3), waits_for_slots=True)
    assert ran.records[0].due == start
    pairs = itertools.pairwise(ran.records)
    assert all(before.end <= after.due == after.ready <= after.sent for before, after in pairs)


def test_a_duration_ends_the_sending() -> None:
    with scripted() as server:
        options = ClientOptions(target=target_of(server), max_concurrency=1)
        start, ran = run(options, single(*[0.0] * 50), waits_for_slots=True, duration=0.2)
    assert 1 <= len(ran.records) < 50
    assert all(record.due < start + 0.2 for record in ran.records)
    assert not any(record.error for record in ran.records)


@pytest.mark.parametrize("api", ["openai", "openai-chat"])
def test_turns_follow_the_answers_to_those_before(api: str) -> None:
    async def chat(script: Script) -> None:
        script.head()
        for piece in ({"role": "assistant", "content": ""}, {"content": "Hello"}, {"content": "."}):
            script.send({"choices": [{"index": 0, "delta": piece}]})
        script.send(usage(5, 2), "[DONE]")
        script.end()

    turns = [Turn("First", 3), Turn("Second", 4), Turn("Third", 5)]
    with scripted(chat if api == "openai-chat" else three_tokens) as server:
        options = ClientOptions(target=target_of(server, api), think_time=0.02)
        _, ran = run(options, [Conversation(turns)])
    exchanges, records = by_arrival(server), ordered(ran.records)
    assert len(records) == 3
    assert all(after.due == before.end + 0.02 <= after.sent for before, after in itertools.pairwise(records))
    last = exchanges[2].body
    if api == "openai":
        assert last["prompt"] == "Firstone two three\nSecondone two three\nThird"
        assert last["max_tokens"] == 5
        return
    assert [message["content"] for message in last["messages"]] == ["First", "Hello.", "Second", "Hello.", "Third"]
    assert [message["role"] for message in last["messages"]] == ["user", "assistant"] * 2 + ["user"]
    assert last["max_completion_tokens"] == 5
    assert all(len(record.times) == 2 for record in records), "an event without text is no token"


async def _refused(script: Script) -> None:
    script.whole("503 Service Unavailable", {"error": {"message": "the queue is full"}})


async def _error_event(script: Script) -> None:
    script.head()
    script.send(text("one"), {"error": {"message": "the engine died", "code": None}})
    script.end()


async def _no_json(script: Script) -> None:
    script.head()
    script.send("{broken")
    script.end()


async def _nothing(script: Script) -> None:
    script.head()
    script.send("[DONE]")
    script.end()


async def _never(script: Script) -> None:
    script.head()
    await asyncio.Event().wait()


@pytest.mark.parametrize(
    ("answer", "error", "message"),
    [
        (_refused, "HTTP 503", "the queue is full"),
        (_error_event, "error in the stream", "the engine died"),
        (_no_json, "invalid event", "an event is not of OpenAI's form"),
        (_nothing, "empty stream", "the stream ended without any output"),
        (_never, "timeout", "no complete answer within 0.2 s"),
    ],
)
def test_failures_have_a_kind(answer: Callable[[Script], Awaitable[None]], error: str, message: str) -> None:
    with scripted(answer) as server:
        options = ClientOptions(target=target_of(server), timeout=0.2 if answer is _never else 60.0)
        _, ran = run(options, [Conversation([Turn("once", 3), Turn("more", 3)])])
    (record,) = ran.records
    assert record.error == error
    assert message in record.message
    assert record.end >= record.sent > 0


def test_what_the_server_does_not_count_is_kept_for_a_tokenizer() -> None:
    async def uncounted(script: Script) -> None:
        script.head()
        script.send(text("one"), text(" two"), "[DONE]")
        script.end()

    with scripted(uncounted) as server:
        _, ran = run(ClientOptions(target=target_of(server, stream_options=None, user="me")), single(0.0))
        body = server.completions[0].body
    (record,) = ran.records
    assert (record.output_tokens, record.output, record.prompt) == (None, "one two", "once")
    assert "stream_options" not in body
    assert body["user"] == "me"


def test_a_stream_without_text_has_the_times_of_its_events() -> None:
    async def blank(script: Script) -> None:
        script.head()
        script.send(text(""), text(""), usage(1, 2), "[DONE]")
        script.end()

    with scripted(blank) as server:
        _, ran = run(ClientOptions(target=target_of(server)), single(0.0))
    assert len(ran.records[0].times) == 2


def test_processes_share_a_run() -> None:
    seen: list[int] = []
    with scripted() as server, LoadClients(ClientOptions(target=target_of(server)), 2) as clients:
        first = clients.run(single(0.0, 0.01, 0.02), progress=seen.append)
        second = clients.run(single(0.0))
    assert [len(each.records) for each in first] == [2, 1]
    assert [len(each.records) for each in second] == [1, 0]
    assert len(server.completions) == 4
    assert all(isinstance(record.times, array) for each in first for record in each.records)
    assert all(each.cpu_share >= 0 for each in first)
    assert seen == sorted(seen)
    assert seen[-1] <= 3


def test_a_maximum_concurrency_is_divided_among_processes() -> None:
    assert _divided(None, 3) == [None, None, None]
    assert _divided(7, 3) == [3, 2, 2]
    assert _divided(2, 4) == [1, 1]


def test_a_client_process_that_dies_is_an_error() -> None:
    async def kill(script: Script) -> None:
        os.kill(clients._children[0]._process.pid or 0, signal.SIGKILL)

    died = pytest.raises(EngineError, match="a client process ended with status -9")
    with scripted(kill) as server, LoadClients(ClientOptions(target=target_of(server)), 1) as clients, died:
        clients.run(single(0.0))


def test_an_interrupt_ends_client_processes_in_the_middle_of_a_run() -> None:
    def interrupt(done: int) -> None:
        if server.completions:
            raise KeyboardInterrupt

    with scripted(_never) as server:
        clients = LoadClients(ClientOptions(target=target_of(server)), 2)
        with pytest.raises(KeyboardInterrupt), clients:
            clients.run(single(0.0, 0.0), progress=interrupt)
    assert [child._process.exitcode for child in clients._children] == [-signal.SIGTERM] * 2


def test_client_processes_end_with_their_parent() -> None:
    with scripted() as server:
        options = replace(ClientOptions(target=target_of(server)), max_concurrency=2)
        with LoadClients(options, 2) as clients:
            processes = [child._process for child in clients._children]
        assert [process.exitcode for process in processes] == [0, 0]
