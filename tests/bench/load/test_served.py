"""Loads on real servers of the demo model, over each API."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.server.serve_process import serve_process

from hasten.cli.main import main

DEMO = Path(__file__).parents[3] / "examples" / "demo-model"
TEMPLATE = "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model with a chat template."""
    folder = tmp_path_factory.mktemp("chat") / "demo"
    folder.mkdir()
    for file in DEMO.iterdir():
        (folder / file.name).symlink_to(file)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


@pytest.fixture(scope="module")
def addresses(chat_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """Ports of a server that runs."""
    with serve_process(tmp_path_factory.mktemp("server") / "log", str(chat_model)) as addresses:
        yield {"http": addresses["HTTPService"], "grpc": addresses["GRPCInferenceService"]}


def load(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    status = main(["bench", "load", *arguments, "--json"])
    captured = capsys.readouterr()
    assert status == 0, captured.err
    found: dict[str, Any] = json.loads(captured.out)
    return found


APIS = {"openai": "http", "openai-chat": "http", "triton-generate": "http", "triton-grpc": "grpc"}


@pytest.mark.parametrize("api", APIS)
def test_each_api(capsys: pytest.CaptureFixture[str], addresses: dict[str, str], api: str) -> None:
    found = load(
        capsys,
        *("--url", addresses[APIS[api]], "--api", api, "--tokenizer", str(DEMO), "--processes", "2"),
        *("--request-rate", "20", "inf", "--num-prompts", "4", "--prompt-length", "9", "--output-length", "5"),
        *("--ignore-eos", "--temperature", "0.7", "--top-p", "0.9", "--goodput", "ttft:60000", "tpot:60000"),
    )
    assert [result["request_rate"] for result in found["results"]] == [20.0, "inf"]
    for result in found["results"]:
        assert (result["completed"], result["failed"], result["output_tokens"]) == (4, 0, 20)
        assert result["input_tokens"] >= 4 * 9
        if api == "openai":
            assert result["input_tokens"] == 4 * 9
        assert result["goodput"] == result["request_throughput"] > 0
        assert 0 < result["events_per_token"] <= 1
        assert result["ttft"]["p50"] <= result["e2el"]["p50"]
        assert result["client"]["processes"] == 2
    assert found["server"]["model"] == "demo"


@pytest.mark.parametrize("api", APIS)
def test_conversations_of_several_turns(
    capsys: pytest.CaptureFixture[str], addresses: dict[str, str], api: str
) -> None:
    found = load(
        capsys,
        *("--url", addresses[APIS[api]], "--api", api, "--tokenizer", str(DEMO), "--num-prompts", "2"),
        *("--turns", "3", "--prompt-length", "6", "--output-length", "4", "--ignore-eos", "--shared-prefix", "5"),
    )
    (result,) = found["results"]
    assert (result["requests"], result["completed"], result["output_tokens"]) == (6, 6, 24)
    assert result["input_tokens"] >= 2 * (11 + (11 + 6) + (11 + 6 + 6)), "each turn has those before it"


def test_sampling_options_arrive(capsys: pytest.CaptureFixture[str], addresses: dict[str, str]) -> None:
    found = load(
        capsys,
        *("--url", addresses["http"], "--vocab-size", "500", "--num-prompts", "1", "--num-warmups", "0"),
        *(
            "--output-length",
            "30",
            "--stop-token-ids",
            "0",
            "--min-new-tokens",
            "2",
            "--extra-body",
            '{"max_tokens": 3}',
        ),
    )
    assert found["results"][0]["output_tokens"] <= 3
    status = main(["bench", "load", "--url", addresses["http"], "--vocab-size", "500", "--extra-body", '{"colour": 1}'])
    assert status == 1
    assert "the request failed, the first with HTTP 400" in capsys.readouterr().err


def test_a_model_that_is_started(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    output, plot = tmp_path / "load.json", tmp_path / "load.svg"
    arguments = ("--num-prompts", "3", "--prompt-length", "4:8", "--output-length", "3", "--max-concurrency", "2")
    assert main(["bench", "load", str(DEMO), *arguments, "--output-path", str(output), "--plot", str(plot)]) == 0
    captured = capsys.readouterr()
    assert "openai at http://127.0.0.1:" in captured.out
    assert "the client" in captured.out
    (result,) = json.loads(output.read_text())["results"]
    assert (result["completed"], result["max_concurrency"]) == (3, 2)
    assert plot.read_text().startswith("<svg")
