"""What goes to the server with each step, for readers that keep up and for readers that do not."""

from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import pytest

from hasten.core.types import CompletionOutput, FinishReason, RequestOutput, SamplingParams
from hasten.engine.llm import LLM
from hasten.engine.request_state import RequestState
from hasten.server.engine import process
from hasten.server.engine.coalescer import Deltas, OutputCoalescer, pause_per_cpu_second
from hasten.server.engine.process import EngineLoop
from hasten.server.engine.wire import Acknowledge, Add, Step


class Reader:
    """The server's end of an engine's channel, which takes no time of its own: it acknowledges when it is to."""

    def __init__(self, requests: list[Add], acknowledges: Callable[["Reader"], bool]) -> None:
        self.steps: list[Step] = []
        self.closed = False
        self._left = {request.id for request in requests}
        self._messages: list[Add | Acknowledge] = list(requests)
        self._acknowledges = acknowledges
        self._open = 0

    def receive(self, *, wait: bool) -> list[Add | Acknowledge]:
        if self._open and self._acknowledges(self):
            self._messages.append(Acknowledge(self._open, 0.0))
            self._open = 0
        assert self._messages or not wait, "the engine waits although the server has nothing to say"
        messages, self._messages = self._messages, []
        return messages

    def send(self, step: Step) -> None:
        self.steps.append(step)
        self._open += 1
        self._left -= {output.id for output in step.outputs if output.finished}
        self.closed = not self._left

    def pieces(self, number: int) -> list[list[int]]:
        """The tokens of a request as they came."""
        outputs = [output for step in self.steps for output in step.outputs if output.id == number]
        return [delta.token_ids for output in outputs for delta in output.completions]


def served(
    llm: LLM, count: int, acknowledges: Callable[[Reader], bool], coalescer: OutputCoalescer, *, stream: bool = True
) -> Reader:
    """A reader that has got 16 tokens of each of some requests."""
    params = SamplingParams(max_tokens=16, temperature=0, ignore_eos=True)
    reader = Reader(
        [Add(number, (number + 5,), params.given(), stream=stream) for number in range(count)], acknowledges
    )
    channel: Any = reader
    EngineLoop(llm.engine, channel, coalescer).run()
    return reader


@pytest.mark.parametrize("count", [1, 64])
def test_a_reader_that_keeps_up_gets_every_token_by_itself(demo_llm: LLM, count: int) -> None:
    reader = served(demo_llm, count, lambda _: True, OutputCoalescer())
    assert all([len(piece) for piece in reader.pieces(number)] == [1] * 16 for number in range(count))


def test_a_reader_that_does_not_gets_the_first_token_at_once_and_the_others_joined(demo_llm: LLM) -> None:
    quick = served(demo_llm, 2, lambda _: True, OutputCoalescer())
    reader = served(demo_llm, 2, lambda _: False, OutputCoalescer())
    for number in range(2):
        assert [len(piece) for piece in reader.pieces(number)] == [1, 15]
        assert [*chain(*reader.pieces(number))] == [*chain(*quick.pieces(number))]


def test_a_reader_may_be_a_window_of_messages_behind(demo_llm: LLM) -> None:
    reader = served(demo_llm, 2, lambda _: False, OutputCoalescer(window=4))
    assert [len(piece) for piece in reader.pieces(1)] == [1, 1, 1, 13]


def test_a_reader_that_returns_gets_all_that_is_pending(demo_llm: LLM) -> None:
    begin = demo_llm.engine.stats.steps

    def returns(reader: Reader) -> bool:
        return demo_llm.engine.stats.steps >= begin + 8

    reader = served(demo_llm, 3, returns, OutputCoalescer())
    assert [len(piece) for piece in reader.pieces(2)] == [1, 7, *[1] * 8]


def test_a_single_stream_pauses_for_nothing(demo_llm: LLM) -> None:
    coalescer = OutputCoalescer(pause_per_cpu_second=1e9)
    coalescer.acknowledge(0, 1.0, now=0.0)
    assert [len(piece) for piece in served(demo_llm, 1, lambda _: True, coalescer).pieces(0)] == [1] * 16
    coalescer.acknowledge(0, 1e6, now=0.0)
    assert [len(piece) for piece in served(demo_llm, 2, lambda _: True, coalescer).pieces(0)] == [1, 15]


def test_streams_pause_for_what_they_cost_where_the_engine_wants_all_cores() -> None:
    assert pause_per_cpu_second(cores=16, engine_threads=1) == 0
    assert pause_per_cpu_second(cores=2, engine_threads=1) == 0
    pause = pause_per_cpu_second(cores=2, engine_threads=2)
    assert pause == pytest.approx(20)
    coalescer = OutputCoalescer(pause)
    for number in range(2):
        coalescer.begin(number, stream=True)
    assert coalescer.is_due(0.0)
    coalescer.sent()
    assert not coalescer.is_due(100.0)
    coalescer.acknowledge(1, 0.01, now=1.0)
    assert not coalescer.is_due(1.19)
    assert coalescer.is_due(1.21)


@pytest.mark.parametrize(("cpu_seconds", "pause"), [(0.001, 0.04), (0.003, 0.1), (0.005, 0.1), (0.02, 0.4)])
def test_pauses_are_doubled_while_text_flows(cpu_seconds: float, pause: float) -> None:
    coalescer = OutputCoalescer(pause_per_cpu_second=20)
    for number in range(64):
        coalescer.begin(number, stream=True)
    coalescer.sent()
    coalescer.acknowledge(1, cpu_seconds, now=1.0)
    assert coalescer.is_due(1.001 + pause)
    assert not coalescer.is_due(0.999 + pause)
    coalescer.sent()
    coalescer.sent()
    coalescer.acknowledge(1, 0.0, now=2.0)
    assert not coalescer.is_due(3.0), "one message is on its way"
    coalescer.acknowledge(1, 0.0, now=3.0)
    assert coalescer.is_due(3.0)


@pytest.mark.parametrize(
    ("interval", "stream", "messages", "states"), [(1e9, False, 1, 1), (0.0, False, 17, 17), (1e9, True, 16, 2)]
)
def test_state_alone_is_sent_where_it_is_old_and_where_requests_end(
    demo_llm: LLM, monkeypatch: Any, interval: float, stream: bool, messages: int, states: int
) -> None:
    """And nothing is lost in between: the last message has the state of an idle engine, and all steps are counted."""
    monkeypatch.setattr(process, "_STATE_S", interval)
    before = demo_llm.engine.stats.steps
    steps = served(demo_llm, 1, lambda _: True, OutputCoalescer(), stream=stream).steps
    with_state = [step.stats for step in steps if step.stats is not None]
    assert (len(steps), len(with_state)) == (messages, states)
    assert [step.stats is not None for step in steps if step.started] == [True]
    assert steps[-1].stats == demo_llm.engine.stats
    assert demo_llm.engine.stats.running == 0
    assert sum(len(step.computed) for step in steps) == demo_llm.engine.stats.steps - before == 16


def test_that_requests_were_begun_is_told_at_once_where_no_place_is_left(tiny_bloom: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(process, "_STATE_S", 1e9)
    with LLM(tiny_bloom, device="cpu", max_num_seqs=2) as llm:
        steps = served(llm, 3, lambda _: True, OutputCoalescer(), stream=False).steps
    assert [set(step.started) for step in steps if step.started] == [{0, 1}, {2}]
    assert [len(step.outputs) for step in steps] == [0, 2, 1]


def grown(number: int, count: int, *, finished: bool = False) -> RequestOutput:
    return RequestOutput(str(number), None, [5], [CompletionOutput(0, "", list(range(count)))], finished=finished)


def test_first_and_last_tokens_do_not_wait_for_the_others() -> None:
    def taken(*, everything: bool) -> dict[int, list[int]]:
        return {output.id: output.completions[0].token_ids for output in coalescer.take(everything=everything)}

    coalescer = OutputCoalescer()

    def put(number: int, count: int, *, finished: bool = False) -> None:
        coalescer.put(number, lambda: grown(number, count, finished=finished), finished=finished)

    for number in (1, 2, 3, 4):
        coalescer.begin(number, stream=True)
        put(number, 1)
    assert taken(everything=False) == {1: [0], 2: [0], 3: [0], 4: [0]}
    assert taken(everything=True) == {}
    for number in (1, 2, 3):
        put(number, 2)
    put(1, 3)
    put(2, 3, finished=True)
    assert taken(everything=False) == {2: [1, 2]}
    coalescer.forget(3)
    assert taken(everything=True) == {1: [1, 2]}
    assert taken(everything=True) == {}


def test_text_is_made_when_it_is_sent(demo_llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    shown, original = [], RequestState.shown

    def counted(state: RequestState) -> RequestOutput:
        shown.append(state.request.request_id)
        return original(state)

    monkeypatch.setattr(RequestState, "shown", counted)
    quick = served(demo_llm, 2, lambda _: True, OutputCoalescer())
    assert len(shown) == 2 * 16
    shown.clear()
    slow = served(demo_llm, 2, lambda _: False, OutputCoalescer())
    assert len(shown) == 2 * 2
    assert [texts(slow, number) for number in range(2)] == [texts(quick, number) for number in range(2)]


def texts(reader: Reader, number: int) -> str:
    outputs = [output for step in reader.steps for output in step.outputs if output.id == number]
    return "".join(delta.text for output in outputs for delta in output.completions)


def test_deltas_add_up() -> None:
    def output(*completions: CompletionOutput, finished: bool = False) -> RequestOutput:
        return RequestOutput("1", None, [5], list(completions), [None], finished)

    deltas = Deltas()
    first = deltas.take(1, output(CompletionOutput(0, "a", [1]), CompletionOutput(1, "", [])))
    assert [(delta.index, delta.token_ids, delta.text) for delta in first.completions] == [(0, [1], "a")]
    assert first.prompt_logprobs == [None]
    ended = CompletionOutput(1, "xy", [7, 8], finish_reason=FinishReason.STOP)
    second = deltas.take(1, output(CompletionOutput(0, "abc", [1, 2, 3]), ended))
    assert [(delta.index, delta.token_ids, delta.text) for delta in second.completions] == [
        (0, [2, 3], "bc"),
        (1, [7, 8], "xy"),
    ]
    assert second.prompt_logprobs is None
    last = CompletionOutput(0, "abcd", [1, 2, 3], finish_reason=FinishReason.LENGTH)  # text that was held back
    third = deltas.take(1, output(last, ended, finished=True))
    assert [(delta.index, delta.token_ids, delta.text) for delta in third.completions] == [(0, [], "d")]
    assert third.finished
