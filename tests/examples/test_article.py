"""The article's script, from start to end, with the processes of this machine."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from tests.waiting import eventually

from hasten.core.ports import free_ports

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "examples" / "article.sh"
PROMPT = "That year the spring came early."
LONGEST_S = 1200
SAMPLES = 8

Environment = dict[str, str]


@pytest.fixture
def environment(tmp_path: Path) -> Iterator[Environment]:
    """Of the script: its own state and ports. Whatever it leaves running is ended."""
    scripts = Path(sys.executable).parent
    result = {name: value for name, value in os.environ.items() if name != "HASTEN_CLUSTER"}
    result |= {
        "HASTEN_HOME": str(tmp_path / "home"),
        "TMPDIR": str(tmp_path),
        "PATH": f"{scripts}:{os.environ['PATH']}",
    }
    result |= {"SAMPLES": str(SAMPLES), "PYTHON": sys.executable, "PROMPT": PROMPT, "OMP_NUM_THREADS": "1"}
    http, grpc, metrics = free_ports(3)
    result["SERVER_OPTIONS"] = f"--http-port {http} --grpc-port {grpc} --metrics-port {metrics}"
    yield result
    for process in remaining(result):
        process.kill()


def remaining(environment: Environment) -> list[psutil.Process]:
    """Processes that were started with this state folder."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("HASTEN_HOME") == environment["HASTEN_HOME"]:
                found.append(process)
        except psutil.Error:
            continue
    return found


def run(environment: Environment, *command: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        command,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=LONGEST_S,
        cwd=environment["TMPDIR"],
    )


@pytest.mark.slow
@pytest.mark.timeout(LONGEST_S)
def test_the_article_from_start_to_end(environment: Environment) -> None:
    done = run(environment, "bash", str(SCRIPT))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    titles = re.findall(r"^== (\w+)", done.stdout, re.MULTILINE)
    assert titles == ["Upload", "Convert", "Compare", "Deploy", "Ask", "Clean"]
    lines = done.stdout.splitlines()
    assert any(re.fullmatch(r"bloom-pvc  \S+ +a model and its data  \S+ +\d+[sm]", line) for line in lines)
    tensor = " - model.layers.0.attention.query_key_value.bias...: shape (3, 128)         s | saved at /mnt/model"
    assert any(line.startswith(tensor) for line in lines)
    job = r"convert-bloom  SUCCEEDED  PYTORCHJOB  \d+[sm] +0 +N/A +\S+"
    assert any(re.fullmatch(job, line) for line in lines)
    assert_the_same_accuracy(lines)
    server = r"ft-triton-bloom  Triton  1        1        1          \S+ +RESTFUL:\d+,GRPC:\d+"
    assert any(re.fullmatch(server, line) for line in lines)
    answer = lines.index("== Ask") + 1
    shape = re.fullmatch(r"\(1, 1, (\d+)\)", lines[answer])
    assert shape is not None
    assert int(shape[1]) > 32
    assert lines[answer + 1].startswith(PROMPT)
    assert len(lines[answer + 1]) > len(PROMPT)
    assert lines[lines.index("== Clean up") + 1 :] == [
        "server ft-triton-bloom is deleted",
        *(f"job {name} is deleted" for name in ("convert-bloom", "compare-hf", "compare-hasten", "create-repository")),
        "volume bloom-pvc is deleted",
    ]
    assert_nothing_is_left(environment)


def assert_the_same_accuracy(lines: list[str]) -> None:
    pattern = rf"(compare-\w+)  Accuracy: (\d+\.\d+)% \(\d+/{SAMPLES}\) \(elapsed time: \d+\.\d+ sec\)"
    found = {match[1]: float(match[2]) for line in lines if (match := re.fullmatch(pattern, line))}
    assert found.keys() == {"compare-hf", "compare-hasten"}
    # the converted weights are fp16: an answer on the border may change
    assert abs(found["compare-hf"] - found["compare-hasten"]) <= 100 / SAMPLES


def assert_nothing_is_left(environment: Environment) -> None:
    eventually(lambda: remaining(environment) == [], lambda: str(remaining(environment)))
    for verb in ("list", "serve list", "data list"):
        listed = run(environment, "hasten", "cluster", *verb.split(), "-A", "-o", "json")
        assert (listed.stdout, listed.returncode) == ("[]\n", 0)
    assert list(Path(environment["TMPDIR"]).glob("tmp.*")) == []


@pytest.mark.timeout(LONGEST_S)
def test_a_job_that_fails_ends_the_article_and_is_cleaned_up(environment: Environment, tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    done = run({**environment, "MODEL": str(model)}, "bash", str(SCRIPT))
    assert done.returncode == 1
    assert "hasten: error: " in done.stdout
    assert re.search(r"^Status: +FAILED$", done.stderr, re.MULTILINE)
    assert "== Compare" not in done.stdout
    assert done.stdout.endswith("job convert-bloom is deleted\nvolume bloom-pvc is deleted\n")
    assert_nothing_is_left(environment)
