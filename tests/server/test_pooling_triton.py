"""`hasten serve` of an encoder with two engines: stock clients of Triton, what is said of it, and metrics."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
import tritonclient.grpc as triton_grpc
import tritonclient.http as triton_http
from tests.encoders import TEXTS, save_encoder, save_pooling, their_output, theirs
from tests.server.serve_process import serve_process
from tests.waiting import LIMIT_S

from hasten.core.config import EngineConfig
from hasten.core.errors import ConfigError
from hasten.engine.text import Tokenizer
from hasten.server.create import model_configs

pytestmark = pytest.mark.any_python

BOUND = 1e-5
Clients = dict[str, Any]
MODULES = {"grpc": triton_grpc, "http": triton_http}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_encoder(tmp_path_factory.mktemp("encoder") / "tiny", "Bert", num_hidden_layers=2, is_matryoshka=True)
    save_pooling(folder, [("Pooling", "1_Pooling", {"word_embedding_dimension": 48, "pooling_mode_cls_token": True})])
    return folder


@pytest.fixture(scope="module")
def addresses(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    log = tmp_path_factory.mktemp("serve") / "log"
    with serve_process(log, str(folder), "--data-parallel-size", "2") as found:
        yield found


@pytest.fixture(scope="module")
def clients(addresses: dict[str, str]) -> Clients:
    return {
        "grpc": triton_grpc.InferenceServerClient(addresses["GRPCInferenceService"]),
        "http": triton_http.InferenceServerClient(
            addresses["HTTPService"], connection_timeout=LIMIT_S, network_timeout=LIMIT_S
        ),
    }


@pytest.fixture(scope="module")
def hidden(folder: Path) -> list[torch.Tensor]:
    """Transformers' hidden states of each text."""
    model, tokenizer = theirs(folder), Tokenizer.from_folder(folder)
    return [their_output(model, tokenizer.encode(text)) for text in TEXTS]


def infer(clients: Clients, kind: str, model: str, outputs: list[str], parameters: Any = None, **inputs: Any) -> Any:
    module, given = MODULES[kind], []
    for name, (datatype, values) in inputs.items():
        array = np.array(values, object if datatype == "BYTES" else triton_grpc.triton_to_np_dtype(datatype))
        given.append(module.InferInput(name, list(array.shape), datatype))
        given[-1].set_data_from_numpy(array)
    wanted = [module.InferRequestedOutput(name) for name in outputs]
    return clients[kind].infer(model, given, outputs=wanted, parameters=parameters)


@pytest.mark.parametrize("kind", ["grpc", "http"])
def test_tokens_to_hidden_states_and_vectors(
    clients: Clients, kind: str, folder: Path, hidden: list[torch.Tensor]
) -> None:
    rows = [Tokenizer.from_folder(folder).encode(text) for text in TEXTS]
    longest = max(map(len, rows))
    found = infer(
        clients,
        kind,
        "fastertransformer",
        ["output_hidden_state", "output_embedding"],
        input_ids=("UINT32", [[*row, *[0] * (longest - len(row))] for row in rows]),
        sequence_lengths=("INT32", [[len(row)] for row in rows]),
    )
    states, vectors = found.as_numpy("output_hidden_state"), found.as_numpy("output_embedding")
    assert states.shape == (len(TEXTS), longest, 48)
    for index, expected in enumerate(hidden):
        assert np.abs(states[index, : len(expected)] - expected.numpy()).max() < BOUND
        assert not states[index, len(expected) :].any()
        assert np.abs(vectors[index] - expected[0].numpy()).max() < BOUND


@pytest.mark.parametrize("kind", ["grpc", "http"])
def test_texts_to_vectors(clients: Clients, kind: str, hidden: list[torch.Tensor]) -> None:
    expected = torch.stack([states[0] for states in hidden]).numpy()
    texts = [text.encode() for text in TEXTS]
    outputs = ["text_output", "embedding", "num_input_tokens"]
    requested = {"text_input": ("BYTES", texts), "return_num_input_tokens": ("BOOL", [True])}
    found = infer(clients, kind, "tiny", outputs, **requested)
    assert np.abs(found.as_numpy("embedding") - expected).max() < BOUND
    lists = [json.loads(text) for text in found.as_numpy("text_output")]
    assert np.abs(np.array(lists) - expected).max() < BOUND
    assert found.as_numpy("num_input_tokens").tolist() == [len(states) for states in hidden]
    short = infer(clients, kind, "tiny", ["embedding"], {"dimensions": 8}, text_input=("BYTES", texts[:1]))
    assert np.abs(short.as_numpy("embedding") - expected[:1, :8]).max() < BOUND


@pytest.mark.parametrize("kind", ["grpc", "http"])
def test_the_request_of_vllms_backend(clients: Clients, kind: str, hidden: list[torch.Tensor]) -> None:
    body = json.dumps({"input": TEXTS[0], "pooling_params": {"dimensions": [4]}}).encode()
    found = infer(clients, kind, "tiny", ["text_output"], embedding_request=("BYTES", [body]))
    assert json.loads(found.as_numpy("text_output")[0]) == pytest.approx(hidden[0][0, :4].tolist(), abs=BOUND)


@pytest.mark.parametrize(
    ("model", "inputs", "message"),
    [
        ("tiny", {"text_input": ("BYTES", [b"a" * 9 + b"\xff"])}, "input 'text_input' is not UTF-8"),
        ("tiny", {"text_input": ("BYTES", [b"the garden " * 400])}, r"input\[0\] has 802 tokens; the model takes"),
        ("tiny", {"embedding_request": ("BYTES", [b"{}"])}, "input 'embedding_request' is not what it should be"),
        ("tiny", {"return_num_input_tokens": ("BOOL", [True])}, "give either input 'text_input' or input 'embedding"),
        (
            "fastertransformer",
            {"input_ids": ("UINT32", [[2, 3]]), "sequence_lengths": ("INT32", [[3]])},
            "item 0 of the batch: input 'sequence_lengths' is 3; it must be from 1 to 2",
        ),
        (
            "fastertransformer",
            {"input_ids": ("UINT32", [[2, 9999]]), "sequence_lengths": ("INT32", [[2]])},
            "item 0 of the batch: input 'input_ids' has token id 9999",
        ),
    ],
)
def test_what_is_refused(clients: Clients, model: str, inputs: Any, message: str) -> None:
    for kind in MODULES:
        with pytest.raises(triton_grpc.InferenceServerException, match=message) as caught:
            infer(clients, kind, model, [], **inputs)
        assert caught.value.status() in ("StatusCode.INVALID_ARGUMENT", "400")


def test_what_is_said_of_it(clients: Clients, addresses: dict[str, str]) -> None:
    client = clients["http"]
    assert {entry["name"] for entry in client.get_model_repository_index()} == {"fastertransformer", "tiny"}
    assert client.is_model_ready("fastertransformer")
    assert client.is_model_ready("tiny")
    metadata = client.get_model_metadata("fastertransformer")
    assert [(each["name"], each["datatype"], each["shape"]) for each in metadata["outputs"]] == [
        ("output_hidden_state", "FP32", [-1, -1, -1]),
        ("output_embedding", "FP32", [-1, -1]),
    ]
    config = client.get_model_config("fastertransformer")
    assert config["parameters"]["model_type"]["string_value"] == "bert"
    assert config["instance_group"][0]["count"] == 2
    assert client.get_model_config("tiny")["parameters"]["kind"]["string_value"] == "embedding"
    infer(clients, "http", "tiny", [], text_input=("BYTES", [b"the"]))
    (statistics,) = client.get_inference_statistics("tiny")["model_stats"]
    assert statistics["inference_stats"]["success"]["count"] >= 1
    metrics = httpx.get(f"http://{addresses['Metrics']}/metrics").text
    assert 'hasten_texts_total{model="fastertransformer",version="1"}' in metrics
    ready = [line for line in metrics.splitlines() if line.startswith("hasten_replica_ready{")]
    assert [line.rpartition(" ")[2] for line in ready] == ["1", "1"]
    answer = httpx.post(f"http://{addresses['HTTPService']}/v2/models/tiny/generate", json={"text_input": "the"})
    assert len(json.loads(answer.json()["text_output"])) == 48


def test_names_that_are_wrong(folder: Path) -> None:
    with pytest.raises(ConfigError, match="decoupled is for models that generate text"):
        model_configs(EngineConfig.create(str(folder)), decoupled=True)
