"""Requests whose size would decide the server's time or memory, sent to a real server while others ask it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import shutil
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from typing import Any

import grpc
import numpy as np
import pytest
from tests.soak.http_client import NoAnswerError, connected, get, request
from tests.soak.server import DEMO, Server, serving
from tests.waiting import LIMIT_S, attempts
from tritonclient.grpc import service_pb2 as pb

pytestmark = pytest.mark.any_python

MIB = 1 << 20
SLOWEST_S = 2.0
"""CPU time of the server's process, all its threads, while an answer of `live` is waited for: what others take of the
machine is not in it. Unbounded, each of these attacks took 5 to 120 s.
"""
GROWTH_MIB = 600
"""For a body of at most 64 MiB, its parts and copies. Unbounded they took gigabytes."""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("attacked") / DEMO.name
    shutil.copytree(DEMO, folder)
    (folder / "chat_template.jinja").write_text("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}")
    with serving(str(folder), "--kv-cache-memory", "64MiB", "--max-queue-bytes", "1MiB") as result:
        yield result


@contextlib.asynccontextmanager
async def watched(server: Server) -> AsyncIterator[None]:
    """Meanwhile the server says that it lives, again and again, and each time before it has done much else."""
    slowest, requested = 0.0, 0

    async def ask() -> None:
        nonlocal slowest, requested
        while True:
            began = server.cpu_seconds()
            assert (await get(server.http, "/v2/health/live")).status == 200
            slowest, requested = max(slowest, server.cpu_seconds() - began), requested + 1
            await asyncio.sleep(0.01)

    task = asyncio.create_task(ask())

    async def more(count: int) -> None:
        until = requested + count
        while requested < until:
            if task.done():
                task.result()
            await asyncio.sleep(0.01)

    before = server.memory()["server"]
    try:
        await more(1)
        yield
        await more(2)  # an answer that was waited for at the end, and one after it
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
    assert slowest < SLOWEST_S
    assert server.memory()["server"] - before < GROWTH_MIB


async def post(server: Server, path: str, body: bytes) -> tuple[int, str]:
    async with connected(server.http) as connection:
        await connection.send(request("POST", path, body))
        answer = await connection.answer()
    return answer.status, answer.body.decode()


def run(work: Coroutine[Any, Any, None]) -> None:
    async def whole() -> None:
        await work
        await asyncio.sleep(0.1)  # connections close a moment after they are left

    asyncio.run(whole())


def completion(**fields: Any) -> bytes:
    return json.dumps({"model": "demo-model", "prompt": "Anna", "max_tokens": 2} | fields).encode()


def chat(messages: list[dict[str, str]]) -> bytes:
    return json.dumps({"model": "demo-model", "messages": messages, "max_tokens": 2}).encode()


def load(text: bytes) -> bytes:
    return b'{"parameters":{"file:1/model.bin":"' + text + b'"}}'


INFER = "/inference.GRPCInferenceService/ModelInfer"
CHAT, LOAD = "/v1/chat/completions", "/v2/repository/models/fastertransformer/load"
GENERATE = "/v2/models/demo-model/generate"
ATTACKS = {
    "text": ("/v1/completions", completion(prompt="a " * MIB), "the prompt has at least 209716 tokens"),
    "texts": ("/v1/completions", completion(prompt=["a " * 2500] * 1500), "the prompt has 2501 tokens"),
    "longer text": ("/v1/completions", completion(prompt="a " * (30 * MIB)), "the limit is 8388608"),
    "generate": (GENERATE, json.dumps({"text_input": "a " * MIB}).encode(), "the prompt has at least 209716 tokens"),
    "bad words": ("/v1/completions", completion(bad_words=["a" * MIB]), "the limit is 16384"),
    "many bad words": ("/v1/completions", completion(bad_words=["a"] * 10**5), "the limit is 1024"),
    "many stop tokens": ("/v1/completions", completion(stop_token_ids=[5] * 10**5), "the limit is 1024"),
    "many biases": ("/v1/completions", completion(logit_bias={str(n): 1 for n in range(10**5)}), "the limit is 4096"),
    "lists": ("/v1/completions", b'{"model":"demo-model","prompt":[' + b"[]," * MIB + b"[5]]}", "too many values"),
    "chat": (CHAT, chat([{"role": "user", "content": "a " * MIB}]), "the messages have 2097152 characters"),
    "messages": (CHAT, chat([{"role": "user", "content": ""}] * 30_000), "messages is limited to 4096, got 30000"),
    "many messages": (CHAT, chat([{"role": "user", "content": "a "}] * 4000), "become a prompt of more than"),
    "completions": ("/v1/completions", completion(prompt=["a"] * 2000, n=100), "more than 16384, the limit"),
    "more files": (LOAD, load(b"a" * (20 * MIB)), "the limit is 16777216"),
    "files that are none": (LOAD, load(b"=" * (9 * MIB)), "is not base64 text"),
    "tokens": ("/v1/completions", b'{"model":"demo-model","prompt":[' + b"5," * 4 * MIB + b"5]}", "JSON"),
    "objects": (GENERATE, b'{"text_input":[' + b"{}," * 2 * MIB + b"{}]}", "too many values"),
}


@pytest.mark.parametrize("name", ATTACKS)
def test_nobody_is_held_up(server: Server, name: str) -> None:
    path, body, message = ATTACKS[name]

    async def attack() -> None:
        async with watched(server):
            answers = await asyncio.gather(*(post(server, path, body) for _ in range(2)))
        for status, text in answers:
            assert status == 400, text[:500]
            assert message in text

    run(attack())


def infer(shape: list[int], datatype: str = "UINT32", raw: bytes | None = None, **contents: Any) -> bytes:
    message: Any = pb.ModelInferRequest(model_name="fastertransformer", raw_input_contents=[] if raw is None else [raw])
    tensor = message.inputs.add(name="input_ids", datatype=datatype, shape=shape)
    for field, values in contents.items():
        getattr(tensor.contents, field).extend(values)
    return bytes(message.SerializeToString())


def test_files_of_a_model_are_decoded_beside_the_loop(server: Server) -> None:
    async def attack() -> None:
        async with watched(server):
            status, text = await post(server, LOAD, load(b"a" * (15 * MIB)))
        assert status == 503
        assert "explicit model load / unload is not allowed" in text

    run(attack())


def test_requests_that_wait_are_bounded_by_their_bytes(server: Server) -> None:
    """A thousand prompts of 2,000 tokens, of which as many are computed as the engine has places for."""
    message: Any = pb.ModelInferRequest(model_name="fastertransformer")
    prompts, lengths = np.full((1024, 2000), 1000, np.uint32), np.full((1024, 1), 2000, np.uint32)
    for name, data in {"input_ids": prompts, "input_lengths": lengths, "request_output_len": lengths // 2000}.items():
        message.inputs.add(name=name, datatype="UINT32", shape=data.shape)
        message.raw_input_contents.append(data.tobytes())

    async def attack() -> None:
        options = [("grpc.max_send_message_length", -1)]
        async with (
            grpc.aio.insecure_channel(f"127.0.0.1:{server.grpc}", options=options) as channel,
            watched(server),
        ):
            with pytest.raises(grpc.aio.AioRpcError, match="bytes wait already, and max_queue_bytes is") as error:
                await channel.unary_unary(INFER)(message.SerializeToString(), timeout=LIMIT_S)
            assert error.value.code() is grpc.StatusCode.UNAVAILABLE
        assert (await post(server, "/v1/completions", completion()))[0] == 200

    run(attack())


GRPC_ATTACKS: dict[str, tuple[Callable[[], bytes], str]] = {
    "typed": (lambda: infer([1, 10**7], uint_contents=[5] * 10**7), "has more than 2097152 bytes"),
    "typed, fewer": (lambda: infer([1, 10**6], uint_contents=[5] * 10**6), "expected number of inputs"),
    "raw": (lambda: infer([1, 8 * 10**6], raw=bytes(32 * 10**6)), "expected number of inputs"),
    "texts": (lambda: infer([8 * 10**6], "BYTES", bytes(32 * 10**6)), "more than 262144 elements of BYTES"),
    "inputs": (lambda: b"\x2a\x00" * 10**7, "more than 4096 fields"),
    "outputs": (lambda: b"\x32\x00" * 10**7, "more than 4096 fields"),
    "sizes": (lambda: infer([1] * 10**7), "has more than 2097152 bytes"),
}


@pytest.mark.parametrize("name", GRPC_ATTACKS)
def test_nobody_is_held_up_over_grpc(server: Server, name: str) -> None:
    make, message = GRPC_ATTACKS[name]
    raw = make()

    async def attack() -> None:
        options = [("grpc.max_send_message_length", -1)]
        async with (
            grpc.aio.insecure_channel(f"127.0.0.1:{server.grpc}", options=options) as channel,
            watched(server),
        ):
            call = channel.unary_unary(INFER)
            for _ in range(2):
                with pytest.raises(grpc.aio.AioRpcError, match=message) as error:
                    await call(raw, timeout=LIMIT_S)
                assert error.value.code() is grpc.StatusCode.INVALID_ARGUMENT

    run(attack())


def test_a_grammar_holds_up_neither_the_server_nor_other_requests(server: Server) -> None:
    async def attack() -> None:
        async with watched(server):
            for _ in attempts("a completion that a grammar does not hold up"):
                dear = asyncio.create_task(post(server, "/v1/completions", completion(guided_regex=".?" * 30_000)))
                for _ in range(3):
                    assert (await post(server, "/v1/completions", completion()))[0] == 200
                beside = not dear.done()
                status, text = await dear
                assert status == 400
                assert "regex is too expensive" in text
                assert await server.ready()
                if beside:
                    break

    run(attack())


def test_a_text_that_may_fit_is_tokenized_beside_the_loop(server: Server) -> None:
    """It shows only once they are counted that its tokens are too many."""

    async def attack() -> None:
        async with watched(server):
            answers = [await post(server, "/v1/completions", completion(prompt="a " * 5000)) for _ in range(3)]
        for status, text in answers:
            assert status == 400
            assert "the prompt has 5001 tokens" in text

    run(attack())


def test_many_headers_take_no_memory(server: Server) -> None:
    async def attack() -> None:
        async with watched(server):
            for _ in range(4):
                async with connected(server.http) as connection:
                    await connection.send(b"GET /v2 HTTP/1.1\r\n" + b"a: b\r\n" * 2 * MIB)
                    with contextlib.suppress(NoAnswerError):  # it may be lost where the client still sends
                        assert (await connection.head()).status == 431

    before = server.memory()["server"]
    run(attack())
    assert server.memory()["server"] - before < 64
