"""Batches on a Ray cluster of this machine, with real engines in real processes."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from tests.batch.test_job import lines, texts, write_rows
from tests.waiting import eventually

from hasten import LLM
from hasten.batch import on_ray
from hasten.batch.job import BatchJob, run_batch
from hasten.batch.on_ray import RayEngines
from hasten.cli.main import main
from hasten.core.errors import EngineError

pytestmark = [pytest.mark.any_python, pytest.mark.filterwarnings("ignore::ResourceWarning")]  # Ray leaves files open

MODEL = str(Path(__file__).parents[2] / "examples" / "demo-model")
OPTIONS: dict[str, Any] = {"device": "cpu", "progress_bars": False, "max_num_seqs": 2}


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    ray.init(num_cpus=2, include_dashboard=False, logging_level="error", log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    prompts = [{"prompt": f"Once there were {n} dogs", "max_tokens": 4 + n % 7, "temperature": 0.5} for n in range(24)]
    refused = {"prompt": [1] * 5000}
    return write_rows(tmp_path_factory.mktemp("rows") / "in", [*prompts, refused])


@pytest.fixture(scope="module")
def expected(rows: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, list[str]], str]:
    """Texts by id, and the message of the row that is refused, by one engine in this process."""
    out = tmp_path_factory.mktemp("alone")
    with LLM(MODEL, device="cpu", progress_bars=False) as llm:
        run_batch(llm, rows, out, use_tqdm=False)
    (error,) = lines(out, "errors")
    return texts(out), error["error"]["message"]


def test_an_engine_that_dies_is_replaced_and_its_rows_are_computed(
    cluster: None, rows: Path, expected: tuple[dict[str, list[str]], str], tmp_path: Path
) -> None:
    killed, most = list[int](), list[int]()

    class Killing(RayEngines):
        def step(self) -> list[object]:  # type: ignore[override]
            done = super().step()
            most.append(max(engine.load for engine in self._engines))
            if done and not killed:
                busy = max(self._engines, key=lambda engine: engine.load)
                killed.append(busy.load)
                ray.kill(busy.actor)
            return list(done)

    with BatchJob(rows, tmp_path, model=MODEL) as job, Killing(MODEL, OPTIONS, engines=1) as engines:
        summary = job.run(engines, show_progress=False)
    assert killed
    assert max(most) <= OPTIONS["max_num_seqs"] + 1, "the others wait for whichever engine is free"
    assert (summary.results, summary.errors) == (24, 1)
    assert texts(tmp_path) == expected[0]


def test_engines_that_cannot_start_end_the_batch_with_the_reason(cluster: None, tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=f"no engine starts on Ray: there is no folder {tmp_path / 'none'};"):
        RayEngines(str(tmp_path / "none"), OPTIONS, engines=1)


def test_two_engines_give_what_one_gives(
    cluster: None,
    rows: Path,
    expected: tuple[dict[str, list[str]], str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    command = ["batch", str(rows), str(tmp_path), "--model", MODEL, "--device", "cpu", "--no-progress-bars"]
    assert main([*command, "--engines", "2"]) == 2
    assert "need --on ray" in capsys.readouterr().err
    assert main([*command, "--on", "ray", "--nnodes", "2"]) == 2
    assert "leave out --nnodes" in capsys.readouterr().err
    monkeypatch.setattr(on_ray, "_LEAST_S", 0.0)
    assert main([*command, "--on", "ray", "--engines", "2"]) == 1
    assert "25 rows: 24 results, 1 error\n" in capsys.readouterr().out
    (error,) = lines(tmp_path, "errors")
    assert (texts(tmp_path), error["error"]["message"]) == expected
    assert json.loads((tmp_path / "summary.json").read_text())["results"] == 24


def test_an_engine_with_nothing_left_to_do_leaves_its_host(
    cluster: None, rows: Path, expected: tuple[dict[str, list[str]], str], tmp_path: Path
) -> None:
    counts: list[int] = []

    class Counting(RayEngines):
        def step(self) -> list[object]:  # type: ignore[override]
            done = super().step()
            counts.append(len(self._engines))
            return list(done)

    # the first engine has one row, which takes longer than the others by far
    long = {"custom_id": "long", "prompt": "Once", "max_tokens": 1500, "temperature": 0, "ignore_eos": True}
    source = write_rows(tmp_path / "in", [long, *map(json.loads, rows.read_text().splitlines())])
    with BatchJob(source, tmp_path / "out", model=MODEL) as job, Counting(MODEL, OPTIONS, engines=2) as engines:
        eventually(lambda: engines.step() is not None and all(each.starting is None for each in engines._engines))
        job.run(engines, show_progress=False)
    found = texts(tmp_path / "out")
    assert found.pop("long")
    assert len(found) == len(expected[0])
    assert (counts[0], counts[-1]) == (2, 1)
