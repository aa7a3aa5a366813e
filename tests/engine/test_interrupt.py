"""An interrupt ends the call under way, and the engine goes on where one rank is alone."""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest
from tests.waiting import LIMIT_S

from hasten import LLM, EngineError, SamplingParams
from hasten.engine.sampler import Choice

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

PROMPTS = [[5, 6, 7], [8] * 20, [9, 10]]
LONG = SamplingParams(temperature=0, max_tokens=60, ignore_eos=True, logprobs=0)

REAL_SIGNALS = """
import os, random, signal, sys, threading
from dataclasses import replace
from hasten import LLM, SamplingParams

prompts = [[5, 6, 7], [8] * 20, [9, 10]]
params = SamplingParams(temperature=0, max_tokens=60, ignore_eos=True)
params = [params, replace(params, repetition_penalty=1.3), replace(params, temperature=1, seed=3, logprobs=1)]
rng = random.Random(0)

def tokens(outputs):
    return [output.outputs[0].token_ids for output in outputs]

with LLM(sys.argv[1], overlap_steps=sys.argv[2] == "overlapped") as llm:
    right, engine = tokens(llm.generate(prompts, params)), llm.engine
    for turn in range(40):
        begin, go = engine.stats.steps, threading.Event()

        def interrupt():
            while engine.stats.steps < begin + rng.randrange(1, 9):
                go.wait(rng.random() / 1000)
            os.kill(os.getpid(), signal.SIGINT)
            while not go.wait(20):  # a destructor may have swallowed it
                os.kill(os.getpid(), signal.SIGINT)

        thread = threading.Thread(target=interrupt)
        try:
            thread.start()
            while True:
                if turn % 2:
                    llm.generate(prompts, params)
                else:
                    for _ in llm.stream(prompts, params):
                        pass
        except KeyboardInterrupt:
            go.set()
        thread.join()
        llm.abort()
        assert not engine.has_unfinished and not engine.scheduler.has_work
        assert engine.scheduler.blocks.num_used == 0
        if turn % 8 == 0:
            assert tokens(llm.generate(prompts, params)) == right, turn
    assert tokens(llm.generate(prompts, params)) == right
print("survived")
"""


@pytest.mark.parametrize("steps", ["one by one", "overlapped"])
def test_real_interrupts_end_calls_and_not_the_engine(tiny_bloom: Path, steps: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", REAL_SIGNALS, str(tiny_bloom), steps], capture_output=True, text=True, timeout=LIMIT_S
    )
    assert done.stdout.strip() == "survived", done.stderr


@pytest.fixture(scope="module", params=[False, True], ids=["steps", "overlapped"])
def llm(request: pytest.FixtureRequest, tiny_bloom: Path) -> Iterator[LLM]:
    with LLM(tiny_bloom, overlap_steps=request.param) as engine:
        yield engine


def raising_at(call: int, original: Callable[..., Any]) -> Callable[..., Any]:
    """The original, of whose second call an interrupt comes before (0) or after (1) it has acted."""
    calls = 0

    def wrapped(*args: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 2 and call == 0:
            raise KeyboardInterrupt
        result = original(*args, **options)
        if calls == 2:
            raise KeyboardInterrupt
        return result

    return wrapped


@pytest.mark.parametrize("after", [0, 1], ids=["before", "after"])
@pytest.mark.parametrize("place", ["schedule", "advance", "launch", "collect", "finish", "reserve"])
def test_wherever_it_comes_nothing_is_left(llm: LLM, monkeypatch: pytest.MonkeyPatch, place: str, after: int) -> None:
    engine = llm.engine
    right = [output.outputs[0].token_ids for output in llm.generate(PROMPTS, LONG)]
    steps = engine.stats.steps
    owners: dict[str, Any] = {"launch": engine.worker, "collect": Choice, "reserve": engine.scheduler.blocks}
    owner = owners.get(place, engine.scheduler)
    with monkeypatch.context() as patched:
        patched.setattr(owner, place, raising_at(after, getattr(owner, place)))
        with pytest.raises(KeyboardInterrupt):
            llm.generate(PROMPTS, LONG)
    assert not engine.has_unfinished
    assert not engine.scheduler.has_work
    assert engine.scheduler.blocks.num_used == 0
    assert engine.stats.steps >= steps
    assert [output.outputs[0].token_ids for output in llm.generate(PROMPTS, LONG)] == right


def test_a_stream_left_open_is_withdrawn(llm: LLM) -> None:
    stream = llm.stream(PROMPTS, LONG)
    next(stream)
    with pytest.raises(EngineError, match="another call of this LLM is under way"):
        llm.generate(PROMPTS, LONG)
    llm.abort()
    assert llm.engine.scheduler.blocks.num_used == 0
    assert len(llm.generate(PROMPTS, LONG)) == 3


def test_an_engine_of_several_ranks_closes_and_says_why(tiny_bloom: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with LLM(tiny_bloom, tensor_parallel_size=2) as llm:
        monkeypatch.setattr(llm.engine.worker, "launch", raising_at(0, llm.engine.worker.launch))
        with pytest.raises(KeyboardInterrupt):
            llm.generate(PROMPTS, LONG)
        reason = "it was interrupted in the middle of a step, which its other ranks cannot leave; create a new LLM"
        with pytest.raises(EngineError, match=f"the engine is closed: {reason}"):
            llm.generate(PROMPTS, LONG)
    with pytest.raises(EngineError, match=f"this LLM is closed: {reason}"):
        llm.generate(PROMPTS, LONG)


def test_an_interrupt_while_a_grammar_compiles_leaves_several_ranks_alone(
    tiny_bloom: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with LLM(tiny_bloom, tensor_parallel_size=2) as llm:
        right = [output.outputs[0].token_ids for output in llm.generate(PROMPTS, LONG)]
        with monkeypatch.context() as patched:
            patched.setattr(llm.engine.grammars, "compiled", raising_at(0, llm.engine.grammars.compiled))
            with pytest.raises(KeyboardInterrupt):
                llm.generate(PROMPTS, SamplingParams(regex="[ab]+", max_tokens=4))
        assert not llm.engine.has_unfinished
        assert [output.outputs[0].token_ids for output in llm.generate(PROMPTS, LONG)] == right


def test_an_engine_that_failed_says_why(tiny_bloom: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("the device is gone")

    with LLM(tiny_bloom) as llm:
        monkeypatch.setattr(llm.engine.worker, "launch", fail)
        with pytest.raises(RuntimeError):
            llm.generate(PROMPTS, LONG)
        with pytest.raises(
            EngineError, match=r"closed: a step failed \(RuntimeError: the device is gone\); create a new"
        ):
            llm.generate(PROMPTS, LONG)
    llm = LLM(tiny_bloom)
    llm.close()
    with pytest.raises(EngineError, match=r"this LLM is closed: close\(\) was called; create a new LLM"):
        llm.generate(PROMPTS, LONG)
