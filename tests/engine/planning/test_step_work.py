import json
from dataclasses import replace
from pathlib import Path

import pytest
from tests.engine.planning.test_plan import SHAPES

from hasten import LLM, SamplingParams
from hasten.checkpoint.hugging_face import read_hf_config
from hasten.core.model_config import ModelConfig
from hasten.engine.planning.step_work import EstimatedWork, WorkEstimator

DEMO = Path(__file__).parents[3] / "examples/demo-model"
PRODUCTS, HEAD, KV_BYTES = 32 * (4096 * 4096 * 2 + 4096 * 1024 * 2 + 3 * 4096 * 14336), 128256 * 4096, 32 * 2 * 1024 * 2
"""Of LLaMA-3-8B in bf16: multiplications for a token, for a row of logits, and bytes of a token's keys and values."""


@pytest.fixture
def llama(tmp_path: Path) -> ModelConfig:
    (tmp_path / "config.json").write_text(json.dumps(SHAPES["llama"]))
    return read_hf_config(tmp_path)


def work(model: ModelConfig, spans: list[tuple[int, int]], logits: int, *, ranks: int = 1) -> EstimatedWork:
    estimator = WorkEstimator.of(model, "bf16", ranks=ranks)
    assert estimator is not None
    estimator.add_spans([begin for begin, _ in spans], [count for _, count in spans], logits)
    return estimator.total


def test_decodes_multiply_all_weights_and_read_them_and_their_context(llama: ModelConfig) -> None:
    total = work(llama, [(99, 1), (199, 1)], 2)
    assert total.flops == 2 * 2 * (PRODUCTS + HEAD) + 4 * 4096 * 32 * 300
    assert total.read_bytes == pytest.approx(2 * (PRODUCTS + HEAD) + 300 * KV_BYTES, rel=1e-3)  # norms besides
    assert total.write_bytes == 2 * KV_BYTES


def test_each_token_of_a_prompt_sees_those_before_it(llama: ModelConfig) -> None:
    total = work(llama, [(10, 5)], 1)
    assert total.read_bytes == pytest.approx(2 * (PRODUCTS + HEAD) + 15 * KV_BYTES, rel=1e-3)
    assert total.flops == 2 * (5 * PRODUCTS + HEAD) + 4 * 4096 * 32 * (11 + 12 + 13 + 14 + 15)
    assert total.write_bytes == 5 * KV_BYTES


@pytest.mark.parametrize(("begin", "count"), [(0, 3), (0, 20), (4, 20), (8, 1), (30, 6), (7, 2)])
def test_a_window_bounds_what_a_token_sees(llama: ModelConfig, begin: int, count: int) -> None:
    windowed = replace(llama, attention=replace(llama.attention, window=8))
    seen = sum(min(position + 1, 8) for position in range(begin, begin + count))
    assert work(windowed, [(begin, count)], 0).flops == 2 * count * PRODUCTS + 4 * 4096 * 32 * seen


def test_ranks_divide_the_work(llama: ModelConfig) -> None:
    whole, half = work(llama, [(99, 1)], 1), work(llama, [(99, 1)], 1, ranks=2)
    assert half.flops == pytest.approx(whole.flops / 2)
    assert half.read_bytes == pytest.approx(whole.read_bytes / 2, rel=1e-3)


def test_few_tokens_of_a_mixture_read_few_experts(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(SHAPES["qwen3_moe"]))
    model = read_hf_config(tmp_path)
    each, many = (work(model, [(0, count)], 0) for count in (1, 10_000))
    expert = 48 * 3 * 2048 * 768 * 2
    assert many.read_bytes - each.read_bytes == pytest.approx(120 * expert, rel=0.05)
    assert each.flops == pytest.approx(2 * (8 * expert / 2 + 48 * (2048 * 4096 * 2 + 2048 * 512 * 2)), rel=0.01)


def test_an_engine_adds_up_its_steps() -> None:
    with LLM(DEMO) as llm:
        assert llm.engine.stats.estimated_flops == 0
        llm.engine.estimate_work()
        estimator = WorkEstimator.of(llm.config, "fp32")
        assert estimator is not None
        (output,) = llm.generate([[9, 10, 304]], SamplingParams(max_tokens=4, ignore_eos=True), use_tqdm=False)
        for begin, count in ((0, 3), (3, 1), (4, 1), (5, 1)):
            estimator.add_spans([begin], [count], 1)
        stats = llm.engine.stats
        found = EstimatedWork(stats.estimated_flops, stats.estimated_read_bytes, stats.estimated_write_bytes)
        assert found == estimator.total
        metrics = output.metrics
        times = [metrics.queued_ts, metrics.scheduled_ts, metrics.first_token_ts, metrics.last_token_ts]
        assert 0 < times[0] <= times[1] <= times[2] <= times[3]
        assert metrics.first_token_latency == metrics.first_token_ts - metrics.queued_ts
        assert output.num_cached_tokens == 0
        again, _ = llm.generate([list(range(40))] * 2, SamplingParams(max_tokens=1), use_tqdm=False)
        assert again.num_cached_tokens == 0
        (again,) = llm.generate([list(range(40))], SamplingParams(max_tokens=1), use_tqdm=False)
        assert again.num_cached_tokens == 40 // llm.engine.scheduler.blocks.block_size * 16
