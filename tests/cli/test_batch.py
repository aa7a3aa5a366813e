import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from tests.waiting import eventually

from hasten import LLM, SamplingParams
from hasten.batch.job import run_batch

if TYPE_CHECKING:
    from tests.cli.conftest import Hasten

DEMO = Path(__file__).parents[2] / "examples" / "demo-model"
WORDS = ("Anna walked to the river", "Ben found the old letter", "Clara opened the window", "David carried bread")


def write(path: Path, rows: Iterable[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def texts(out: Path) -> dict[str, str]:
    found = [json.loads(line) for file in out.glob("results-*.jsonl") for line in file.read_text().splitlines()]
    result = {line["custom_id"]: line["response"]["body"]["choices"][0]["text"] for line in found}
    assert len(result) == len(found)
    return result


def test_results_are_those_of_generate(tiny_bloom: Path, hasten_here: "Hasten", tmp_path: Path) -> None:
    rows = [{"custom_id": words, "prompt": words, "max_tokens": 3 + n} for n, words in enumerate(WORDS)]
    source, out = write(tmp_path / "in.jsonl", rows), tmp_path / "out"
    done = hasten_here("batch", source, out, "--model", tiny_bloom, "--temperature", "0", "--max-num-seqs", "2")
    assert (done.status, done.err) == (0, "")
    assert done.out.startswith("4 rows: 4 results, 0 errors\n")
    assert done.out.endswith(f"in {out}\n")
    with LLM(tiny_bloom) as llm:
        params = [SamplingParams(temperature=0, max_tokens=3 + n) for n in range(len(WORDS))]
        outputs = llm.generate(WORDS, params, use_tqdm=False)
        summary = run_batch(llm, source, tmp_path / "python", defaults={"temperature": 0}, use_tqdm=False)
    assert (summary.rows, summary.results, summary.errors) == (4, 4, 0)
    assert texts(tmp_path / "python") == texts(out)
    assert texts(out) == {output.prompt: output.outputs[0].text for output in outputs}
    again = hasten_here("batch", source, out, "--model", tiny_bloom, "--temperature", "0")
    assert again.out == f"4 rows: 4 results, 0 errors, 4 of them in earlier runs\nin {out}\n"


def test_options_stand_in_for_what_rows_do_not_say(tiny_bloom: Path, hasten_here: "Hasten", tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [{"prompt": WORDS[0]}, {"prompt": WORDS[1], "max_tokens": 2}]
    source = write(tmp_path / "in.jsonl", rows)
    options = ("--max-new-tokens", "4", "--ignore-eos")
    assert hasten_here("batch", source, tmp_path / "out", "--model", tiny_bloom, *options).status == 0
    lines = (tmp_path / "out" / "results-00000.jsonl").read_text().splitlines()
    usage = {
        line["custom_id"]: line["response"]["body"]["usage"]["completion_tokens"] for line in map(json.loads, lines)
    }
    assert usage == {"row-1": 4, "row-2": 2}


def test_errors_are_status_1_and_bad_input_is_2(tiny_bloom: Path, hasten_here: "Hasten", tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [{"prompt": WORDS[0]}, {"prompt": "x", "top_p": 7}]
    source, out = write(tmp_path / "in.jsonl", rows), tmp_path / "out"
    done = hasten_here("batch", source, out, "--model", tiny_bloom)
    assert done.status == 1
    first, *_, last = done.out.splitlines()
    assert first == "2 rows: 1 result, 1 error"
    assert last.startswith(f"in {out}; the errors' reasons are in errors-*.jsonl, the first: line 2: top_p must be")
    (line,) = (out / "errors-00000.jsonl").read_text().splitlines()
    assert json.loads(line)["error"]["message"].startswith("line 2: top_p must be")
    wrong = hasten_here("batch", tmp_path / "none.jsonl", out, "--model", tiny_bloom)
    assert (wrong.status, wrong.out) == (2, "")
    assert wrong.err.count("\n") == 1
    onto_a_file = hasten_here("batch", source, source, "--model", tiny_bloom)
    assert onto_a_file.err == f"hasten: error: {source} is a file; give a new folder for the results\n"
    other = hasten_here("batch", source, out, "--model", tiny_bloom, "--max-new-tokens", "3")
    assert other.status == 2
    assert "the sampling options differ" in other.err


@pytest.mark.slow
@pytest.mark.any_python
def test_the_demo_model_goes_on_after_each_kill(tmp_path: Path) -> None:
    rows = [{"custom_id": f"{n}", "prompt": WORDS[n % 4], "max_tokens": 24, "seed": n} for n in range(100)]
    source, out = write(tmp_path / "in.jsonl", rows), tmp_path / "out"
    command = [sys.executable, "-m", "hasten", "batch", str(source), str(out), "--model", str(DEMO)]
    command += ["--max-num-seqs", "8", "--rows-per-shard", "30", "--ignore-eos"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}

    def size() -> int:
        return sum(file.stat().st_size for file in out.glob(".results.partial"))

    for kill in range(2):
        with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL) as process:
            begun = size()
            eventually(lambda begun=begun: size() not in (0, begun))  # type: ignore[misc]
            process.kill()
        assert process.returncode == -signal.SIGKILL, kill
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "100 rows: 100 results, 0 errors, " in done.stdout
    with LLM(DEMO) as llm:
        params = [SamplingParams(max_tokens=24, seed=n, ignore_eos=True) for n in range(100)]
        outputs = llm.generate([WORDS[n % 4] for n in range(100)], params, use_tqdm=False)
    assert texts(out) == {f"{n}": output.outputs[0].text for n, output in enumerate(outputs)}
