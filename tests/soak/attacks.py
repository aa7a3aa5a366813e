"""Malformed requests, made by chance from proper ones. The same seed and number make the same request."""

import gzip
import json
import random
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from tests.soak.asks import TEXT, TOKENS, Ask, tensor, text_message, token_message
from tests.soak.http_client import request
from tests.soak.mutations import INTS, json_bytes, mutate_message, mutated_bytes, mutated_json
from tritonclient.grpc import service_pb2 as pb

SPARE = "postprocessing"
"""A model that attacks may load and unload."""
REGION = "soak"
"""A region of shared memory that is registered."""
_ASK = Ask("Anna looked", 3)


@dataclass(frozen=True)
class HttpAttack:
    """Bytes for an HTTP port. `owed`: whether they are a request that must be answered."""

    raw: bytes
    owed: bool = True


@dataclass(frozen=True)
class GrpcAttack:
    """Messages for one call, as bytes."""

    method: str
    messages: tuple[bytes, ...]


def _column(name: str, datatype: str, data: list[Any], **parameters: Any) -> dict[str, Any]:
    fields = {"name": name, "datatype": datatype, "shape": [1, len(data)], "data": data}
    return fields | ({"parameters": parameters} if parameters else {})


def _infer_json() -> dict[str, Any]:
    ids = _ASK.ids
    columns = {"input_ids": ids, "input_lengths": [len(ids)], "request_output_len": [3], "runtime_top_k": [2]}
    inputs = [_column(name, "UINT32", data) for name, data in columns.items()]
    inputs += [_column("temperature", "FP32", [0.7]), _column("is_return_log_probs", "BOOL", [True])]
    inputs += [{"name": "stop_words_list", "datatype": "INT32", "shape": [1, 2, 2], "data": [5, 6, 2, -1]}]
    outputs = [{"name": "output_ids", "parameters": {"binary_data": False}}, {"name": "cum_log_probs"}]
    parameters = {"priority": 1, "timeout": 5_000_000, "sequence_id": 0}
    return {"id": "a", "inputs": inputs, "outputs": outputs, "parameters": parameters}


def _shared_json() -> dict[str, Any]:
    result = _infer_json()
    result["inputs"][0].pop("data")
    result["inputs"][0]["parameters"] = {"shared_memory_region": REGION, "shared_memory_byte_size": 44}
    where = {"shared_memory_region": REGION, "shared_memory_byte_size": 512, "shared_memory_offset": 512}
    result["outputs"][0]["parameters"] = where
    return result


def _ensemble_json() -> dict[str, Any]:
    texts = {"INPUT_0": ["Anna"], "INPUT_2": [""], "INPUT_3": ["the,a"]}
    inputs = [_column(name, "BYTES", data) for name, data in texts.items()]
    return {"inputs": [*inputs, _column("INPUT_1", "UINT32", [3])]}


_GENERATE = {
    **{"text_input": "Anna looked", "max_tokens": 3, "stream": False, "temperature": 0.5, "top_k": 3, "top_p": 0.9},
    **{"stop_words": ["the"], "bad_words": ["a"], "seed": 3, "return_log_probs": True, "id": "a"},
    **{"parameters": {"priority": 1}, "exclude_input_in_output": True, "return_finish_reason": True},
}
_SAMPLED = {"text_input": "Anna", "sampling_parameters": '{"max_tokens": 3, "temperature": 0.5, "n": 2, "logprobs": 2}'}
_COMPLETION = {
    **{"model": TEXT, "prompt": "Anna looked", "max_tokens": 3, "temperature": 0.5, "top_p": 0.9, "n": 2, "seed": 1},
    **{"stop": ["the"], "logprobs": 2, "echo": True, "presence_penalty": 0.1, "logit_bias": {"5": 1.0}},
    **{"stream": True, "stream_options": {"include_usage": True}, "top_k": 5, "min_p": 0.1, "bad_words": ["a"]},
}
_CONSTRAINED = {
    **{"model": TEXT, "prompt": "Anna", "max_tokens": 3},
    **{"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "integer"}}}},
}
_GUIDED = {"model": TEXT, "prompt": ["Anna", "Ben"], "max_tokens": 3, "guided_regex": "[a-z]+(b|c)*"}
_BEAMS = {"model": TOKENS, "prompt": [[5, 6], [7]], "max_tokens": 3, "use_beam_search": True, "best_of": 3, "n": 2}
_CHAT = {
    **{"model": TEXT, "max_tokens": 3, "logprobs": True, "top_logprobs": 2, "stream": False, "seed": 2},
    "messages": [{"role": "system", "content": "Be"}, {"role": "user", "content": [{"type": "text", "text": "Anna"}]}],
    **{"chat_template_kwargs": {"x": 1}, "cache_salt": "a"},
}
_FUNCTION = {"name": "look", "parameters": {"type": "object", "properties": {"place": {"type": "string"}}}}
_TOOLS = {**_CHAT, "tools": [{"type": "function", "function": _FUNCTION}], "tool_choice": "auto"}
_RESPONSE = {
    **{"model": TEXT, "input": [{"role": "user", "content": "Anna"}], "max_output_tokens": 3, "temperature": 0.5},
    **{"tools": [{"type": "function", **_FUNCTION}], "tool_choice": "auto", "stream": True, "store": False, "seed": 1},
    **{"text": {"format": {"type": "text"}}, "instructions": "Be", "cache_salt": "a", "priority": 1},
}
_MESSAGE = {
    **{"model": TEXT, "max_tokens": 3, "system": "Be", "stop_sequences": ["the"], "top_k": 3, "stream": False},
    "messages": [
        {"role": "user", "content": [{"type": "text", "text": "Anna"}]},
        {"role": "assistant", "content": "a"},
    ],
    **{"tools": [{"name": "look", "input_schema": _FUNCTION["parameters"]}], "tool_choice": {"type": "auto"}},
}
_COUNT = {name: value for name, value in _MESSAGE.items() if name in ("model", "messages", "system", "tools")}
_MEMORY = {"key": "/hasten-soak-nothing", "offset": 0, "byte_size": 64}
_LOAD = {"parameters": {"config": json.dumps({"backend": "hasten", "parameters": {"kind": {"string_value": SPARE}}})}}
_TRACE = {"trace_level": ["OFF"], "trace_rate": "10", "trace_count": "5", "log_frequency": "0"}

_Base = tuple[str, Any]
_TRITON: list[_Base] = [
    *[(f"/v2/models/{TOKENS}/infer", _infer_json())] * 6,
    *[(f"/v2/models/{TOKENS}/infer", _shared_json())] * 2,
    *[("/v2/models/ensemble/infer", _ensemble_json())] * 2,
    (f"/v2/models/{TOKENS}/versions/1/infer", _infer_json()),
    (f"/v2/models/{TEXT}/infer", _infer_json()),
    ("/v2/repository/index", {"ready": True}),
    (f"/v2/repository/models/{SPARE}/load", _LOAD),
    (f"/v2/repository/models/{SPARE}/unload", {"parameters": {"unload_dependents": False}}),
    ("/v2/systemsharedmemory/region/r/register", _MEMORY),
    ("/v2/systemsharedmemory/region/r/unregister", {}),
    ("/v2/cudasharedmemory/region/r/register", {"raw_handle": {"b64": "x"}, "device_id": 0, "byte_size": 4}),
    ("/v2/trace/setting", _TRACE),
    (f"/v2/models/{TEXT}/trace/setting", _TRACE),
    ("/v2/logging", {"log_verbose_level": 0, "log_format": "default"}),
]
_GETS = [
    *("/v2", "/v2/models/stats", f"/v2/models/{TOKENS}", f"/v2/models/{TOKENS}/config", f"/v2/models/{TOKENS}/stats"),
    *(f"/v2/models/{TEXT}/versions/1/ready", "/v2/systemsharedmemory/status", "/v2/health/ready", "/v1/models", "/"),
    *("/health", "/ping", "/version", "/metrics", "/state", "/docs", "/openapi.json", f"/v1/models/{TEXT}"),
]
_GENERATES: list[_Base] = [
    (f"/v2/models/{model}{version}/{route}", body)
    for model, body in ((TEXT, _GENERATE), (TEXT, _SAMPLED), ("ensemble", {"INPUT_0": "Anna", "INPUT_1": 3}))
    for version in ("", "/versions/1")
    for route in ("generate", "generate_stream")
]
_OPENAI: list[_Base] = [
    *[("/v1/completions", _COMPLETION)] * 3,
    *(("/v1/completions", body) for body in (_CONSTRAINED, _GUIDED, _BEAMS)),
    *[("/v1/chat/completions", _CHAT)] * 2,
    ("/v1/chat/completions", _TOOLS),
    *[("/v1/responses", _RESPONSE)] * 2,
    *[("/v1/messages", _MESSAGE)] * 2,
    ("/v1/messages/count_tokens", _COUNT),
]


def triton(rng: random.Random) -> HttpAttack:
    """Over Triton's HTTP routes."""
    if rng.random() < 0.05:
        path = _path(rng, rng.choice(_GETS))
        return HttpAttack(request(rng.choice(("GET", "POST", "PUT", "DELETE", "OPTIONS")), path))
    if rng.random() < 0.3:
        return _binary(rng)
    return posted(rng, *rng.choice(_TRITON))


def generate(rng: random.Random) -> HttpAttack:
    """Over the generate extension."""
    return posted(rng, *rng.choice(_GENERATES))


def openai(rng: random.Random) -> HttpAttack:
    """Over OpenAI's routes."""
    return posted(rng, *rng.choice(_OPENAI))


def posted(rng: random.Random, path: str, body: Any) -> HttpAttack:
    """A body of JSON, changed by chance, with headers that are mostly proper."""
    # a proper body goes with headers that are not
    odd = rng.random() < 0.2
    value = body if odd and rng.random() < 0.5 else mutated_json(rng, body)
    raw = json_bytes(rng, value)
    if rng.random() < 0.05:
        path = _path(rng, path)
    return _with_odd_headers(rng, path, raw, {}) if odd else HttpAttack(request("POST", path, raw))


def _path(rng: random.Random, path: str) -> str:
    odd = ["", ".", "..", "%00", "%2e%2e%2f", "%ff%fe", "a b", "é", "x" * 5000, "0", "-1", "1" * 30, "%", "?x=1", "#"]
    parts = path.split("/")
    parts[rng.randrange(1, len(parts))] = rng.choice(odd)
    return "/".join(parts)


def _binary(rng: random.Random) -> HttpAttack:
    """A body of JSON and binary tensors behind it."""
    head, raws = _infer_json(), []
    for column in head["inputs"][:4]:
        raws.append(np.array(column.pop("data"), np.uint32).tobytes())
        column["parameters"] = {"binary_data_size": len(raws[-1])}
    if rng.random() < 0.6:
        head = mutated_json(rng, head)
    tail = b"".join(raws)
    if rng.random() < 0.5:
        tail = mutated_bytes(rng, tail)
    raw = json_bytes(rng, head)
    length: Any = len(raw) if rng.random() < 0.7 else rng.choice([*INTS, "x", "", "1e3", "²"])
    headers = {"Inference-Header-Content-Length": str(length)}
    path = f"/v2/models/{TOKENS}/infer"
    if rng.random() < 0.1:
        return _with_odd_headers(rng, path, raw + tail, headers)
    return HttpAttack(request("POST", path, raw + tail, headers))


def _with_odd_headers(rng: random.Random, path: str, raw: bytes, headers: dict[str, str]) -> HttpAttack:
    kind = rng.randrange(8)
    if kind == 0:
        packed = rng.choice([gzip.compress(raw, mtime=0), zlib.compress(raw)])
        packed = rng.choice([packed, mutated_bytes(rng, packed), raw, packed + packed])
        encoding = rng.choice(["gzip", "deflate", "br", "gzip, deflate", "GZIP", "identity", "x" * 100])
        return HttpAttack(request("POST", path, packed, headers | {"content-encoding": encoding}))
    if kind == 1:
        wrong = str(rng.choice([*INTS, "x", "", "+5", "0x10", "1,1"]))
        return HttpAttack(request("POST", path, raw, headers | {"content-length": wrong}), owed=False)
    if kind == 2:
        chunks = b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in (raw[:9], raw[9:]) if part) + b"0\r\n\r\n"
        sent = rng.choice([chunks, mutated_bytes(rng, chunks)])
        head = f"POST {path} HTTP/1.1\r\nhost: soak\r\ntransfer-encoding: chunked\r\n\r\n".encode()
        return HttpAttack(head + sent, owed=sent == chunks)
    if kind == 3:
        accept = rng.choice(["gzip;q=x", "deflate;q=nan", "gzip;q=-1", ",,,", "*", "\xff" * 50, "gzip;q=1e999"])
        return HttpAttack(request("POST", path, raw, headers | {"accept-encoding": accept}))
    if kind == 4:
        kinds = rng.choice(["text/plain", "application/json; charset=utf-16", "multipart/form-data", "\xe9"])
        return HttpAttack(request("POST", path, raw, headers | {"content-type": kinds}))
    if kind == 5:
        return HttpAttack(mutated_bytes(rng, request("POST", path, raw, headers)), owed=False)
    if kind == 6:
        extra = {f"x-{number}": "y" * rng.choice((10, 1000)) for number in range(rng.choice((1, 60)))}
        return HttpAttack(request("POST", path, raw, headers | extra), owed=False)
    return HttpAttack(request("POST", path, raw, headers | {"expect": "100-continue", "upgrade": "h2c"}))


def _typed_message() -> Any:
    message = pb.ModelInferRequest(model_name=TOKENS, id="t")
    for name, values in (("input_ids", _ASK.ids), ("input_lengths", [len(_ASK.ids)]), ("request_output_len", [3])):
        result = message.inputs.add(name=name, datatype="UINT32", shape=[1, len(values)])
        result.contents.uint_contents.extend(values)
    return message


def _shared_message() -> Any:
    message = token_message(_ASK)
    del message.raw_input_contents[0]
    parameters = (message.inputs[0].parameters, message.outputs[0].parameters)
    for index, found in enumerate(parameters):
        found["shared_memory_region"].string_param = REGION
        found["shared_memory_byte_size"].int64_param = (44, 512)[index]
        found["shared_memory_offset"].int64_param = 512 * index
    return message


def _ensemble_message() -> Any:
    message = pb.ModelInferRequest(model_name="ensemble")
    for name in ("INPUT_0", "INPUT_2", "INPUT_3"):
        tensor(message, name, "BYTES", b"Anna")
        message.inputs[-1].shape[:] = [1, 1]
    tensor(message, "INPUT_1", "UINT32", np.array([[3]], np.uint32))
    message.parameters["timeout"].int64_param = 5_000_000
    return message


_INFERS: list[Callable[[], Any]] = [
    *(_typed_message, _shared_message, _ensemble_message),
    *(lambda: token_message(_ASK), lambda: text_message(_ASK)),
]
_SMALL: dict[str, dict[str, Any]] = {
    "ModelReady": {"name": TOKENS, "version": "1"},
    "ModelMetadata": {"name": TOKENS},
    "ModelConfig": {"name": TOKENS},
    "ModelStatistics": {"name": TOKENS},
    "RepositoryIndex": {"ready": True},
    "SystemSharedMemoryRegister": {"name": "g", "key": "/hasten-soak-nothing", "byte_size": 64},
    "SystemSharedMemoryUnregister": {"name": "g"},
    "SystemSharedMemoryStatus": {},
    "CudaSharedMemoryRegister": {"name": "g", "raw_handle": b"x", "byte_size": 4},
    "CudaSharedMemoryStatus": {},
    "CudaSharedMemoryUnregister": {},
    "TraceSetting": {"model_name": TEXT},
    "LogSettings": {},
    "RepositoryModelLoad": {"model_name": SPARE},
    "RepositoryModelUnload": {"model_name": SPARE},
    "ServerLive": {},
    "ServerReady": {},
    "ServerMetadata": {},
}


def over_grpc(rng: random.Random) -> GrpcAttack:
    """Over gRPC: mostly inference, now and then any other call."""
    if rng.random() < 0.25:
        method = rng.choice(list(_SMALL))
        return GrpcAttack(method, (_garbled(rng, getattr(pb, f"{method}Request")(**_SMALL[method])),))
    if rng.random() < 0.3:
        return GrpcAttack("ModelStreamInfer", tuple(_garbled(rng, rng.choice(_INFERS)()) for _ in range(3)))
    return GrpcAttack("ModelInfer", (_garbled(rng, rng.choice(_INFERS)()),))


def _garbled(rng: random.Random, message: Any) -> bytes:
    mutate_message(rng, message)
    raw: bytes = message.SerializeToString()
    return mutated_bytes(rng, raw) if rng.random() < 0.15 else raw
