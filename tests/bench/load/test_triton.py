"""Triton's text models: their inputs, and streams over gRPC from a server that answers by a script."""

import asyncio
import json
import struct
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from tests.bench.load.scripted_server import HOST
from tests.bench.load.test_client import ordered, run, single
from tritonclient.grpc import service_pb2

from hasten.bench.load.client import ClientOptions
from hasten.bench.load.grpc import event, infer_request
from hasten.bench.load.target import find_target
from hasten.bench.load.triton import TensorSpec, TextModelInputs
from hasten.core.errors import ConfigError, EngineError

SERVICE = "inference.GRPCInferenceService"
VLLM = ("text_input BYTES", "stream BOOL", "sampling_parameters BYTES", "return_num_output_tokens BOOL")
TENSORRT_LLM = ("text_input BYTES", "stream BOOL", "max_tokens INT32", "temperature FP32", "stop_words BYTES")

Responses = Callable[[Any, grpc.ServicerContext], Iterator[Any]]


def inputs(names: tuple[str, ...], shape: tuple[int, ...] = (1,)) -> list[TensorSpec]:
    return [TensorSpec(name, datatype, shape) for name, datatype in map(str.split, names)]


def test_vllm_takes_its_parameters_as_json() -> None:
    found = TextModelInputs.of("m", inputs(VLLM), {"temperature": 0.5, "stop": ["a"]})
    values = found.values("once", 7)
    assert json.loads(values.pop("sampling_parameters")) == {"temperature": 0.5, "stop": ["a"], "max_tokens": 7}
    assert values == {"text_input": "once", "stream": True, "return_num_output_tokens": True}


def test_tensorrt_llm_has_a_tensor_for_each() -> None:
    found = TextModelInputs.of("m", inputs(TENSORRT_LLM, (-1, 1)), {"temperature": 0.5, "stop": ["end", "of"]})
    message = infer_request("m", found, "once", 7)
    tensors = {each.name: (each.datatype, list(each.shape)) for each in message.inputs}
    assert tensors == {
        "text_input": ("BYTES", [1, 1]),
        "stream": ("BOOL", [1, 1]),
        "temperature": ("FP32", [1, 1]),
        "stop_words": ("BYTES", [1, 2]),
        "max_tokens": ("INT32", [1, 1]),
    }
    raw = dict(zip((each.name for each in message.inputs), message.raw_input_contents, strict=True))
    assert raw["text_input"] == b"\4\0\0\0once"
    assert raw["stop_words"] == b"\3\0\0\0end\2\0\0\0of"
    assert raw["stream"] == b"\1"
    assert struct.unpack("<f", raw["temperature"]) == (0.5,)
    assert struct.unpack("<i", raw["max_tokens"]) == (7,)


@pytest.mark.parametrize(
    ("names", "sampling", "message"),
    [
        (("QUERY BYTES",), {}, "the model 'm' has no input 'text_input'; its inputs are: QUERY"),
        (("text_input BYTES",), {}, "has neither an input 'sampling_parameters', as vLLM's have, nor 'max_tokens'"),
        (TENSORRT_LLM, {"ignore_eos": True}, "the model 'm' has no input for ignore_eos; leave it out"),
    ],
)
def test_models_that_do_not_fit(names: tuple[str, ...], sampling: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TextModelInputs.of("m", inputs(names), sampling)


def response(text: str, tokens: int | None = None) -> Any:
    message = service_pb2.ModelStreamInferResponse()
    found = message.infer_response
    found.outputs.add(name="text_output", datatype="BYTES", shape=[1])
    found.raw_output_contents.append(struct.pack("<I", len(text)) + text.encode())
    if tokens is not None:
        found.outputs.add(name="num_output_tokens", datatype="UINT32", shape=[1])
        found.raw_output_contents.append(struct.pack("<I", tokens))
    return message


def test_responses_with_typed_contents() -> None:
    message = service_pb2.ModelInferResponse()
    message.outputs.add(name="text_output", datatype="BYTES", shape=[1]).contents.bytes_contents.append(b"once")
    message.outputs.add(name="num_output_tokens", datatype="UINT32", shape=[1]).contents.uint_contents.append(2)
    message.outputs.add(name="num_input_tokens", datatype="UINT32", shape=[1]).contents.uint_contents.append(9)
    found = event(message)
    assert (found.is_output, found.text, found.new_tokens, found.input_tokens) == (True, "once", 2, 9)
    assert not event(service_pb2.ModelInferResponse()).is_output


def two_tokens(requests: Any, context: grpc.ServicerContext) -> Iterator[Any]:
    for _ in requests:
        yield response("one", 1)
        yield response(" two", 1)
        yield response("", 0)


@contextmanager
def served(infer: Responses, names: tuple[str, ...] = VLLM, tls: tuple[Path, Path] | None = None) -> Iterator[str]:
    """HOST:PORT of a server with one text model, and another model."""

    def metadata(request: Any, context: grpc.ServicerContext) -> Any:
        found = service_pb2.ModelMetadataResponse(name=request.name)
        for each in inputs(names if request.name == "text" else ("QUERY BYTES",)):
            found.inputs.add(name=each.name, datatype=each.datatype, shape=each.shape)
        return found

    def index(request: Any, context: grpc.ServicerContext) -> Any:
        found = service_pb2.RepositoryIndexResponse()
        for name in ("other", "text"):
            found.models.add(name=name, version="1", state="READY")
        return found

    handlers = {
        "ModelStreamInfer": grpc.stream_stream_rpc_method_handler(
            infer,
            service_pb2.ModelInferRequest.FromString,
            service_pb2.ModelStreamInferResponse.SerializeToString,
        ),
        "ModelMetadata": grpc.unary_unary_rpc_method_handler(
            metadata, service_pb2.ModelMetadataRequest.FromString, service_pb2.ModelMetadataResponse.SerializeToString
        ),
        "RepositoryIndex": grpc.unary_unary_rpc_method_handler(
            index, service_pb2.RepositoryIndexRequest.FromString, service_pb2.RepositoryIndexResponse.SerializeToString
        ),
    }
    with ThreadPoolExecutor(max_workers=100) as pool:
        server = grpc.server(pool)
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))
        if tls is None:
            port = server.add_insecure_port(f"{HOST}:0")
        else:
            pair = (tls[1].read_bytes(), tls[0].read_bytes())
            port = server.add_secure_port(f"{HOST}:0", grpc.ssl_server_credentials([pair]))
        server.start()
        try:
            yield f"{HOST}:{port}"
        finally:
            server.stop(None).wait()


def options_of(url: str) -> ClientOptions:
    return ClientOptions(target=find_target("triton-grpc", url, None, {"X-Team": "a"}, {"temperature": 0.0}, {}))


def test_streams_over_grpc() -> None:
    seen: list[Any] = []

    def noted(requests: Any, context: grpc.ServicerContext) -> Iterator[Any]:
        seen.append(dict(context.invocation_metadata()))
        yield from two_tokens(requests, context)

    with served(noted) as address:
        start, ran = run(options_of(address), single(0.0, 0.01))
    assert [(record.output_tokens, record.error) for record in ran.records] == [(2, ""), (2, "")]
    for record in ordered(ran.records):
        assert start <= record.due <= record.sent < record.times[0] <= record.times[1] <= record.last <= record.end
        assert len(record.times) == 2
    assert [metadata["x-team"] for metadata in seen] == ["a", "a"]


def test_streams_do_not_wait_for_each_other_in_the_client() -> None:
    """All requests arrive before any is answered, more of them than one connection has streams."""
    arrived: list[int] = []

    def together(requests: Any, context: grpc.ServicerContext) -> Iterator[Any]:
        arrived.append(1)
        while len(arrived) < 70 and context.is_active():
            context.time_remaining()
            asyncio.run(asyncio.sleep(0.005))
        yield from two_tokens(requests, context)

    with served(together) as address:
        _, ran = run(options_of(address), single(*[0.0] * 70))
    assert [record.error for record in ran.records] == [""] * 70


def _refused(requests: Any, context: grpc.ServicerContext) -> Iterator[Any]:
    context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "the queue is full")
    yield


def _error(requests: Any, context: grpc.ServicerContext) -> Iterator[Any]:
    yield response("one", 1)
    yield service_pb2.ModelStreamInferResponse(error_message="the engine died")


def _nothing(requests: Any, context: grpc.ServicerContext) -> Iterator[Any]:
    yield from ()


@pytest.mark.parametrize(
    ("infer", "error", "message"),
    [
        (_refused, "gRPC RESOURCE_EXHAUSTED", "the queue is full"),
        (_error, "error in the stream", "the engine died"),
        (_nothing, "empty stream", "the stream ended without any output"),
    ],
)
def test_failures_over_grpc(infer: Responses, error: str, message: str) -> None:
    with served(infer) as address:
        _, ran = run(options_of(address), single(*[0.0] * 50))
    assert [record.error for record in ran.records] == [error] * 50
    assert all(message in record.message for record in ran.records)


def test_tls(monkeypatch: pytest.MonkeyPatch, certificate: tuple[Path, Path]) -> None:
    with served(two_tokens, tls=certificate) as address:
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate[0]))
        _, ran = run(options_of(f"grpcs://{address}"), single(0.0))
        assert [record.error for record in ran.records] == [""]
        monkeypatch.delenv("SSL_CERT_FILE")
        with pytest.raises(EngineError, match="does not list its models: UNAVAILABLE"):
            options_of(f"grpcs://{address}")


def test_a_server_without_a_text_model() -> None:
    with served(two_tokens, ("QUERY BYTES",)) as address:
        with pytest.raises(ConfigError, match="the server has no model that takes text"):
            options_of(address)
        with pytest.raises(ConfigError, match="the model 'other' has no input 'text_input'"):
            find_target("triton-grpc", address, "other", {}, {}, {})
