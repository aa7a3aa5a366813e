import gzip
import http.client
import json
import socket
import struct
import time
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import numpy as np
import pytest
import tritonclient.http as httpclient
from tests.server.adding_service import OWN_ERROR
from tests.server.transport_fixtures import LIMIT, Transports, refusal, workers
from tests.waiting import LIMIT_S, eventually

from hasten.server.protocol import http_infer

# Expected answers are those that Triton 2.51.0 gave to the same requests. Where the fault is the client's, the status
# is 400 where Triton says 500.

A = {"name": "INPUT0", "datatype": "FP32", "shape": [1, 2], "data": [1, 2.5]}
B = {"name": "INPUT1", "datatype": "FP32", "shape": [1, 2], "data": [10, 0.5]}
SUM = {"name": "OUTPUT0", "datatype": "FP32", "shape": [1, 2], "data": [11.0, 3.0]}
DIFFERENCE = {"name": "OUTPUT1", "datatype": "FP32", "shape": [1, 2], "data": [-9.0, 2.0]}
ADD = "/v2/models/add/infer"
NO_ID = "[request id: <id_unknown>] "
NO_SUCH_TYPE = "parameter 'x' has invalid type. It should be either 'int', 'bool', or 'string'."


def test_an_inference_as_json(http: httpx.Client) -> None:
    both = {"model_name": "add", "model_version": "1", "outputs": [SUM, DIFFERENCE]}
    assert http.post(ADD, json={"inputs": [A, B]}).json() == both
    item = {"id": "abc", "inputs": [A, B], "outputs": [{"name": "OUTPUT1"}], "parameters": {"x": 1, "f": 1.5}}
    answer = http.post("/v2/models/add/versions/1/infer", json=item)
    assert answer.json() == both | {"id": "abc", "outputs": [DIFFERENCE]}


@pytest.mark.parametrize(
    ("body", "error"),
    [
        ({"id": 7, "inputs": [A, B]}, "Unable to parse 'id': attempt to access JSON non-string as string"),
        ({}, "Unable to parse 'inputs': attempt to access non-existing object member 'inputs'"),
        ([], "Unable to parse 'inputs': attempt to access non-existing object member 'inputs'"),
        ({"inputs": {}}, "Unable to parse 'inputs': attempt to access JSON non-array as array"),
        (
            {"inputs": [1]},
            "Input must set only one of the following fields: 'data', 'binary_data_size' in 'parameters', "
            "'shared_memory_region' in 'parameters'. But no field is set",
        ),
        (
            {"inputs": [A | {"parameters": {"binary_data_size": 8}}]},
            "Input must set only one of the following fields: 'data', 'binary_data_size' in 'parameters', "
            "'shared_memory_region' in 'parameters'. But set 'data' 'binary_data_size'",
        ),
        ({"inputs": [A | {"datatype": "FOO"}]}, "invalid datatype for input INPUT0"),
        ({"inputs": [A | {"shape": 2}]}, "Unable to parse 'shape': attempt to access JSON non-array as array"),
        (
            {"inputs": [A | {"shape": [1, -1]}]},
            "Unable to parse 'shape': attempt to access JSON non-unsigned-integer as unsigned-integer",
        ),
        (
            {"inputs": [A]},
            f"{NO_ID}expected 2 inputs but got 1 inputs for model 'add'. Got input(s) ['INPUT0'], but missing required "
            "input(s) ['INPUT1']. Please provide all required input(s).",
        ),
        (
            {"inputs": [A | {"datatype": "INT32", "data": [1, 2]}, B]},
            f"{NO_ID}inference input 'INPUT0' data-type is 'INT32', but model 'add' expects 'FP32'",
        ),
        ({"inputs": [A, A]}, f"{NO_ID}input 'INPUT0' already exists in request"),
        ({"inputs": [A, B], "outputs": [{"name": "OUTPUT0"}] * 2}, "output 'OUTPUT0' already exists in request"),
        ({"inputs": [A, B], "outputs": [{"name": "ZZ"}]}, "unexpected inference output 'ZZ' for model 'add'"),
        (
            {"inputs": [A, B], "parameters": {"x": [1]}},
            NO_SUCH_TYPE,
        ),
        ({"inputs": [A, B], "parameters": [1]}, "failed to get request params.: attempt to get members for non-object"),
        (
            {"inputs": [A, B], "parameters": {"triton_foo": 1}},
            "parameter keys starting with 'triton_' are reserved for Triton usage. Only the following keys starting "
            "with 'triton_' are allowed: triton_enable_empty_final_response",
        ),
        (
            {"inputs": [A, B], "parameters": {"timeout": -1}},
            "invalid value for 'timeout', expected value >= 0.",
        ),
        (
            {"inputs": [A, B], "parameters": {"sequence_start": 1}},
            "invalid value type for 'sequence_start' parameter, expected bool_param.",
        ),
        (
            {"inputs": [A, B], "parameters": {"binary_data_output": "x"}},
            "invalid value type for 'binary_data_output' parameter, expected bool_param.",
        ),
        (
            {"inputs": [A, B], "outputs": [{"name": "OUTPUT0", "parameters": {"classification": -1}}]},
            "Unable to set 'classification': attempt to access JSON non-unsigned-integer as unsigned-integer",
        ),
    ],
)
def test_wrong_inferences_are_refused(http: httpx.Client, body: Any, error: str) -> None:
    assert refusal(http.post(ADD, json=body)) == error


def test_a_models_own_error_and_a_defect_are_500(http: httpx.Client) -> None:
    assert refusal(http.post(ADD, json={"inputs": [A | {"data": [-1, 0]}, B]}), 500) == OWN_ERROR
    text = refusal(http.post(ADD, json={"inputs": [A | {"data": [-3, 0]}, B]}), 500)
    assert text == "internal error; the server's log says more"


def test_a_connection_outlives_a_defect(transports: Transports, caplog: pytest.LogCaptureFixture) -> None:
    connection = http.client.HTTPConnection(transports.http, timeout=LIMIT_S)
    for first, status in ((-3, 500), (1, 200), (-3, 500), (1, 200)):
        connection.request("POST", ADD, body=json.dumps({"inputs": [A | {"data": [first, 0]}, B]}))
        socket_used = connection.sock
        answer = connection.getresponse()
        answer.read()
        assert answer.status == status
        assert connection.sock is socket_used  # http.client drops it when the server closes it
    connection.close()
    assert [record.getMessage() for record in caplog.records].count(f"POST {ADD} failed") == 2


def test_a_decoupled_model_is_not_for_infer(http: httpx.Client) -> None:
    body = {"inputs": [{"name": "IN", "datatype": "INT32", "shape": [1], "data": [2]}]}
    error = refusal(http.post("/v2/models/decoupled/infer", json=body), 501)
    assert error == "HTTP end point doesn't support models with decoupled transaction policy"


def test_nan_and_infinity_are_numbers(http: httpx.Client) -> None:
    body = '{"inputs":[{"name":"IN","datatype":"FP32","shape":[3],"data":[NaN,Infinity,1]}]}'
    text = http.post("/v2/models/id_fp32/infer", content=body).text
    assert '"data":[NaN,Infinity,1.0]' in text


def one_raw(name: str, size: int = 8) -> dict[str, Any]:
    return {"name": name, "datatype": "FP32", "shape": [1, 2], "parameters": {"binary_data_size": size}}


def post_binary(http: httpx.Client, head: Any, raw: bytes, length: object = None, path: str = ADD) -> httpx.Response:
    text = json.dumps(head).encode()
    size = len(text) if length is None else length
    return http.post(path, content=text + raw, headers={"Inference-Header-Content-Length": str(size)})


RAW = np.array([1, 2.5, 10, 0.5], np.float32).tobytes()
TWO = {"inputs": [one_raw("INPUT0"), one_raw("INPUT1")]}


def test_binary_tensors_come_behind_the_json(http: httpx.Client) -> None:
    answer = post_binary(http, TWO | {"parameters": {"binary_data_output": True}}, RAW)
    assert answer.headers["content-type"] == "application/octet-stream"
    length = int(answer.headers["Inference-Header-Content-Length"])
    size = {"parameters": {"binary_data_size": 8}}
    plain = [{key: item[key] for key in ("name", "datatype", "shape")} | size for item in (SUM, DIFFERENCE)]
    assert json.loads(answer.content[:length])["outputs"] == plain
    assert answer.content[length:] == np.array([11, 3, -9, 2], np.float32).tobytes()


@pytest.mark.parametrize(
    ("parameters", "outputs", "binary"),
    [
        ({}, [{"name": "OUTPUT0", "parameters": {"binary_data": True}}, {"name": "OUTPUT1"}], [True, False]),
        (
            {"binary_data_output": True},
            [{"name": "OUTPUT0", "parameters": {"binary_data": False}}, {"name": "OUTPUT1"}],
            [False, False],
        ),
        ({}, [], [False, False]),
    ],
)
def test_each_output_is_as_it_was_asked_for(
    http: httpx.Client, parameters: dict[str, bool], outputs: list[Any], binary: list[bool]
) -> None:
    answer = post_binary(http, TWO | {"parameters": parameters, "outputs": outputs}, RAW)
    length = int(answer.headers.get("Inference-Header-Content-Length", len(answer.content)))
    found = json.loads(answer.content[:length])["outputs"]
    assert ["parameters" in item for item in found] == binary
    assert ["data" in item for item in found] == [not item for item in binary]


@pytest.mark.parametrize(
    ("head", "raw", "length", "error"),
    [
        (TWO, RAW[:8], None, "unexpected size for input 'INPUT1', expecting 8 additional bytes for model 'add'"),
        (TWO, RAW * 2, None, "unexpected additional input data for model 'add'"),
        (TWO, RAW, -1, "inference header size should be in range (0, 220), got: -1"),
        (TWO, RAW, 100_000, "inference header size should be in range (0, 220), got: 100000"),
        (TWO, RAW, "abc", "inference header size should be in range (0, 220), got: abc"),
        (TWO, RAW, "9" * 5000, "inference header size should be in range (0, 220), got: 999"),
        (TWO, RAW, 20, "failed to parse the request JSON buffer"),
        (
            TWO,
            RAW,
            0,
            f"{NO_ID}Raw request must only have 1 input (found 1) to be deduced but got 2 inputs in 'add' model "
            "configuration",
        ),
        (
            {"inputs": [one_raw("INPUT0", 4), one_raw("INPUT1", 12)]},
            RAW,
            None,
            f"{NO_ID}input byte size mismatch for input 'INPUT0' for model 'add'. Expected 8, got 4",
        ),
        (
            {"inputs": [one_raw("INPUT0", -8)]},
            RAW,
            None,
            "Unable to parse 'binary_data_size': attempt to access JSON non-unsigned-integer as unsigned-integer",
        ),
    ],
)
def test_wrong_binary_bodies_are_refused(http: httpx.Client, head: Any, raw: bytes, length: object, error: str) -> None:
    assert error in refusal(post_binary(http, head, raw, length))


def test_a_raw_request_is_the_one_input(http: httpx.Client) -> None:
    answer = http.post("/v2/models/id_fp32/infer", content=RAW, headers={"Inference-Header-Content-Length": "0"})
    length = int(answer.headers["Inference-Header-Content-Length"])
    assert json.loads(answer.content[:length])["outputs"][0]["shape"] == [4]
    assert answer.content[length:] == RAW
    answer = http.post("/v2/models/id_string/infer", content=b"hi", headers={"Inference-Header-Content-Length": "0"})
    assert answer.content.endswith(struct.pack("<I", 2) + b"hi")
    cut = http.post("/v2/models/id_fp32/infer", content=RAW[:3], headers={"Inference-Header-Content-Length": "0"})
    assert "Expected 0, got 3" in refusal(cut)


BODY = json.dumps({"inputs": [A, B]}).encode()


@pytest.mark.parametrize(("encoding", "pack"), [("gzip", gzip.compress), ("deflate", zlib.compress)])
def test_bodies_may_be_compressed(http: httpx.Client, encoding: str, pack: Callable[[bytes], bytes]) -> None:
    plain = http.post(ADD, content=BODY, headers={"Accept-Encoding": ""})
    assert "content-encoding" not in plain.headers
    headers = {"Content-Encoding": encoding, "Accept-Encoding": encoding}
    answer = http.post(ADD, content=pack(BODY), headers=headers)
    assert answer.headers["content-encoding"] == encoding
    assert answer.json() == plain.json()  # httpx has unpacked it
    assert f"is not {encoding} data" in refusal(http.post(ADD, content=BODY, headers=headers))
    assert "cut off" in refusal(http.post(ADD, content=pack(BODY)[:-9], headers=headers))


@pytest.mark.parametrize(
    ("accepted", "expected"),
    [("br", None), ("*", None), ("gzip;q=0.1, deflate;q=0.5", "deflate"), ("gzip;q=0", None), ("gzip;q=x", None)],
)
def test_an_answer_is_compressed_as_the_client_likes_it(
    http: httpx.Client, accepted: str, expected: str | None
) -> None:
    answer = http.post(ADD, content=BODY, headers={"Accept-Encoding": accepted})
    assert answer.headers.get("content-encoding") == expected


def test_unknown_compressions_and_bodies_that_unpack_too_far_are_refused(http: httpx.Client) -> None:
    answer = http.post(ADD, content=BODY, headers={"Content-Encoding": "br"})
    assert refusal(answer, 501) == "Unsupported compression type"
    bomb = gzip.compress(bytes(LIMIT * 20))
    assert len(bomb) < LIMIT
    assert "--max-request-bytes" in refusal(http.post(ADD, content=bomb, headers={"Content-Encoding": "gzip"}))


def test_bodies_that_are_too_large_are_refused(transports: Transports, http: httpx.Client) -> None:
    assert "the limit is 1048576" in refusal(http.post(ADD, content=b" " * (LIMIT + 1)), 413)

    def pieces() -> Iterator[bytes]:
        for _ in range(20):
            yield b" " * (LIMIT // 10)

    # chunked: nobody says beforehand how much will come
    assert "the limit is 1048576" in refusal(http.post(ADD, content=pieces()), 413)
    assert http.post(ADD, content=BODY).status_code == 200


def test_large_bodies_are_parsed(http: httpx.Client) -> None:
    count = 100_000
    tensor = {"datatype": "FP32", "shape": [1, count], "data": [1.5] * count}
    answer = http.post(ADD, json={"inputs": [{"name": name} | tensor for name in ("INPUT0", "INPUT1")]})
    assert answer.json()["outputs"][0]["data"] == [3.0] * count


def test_an_answer_does_not_wait_for_the_clients_acknowledgement(http: httpx.Client) -> None:
    def seconds() -> float:
        begun = time.perf_counter()
        http.post(ADD, json={"inputs": [A, B]})
        return time.perf_counter() - begun

    # head and body travel apart: held back by TCP, the body would come 40 ms later, every time; a busy machine is as
    # slow at times
    assert any(seconds() < 0.03 for _ in range(200))


def test_classification(http: httpx.Client) -> None:
    outputs = [
        {"name": "OUTPUT0", "parameters": {"classification": 1}},
        {"name": "OUTPUT1", "parameters": {"classification": 5}},
    ]
    assert http.post(ADD, json={"inputs": [A, B], "outputs": outputs}).json()["outputs"] == [
        {"name": "OUTPUT0", "datatype": "BYTES", "shape": [1, 1], "data": ["11.000000:0"]},
        {"name": "OUTPUT1", "datatype": "BYTES", "shape": [1, 2], "data": ["2.000000:1", "-9.000000:0"]},
    ]


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ({"text_input": "hi"}, {"parameters": "{}", "length": -1}),
        ({"text_input": ["hi"]}, {"parameters": "{}", "length": -1}),
        ({"text_input": [["hi"]]}, {"parameters": "{}", "length": -1}),
        (
            {"text_input": "hi", "max_tokens": 5, "foo": 1, "bar": "x", "baz": True, "f": 1.5},
            {"parameters": '{"foo":1,"bar":"x","baz":true,"f":1.5}', "length": 5},
        ),
        ({"text_input": "hi", "parameters": {"a": 1}}, {"parameters": '{"a":1}', "length": -1}),
    ],
)
def test_generate(http: httpx.Client, body: Any, expected: Any) -> None:
    expected = {"model_name": "text", "model_version": "1", "text_output": "you said: hi"} | expected
    answer = http.post("/v2/models/text/generate", json=body)
    assert answer.json() == expected
    stream = http.post("/v2/models/text/versions/1/generate_stream", json=body | {"id": "q"})
    assert stream.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert stream.text.startswith("data: ")
    assert stream.text.endswith("}\n\n")
    assert json.loads(stream.text[6:]) == expected | {"id": "q"}


@pytest.mark.parametrize(
    ("body", "error"),
    [
        (
            {},
            f"{NO_ID}expected number of inputs between 1 and 2 but got 0 inputs for model 'text'. Got input(s) [], but "
            "missing required input(s) ['text_input']. Please provide all required input(s).",
        ),
        ([], "attempt to get members for non-object"),
        ({"text_input": "a", "x": [1]}, NO_SUCH_TYPE),
        ({"text_input": "a", "x": None}, NO_SUCH_TYPE),
        ({"text_input": ["a", "b"]}, "The schema can not convert input 'text_input' to tensor with proper shape"),
        ({"text_input": 5}, "attempt to access JSON non-string as string"),
        ({"text_input": "a", "max_tokens": 1.5}, "attempt to access JSON non-signed-integer as signed-integer"),
        ({"text_input": "a", "id": 5}, "Unable to parse 'id': attempt to access JSON non-string as string"),
    ],
)
@pytest.mark.parametrize("call", ["generate", "generate_stream"])
def test_wrong_generate_bodies_are_refused(http: httpx.Client, call: str, body: Any, error: str) -> None:
    assert error in refusal(http.post(f"/v2/models/text/{call}", json=body))


@pytest.mark.parametrize(
    ("body", "error"),
    [
        (b'{"text_input":"a","text_input":"b"}', "input 'text_input' already exists in request"),
        (b'{"text_input" :"a", "text_input"\n: "b"}', "input 'text_input' already exists in request"),
        (b'{"text_input":"a","x":1,"x":1}', "parameter 'x' already exists in request"),
        (b'{"text_input":"a","parameters":{"x":1,"y":2,"x":3}}', "parameter 'x' already exists in request"),
    ],
)
@pytest.mark.parametrize("call", ["generate", "generate_stream"])
def test_what_a_generate_body_says_twice_is_refused(http: httpx.Client, call: str, body: bytes, error: str) -> None:
    assert refusal(http.post(f"/v2/models/text/{call}", content=body)) == error


def test_text_with_quotes_and_colons_is_no_second_key(http: httpx.Client) -> None:
    text = 'he said: {"text_input": "a", "text_input": "b"} and "more":'
    assert http.post("/v2/models/text/generate", json={"text_input": text}).json()["text_output"].endswith(text)


def test_what_an_inference_says_twice_is_refused(http: httpx.Client) -> None:
    body = json.dumps({"inputs": [A, B]})
    twice = body[:-1] + ', "inputs": []}'
    assert refusal(http.post(ADD, content=twice)).endswith("the key 'inputs' comes twice")
    shape = body.replace('"shape":', '"shape": [1], "shape":', 1)
    assert refusal(http.post(ADD, content=shape)).endswith("the key 'shape' comes twice")
    deep = body[:-1] + ', "x":' + '{"a":' * 5000 + "1" + "}" * 5001
    assert "failed to parse the request JSON buffer" in refusal(http.post(ADD, content=deep))


def test_generate_shapes_what_comes_flat(http: httpx.Client) -> None:
    for item, other in ((1, 1), ([1, 2], [1, 2]), ([[1, 2]], [[1, 2]])):
        answer = http.post("/v2/models/add/generate", json={"INPUT0": item, "INPUT1": other})
        assert answer.json()["OUTPUT0"] == (2.0 if item == 1 else [2.0, 4.0])


@pytest.mark.parametrize(("wanted", "numbers"), [(0, []), (1, [0]), (3, [0, 1, 2])])
def test_a_stream_of_responses(http: httpx.Client, wanted: int, numbers: list[int]) -> None:
    answer = http.post("/v2/models/decoupled/generate_stream", json={"IN": wanted})
    assert answer.status_code == 200
    events = answer.text.split("\n\n")
    assert events.pop() == ""
    found = [json.loads(event.removeprefix("data: ")) for event in events]
    assert found == [{"OUT": number, "model_name": "decoupled", "model_version": "1"} for number in numbers]


def test_an_error_in_mid_stream_is_an_event(http: httpx.Client) -> None:
    answer = http.post("/v2/models/decoupled/generate_stream", json={"IN": -2})
    assert answer.status_code == 200
    assert answer.text.endswith(f'data: {{"error":"{OWN_ERROR}"}}\n\n')
    assert refusal(http.post("/v2/models/decoupled/generate_stream", json={"IN": -1}), 500) == OWN_ERROR


@pytest.mark.parametrize("wanted", [0, 2, 1000])
def test_generate_is_one_response(transports: Transports, http: httpx.Client, wanted: int) -> None:
    error = refusal(http.post("/v2/models/decoupled/generate", json={"IN": wanted}))
    assert error.startswith("generate expects model to produce exactly 1 response")
    assert http.post("/v2/models/decoupled/generate", json={"IN": 1}).json()["OUT"] == 0


def leave(transports: Transports, path: str, body: Any) -> http.client.HTTPConnection:
    connection = http.client.HTTPConnection(transports.http, timeout=LIMIT_S)
    connection.request("POST", path, body=json.dumps(body))
    return connection


SLOW = {"inputs": [A | {"data": [-2, 0]}, B]}


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (ADD, SLOW),
        ("/v2/models/decoupled/generate", {"IN": 1, "DELAY": 1000.0}),
        ("/v2/models/decoupled/generate_stream", {"IN": 1000, "DELAY": 1000.0}),
    ],
)
def test_a_client_that_leaves_withdraws_its_request(transports: Transports, path: str, body: Any) -> None:
    begun, withdrawn = transports.service.begun, transports.service.withdrawn
    connection = leave(transports, path, body)
    eventually(lambda: transports.service.begun == begun + 1)
    if "stream" in path:
        assert connection.sock.recv(9) == b"HTTP/1.1 "
    connection.close()
    eventually(lambda: transports.service.withdrawn == withdrawn + 1)


def test_a_client_that_does_not_read_holds_up_nobody(transports: Transports, http: httpx.Client) -> None:
    withdrawn = transports.service.withdrawn
    lazy = socket.create_connection(("127.0.0.1", transports.http_listener.port))
    lazy.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    body = json.dumps({"IN": 1_000_000})
    head = f"POST /v2/models/decoupled/generate_stream HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
    lazy.sendall((head + body).encode())
    for _ in range(5):
        assert http.post(ADD, json={"inputs": [A, B]}).status_code == 200
    lazy.close()
    eventually(lambda: transports.service.withdrawn == withdrawn + 1)


@pytest.fixture(scope="module")
def triton(transports: Transports) -> Iterator[httpclient.InferenceServerClient]:
    with httpclient.InferenceServerClient(transports.http) as http:
        yield http


def tensors(binary: bool = True) -> list[httpclient.InferInput]:
    inputs = [httpclient.InferInput(name, [1, 2], "FP32") for name in ("INPUT0", "INPUT1")]
    inputs[0].set_data_from_numpy(np.array([[1, 2.5]], np.float32), binary_data=binary)
    inputs[1].set_data_from_numpy(np.array([[10, 0.5]], np.float32), binary_data=binary)
    return inputs


def test_large_answers_are_written_beside_the_loop(http: httpx.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    used = {name: workers(monkeypatch, http_infer, name) for name in ("infer_response", "generate_json")}
    values = [[0.5] * 20_000]
    body = {"inputs": [each | {"shape": [1, 20_000], "data": values} for each in (A, B)]}
    answer = http.post(ADD, json=body, headers={"accept-encoding": "gzip"})
    assert answer.headers["content-encoding"] == "gzip"
    assert answer.json()["outputs"][0]["data"] == [1.0] * 20_000
    generated = http.post("/v2/models/id_fp32/generate", json={"IN": values[0]})
    assert generated.json()["OUT"] == values[0]
    assert http.post(ADD, json={"inputs": [A, B]}).json()["outputs"] == [SUM, DIFFERENCE]
    (large, small), (streamed,) = used.values()
    assert large.startswith("by-size")
    assert not small.startswith("by-size")
    assert streamed.startswith("by-size")


@pytest.mark.parametrize("binary", [True, False])
@pytest.mark.parametrize("compression", [None, "gzip", "deflate"])
def test_tritons_client_infers(triton: httpclient.InferenceServerClient, binary: bool, compression: str | None) -> None:
    outputs = [httpclient.InferRequestedOutput(name, binary_data=binary) for name in ("OUTPUT0", "OUTPUT1")]
    result = triton.infer(
        "add",
        tensors(binary),
        outputs=outputs,
        request_id="7",
        priority=1,
        timeout=1000,
        parameters={"own": "x"},
        request_compression_algorithm=compression,
        response_compression_algorithm=compression,
    )
    assert result.as_numpy("OUTPUT0").tolist() == [[11, 3]]
    assert result.as_numpy("OUTPUT1").tolist() == [[-9, 2]]
    assert result.get_response()["id"] == "7"


def test_tritons_client_sends_short_floats(triton: httpclient.InferenceServerClient) -> None:
    tensor = httpclient.InferInput("IN", [2], "FP16")
    tensor.set_data_from_numpy(np.array([1, -2.5], np.float16))
    assert triton.infer("id_fp16", [tensor]).as_numpy("OUT").tolist() == [1, -2.5]
