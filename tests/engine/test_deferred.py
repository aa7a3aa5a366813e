"""What a start leaves for later: when it is done, on which ranks, and what becomes of it where it fails."""

import threading
from pathlib import Path
from typing import Any

import pytest
from tests.engine.deferring import MARKS, defer_marks
from tests.waiting import LIMIT_S

from hasten import LLM, EngineError, SamplingParams
from hasten.core.errors import CheckpointError
from hasten.engine import launch
from hasten.engine.async_llm import AsyncLLM
from hasten.engine.deferred import Budget, Deferred, Piece, packed, unpacked
from hasten.engine.graphs import Size, Sizes
from hasten.engine.text import Tokenizer
from hasten.server.engine.coalescer import OutputCoalescer
from hasten.server.engine.process import EngineLoop
from hasten.server.engine.wire import Add, Step

PROMPTS = [[5, 6, 7]]
SHORT = SamplingParams(max_tokens=4, temperature=0, ignore_eos=True, detokenize=False)


def test_pieces_are_done_in_order_or_by_number() -> None:
    deferred = Deferred()
    numbers = [deferred.add(Piece(name, lambda: None)) for name in "abc"]
    assert deferred.take(numbers[1]).name == "b"
    assert (deferred.next, numbers[1] in deferred) == (numbers[0], False)
    deferred.take(numbers[0])
    assert deferred.take(numbers[2]).name == "c"
    assert deferred.next is None
    assert [unpacked(packed(number)) for number in numbers] == numbers


def test_pieces_take_a_small_part_of_the_time_where_someone_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    interactive, batch = Budget(interactive=True), Budget(interactive=False)
    for budget in (interactive, batch):
        assert budget.allows
        budget.spend(0.05)
    assert (interactive.allows, batch.allows) == (False, True)
    now[0] += 0.9
    assert not interactive.allows
    now[0] += 0.2
    assert interactive.allows


@pytest.mark.parametrize(
    ("most", "mixed", "first"),
    [
        (256, 1536, [(1536, 256), (256, None), (192, 192), (32, 32), (32, None), (4, None), (1, None)]),
        (1, 0, [(1, None)]),
        (4, 20, [(20, 4), (4, None), (1, None)]),
    ],
)
def test_a_start_waits_for_few_graphs(most: int, mixed: int, first: list[tuple[int, int | None]]) -> None:
    sizes = Sizes.up_to(most, mixed)
    assert sizes.first == [Size(*each) for each in first]
    assert sorted(map(str, [*sizes.first, *sizes.later])) == sorted(map(str, [*sizes.decode, *sizes.mixed]))


def test_a_piece_that_fails_ends_the_engine_and_says_so(tiny_bloom: Path) -> None:
    def fail() -> None:
        raise RuntimeError("the device is gone")

    with LLM(tiny_bloom, device="cpu") as llm:
        llm.engine.worker.runner.deferred.add(Piece("a graph", fail))
        with pytest.raises(RuntimeError, match="the device is gone"):
            llm.engine.prepare()
        with pytest.raises(EngineError, match=r"closed: preparing steps failed \(RuntimeError: the device is gone\)"):
            llm.generate(PROMPTS, SHORT)


@pytest.mark.parametrize("options", [{"tensor_parallel_size": 2}, {"pipeline_parallel_size": 2}], ids=str)
def test_all_ranks_do_a_piece_between_the_same_steps(
    options: dict[str, Any], tiny_bloom: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Each piece is a collective, which would wait for ever where a rank did another, or none."""
    monkeypatch.setenv(MARKS, str(tmp_path))
    monkeypatch.setattr(launch, "WORKER", "tests.engine.deferring")
    with defer_marks(), LLM(tiny_bloom, device="cpu", **options) as llm:
        right = [output.outputs[0].token_ids for output in llm.generate(PROMPTS, SHORT)]
        worker = llm.engine.worker
        worker._do_deferred(2)
        assert [output.outputs[0].token_ids for output in llm.generate(PROMPTS, SHORT)] == right
        llm.engine.prepare()
        assert not llm.engine.has_deferred
        assert [output.outputs[0].token_ids for output in llm.generate(PROMPTS, SHORT)] == right
    done = [(tmp_path / f"rank {rank}").read_text().split() for rank in range(2)]
    assert done == [["2", "0", "1"]] * 2


class Reader:
    """The server's end of an engine's channel, which notes what is done when it is asked for messages."""

    def __init__(self, done: list[str], requests: list[Add]) -> None:
        self.closed = False
        self.waited = False
        self._done, self._requests = done, requests
        self._left = {request.id for request in requests}

    def receive(self, *, wait: bool) -> list[Add]:
        self.waited |= wait
        if self._requests and len(self._done) == 2:
            return [self._requests.pop()]
        self.closed = wait and not self._left
        return []

    def send(self, step: Step) -> None:
        self._left -= {output.id for output in step.outputs if output.finished}
        self._done += ["sent"] * any(output.finished for output in step.outputs)


def test_a_request_waits_for_one_piece_at_most(tiny_bloom: Path) -> None:
    done: list[str] = []
    with LLM(tiny_bloom, device="cpu") as llm:
        llm.engine.prepare()
        for number in range(4):
            llm.engine.worker.runner.deferred.add(Piece("a graph", lambda number=number: done.append(str(number))))  # type: ignore[misc]
        channel: Any = Reader(done, [Add(7, (5,), SHORT.given(), stream=False)])
        EngineLoop(llm.engine, channel, OutputCoalescer()).run()
    assert done == ["0", "1", "sent", "2", "3"]
    assert channel.waited


def test_an_idle_engine_of_an_event_loop_does_all_pieces(tiny_bloom: Path) -> None:
    llm, done = AsyncLLM(tiny_bloom, device="cpu"), threading.Event()
    try:
        deferred = llm._llm.engine.worker.runner.deferred
        llm._wake(lambda: [deferred.add(Piece("a graph", each)) for each in (lambda: None, done.set)])  # type: ignore[arg-type]
        assert done.wait(LIMIT_S)
    finally:
        llm.close()


def test_a_tokenizer_is_read_when_it_is_needed(tiny_bloom: Path, tmp_path: Path) -> None:
    with LLM(tiny_bloom, device="cpu") as llm:
        llm.generate(PROMPTS, SHORT)
        assert llm.engine.has_deferred
        tokenizer = llm.tokenizer
        assert not tokenizer.is_loaded
        assert llm.generate(PROMPTS, SamplingParams(max_tokens=4, temperature=0, ignore_eos=True))[0].outputs[0].text
        assert tokenizer.is_loaded
        assert not llm.engine.has_deferred
    with pytest.raises(CheckpointError, match=r"has no tokenizer\.json"):
        Tokenizer.deferred(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    broken = Tokenizer.deferred(tmp_path)
    for _ in range(2):
        with pytest.raises(CheckpointError, match="cannot be read as a tokenizer"):
            broken.encode("a")


def test_a_token_is_checked_before_the_first_request_and_counts_nowhere(tiny_bloom: Path) -> None:
    with LLM(tiny_bloom, device="cpu") as llm:
        before = llm.engine.stats
        expected = llm.generate(PROMPTS, SamplingParams(max_tokens=4, detokenize=False))[0].outputs[0].token_ids
    with LLM(tiny_bloom, device="cpu") as llm:
        llm.engine.check()
        assert llm.engine.stats == before
        found = llm.generate(PROMPTS, SamplingParams(max_tokens=4, detokenize=False))[0].outputs[0].token_ids
        assert found == expected, "random streams are those of an engine that has computed nothing"
        assert (llm.engine.stats.prompt_tokens, llm.engine.stats.generation_tokens) == (3, 4)
        norm: Any = llm.engine.worker.runner.model.get_submodule("final_norm")
        norm.weight.fill_(float("nan"))
        with pytest.raises(EngineError, match=r"its first token cannot be computed: the model's logits are not finite"):
            llm.engine.check()
