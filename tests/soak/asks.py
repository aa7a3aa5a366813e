"""Proper requests over every transport, each as a generator of what comes back. Closing it is a client that leaves."""

import asyncio
import json
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

import grpc
import numpy as np
from tests.soak.http_client import Answer, Connection, connected, request
from tests.soak.server import Server
from tritonclient.grpc import service_pb2 as pb

CALLS = "/inference.GRPCInferenceService/"
TEXT, TOKENS = "demo-model", "fastertransformer"
_SAID = ("unavailable", "not ready", "is not found", "no available versions", "not at ready state", "takes no new")


class FailedError(Exception):
    """A request that got an error: `begun`, after it had got a part of its answer."""

    def __init__(self, status: str, message: str, *, begun: bool = False) -> None:
        super().__init__(f"{status}{' in mid-stream' if begun else ''}: {message}")
        self.status, self.message, self.begun = status, message, begun


@dataclass(frozen=True)
class Ask:
    """What is asked: so many tokens, always the most probable ones. `resets`: how a client leaves, if it does."""

    prompt: str
    tokens: int
    resets: bool = False

    @property
    def ids(self) -> list[int]:
        return [4 + byte for byte in self.prompt.encode()]


@dataclass(frozen=True)
class Place:
    """A server, with a channel to its gRPC port that many clients share."""

    server: Server
    channel: grpc.aio.Channel

    @classmethod
    def of(cls, server: Server) -> "Place":
        return cls(server, grpc.aio.insecure_channel(f"127.0.0.1:{server.grpc}"))


Kind = Callable[[Place, Ask], AsyncGenerator[str, None]]


def _generate_body(ask: Ask) -> dict[str, Any]:
    return {"text_input": ask.prompt, "max_tokens": ask.tokens, "min_length": ask.tokens}


def _completion_body(ask: Ask) -> dict[str, Any]:
    body = {"model": TEXT, "prompt": ask.prompt, "max_tokens": ask.tokens}
    return body | {"temperature": 0, "ignore_eos": True}


def _infer_body(ask: Ask) -> dict[str, Any]:
    values = {"input_ids": ask.ids, "input_lengths": [len(ask.ids)], "request_output_len": [ask.tokens]}
    values["min_length"] = [ask.tokens]
    return {
        "inputs": [
            {"name": name, "datatype": "UINT32", "shape": [1, len(data)], "data": data} for name, data in values.items()
        ],
        "outputs": [{"name": "output_ids"}],
    }


def check(answer: Answer) -> None:
    """FailedError unless a request was answered with what it asked for."""
    if answer.status != 200:
        raise FailedError(str(answer.status), answer.body.decode(errors="replace"))


async def _whole(place: Place, ask: Ask, path: str, body: dict[str, Any]) -> Any:
    connection = await Connection.open(place.server.http)
    try:
        await connection.send(request("POST", path, json.dumps(body).encode()))
        answer = await connection.answer()
        check(answer)
        return answer.json()
    finally:
        connection.leave(reset=ask.resets)


async def _events(place: Place, ask: Ask, path: str, body: dict[str, Any]) -> AsyncGenerator[Any, None]:
    connection = await Connection.open(place.server.http)
    begun = False
    try:
        await connection.send(request("POST", path, json.dumps(body).encode()))
        if (await connection.head()).status != 200:
            check(await connection.answer())
        async for event in connection.events():
            if event == "[DONE]":
                continue
            data = json.loads(event)
            if "error" in data:
                raise FailedError("200", str(data["error"]), begun=begun)
            begun = True
            yield data
    finally:
        connection.leave(reset=ask.resets)


async def generate(place: Place, ask: Ask) -> AsyncGenerator[str, None]:
    """POST /v2/models/NAME/generate."""
    found = await _whole(place, ask, f"/v2/models/{TEXT}/generate", _generate_body(ask))
    yield found["text_output"].removeprefix(ask.prompt)


async def generate_stream(place: Place, ask: Ask) -> AsyncGenerator[str, None]:
    """POST /v2/models/NAME/generate_stream."""
    body = _generate_body(ask) | {"stream": True}
    async with aclosing(_events(place, ask, f"/v2/models/{TEXT}/generate_stream", body)) as events:
        async for event in events:
            yield event["text_output"]


async def infer(place: Place, ask: Ask) -> AsyncGenerator[str, None]:
    """POST /v2/models/NAME/infer with the token model."""
    found = await _whole(place, ask, f"/v2/models/{TOKENS}/infer", _infer_body(ask))
    yield str(found["outputs"][0]["data"])


async def completions(place: Place, ask: Ask) -> AsyncGenerator[str, None]:
    """POST /v1/completions."""
    found = await _whole(place, ask, "/v1/completions", _completion_body(ask))
    yield found["choices"][0]["text"]


async def completions_stream(place: Place, ask: Ask) -> AsyncGenerator[str, None]:
    """POST /v1/completions as a stream."""
    body = _completion_body(ask) | {"stream": True}
    async with aclosing(_events(place, ask, "/v1/completions", body)) as events:
        async for event in events:
            yield event["choices"][0]["text"]


def tensor(message: Any, name: str, datatype: str, data: Any) -> None:
    """Add an input to a ModelInferRequest, raw; texts as bytes."""
    if datatype == "BYTES":
        raw = len(data).to_bytes(4, "little") + data
        shape = [1]
    else:
        array = np.array(data)
        raw, shape = array.tobytes(), list(array.shape)
    message.inputs.add(name=name, datatype=datatype, shape=shape)
    message.raw_input_contents.append(raw)


def token_message(ask: Ask) -> Any:
    """A ModelInferRequest for the token model."""
    message = pb.ModelInferRequest(model_name=TOKENS)
    for name, values in (
        ("input_ids", ask.ids),
        ("input_lengths", [len(ask.ids)]),
        ("request_output_len", [ask.tokens]),
        ("min_length", [ask.tokens]),
    ):
        tensor(message, name, "UINT32", np.array([values], np.uint32))
    message.outputs.add(name="output_ids")
    return message


def text_message(ask: Ask) -> Any:
    """A ModelInferRequest for the text model, which is to stream."""
    message = pb.ModelInferRequest(model_name=TEXT)
    tensor(message, "text_input", "BYTES", ask.prompt.encode())
    tensor(message, "stream", "BOOL", np.array([True]))
    for name in ("max_tokens", "min_length"):
        tensor(message, name, "INT32", np.array([ask.tokens], np.int32))
    return message


async def grpc_infer(place: Place, ask: Ask) -> AsyncGenerator[str, None]:
    """ModelInfer with the token model."""
    call = place.channel.unary_unary(
        f"{CALLS}ModelInfer", pb.ModelInferRequest.SerializeToString, pb.ModelInferResponse.FromString
    )(token_message(ask))
    try:
        found = await call
        yield str(np.frombuffer(found.raw_output_contents[0], np.uint32).tolist())
    except grpc.aio.AioRpcError as error:
        raise FailedError(error.code().name, error.details() or "") from error
    finally:
        call.cancel()


async def grpc_stream(place: Place, ask: Ask) -> AsyncGenerator[str, None]:
    """ModelStreamInfer with the text model."""
    call = place.channel.stream_stream(
        f"{CALLS}ModelStreamInfer", pb.ModelInferRequest.SerializeToString, pb.ModelStreamInferResponse.FromString
    )()
    begun = False
    try:
        await call.write(text_message(ask))
        await call.done_writing()
        while (found := await call.read()) is not grpc.aio.EOF:
            if found.error_message:
                raise FailedError("OK", found.error_message, begun=begun)
            begun = True
            for raw in found.infer_response.raw_output_contents[:1]:
                yield raw[4:].decode()
    except grpc.aio.AioRpcError as error:
        raise FailedError(error.code().name, error.details() or "", begun=begun) from error
    finally:
        call.cancel()


STREAMS: tuple[Kind, ...] = (generate_stream, completions_stream, grpc_stream)
WHOLES: tuple[Kind, ...] = (generate, infer, completions, grpc_infer)
KINDS = STREAMS + WHOLES


def name_of(kind: Kind) -> str:
    """What figures call it."""
    return kind.__name__


async def answer(kind: Kind, place: Place, ask: Ask) -> str:
    """The whole answer."""
    return "".join([piece async for piece in kind(place, ask)])


async def answers(place: Place, ask: Ask) -> dict[str, str]:
    """The answers over every transport, by its name."""
    found = await asyncio.gather(*(answer(kind, place, ask) for kind in KINDS))
    return dict(zip(map(name_of, KINDS), found, strict=True))


async def settled(server: Server) -> None:
    """A connection for as long as nothing else is to be seen of it."""
    async with connected(server.http):
        pass
