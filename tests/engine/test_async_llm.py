"""The engine for programs with an event loop."""

import asyncio
import itertools
import signal
import subprocess
import sys
import threading
import time
from collections.abc import AsyncGenerator, Awaitable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests.encoders import save_encoder
from tests.waiting import LIMIT_S, attempts

from hasten import (
    LLM,
    AsyncEngineArgs,
    AsyncLLM,
    ConfigError,
    EngineError,
    FinishReason,
    InvalidRequestError,
    PoolingParams,
    RequestOutput,
    SamplingParams,
)

DEMO = Path(__file__).parents[2] / "examples/demo-model"
PROMPTS = ["Anna opened the door", "Ben", "The garden was", "Once upon a time there was a fox", "It rained"]
GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
LONG = replace(GREEDY, max_tokens=1500)


@pytest.fixture(scope="module")
def llm() -> Iterator[AsyncLLM]:
    engine = AsyncLLM(DEMO)
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def expected() -> list[RequestOutput]:
    with LLM(DEMO) as llm:
        return llm.generate(PROMPTS, GREEDY, use_tqdm=False)


def run(work: Awaitable[Any]) -> Any:
    async def limited() -> Any:
        async with asyncio.timeout(LIMIT_S):
            return await work

    return asyncio.run(limited())


def slow_down(llm: AsyncLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let long requests take half a minute: they are unfinished when something happens to them."""
    step = llm._llm.engine._step

    def slow() -> Any:
        time.sleep(0.02)
        return step()

    monkeypatch.setattr(llm._llm.engine, "_step", slow)


async def last(outputs: AsyncGenerator[RequestOutput, None]) -> RequestOutput:
    found = None
    async for output in outputs:
        found = output
    assert found is not None
    return found


async def idle(llm: AsyncLLM) -> None:
    """Wait until the engine computes nothing and holds no blocks."""
    engine = llm._llm.engine
    while engine.has_unfinished or engine.scheduler.blocks.num_used or llm._readers:
        await asyncio.sleep(0.005)


def test_outputs_grow_to_what_an_llm_gives(llm: AsyncLLM, expected: list[RequestOutput]) -> None:
    async def read() -> list[RequestOutput]:
        return [output async for output in llm.generate(PROMPTS[0], GREEDY, request_id="mine")]

    outputs = run(read())
    assert [output.finished for output in outputs] == [False] * (len(outputs) - 1) + [True]
    assert {output.request_id for output in outputs} == {"mine"}
    texts = [output.outputs[0].text for output in outputs]
    counts = [len(output.outputs[0].token_ids) for output in outputs]
    assert all(later.startswith(earlier) for earlier, later in itertools.pairwise(texts))
    assert counts == sorted(counts)
    assert outputs[-1].outputs == expected[0].outputs
    assert (outputs[-1].prompt, outputs[-1].prompt_token_ids) == (PROMPTS[0], expected[0].prompt_token_ids)
    metrics = outputs[-1].metrics
    assert 0 < metrics.queued_ts <= metrics.first_token_ts <= metrics.last_token_ts


def test_several_requests_are_computed_together(llm: AsyncLLM, expected: list[RequestOutput]) -> None:
    async def read() -> list[RequestOutput]:
        prompts: list[Any] = [*PROMPTS[:3], expected[3].prompt_token_ids, {"prompt": PROMPTS[4]}]
        return await asyncio.gather(*(last(llm.generate(prompt, GREEDY)) for prompt in prompts))

    before = llm._llm.engine.stats.steps
    found = run(read())
    assert [output.outputs[0].token_ids for output in found] == [each.outputs[0].token_ids for each in expected]
    assert llm._llm.engine.stats.steps - before < len(PROMPTS) * GREEDY.max_tokens  # type: ignore[operator]


def test_a_cancelled_reader_withdraws_its_request_alone(
    llm: AsyncLLM, expected: list[RequestOutput], monkeypatch: pytest.MonkeyPatch
) -> None:
    slow_down(llm, monkeypatch)

    async def check() -> None:
        begun = asyncio.Event()

        async def read() -> None:
            async for _ in llm.generate(PROMPTS[0], LONG):
                begun.set()

        reading = asyncio.create_task(read())
        await begun.wait()
        other = asyncio.create_task(last(llm.generate(PROMPTS[1], GREEDY)))
        reading.cancel()
        assert (await other).outputs == expected[1].outputs
        with pytest.raises(asyncio.CancelledError):
            await reading
        await idle(llm)

    run(check())


def test_leaving_the_loop_withdraws_the_request(llm: AsyncLLM) -> None:
    async def check() -> None:
        outputs = llm.generate(PROMPTS[0], LONG, "left")
        async for _ in outputs:
            break
        await outputs.aclose()
        await idle(llm)
        assert (await last(llm.generate(PROMPTS[0], GREEDY, "left"))).finished  # its id is free again

    run(check())


def test_an_aborted_request_gives_what_it_has(llm: AsyncLLM) -> None:
    async def aborted() -> bool:
        """Whether the request was withdrawn before its end."""
        outputs = llm.generate(PROMPTS[0], LONG, "doomed")
        first = await anext(outputs)
        await llm.abort(["doomed", "none"])
        end = await last(outputs)
        assert end.finished
        assert end.outputs[0].token_ids[: len(first.outputs[0].token_ids)] == first.outputs[0].token_ids
        await idle(llm)
        return end.outputs[0].finish_reason is FinishReason.ABORT

    for _ in attempts("a request that is withdrawn before its end"):
        if run(aborted()):
            break


def test_an_id_stands_for_one_request_at_a_time(llm: AsyncLLM) -> None:
    async def refused() -> bool:
        both = [last(llm.generate(PROMPTS[0], LONG, "twice")) for _ in range(2)]
        results = await asyncio.gather(*both, return_exceptions=True)
        return any(isinstance(each, InvalidRequestError) and "'twice' is in use" in str(each) for each in results)

    for _ in attempts("two requests with one id at the same time"):
        if run(refused()):
            break


@pytest.mark.parametrize(
    ("prompt", "params", "message"),
    [
        (3.5, None, "the prompt must be a text"),
        (["a", "b"], None, "a request has one prompt, got 2"),
        ([10**6], None, "token id 1000000"),
        ("a" * 9000 + " b" * 4000, None, "the prompt has [0-9]+ tokens"),
        ("a", {"temperature": 1}, "must be SamplingParams"),
        ("a", SamplingParams(regex="(", max_tokens=2), "regex"),
    ],
)
def test_what_cannot_be_served_is_refused(llm: AsyncLLM, prompt: Any, params: Any, message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message):
        run(last(llm.generate(prompt, params)))
    run(idle(llm))


def test_a_grammar_is_compiled_beside_the_steps(llm: AsyncLLM) -> None:
    async def check() -> None:
        params = SamplingParams(choice=["garden", "house"], max_tokens=20, temperature=0)
        both = await asyncio.gather(*(last(llm.generate(prompt, params)) for prompt in PROMPTS[:2]))
        assert {output.outputs[0].text for output in both} <= {"garden", "house"}
        waiting = asyncio.create_task(last(llm.generate("a", replace(params, choice=(), regex="(ab|c){3,900}x"))))
        await asyncio.sleep(0)
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        await idle(llm)

    run(check())


def test_event_loops_of_several_threads_read_at_once(llm: AsyncLLM, expected: list[RequestOutput]) -> None:
    found: dict[int, RequestOutput] = {}

    def read(number: int) -> None:
        found[number] = run(last(llm.generate(PROMPTS[number], GREEDY)))

    threads = [threading.Thread(target=read, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[number].outputs for number in range(3)] == [output.outputs for output in expected[:3]]


def test_it_has_what_programs_ask_for(llm: AsyncLLM) -> None:
    assert llm.get_tokenizer().decode([]) == ""
    assert llm.config.vocab_size > 0
    assert (llm.is_running, llm.errored, llm.dead_error) == (True, False, None)
    run(llm.check_health())
    assert run(llm.reset_prefix_cache()) is True
    assert repr(llm).startswith("AsyncLLM('")
    with pytest.raises(InvalidRequestError, match="needs a model that gives vectors"):
        run(anext(llm.encode("a")))


def test_a_model_that_cannot_be_loaded_is_an_error(tmp_path: Path) -> None:
    before = threading.active_count()
    with pytest.raises(ConfigError):
        AsyncLLM(tmp_path, max_num_seqs=0)
    assert threading.active_count() == before


def test_a_failed_step_ends_it_with_an_error_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    async def check() -> None:
        async with AsyncLLM.from_engine_args(AsyncEngineArgs(DEMO, max_num_seqs=4)) as llm:
            step, steps = llm._llm.engine._step, itertools.count()

            def fail() -> Any:
                if next(steps) == 5:
                    raise RuntimeError("the device is gone")
                return step()

            monkeypatch.setattr(llm._llm.engine, "_step", fail)
            outputs = llm.generate(PROMPTS[0], LONG)
            with pytest.raises(EngineError, match=r"RuntimeError: the device is gone"):
                await last(outputs)
            with pytest.raises(EngineError, match=r"the device is gone; create a new one"):
                await last(llm.generate("a"))
            with pytest.raises(EngineError):
                await llm.check_health()
            assert (llm.is_running, llm.errored) == (False, True)
            assert isinstance(llm.dead_error, RuntimeError)

    run(check())


def test_closing_ends_what_is_under_way(monkeypatch: pytest.MonkeyPatch) -> None:
    async def check() -> None:
        llm = AsyncLLM(DEMO)
        slow_down(llm, monkeypatch)
        async with llm:
            outputs = llm.generate(PROMPTS[0], LONG)
            await anext(outputs)
        with pytest.raises(EngineError, match=r"close\(\) was called"):
            await last(outputs)
        with pytest.raises(EngineError, match="is closed"):
            await last(llm.generate("a"))
        await llm.abort("any")
        llm.close()
        assert (llm.is_running, llm.errored) == (False, False)

    run(check())
    assert not [thread for thread in threading.enumerate() if thread.name == "hasten-engine" and not thread.daemon]


PROGRAM = """
import asyncio, sys
from hasten import AsyncLLM, SamplingParams

async def main():
    llm = AsyncLLM(sys.argv[1])
    params = SamplingParams(max_tokens=1500, ignore_eos=True)
    while True:
        async for output in llm.generate("Anna", params):
            print("more", flush=True)

asyncio.run(main())
"""


def test_an_interrupt_ends_a_program(tmp_path: Path) -> None:
    command = [sys.executable, "-c", PROGRAM, str(DEMO)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "more\n"
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=LIMIT_S)
    assert process.returncode in (1, -signal.SIGINT)
    assert said.rstrip().endswith("KeyboardInterrupt"), said


def test_vectors_are_those_of_an_llm(tmp_path: Path) -> None:
    folder = save_encoder(tmp_path / "bert", "Bert")
    with LLM(folder, device="cpu") as llm:
        wanted = llm.embed(["a garden", "the fox"], use_tqdm=False)

    async def check() -> None:
        async with AsyncLLM(folder, device="cpu") as llm:
            for text, output in zip(["a garden", "the fox"], wanted, strict=True):
                (found,) = [each async for each in llm.encode(text, PoolingParams())]
                assert found.outputs.embedding == pytest.approx(output.outputs.embedding, abs=1e-6)
                assert found.prompt_token_ids == output.prompt_token_ids

    run(check())
