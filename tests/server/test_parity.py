"""The same requests to a real Triton and to hasten: they must be answered alike, or differ for a reason that is stated.

Rules for all of them. Errors over HTTP are JSON here, and said to be; Triton calls some of them text/plain. Triton has
status 500 for JSON that it cannot read, hasten 400 with the same text, which may say besides which input is wrong.
"""

import os
import re
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import tritonclient.grpc as grpcclient
import tritonclient.http as httpclient
from prometheus_client.parser import text_string_to_metric_families
from tests.server import parity_grpc, parity_http
from tests.server.adding_service import AddingService
from tests.server.parity import Answer, Ask, Side, hasten_serve, same, triton_side
from tests.server.parity_grpc import count, infer
from tests.server.parity_models import (
    NUMPY_PYTHONS,
    OWN_MODELS,
    SAME_TYPES,
    older_numpy,
    write_own_models,
    write_triton_models,
)
from tests.server.transport_fixtures import Transports, serving
from tests.server.tritonserver import Interpreter, Triton, TritonServer, find_wheel
from tests.waiting import eventually
from tritonclient.grpc import service_pb2 as pb
from tritonclient.utils import InferenceServerException
from tritonclient.utils import shared_memory as shm

from hasten.core.config import EngineConfig

pytestmark = pytest.mark.any_python

DEMO = Path(__file__).parents[2] / "examples" / "demo-model"
FAST = ("--disable-auto-complete-config", "--model-load-thread-count=12")
ADDING = {"add", "text", "decoupled", *(f"id_{kind}" for kind in SAME_TYPES)}
TOKENS = "/v2/models/fastertransformer"


@dataclass(frozen=True)
class Sides:
    """A real Triton; hasten's transports over models that compute as its; and `hasten serve` with models of its own."""

    triton: Side
    adding: Side
    serve: Side


@pytest.fixture(scope="module")
def sides(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sides]:
    server = Triton(find_wheel(request.config.cache), Interpreter.find(NUMPY_PYTHONS))
    library = older_numpy(request.config.cache, server.python)
    folder = tmp_path_factory.mktemp("parity")
    backends = server.make_backends(folder / "backends")
    own = write_own_models(folder / "own", EngineConfig.create(str(DEMO)))
    service = AddingService()
    configs = [*own, *(service.model_config(name) for name in sorted(ADDING))]
    write_triton_models(folder / "triton", configs, library)
    names = [config.name for config in configs]
    triton = TritonServer(server, backends, folder / "triton", folder / "triton.log", *names, options=FAST)
    with ExitStack() as stack:
        site = stack.enter_context(serving(Transports(service=service)))
        serve = stack.enter_context(hasten_serve(folder / "own", folder / "hasten.log"))
        side = stack.enter_context(triton_side(stack.enter_context(triton)))
        adding = Side(site.http, site.grpc)
        yield Sides(side, adding, serve)
        adding.close()


def agree(theirs: Answer, ours: Answer) -> None:
    assert same(theirs, ours), f"\nTriton: {theirs!r}\nhasten: {ours!r}"


def differ(theirs: Answer, ours: Answer, expected: tuple[str, str]) -> None:
    assert (str(theirs)[: len(expected[0])], str(ours)[: len(expected[1])]) == expected, f"{theirs}\n{ours}"
    assert not same(theirs, ours)


# --- inferences -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", parity_http.SAME)
def test_http(sides: Sides, name: str) -> None:
    ask = parity_http.SAME[name]
    agree(sides.triton.http(ask), sides.adding.http(ask))


@pytest.mark.parametrize("name", parity_http.DIFFERENT)
def test_http_differs_for_a_reason(sides: Sides, name: str) -> None:
    ask, *expected = parity_http.DIFFERENT[name]
    differ(sides.triton.http(ask), sides.adding.http(ask), (expected[0], expected[1]))


@pytest.mark.parametrize("name", parity_grpc.SAME)
def test_grpc(sides: Sides, name: str) -> None:
    message = parity_grpc.SAME[name]
    agree(sides.triton.call("ModelInfer", message), sides.adding.call("ModelInfer", message))


@pytest.mark.parametrize("name", parity_grpc.DIFFERENT)
def test_grpc_differs_for_a_reason(sides: Sides, name: str) -> None:
    message, *expected = parity_grpc.DIFFERENT[name]
    differ(
        sides.triton.call("ModelInfer", message), sides.adding.call("ModelInfer", message), (expected[0], expected[1])
    )


STREAMS: tuple[str, ...] = (
    "plain",
    "id",
    "an unknown model",
    "version 'x'",
    "a missing input",
    "datatype 'INT32'",
    "an axis too many",
)
STREAMS += ("the model's own error", "classes 2", "typed contents of another type", "raw contents of 4 bytes")


@pytest.mark.parametrize("name", STREAMS)
def test_streams(sides: Sides, name: str) -> None:
    messages = parity_grpc.SAME[name], infer(request_id="after")
    assert sides.adding.stream(*messages) == sides.triton.stream(*messages)


@pytest.mark.parametrize("name", [name for name in STREAMS if name != "the model's own error"])
def test_streams_whose_status_would_be_a_models_error(sides: Sides, name: str) -> None:
    """A refused request is an answer in them, too. The error itself may end a Triton before 2.68, see its #8708."""
    message = parity_grpc.SAME[name]
    assert sides.adding.stream_status(message) == sides.triton.stream_status(message)


@pytest.mark.parametrize("number", [0, 1, 3])
def test_streams_of_many_responses(sides: Sides, number: int) -> None:
    assert sides.adding.stream(count(number)) == sides.triton.stream(count(number))
    theirs, ours = (side.stream(count(number, triton_enable_empty_final_response=True))
                    for side in (sides.triton, sides.adding))  # fmt: skip
    # the last, empty response says here too which version answered
    assert ours[-1]["infer_response"].pop("model_version") == "1"
    assert ours == theirs


def test_an_error_among_many_responses(sides: Sides) -> None:
    theirs, ours = (side.stream(count(-2)) for side in (sides.triton, sides.adding))
    assert ours[0] == theirs[0]
    assert ours[1]["error_message"] == theirs[1]["error_message"] == parity_http.OWN_ERROR
    # no response follows, and hasten says so
    final = [each[1]["infer_response"].pop("parameters") for each in (theirs, ours)]
    assert final == [{"triton_final_response": {"bool_param": value}} for value in (False, True)]
    assert ours == theirs


# --- what servers say of themselves -----------------------------------------------------------------------------------


def shape(value: Any) -> Any:
    """The same with a word in place of every number."""
    if isinstance(value, dict):
        return {key: shape(each) for key, each in value.items()}
    if isinstance(value, list):
        return [shape(each) for each in value]
    numeric = (isinstance(value, int) and not isinstance(value, bool)) or str(value).isdigit()
    return "number" if numeric else value


def test_server_metadata(sides: Sides) -> None:
    theirs, ours = (side.http(Ask("/v2", method="GET")) for side in (sides.triton, sides.serve))
    assert ours.body["extensions"] == theirs.body["extensions"]
    assert list(ours.body) == list(theirs.body)
    names = [side.call("ServerMetadata", pb.ServerMetadataRequest()).body for side in (sides.triton, sides.serve)]
    assert [item["name"] for item in names] == ["triton", "hasten"]
    assert names[0]["extensions"] == names[1]["extensions"]


@pytest.mark.parametrize("model", OWN_MODELS)
def test_models_metadata_and_configurations(sides: Sides, model: str) -> None:
    platform = {"fastertransformer": "fastertransformer", "ensemble": "ensemble"}.get(model, "hasten")
    theirs, ours = (side.http(Ask(f"/v2/models/{model}", method="GET")).body for side in (sides.triton, sides.serve))
    assert ours == theirs | {"platform": platform}
    configs = [side.http(Ask(f"/v2/models/{model}/config", method="GET")).body for side in (sides.triton, sides.serve)]
    # the backend is another one; the schema that hasten builds on is that of a newer Triton
    configs[0] |= {"default_model_filename": configs[1]["default_model_filename"], "backend": configs[1]["backend"]}
    if model == "ensemble":
        assert configs[1]["ensemble_scheduling"].pop("max_inflight_requests") == 0
    assert configs[1] == configs[0]
    assert list(configs[1]) == list(configs[0])
    for call, kind in (("ModelMetadata", pb.ModelMetadataRequest), ("ModelConfig", pb.ModelConfigRequest)):
        first, other = (side.call(call, kind(name=model)) for side in (sides.triton, sides.serve))
        assert first.status == other.status == "OK"
        assert first.body.keys() == other.body.keys()


PLACES = ("", "/ready", "/config", "/stats", "/trace/setting", "/nope")


@pytest.mark.parametrize("model", ["fastertransformer/versions/9", "fastertransformer/versions/x", "nope", ""])
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("method", ["GET", "POST"])
def test_what_there_is_not(sides: Sides, model: str, place: str, method: str) -> None:
    ask = Ask(f"/v2/models/{model}{place}", method=method)
    theirs, ours = sides.triton.http(ask), sides.serve.http(ask)
    if (theirs.status, ours.status) == (404, 405):  # both are true: the method is looked at first here
        assert method == "POST"
        return
    agree(theirs, ours)


@pytest.mark.parametrize("version", ["", "1", "9", "x"])
@pytest.mark.parametrize("model", ["nope", "fastertransformer", ""])
def test_calls_about_models(sides: Sides, model: str, version: str) -> None:
    for call in ("ModelReady", "ModelMetadata", "ModelConfig", "ModelStatistics"):
        message = getattr(pb, f"{call}Request")(name=model, version=version)
        theirs, ours = sides.triton.call(call, message), sides.serve.call(call, message)
        if theirs.status == "OK" and call != "ModelReady":
            assert ours.status == "OK"
        else:
            agree(theirs, ours)


@pytest.mark.parametrize(
    ("path", "method"),
    [
        *((f"/v2/health/{what}", method) for what in ("live", "ready", "x") for method in ("GET", "POST")),
        *((path, "GET") for path in ("/v2/", "/nope", "/v2/models", f"{TOKENS}/ready", f"{TOKENS}/versions/1/ready")),
        *((f"/v2/repository/{what}", "GET") for what in ("index", "models/nope/load", "models/nope/unload")),
        ("/v2", "POST"),
    ],
)
def test_routes(sides: Sides, path: str, method: str) -> None:
    agree(sides.triton.http(Ask(path, method=method)), sides.serve.http(Ask(path, method=method)))


INPUTS = {"input_ids": [[5, 6, 7]], "input_lengths": [[3]], "request_output_len": [[4]]}


def tensors(**values: list[list[int]]) -> dict[str, Any]:
    output = []
    for name, rows in values.items():
        data = [item for row in rows for item in row]
        output.append({"name": name, "datatype": "UINT32", "shape": [len(rows), len(rows[0])], "data": data})
    return {"inputs": output}


@pytest.mark.parametrize(
    "body",
    [
        tensors(input_ids=[[5, 6, 7]], input_lengths=[[3]]),
        tensors(**INPUTS, nothing=[[1]]),
        tensors(**INPUTS | {"request_output_len": [[4], [4]]}),
        tensors(**INPUTS | {"input_lengths": [[3, 3]]}),
        tensors(**INPUTS) | {"outputs": [{"name": "nothing"}]},
        tensors(**{name: rows * 1025 for name, rows in INPUTS.items()}),
    ],
)
def test_requests_that_do_not_fit_the_token_model(sides: Sides, body: dict[str, Any]) -> None:
    ask = Ask(f"{TOKENS}/infer", body)
    answers = [replace(side.http(ask), headers=()) for side in (sides.triton, sides.serve)]
    # Triton looks at inputs, and names them, in the order of a hash table
    unnamed = r"Got input\(s\) \[.*?\]|input '\w+' batch size"
    agree(*[replace(item, body=re.sub(unnamed, "", item.body)) for item in answers])


def test_statistics_and_metrics(sides: Sides) -> None:
    both = (sides.triton, sides.serve)
    for side in both:
        assert side.http(Ask(f"{TOKENS}/infer", tensors(**INPUTS))).status == 200
        reported = side.http(Ask("/v2/models/demo-model/generate_stream", {"text_input": "a", "max_tokens": 2}))
        assert reported.status == 200
    for model in ("fastertransformer", "demo-model", "ensemble"):
        # Triton counts a streamed request some time after its last response
        eventually(partial(counts_alike, both, model))
        first, other = (side.call("ModelStatistics", pb.ModelStatisticsRequest(name=model)).body for side in both)
        assert first["model_stats"][0].keys() == other["model_stats"][0].keys()
    theirs, ours = (families(side) for side in both)
    pinned = {name for name in theirs if name.startswith("nv_pinned_memory")}  # there is no such pool here
    for name in theirs.keys() - pinned:
        assert ours[name] == theirs[name]


def counts_alike(sides: tuple[Side, Side], model: str) -> bool:
    """Whether both have the same statistics of a model."""
    theirs, ours = (counted(side, model) for side in sides)
    return bool(theirs == ours)


def counted(side: Side, model: str) -> Any:
    """Which statistics of a model there are, without their values."""
    stats = shape(side.http(Ask(f"/v2/models/{model}/stats", method="GET")).body["model_stats"][0])
    stats["batch_stats"] = stats["batch_stats"][:1]  # engine and text are two models in one here, and two requests
    return stats


def families(side: Side) -> dict[str, tuple[str, set[str]]]:
    """Kind and samples, without values, of each metric about hasten's own models and the machine."""
    answer = httpx.get(f"http://{side.metrics}/metrics")
    assert answer.headers["content-type"] == "text/plain; charset=utf-8"
    return {
        family.name: (
            family.type,
            {f"{sample.name} {sample.labels}" for sample in family.samples if sample.labels.get("model") not in ADDING},
        )
        for family in text_string_to_metric_families(answer.text)
    }


# --- what changes servers ---------------------------------------------------------------------------------------------

INDEX, MODELS = "/v2/repository/index", "/v2/repository/models"


def entries(answer: Answer) -> Any:
    """An index without the models that Triton has besides."""
    return [entry for entry in answer.body if entry["name"] in OWN_MODELS]


def test_the_index(sides: Sides) -> None:
    for body in (b"", {"ready": True}):
        theirs, ours = (side.http(Ask(INDEX, body)) for side in (sides.triton, sides.serve))
        assert (entries(ours), ours.headers) == (entries(theirs), theirs.headers)
    theirs, ours = (side.http(Ask("/v2/repository/r/index")) for side in (sides.triton, sides.serve))
    assert entries(ours) == entries(theirs)
    wrong = Ask(INDEX, {"ready": "x"})
    agree(sides.triton.http(wrong), sides.serve.http(wrong))
    for ready in (False, True):
        message = pb.RepositoryIndexRequest(ready=ready)
        theirs, ours = (side.call("RepositoryIndex", message).body["models"] for side in (sides.triton, sides.serve))
        assert ours == [entry for entry in theirs if entry["name"] in OWN_MODELS]
    named = pb.RepositoryIndexRequest(repository_name="r")
    agree(sides.triton.call("RepositoryIndex", named), sides.serve.call("RepositoryIndex", named))


def test_unloading_and_loading(sides: Sides) -> None:
    both = (sides.triton, sides.serve)
    for ask in (Ask(f"{MODELS}/demo-model/unload"), Ask(f"{MODELS}/nope/unload"), Ask(f"{MODELS}/nope/load")):
        agree(*(side.http(ask) for side in both))
    unloaded = {"name": "demo-model", "version": "1", "state": "UNAVAILABLE", "reason": "unloaded"}
    for side in both:
        eventually(lambda side=side: unloaded in side.http(Ask(INDEX)).body)  # type: ignore[misc]
    paths = ["", "/ready", "/config", "/stats", "/versions/1", "/versions/1/ready"]
    asks = [Ask(f"/v2/models/demo-model{path}", method="GET") for path in paths]
    asks += [Ask(f"/v2/models/demo-model{path}", {}) for path in ("/infer", "/versions/1/infer", "/generate")]
    for ask in (*asks, Ask("/v2/health/ready", method="GET")):
        agree(*(side.http(ask) for side in both))
    assert [entries(side.http(Ask(INDEX, {"ready": True}))) for side in both] == 2 * [
        [{"name": name, "version": "1", "state": "READY"} for name in sorted(set(OWN_MODELS) - {"demo-model"})]
    ]
    for ask in (Ask(f"{MODELS}/demo-model/load"), Ask(f"{MODELS}/demo-model/load", {})):
        agree(*(side.http(ask) for side in both))


def loading(model: str, repository: str = "", **parameters: Any) -> pb.RepositoryModelLoadRequest:
    message = pb.RepositoryModelLoadRequest(model_name=model, repository_name=repository)
    for key, value in parameters.items():
        field = {str: "string_param", int: "int64_param", bytes: "bytes_param"}[type(value)]
        setattr(message.parameters[key], field, value)
    return message


@pytest.mark.parametrize(
    ("parameters", "difference"),
    [
        ({"model": "nope"}, None),
        ({"model": ""}, None),
        ({"model": "preprocessing", "repository": "r"}, None),
        ({"model": "preprocessing", "foo": 1}, None),
        ({"model": "preprocessing", "config": 1}, None),
        ({"model": "preprocessing", "file:1/x": "x"}, None),
        # what a client sends is the client's fault, and it is told what is wrong
        ({"model": "preprocessing", "config": "{"}, "is not a model configuration"),
        ({"model": "preprocessing", "config": '{"foo": 1}'}, 'no field named "foo"'),
        ({"model": "preprocessing", "file:1/x": b"x"}, "Load parameter 'config' must be specified for model file"),
    ],
)
def test_what_cannot_be_loaded(sides: Sides, parameters: dict[str, Any], difference: str | None) -> None:
    theirs, ours = (side.call("RepositoryModelLoad", loading(**parameters)) for side in (sides.triton, sides.serve))
    if difference is None:
        agree(theirs, ours)
    else:
        assert (theirs.status, ours.status) == ("INTERNAL", "INVALID_ARGUMENT")
        assert ours.body.startswith(theirs.body)
        assert difference in ours.body


def memory(name: str, action: str, **body: Any) -> Ask:
    index = f"/region/{name}" if name else ""
    return Ask(f"/v2/systemsharedmemory{index}/{action}", body, method="GET" if action == "status" else "POST")


def test_system_shared_memory(sides: Sides) -> None:
    both = (sides.triton, sides.serve)
    key = f"/hasten_parity_{os.getpid()}"
    handle = shm.create_shared_memory_region("parity", key, 64)
    whole = {"key": key, "byte_size": 64}
    try:
        for ask in (
            *(memory("", "status"), memory("r", "status"), memory("r", "unregister"), memory("", "unregister")),
            *(memory("", "register", **whole), memory("r", "register"), memory("r", "register", byte_size=8)),
            *(memory("r", "register", key="/x"), memory("r", "register", key=3, byte_size="8")),
            *(memory("r", "register", **whole), memory("r", "register", **whole)),
            *(memory("r", "status"), memory("", "status"), memory("r", "unregister"), memory("r", "status")),
            *(memory("", "unregister"), memory("", "status"), Ask("/v2/systemsharedmemory/status")),
        ):
            agree(*(side.http(ask) for side in both))
        for region in ({"key": "/no_such_key", "byte_size": 8}, whole | {"byte_size": 65}):
            theirs, ours = (side.http(memory("s", "register", **region)) for side in both)
            # which bytes there are is the client's affair: 400, and what is wrong
            assert ours.status == 400
            assert ours.body.startswith(theirs.body)
        part = memory("s", "register", key=key, offset=32, byte_size=32)
        # Triton maps regions, and only whole pages can be; hasten reads and writes them
        theirs, ours = (side.http(part) for side in both)
        assert theirs.status in (400, 500)
        assert ours.status == 200
        for side in both:
            side.http(memory("", "unregister"))
    finally:
        shm.destroy_shared_memory_region(handle)
    for message in (pb.SystemSharedMemoryStatusRequest(name="r"), pb.SystemSharedMemoryStatusRequest()):
        agree(*(side.call("SystemSharedMemoryStatus", message) for side in both))


def test_cuda_shared_memory(sides: Sides) -> None:
    both = (sides.triton, sides.serve)
    for index, method in (("/status", "GET"), ("/region/r/status", "GET"), ("/unregister", "POST"),
                          ("/region/r/unregister", "POST"), ("/region/r/register", "GET")):  # fmt: skip
        agree(*(side.http(Ask(f"/v2/cudasharedmemory{index}", method=method)) for side in both))
    for call in ("Status", "Unregister"):
        for name in ("", "r"):
            message = getattr(pb, f"CudaSharedMemory{call}Request")(name=name)
            agree(*(side.call(f"CudaSharedMemory{call}", message) for side in both))
    handle = pb.CudaSharedMemoryRegisterRequest(name="r", raw_handle=b"x" * 64, device_id=0, byte_size=8)
    # Triton tries and fails without a GPU; hasten does not offer it, and says so
    theirs, ours = (side.call("CudaSharedMemoryRegister", handle) for side in both)
    assert (theirs.status, ours.status) == ("INVALID_ARGUMENT", "UNIMPLEMENTED")


TRACES: tuple[dict[str, Any], ...] = (
    *({}, {"trace_level": ["OFF"]}, {"trace_level": ["TIMESTAMPS"]}, {"trace_level": ["OFF", "OFF"]}),
    *({"trace_rate": ["7"]}, {"trace_rate": ["7", "8"]}, {"trace_rate": ["4294967296"]}, {"trace_rate": []}),
    *({"trace_count": ["5"]}, {"trace_count": ["x"]}, {"trace_count": ["99999999999"]}, {"trace_count": []}),
    *({"log_frequency": ["2"]}, {"log_frequency": []}, {"trace_file": ["x"]}, {"trace_mode": ["triton"]}),
)


@pytest.mark.parametrize("model", ["", "fastertransformer", "nope"])
def test_trace_settings(sides: Sides, model: str) -> None:
    both = (sides.triton, sides.serve)
    for changes in TRACES:
        message = pb.TraceSettingRequest(model_name=model)
        for key, values in changes.items():
            message.settings[key].value.extend(values)
        agree(*(side.call("TraceSetting", message) for side in both))
        path = f"/v2/models/{model}/trace/setting" if model else "/v2/trace/setting"
        agree(*(side.http(Ask(path, method="GET")) for side in both))
    bad = pb.TraceSettingRequest(model_name=model)
    bad.settings["foo"].value.append("1")
    theirs, ours = (side.call("TraceSetting", bad) for side in both)
    if model != "nope":  # Triton takes no notice of what it does not know
        assert (theirs.status, ours.status) == ("OK", "INVALID_ARGUMENT")


LOGS: tuple[dict[str, Any], ...] = (
    *({}, {"log_info": False}, {"log_info": True}, {"log_info": 1}, {"log_info": "x"}, {"log_verbose_level": 1}),
    *({"log_verbose_level": 0}, {"log_verbose_level": True}, {"log_format": "ISO8601"}, {"log_format": "default"}),
    *({"log_format": "x"}, {"log_format": True}, {"log_file": "x"}),
)


def test_log_settings(sides: Sides) -> None:
    both = (sides.triton, sides.serve)
    for changes in LOGS:
        message = pb.LogSettingsRequest()
        for key, value in changes.items():
            kind = {bool: "bool_param", int: "uint32_param", str: "string_param"}[type(value)]
            setattr(message.settings[key], kind, value)
        agree(*(side.call("LogSettings", message) for side in both))
        agree(*(side.http(Ask("/v2/logging", method="GET")) for side in both))
    for body in ({"log_info": False}, {"log_info": True}, {"log_error": None}, {"log_file": "x"}, {}):
        agree(*(side.http(Ask("/v2/logging", body)) for side in both))


# --- stock clients ----------------------------------------------------------------------------------------------------


def added(module: Any, place: str, **options: Any) -> dict[str, Any]:
    """What a stock client makes of one inference."""
    with module.InferenceServerClient(place) as client:
        inputs = [module.InferInput(name, [2, 3], "FP32") for name in parity_http.PAIR]
        for item in inputs:
            item.set_data_from_numpy(np.arange(6, dtype=np.float32).reshape(2, 3))
        outputs = [module.InferRequestedOutput("OUTPUT0"), module.InferRequestedOutput("OUTPUT1", class_count=2)]
        result = client.infer("add", inputs, outputs=outputs, request_id="7", **options)
        output = {name: result.as_numpy(name).tolist() for name in ("OUTPUT0", "OUTPUT1")}
        response = result.get_response()
        return output | {"id": response["id"] if isinstance(response, dict) else response.id}


@pytest.mark.parametrize("packed", [None, "gzip", "deflate"])
def test_stock_clients_see_the_same(sides: Sides, packed: str | None) -> None:
    both = (sides.triton, sides.adding)
    http = {"request_compression_algorithm": packed, "response_compression_algorithm": packed}
    answers = [added(httpclient, side.http_place, **http) for side in both]
    answers += [added(grpcclient, side.grpc_place, compression_algorithm=packed) for side in both]
    assert answers == 4 * answers[:1]
    assert answers[0]["OUTPUT1"] == [[b"0.000000:0", b"0.000000:1"]] * 2


@pytest.mark.parametrize("module", [grpcclient, httpclient], ids=["grpc", "http"])
def test_stock_clients_raise_the_same(sides: Sides, module: Any) -> None:
    def refusals(side: Side) -> Iterator[tuple[str, str]]:
        with module.InferenceServerClient(side.grpc_place if module is grpcclient else side.http_place) as client:
            calls: tuple[tuple[str, Any], ...] = (
                *(("get_model_metadata", "nope"), ("get_model_config", "nope"), ("load_model", "nope")),
                *(("get_inference_statistics", "nope"), ("get_system_shared_memory_status", "nope")),
            )
            for name, argument in calls:
                with pytest.raises(InferenceServerException) as error:
                    getattr(client, name)(argument)
                yield error.value.status(), error.value.message()

    assert list(refusals(sides.serve)) == list(refusals(sides.triton))
