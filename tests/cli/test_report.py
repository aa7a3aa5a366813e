"""`hasten report`, whole once: a run that is killed, and the one that goes on."""

import json
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
from dataclasses import dataclass
from html.parser import HTMLParser
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from tests.bench.report_form import form_errors
from tests.waiting import eventually

from hasten.bench import startup
from hasten.bench.charts import WIDTH, number
from hasten.cli.main import main
from hasten.core import extras
from hasten.core.files import FOLDER_LOCK, held
from hasten.core.ports import free_port

pytestmark = pytest.mark.any_python

if TYPE_CHECKING:
    from tests.cli.conftest import Hasten

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
SECTIONS = ["memory plan", "start", "served model", "accuracy", "latency"]
VOID = {"meta", "br"}


@dataclass(frozen=True)
class Report:
    """What two runs left: the first was killed once it had written a section."""

    page: Path
    source: str
    data: dict[str, Any]
    out: str
    progress: str
    arguments: tuple[str, ...]


@pytest.fixture(scope="module")
def report(tiny_bloom: Path, tmp_path_factory: pytest.TempPathFactory) -> Report:
    folder = tmp_path_factory.mktemp("report")
    texts, page = folder / "texts.jsonl", folder / "page.html"
    words = "Clara said that she never promised him the violin before the evening storm".split()
    lines = [" ".join(words[: 4 + number % 8]) for number in range(6)]
    texts.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    arguments = (
        *("report", str(tiny_bloom), "-o", str(page), "--dataset", str(texts), "--quick", "--no-overlap-steps"),
        *("--device", "cpu"),
        *("--price-per-hour", "2", "--slo", "ttft=100s,itl=100s", "--max-num-seqs", "4"),
    )
    command = [sys.executable, "-m", "hasten", *arguments]
    with subprocess.Popen(
        command, stderr=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"}, start_new_session=True
    ) as killed:
        eventually(lambda: any(folder.glob("page.work/*.json")), lambda: f"it ended with {killed.poll()}")
        os.killpg(killed.pid, signal.SIGKILL)
    assert not page.exists()
    with pytest.MonkeyPatch().context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        # that nothing is compiled before a cold start is shown by tests/cli/test_bench.py
        patch.setattr(startup, "_kernel_caches", startup._own_caches)
        out, progress = _captured(arguments, folder)
    source = page.read_text(encoding="utf-8")
    return Report(page, source, json.loads(page.with_suffix(".json").read_text()), out, progress, arguments)


def _captured(arguments: tuple[str, ...], folder: Path) -> tuple[str, str]:
    """What a run in this process writes to its standard streams."""
    from contextlib import redirect_stderr, redirect_stdout
    from io import StringIO

    out, err = StringIO(), StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        status = main(arguments)
    assert status == 0, err.getvalue()
    return out.getvalue(), err.getvalue()


class _Page(HTMLParser):
    """Checks that tags are closed in order, and keeps text and what tags refer to."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text = ""
        self.data = ""
        self.references: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.references += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "xlink:href")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "script":
            self.data += data
        elif self.open and self.open[-1] != "style":
            self.text += data + "\n"


@pytest.fixture(scope="module")
def page(report: Report) -> _Page:
    result = _Page()
    result.feed(report.source)
    result.close()
    assert result.open == []
    return result


def test_a_run_goes_on_where_the_killed_one_was(report: Report) -> None:
    assert "memory plan: measured before" in report.progress
    for section in SECTIONS[1:]:
        assert re.search(rf"\] {section}: [\d.]+ s$", report.progress, re.MULTILINE), report.progress
    assert report.out.splitlines() == [
        report.data["headline"],
        f"{report.page}  the report",
        f"{report.page.with_suffix('.json')}  its figures",
        f"{report.page.with_suffix('.png')}  its pictures",
    ]


def test_the_pictures_are_a_png(report: Report) -> None:
    data = report.page.with_suffix(".png").read_bytes()
    assert data.startswith(b"\x89PNG")
    width, height = struct.unpack(">2I", data[16:24])
    rows = -(-report.source.count("<svg ") // 3)
    assert width == 2 * 3 * WIDTH
    assert height > 2 * rows * 50


def test_without_what_draws_pictures_the_output_says_so(report: Report, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extras, "find_spec", lambda name: None if name == "resvg_py" else find_spec(name))
    out, _ = _captured(report.arguments, report.page.parent)
    assert out.splitlines()[-1] == (
        f"no page.png: a picture such as {report.page.with_suffix('.png')} needs resvg_py, which is not installed; "
        "run: pip install 'hasten[png]'"
    )


def test_a_second_run_measures_nothing_and_takes_new_prices(report: Report) -> None:
    before = report.data
    changed = [*report.arguments[:-2], "--max-num-seqs", "4", "--price-per-hour", "4"]
    _, progress = _captured(tuple(changed), report.page.parent)
    assert [
        line.split("] ")[1].split(":")[0] for line in progress.splitlines() if "measured before" in line
    ] == SECTIONS
    after = json.loads(report.page.with_suffix(".json").read_text())
    assert after["serving"] == before["serving"]
    assert after["cost"]["output_per_million"] == pytest.approx(2 * before["cost"]["output_per_million"])


def test_the_json_has_its_form(report: Report) -> None:
    found = report.data
    assert form_errors(found) == []
    assert form_errors({**found, "accuracy": None})
    assert [each["engine"] for each in found["accuracy"]["engines"]] == ["HF", "hasten"]
    assert found["accuracy"]["comparisons"][0]["differing"] == [], "the same model in the same type"
    assert [point["concurrency"] for point in found["serving"][0]["points"]][:2] == [1, 4]
    assert found["knees"][0]["concurrency"] in (1, 4)
    assert [start["kind"] for start in found["startup"]["starts"]] == ["cold", "warm"]
    assert all(len(file["sha256"]) == 64 for file in found["provenance"]["files"])
    assert {"model.safetensors", "config.json"} <= {file["name"] for file in found["provenance"]["files"]}


def test_the_page_needs_nothing_else_and_has_all_figures(report: Report, page: _Page) -> None:
    assert page.references == []
    assert not re.search(r"https?:|url\(|@import", report.source.partition('<script type="application/json"')[0])
    assert json.loads(page.data)["model"] == report.data["model"]
    found = report.data
    expected = [found["headline"], found["provenance"]["model_sha256"], found["provenance"]["command"]]
    for engine in found["accuracy"]["engines"]:
        expected += [f"{engine['accuracy']:.2f}%", number(engine["seconds"])]
    for each in found["latency"]["results"]:
        expected += [number(each[name]["p50"]) for name in ("first_token_ms", "token_ms", "total_ms")]
    for point in found["serving"][0]["points"]:
        load = point["load"]
        expected += [number(load["output_throughput"]), number(point["user_tokens_per_second"])]
        expected += [number(load[name][key]) for name in ("ttft", "itl") for key in ("p50", "p95", "p99")]
    expected += [number(step["tokens_per_second"]) for step in found["roofline"]["steps"]]
    expected += [f"{start['total_s']:.2f}" for start in found["startup"]["starts"]]
    assert [each for each in expected if each not in page.text] == []


def test_the_command_in_the_report_gives_the_same_report(report: Report) -> None:
    import shlex

    from hasten.cli.main import build_parser

    words = shlex.split(report.data["provenance"]["command"])
    again = vars(build_parser().parse_args(words[1:]))
    first = vars(build_parser().parse_args(report.arguments))
    assert {name: value for name, value in again.items() if name != "parser"} == {
        name: value for name, value in first.items() if name != "parser"
    }


@pytest.mark.any_python
@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium here")
def test_the_page_fits_a_phone_in_light_and_dark(report: Report) -> None:
    from playwright.sync_api import sync_playwright

    with (
        sync_playwright() as playwright,
        playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"]) as browser,
    ):
        grounds = []
        for scheme in ("light", "dark"):
            tab = browser.new_page(viewport={"width": 360, "height": 740}, color_scheme=scheme)
            tab.goto(report.page.as_uri())
            assert tab.evaluate("document.documentElement.scrollWidth") <= 360
            grounds.append(tab.evaluate("getComputedStyle(document.body).backgroundColor"))
            assert tab.evaluate("[...document.querySelectorAll('svg')].every(each => each.clientHeight > 20)")
        assert grounds[0] != grounds[1]


def test_bad_input_is_one_line(tiny_bloom: Path, tmp_path: Path, hasten_here: "Hasten") -> None:
    page = str(tmp_path / "page.html")
    for options, message in (
        (("--slo", "ttft=300"), "'ttft=300' is not a limit of a latency"),
        (("--against", "tgi"), "'tgi' is no engine to compare with"),
        (("--against", "hf,none"), "'hf,none' has none beside others"),
        (("--hf-model", str(tmp_path / "none")), "there is no folder"),
        (("--price-per-hour", "free"), "'free' is not a price above 0"),
        (("--dataset", str(tmp_path / "none.jsonl")), "cannot read the dataset"),
        (("-o", "."), "cannot write the page to .: it is a folder"),
        (("-o", str(tmp_path / "page.json")), "is what the JSON is called; give the page another ending"),
        (("-o", str(tmp_path / "page.png")), "is what the PNG is called; give the page another ending"),
        (("-o", str(tmp_path / "no" / "page.html")), "there is no folder"),
        (("--against", "openai=ftp://host"), "does not begin with http"),
        (("-tp", "3"), "does not divide"),
    ):
        given = options if "-o" in options else (*options, "-o", page)
        done = hasten_here("report", tiny_bloom, "--device", "cpu", *given)
        assert (done.status, done.out) == (2, ""), options
        assert done.err.count("\n") - done.err.count("s] ") == 1
        assert message in done.err
    assert list(tmp_path.iterdir()) == []


def test_a_server_that_does_not_answer_ends_it_before_anything_is_measured(
    tiny_bloom: Path, tmp_path: Path, hasten_here: "Hasten"
) -> None:
    url = f"http://127.0.0.1:{free_port()}"
    page = tmp_path / "page.html"
    done = hasten_here("report", tiny_bloom, "--device", "cpu", "-o", page, "--against", f"openai={url}")
    assert (done.status, done.out) == (1, "")
    assert f"the server at {url} does not list its models" in done.err
    assert not list(tmp_path.glob("*.work/*.json"))


def test_two_runs_do_not_write_one_report(tiny_bloom: Path, tmp_path: Path, hasten_here: "Hasten") -> None:
    with held(tmp_path / "page.work", "this report"):
        done = hasten_here("report", tiny_bloom, "--device", "cpu", "-o", tmp_path / "page.html")
    assert (done.status, done.out) == (2, "")
    assert f"another process is writing this report to {tmp_path / 'page.work'}; wait for it or end it" in done.err
    assert [path.name for path in (tmp_path / "page.work").iterdir()] == [FOLDER_LOCK]


def test_a_model_that_does_not_continue_texts(tmp_path: Path, hasten_here: "Hasten") -> None:
    from tests.encoders import save_encoder

    folder = save_encoder(tmp_path / "bert", "Bert", num_hidden_layers=1)
    done = hasten_here("report", folder, "-o", tmp_path / "page.html")
    assert done.status == 2
    assert "BertModel generates no text; hasten report is for models that do" in done.err
