"""A server with keys, one model that generates and one that makes vectors, and requests over each of its transports.

Every answer is looked through for what none may contain: paths, addresses in memory, tracebacks.
"""

import contextlib
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import grpc
import httpx
from tests.encoders import save_encoder
from tests.soak.report import leak
from tests.soak.server import DEMO, Server, serving
from tests.waiting import LIMIT_S
from tritonclient.grpc import service_pb2 as pb

from hasten.core.config import EngineConfig
from hasten.server.create import model_configs, write_repository

KEY, OTHER_KEY = "key-of-a", "key-of-b"
TEXT, TOKENS, VECTORS, VECTOR_TOKENS = "demo-model", "fastertransformer", "tiny", "tiny-ids"
REFUSED = frozenset({400, 401, 403, 404, 408, 413, 414, 415, 422, 431, 501, 503})
VOCABULARY = 1024
_TEMPLATE = "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
_CALLS = "/inference.GRPCInferenceService/"


@dataclass(frozen=True)
class Answer:
    """Status over HTTP, or what it would be of a code of gRPC, and the text."""

    status: int
    text: str

    @property
    def is_refusal(self) -> bool:
        """Whether the client was at fault and was answered."""
        return self.status in REFUSED


_STATUS = {
    grpc.StatusCode.OK: 200,
    grpc.StatusCode.INVALID_ARGUMENT: 400,
    grpc.StatusCode.ALREADY_EXISTS: 400,
    grpc.StatusCode.UNAUTHENTICATED: 401,
    grpc.StatusCode.NOT_FOUND: 404,
    grpc.StatusCode.RESOURCE_EXHAUSTED: 413,
    grpc.StatusCode.UNIMPLEMENTED: 501,
    grpc.StatusCode.UNAVAILABLE: 503,
}


def check_clean(text: str) -> None:
    """Fail where an answer says what only the server's operator should know."""
    assert not leak(text), f"{leak(text)!r} in {text[:2000]}"


@dataclass
class Site:
    """The server, asked with a key unless another is given."""

    server: Server
    folder: Path
    client: httpx.Client
    channel: grpc.Channel
    engines: list[int]
    key: str = KEY

    def using(self, key: str) -> "Site":
        """The same server, asked with another key; none for an empty one."""
        return replace(self, key=key)

    @property
    def headers(self) -> dict[str, str]:
        return {"x-api-key": self.key} if self.key else {}

    def ask(self, method: str, path: str, body: bytes = b"", headers: dict[str, str] | None = None) -> Answer:
        """Any request over HTTP."""
        found = self.client.request(method, path, content=body, headers={**self.headers, **(headers or {})})
        check_clean(found.text)
        return Answer(found.status_code, found.text)

    def post(self, path: str, body: object, headers: dict[str, str] | None = None) -> Answer:
        """POST JSON, or bytes as they are."""
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        return self.ask("POST", path, raw, headers)

    def call(self, method: str, message: Any, metadata: dict[str, str] | None = None) -> Answer:
        """A call over gRPC that answers once; a message of protobuf, or bytes."""
        raw = message if isinstance(message, bytes) else message.SerializeToString()
        sent = tuple({**self.headers, **(metadata or {})}.items())
        call = self.channel.unary_unary(_CALLS + method)
        return answered(lambda: repr(call(raw, timeout=LIMIT_S, metadata=sent)))

    def stream(self, *messages: Any) -> Answer:
        """ModelStreamInfer with these requests. An error within the stream counts as INVALID_ARGUMENT."""
        call = self.channel.stream_stream(
            f"{_CALLS}ModelStreamInfer", pb.ModelInferRequest.SerializeToString, pb.ModelStreamInferResponse.FromString
        )
        found: list[str] = []

        def read() -> str:
            for response in call(iter(messages), timeout=LIMIT_S, metadata=tuple(self.headers.items())):
                if response.error_message:
                    found.append(response.error_message)
            return " ".join(found)

        answer = answered(read)
        return replace(answer, status=400) if found else answer

    def serves(self) -> None:
        """Fail unless a proper request is answered, by the engine that was there from the start."""
        body = {"model": TEXT, "prompt": "Anna", "max_tokens": 2, "temperature": 0}
        assert self.post("/v1/completions", body).status == 200
        assert self.post("/v1/embeddings", {"model": VECTORS, "input": "the"}).status == 200
        assert self.server.engines == self.engines

    def memory(self) -> float:
        """MiB of the server's process."""
        return self.server.memory()["server"]


def answered(ask: Callable[[], str]) -> Answer:
    """What comes of a call over gRPC."""
    try:
        text, status = ask(), 200
    except grpc.RpcError as error:
        text, status = str(error.details()), _STATUS.get(error.code(), 500)
    check_clean(text)
    return Answer(status, text)


@contextlib.contextmanager
def site() -> Iterator[Site]:
    """Start it, and fail at the end where its log has a traceback or it holds anything of a request."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "keys").write_text(f"{KEY}\n{OTHER_KEY}\n")
        control = ("--model-repository", str(_repository(folder)), "--model-control-mode", "explicit")
        with (
            serving(*control, "--load-model", "*", "--api-key-file", str(folder / "keys")) as server,
            httpx.Client(base_url=f"http://127.0.0.1:{server.http}", timeout=LIMIT_S) as client,
            grpc.insecure_channel(f"127.0.0.1:{server.grpc}", [("grpc.max_send_message_length", -1)]) as channel,
        ):
            yield Site(server, folder, client, channel, server.engines)
            assert "Traceback" not in server.log, server.log


def _repository(folder: Path) -> Path:
    model = Path(shutil.copytree(DEMO, folder / TEXT))
    (model / "chat_template.jinja").write_text(_TEMPLATE)
    encoder = save_encoder(folder / "encoder", "Bert", num_hidden_layers=2)
    target = folder / "models"
    memory: dict[str, Any] = {"kv_cache_memory": 64 << 20}
    for path, token_name, text_name, options in (
        (model, TOKENS, TEXT, {**memory, "max_grammar_seconds": 1}),
        (encoder, VECTOR_TOKENS, VECTORS, {}),
    ):
        engine = EngineConfig.create(str(path), **options)
        write_repository(model_configs(engine, token_name=token_name, text_name=text_name), target, engine)
    return target


def tensor(message: Any, name: str, datatype: str, shape: list[int], raw: bytes) -> None:
    """Add an input to a ModelInferRequest."""
    message.inputs.add(name=name, datatype=datatype, shape=shape)
    message.raw_input_contents.append(raw)


def text_message(sampling: str, prompt: bytes = b"Anna") -> Any:
    """A ModelInferRequest of the text model with the JSON of its sampling parameters."""
    message = pb.ModelInferRequest(model_name=TEXT)
    for name, text in (("text_input", prompt), ("sampling_parameters", sampling.encode())):
        tensor(message, name, "BYTES", [1], len(text).to_bytes(4, "little") + text)
    return message


def _openai(site: Site, members: str) -> Answer:
    return site.post("/v1/completions", f'{{"model":"{TEXT}","prompt":"Anna",{members}}}'.encode())


def _chat(site: Site, members: str) -> Answer:
    messages = '[{"role":"user","content":"Anna"}]'
    return site.post("/v1/chat/completions", f'{{"model":"{TEXT}","messages":{messages},{members}}}'.encode())


def _responses(site: Site, members: str) -> Answer:
    return site.post("/v1/responses", f'{{"model":"{TEXT}","input":"Anna",{members}}}'.encode())


def _messages(site: Site, members: str) -> Answer:
    messages = '[{"role":"user","content":"Anna"}]'
    body = f'{{"model":"{TEXT}","max_tokens":2,"messages":{messages},{members}}}'
    return site.post("/v1/messages", body.encode())


def _generate(site: Site, members: str) -> Answer:
    body = f'{{"text_input":"Anna","sampling_parameters":{json.dumps("{" + members + "}")}}}'
    return site.post(f"/v2/models/{TEXT}/generate", body.encode())


def _generate_members(site: Site, members: str) -> Answer:
    return site.post(f"/v2/models/{TEXT}/generate", f'{{"text_input":"Anna",{members}}}'.encode())


def _grpc(site: Site, members: str) -> Answer:
    return site.stream(text_message(f"{{{members}}}"))


TRANSPORTS: dict[str, Callable[[Site, str], Answer]] = {
    "completions": _openai,
    "chat": _chat,
    "responses": _responses,
    "messages": _messages,
    "generate": _generate,
    "generate-fields": _generate_members,
    "grpc": _grpc,
}
"""Ways to say how to sample: each gets the members of a JSON object."""
TRITONS = ("generate", "generate-fields", "grpc")
"""Those of Triton's protocol."""
GENERATION_PATHS = (
    *(f"/v2/models/{TOKENS}/infer", f"/v2/models/{TEXT}/generate", f"/v2/models/{TEXT}/generate_stream"),
    *("/v1/completions", "/v1/chat/completions", "/v1/responses", "/v1/messages", "/v1/messages/count_tokens"),
)
TEXT_PATHS = (
    *("/v1/embeddings", "/pooling", "/rerank", "/v1/rerank", "/v2/rerank", "/score", "/v1/score", "/classify"),
    *("/tokenize", "/detokenize"),
)
