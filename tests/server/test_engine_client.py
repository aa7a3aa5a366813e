"""Requests of a real engine in its own process, beside the same engine in this one."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from tests.server.engine_helpers import (
    LONG,
    LONG_TOKENS,
    SHORT,
    begin,
    collect,
    count,
    error_of,
    generate,
    joined,
    started,
    stopped,
    until,
)
from tests.waiting import LIMIT_S, attempts

from hasten.core.config import EngineConfig
from hasten.core.errors import CapacityError, CheckpointError, ConfigError, InvalidRequestError
from hasten.core.types import CompletionOutput, FinishReason, RequestOutput, SamplingParams
from hasten.engine.llm import LLM
from hasten.engine.stats import EngineStats
from hasten.server.engine.client import EngineClient, EngineClosedError
from hasten.server.engine.ticket import Progress
from hasten.server.engine.wire import CompletionDelta, Output, Step

PROMPT = "Anna looked out of the window and"

KINDS = {
    "greedy": SamplingParams(max_tokens=24, temperature=0),
    "seeded": SamplingParams(max_tokens=24, temperature=0.9, top_p=0.9, top_k=50, seed=2**64 - 5),
    "two": SamplingParams(max_tokens=24, n=2, seed=7, ignore_eos=True),
    "beams": SamplingParams(max_tokens=12, beam_width=4, n=2, length_penalty=0.7),
    "logprobs": SamplingParams(max_tokens=8, temperature=0.7, seed=3, logprobs=2, prompt_logprobs=1),
    "stop": SamplingParams(max_tokens=200, temperature=0.8, seed=1, stop=(". ", "the")),
    "stop included": SamplingParams(max_tokens=200, temperature=0, stop="e ", include_stop_str_in_output=True),
    "stop words": SamplingParams(max_tokens=200, temperature=0.9, seed=4, stop_words_ids=[[262], [15]]),
    "penalties": SamplingParams(max_tokens=24, temperature=0, repetition_penalty=1.3, bad_words=("the", "a")),
    "without text": SamplingParams(max_tokens=8, temperature=0, detokenize=False),
}


def same(delta: CompletionDelta, output: CompletionOutput) -> None:
    """Assert that a completion is what the engine makes of it in this process."""
    assert delta.token_ids == output.token_ids
    assert delta.text == output.text
    assert (delta.finish_reason, delta.stop_reason) == (output.finish_reason, output.stop_reason)
    assert (delta.cumulative_logprob is None) is (output.cumulative_logprob is None)
    assert (delta.cumulative_logprob or 0.0) == pytest.approx(output.cumulative_logprob or 0.0, rel=1e-5)
    assert (delta.logprobs is None) is (output.logprobs is None)
    for ours, theirs in zip(delta.logprobs or [], output.logprobs or [], strict=True):
        assert {token: (entry.rank, entry.decoded_token) for token, entry in ours.items()} == {
            token: (entry.rank, entry.decoded_token) for token, entry in theirs.items()
        }
        assert [entry.logprob for entry in ours.values()] == pytest.approx(
            [entry.logprob for entry in theirs.values()], rel=1e-4
        )


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_completions_are_those_of_the_engine_in_process(
    run: Any, demo_engine: EngineClient, demo_llm: LLM, kind: str, stream: bool
) -> None:
    (expected,) = demo_llm.generate(PROMPT, KINDS[kind])
    progress = run(collect(demo_engine, PROMPT, KINDS[kind], stream=stream))
    beams = KINDS[kind].beam_width > 1
    assert len(progress) == 1 or (stream and not beams)
    assert [each.finished for each in progress] == [False] * (len(progress) - 1) + [True]
    assert [each.queue_seconds is None for each in progress] == [False] + [True] * (len(progress) - 1)
    whole = joined(progress)
    assert list(whole.prompt_token_ids) == expected.prompt_token_ids
    assert (whole.prompt_logprobs is None) is (expected.prompt_logprobs is None)
    assert len(whole.prompt_logprobs or []) == len(expected.prompt_logprobs or [])
    assert len(whole.completions) == len(expected.outputs)
    for delta, output in zip(whole.completions, expected.outputs, strict=True):
        same(delta, output)


def test_64_at_once(run: Any, demo_engine: EngineClient, demo_llm: LLM) -> None:
    prompts = [[10 + number, 300 + number, *range(20, 20 + number % 7)] for number in range(64)]
    params = [SamplingParams(max_tokens=8 + number % 9, temperature=0.8 * (number % 2), seed=1) for number in range(64)]

    async def ask() -> list[Any]:
        pairs = zip(prompts, params, strict=True)
        return await asyncio.gather(*(collect(demo_engine, prompt, each) for prompt, each in pairs))

    expected: list[RequestOutput] = demo_llm.generate(prompts, params)
    found = run(ask())
    for progress, output in zip(found, expected, strict=True):
        same(joined(progress).completions[0], output.outputs[0])
    assert demo_engine.stats().used_blocks == 0


def test_what_the_engine_is(demo_engine: EngineClient, demo_llm: LLM, demo_model: Path) -> None:
    info, engine = demo_engine.info, demo_llm.engine
    assert (info.vocab_size, info.max_model_len) == (demo_llm.config.vocab_size, engine.max_model_len)
    assert (info.bos_token_id, info.eos_token_ids, info.pad_token_id) == (1, (2,), 3)
    assert (info.num_blocks, info.block_size) == (demo_engine.stats().num_blocks, engine.config.cache.block_size)
    assert info.num_blocks > 0, "how many depends on the memory that was free when the process started"
    assert (info.dtype, info.device, info.ranks, info.model_type) == ("fp32", "cpu", 1, "bloom")
    assert info.tokenizer_folder == str(demo_model)
    assert 0 < info.load_seconds < LIMIT_S
    assert demo_engine.tokenizer is not None
    assert demo_engine.tokenizer.vocab_size == info.vocab_size


def test_counters(run: Any, demo_engine: EngineClient) -> None:
    before = demo_engine.stats()
    prompt = list(range(100, 164))
    for _ in range(2):
        run(collect(demo_engine, prompt, SHORT))
    after = demo_engine.stats()
    assert after.prompt_tokens - before.prompt_tokens == 128
    assert after.generation_tokens - before.generation_tokens == 8
    assert after.steps - before.steps == 8
    assert after.prefix_query_tokens - before.prefix_query_tokens == 128
    assert after.prefix_hit_tokens - before.prefix_hit_tokens == 48
    assert (after.running, after.waiting, after.used_blocks) == (0, 0, 0)


def test_readers_of_first_tokens_are_woken_before_all_others(run: Any, demo_engine: EngineClient) -> None:
    """Of whatever the engine's process has sent meanwhile, in several messages."""
    woken: list[int] = []
    (engine,) = demo_engine.replicas

    async def read(number: int, stream: AsyncIterator[Progress]) -> None:
        async for _ in stream:
            woken.append(number)

    def step(*numbers: int) -> Step:
        outputs = [Output(number, [CompletionDelta(0, [7], "a")], finished=False) for number in numbers]
        return Step(EngineStats(running=3, steps=1), outputs)

    async def ask() -> None:
        with stopped(demo_engine):
            readers = [asyncio.create_task(read(at, generate(demo_engine, [at + 5], LONG))) for at in range(3)]
            await until(lambda: engine.requests.sequences == 3)
            first, second, third = engine.requests._tickets
            engine.on_steps([step(first)])
            await until(lambda: woken == [0])
            engine.on_steps([step(first), step(first, second), step(first, third)])
            await until(lambda: len(woken) == 4)
            for reader in readers:
                reader.cancel()
            await asyncio.gather(*readers, return_exceptions=True)
        await until(lambda: demo_engine.stats().running == 0)

    run(ask())
    assert woken == [0, 1, 2, 0]


def test_the_way_of_tokens_is_timed(run: Any, demo_engine: EngineClient) -> None:
    delivery = demo_engine.delivery
    before = delivery.socket.count, delivery.write.count, delivery.write.total
    run(collect(demo_engine, [5], SHORT))
    run(asyncio.sleep(0))  # the message is acknowledged once its readers have run
    assert 1 <= delivery.socket.count - before[0] <= 4
    assert delivery.write.count - before[1] == delivery.socket.count - before[0]
    assert delivery.write.total > before[2]
    assert delivery.socket.total > 0


@pytest.mark.parametrize("how", ["closed", "cancelled"])
def test_a_reader_that_leaves_frees_its_blocks(run: Any, demo_engine: EngineClient, how: str) -> None:
    async def read_on(stream: AsyncIterator[Progress]) -> None:
        async for _ in stream:
            pass

    async def leave() -> int:
        for _ in attempts("eight requests that run at once"):
            before = demo_engine.stats().generation_tokens
            streams = [await begin(demo_engine, [number + 5] * 40, LONG) for number in range(8)]
            stats = demo_engine.stats()
            if (stats.running, stats.waiting) == (8, 0):
                break
            await asyncio.gather(*(stream.aclose() for stream in streams))
        assert stats.used_blocks >= 24
        if how == "closed":
            await asyncio.gather(*(stream.aclose() for stream in streams))
        else:
            readers = [asyncio.ensure_future(read_on(stream)) for stream in streams]
            await asyncio.sleep(0.01)
            for reader in readers:
                reader.cancel()
        await until(lambda: demo_engine.stats().used_blocks == 0)
        assert demo_engine.stats().running == 0
        return demo_engine.stats().generation_tokens - before

    for _ in attempts("requests that are not computed to their ends"):
        if run(leave()) < 8 * LONG_TOKENS:
            break


def test_a_slow_reader_holds_up_nobody(run: Any, demo_engine: EngineClient, demo_llm: LLM) -> None:
    params = SamplingParams(max_tokens=100, temperature=0, ignore_eos=True)
    (expected,) = demo_llm.generate([50, 60], params)

    async def ask() -> list[Any]:
        for _ in attempts("a first progress with more to come"):
            slow = generate(demo_engine, [50, 60], params)
            progress = [await anext(slow)]
            if not progress[0].finished:
                break
        others = await asyncio.gather(*(collect(demo_engine, [number + 5], params) for number in range(3)))
        assert [count(other) for other in others] == [100] * 3
        await until(lambda: demo_engine.stats().running == 0)
        return progress + [each async for each in slow]

    progress = run(ask())
    assert len(progress) == 2, "what was not read is one progress"
    same(joined(progress).completions[0], expected.outputs[0])


@pytest.mark.parametrize(
    ("prompt", "params", "message"),
    [
        ([], SHORT, "^the prompt has no tokens"),
        ("", SHORT, "^the prompt has no tokens"),
        ([1024], SHORT, "^the prompt has token id 1024; the vocabulary ends at 1023"),
        ([2**70], SHORT, "cannot be passed"),
        ([5] * 2048, SHORT, "the prompt has 2048 tokens, the limit is 2047"),
        ("the " * 30_000, SHORT, "the prompt has at least 12000 tokens, the limit is 2047"),
        ("the " * 4_000, SHORT, r"the prompt has \d+ tokens, the limit is 2047"),
        (["a"], SHORT, "text or token ids"),
        ([1.5], SHORT, "text or token ids"),
        (None, SHORT, "text or token ids"),
        ("\ud800", SHORT, "not valid UTF-8"),
        ([5], SamplingParams(top_k=2**80), "cannot be passed"),
        ([5], SamplingParams(beam_width=10**9), "max_num_seqs"),
        ([5], SamplingParams(n=1025), "n must be at most"),
        ([5], SamplingParams(stop_token_ids=(-1,)), "stop_token_ids has token id -1"),
    ],
)
def test_what_cannot_be_served_is_refused(
    run: Any, demo_engine: EngineClient, prompt: Any, params: SamplingParams, message: str
) -> None:
    pid = demo_engine.replicas[0].pid
    with pytest.raises(InvalidRequestError, match=message):
        run(collect(demo_engine, prompt, params))
    with pytest.raises(InvalidRequestError, match="priority must be"):
        run(collect(demo_engine, [5], SHORT, priority=-1))
    assert count(run(collect(demo_engine, [5], SHORT))) == 4
    assert (demo_engine.replicas[0].pid, demo_engine.ready) == (pid, True)


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(top_k=2**63),
        SamplingParams(logprobs=2**62, prompt_logprobs=2**62),
        SamplingParams(temperature=1e308),
        SamplingParams(temperature=5e-324),
        SamplingParams(top_p=5e-324),
        SamplingParams(repetition_penalty=1e-20),
        SamplingParams(repetition_penalty=1e20),
        SamplingParams(max_tokens=2**63, stop="e"),
        SamplingParams(bad_words_ids=[[token] for token in range(1024)]),
    ],
    ids=str,
)
def test_extreme_parameters_leave_the_engine_as_it_is(
    run: Any, demo_engine: EngineClient, params: SamplingParams
) -> None:
    pid = demo_engine.replicas[0].pid
    assert joined(run(collect(demo_engine, [5, 6, 7], params))).finished
    assert (demo_engine.replicas[0].pid, demo_engine.ready) == (pid, True)


def test_drain_and_close(run: Any, demo_model: Path) -> None:
    async def end() -> None:
        params = SamplingParams(max_tokens=100, temperature=0, ignore_eos=True)
        async with started(demo_model, max_num_seqs=1) as client, asyncio.TaskGroup() as group:
            with stopped(client):
                tasks = [group.create_task(collect(client, [number + 5], params)) for number in range(3)]
                await asyncio.sleep(0)  # they ask
                assert not await client.drain(0.05)
                assert not client.ready
                assert isinstance(await error_of(collect(client, [5], SHORT)), EngineClosedError)
            assert await client.drain(LIMIT_S)
            result = [joined(await task).completions[0] for task in tasks]
            assert [completion.finish_reason for completion in result] == [FinishReason.LENGTH] * 3
            await client.close()
            await client.close()
            assert client.replicas[0].pid is None

    run(end())


def test_close_ends_what_is_under_way(run: Any, demo_model: Path) -> None:
    async def end() -> None:
        async with started(demo_model, max_num_seqs=1) as client, asyncio.TaskGroup() as group:
            # more than will have been computed by then, however long the way from one line to the next takes
            requested = [
                group.create_task(error_of(collect(client, [number % 500 + 5], LONG))) for number in range(100)
            ]
            await until(lambda: client.stats().running == 1)
            link = client.replicas[0].link
            assert link is not None
            await client.close()
            assert await link.ended == "exit code 0"  # by itself, and not killed after a while
            errors = [type(await task) for task in requested]
            assert errors[-50:] == [EngineClosedError] * 50
            assert set(errors) <= {EngineClosedError, type(None)}

    run(end())


def test_a_close_that_is_cancelled_is_waited_for_by_the_next(run: Any, demo_model: Path) -> None:
    async def end() -> None:
        async with started(demo_model) as client:
            link = client.replicas[0].link
            assert link is not None
            closing = asyncio.create_task(client.close())
            await asyncio.sleep(0)  # it begins
            closing.cancel()
            await asyncio.gather(closing, return_exceptions=True)
            await client.close()
            assert link.ended.done()

    run(end())


def test_what_keeps_an_engine_from_starting(run: Any, demo_model: Path, tmp_path: Path) -> None:
    async def start(model: Path, **options: Any) -> Exception | None:
        return await error_of(EngineClient.start(EngineConfig.create(str(model), **options)))

    async def start_all() -> list[Exception | None]:
        return [
            await start(tmp_path),
            await start(demo_model, kv_cache_memory=1),
            await start(demo_model, device="cuda:99"),
        ]

    for error, options in zip(run(start_all()), [{}, {"kv_cache_memory": 1}, {"device": "cuda:99"}], strict=True):
        with pytest.raises((ConfigError, CapacityError, CheckpointError)) as here:
            LLM(demo_model if options else tmp_path, **options)  # type: ignore[arg-type]  # options of each kind
        assert (type(error), str(error)) == (here.type, str(here.value))


def test_more_engines_than_a_machine_can_run_are_refused_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hasten.server.engine.client.available_cpus", lambda: 12)
    monkeypatch.delattr("hasten.server.engine.client.Replica")
    with pytest.raises(ConfigError, match=r"data_parallel_size is 13, the maximum on this machine is 12: .* 12 CPUs"):
        asyncio.run(EngineClient.start(EngineConfig.create("m"), engines=13))
