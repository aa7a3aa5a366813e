import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from tests.bench.report_form import form_errors
from tests.encoders import save_encoder

from hasten.cli.main import build_parser
from hasten.cli.serve import serve_options

pytestmark = pytest.mark.any_python

if TYPE_CHECKING:
    from tests.cli.conftest import Hasten


def test_options_that_keep_an_objective(
    tiny_bloom: Path, tmp_path: Path, hasten_here: "Hasten", monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    file, output, plot = (tmp_path / name for name in ("tuned options", "tuned.json", "tuned.svg"))
    lengths = ("--prompt-length", "4", "--output-length", "2", "--max-num-seqs", "2", "--itl-target", "0")
    files = ("-o", file, "--output-path", output, "--plot", plot)
    done = hasten_here("tune", tiny_bloom, "--slo", "ttft=100s,itl=100s", "--device", "cpu", *lengths, *files)
    assert done.status == 0, done.err
    found = json.loads(output.read_text())
    assert form_errors(found) == []
    assert [point["concurrency"] for point in found["tuned"]["settings"][0]["points"]] == [1, 2]
    assert "in flight</title>" in plot.read_text()
    point, command = done.out.splitlines()
    assert point.startswith(f"{found['tuned']['point']['concurrency']} in flight: ")
    assert command == found["command"]
    words = shlex.split(command)
    assert words[:3] == ["hasten", "serve", str(tiny_bloom)]
    by_command = serve_options(build_parser().parse_args(words[1:]))
    by_file = serve_options(build_parser().parse_args(["serve", str(tiny_bloom), f"@{file}"]))
    assert by_command == by_file
    assert by_file.engine is not None
    assert by_file.engine.scheduler.max_num_seqs == found["tuned"]["point"]["concurrency"]
    assert (by_file.engine.scheduler.itl_target, by_file.engine.device) == (0, "cpu")


def test_bad_input(tiny_bloom: Path, tmp_path: Path, hasten_here: "Hasten") -> None:
    for options, message in (
        ((), "the following arguments are required: --slo"),
        (("--slo", "fast"), "'fast' is not a limit of a latency (ttft, itl, tpot, e2el)"),
        (("--slo", "itl=1s", "-o", tmp_path / "no" / "file"), "there is no folder"),
        (("--slo", "itl=1s", "--tensor-para-size", "3"), "does not divide"),
        (
            ("--slo", "itl=1s", "--max-model-len", "64"),
            "--output-length 128 are more than the longest sequence, 64 tokens",
        ),
    ):
        done = hasten_here("tune", tiny_bloom, "--device", "cpu", *options)
        assert (done.status, done.out) == (2, ""), done.err
        assert message in done.err
    done = hasten_here("serve", tiny_bloom, f"@{tmp_path / 'none'}")
    assert done.status == 2
    assert "No such file" in done.err


def test_a_model_that_generates_no_text_is_not_tuned(tmp_path: Path, hasten_here: "Hasten") -> None:
    save_encoder(tmp_path / "bert", "Bert", num_hidden_layers=1)
    done = hasten_here("tune", tmp_path / "bert", "--slo", "itl=1s", "--device", "cpu")
    assert (done.status, done.out) == (2, "")
    assert "generates no text; hasten tune is for models that do" in done.err
