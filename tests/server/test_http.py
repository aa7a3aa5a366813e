from typing import Any

import httpx
import pytest
import tritonclient.http as httpclient
from tests.server.adding_service import EXTENSIONS
from tests.server.transport_fixtures import Transports, refusal
from tritonclient.utils import InferenceServerException

# Expected answers are those that Triton 2.51.0 gave to the same requests. Where the fault is the client's, the status
# is 400 where Triton says 500.


ADD = "/v2/models/add/infer"


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v2", {"name": "triton", "version": "2.51.0", "extensions": EXTENSIONS.split()}),
        (
            "/v2/models/add/versions/1",
            {
                "name": "add",
                "versions": ["1"],
                "platform": "python",
                "inputs": [{"name": name, "datatype": "FP32", "shape": [-1, -1]} for name in ("INPUT0", "INPUT1")],
                "outputs": [{"name": name, "datatype": "FP32", "shape": [-1, -1]} for name in ("OUTPUT0", "OUTPUT1")],
            },
        ),
        ("/v2/systemsharedmemory/status", []),
        ("/v2/cudasharedmemory/status", []),
    ],
)
def test_metadata_is_told(http: httpx.Client, path: str, body: Any) -> None:
    answer = http.get(path)
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "application/json"
    assert answer.json() == body


def test_a_configuration_is_written_with_all_its_defaults(http: httpx.Client) -> None:
    tensor = {"data_type": "TYPE_FP32", "dims": [-1], "is_shape_tensor": False}
    took = tensor | {"format": "FORMAT_NONE", "allow_ragged_batch": False, "optional": False}
    took["is_non_linear_format_io"] = False
    gave = tensor | {"label_filename": "", "is_non_linear_format_io": False}
    assert http.get("/v2/models/add/config").json() == {
        "name": "add",
        "platform": "",
        "backend": "python",
        "runtime": "",
        "version_policy": {"latest": {"num_versions": 1}},
        "max_batch_size": 64,
        "input": [{"name": name} | took for name in ("INPUT0", "INPUT1")],
        "output": [{"name": name} | gave for name in ("OUTPUT0", "OUTPUT1")],
        "batch_input": [],
        "batch_output": [],
        "optimization": {
            "priority": "PRIORITY_DEFAULT",
            "input_pinned_memory": {"enable": True},
            "output_pinned_memory": {"enable": True},
            "gather_kernel_buffer_threshold": 0,
            "eager_batching": False,
        },
        "instance_group": [
            {
                "name": "add_0",
                "kind": "KIND_CPU",
                "count": 1,
                "gpus": [],
                "secondary_devices": [],
                "profile": [],
                "passive": False,
                "host_policy": "",
            }
        ],
        "default_model_filename": "model.py",
        "cc_model_filenames": {},
        "metric_tags": {},
        "parameters": {},
        "model_warmup": [],
    }


def test_statistics_have_all_their_fields(http: httpx.Client) -> None:
    zero = {"count": 0, "ns": 0}
    parts = ("success", "fail", "queue", "compute_input", "compute_infer", "compute_output", "cache_hit", "cache_miss")
    expected = {
        "name": "add",
        "version": "1",
        "last_inference": 0,
        "inference_count": 0,
        "execution_count": 0,
        "inference_stats": dict.fromkeys(parts, zero),
        "response_stats": {},
        "batch_stats": [],
        "memory_usage": [],
    }
    assert http.get("/v2/models/add/stats").json() == {"model_stats": [expected]}
    assert expected in http.get("/v2/models/stats").json()["model_stats"]


@pytest.mark.parametrize(
    ("path", "status", "error"),
    [
        ("/v2/models/nope", 404, "Request for unknown model: 'nope' is not found"),
        ("/v2/models/add/versions/x", 404, "Not Found"),
        ("/v2/models/add/versions/2", 404, "Request for unknown model: 'add' version 2 is not found"),
        (f"/v2/models/add/versions/{'9' * 5000}", 404, "Not Found"),
        ("/v2/models/add/versions/\u0661", 404, "Not Found"),
        ("/v2/models/nope/config", 404, "Request for unknown model: 'nope' is not found"),
        ("/v2/models/nope/ready", 400, "Model version not ready"),
        ("/v2/models/nope/stats", 400, "requested model 'nope' is not available"),
        ("/v2/models/nope/trace/setting", 400, "Request for unknown model : nope"),
        ("/v2/systemsharedmemory/region/r/status", 404, "Unable to find system shared memory region: 'r'"),
        ("/v2/cudasharedmemory/region/r/status", 404, "Unable to find cuda shared memory region: 'r'"),
        *((path, 404, "Not Found") for path in ("/v2/", "/foo", "/v2/models", "/v2/models/", "/v2/models/add/")),
        *(
            (path, 404, "Not Found")
            for path in ("/v2/x", "/v2/models/add/x", "/v2/health", "/v2/models/add/versions/x")
        ),
        *((path, 405, "Method Not Allowed") for path in (ADD, "/v2/repository/index", "/v2/models/add/generate")),
        ("/v2/repository/models/add/load", 405, "Method Not Allowed"),
    ],
)
def test_what_cannot_be_got_says_why(http: httpx.Client, path: str, status: int, error: str) -> None:
    assert refusal(http.get(path), status) == error


@pytest.mark.parametrize("path", ["/v2", "/v2/health/live", "/v2/models/add", "/v2/models/add/stats"])
def test_what_is_got_is_not_posted(http: httpx.Client, path: str) -> None:
    assert refusal(http.post(path, content="{}"), 405) == "Method Not Allowed"


def test_health_is_a_status_alone(transports: Transports, http: httpx.Client) -> None:
    for path in ("/v2/health/live", "/v2/health/ready", "/v2/models/add/ready"):
        answer = http.get(path)
        assert (answer.status_code, answer.content) == (200, b"")
    transports.service.ready = False
    try:
        answer = http.get("/v2/health/ready")
        assert (answer.status_code, answer.content) == (400, b"")
    finally:
        transports.service.ready = True


@pytest.mark.parametrize("text", [b"{", b"{bad}", b'"\xff"', b"[" * 60_000, b'{"inputs": nul', b"\0\1\2"])
@pytest.mark.parametrize("path", [ADD, "/v2/models/text/generate", "/v2/repository/index", "/v2/logging"])
def test_what_is_no_json_is_refused(http: httpx.Client, path: str, text: bytes) -> None:
    assert "failed to parse the request JSON buffer" in refusal(http.post(path, content=text))


def test_the_repository_is_controlled(transports: Transports, http: httpx.Client) -> None:
    entry = {"name": "text", "version": "1", "state": "READY"}
    root = "/v2/repository"
    assert entry in http.post(f"{root}/index").json()
    assert http.post(f"{root}/models/text/unload", json={"parameters": {"unload_dependents": True}}).content == b""
    gone = entry | {"state": "UNAVAILABLE", "reason": "unloaded"}
    assert gone in http.post(f"{root}/index", json={}).json()
    assert "text" not in [each["name"] for each in http.post(f"{root}/index", json={"ready": True}).json()]
    assert http.get("/v2/health/ready").status_code == 400
    unknown = "Request for unknown model: 'text' has no available versions"
    assert refusal(http.post("/v2/models/text/infer", json={"inputs": []}), 404) == unknown
    loaded = {"parameters": {"config": "{}", "file:1/model.bin": "aGVsbG8="}}
    assert http.post(f"{root}/models/text/load", json=loaded).status_code == 200
    assert transports.service.loads[-1] == ("text", "{}", {"1/model.bin": b"hello"})
    assert http.get("/v2/models/text/ready").status_code == 200
    missing = refusal(http.post(f"{root}/models/nope/load"), 500)
    assert missing == "failed to load 'nope', failed to poll from model repository"


@pytest.mark.parametrize(
    ("path", "body", "status", "error"),
    [
        ("index", {"ready": "x"}, 400, "attempt to access JSON non-boolean as boolean"),
        ("myrepo/models/text/load", {}, 501, "'repository_name' specification is not supported"),
        ("models/text/load", {"parameters": {"foo": "x"}}, 400, "unrecognized load parameter 'foo'."),
        ("models/text/load", {"parameters": {"config": 5}}, 400, "attempt to access JSON non-string as string"),
        ("models/text/load", {"parameters": {"file:1/a": "not base64!"}}, 400, "'file:1/a' is not base64 text"),
        ("models/text/load", {"parameters": {"file:1/a": 5}}, 400, "load parameter 'file:1/a' is not base64 text"),
        ("models/..%2f..%2fetc/load", {}, 404, "Not Found"),
        ("models/text/unload", {"parameters": {"unload_dependents": "x"}}, 400, "attempt to access JSON non-boolean"),
    ],
)
def test_wrong_repository_calls_are_refused(
    transports: Transports, http: httpx.Client, path: str, body: Any, status: int, error: str
) -> None:
    before = len(transports.service.loads)
    assert error in refusal(http.post(f"/v2/repository/{path}", json=body), status)
    assert len(transports.service.loads) == before


@pytest.mark.parametrize(
    ("path", "body", "status", "error"),
    [
        ("region/r/register", {"byte_size": 64}, 400, "Shared memory register request has no 'key' field"),
        ("region/r/register", {"key": "/x"}, 400, "Shared memory register request has no 'byte_size' field"),
        ("region/r/register", {"key": 5, "byte_size": 64}, 400, "attempt to access JSON non-string as string"),
        ("region/r/register", {"key": "/x", "byte_size": -1}, 400, "JSON non-unsigned-integer as unsigned-integer"),
        ("region/r/register", {"key": "/../x", "byte_size": 1}, 400, "Unable to open shared memory region: '/../x'"),
        ("register", {"key": "/x", "byte_size": 1}, 400, "'region name' is necessary to register system shared memory"),
    ],
)
def test_wrong_regions_are_refused(http: httpx.Client, path: str, body: Any, status: int, error: str) -> None:
    assert error in refusal(http.post(f"/v2/systemsharedmemory/{path}", json=body), status)


def test_cuda_shared_memory_is_not_supported(http: httpx.Client) -> None:
    body = {"raw_handle": {"b64": "aGVsbG8="}, "device_id": 0, "byte_size": 64}
    assert "not supported" in refusal(http.post("/v2/cudasharedmemory/region/c/register", json=body), 501)
    assert http.post("/v2/cudasharedmemory/region/c/unregister").status_code == 200
    assert http.post("/v2/cudasharedmemory/unregister").status_code == 200


TRACING = {
    "trace_level": ["OFF"],
    "trace_rate": "1000",
    "trace_count": "-1",
    "log_frequency": "0",
    "trace_file": "",
    "trace_mode": "triton",
}


def test_trace_settings_of_a_model_stand_before_those_of_all(http: httpx.Client) -> None:
    everywhere, each = "/v2/trace/setting", "/v2/models/add/trace/setting"
    assert http.get(everywhere).json() == TRACING
    assert http.post(everywhere, json={"trace_count": "5"}).json() == TRACING | {"trace_count": "5"}
    assert http.post(each, json={"trace_rate": "7"}).json() == TRACING | {"trace_count": "5", "trace_rate": "7"}
    assert http.get(everywhere).json()["trace_rate"] == "1000"
    assert http.post(each, json={"trace_rate": None}).json()["trace_rate"] == "1000"
    assert http.post(everywhere, json={"trace_count": None, "trace_level": ["OFF"]}).json() == TRACING


@pytest.mark.parametrize(
    ("body", "status", "error"),
    [
        ({"trace_rate": "x"}, 400, "Unable to parse 'trace_rate', got: x"),
        ({"trace_rate": 5}, 400, "attempt to access JSON non-string as string"),
        ({"trace_count": "-2"}, 400, "Unable to parse 'trace_count'. Expecting value >= -1, got:-2"),
        ({"trace_level": "OFF"}, 400, "attempt to access JSON non-array as array"),
        (
            {"trace_level": ["TIMESTAMPS"]},
            400,
            "Attempting to set invalid trace setting :trace file name is not given",
        ),
        ({"trace_level": ["FOO"]}, 400, "trace level 'FOO' is not known"),
        ({"trace_file": "/tmp/x"}, 501, "trace file location can not be updated through network protocol"),
        ({"trace_mode": "opentelemetry"}, 501, "trace mode 'opentelemetry' is not supported"),
        ({"foo": "1", "trace_rate": "9"}, 400, "trace setting 'foo' is not known"),
    ],
)
def test_wrong_trace_settings_are_refused(http: httpx.Client, body: Any, status: int, error: str) -> None:
    assert error in refusal(http.post("/v2/trace/setting", json=body), status)
    assert http.get("/v2/trace/setting").json() == TRACING


LOGGING = {
    "log_file": "",
    "log_info": True,
    "log_warning": True,
    "log_error": True,
    "log_verbose_level": 0,
    "log_format": "default",
}


def test_log_settings(http: httpx.Client) -> None:
    assert http.get("/v2/logging").json() == LOGGING
    changed = {"log_info": False, "log_verbose_level": 1, "log_format": "ISO8601"}
    assert http.post("/v2/logging", json=changed | {"log_error": None}).json() == LOGGING | changed
    assert http.post("/v2/logging", json=LOGGING | {"log_file": None}).status_code == 501
    restored = {key: value for key, value in LOGGING.items() if key != "log_file"}
    assert http.post("/v2/logging", json=restored).json() == LOGGING


@pytest.mark.parametrize(
    ("body", "status", "error"),
    [
        ({"log_file": "/tmp/x"}, 501, "log file location can not be updated through network protocol"),
        ({"log_format": "x"}, 400, "invalid argument for log_format, got: x"),
        ({"log_info": 1}, 400, "expect boolean for 'log_info'"),
        ({"log_verbose_level": "1"}, 400, "expect int32 for 'log_verbose_level'"),
        ({"log_verbose_level": 2**31}, 400, "expect int32 for 'log_verbose_level'"),
        ({"log_verbose_level": -1}, 400, "expect int32 for 'log_verbose_level'"),
        ({"log_info": False, "foo": 1}, 400, "log setting 'foo' is not known"),
    ],
)
def test_wrong_log_settings_are_refused(http: httpx.Client, body: Any, status: int, error: str) -> None:
    assert error in refusal(http.post("/v2/logging", json=body), status)
    assert http.get("/v2/logging").json() == LOGGING


def test_tritons_client_manages(transports: Transports) -> None:
    with httpclient.InferenceServerClient(transports.http) as triton:
        manage(triton)


def manage(triton: httpclient.InferenceServerClient) -> None:
    assert triton.is_server_live()
    assert triton.is_server_ready()
    assert triton.is_model_ready("add")
    assert not triton.is_model_ready("nope")
    assert triton.get_server_metadata()["version"] == "2.51.0"
    assert triton.get_model_metadata("add")["platform"] == "python"
    assert triton.get_model_config("add")["max_batch_size"] == 64
    assert triton.get_inference_statistics("add")["model_stats"][0]["name"] == "add"
    assert triton.get_model_repository_index()[0]["state"] == "READY"
    triton.unload_model("text", unload_dependents=True)
    triton.load_model("text")
    assert triton.get_trace_settings("add")["trace_level"] == ["OFF"]
    assert triton.update_trace_settings(settings={"trace_rate": "9"})["trace_rate"] == "9"
    assert triton.update_trace_settings(settings={"trace_rate": None})["trace_rate"] == "1000"
    assert triton.update_log_settings({"log_info": True})["log_info"]
    assert triton.get_log_settings()["log_format"] == "default"
    with pytest.raises(InferenceServerException, match="CUDA shared memory is not supported"):
        triton.register_cuda_shared_memory("c", b"aGVsbG8=", 0, 64)
    with pytest.raises(InferenceServerException, match="Request for unknown model: 'nope' is not found"):
        triton.get_model_metadata("nope")
