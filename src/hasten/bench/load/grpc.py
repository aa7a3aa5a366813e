"""A gRPC client of Triton's protocol: a stream per request, over connections that no limit of streams holds up."""

import os
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import numpy as np
from tritonclient.grpc import service_pb2
from tritonclient.utils import deserialize_bytes_tensor

from hasten.bench.load.address import Address
from hasten.bench.load.reply import Event, Reply, RequestError
from hasten.bench.load.triton import TensorSpec, TextModelInputs
from hasten.bench.served import channel_options
from hasten.server.protocol.tensors import NUMPY, objects, to_bytes
from hasten.server.types import Tensor

_SERVICE = "/inference.GRPCInferenceService"
_STREAMS_PER_CONNECTION = 64
"""Well below what servers allow: further streams would wait inside the client."""


class GrpcClient:
    """Connections to one server, and the form of requests to one of its models."""

    def __init__(self, address: Address, headers: Mapping[str, str]) -> None:
        self._address = address
        self._metadata = tuple((name.lower(), value) for name, value in headers.items())
        self._channels: list[_Channel] = []

    async def unary(self, method: str, request: Any, response: Any) -> Any:
        """The answer to a call that has one; RequestError says how it failed."""
        with _Failures():
            call = self._channel().channel.unary_unary(
                f"{_SERVICE}/{method}",
                request_serializer=type(request).SerializeToString,
                response_deserializer=response.FromString,
            )
            return await call(request, metadata=self._metadata)

    async def stream(self, request: Any, reply: Reply) -> None:
        """Send a request on a stream of its own and note its responses; RequestError says how it failed."""
        with _Failures():
            async with self._infer(request) as call:
                async for response in call:
                    now = time.perf_counter()
                    if response.error_message:
                        raise RequestError("error in the stream", response.error_message)
                    reply.take(now, event(response.infer_response))

    async def aclose(self) -> None:
        """Close the connections."""
        for each in self._channels:
            await each.channel.close()

    @asynccontextmanager
    async def _infer(self, request: Any) -> AsyncIterator[Any]:
        used = self._channel()
        used.streams += 1
        call = used.infer(request, metadata=self._metadata)
        try:
            yield call
        finally:
            call.cancel()  # has no effect on a stream that has ended
            used.streams -= 1

    def _channel(self) -> "_Channel":
        free = (each for each in self._channels if each.streams < _STREAMS_PER_CONNECTION)
        found = next(free, None)
        if found is None:
            found = _Channel(self._address)
            self._channels.append(found)
        return found


class _Channel:
    """One connection and the number of its open streams."""

    def __init__(self, address: Address) -> None:
        # channels with equal options would use the same connection
        options = [*channel_options(address.authority), ("grpc.use_local_subchannel_pool", 1)]
        if address.tls:
            self.channel = grpc.aio.secure_channel(address.authority, _credentials(), options=options)
        else:
            self.channel = grpc.aio.insecure_channel(address.authority, options=options)
        self.streams = 0
        # a stream of one request, which is sent with the end of the requests: were it written to an open stream, a
        # server that refuses at once would fail the writing, and its status be lost
        self.infer = self.channel.unary_stream(
            f"{_SERVICE}/ModelStreamInfer",
            request_serializer=service_pb2.ModelInferRequest.SerializeToString,
            response_deserializer=service_pb2.ModelStreamInferResponse.FromString,
        )


def _credentials() -> grpc.ChannelCredentials:
    """Trust in the authorities of SSL_CERT_FILE, as clients of HTTP have it, or in those that gRPC knows."""
    file = os.environ.get("SSL_CERT_FILE")
    return grpc.ssl_channel_credentials(Path(file).read_bytes() if file else None)


class _Failures:
    """Errors of gRPC as RequestError."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        if isinstance(error, grpc.RpcError):
            code = error.code().name
            raise RequestError(f"gRPC {code}", f"{code}: {error.details()}") from None


def infer_request(model: str, inputs: TextModelInputs, prompt: str, output_length: int) -> Any:
    """A request's message."""
    message = service_pb2.ModelInferRequest(model_name=model)
    for name, value in inputs.values(prompt, output_length).items():
        sent = _tensor(inputs.inputs[name], value if isinstance(value, list) else [value])
        message.inputs.add(name=name, datatype=sent.datatype, shape=sent.shape)
        message.raw_input_contents.append(to_bytes(sent))
    return message


def _tensor(spec: TensorSpec, values: list[Any]) -> Tensor:
    """The values along the last axis of an input."""
    dtype = NUMPY[spec.datatype]
    data = objects([str(value).encode() for value in values]) if dtype.hasobject else np.array(values, dtype)
    return Tensor(spec.name, spec.datatype, (*(1 for _ in spec.shape[:-1]), len(values)), data)


def event(response: Any) -> Event:
    """What a response says."""
    text, input_tokens, new_tokens, is_output = "", None, 0, False
    for index, output in enumerate(response.outputs):
        if output.name not in ("text_output", "num_input_tokens", "num_output_tokens"):
            continue
        raw = response.raw_output_contents[index] if response.raw_output_contents else None
        if output.name == "text_output":
            is_output = True
            texts = output.contents.bytes_contents if raw is None else deserialize_bytes_tensor(raw)
            text = b"".join(texts).decode(errors="replace")
        else:
            count = sum(_numbers(output, raw))
            input_tokens, new_tokens = (
                (count, new_tokens) if output.name == "num_input_tokens" else (input_tokens, count)
            )
    return Event(is_output, text, input_tokens, None, new_tokens)


def _numbers(output: Any, raw: bytes | None) -> list[int]:
    if raw is None:
        return [*output.contents.int_contents, *output.contents.uint_contents, *output.contents.uint64_contents]
    numbers: list[int] = np.frombuffer(raw, NUMPY[output.datatype]).tolist()
    return numbers
