import json
from pathlib import Path
from xml.etree import ElementTree

import jsonschema  # type: ignore[import-untyped]
import pytest
from tests.bench.report_form import form_errors

from hasten.bench import schema
from hasten.bench.startup import Start
from hasten.cli.main import main
from hasten.core.errors import ConfigError

QUICK = {
    "latency": ("--batch-sizes", "1", "2", "--prompt-length", "4", "--output-length", "3", "--repetitions", "1"),
    "throughput": ("--num-requests", "2"),
    "suite": ("--tests", "lat", "--repetitions", "1"),
}
"""Benchmark -> options with which it takes a moment."""
PLOTTED = {"latency": "hasten: ", "throughput": "hasten: ", "suite": "lat_b1, hasten: "}
"""Benchmark -> how what its picture says of hasten begins."""


@pytest.mark.parametrize("benchmark", schema.BENCHMARKS)
def test_each_benchmark_has_a_valid_schema(benchmark: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "schema", benchmark]) == 0
    found = json.loads(capsys.readouterr().out)
    jsonschema.Draft202012Validator.check_schema(found)
    assert found["properties"]["benchmark"] == {"const": benchmark}
    assert {"benchmark", "schema", "options"} < set(found["required"])


@pytest.mark.parametrize("benchmark", QUICK)
def test_what_benchmarks_write_has_their_form(benchmark: str, tiny_bloom: Path, tmp_path: Path) -> None:
    file, plot = tmp_path / "results.json", tmp_path / "plot.svg"
    common = ("--device", "cpu", "--max-num-seqs", "8", "--output-path", str(file), "--plot", str(plot))
    assert main(["bench", benchmark, str(tiny_bloom), *QUICK[benchmark], *common]) == 0
    report = json.loads(file.read_text())
    assert list(report)[:2] == ["benchmark", "schema"]
    assert report["benchmark"] == benchmark
    assert form_errors(report) == []
    assert form_errors(report | {"environment": {}})
    titles = [each.text or "" for each in ElementTree.parse(plot).iter() if each.tag.endswith("title")]
    assert any(title.startswith(PLOTTED[benchmark]) for title in titles)


def test_types_become_schemas() -> None:
    found = schema._of(Start)
    assert found["description"].startswith("One kind of start")
    assert found["properties"]["totals_s"] == {"type": "array", "items": {"type": "number"}}
    assert found["properties"]["phases"] == {"type": "object", "additionalProperties": {"type": "number"}}
    assert schema._of(float | None) == {"anyOf": [{"type": "number"}, {"type": "null"}]}


def test_an_unknown_benchmark() -> None:
    with pytest.raises(ConfigError, match="benchmark 'speed' is not known; there are embed, kernels, lambada, "):
        schema.schema("speed")
