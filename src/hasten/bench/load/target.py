"""The server that is measured: its address, its API, and the model that requests go to."""

import asyncio
import json
from collections.abc import Coroutine, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol, TypeVar
from urllib.parse import quote

from hasten.bench.load.address import Address
from hasten.bench.load.codec import Chats, Codec, Completions, Exchanged, Generate, RequestOptions, full_prompt
from hasten.bench.load.http import HttpClient
from hasten.bench.load.reply import Reply, RequestError
from hasten.bench.load.triton import TEXT_INPUT, TensorSpec, TextModelInputs
from hasten.core.errors import ConfigError, EngineError

if TYPE_CHECKING:
    from hasten.bench.load.grpc import GrpcClient

_OPENAI_PATHS = ("/v1/chat/completions", "/v1/completions", "/v1")
_DISCOVERY_S = 30.0

Result = TypeVar("Result")


class Client(Protocol):
    """A client of one server, in one event loop."""

    def prepare(self, prompt: str | list[int], output_length: int, before: Exchanged) -> Any:
        """A request, ready to be sent."""

    async def send(self, request: Any, reply: Reply) -> None:
        """Send a prepared request and note its events; RequestError says how it failed."""

    async def aclose(self) -> None:
        """Close the connections."""


@dataclass(frozen=True, kw_only=True)
class Target:
    """A server and the form of the requests to it."""

    api: str
    address: Address
    options: RequestOptions
    headers: Mapping[str, str]
    inputs: TextModelInputs | None = None
    """Of Triton's text model."""

    def client(self) -> Client:
        """A client of this server; call it in the event loop."""
        if self.api == "triton-grpc":
            return _Grpc(self)
        return _Http(self)

    def codec(self) -> Codec:
        """The form of an API over HTTP."""
        if self.api == "triton-generate":
            assert self.inputs is not None
            return Generate(self.options, self.inputs)
        return (Chats if self.api == "openai-chat" else Completions)(self.options)


class _Http:
    """A client of an API over HTTP."""

    def __init__(self, target: Target) -> None:
        self._http = HttpClient(target.address, target.headers)
        self._codec = target.codec()
        self._path = target.address.path + quote(self._codec.path)

    def prepare(self, prompt: str | list[int], output_length: int, before: Exchanged) -> bytes:
        """See Client."""
        return self._http.request("POST", self._path, self._codec.body(prompt, output_length, before))

    async def send(self, request: bytes, reply: Reply) -> None:
        """See Client."""
        event = self._codec.event
        await self._http.stream(request, lambda now, data: reply.take(now, event(data)))

    async def aclose(self) -> None:
        """See Client."""
        await self._http.aclose()


class _Grpc:
    """A client of Triton's protocol over gRPC."""

    def __init__(self, target: Target) -> None:
        from hasten.bench.load import grpc

        assert target.inputs is not None
        self._grpc = grpc.GrpcClient(target.address, target.headers)
        self._message = grpc.infer_request
        self._model, self._inputs = target.options.model, target.inputs

    def prepare(self, prompt: str | list[int], output_length: int, before: Exchanged) -> Any:
        """See Client."""
        return self._message(self._model, self._inputs, str(full_prompt(prompt, before)), output_length)

    async def send(self, request: Any, reply: Reply) -> None:
        """See Client."""
        await self._grpc.stream(request, reply)

    async def aclose(self) -> None:
        """See Client."""
        await self._grpc.aclose()


def address_of(api: str, url: str) -> Address:
    """The address in a URL, with the API's own paths taken off; ConfigError says what is wrong with it."""
    address = Address.parse(url, ("grpc", "grpcs") if api == "triton-grpc" else ("http", "https"))
    if api == "triton-grpc" and address.path:
        raise ConfigError(f"the URL {url!r} has a path, which gRPC does not: give grpc://HOST:PORT")
    ending = next((path for path in _OPENAI_PATHS if address.path.endswith(path)), "") if "openai" in api else ""
    return replace(address, path=address.path.removesuffix(ending))


def find_target(
    api: str,
    url: str,
    model: str | None,
    headers: Mapping[str, str],
    sampling: Mapping[str, Any],
    extra: Mapping[str, Any],
) -> Target:
    """The target at a URL; what is not given is read from the server: its model, and the inputs of Triton's models.

    ConfigError for what does not fit the server, EngineError where the server does not answer.
    """
    address = address_of(api, url)
    headers = {"User-Agent": "hasten-bench", **headers}
    if api == "triton-grpc":
        model, inputs = _run(_over_grpc(address, headers, model), address)
    elif api == "triton-generate":
        model, inputs = _run(_over_http(address, headers, model), address)
    else:
        model, inputs = model or _run(_first_model(address, headers), address), None
    return Target(
        api=api,
        address=address,
        options=RequestOptions(model=model, sampling=sampling, extra=extra),
        headers=headers,
        inputs=None if inputs is None else TextModelInputs.of(model, inputs, sampling),
    )


def _run(work: Coroutine[Any, Any, Result], address: Address) -> Result:
    async def limited() -> Result:
        async with asyncio.timeout(_DISCOVERY_S):
            return await work

    try:
        return asyncio.run(limited())
    except TimeoutError:
        raise EngineError(f"the server at {address} did not answer within {_DISCOVERY_S:.0f} s") from None
    except RequestError as error:
        raise EngineError(f"the server at {address} does not list its models: {error}") from None
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise EngineError(
            f"the server at {address} does not answer as its API says ({error!r:.80}); is --api right?"
        ) from None


async def _fetched(http: HttpClient, method: str, path: str) -> Any:
    return json.loads(await http.fetch(http.request(method, path)))


async def _first_model(address: Address, headers: Mapping[str, str]) -> str:
    async with aclosing(HttpClient(address, headers)) as http:
        models = await _fetched(http, "GET", f"{address.path}/v1/models")
        return str(models["data"][0]["id"])


async def _over_http(address: Address, headers: Mapping[str, str], model: str | None) -> tuple[str, list[TensorSpec]]:
    async with aclosing(HttpClient(address, headers)) as http:

        async def inputs(name: str) -> list[TensorSpec]:
            metadata = await _fetched(http, "GET", f"{address.path}/v2/models/{quote(name)}")
            return [TensorSpec(each["name"], each["datatype"], tuple(each["shape"])) for each in metadata["inputs"]]

        if model is not None:
            return model, await inputs(model)
        index = await _fetched(http, "POST", f"{address.path}/v2/repository/index")
        names = {each["name"] for each in index if each.get("state", "READY") == "READY"}
        return _text_model({name: await inputs(name) for name in sorted(names)})


async def _over_grpc(address: Address, headers: Mapping[str, str], model: str | None) -> tuple[str, list[TensorSpec]]:
    from hasten.bench.load.grpc import GrpcClient

    async with aclosing(GrpcClient(address, headers)) as client:
        return await _described(client, model)


async def _described(client: "GrpcClient", model: str | None) -> tuple[str, list[TensorSpec]]:
    from tritonclient.grpc import service_pb2

    async def inputs(name: str) -> list[TensorSpec]:
        metadata = await client.unary(
            "ModelMetadata", service_pb2.ModelMetadataRequest(name=name), service_pb2.ModelMetadataResponse
        )
        return [TensorSpec(each.name, each.datatype, tuple(each.shape)) for each in metadata.inputs]

    if model is not None:
        return model, await inputs(model)
    index = await client.unary(
        "RepositoryIndex", service_pb2.RepositoryIndexRequest(), service_pb2.RepositoryIndexResponse
    )
    names = {each.name for each in index.models if each.state == "READY"}
    return _text_model({name: await inputs(name) for name in sorted(names)})


def _text_model(models: Mapping[str, Sequence[TensorSpec]]) -> tuple[str, list[TensorSpec]]:
    """The only model that takes text."""
    found = [name for name, inputs in models.items() if any(each.name == TEXT_INPUT for each in inputs)]
    if len(found) != 1:
        what = f"several models that take text ({', '.join(found)})" if found else "no model that takes text"
        raise ConfigError(f"the server has {what}; choose it with --served-model-name")
    return found[0], list(models[found[0]])
