from dataclasses import replace
from pathlib import Path

import pytest
from tests.bench.load.test_metrics import FIRST, SECOND, result

from hasten.bench.evaluation.limits import cost, plan, roofline
from hasten.bench.latency import LatencyResult
from hasten.bench.report import Spread
from hasten.bench.sweep import Point, Sweep
from hasten.checkpoint.hugging_face import read_hf_config
from hasten.engine.planning import hardware
from hasten.engine.planning.plan import Setup


def latency(batch_size: int, token_ms: float) -> LatencyResult:
    spread = Spread(token_ms, token_ms, token_ms)
    return LatencyResult("hasten", batch_size, 32, 32, 3, spread, spread, spread, 1.0, None)


def test_shares_of_the_hardware_that_is_reached(tiny_bloom: Path) -> None:
    model, device, setup = read_hf_config(tiny_bloom), hardware.gpu("L4"), Setup(dtype="fp16")
    found = roofline(model, device, setup, [latency(1, 2.0), latency(8, 2.0)])
    each, eight, prompts = found.steps
    assert [step.what for step in found.steps] == ["decode, batch 1", "decode, batch 8", "prompts, 256 tokens"]
    assert each.tokens_per_second == pytest.approx(500)
    assert eight.tokens_per_second == pytest.approx(4000)
    memory = plan(model, device, setup).memory
    read = memory.fit.weight_bytes + 48 * memory.kv_bytes_per_token
    assert each.bandwidth_share == pytest.approx(read / 2e-3 / device.bytes_per_second, rel=1e-3)
    assert eight.operations_per_second == pytest.approx(8 * each.operations_per_second)
    assert each.operations_per_byte == pytest.approx(each.operations_per_second * 2e-3 / read, rel=1e-3)
    assert prompts.compute_share > eight.compute_share > 0
    assert prompts.limit


def test_the_price_of_all_tokens_is_that_of_the_machine() -> None:
    load = result(FIRST, SECOND)
    prompts = replace(load, total_token_throughput=400.0, output_throughput=40.0)
    point = Point(8, load, 10.0, None, None)
    found = cost(3.6, Sweep("hasten", "here", 10, 3, [point], prompts, 1.0), point)
    assert found is not None
    assert load.total_token_throughput is not None
    assert load.output_throughput is not None
    inputs, outputs = load.total_token_throughput - load.output_throughput, load.output_throughput
    per_second = (inputs * found.input_per_million + outputs * found.output_per_million) / 1e6
    assert per_second == pytest.approx(3.6 / 3600)
    assert found.input_per_million == pytest.approx(3.6 / 3600 / 360 * 1e6)
    assert found.requests_per_dollar == pytest.approx(load.request_throughput * 1000)
    uncounted = Point(8, replace(load, output_throughput=None), None, None, None)
    assert cost(3.6, Sweep("hasten", "here", 10, 3, [uncounted], prompts, 1.0), uncounted) is None
