"""The client of the article, against a server that runs."""

import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from tests.server.serve_process import serve_process

from hasten.core.types import SamplingParams
from hasten.engine.llm import LLM

ROOT = Path(__file__).resolve().parents[2]
CLIENT = ROOT / "examples" / "client.py"
DEMO = ROOT / "examples" / "demo-model"
PROMPT = "deepspeed is"


@pytest.fixture(scope="module")
def client() -> ModuleType:
    spec = importlib.util.spec_from_file_location("client", CLIENT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Of `hasten serve` with the demo model."""
    with serve_process(tmp_path_factory.mktemp("serve") / "log", str(DEMO)) as indices:
        yield indices["GRPCInferenceService"]


def expected(prompts: list[str], length: int) -> list[str]:
    with LLM(DEMO) as llm:
        outputs = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=length))
    return [output.prompt + output.outputs[0].text for output in outputs if output.prompt is not None]


def test_the_article_s_request(client: ModuleType, url: str) -> None:
    command = [sys.executable, str(CLIENT), "--url", url, "--tokenizer", str(DEMO), "--prompt", PROMPT]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    shape, text = done.stdout.split("\n", 1)
    length = len(client.load_tokenizer(str(DEMO))(PROMPT)["input_ids"])
    assert shape == f"(1, 1, {length + 32})"
    assert [text.removesuffix("\n")] == expected([PROMPT], 32)


def ask(client: ModuleType, monkeypatch: pytest.MonkeyPatch, *options: str) -> None:
    monkeypatch.setattr(sys, "argv", ["client.py", "--tokenizer", str(DEMO), *options])
    client.main()


def test_a_batch_of_prompts(
    client: ModuleType, url: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = ["Anna walked to the", "The dog"]
    ask(client, monkeypatch, "--url", url, "--prompt", *prompts, "--output-len", "5")
    longest = max(len(ids) for ids in client.load_tokenizer(str(DEMO))(prompts)["input_ids"])
    assert capsys.readouterr().out.splitlines() == [f"(2, 1, {longest + 5})", *expected(prompts, 5)]


@pytest.mark.parametrize(
    ("options", "message"),
    [(("--model", "nothing"), "Request for unknown model: 'nothing'"), (("--output-len", "0"), "request_output_len")],
)
def test_what_the_server_refuses(
    client: ModuleType, url: str, monkeypatch: pytest.MonkeyPatch, options: tuple[str, ...], message: str
) -> None:
    with pytest.raises(SystemExit, match=message) as left:
        ask(client, monkeypatch, "--url", url, *options)
    assert str(left.value.code).startswith(url)


def test_prompts_are_padded_behind_their_ends(client: ModuleType) -> None:
    tokenizer = client.load_tokenizer(str(DEMO))
    ids, lengths, output_len = client.request_inputs(tokenizer, ["Anna walked to the", "The"], 7)
    assert [each.name() for each in (ids, lengths, output_len)] == ["input_ids", "input_lengths", "request_output_len"]
    assert {each.datatype() for each in (ids, lengths, output_len)} == {"UINT32"}
    longest = ids.shape()[1]
    short = len(tokenizer("The")["input_ids"])
    assert [each.shape() for each in (lengths, output_len)] == [[2, 1], [2, 1]]
    sent = np.frombuffer(ids._get_content(), np.uint32).reshape(2, longest)
    assert sent[1, short:].tolist() == [tokenizer.eos_token_id] * (longest - short)
    assert np.frombuffer(lengths._get_content(), np.uint32).tolist() == [longest, short]
    assert np.frombuffer(output_len._get_content(), np.uint32).tolist() == [7, 7]
