"""`hasten bench load` as its users type it: what it refuses, and what it needs."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from tests.bench.load.scripted_server import HOST, Script, scripted, three_tokens
from tests.bench.report_form import form_errors

from hasten.core.ports import free_port

if TYPE_CHECKING:
    from tests.cli.conftest import Hasten

DEMO = Path(__file__).parents[2] / "examples" / "demo-model"
URL = ("--url", f"http://{HOST}:9", "--vocab-size", "50")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "give a MODEL, for which a server is started, or the --url of a server that runs"),
        ((DEMO, *URL), "give a MODEL, for which a server is started, or the --url of a server that runs"),
        ((*URL, "--api", "open-ai"), "argument --api: invalid choice: 'open-ai'"),
        ((*URL, "--api", "open-ai"), "did you mean openai?"),
        ((*URL, "--request-rate", "fast"), "argument --request-rate: 'fast' is not a rate"),
        ((*URL, "--request-rate", "4", "0"), "argument --request-rate: '0' is not a rate"),
        ((*URL, "--arrivals", "gamma"), "argument --arrivals: invalid choice"),
        ((*URL, "--prompt-length", "9:3"), "argument --prompt-length: '9:3' is not a length in tokens"),
        ((*URL, "--output-length", "none"), "argument --output-length: 'none' is not a length in tokens"),
        ((*URL, "--num-prompts", "0"), "argument --num-prompts: '0' is not a whole number of at least 1"),
        ((*URL, "--duration", "0"), "argument --duration: seconds must be above 0"),
        ((*URL, "--duration", "5"), "give --num-prompts, too"),
        ((*URL, "--goodput", "ttft:fast"), "'ttft:fast' is not a limit of a latency"),
        ((*URL, "--header", "no colon"), "argument --header: a header is NAME:VALUE"),
        ((*URL, "--extra-body", "[1]"), "argument --extra-body: '[1]' is not a JSON object"),
        ((*URL, "--extra-body", "{"), "argument --extra-body: not JSON"),
        ((*URL, "--temperature", "-1"), "temperature must be finite and not negative"),
        ((*URL, "--dataset", "prompts"), "--dataset-path is the file of a --dataset other than random"),
        ((*URL, "--max-num-seqs", "4"), "--max-num-seqs is an option of a server that is started for a MODEL"),
        ((*URL, "--output-path", "/nowhere/results.json"), "cannot write the results to /nowhere/results.json"),
        ((*URL, "--plot", "/nowhere/plot.svg"), "cannot write the results to /nowhere/plot.svg"),
        (("--url", "ftp://host"), "the URL 'ftp://host' does not begin with http:// or https://"),
        (("--url", "http://host", "--api", "triton-grpc"), "does not begin with grpc:// or grpcs://"),
        ((DEMO, "--served-model-name", "m"), "--served-model-name is of a server at --url"),
        (("/nowhere",), "there is no folder /nowhere"),
    ],
)
def test_bad_input(hasten_here: "Hasten", options: tuple[object, ...], message: str) -> None:
    done = hasten_here("bench", "load", *options)
    assert (done.status, done.out) == (2, "")
    assert message in done.err
    assert done.err.count("\n") == 1


def test_a_wrong_line_of_a_dataset(hasten_here: "Hasten", tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "once", "output_length": 1}\n{"promt": "twice"}\n')
    with scripted() as server:
        done = hasten_here("bench", "load", "--url", server.url, "--dataset", "prompts", "--dataset-path", file)
    assert (done.status, done.out) == (2, "")
    assert f'{file}, line 2: "prompt" is neither a text nor a list of token ids' in done.err


def test_prompts_for_an_unknown_vocabulary(hasten_here: "Hasten") -> None:
    with scripted() as server:
        done = hasten_here("bench", "load", "--url", server.url)
        assert (done.status, done.out) == (2, "")
        assert "random prompts need --tokenizer" in done.err
        done = hasten_here("bench", "load", "--url", server.url, "--api", "openai-chat", "--vocab-size", "9")
        assert (done.status, done.out) == (2, "")
        assert "prompts that are texts need --tokenizer" in done.err
        assert server.completions == []


@pytest.mark.parametrize("api", ["openai", "triton-grpc", "triton-generate"])
def test_nobody_listens(hasten_here: "Hasten", api: str) -> None:
    address = f"{HOST}:{free_port(HOST)}"
    done = hasten_here("bench", "load", "--url", address, "--api", api, "--vocab-size", "50")
    assert (done.status, done.out) == (1, "")
    assert (
        f"the server at {'grpc' if api == 'triton-grpc' else 'http'}://{address} does not list its models" in done.err
    )
    assert done.err.count("\n") == 1


def test_another_api_than_that_of_the_server(hasten_here: "Hasten") -> None:
    with scripted() as server:
        done = hasten_here("bench", "load", "--url", server.url, "--api", "triton-generate", "--vocab-size", "9")
    assert done.status == 1
    assert done.err.count("\n") == 1


def test_a_server_that_refuses_all_requests(hasten_here: "Hasten") -> None:
    async def refuse(script: Script) -> None:
        script.whole("401 Unauthorized", {"error": {"message": "no key"}})

    with scripted(refuse) as server:
        done = hasten_here("bench", "load", "--url", server.url, "--vocab-size", "50")
    assert (done.status, done.out) == (1, "")
    assert "the request failed, the first with HTTP 401" in done.err


def test_some_failures_are_counted(hasten_here: "Hasten") -> None:
    async def every_other(script: Script) -> None:
        if len(server.completions) % 2:
            await three_tokens(script)
        else:
            script.whole("429 Too Many Requests", {"error": {"message": "later"}})

    options = ("--vocab-size", "50", "--num-prompts", "5", "--processes", "1", "--max-concurrency", "1")
    with scripted(every_other) as server:
        done = hasten_here("bench", "load", "--url", server.url, *options)
    assert done.status == 0, done.err
    assert "rate inf: 3 of 5 failed with HTTP 429" in done.out
    assert "later" in done.out


def test_keys_are_sent_and_not_written(hasten_here: "Hasten", monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "from-environment")
    output = tmp_path / "load.json"
    options = ("--vocab-size", "50", "--num-prompts", "1", "--header", "X-Team: secret-team", "--output-path", output)
    with scripted() as server:
        done = hasten_here("bench", "load", "--url", server.url, *options)
        assert done.status == 0, done.err
    assert {each.headers["authorization"] for each in server.exchanges} == {"Bearer from-environment"}
    assert {each.headers["x-team"] for each in server.exchanges} == {"secret-team"}
    written = output.read_text()
    assert "secret-team" not in written
    assert "from-environment" not in written
    assert json.loads(written)["options"]["header"] == ["X-Team"]
    assert form_errors(json.loads(written)) == []


def test_neither_torch_nor_transformers_is_needed(tmp_path: Path) -> None:
    for name in ("torch", "transformers", "triton"):
        (tmp_path / f"{name}.py").write_text(f"raise ImportError('{name} is not here')\n")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    with scripted() as server:
        options = ("--url", server.url, "--tokenizer", str(DEMO), "--num-prompts", "2", "--turns", "2", "--json")
        done = subprocess.run(
            [sys.executable, "-m", "hasten", "bench", "load", *options],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["results"][0]["completed"] == 4
