import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from hasten.cli.demo import Comparison
from hasten.cli.main import build_parser

pytestmark = pytest.mark.any_python

if TYPE_CHECKING:
    from tests.cli.conftest import Hasten


CLIENT = Path(__file__).parents[2] / "examples" / "client.py"


def compare(accuracy: float, seconds: float) -> Comparison:
    return Comparison(hf_accuracy=60.0, hf_seconds=2.0, accuracy=accuracy, seconds=seconds, differing=0, total=512)


@pytest.mark.parametrize(
    ("found", "faults"),
    [
        (compare(60.0, 1.0), []),
        (compare(61.0, 1.0), []),
        (compare(58.9, 1.0), ["accuracies differ: 60.00% and 58.90%"]),
        (compare(60.0, 2.0), ["hasten is not faster: 1.00 times Hugging Face's speed"]),
    ],
)
def test_what_the_demo_must_not_show(found: Comparison, faults: list[str]) -> None:
    assert found.faults == faults


def test_the_demo_runs_its_commands_one_after_the_other(
    tiny_bloom: Path, tmp_path: Path, hasten_process: "Hasten", monkeypatch: pytest.MonkeyPatch
) -> None:
    # port 9 of this machine: whoever asks the server by way of this proxy gets no answer
    for name in ("http_proxy", "https_proxy", "grpc_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    dataset = tmp_path / "texts.jsonl"
    text = "Clara said that she never promised him the violin before the evening storm"
    dataset.write_text("".join(json.dumps({"text": f"{number} {text}"}) + "\n" for number in range(20)))
    folder = tmp_path / "out"
    done = hasten_process(
        "demo",
        *("--model", tiny_bloom, "--dataset", dataset, "--output-dir", folder, "--client", CLIENT, "--no-report"),
    )
    commands = [line.split()[1:3] for line in done.out.splitlines() if line.startswith("$ ")]
    assert commands[:4] == [["hasten", "convert"], ["hasten", "bench"], ["hasten", "generate"], ["hasten", "serve"]]
    assert commands[4:] == [["python", str(CLIENT)], ["kill", "%1"], ["hasten", "serve"]]
    assert f"$ hasten serve {folder / 'model-fp16'}" in done.out.splitlines()
    assert "http://localhost:8000/" in done.out
    assert re.search(r"^\(1, 1, \d+\)$", done.out, re.MULTILINE)
    assert "samples whose answers differ" in done.out
    # how fast a few tiny texts are is chance; what the demo says of it is not
    assert done.status == (1 if "demo failed" in done.err else 0), done.err
    assert (folder / "lambada.json").is_file()


def test_the_demo_ends_with_a_report(tmp_path: Path, hasten_here: "Hasten", monkeypatch: pytest.MonkeyPatch) -> None:
    """Its commands are recorded, not run: `hasten report` has tests of its own."""
    commands: list[list[str]] = []

    def record(_: object, command: Sequence[str]) -> int:
        commands.append(list(command))
        return 0

    monkeypatch.setattr("hasten.cli.demo._step", record)
    monkeypatch.setattr("hasten.cli.demo._serve", lambda *_: record(None, ["serve"]))
    monkeypatch.setattr("hasten.cli.demo._read", lambda _: compare(60.0, 1.0))
    assert hasten_here("demo", "--output-dir", tmp_path).status == 0
    assert [command[0] for command in commands] == ["convert", "bench", "generate", "serve", "report"]
    args = build_parser().parse_args(commands[-1])
    assert (args.output, args.quick) == (str(tmp_path / "report.html"), True)
    assert Path(args.model, "config.json").is_file()
    commands.clear()
    assert hasten_here("demo", "--output-dir", tmp_path, "--no-report").status == 0
    assert "report" not in [command[0] for command in commands]


def test_a_step_that_fails_ends_the_demo(tiny_bloom: Path, tmp_path: Path, hasten_here: "Hasten") -> None:
    dataset = tmp_path / "texts.jsonl"
    dataset.write_text("{}\n")
    inputs = ("--model", tiny_bloom, "--dataset", dataset, "--client", CLIENT)
    done = hasten_here("demo", *inputs, "--output-dir", tmp_path / "out")
    assert done.status == 2
    assert "line 1" in done.err
    assert "hasten generate" not in done.out
