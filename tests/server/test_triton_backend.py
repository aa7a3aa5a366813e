"""The same engine inside a real Triton."""

import os
import queue
import time
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from google.protobuf import text_format
from tests.server.service_fixtures import DEMO, Outputs, Running, demo, streaming, token_request
from tests.server.tritonserver import Interpreter, Triton, TritonServer, descendants, find_wheel, is_alive
from tests.waiting import LIMIT_S, attempts, eventually
from tritonclient.grpc import InferenceServerClient, InferInput, InferRequestedOutput, InferResult, model_config_pb2
from tritonclient.utils import InferenceServerException

from hasten.core.config import EngineConfig
from hasten.core.errors import ConfigError
from hasten.server.create import create_triton_repository
from hasten.server.types import InferRequest

pytestmark = pytest.mark.any_python

__all__ = ["demo", "streaming"]  # fixtures

LONG = 1500
"""Tokens that take seconds."""
MANY, ABANDONED_S = 32, 10.0
"""Prompts that take half a minute, and how long engines may compute them for nobody, both in CPU time."""
NEVER = 2**31
"""An end token that does not come."""


def config_of(folder: Path) -> model_config_pb2.ModelConfig:
    return text_format.Parse((folder / "config.pbtxt").read_text(), model_config_pb2.ModelConfig())


def test_what_is_written(tmp_path: Path) -> None:
    engine = EngineConfig.create(str(DEMO), max_num_seqs=7)
    folder = create_triton_repository(engine, tmp_path, environment=tmp_path)
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()) == [
        "fastertransformer/1/model.py",
        "fastertransformer/config.pbtxt",
    ]
    config = config_of(folder)
    assert (config.name, config.backend) == ("fastertransformer", "python")
    assert not config.model_transaction_policy.decoupled
    parameters = {name: value.string_value for name, value in config.parameters.items()}
    assert parameters["model_checkpoint_path"] == str(DEMO)
    assert parameters["max_num_seqs"] == "7"
    assert parameters["EXECUTION_ENV_PATH"] == str(tmp_path)
    assert [(group.count, group.kind) for group in config.instance_group] == [
        (1, model_config_pb2.ModelInstanceGroup.KIND_CPU)
    ]


def test_a_streaming_model_beside_it(tmp_path: Path) -> None:
    engine = EngineConfig.create(str(DEMO))
    create_triton_repository(engine, tmp_path)
    folder = create_triton_repository(engine, tmp_path, name="streaming", decoupled=True)
    assert folder == tmp_path / "streaming"
    assert config_of(folder).model_transaction_policy.decoupled


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    create_triton_repository(EngineConfig.create(str(DEMO)), tmp_path)
    with pytest.raises(ConfigError, match="fastertransformer exists"):
        create_triton_repository(EngineConfig.create(str(DEMO)), tmp_path)


@pytest.fixture(scope="module")
def installed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Triton, Path]:
    """Triton with this Python, and its backends."""
    server = Triton(find_wheel(request.config.cache), Interpreter.this())
    return server, server.make_backends(tmp_path_factory.mktemp("triton") / "backends")


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("repository")
    create_triton_repository(EngineConfig.create(str(DEMO)), folder)
    create_triton_repository(EngineConfig.create(str(DEMO)), folder, name="streaming", decoupled=True)
    return folder


@pytest.fixture(scope="module")
def triton(
    installed: tuple[Triton, Path], repository: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[TritonServer]:
    log = tmp_path_factory.mktemp("log") / "triton.log"
    with TritonServer(*installed, repository, log, "fastertransformer", "streaming") as server:
        yield server


@pytest.fixture
def client(triton: TritonServer) -> Iterator[InferenceServerClient]:
    with InferenceServerClient(triton.url) as client:
        yield client


def as_inputs(request: InferRequest) -> list[InferInput]:
    produced = [InferInput(tensor.name, list(tensor.shape), tensor.datatype) for tensor in request.inputs]
    for item, tensor in zip(produced, request.inputs, strict=True):
        item.set_data_from_numpy(tensor.data)
    return produced


def values(result: InferResult) -> Outputs:
    names = [output.name for output in result.get_response().outputs]
    return {name: result.as_numpy(name).tolist() for name in names}


def ask(client: InferenceServerClient, request: InferRequest, outputs: Sequence[str] = ()) -> Outputs:
    wanted = [InferRequestedOutput(name) for name in outputs] or None
    return values(client.infer(request.model, as_inputs(request), outputs=wanted))


PROMPTS = ((5, 6, 7), (100,), (31, 8, 400, 77, 12, 9, 300))


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"is_return_log_probs": True},
        {"runtime_top_p": 0.9, "random_seed": 2**63 + 5, "temperature": 0.8},
        {"beam_width": 3, "is_return_log_probs": True},
        {"stop_words_list": [[[0], [-1]], [[262], [1]], [[0], [-1]]], "runtime_top_k": [[1], [3], [1]]},
    ],
    ids=["greedy", "log_probs", "sampled", "beams", "stop_words"],
)
def test_the_same_answers_as_from_the_service(
    client: InferenceServerClient, demo: Running, more: dict[str, Any]
) -> None:
    request = token_request(PROMPTS, [12, 20, 3], **more)
    found, expected = ask(client, request), demo.infer(request)
    for name in {"cum_log_probs", "output_log_probs"} & expected.keys():
        # which prompts share a step is chance, and with it the order of sums
        np.testing.assert_allclose(found.pop(name), expected.pop(name), rtol=1e-5, atol=1e-6)
    assert found == expected


def test_only_the_outputs_that_are_asked_for(client: InferenceServerClient, demo: Running) -> None:
    request = token_request(PROMPTS, 4)
    assert ask(client, request, ["sequence_length"]) == demo.infer(request, ["sequence_length"])


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (token_request([[5000]], 4), "item 0 of the batch: input 'input_ids' has token id 5000"),
        (token_request([[5], [6]], [4, 0]), "item 1 of the batch: request_output_len must be at least 1"),
    ],
)
def test_the_client_s_errors(client: InferenceServerClient, request_: InferRequest, message: str) -> None:
    with pytest.raises(InferenceServerException) as caught:
        ask(client, request_)
    assert message in caught.value.message()
    assert caught.value.status() == "StatusCode.INVALID_ARGUMENT"


def test_a_model_of_one_response_takes_requests_while_it_computes(client: InferenceServerClient) -> None:
    """Another request does not wait for the one before it to end."""
    long, short = token_request([[5, 6]], 600, end_id=NEVER), token_request([[7]], 2)
    for _ in attempts("short requests that come back before a long one"):
        done: queue.Queue[InferResult] = queue.Queue()
        client.async_infer(long.model, as_inputs(long), lambda result, error, done=done: done.put(result or error))
        for _ in range(3):
            ask(client, short)
        overtaken = done.empty()
        assert values(done.get(timeout=LIMIT_S))["sequence_length"] == [[602]]
        if overtaken:
            break


Responses = list[tuple[InferResult | None, InferenceServerException | None]]


def stream(client: InferenceServerClient, request: InferRequest, most: int | None = None) -> Responses:
    """All responses up to the last; with `most` no more than these, and what is left of the request is cancelled."""
    came: queue.Queue[Any] = queue.Queue()
    client.start_stream(lambda result, error: came.put((result, error)))
    client.async_stream_infer(request.model, as_inputs(request), enable_empty_final_response=True)
    responses: Responses = []
    while not responses or (responses[-1][0] is not None and not is_final(responses[-1][0])):
        responses.append(came.get(timeout=LIMIT_S))
        if len(responses) == most:
            break
    client.stop_stream(cancel_requests=most is not None)
    return responses


def is_final(result: InferResult) -> bool:
    return bool(result.get_response().parameters["triton_final_response"].bool_param)


def tokens_of(responses: Responses) -> list[list[int]]:
    """The tokens of each response to a request of one item, all of which must be there in the one after it."""
    assert [error for _, error in responses] == [None] * len(responses)
    tokens = [values(result)["output_ids"][0][0] for result, _ in responses if result is not None]
    assert all(later[: len(sooner)] == sooner for sooner, later in pairwise(tokens))
    return tokens


def test_a_decoupled_model_streams(client: InferenceServerClient, streaming: Running) -> None:
    *_, last = tokens_of(stream(client, token_request([PROMPTS[0]], 12, "streaming")))
    right, final = streaming.stream(token_request([PROMPTS[0]], 12))[-1]
    assert final
    assert last == right["output_ids"][0][0]


def test_a_decoupled_model_answers_while_it_computes(client: InferenceServerClient) -> None:
    """What a slow reader has not taken comes as one response, so the request goes on until there are three."""
    for _ in attempts("three responses that grow"):
        tokens = tokens_of(stream(client, token_request([PROMPTS[0]], LONG, "streaming", end_id=NEVER), most=3))
        if len(tokens) == 3:
            assert len(tokens[0]) < len(tokens[1]) < len(tokens[2])
            break


def test_an_error_in_a_stream(client: InferenceServerClient) -> None:
    ((_, error),) = stream(client, token_request([[5000]], 4, "streaming"))
    assert error is not None
    assert "token id 5000" in error.message()


def engines(triton: TritonServer) -> set[int]:
    """The processes of engines."""
    found = {pid for pid in descendants(triton.process.pid) if is_alive(pid)}
    return {pid for pid in found if b"hasten.server.engine.process" in of_process(pid, "cmdline")}


def of_process(pid: int, name: str) -> bytes:
    """A file of /proc; empty where the process has ended meanwhile."""
    try:
        return Path(f"/proc/{pid}/{name}").read_bytes()
    except OSError:
        return b""


def cpu_seconds(triton: TritonServer) -> float:
    """Time that engines have computed for."""
    fields = [Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split() for pid in engines(triton)]
    return sum(int(user) + int(system) for user, system in (each[11:13] for each in fields)) / os.sysconf("SC_CLK_TCK")


def wait_until_busy(triton: TritonServer, before: float) -> None:
    """Wait until engines have computed more than that."""
    eventually(lambda: cpu_seconds(triton) > before + 0.05)


def assert_soon_idle(triton: TritonServer) -> None:
    """Engines stop computing. Counted in their own time, which passes slowly where others have the machine."""
    before = last = cpu_seconds(triton)
    while True:
        time.sleep(1)
        now = cpu_seconds(triton)
        if now - last < 0.02:
            return
        assert now - before < ABANDONED_S, "the request went on without its client"
        last = now


def test_a_client_that_cancels(triton: TritonServer, client: InferenceServerClient) -> None:
    request = token_request([[5, 6]] * MANY, LONG, end_id=NEVER)
    before = cpu_seconds(triton)
    call = client.async_infer(request.model, as_inputs(request), lambda result, error: None)
    wait_until_busy(triton, before)
    call.cancel()
    assert_soon_idle(triton)


def test_a_client_that_leaves_its_stream(triton: TritonServer, client: InferenceServerClient) -> None:
    request = token_request([[5, 6]] * MANY, LONG, "streaming", end_id=NEVER)
    came: queue.Queue[Any] = queue.Queue()
    client.start_stream(lambda result, error: came.put(error))
    client.async_stream_infer(request.model, as_inputs(request))
    assert came.get(timeout=LIMIT_S) is None
    client.stop_stream(cancel_requests=True)
    assert_soon_idle(triton)


@pytest.mark.slow
def test_a_model_s_life(installed: tuple[Triton, Path], repository: Path, tmp_path: Path) -> None:
    with (
        TritonServer(*installed, repository, tmp_path / "triton.log") as triton,
        InferenceServerClient(triton.url) as client,
    ):
        assert_unloadable_is_reported(client, repository)
        client.load_model("fastertransformer")
        eventually(lambda: len(engines(triton)) == 1)  # that of the model that could not be loaded may end late
        assert_unloads_behind_its_requests(triton, client)
        client.load_model("fastertransformer")
        processes = descendants(triton.process.pid)
        assert len(processes) >= 2
        triton.process.kill()
        wait_until_gone(processes)


def assert_unloadable_is_reported(client: InferenceServerClient, repository: Path) -> None:
    create_triton_repository(EngineConfig.create("/nowhere"), repository, name="wrong")
    for _ in attempts("a model's process that Triton waits for: it gives up one that is stalled for a second"):
        with pytest.raises(InferenceServerException) as failure:
            client.load_model("wrong")
        if "is not healthy" not in str(failure.value):
            break
    assert "/nowhere" in str(failure.value)


def assert_unloads_behind_its_requests(triton: TritonServer, client: InferenceServerClient) -> None:
    request, done = token_request([[5, 6]], 200, end_id=NEVER), queue.Queue[Any]()
    before, computed = engines(triton), cpu_seconds(triton)
    client.async_infer(request.model, as_inputs(request), lambda result, error: done.put(result or error))
    wait_until_busy(triton, computed)
    client.unload_model("fastertransformer")
    assert values(done.get(timeout=LIMIT_S))["sequence_length"] == [[202]]
    wait_until_gone(before)


def wait_until_gone(processes: set[int]) -> None:
    eventually(lambda: not any(map(is_alive, processes)))
