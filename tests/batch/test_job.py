import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from pyarrow import Table
from pyarrow.parquet import write_table
from tests.batch.simulated import MODEL, SimulatedEngine, main
from tests.forked import forking
from tests.waiting import LIMIT_S, eventually

from hasten.batch.job import BatchJob, BatchSummary
from hasten.batch.part import Part
from hasten.core import extras
from hasten.core.errors import ConfigError, EngineError
from hasten.core.types import RequestOutput
from hasten.engine.chat import ChatTemplate

ROOT = Path(__file__).parents[2]


def write_rows(path: Path, rows: Iterable[object]) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def openai_row(name: str, url: str = "/v1/completions", **body: Any) -> dict[str, Any]:
    return {"custom_id": name, "method": "POST", "url": url, "body": {"model": MODEL, **body}}


def lines(folder: Path, kind: str) -> list[dict[str, Any]]:
    files = sorted(folder.glob(f"{kind}-*.jsonl"))
    return [json.loads(line) for file in files for line in file.read_text().splitlines()]


def texts(folder: Path) -> dict[str, list[str]]:
    """custom_id -> the texts of its choices; no id may be there twice."""
    found = lines(folder, "results")
    result = {line["custom_id"]: [choice["text"] for choice in line["response"]["body"]["choices"]] for line in found}
    assert len(result) == len(found)
    return result


def run(source: Path, output: Path, engine: SimulatedEngine | None = None, **options: Any) -> BatchSummary:
    with BatchJob(source, output, model=MODEL, **options) as job:
        return job.run(engine or SimulatedEngine(), show_progress=False)


def test_rows_of_both_forms_have_results_in_openai_form(tmp_path: Path) -> None:
    rows = [
        openai_row("a", prompt=[1, 2], max_tokens=3),
        "",
        {"prompt": [3, 4], "n": 2, "temperature": 0.5},
        {"id": "mine", "prompt_token_ids": [5]},
        openai_row("several", prompt=[[1], [2], [3]]),
    ]
    summary = run(write_rows(tmp_path / "in", rows), tmp_path / "out")
    assert (summary.rows, summary.results, summary.errors, summary.resumed) == (4, 4, 0, 0)
    assert texts(tmp_path / "out") == {"a": ["3"], "row-3": ["7", "7"], "mine": ["5"], "several": ["1", "2", "3"]}
    line = next(line for line in lines(tmp_path / "out", "results") if line["custom_id"] == "a")
    assert set(line) == {"id", "custom_id", "response", "error"}
    assert line["error"] is None
    assert (line["response"]["status_code"], line["response"]["request_id"]) == (200, "req_0")
    body = line["response"]["body"]
    assert (body["object"], body["model"]) == ("text_completion", MODEL)
    assert body["usage"] == {"prompt_tokens": 2, "completion_tokens": 1, "total_tokens": 3}
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["results"] == 4
    assert not list((tmp_path / "out").glob(".*.partial"))


def parquet(path: Path, rows: list[dict[str, Any]]) -> Path:
    columns = dict.fromkeys(name for row in rows for name in row)
    write_table(Table.from_pylist([{name: row.get(name) for name in columns} for row in rows]), path, row_group_size=2)
    return path


@pytest.mark.parametrize("text", [False, True], ids=["structures", "JSON"])
def test_rows_of_a_parquet_file_have_the_results_of_json_lines(text: bool, tmp_path: Path) -> None:
    rows = [openai_row("a", prompt=[1, 2], max_tokens=3), openai_row("b", prompt=[4], n=2), openai_row("a", prompt=[1])]
    bodies: list[dict[str, Any]] = [
        {"prompt": [3, 4], "n": 2},
        {"id": "mine", "prompt_token_ids": [5]},
        {"id": "worse", "prompt": [], "n": 0},
    ]
    groups: dict[str, list[dict[str, Any]]] = {"calls": rows, "bodies": bodies}
    for name, group in groups.items():
        stored = [row | {"body": json.dumps(row["body"])} if text and "body" in row else row for row in group]
        for kind, file in (("lines", write_rows(tmp_path / name, group)), ("rows", parquet(tmp_path / "in", stored))):
            summary = run(file, tmp_path / f"{name}-{kind}", rows_per_shard=1)
            assert (summary.results, summary.errors) == (2, 1)
        assert texts(tmp_path / f"{name}-rows") == texts(tmp_path / f"{name}-lines")
        (error,), (expected,) = (lines(tmp_path / f"{name}-{kind}", "errors") for kind in ("rows", "lines"))
        assert error["error"]["message"] == expected["error"]["message"].replace("line 3", "row 3")
    again = run(tmp_path / "in", tmp_path / "bodies-rows")
    assert again.resumed == 3


def test_parquet_needs_a_package_that_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extras, "find_spec", lambda name: None if name == "pyarrow" else find_spec(name))
    with pytest.raises(
        ConfigError, match=r"needs pyarrow, which is not installed; run: pip install 'hasten\[parquet\]'"
    ):
        run(parquet(tmp_path / "in", [{"prompt": [1]}]), tmp_path / "out")


NAMED = {"type": "function", "function": {"name": "g"}}


def test_chats_go_through_the_template(tmp_path: Path, demo_tokenizer_engine: SimulatedEngine) -> None:
    chat = [{"role": "user", "content": "hello"}]
    rows = [openai_row("c", "/v1/chat/completions", messages=chat), {"id": "p", "messages": chat}]
    run(write_rows(tmp_path / "in", rows), tmp_path / "out", demo_tokenizer_engine)
    found = {line["custom_id"]: line["response"]["body"] for line in lines(tmp_path / "out", "results")}
    assert set(found) == {"c", "p"}
    assert found["c"]["object"] == "chat.completion"
    assert found["c"]["choices"][0]["message"]["role"] == "assistant"
    assert found["c"]["choices"] == found["p"]["choices"]


def test_chats_call_tools(tmp_path: Path, demo_tokenizer_engine: SimulatedEngine) -> None:
    called = '<tool_call>{"name": "f", "arguments": {"a": 1}}</tool_call>'
    engine, chat = demo_tokenizer_engine, [{"role": "user", "content": "hello"}]
    engine.template = ChatTemplate("{{ tools | tojson }}<tool_call>{{ messages[0].content }}", {})
    engine.max_model_len, engine.text = 512, called
    tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    rows = [
        openai_row("tools", "/v1/chat/completions", messages=chat, tools=tools),
        openai_row("none", "/v1/chat/completions", messages=chat, tools=tools, tool_choice="none"),
        openai_row("wrong", "/v1/chat/completions", messages=chat, tools=tools, tool_choice=NAMED),
    ]
    run(write_rows(tmp_path / "in", rows), tmp_path / "out", engine)
    found = {line["custom_id"]: line["response"]["body"] for line in lines(tmp_path / "out", "results")}
    message = found["tools"]["choices"][0]["message"]
    assert message["content"] is None
    assert [call["function"] for call in message["tool_calls"]] == [{"name": "f", "arguments": '{"a": 1}'}]
    assert found["none"]["choices"][0]["message"] == {"role": "assistant", "content": called}
    assert found["none"]["usage"]["prompt_tokens"] < found["tools"]["usage"]["prompt_tokens"]
    (error,) = lines(tmp_path / "out", "errors")
    assert "tool_choice names 'g', which is not one of the tools" in json.dumps(error)


@pytest.fixture
def demo_tokenizer_engine() -> SimulatedEngine:
    from hasten.engine.text import Tokenizer

    engine = SimulatedEngine()
    engine.tokenizer = Tokenizer.from_folder(ROOT / "examples" / "demo-model")
    engine.template = ChatTemplate("{% for m in messages %}{{ m.role }}: {{ m.content }}{% endfor %}", {})
    return engine


BAD = {
    "no-json": ("{nothing", "not valid JSON"),
    "no-object": ("[1]", "not a JSON object"),
    "no-body": ({"custom_id": "no-body", "method": "POST", "url": "/v1/completions"}, "has no body"),
    "no-id": ({"method": "POST", "url": "/v1/completions", "body": {"prompt": [1]}}, "has no custom_id"),
    "field": (openai_row("field", prompt=[1]) | {"extra": 1}, "unknown field 'extra'"),
    "url": (openai_row("url", "/v1/embeddings", prompt=[1]), "/v1/embeddings is not supported"),
    "method": (openai_row("method", prompt=[1]) | {"method": "GET"}, "GET /v1/completions is not supported"),
    "model": (openai_row("model", prompt=[1]) | {"body": {"model": "gpt", "prompt": [1]}}, "it is called: simulated"),
    "stream": (openai_row("stream", prompt=[1], stream=True), "stream is not supported"),
    "option": (openai_row("option", prompt=[1], colour="red"), "colour"),
    "value": (openai_row("value", prompt=[1], temperature=-1), "temperature must be"),
    "empty": (openai_row("empty", prompt=[]), "prompt is empty"),
    "long": (openai_row("long", prompt=[1] * 64), "the prompt is too long"),
    "one-of-two": (openai_row("one-of-two", prompt=[[1], [1] * 64]), "the prompt is too long"),
    "text": (openai_row("text", prompt="words"), "no tokenizer"),
    "chat": (openai_row("chat", "/v1/chat/completions", messages=[{"role": "user", "content": "a"}]), "no chat templ"),
    "failed": (openai_row("failed", prompt=[[1], [0], [2]]), "could not be continued: no room"),
    "twice": (openai_row("good", prompt=[1]), "also that of an earlier row"),
}


def test_bad_rows_are_errors_with_their_reason_and_line(tmp_path: Path) -> None:
    rows = [openai_row("good", prompt=[1]), *(row for row, _ in BAD.values()), openai_row("last", prompt=[2])]
    summary = run(write_rows(tmp_path / "in", rows), tmp_path / "out")
    assert texts(tmp_path / "out") == {"good": ["1"], "last": ["2"]}
    assert (summary.results, summary.errors) == (2, len(BAD))
    found = {int(line["id"].rpartition("_")[2]): line for line in lines(tmp_path / "out", "errors")}
    for number, (name, (row, reason)) in enumerate(BAD.items(), 1):
        line = found[number]
        known = row["custom_id"] if isinstance(row, dict) and "custom_id" in row else f"row-{number + 1}"
        assert line["custom_id"] == known, name
        assert line["error"]["message"].startswith(f"line {number + 1}: "), name
        assert reason in line["error"]["message"], name
        assert line["response"]["status_code"] >= 400, name
        assert reason in line["response"]["body"]["error"]["message"], name


def test_errors_can_be_tried_again(tmp_path: Path) -> None:
    source = write_rows(tmp_path / "in", [openai_row("a", prompt=[1]), openai_row("b", prompt=[1] * 64)])
    assert run(source, tmp_path / "out").errors == 1
    roomier = SimulatedEngine()
    roomier.max_model_len = 100
    assert run(source, tmp_path / "out", roomier).errors == 1
    assert roomier.added == 0
    summary = run(source, tmp_path / "out", roomier, retry_errors=True)
    assert (summary.results, summary.errors, summary.resumed) == (2, 0, 1)
    assert texts(tmp_path / "out") == {"a": ["1"], "b": ["64"]}


def test_defaults_are_for_rows_that_say_nothing(tmp_path: Path) -> None:
    rows = [{"id": "a", "prompt": [1]}, {"id": "b", "prompt": [1], "n": 1}, {"id": "c", "prompt": [1], "n": None}]
    run(write_rows(tmp_path / "in", rows), tmp_path / "out", defaults={"n": 2})
    assert {name: len(found) for name, found in texts(tmp_path / "out").items()} == {"a": 2, "b": 1, "c": 2}
    for defaults, message in (
        ({"temperature": 3}, "temperature is limited to 2"),
        ({"temperature": float("nan")}, "temperature must be finite, got nan"),
        ({"logit_bias": {"5": float("-inf")}}, "logit_bias must be finite, got -inf"),
    ):
        with pytest.raises(ConfigError, match=message):
            run(tmp_path / "in", tmp_path / "other", defaults=defaults)


def test_rows_without_a_seed_have_one_of_their_own(tmp_path: Path) -> None:
    seeds: dict[str, int | None] = {}

    class Watching(SimulatedEngine):
        def add(self, request: Any) -> None:
            seeds[request.request_id] = request.params.seed
            super().add(request)

    rows = [{"prompt": [1]}, {"prompt": [[1], [1]]}, {"prompt": [1], "seed": 7}]
    source = write_rows(tmp_path / "in", rows)
    run(source, tmp_path / "out", Watching())
    before = dict(seeds)
    assert (len(set(before.values())), before["2.0"]) == (4, 7)
    run(source, tmp_path / "again", Watching())
    assert seeds == before


def test_a_folder_belongs_to_one_job(tmp_path: Path) -> None:
    source = write_rows(tmp_path / "in", [{"prompt": [1]}])
    run(source, tmp_path / "out")
    with pytest.raises(ConfigError, match="the sampling options differ"):
        run(source, tmp_path / "out", defaults={"n": 2})
    with (
        pytest.raises(ConfigError, match="the model differs"),
        BatchJob(source, tmp_path / "out", model="another"),
    ):
        pass
    with pytest.raises(ConfigError, match="the input differs"):
        run(write_rows(tmp_path / "other", [{"prompt": [2]}]), tmp_path / "out")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(ConfigError, match="is not empty"):
        run(source, tmp_path / "full")
    with BatchJob(source, tmp_path / "held", model=MODEL), pytest.raises(ConfigError, match="another process"):
        run(source, tmp_path / "held")


def test_a_folder_without_a_row_is_free_for_another_job(tmp_path: Path) -> None:
    source, out = write_rows(tmp_path / "in", [{"prompt": [1]}]), tmp_path / "out"
    with BatchJob(source, out, model="a name with a slip"):
        pass  # there is no such model
    run(source, out, defaults={"n": 2})
    assert texts(out) == {"row-1": ["1", "1"]}
    with BatchJob(source, tmp_path / "parts", model=MODEL):
        pass
    assert run(source, tmp_path / "parts", part=Part(0, 2)).results == 1

    (begun := tmp_path / "begun").mkdir()
    with BatchJob(source, begun, model=MODEL):
        (begun / ".results.partial").write_text("{")
    with pytest.raises(ConfigError, match="the model differs"):
        BatchJob(source, begun, model="another")


def test_parts_have_each_row_once(tmp_path: Path) -> None:
    rows = [{"prompt": [number + 1]} for number in range(10)]
    source, out = write_rows(tmp_path / "in", [*rows, {"prompt": [1], "id": "row-3"}]), tmp_path / "out"
    parts = [run(source, out, part=Part(index, 4)) for index in range(4)]
    assert [(part.rows, part.results, part.errors) for part in parts] == [(3, 3, 0), (3, 3, 0), (3, 2, 1), (2, 2, 0)]
    names = [f"part-0000{index}-of-00004" for index in range(4)]
    assert sorted(path.name for path in out.iterdir()) == names
    found = [sorted(texts(out / name)) for name in names]
    assert found == [["row-1", "row-5", "row-9"], ["row-10", "row-2", "row-6"], ["row-3", "row-7"], ["row-4", "row-8"]]
    assert "is also that of an earlier row" in lines(out / names[2], "errors")[0]["error"]["message"]
    assert run(source, out, part=Part(1, 4)).resumed == 3
    for count in (1, 5):
        with pytest.raises(ConfigError, match=f"has parts of 4, not of {count}"):
            run(source, out, part=Part(0, count))
    run(source, tmp_path / "whole")
    with pytest.raises(ConfigError, match="has the results of a whole batch"):
        run(source, tmp_path / "whole", part=Part(0, 2))
    shutil.copytree(out / names[0], out / "part-00003-of-00004", dirs_exist_ok=True)
    with pytest.raises(ConfigError, match="results of another batch: the part differs"):
        run(source, out, part=Part(3, 4))


@pytest.mark.parametrize("text", ["", "1", "/", "8/8", "-1/8", "1/x", "1/2/3", "0/0", "²/4", "0/" + "9" * 5000])
def test_a_part_that_is_none(text: str) -> None:
    with pytest.raises(ConfigError, match="is not INDEX/COUNT, such as 0/8"):
        Part.parse(text)


def test_rows_of_a_pipe_are_refused_before_any_is_lost(tmp_path: Path) -> None:
    pipe = tmp_path / "rows"
    os.mkfifo(pipe)
    with pytest.raises(ConfigError, match="can only be read once"):  # nor is it opened, which would wait for a writer
        run(pipe, tmp_path / "out")


def test_an_input_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        run(tmp_path / "none", tmp_path / "out")
    with pytest.raises(ConfigError, match="has no rows"):
        run(write_rows(tmp_path / "in", ["", " "]), tmp_path / "out")
    with pytest.raises(ConfigError, match=r"damaged\.parquet cannot be read as a Parquet file .*; copy it again"):
        run(write_rows(tmp_path / "damaged.parquet", ["PAR1..."]), tmp_path / "out")
    packed = tmp_path / "rows.gz"
    packed.write_bytes(b"\x1f\x8b\x08")
    with pytest.raises(
        ConfigError, match="is compressed by gzip; give a Parquet file, or one in UTF-8 with one JSON object"
    ):
        run(packed, tmp_path / "out")
    wide = tmp_path / "rows.utf16"
    wide.write_text('{"prompt": [1]}\n', encoding="utf-16")
    with pytest.raises(ConfigError, match="is UTF-16; give a Parquet file, or one in UTF-8 with one JSON object"):
        run(wide, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_failing_engine_loses_nothing(tmp_path: Path) -> None:
    class Failing(SimulatedEngine):
        def step(self) -> list[RequestOutput]:
            if self.added > 40:
                raise EngineError("a rank died")
            return super().step()

    source = write_rows(tmp_path / "in", [{"prompt": [number + 1]} for number in range(100)])
    failing = Failing()
    with pytest.raises(EngineError, match="a rank died"):
        run(source, tmp_path / "out", failing, rows_per_shard=10)
    assert failing.step.__self__.most_waiting <= failing.window  # type: ignore[attr-defined]
    summary = run(source, tmp_path / "out", rows_per_shard=10)
    assert 0 < summary.resumed < 100
    assert texts(tmp_path / "out") == {f"row-{number}": [str(number)] for number in range(1, 101)}


def test_half_a_line_and_a_damaged_shard(tmp_path: Path) -> None:
    source, out = write_rows(tmp_path / "in", [{"prompt": [1]}, {"prompt": [2]}]), tmp_path / "out"
    run(source, out)
    shard = out / "results-00000.jsonl"
    whole = shard.read_bytes()
    (first, second) = whole.splitlines(keepends=True)
    shard.unlink()
    (out / ".results.partial").write_bytes(first + second[:20])
    assert run(source, out).resumed == 1
    assert sorted(texts(out)) == ["row-1", "row-2"]
    (out / "results-00000.jsonl").write_bytes(whole[:-5])
    with pytest.raises(ConfigError, match="is damaged"):
        run(source, out)


def _environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'src'}", "OMP_NUM_THREADS": "1"}


def _arguments(source: Path, out: Path, pause: float) -> list[str]:
    return [str(source), str(out), "25", str(pause)]


def _written(out: Path) -> int:
    """Bytes of all that a batch has written."""
    total = 0
    for file in out.glob("*.*") if out.exists() else ():
        with contextlib.suppress(FileNotFoundError):  # a journal becomes a shard meanwhile
            total += file.stat().st_size
    return total


@pytest.mark.slow
@pytest.mark.any_python
@pytest.mark.timeout(900)
def test_fifty_kills_lose_nothing_and_double_nothing(tmp_path: Path) -> None:
    """Each process is killed a random time after it has begun to write, so that kills meet every part of the work."""
    count, kills, rng = 3000, 50, random.Random(5)
    rows = [openai_row(f"id-{n}", prompt=[[n, 1]] * (n % 3 + 1)) if n % 10 else f"bad {n}" for n in range(count)]
    source, out = write_rows(tmp_path / "in", rows), tmp_path / "out"
    killed = 0
    while killed < kills:
        before = _written(out)
        process = forking().Process(target=main, args=_arguments(source, out, pause=0.01), daemon=True)
        process.start()
        eventually(lambda before=before: _written(out) > before)  # type: ignore[misc]
        time.sleep(rng.uniform(0, 0.05))
        process.kill()
        process.join()
        killed += process.exitcode == -signal.SIGKILL
    with BatchJob(source, out, model=MODEL) as job:
        assert 0 < job.left < count
    last = [sys.executable, "-m", "tests.batch.simulated", *_arguments(source, out, pause=0)]
    subprocess.run(last, cwd=ROOT, env=_environment(), timeout=LIMIT_S, check=True)
    expected = {f"id-{n}": [str(n + 1)] * (n % 3 + 1) for n in range(count) if n % 10}
    assert texts(out) == expected
    assert sorted(line["custom_id"] for line in lines(out, "errors")) == sorted(
        f"row-{n + 1}" for n in range(0, count, 10)
    )
    assert not list(out.glob(".*.partial"))
