import math
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

from hasten.bench import converted, latency, throughput
from hasten.bench.continuous import ContinuousEngine
from hasten.bench.converted import CTranslate2Engine, require_ctranslate2
from hasten.bench.engines import Engine, Generation, HuggingFaceEngine
from hasten.bench.peers import NotMeasured, Peer, failed, fastest
from hasten.bench.workloads import fixed, mixed
from hasten.core.errors import ConfigError, EngineError, UnsupportedError
from hasten.core.types import SamplingParams

PROMPTS = [[373, 336, 387], [408, 445, 120, 130, 140, 150], [77, 78], [90, 91, 92, 93] * 20]
LENGTHS = [3, 9, 1, 5]


class Breaking:
    """Answers a number of calls, then no more."""

    device, dtype = torch.device("cpu"), torch.float32

    def __init__(self, label: str, calls: int) -> None:
        self.label, self.calls = label, calls

    def generate(self, prompts: Sequence[Sequence[int]], lengths: Sequence[int]) -> Generation:
        self.calls -= 1
        if self.calls < 0:
            raise RuntimeError("out of memory\nat some line")
        return Generation([[0] * length for length in lengths], float(sum(lengths)))


@pytest.mark.parametrize("calls", [0, 2])
def test_a_peer_that_fails_leaves_the_others_results(calls: int) -> None:
    def engines() -> list[Engine]:
        return [Peer(Breaking("HF", calls)), Peer(Breaking("HF generate_batch", 99)), Breaking("hasten", 99)]

    run = engines()
    assert [each.engine for each in throughput.measure(run, mixed(2), 100, repetitions=3)] == [
        *("HF generate_batch", "hasten")
    ]
    assert failed(run) == [NotMeasured("HF", "out of memory")]
    assert failed(run)[0].line == "HF is not measured: out of memory"
    results = latency.measure(engines(), fixed(2, 4, 3), 100, repetitions=2)
    assert [each.engine for each in results] == ["HF generate_batch", "hasten"]
    assert [each.differing_requests for each in results] == [0, None]


def test_the_quoted_engine_is_the_faster_of_hugging_faces() -> None:
    assert fastest({"HF": 2.0, "HF generate_batch": 1.5, "ctranslate2": 1.0}) == "HF generate_batch"
    assert fastest({"ctranslate2": 1.0, "ctranslate2-int8": 0.5}) == "ctranslate2-int8"
    assert fastest({}) is None


def test_continuous_batches_have_the_tokens_of_padded_ones(make_model: Callable[..., Path]) -> None:
    padded = HuggingFaceEngine(str(make_model("Llama")))
    engine = ContinuousEngine(padded)
    few = engine.generate(PROMPTS[:1], LENGTHS[:1])  # the cache has to grow for the others
    assert few.token_ids == padded.generate(PROMPTS[:1], LENGTHS[:1]).token_ids
    outputs = engine.generate(PROMPTS, LENGTHS)
    assert outputs.token_ids == padded.generate(PROMPTS, LENGTHS).token_ids
    assert 0 < outputs.seconds < math.inf


def test_models_and_sampling_that_continuous_batching_does_not_support(
    tiny_bloom: Path, make_model: Callable[..., Path]
) -> None:
    with pytest.raises(UnsupportedError, match="its answers would be wrong"):
        ContinuousEngine(HuggingFaceEngine(str(tiny_bloom)))
    with pytest.raises(UnsupportedError, match="no beams"):
        ContinuousEngine(HuggingFaceEngine(str(make_model("Llama"))), SamplingParams(beam_width=2))


def test_ctranslate2_is_asked_for_where_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(converted, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="pip install ctranslate2"):
        require_ctranslate2()


def test_ctranslate2_has_the_same_tokens(tiny_bloom: Path) -> None:
    pytest.importorskip("ctranslate2")
    padded = HuggingFaceEngine(str(tiny_bloom))
    where = {"dtype": torch.float32, "device": torch.device("cpu"), "threads": 1}
    engine = CTranslate2Engine("ctranslate2", str(tiny_bloom), **where)  # type: ignore[arg-type]
    assert engine.generate(PROMPTS, LENGTHS).token_ids == padded.generate(PROMPTS, LENGTHS).token_ids
    with pytest.raises(EngineError, match="returns prompts"):
        engine.generate([[77], [78, 79]], [1, 1])
    with pytest.raises(ConfigError, match="cannot be compared with ctranslate2"):
        CTranslate2Engine("ctranslate2", str(tiny_bloom), sampling=SamplingParams(beam_width=2), **where)  # type: ignore[arg-type]
