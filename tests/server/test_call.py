"""Calls of OpenAI's API over a client whose requests are answered as the test says."""

import asyncio
import json
from collections.abc import Callable, Sequence
from typing import Any, cast

import pytest
from tests.server.service_fixtures import DEMO
from tests.server.turns import Turns

from hasten.core.config import EngineConfig
from hasten.core.errors import EngineError, HastenError, InvalidRequestError
from hasten.core.types import FinishReason, SamplingParams
from hasten.server.by_size import SMALL
from hasten.server.create import model_configs
from hasten.server.engine.client import EngineClient
from hasten.server.engine.group import REQUESTS_PER_TURN
from hasten.server.engine.queue import QueueFullError
from hasten.server.engine.ticket import Ticket
from hasten.server.engine.wire import CompletionDelta, Logprob, Output
from hasten.server.openai.answer import CompletionForm
from hasten.server.openai.call import Call, CallEvents
from hasten.server.openai.choices import CompletionChoices
from hasten.server.openai.models import Found
from hasten.server.openai.types import CompletionRequest, StreamOptions
from hasten.server.repository import MemoryRepository
from hasten.server.sse import BodyWriter
from hasten.server.statistics import FailureReason, ModelCounters
from hasten.server.version import Version

MANY = 10 * REQUESTS_PER_TURN
PARAMS = SamplingParams()


class Client:
    """In place of an EngineClient: tickets that the test fills."""

    def __init__(self, begun: Turns | None = None) -> None:
        self.tickets: list[Ticket] = []
        self.withdrawn: list[Ticket] = []
        self.refused: int | None = None
        """Number of the prompt that is refused."""
        self._begun = begun
        self.counters = ModelCounters()
        description = MemoryRepository(model_configs(EngineConfig.create(str(DEMO)))).describe("fastertransformer")
        assert description is not None
        self.version = Version(description, 1, self.counters, lambda: None)

    async def submit(
        self, prompt: Sequence[int], params: SamplingParams, *, listener: Callable[[], None], **options: Any
    ) -> Ticket:
        if len(self.tickets) == self.refused:
            raise InvalidRequestError("no")
        if self._begun is not None:
            self._begun.count()
        ticket = Ticket(len(self.tickets), tuple(prompt), 1, bytearray(), listener=listener)
        self.tickets.append(ticket)
        return ticket

    def withdraw(self, ticket: Ticket) -> None:
        self.withdrawn.append(ticket)

    def step(self, text: str, number: int = 0, *, finished: bool = False, logprobs: Any = None) -> None:
        """A token of a prompt, as an engine's step brings it."""
        reason = FinishReason.LENGTH if finished else None
        ticket = self.tickets[number]
        ticket.push(Output(number, [CompletionDelta(0, [7], text, logprobs, None, reason)], finished))
        ticket.wake()


class Body:
    """In place of a connection: the events that are written, and whether more may be."""

    def __init__(self) -> None:
        self.writable = True
        self.written: list[str] = []
        """Texts of each write."""
        self.raw = b""
        self.on_writable: Callable[[], None] | None = None

    def listen(self, on_writable: Callable[[], None] | None) -> None:
        self.on_writable = on_writable

    def write(self, data: bytes) -> None:
        self.raw += data
        if texts := [choice["text"] for event in objects(data) for choice in event.get("choices", ())]:
            self.written.append("".join(texts))

    def resume(self) -> None:
        """The client has taken what waited for it."""
        self.writable = True
        assert self.on_writable is not None
        self.on_writable()


def objects(data: bytes) -> list[Any]:
    """The JSON objects of events."""
    lines = [line.removeprefix(b"data: ") for line in data.split(b"\n\n") if line]
    return [json.loads(line) for line in lines if line != b"[DONE]"]


def call_of(client: Client, prompts: int = 1, **fields: Any) -> Call:
    request = CompletionRequest(model="m", prompt="", **fields)
    choices = CompletionChoices(1)
    engine = cast(EngineClient, client)
    return Call(
        request,
        Found("m", engine, client.version.tally),
        [[1, 2]] * prompts,
        PARAMS,
        choices,
        CompletionForm("text_completion", "m", request.stream_options),
    )


async def begun(call: Call, client: Client, body: Body) -> tuple[CallEvents, asyncio.Task[None]]:
    """Events of which the first ones are written, and the task that writes the others."""
    events = CallEvents(call)
    first = asyncio.create_task(events.first())
    while len(client.tickets) < len(call.prompts):
        await asyncio.sleep(0)
    client.step("a")
    body.write(await first)
    writing = asyncio.create_task(events.write(cast(BodyWriter, body)))
    while body.on_writable is None:
        await asyncio.sleep(0)
    return events, writing


def test_few_prompts_begin_and_one_is_answered_in_a_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    async def check() -> None:
        started, answered = Turns(), Turns()
        client = Client(started)
        call, taken = call_of(client, MANY), Call.taken

        def counted(*arguments: Any) -> Any:
            answered.count()
            return taken(*arguments)

        monkeypatch.setattr(Call, "taken", counted)
        answering = asyncio.create_task(call.answer())
        while len(client.tickets) < MANY:
            await asyncio.sleep(0)
        for number in range(MANY):  # all are ready at once
            client.step(str(number), number, finished=True)
        choices = json.loads(await answering)["choices"]
        for turns in (started, answered):
            turns.close()
        assert [choice["text"] for choice in choices] == list(map(str, range(MANY)))
        assert started.most == REQUESTS_PER_TURN
        assert answered.most == 1

    asyncio.run(check())


def test_an_error_of_one_prompt_ends_all() -> None:
    async def check() -> None:
        client = Client()
        client.refused = 40
        with pytest.raises(InvalidRequestError, match="no"):
            await call_of(client, MANY).answer()
        assert client.withdrawn == client.tickets[::-1]
        assert len(client.tickets) == 40

    asyncio.run(check())


def test_events_are_written_by_the_callback_that_brings_them() -> None:
    async def check() -> None:
        client, body = Client(), Body()
        events, writing = await begun(call_of(client), client, body)
        for text in "bcd":
            client.step(text)
            assert body.written[-1] == text  # without a turn of the event loop
        client.step("")  # the beginning of a character
        client.step("e", finished=True)
        assert body.written == list("abcde")
        assert body.raw.endswith(b"data: [DONE]\n\n")
        await writing
        await events.close()
        assert body.on_writable is None
        assert client.withdrawn == client.tickets

    asyncio.run(check())


def test_what_a_client_does_not_take_is_joined() -> None:
    async def check() -> None:
        client, body = Client(), Body()
        events, writing = await begun(call_of(client, 2), client, body)
        body.writable = False
        for text in "bcd":
            client.step(text)
            client.step(text.upper(), 1)
        assert body.written == ["a"]
        body.resume()
        assert body.written == ["a", "bcd", "BCD"]
        client.step("e", finished=True)
        client.step("E", 1, finished=True)
        assert body.written[-2:] == ["e", "E"]
        await writing
        await events.close()

    asyncio.run(check())


def test_many_bytes_are_written_in_several_turns() -> None:
    async def check() -> None:
        client, body = Client(), Body()
        events, writing = await begun(call_of(client), client, body)
        for _ in range(SMALL // 8 + 2):
            client.step("b")
        before = len(body.written)
        assert before <= SMALL // 8 + 2
        client.step("c")
        assert len(body.written) == before
        while len(body.written) == before:
            await asyncio.sleep(0)
        assert body.written[-1].endswith("c")
        client.step("", finished=True)
        await writing
        await events.close()

    asyncio.run(check())


def test_a_large_event_is_made_beside_the_loop_and_others_wait_for_it() -> None:
    async def check() -> None:
        client, body = Client(), Body()
        events, writing = await begun(call_of(client), client, body)
        many = {token: Logprob(-1.0, 1, "x") for token in range(SMALL)}
        client.step("b", logprobs=[many])
        client.step("c", logprobs=[{7: Logprob(-1.0, 1, "c")}])
        assert body.written == ["a"]
        client.step("d", finished=True, logprobs=[{7: Logprob(-1.0, 1, "d")}])
        await writing
        assert body.written == ["a", "b", "cd"]
        assert body.raw.endswith(b"data: [DONE]\n\n")
        await events.close()

    asyncio.run(check())


def test_the_death_of_an_engine_is_the_last_event() -> None:
    async def check() -> None:
        client, body = Client(), Body()
        events, writing = await begun(call_of(client), client, body)
        client.tickets[0].fail(EngineError("it died"))
        await writing
        assert objects(body.raw)[-1]["error"]["message"] == "it died"
        client.tickets[0].fail(EngineError("again"))
        assert b"again" not in body.raw
        await events.close()

    asyncio.run(check())


def test_an_unforeseen_error_is_that_of_the_writer_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    async def check() -> None:
        client, body = Client(), Body()
        events, writing = await begun(call_of(client), client, body)

        def failing(*arguments: Any) -> Any:
            raise ValueError("no")

        monkeypatch.setattr(Call, "taken", failing)
        client.step("b")  # does not raise: it is the engine's callback
        with pytest.raises(ValueError, match="no"):
            await writing
        await events.close()

    asyncio.run(check())


def test_who_leaves_hears_no_more() -> None:
    async def check() -> None:
        client, body = Client(), Body()
        events, writing = await begun(call_of(client), client, body)
        writing.cancel()
        await asyncio.gather(writing, return_exceptions=True)
        await events.close()
        client.step("b")
        assert body.written == ["a"]
        assert client.withdrawn == client.tickets

    asyncio.run(check())


def test_usage_comes_with_the_last_event() -> None:
    async def check() -> None:
        client, body = Client(), Body()
        call = call_of(client, stream_options=StreamOptions(include_usage=True))
        events, writing = await begun(call, client, body)
        client.step("b", finished=True)
        await writing
        *others, last = objects(body.raw)
        assert last["usage"] == {"prompt_tokens": 2, "completion_tokens": 2, "total_tokens": 4}
        assert [event["usage"] for event in others] == [None, None]
        await events.close()

    asyncio.run(check())


def test_a_call_is_counted_as_requests_of_all_transports_are() -> None:
    async def check() -> None:
        client = Client()
        counters = client.counters
        answering = asyncio.create_task(call_of(client, 2).answer())
        while len(client.tickets) < 2:
            await asyncio.sleep(0)
        assert counters.pending == 1
        ending = asyncio.create_task(client.version.end(60.0))
        for number in range(2):
            await asyncio.sleep(0)
            assert not ending.done(), "the version is used"
            client.step("a", number, finished=True)
        await answering
        await ending
        counts = counters.durations.counts
        assert (counts["success"], counters.inference_count, counters.execution_count) == (1, 2, 1)
        assert (counters.pending, counts["queue"], list(counters.batches)) == (0, 1, [2])

    asyncio.run(check())


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (QueueFullError("full"), FailureReason.REJECTED),
        (EngineError("died"), FailureReason.BACKEND),
        (InvalidRequestError("no"), FailureReason.OTHER),
        (None, FailureReason.CANCELED),
    ],
)
def test_a_call_that_fails_is_counted_by_its_reason(error: HastenError | None, reason: FailureReason) -> None:
    async def check() -> None:
        client = Client()
        answering = asyncio.create_task(call_of(client).answer())
        while not client.tickets:
            await asyncio.sleep(0)
        if error is None:
            answering.cancel()
        else:
            client.tickets[0].fail(error)
        await asyncio.wait([answering])
        failures = {each: count for each, count in client.counters.failures.items() if count}
        assert (failures, client.counters.durations.counts["fail"], client.counters.pending) == ({reason: 1}, 1, 0)

    asyncio.run(check())
