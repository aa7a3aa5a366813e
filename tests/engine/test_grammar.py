"""Grammars are compiled within limits of time and memory, each once, and by a thread that holds up nobody."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import CancelledError
from pathlib import Path

import numpy as np
import pytest
from tests.waiting import LIMIT_S

from hasten import InvalidRequestError, SamplingParams
from hasten.core.errors import EngineError
from hasten.engine import grammar
from hasten.engine.constraint import Constraint, fill_allowed
from hasten.engine.grammar import GrammarCompiler
from hasten.engine.grammar_text import GrammarText
from hasten.engine.grammar_trial import GrammarLimits, GrammarTrial
from hasten.engine.text import Tokenizer

pytestmark = pytest.mark.any_python

DEMO = Path(__file__).parents[2] / "examples" / "demo-model"
LONG = ".?" * 30_000
"""Takes minutes, and gigabytes, if nobody ends it."""


def made(**limits: int) -> GrammarCompiler:
    return GrammarCompiler(Tokenizer.from_folder(DEMO), 1024, (2,), GrammarLimits(**limits))


@pytest.fixture
def compiler() -> Iterator[GrammarCompiler]:
    compiler = made()
    yield compiler
    compiler.close()


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"seconds": 1, "memory": 1 << 33}, r"regex is too expensive: compiling it takes more than 1 s"),
        ({"seconds": 1000, "memory": 1 << 27}, r"regex is too expensive: compiling it takes more than 128 MiB"),
    ],
)
def test_what_is_too_expensive_is_refused_and_nothing_else(limits: dict[str, int], message: str) -> None:
    compiler = made(**limits)
    for _ in range(2):  # the second time without compiling it
        with pytest.raises(InvalidRequestError, match=message):
            compiler.compiled(SamplingParams(regex=LONG))
    assert compiler.compiled(SamplingParams(regex="a")) is not None
    compiler.close()


def test_sequences_take_turns_among_the_matchers_of_a_grammar(
    compiler: GrammarCompiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grammar, "available_cpus", lambda: 3)
    monkeypatch.setattr(grammar, "_MORE_MATCHERS_S", 1e6)
    result = compiler.compiled(SamplingParams(regex="turns|turnips"))
    assert result is not None
    constraints = [Constraint.begin(result) for _ in range(7)]
    assert [constraint.lock for constraint in constraints] == [0, 1, 2, 0, 1, 2, 0]
    constraints.append(constraints[4].fork())
    assert constraints[-1].lock == 1
    masks = np.full((len(constraints), result.words), -1, np.int32)
    fill_allowed(constraints, masks)
    assert masks.any()
    assert (masks == masks[0]).all()


@pytest.mark.parametrize(
    ("seconds", "matchers"), [([5.0, 0.25, 0.25, 0.25], 4), ([0.25, 0.75, 0.5, 0.25], 3), ([1, 9], 2)]
)
def test_a_grammar_is_compiled_again_as_long_as_that_takes_little_time_whatever_the_first_time_took(
    seconds: list[float], matchers: int, compiler: GrammarCompiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, times = [0.0], iter(seconds)
    compile_ = GrammarText.compile

    def slow(self: GrammarText, vocabulary: object) -> object:
        now[0] += next(times)
        return compile_(self, vocabulary)  # type: ignore[arg-type]  # it is what it was given

    monkeypatch.setattr(GrammarText, "compile", slow)
    monkeypatch.setattr(time, "thread_time", lambda: now[0])
    monkeypatch.setattr(grammar, "available_cpus", lambda: 4)
    monkeypatch.setattr(grammar, "_MORE_MATCHERS_S", 1.0)
    result = compiler.compiled(SamplingParams(regex=f"{seconds}"))
    assert result is not None
    assert len(result.matchers) == matchers


def test_a_grammar_is_compiled_once(compiler: GrammarCompiler, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[str] = []
    compile_ = GrammarText.compile

    def counted(self: GrammarText, vocabulary: object) -> object:
        compiled.append(self.text)
        return compile_(self, vocabulary)  # type: ignore[arg-type]  # it is what it was given

    monkeypatch.setattr(GrammarText, "compile", counted)
    monkeypatch.setattr(grammar, "_MOST_MATCHERS", 1)
    futures = [compiler.compile(SamplingParams(regex=text)) for text in ("a", "b", "a", "a", "b")]
    grammars = [future.result(LIMIT_S) for future in futures if future is not None]
    assert compiled == ["a", "b"]
    assert grammars[0] is grammars[2] is grammars[3]
    with pytest.raises(InvalidRequestError):
        compiler.compiled(SamplingParams(regex="(a"))
    monkeypatch.setattr(grammar, "_KEPT", 2)
    for text in ("c", "a", "b", "a"):
        compiler.compiled(SamplingParams(regex=text))
    assert compiled == ["a", "b", "c", "a", "b"]


def test_an_expression_with_too_many_states_is_too_expensive(compiler: GrammarCompiler) -> None:
    with pytest.raises(InvalidRequestError, match="regex is too expensive: its expressions have too many states"):
        compiler.compiled(SamplingParams(regex=".?" * 500))


@pytest.fixture
def held(compiler: GrammarCompiler, monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Until this is set, nothing is compiled."""
    free, begun = threading.Event(), threading.Event()
    run = GrammarTrial.run

    def wait(self: GrammarTrial, text: GrammarText) -> int:
        begun.set()
        free.wait(LIMIT_S)
        return run(self, text)

    monkeypatch.setattr(GrammarTrial, "run", wait)
    compiler.compile(SamplingParams(regex="first"))
    assert begun.wait(LIMIT_S)
    return free


def test_only_so_many_wait(compiler: GrammarCompiler, held: threading.Event) -> None:
    waiting = [compiler.compile(SamplingParams(regex=f"a{number}")) for number in range(15)]
    assert all(future is not None and not future.done() for future in waiting)
    with pytest.raises(EngineError, match="16 grammars wait to be compiled already; try again later"):
        compiler.compiled(SamplingParams(regex="b"))
    assert compiler.compile(SamplingParams(regex="a3")) is waiting[3]  # it is no further one
    held.set()
    assert all(future is not None and future.result(LIMIT_S) for future in waiting)
    assert compiler.compiled(SamplingParams(regex="b")) is not None


def test_what_nobody_waits_for_is_not_compiled(compiler: GrammarCompiler, held: threading.Event) -> None:
    params = SamplingParams(regex="second")
    future = compiler.compile(params)
    assert compiler.compile(params) is future
    assert future is not None
    compiler.withdraw(params)
    assert not future.cancelled()
    compiler.withdraw(params)
    assert future.cancelled()
    with pytest.raises(CancelledError):
        future.result()
    held.set()
    assert compiler.compiled(params) is not None  # somebody asks for it again


def test_nobody_waits_while_the_process_starts(compiler: GrammarCompiler, monkeypatch: pytest.MonkeyPatch) -> None:
    starting, free = threading.Event(), threading.Event()
    start = GrammarTrial.__init__

    def wait(self: GrammarTrial, *described: object) -> None:
        starting.set()
        free.wait(LIMIT_S)
        start(self, *described)  # type: ignore[arg-type]  # it is what it was given

    monkeypatch.setattr(GrammarTrial, "__init__", wait)
    futures = [compiler.compile(SamplingParams(regex="a"))]
    assert starting.wait(LIMIT_S)
    futures.append(compiler.compile(SamplingParams(regex="b")))
    assert all(future is not None and not future.done() for future in futures)
    compiler.close()
    free.set()
    for future in futures:
        assert future is not None
        with pytest.raises(EngineError, match="closed"):
            future.result(LIMIT_S)


def test_the_process_ends_with_the_compiler(compiler: GrammarCompiler) -> None:
    compiler.compiled(SamplingParams(regex="a"))
    assert compiler._trial is not None
    process = compiler._trial._process.pid
    compiler.close()
    with pytest.raises(ProcessLookupError):
        os.kill(process, 0)


def test_the_process_loads_neither_torch_nor_numpy() -> None:
    program = "import sys, hasten.engine.grammar_trial; sys.exit(bool({'torch', 'numpy'} & set(sys.modules)))"
    subprocess.run([sys.executable, "-c", program], check=True, timeout=LIMIT_S)
