"""Engine processes that are killed, stopped and left alone."""

import asyncio
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from contextlib import aclosing, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
from tests.server.engine_helpers import LONG, SHORT, begin, collect, count, error_of, joined, started, stopped, until
from tests.waiting import LIMIT_S

from hasten.core.config import EngineConfig
from hasten.core.errors import EngineError, InvalidRequestError
from hasten.core.types import SamplingParams
from hasten.engine.llm import LLM
from hasten.engine.text import Tokenizer
from hasten.server.engine import spawned
from hasten.server.engine.client import EngineClient
from hasten.server.engine.process import with_defaults
from hasten.server.engine.queue import QueueTimeoutError, QueueWaitError


@pytest.fixture(scope="module", autouse=True)
def engines_are_forked() -> None:
    """No engine of this file is: processes are what it is about."""


def test_signals_to_the_process_are_the_servers_to_handle(run: Any, demo_engine: EngineClient) -> None:
    async def ask() -> None:
        stream = await begin(demo_engine, [5], SamplingParams(max_tokens=30, ignore_eos=True))
        pid = demo_engine.replicas[0].pid
        assert pid is not None
        os.kill(pid, signal.SIGTERM)
        os.kill(pid, signal.SIGINT)
        assert [progress.finished async for progress in stream][-1]
        assert count(await collect(demo_engine, [5], SHORT)) == 4
        assert (demo_engine.replicas[0].pid, demo_engine.ready) == (pid, True)

    run(ask())


def test_a_server_has_a_target_for_the_time_between_tokens_unless_it_is_given_none(
    run: Any, demo_engine: EngineClient
) -> None:
    assert with_defaults(EngineConfig.create("m")).scheduler.itl_target == 30
    for target in (0, 7.5):
        given = EngineConfig.create("m", itl_target=target)
        assert with_defaults(given) is given

    async def ask() -> None:
        before = demo_engine.stats()
        while demo_engine.stats().mixed_steps == before.mixed_steps:
            async with aclosing(await begin(demo_engine, [5], LONG)):
                await collect(demo_engine, [6, 7, 8], SHORT)
        assert demo_engine.stats().mixed_seconds > before.mixed_seconds

    run(ask())


def test_a_process_that_was_started_ahead_loads_the_next_model(run: Any, demo_model: Path, monkeypatch: Any) -> None:
    """And the server has the tokenizer by the time at which the engine is ready, loaded once."""
    loaded, foreseen = list[str](), list[Any]()
    from_folder, prepare = Tokenizer.from_folder, EngineClient.prepare

    def noted(folder: str) -> Any:
        loaded.append(str(folder))
        return from_folder(folder)

    async def prepared(client: EngineClient, replica: Any, info: Any) -> None:
        assert client._foreseen is not None
        foreseen.append(client._foreseen[0])
        await prepare(client, replica, info)

    monkeypatch.setattr(Tokenizer, "from_folder", noted)
    monkeypatch.setattr(EngineClient, "prepare", prepared)
    spawned.start_ahead(1)
    (ahead,) = spawned._ahead

    async def ask() -> None:
        async with started(demo_model, max_num_seqs=2) as client:
            assert client.replicas[0].pid == ahead.process.pid
            assert count(await collect(client, "once", SHORT)) == 4
            assert loaded == [str(demo_model)] == foreseen

    run(ask())
    assert not spawned._ahead


def test_processes_ahead_that_nobody_takes_end_with_the_one_that_started_them() -> None:
    program = "from hasten.server.engine import spawned as s; s.start_ahead(1); print(s._ahead[0].process.pid)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=LIMIT_S)
    assert not psutil.pid_exists(int(done.stdout))


def test_a_killed_process_comes_back(run: Any, demo_model: Path, tmp_path: Path, caplog: Any) -> None:
    """Killed while it works, and then not to be loaded for a while: whoever has not reached it waits for the next."""
    model = tmp_path / "model"
    shutil.copytree(demo_model, model)

    async def die() -> None:
        async with started(model, max_num_seqs=2, name="mortal") as client, asyncio.TaskGroup() as group:
            with_it = [group.create_task(error_of(collect(client, [number + 5], LONG))) for number in range(3)]
            not_yet = [group.create_task(collect(client, [number + 9], SHORT)) for number in range(2)]
            await until(lambda: client.stats().generation_tokens > 20 and client.stats().waiting == 3)
            pid = client.replicas[0].pid
            assert pid is not None
            os.kill(pid, signal.SIGSTOP)
            await asyncio.sleep(0.05)  # what it had sent is read, and counts
            before = client.stats()
            model.rename(tmp_path / "away")
            os.kill(pid, signal.SIGKILL)
            for error in [await task for task in with_it]:
                assert type(error) is EngineError
                assert "engine mortal failed while it had the request: its process died" in str(error)
            assert not client.ready
            # where steps were slow it is told at once that it would wait for longer
            refused = await error_of(collect(client, [5], SHORT, timeout=0.1))
            assert isinstance(refused, QueueTimeoutError | QueueWaitError)
            await until(lambda: "cannot be started" in caplog.text)
            assert not client.ready
            (tmp_path / "away").rename(model)
            await until(lambda: client.ready)
            assert client.replicas[0].pid != pid
            assert [count(await task) for task in not_yet] == [4, 4]
            assert client.restarts == 1
            after = client.stats()
            assert after.generation_tokens == before.generation_tokens + 8
            assert (after.running, after.waiting, after.used_blocks) == (0, 0, 0)

    run(die())
    assert "died (killed by SIGKILL)" in caplog.text
    assert "ready again" in caplog.text


def test_an_engine_that_stands_still_is_not_ready(run: Any, demo_model: Path, caplog: Any) -> None:
    async def stand() -> None:
        async with started(demo_model, name="frozen", stall_timeout=0.5) as client, asyncio.TaskGroup() as group:
            with stopped(client):
                await asyncio.sleep(1)
                assert client.ready  # it has nothing to do
                request = group.create_task(collect(client, [5], SHORT))
                await until(lambda: not client.ready)
                assert "frozen: it has requests, but has computed no step for" in caplog.text
            assert count(await request) == 4
            await until(lambda: client.ready)
            assert "frozen: it computes again" in caplog.text

    run(stand())


def test_a_grammar_holds_up_nobody_while_it_is_compiled(run: Any, demo_model: Path) -> None:
    dear = [SamplingParams(regex=".?" * (30_000 + index)) for index in range(3)]
    order: list[asyncio.Task[Any]] = []

    async def ask() -> None:
        async with started(demo_model, max_num_seqs=2, max_grammar_seconds=1) as client, asyncio.TaskGroup() as group:
            # more than there are places: who waits for a grammar takes none
            each = (*dear, dear[0])
            waiting = [group.create_task(error_of(collect(client, [5], params))) for params in each]
            late = group.create_task(error_of(collect(client, [5], dear[2], timeout=0.5)))
            short = group.create_task(collect(client, [5], SHORT))
            for task in (short, *waiting):
                task.add_done_callback(order.append)
            assert count(await short) == 4
            assert type(await late) is QueueTimeoutError
            waiting[1].cancel()
            for task in (waiting[0], waiting[2], waiting[3]):
                error = await task
                assert type(error) is InvalidRequestError
                assert "regex is too expensive: compiling it takes more than" in str(error)
            assert order.index(short) < order.index(waiting[2])  # each takes seconds, one after the other
            assert await collect(client, [5], SamplingParams(regex="ab", max_tokens=8))
            await until(lambda: client.stats().waiting == 0)

    run(ask())


def engine_processes(process: psutil.Process) -> set[int]:
    """Numbers of the engines' processes that a process has started, and that have not ended."""

    def is_engine(child: psutil.Process) -> bool:
        with suppress(psutil.NoSuchProcess):  # it may end at any moment
            return "hasten.server.engine.process" in child.cmdline()
        return False

    return {child.pid for child in process.children() if is_engine(child)}


def test_close_while_the_process_is_dead(run: Any, demo_model: Path) -> None:
    def others() -> set[int]:
        return engine_processes(psutil.Process()) - before

    async def end() -> None:
        async with started(demo_model) as client, asyncio.TaskGroup() as group:
            assert client.replicas[0].pid is not None
            os.kill(client.replicas[0].pid, signal.SIGKILL)
            await until(lambda: not client.ready)
            waiting = group.create_task(error_of(collect(client, [5], SHORT)))
            await until(lambda: len(others()) == 1)  # the next one loads
            await client.close()
            assert not others()
            assert isinstance(await waiting, EngineError)

    before = engine_processes(psutil.Process())
    run(end())


@pytest.mark.parametrize("busy", [False, True])
def test_the_process_ends_with_the_server(demo_model: Path, busy: bool) -> None:
    work = "[5] * 2000, SamplingParams(prompt_logprobs=500)" if busy else "[5], SamplingParams()"
    script = f"""
        import asyncio
        from hasten.core.config import EngineConfig
        from hasten.core.types import SamplingParams
        from hasten.server.engine.client import EngineClient

        async def main():
            client = await EngineClient.start(EngineConfig.create({str(demo_model)!r}))
            print("ready", flush=True)
            await (await client.submit({work})).read()
            await asyncio.sleep(60)

        asyncio.run(main())
    """
    command = [sys.executable, "-c", textwrap.dedent(script)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            assert server.stdout.readline() == "ready\n"
            (pid,) = engine_processes(psutil.Process(server.pid))
            engine = psutil.Process(pid)
            loaded = engine.cpu_times().user
            while busy and engine.cpu_times().user < loaded + 0.5:  # it is in a step of many seconds
                time.sleep(0.01)
        finally:
            server.kill()
        server.communicate(timeout=LIMIT_S)  # the engine's process holds stderr for as long as it lives


@pytest.mark.any_python
def test_ranks_give_the_same_tokens_and_the_death_of_one_is_survived(
    run: Any, demo_model: Path, demo_llm: LLM, caplog: Any
) -> None:
    (expected,) = demo_llm.generate([5, 6, 7], SamplingParams(max_tokens=12, temperature=0))

    async def die() -> None:
        async with started(demo_model, tensor_parallel_size=2) as client:
            assert client.info.ranks == 2
            progress = await collect(client, [5, 6, 7], SamplingParams(max_tokens=12, temperature=0))
            assert joined(progress).completions[0].token_ids == expected.outputs[0].token_ids
            async with aclosing(await begin(client, [5], LONG)) as stream:
                (rank,) = psutil.Process(client.replicas[0].pid).children()
                rank.kill()
                with pytest.raises(EngineError, match=r"rank 1 of 2 .* died"):
                    async for _ in stream:
                        pass
            await until(lambda: client.ready)
            progress = await collect(client, [5, 6, 7], SamplingParams(max_tokens=12, temperature=0))
            assert joined(progress).completions[0].token_ids == expected.outputs[0].token_ids

    run(die())
    assert "rank 1 of 2" in caplog.text
