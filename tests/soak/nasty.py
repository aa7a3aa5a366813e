"""Malformed requests written by hand: what is known to break servers."""

import gzip
import json
from typing import Any

import numpy as np
from tests.soak.asks import TEXT, TOKENS, Ask, token_message
from tests.soak.attacks import GrpcAttack, HttpAttack
from tests.soak.http_client import request
from tritonclient.grpc import service_pb2 as pb

_INFER = f"/v2/models/{TOKENS}/infer"
_GENERATE = f"/v2/models/{TEXT}/generate"
_COMPLETIONS = "/v1/completions"
_BOMB = gzip.compress(bytes(96 << 20))
"""Zeros: more than a request may have."""
_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
"""How HTTP/2 begins."""


def _any(*values: Any) -> tuple[Any, ...]:
    return values


def _post(path: str, body: Any, **headers: str) -> HttpAttack:
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    return HttpAttack(request("POST", path, raw, {name.replace("_", "-"): text for name, text in headers.items()}))


def _column(datatype: str, shape: Any, data: Any, name: str = "input_ids") -> HttpAttack:
    return _post(_INFER, {"inputs": [{"name": name, "datatype": datatype, "shape": shape, "data": data}]})


def _shape(*shape: int) -> HttpAttack:
    column = {"name": "input_ids", "datatype": "UINT32", "shape": shape, "parameters": {"binary_data_size": 4}}
    raw = json.dumps({"inputs": [column]}).encode()
    return _post(_INFER, raw + b"\1\0\0\0", Inference_Header_Content_Length=str(len(raw)))


def _text(size: int, datatype: str = "BYTES") -> HttpAttack:
    """A text that says to be longer than it is."""
    head = {"inputs": [{"name": "QUERY", "datatype": datatype, "shape": [1, 1], "parameters": {"binary_data_size": 8}}]}
    raw = json.dumps(head).encode()
    tail = size.to_bytes(4, "little") + b"abcd"
    return _post("/v2/models/preprocessing/infer", raw + tail, Inference_Header_Content_Length=str(len(raw)))


def _sent(text: str, *, owed: bool = False) -> HttpAttack:
    return HttpAttack(text.replace("\n", "\r\n").encode("latin-1"), owed)


def _completion(**fields: Any) -> HttpAttack:
    return _post(_COMPLETIONS, {"model": TEXT, "prompt": "Anna", "max_tokens": 2} | fields)


def _generation(**fields: Any) -> HttpAttack:
    return _post(_GENERATE, {"text_input": "Anna", "max_tokens": 2} | fields)


TRITON = [
    *(
        _post(_INFER, body)
        for body in (b"", b"{", b"[]", b"null", b"\0" * 1000, b"[" * 200_000, b'{"inputs":' * 50_000)
    ),
    *(_post(_INFER, {"inputs": inputs}) for inputs in _any(None, {}, [None], [[]], [{}], [{"name": 1}])),
    *(_shape(*shape) for shape in ((2**31, 2**31), (0,), (1, 0), (2**62, 4), (1,) * 64, (2**31 - 1, 2**31 - 1, 0))),
    *(
        _column("UINT32", [1, 1], data)
        for data in _any([-1], [2**32], [1.5], ["1"], [None], [[[[1]]]], {}, 1, [10**500])
    ),
    *(_column(datatype, [1, 1], [1]) for datatype in ("FP16", "BF16", "BYTES", "uint32", "", "UINT128", "TYPE_STRING")),
    *(_column("UINT32", shape, [1]) for shape in ([1, -1], [-1, -1], ["1"], [1.0], None, [[1]], [True], [2**64])),
    *(_text(size) for size in (0, 3, 5, 2**31, 2**32 - 1)),
    _post(_INFER, _BOMB, content_encoding="gzip"),
    _post(_INFER, _BOMB[:-9], content_encoding="gzip"),
    _post(_INFER, b"\x1f\x8b", content_encoding="gzip"),
    _post(_INFER, b"{}", Inference_Header_Content_Length="99999999999999999999"),
    _post(_INFER, b"{}", Inference_Header_Content_Length="-1"),
    _post("/v2/models/%2e%2e%2f%2e%2e%2fetc/infer", b"{}"),
    _post("/v2/repository/models/%2e%2e%2fx/load", b"{}"),
    _post("/v2/repository/models/new/load", {"parameters": {"config": "{}", "file:1/../../../x": "eA=="}}),
    _post("/v2/repository/models/new/load", {"parameters": {"config": "{}", "file:/etc/x": "eA=="}}),
    _post("/v2/repository/models/new/load", {"parameters": {"file:1/x": "\ud800"}}),
    _post("/v2/repository/models/postprocessing/load", {"parameters": {"config": "{" * 9000}}),
    _post("/v2/repository/models/postprocessing/load", {"parameters": {"config": json.dumps({"backend": "x"})}}),
    _post("/v2/systemsharedmemory/region/x/register", {"key": "/../etc/passwd", "byte_size": 1}),
    _post("/v2/systemsharedmemory/region/x/register", {"key": "\0", "byte_size": 2**63}),
    _post("/v2/trace/setting", {"trace_level": ["TIMESTAMPS"], "trace_rate": "²"}),
    _post("/v2/logging", {"log_verbose_level": 2**70}),
    HttpAttack(request("POST", _INFER, b"x" * 10, {"content-length": str(1 << 40)})),
    _sent("GET /v2 HTTP/1.1\n\n", owed=True),
    _sent("GET /v2 HTTP/9.9\nhost: localhost\n\n"),
    _sent("GET http://elsewhere/v2 HTTP/1.1\nhost: localhost\n\n", owed=True),
    _sent("GET /\xff\xfe HTTP/1.1\nhost: localhost\n\n"),
    _sent("\xff\xfe\x00\x01\n\n"),
    _sent("POST /v2 HTTP/1.1\nhost: localhost\ncontent-length: 3\ncontent-length: 4\n\nabcd"),
    _sent("POST /v2 HTTP/1.1\nhost: localhost\ncontent-length: 3\ntransfer-encoding: chunked\n\n0\n\n"),
    _sent("POST /v2 HTTP/1.1\nhost: localhost\ntransfer-encoding: chunked\n\nffffffffffffffffff\n"),
    _sent("GET /v2 HTTP/1.1\nhost: localhost\nx: " + "y" * 200_000 + "\n\n"),
    _sent("GET /v2 HTTP/1.1\nhost: localhost\nbad header\n\n"),
    _sent("PRI * HTTP/2.0\n\nSM\n\n"),
    _sent("CONNECT x:1 HTTP/1.1\nhost: localhost\n\n"),
]

GENERATE = [
    *(_post(_GENERATE, body) for body in (b"", b"[]", b"1", b'{"text_input":"\xff"}', b'{"text_input":"\\ud800"}')),
    *(_generation(text_input=text) for text in (None, 1, [], ["a", "b"], [["a"]], "", "\0" * 50_000, {"a": 1})),
    *(_generation(max_tokens=count) for count in (-1, 0, 2**31, 2**70, 1.5, "3", None, [1, 2], [[[1]]], True)),
    *(_generation(temperature=value) for value in _any(-1, float("nan"), float("inf"), 1e39, "hot", None, [[]])),
    *(_generation(top_p=value) for value in (-0.1, 1.1, float("nan"))),
    *(_generation(top_k=value) for value in (-2, 2**31 - 1)),
    *(_generation(stop_words=words) for words in ([""], ["\0"], [""] * 5000, ["x" * 50_000], [1])),
    *(_generation(sampling_parameters=text) for text in ("{", "[]", '{"n":99999999}', '{"stop":[[]]}', '{"x":1}')),
    *(_generation(parameters=value) for value in _any(1, [], {"a": []}, {"priority": -1}, {"timeout": "x"}, {"id": 1})),
    *(_generation(**{name: 1}) for name in ("triton_x", "priority", "unknown", "", "text_output")),
    _generation(priority=2**70),
    _generation(timeout=2**70),
    _generation(sequence_id="x" * 100_000),
    _generation(beam_width=2**31 - 1),
    _generation(sampling_parameters='{"logprobs": 2000000, "prompt_logprobs": 5}'),
    _generation(sampling_parameters='{"seed": -1}'),
    _generation(sampling_parameters='{"max_tokens": 1e3, "temperature": NaN}'),
]

OPENAI = [
    *(_post(_COMPLETIONS, body) for body in (b"", b"[]", b"null", b"{" * 100_000, b'{"model":"\xff"}', b"\xff\xfe{}")),
    *(
        _completion(prompt=prompt)
        for prompt in _any(None, [], "", [[]], [""], ["a", 1], [-1], [2**31], [2**70], [[5], []])
    ),
    *(_completion(prompt=prompt) for prompt in ("\ud800", ["a"] * 5000, [5] * 5000, [[[5]]], {"a": 1}, "a" * 200_000)),
    *(_completion(max_tokens=count) for count in (-1, 0, 2**31, 2**70, 1.5, "3", True)),
    *(_completion(temperature=value) for value in (-1, 1e400, float("nan"), "1")),
    *(_completion(n=count) for count in (0, -1, 129, 2**70)),
    *(_completion(logprobs=count) for count in (-1, 21, 2**40)),
    *(_completion(logit_bias=value) for value in ({"x": 1}, {"-1": 1}, {"9999999": 1}, {"5": 1e400}, [1], {"": 1})),
    *(_completion(stop=value) for value in ("", [""], ["a"] * 65, [1], {"a": 1})),
    *(_completion(seed=seed) for seed in (-(2**63), 2**64, 2**70, 1.5)),
    *(_completion(guided_regex=text) for text in ("(", "(?<=a)b", "a{99999999}", "((((a*)*)*)*)*b", "\0", "[" * 5000)),
    *(
        _completion(guided_json=value)
        for value in _any({"type": "x"}, {"$ref": "#"}, "{", 1, {"$ref": "http://x/y"}, [])
    ),
    *(_completion(guided_grammar=text) for text in ("", "start:", "start: start", "%import x", 'start: "a"*' * 999)),
    *(_completion(guided_choice=value) for value in ([], [""], [1], ["a" * 50_000], ["a"] * 5000)),
    *(_completion(stream_options=value) for value in ({}, {"x": 1}, 1, {"include_usage": True})),
    *(_completion(**{name: True}) for name in ("unknown", "tools", "best_of", "suffix", "functions")),
    _completion(response_format={"type": "json_schema"}),
    _completion(response_format={"type": "json_schema", "json_schema": {"schema": {"$ref": "#/x"}}}),
    _completion(use_beam_search=True, n=2, best_of=1),
    _completion(bad_words=["\ud800"]),
    _completion(min_tokens=5),
    _completion(priority=-1),
    _completion(stop_token_ids=[2**70]),
    _completion(echo=True, max_tokens=0, logprobs=20, n=128),
    _post("/v1/chat/completions", {"model": TEXT, "messages": []}),
    _post("/v1/chat/completions", {"model": TEXT, "messages": [{"role": "x", "content": 1}]}),
    _post("/v1/chat/completions", {"model": TEXT, "messages": [{"role": "user"}] * 5000}),
    _post("/v1/chat/completions", {"model": TEXT, "messages": [{"role": "user", "content": "{{ 7 * '7' }}" * 9000}]}),
    _post("/v1/embeddings", {}),
    _post("/v1/" + "x" * 60_000, {}),
]


def _message(change: Any) -> GrpcAttack:
    message = token_message(Ask("Anna", 2))
    change(message)
    return GrpcAttack("ModelInfer", (message.SerializeToString(),))


def _set_shape(*shape: int) -> GrpcAttack:
    return _message(lambda message: message.inputs[0].shape.__setitem__(slice(None), shape))


def _set_raw(place: int, raw: bytes) -> GrpcAttack:
    return _message(lambda message: message.raw_input_contents.__setitem__(place, raw))


def _parameter(name: str, kind: str, value: Any) -> GrpcAttack:
    return _message(lambda message: setattr(message.parameters[name], kind, value))


GRPC = [
    *(
        GrpcAttack(method, (raw,))
        for method in ("ModelInfer", "ServerLive")
        for raw in (b"\xff" * 9, b"\x08", b"\n\xff")
    ),
    GrpcAttack("ModelStreamInfer", ()),
    GrpcAttack("ModelStreamInfer", (b"\xff\xff",)),
    GrpcAttack("ModelStreamInfer", (token_message(Ask("Anna", 2)).SerializeToString(), b"\xff")),
    GrpcAttack("ModelStreamInfer", (b"", b"", b"")),
    GrpcAttack("NoSuchCall", (b"",)),
    GrpcAttack("ModelInfer", (b"",)),
    GrpcAttack("ModelInfer", (b"\n\x90N" + b"x" * 10_000,)),
    *(_set_shape(*shape) for shape in ((), (0, 0), (-1, 4), (2**62, 4), (-(2**63),), (1,) * 40, (2**31, 2**31))),
    *(_set_raw(place, raw) for place in (0, 1) for raw in (b"", b"\1", b"\xff" * 16, bytes(1 << 20))),
    *(_set_raw(2, np.array(count, np.uint32).tobytes()) for count in (0, 2**31, 2**32 - 1)),
    _parameter("priority", "int64_param", -1),
    _parameter("priority", "uint64_param", 2**64 - 1),
    _parameter("timeout", "int64_param", 2**63 - 1),
    _parameter("timeout", "string_param", "x"),
    _parameter("triton_enable_empty_final_response", "string_param", "x"),
    _parameter("x", "double_param", float("nan")),
    _message(lambda message: message.raw_input_contents.append(b"more")),
    _message(lambda message: message.raw_input_contents.pop()),
    _message(lambda message: message.inputs.append(message.inputs[0])),
    _message(lambda message: message.inputs[0].contents.uint_contents.append(1)),
    _message(lambda message: setattr(message, "model_version", "٣")),
    _message(lambda message: setattr(message, "model_version", "-1")),
    _message(lambda message: setattr(message, "model_name", "../x")),
    _message(lambda message: setattr(message.outputs[0], "name", "none")),
    GrpcAttack("RepositoryModelLoad", (pb.RepositoryModelLoadRequest(model_name="../x").SerializeToString(),)),
    GrpcAttack(
        "SystemSharedMemoryRegister", (pb.SystemSharedMemoryRegisterRequest(name="x", key="/").SerializeToString(),)
    ),
]

RAW_GRPC = [
    b"GET / HTTP/1.1\r\nhost: x\r\n\r\n",
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(200),
    _PREFACE + b"\xff" * 1000,
    _PREFACE + bytes(9),
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
    + bytes(3)
    + b"\x04"
    + bytes(5)
    + b"\x00\x40\x00\x09\x04\x00\x00\x00\x01"
    + bytes(64),
    bytes(100_000),
]
"""Bytes for the gRPC port that are no gRPC."""
