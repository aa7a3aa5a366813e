import shutil
from contextlib import ExitStack
from pathlib import Path

from hasten.bench.against import Against
from hasten.bench.evaluation.engines import Engines
from hasten.bench.evaluation.options import FULL, QUICK, ReportOptions
from hasten.bench.slo import Slo
from hasten.core.config import EngineConfig


def test_an_engine_that_cannot_be_loaded_is_named(tiny_bloom: Path, tmp_path: Path) -> None:
    shutil.copy(tiny_bloom / "config.json", tmp_path)
    options = ReportOptions(
        model=str(tiny_bloom),
        engine={"device": "cpu", "max_num_seqs": 2},
        dataset="none",
        hf_model=str(tmp_path),
        against=Against(("hf", "ctranslate2")),
        slo=Slo({"ttft": 1.0}),
    )
    with ExitStack() as stack:
        engines = Engines(stack, options, EngineConfig.create(str(tiny_bloom), **options.engine), 16, threads=1)
        assert [engine.label for engine in engines.all] == ["hasten"]
        hf, ctranslate2 = engines.not_measured
    assert hf.engine == "hf"
    assert str(tmp_path) in hf.reason
    assert ctranslate2.engine == "ctranslate2"
    assert ctranslate2.reason


def test_sequences_are_no_longer_than_the_model_takes() -> None:
    for scale in (FULL, QUICK):
        assert scale.within(None) == scale.within(4096) == scale
        for limit in (9, 40, 128):
            shorter = scale.within(limit)
            assert 2 * shorter.latency_length <= limit
            assert shorter.load.prompt_length + shorter.load.output_length < limit
            assert shorter.load.output_length >= 2
