"""Programs of others that measure servers and models, run unchanged against `hasten serve`.

Each is large and belongs to no extra: it is run where it is found on PATH, or where the variable of its name says.
"""

import json
import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.server.openai_site import with_template
from tests.server.serve_process import serve_process
from transformers import AutoModelForCausalLM, AutoTokenizer

_LIMIT_S = 600.0
_MODEL, _REQUESTS, _TOKENS = "chat-model", 6, 6
ENDPOINTS = {"chat": "/v1/chat/completions", "completions": "/v1/completions"}

pytestmark = pytest.mark.timeout(_LIMIT_S + 60)


def program(name: str) -> str:
    """The path of a program; skips the test where it is not installed."""
    variable = f"HASTEN_{name.upper()}"
    found = os.environ.get(variable) or shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is neither on PATH nor named by {variable}")
    return found


def run(command: Sequence[str | Path]) -> str:
    """What a program writes, which must end well."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    completed = subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=_LIMIT_S, env=environment | {"COLUMNS": "200"}
    )
    assert completed.returncode == 0, f"{completed.stdout[-4000:]}\n{completed.stderr[-4000:]}"
    return completed.stdout


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the demo model with a chat template."""
    return with_template(tmp_path_factory.mktemp("measured"))


@pytest.fixture
def url(model: Path, tmp_path: Path) -> Iterator[str]:
    with serve_process(tmp_path / "serve.log", str(model), "--device", "cpu") as indices:
        yield f"http://{indices['HTTPService']}"


def record(value: Any, *names: str) -> Any:
    for name in names:
        value = value[name]
    return value


@pytest.mark.parametrize("endpoint", ENDPOINTS)
def test_aiperf_measures_a_server(model: Path, tmp_path: Path, request: pytest.FixtureRequest, endpoint: str) -> None:
    aiperf = program("aiperf")
    url = request.getfixturevalue("url")
    lengths = ("--isl", "20", "--osl", str(_TOKENS), "--request-count", str(_REQUESTS), "--concurrency", "2")
    about = ("--model", _MODEL, "--tokenizer", model, "--url", url, "--endpoint-type", endpoint, "--streaming")
    exact = ("--extra-inputs", "ignore_eos:true", "--extra-inputs", f"min_tokens:{_TOKENS}")
    run([aiperf, "profile", *about, *lengths, *exact, "--ui", "none", "--artifact-dir", tmp_path / "made"])
    (file,) = (tmp_path / "made").rglob("profile_export_aiperf.json")
    result = json.loads(file.read_text())
    assert record(result, "request_count", "avg") == _REQUESTS
    assert not result.get("error_summary")
    assert record(result, "output_sequence_length", "avg") == pytest.approx(_TOKENS, abs=2)
    assert record(result, "time_to_first_token", "avg") > 0


@pytest.mark.parametrize("endpoint", ENDPOINTS)
def test_guidellm_measures_a_server(model: Path, tmp_path: Path, request: pytest.FixtureRequest, endpoint: str) -> None:
    guidellm = program("guidellm")
    url, file = request.getfixturevalue("url"), tmp_path / "made.json"
    options = {
        "--backend": f"kind=openai_http,target={url},model={_MODEL},request_format={ENDPOINTS[endpoint]}",
        "--profile": "kind=concurrent,streams=2",
        "--constraint": f"kind=max_requests,count={_REQUESTS}",
        "--data": f"kind=synthetic_text,prompt_tokens=20,output_tokens={_TOKENS}",
        "--tokenizer": f"kind=huggingface_auto,model={model}",
        "--output": f"kind=json,path={file}",
    }
    given = [part for option in options.items() for part in option]
    run([guidellm, "run", *given, "--disable-console-interactive"])
    (benchmark,) = json.loads(file.read_text())["benchmarks"]
    totals = record(benchmark, "metrics", "request_totals")
    assert (totals["successful"], totals["errored"]) == (_REQUESTS, 0)


TASK = """task: endings
dataset_path: json
dataset_kwargs:
  data_files: {file}
test_split: train
output_type: loglikelihood
doc_to_text: "{{{{text}}}}"
doc_to_target: "{{{{ending}}}}"
target_delimiter: ""
metric_list:
  - metric: perplexity
    aggregation: perplexity
    higher_is_better: false
"""
ENDINGS = [
    {"text": "Anna opened the door", "ending": " and looked out."},
    {"text": "That year the spring came", "ending": " early."},
    {"text": "Lydia wanted a crimson", "ending": " door and painted it at once."},
]


def test_lm_eval_scores_over_completions(model: Path, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """Its `local-completions`, whose log-likelihoods are those of transformers."""
    lm_eval = program("lm_eval")
    url = request.getfixturevalue("url")
    data = tmp_path / "endings.jsonl"
    data.write_text("".join(f"{json.dumps(row)}\n" for row in ENDINGS))
    (tmp_path / "endings.yaml").write_text(TASK.format(file=data))
    about = (
        f"model={_MODEL},base_url={url}/v1/completions,tokenizer={model},tokenizer_backend=huggingface,max_length=64"
    )
    where = ("--tasks", "endings", "--include_path", tmp_path, "--output_path", tmp_path / "made", "--log_samples")
    run([lm_eval, "--model", "local-completions", "--model_args", about, "--batch_size", "1", *where])
    (file,) = (tmp_path / "made").rglob("samples_endings_*.jsonl")
    samples = {row["doc"]["text"]: row for row in map(json.loads, file.read_text().splitlines())}
    tokenizer = AutoTokenizer.from_pretrained(model)
    theirs = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    for row in ENDINGS:
        context = len(tokenizer.encode(row["text"], add_special_tokens=False))
        ids = torch.tensor([tokenizer.encode(row["text"] + row["ending"], add_special_tokens=False)])
        with torch.inference_mode():
            logprobs = theirs(ids).logits[0].log_softmax(-1)
        right = sum(logprobs[index - 1, ids[0, index]].item() for index in range(context, ids.shape[1]))
        assert float(samples[row["text"]]["resps"][0][0][0]) == pytest.approx(right, abs=1e-3)
