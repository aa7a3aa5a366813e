"""Pipelines of real processes over gloo: the tokens of one rank, whatever a request asks for, and a named end."""

import os
import signal
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from threading import Timer
from typing import Any

import pytest
import torch
from tests.conftest import MakeBloom
from tests.parallel.test_launch import (
    HOST,
    await_first_output,
    children_of,
    end_of,
    endless,
    hasten,
    mpi_environment,
    running,
)
from tests.waiting import LIMIT_S

from hasten import LLM, RequestOutput, SamplingParams, ops
from hasten.checkpoint.convert import Conversion, convert
from hasten.checkpoint.plan import open_checkpoint, rank_tensors
from hasten.core.config import SchedulerConfig
from hasten.core.errors import ConfigError, RankError
from hasten.core.ports import free_port
from hasten.engine.rank_options import resolve_scheduler
from hasten.engine.recorded import RecordedSteps
from hasten.parallel.groups import PipelineGroup

pytestmark = pytest.mark.any_python

MakeModel = Callable[..., Path]

PROMPTS = [[5 + (7 * i + j) % 90 for j in range(3 + 9 * i)] for i in range(6)]
GREEDY = SamplingParams(temperature=0, max_tokens=14, ignore_eos=True)
MIXED = [
    GREEDY,
    SamplingParams(temperature=0.9, top_k=20, seed=7, n=3, max_tokens=9, ignore_eos=True),
    SamplingParams(temperature=0, max_tokens=5, prompt_logprobs=1, logprobs=2, ignore_eos=True),
    SamplingParams(temperature=1.1, top_p=0.9, seed=8, max_tokens=8, ignore_eos=True),
    SamplingParams(temperature=0, repetition_penalty=1.3, bad_words_ids=[[7, 8]], max_tokens=10, ignore_eos=True),
    SamplingParams(max_tokens=7, beam_width=3, n=3, ignore_eos=True),
]
OPTIONS: dict[str, Any] = {"device": "cpu", "max_num_batched_tokens": 40, "max_num_seqs": 6, "kv_cache_memory": 1 << 20}


@pytest.fixture(scope="module")
def four_layers(make_bloom: MakeBloom) -> Path:
    return make_bloom(n_layer=4)


@pytest.fixture(scope="module")
def right() -> Callable[[Path], list[RequestOutput]]:
    """What one rank answers to the mixed requests."""

    @lru_cache
    def answers(folder: Path) -> list[RequestOutput]:
        with LLM(folder, **OPTIONS) as llm:
            return llm.generate(PROMPTS, MIXED)

    return answers


def tokens_of(outputs: list[RequestOutput]) -> list[list[list[int]]]:
    return [[completion.token_ids for completion in output.outputs] for output in outputs]


def expect_same(found: list[RequestOutput], expected: list[RequestOutput]) -> None:
    """The same tokens, and the same log-probabilities but for roundings."""
    assert tokens_of(found) == tokens_of(expected)
    for output, other in zip(found, expected, strict=True):
        tops = [*(output.prompt_logprobs or ()), *(output.outputs[0].logprobs or ())]
        others = [*(other.prompt_logprobs or ()), *(other.outputs[0].logprobs or ())]
        assert len(tops) == len(others)
        for top, right in zip(tops, others, strict=True):
            assert (top is None) == (right is None)
            if top is not None and right is not None:
                assert {token: entry.logprob for token, entry in top.items()} == pytest.approx(
                    {token: entry.logprob for token, entry in right.items()}, abs=1e-4
                )


STAGES: dict[str, dict[str, Any]] = {
    "two": {"pipeline_parallel_size": 2},
    "three, overlapped": {"pipeline_parallel_size": 3, "pipeline_layers": [1, 2, 1], "overlap_steps": True},
    "two of two, overlapped": {"pipeline_parallel_size": 2, "tensor_parallel_size": 2, "overlap_steps": True},
    "two of two": {"pipeline_parallel_size": 2, "tensor_parallel_size": 2},
}


def assert_nothing_is_left(llm: LLM) -> None:
    engine = llm.engine
    assert engine.scheduler.blocks.num_used == 0
    assert not engine.has_unfinished
    assert engine.worker._sampler._edits == {}


def most_under_way(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> int:
    """Most steps that are under way at a time, while six requests decode."""
    engine, most = llm.engine, 0
    launch = engine.worker.launch

    def counted(batch: Any) -> Any:
        nonlocal most
        most = max(most, len(engine._flights) + 1)
        return launch(batch)

    with monkeypatch.context() as patched:
        patched.setattr(engine.worker, "launch", counted)
        llm.generate(PROMPTS, GREEDY)
    return most


@pytest.mark.usefixtures("forked_ranks")
@pytest.mark.parametrize("name", STAGES)
def test_stages_choose_the_tokens_of_one_rank(
    name: str,
    four_layers: Path,
    right: Callable[[Path], list[RequestOutput]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    expected = right(four_layers)
    with LLM(four_layers, **OPTIONS | STAGES[name]) as llm:
        for _ in range(2):  # the second time with a warm prefix cache
            expect_same(llm.generate(PROMPTS, MIXED), expected)
            assert_nothing_is_left(llm)
        assert most_under_way(llm, monkeypatch) == llm.engine.worker.stage.size + llm.engine.worker.overlap
        # a request that leaves between two steps
        stream = llm.stream(PROMPTS[:2], SamplingParams(max_tokens=40, n=2, ignore_eos=True, repetition_penalty=1.2))
        for _ in range(5):
            next(stream)
        stream.close()  # type: ignore[attr-defined]
        assert llm.engine.scheduler.blocks.num_used == 0
        expect_same(llm.generate(PROMPTS[:1], MIXED[:1]), expected[:1])
        assert_nothing_is_left(llm)


@pytest.mark.usefixtures("forked_ranks")
@pytest.mark.parametrize("layers", [[2, 2], [1, 2, 1]], ids=["two", "three"])
def test_stages_record_their_steps(
    layers: list[int], make_bloom: MakeBloom, right: Callable[[Path], list[RequestOutput]]
) -> None:
    folder = make_bloom(n_layer=4, n_head=4)  # heads for which there are kernels
    expected = right(folder)
    stages: dict[str, Any] = {"pipeline_parallel_size": len(layers), "pipeline_layers": layers}
    with LLM(folder, **OPTIONS | stages) as llm:
        for _ in range(2):
            expect_same(llm.generate(PROMPTS, MIXED), expected)
        steps = llm.engine.worker.runner._graphs
        assert isinstance(steps, RecordedSteps)
        assert steps.has_recorded == ops.records()


@pytest.mark.usefixtures("forked_ranks")
@pytest.mark.parametrize("name", ["two", "three, overlapped"])
def test_stages_with_too_small_a_cache(name: str, four_layers: Path) -> None:
    params = [SamplingParams(temperature=0, max_tokens=40, ignore_eos=True, repetition_penalty=1.1)] * 6
    params[2] = SamplingParams(max_tokens=20, beam_width=2, n=2, ignore_eos=True)
    with LLM(four_layers, **OPTIONS) as alone:
        expected = tokens_of(alone.generate(PROMPTS, params))
        layer_bytes = alone.engine.worker.runner.block_bytes // 4
    most_layers = max(STAGES[name].get("pipeline_layers", [2]))
    limits = {"kv_cache_memory": 8 * most_layers * layer_bytes, "max_model_len": 96}
    with LLM(four_layers, **OPTIONS | STAGES[name] | limits) as tight:
        assert tight.engine.scheduler.blocks.num_blocks == 8
        assert tokens_of(tight.generate(PROMPTS, params)) == expected
        assert tight.engine.scheduler.stats.preemptions > 0
        assert_nothing_is_left(tight)


@pytest.mark.usefixtures("forked_ranks")
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("Gemma2", {"sliding_window": 9, "head_dim": 16, "query_pre_attn_scalar": 20}),
        ("GPT2", {}),
        ("Mixtral", {}),
    ],
    ids=["gemma: tied", "gpt2: tied, positions", "mixtral"],
)
def test_families(name: str, options: dict[str, Any], make_model: MakeModel) -> None:
    folder = make_model(name, **options)
    params = [GREEDY] * 3
    with LLM(folder, **OPTIONS) as alone:
        expected = tokens_of(alone.generate(PROMPTS[:3], params))
    with LLM(folder, pipeline_parallel_size=2, **OPTIONS) as found:
        assert tokens_of(found.generate(PROMPTS[:3], params)) == expected


@pytest.mark.usefixtures("forked_ranks")
def test_a_faster_transformer_folder_of_two_ranks_serves_two_stages_of_two(
    four_layers: Path, tmp_path: Path, right: Callable[[Path], list[RequestOutput]]
) -> None:
    convert(Conversion(str(four_layers), str(tmp_path), ranks=2))
    with LLM(tmp_path, tensor_parallel_size=2, pipeline_parallel_size=2, **OPTIONS) as llm:
        expect_same(llm.generate(PROMPTS[:1], MIXED[:1]), right(four_layers)[:1])


def test_a_rank_reads_its_own_layers_alone(four_layers: Path) -> None:
    checkpoint = open_checkpoint(four_layers)
    names = {"head.weight", "layers.3.mlp.up.weight"}
    found = dict(rank_tensors(checkpoint, 0, 1, torch.float32, names=names))
    whole = dict(rank_tensors(checkpoint, 0, 1, torch.float32))
    assert found.keys() == names
    head, embedding = found["head.weight"], whole["embedding.weight"]
    assert isinstance(head, torch.Tensor)
    assert isinstance(embedding, torch.Tensor)
    assert torch.equal(head, embedding)  # which it is tied to
    assert "head.weight" not in whole


def test_the_death_of_the_first_of_three_stages_ends_the_run_by_name(four_layers: Path) -> None:
    victim = 2  # rank 0, in the last stage, has no connection to it but for messages
    with running([*endless(four_layers), "--pipeline-para-size", "3"]) as process:
        await_first_output(process)
        child = children_of(process.pid)[victim - 1]
        os.kill(child, signal.SIGKILL)
        code, error = end_of(process)
    assert code == 1
    assert f"rank {victim} of 3 on {HOST} (process {child}) died: killed by SIGKILL" in error


def test_a_stage_that_dies_ends_waits_for_another_one(four_layers: Path) -> None:
    others = children_of(os.getpid())
    with LLM(four_layers, **OPTIONS | STAGES["three, overlapped"]) as llm:
        llm.generate(PROMPTS[:1], GREEDY)
        new = sorted(set(children_of(os.getpid())) - set(others))
        for child in new:
            os.kill(child, signal.SIGSTOP)
        Timer(0.5, os.kill, (new[1], signal.SIGKILL)).start()
        with pytest.raises(RankError, match=rf"rank \d of 3 on {HOST} \(process {new[1]}\) died: killed by SIGKILL"):
            llm.generate(PROMPTS[:1], GREEDY)  # which waits for the stage between, and that one lives
    assert set(children_of(os.getpid())) <= set(others)


def test_an_engine_may_be_closed_with_steps_under_way(four_layers: Path) -> None:
    others = children_of(os.getpid())
    for options in ({"overlap_steps": True}, {"tensor_parallel_size": 2}):
        llm = LLM(four_layers, pipeline_parallel_size=2, **OPTIONS | options)
        stream = llm.stream(PROMPTS, GREEDY)
        next(stream)
        assert llm.engine._flights
        llm.close()
        assert set(children_of(os.getpid())) <= set(others)


def test_ranks_that_mpirun_started_form_stages(tiny_bloom: Path) -> None:
    command = ["generate", str(tiny_bloom), "--prompt", "the river", "--json", "--device", "cpu"]
    stages = [*command, "--pipeline-para-size", "2"]
    port = free_port()
    with (
        running(hasten(*stages), **mpi_environment(0, 2, port)) as first,
        running(hasten(*stages), **mpi_environment(1, 2, port)) as second,
        running(hasten(*command)) as alone,
    ):
        out, error = first.communicate(timeout=LIMIT_S)
        assert first.returncode == 0, error
        assert second.communicate(timeout=LIMIT_S) == ("", "")
        assert out == alone.communicate(timeout=LIMIT_S)[0]


def test_a_number_of_stages_that_contradicts_the_launcher(tiny_bloom: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in mpi_environment(0, 4, 9).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match="pipeline_parallel_size is 3, but this is one of 4 ranks"):
        LLM(tiny_bloom, pipeline_parallel_size=3)
    with pytest.raises(ConfigError, match="tensor_parallel_size is 4 and pipeline_parallel_size 2, but this is one of"):
        LLM(tiny_bloom, tensor_parallel_size=4, pipeline_parallel_size=2)


def test_more_stages_than_layers_are_refused(tiny_bloom: Path) -> None:
    with pytest.raises(ConfigError, match=r"pipeline_parallel_size 4 is more than the 3 layers of the model"):
        LLM(tiny_bloom, pipeline_parallel_size=4, device="cpu")


@pytest.mark.parametrize(
    ("size", "dealt", "expected"),
    [
        (1, (), [range(7)]),
        (2, (), [range(4), range(4, 7)]),
        (3, (2, 1, 4), [range(2), range(2, 3), range(3, 7)]),
        (7, (), [range(layer, layer + 1) for layer in range(7)]),
    ],
)
def test_layers_are_dealt(size: int, dealt: tuple[int, ...], expected: list[range]) -> None:
    stages = [PipelineGroup(stage, size, dealt) for stage in range(size)]
    assert [stage.layers(7) for stage in stages] == expected
    assert [stage.is_first for stage in stages] == [True] + [False] * (size - 1)
    assert [stage.is_last for stage in stages] == [False] * (size - 1) + [True]


def test_steps_that_are_under_way_together_divide_the_tokens() -> None:
    def tokens(device: str, stages: int, **options: Any) -> int | None:
        return resolve_scheduler(SchedulerConfig(**options), torch.device(device), stages).max_num_batched_tokens

    assert [tokens("cuda", stages) for stages in (1, 2, 4, 8, 16)] == [8192, 4096, 2048, 1024, 1024]
    assert tokens("cuda", 2, max_num_batched_tokens=3000) == 1500
    assert tokens("cuda", 4, max_num_batched_tokens=300) == 300
    assert [tokens("cpu", stages) for stages in (1, 2, 16, 32)] == [2048, 1024, 256, 256]
    assert tokens("cpu", 4, max_num_batched_tokens=300, max_num_seqs=8) == 96
    assert tokens("cuda", 8, max_num_seqs=2000) == 2000
