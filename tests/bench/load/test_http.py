import asyncio
import socket
import ssl
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from tests.bench.load.scripted_server import HOST, Script, Server, scripted, text, three_tokens, usage

from hasten.bench.load.address import Address
from hasten.bench.load.http import HttpClient
from hasten.bench.load.reply import RequestError
from hasten.bench.load.target import address_of
from hasten.core.errors import ConfigError
from hasten.core.ports import free_port


def client_of(url: str, **headers: str) -> HttpClient:
    return HttpClient(Address.parse(url, ("http", "https")), headers)


async def events(http: HttpClient, path: str = "/v1/completions") -> list[tuple[float, bytes]]:
    found: list[tuple[float, bytes]] = []
    await http.stream(http.request("POST", path, b"{}"), lambda now, data: found.append((now, data)))
    return found


def stream(url: str, count: int = 1, **headers: str) -> list[list[tuple[float, bytes]]]:
    async def run() -> list[list[tuple[float, bytes]]]:
        http = client_of(url, **headers)
        try:
            return [await events(http) for _ in range(count)]
        finally:
            await http.aclose()

    return asyncio.run(run())


def failure(answer: Callable[[Script], Awaitable[None]]) -> RequestError:
    with scripted(answer) as server, pytest.raises(RequestError) as caught:
        stream(server.url)
    return caught.value


def test_events_have_the_time_at_which_they_arrive() -> None:
    found: list[tuple[float, bytes]] = []

    async def in_turns(script: Script) -> None:
        script.head()
        for number in range(3):
            script.send({"number": number})
            while len(found) <= number:
                await asyncio.sleep(0.001)
        script.end()

    async def run(url: str) -> None:
        http = client_of(url)
        await http.stream(http.request("POST", "/", b"{}"), lambda now, data: found.append((now, data)))
        await http.aclose()

    with scripted(in_turns) as server:
        asyncio.run(run(server.url))
    (exchange,) = server.exchanges
    assert [data for _, data in found] == [b'{"number": 0}', b'{"number": 1}', b'{"number": 2}']
    moments = [moment for sent, (seen, _) in zip(exchange.sent, found, strict=True) for moment in (sent, seen)]
    assert [exchange.arrived, *moments] == sorted([exchange.arrived, *moments])


def test_a_connection_is_used_again() -> None:
    with scripted() as server:
        stream(server.url, 3)
        assert [exchange.connection for exchange in server.exchanges] == [0, 0, 0]


def test_a_kept_connection_that_the_server_ends_is_replaced() -> None:
    async def once(script: Script) -> None:
        if len(server.exchanges) == 2 and server.exchanges[1].connection == 0:
            script.writer.transport.abort()
            return
        await three_tokens(script)

    with scripted(once) as server:
        first, second = stream(server.url, 2)
    assert len(first) == len(second) == 5
    assert [exchange.connection for exchange in server.exchanges] == [0, 0, 1]


def test_a_new_connection_that_the_server_ends_is_a_failure() -> None:
    async def never(script: Script) -> None:
        script.leave()

    error = failure(never)
    assert error.kind == "connection lost"


def test_events_that_are_cut_anywhere() -> None:
    async def cut(script: Script) -> None:
        script.head()
        data = b'data: {"a": 1}\r\n\r\n: comment\n\ndata:[DONE]\n\n'
        for index in range(len(data)):
            script.chunk(data[index : index + 1])
            await asyncio.sleep(0)
        script.end()

    with scripted(cut) as server:
        assert [data for _, data in stream(server.url)[0]] == [b'{"a": 1}', b"[DONE]"]


def test_an_answer_without_a_length_ends_with_its_connection() -> None:
    async def plain(script: Script) -> None:
        script.writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n\r\ndata: x\n\n")
        script.leave()

    with scripted(plain) as server:
        assert [data for _, data in stream(server.url)[0]] == [b"x"]


async def _refused(script: Script) -> None:
    script.whole("429 Too Many Requests", {"error": {"message": "later"}}, "retry-after: 1")


async def _cut_off(script: Script) -> None:
    script.head()
    script.send(text("one"))
    script.leave()


async def _no_stream(script: Script) -> None:
    script.whole("200 OK", {"choices": []})


async def _no_http(script: Script) -> None:
    script.writer.write(b"SSH-2.0-OpenSSH_9\r\n")


@pytest.mark.parametrize(
    ("answer", "kind", "message"),
    [
        (_refused, "HTTP 429", 'HTTP 429: {"error": {"message": "later"}}'),
        (_cut_off, "connection lost", "the connection ended before the answer did"),
        (_no_stream, "no stream", "not text/event-stream"),
        (_no_http, "invalid HTTP", "the server's answer is not HTTP/1.1"),
    ],
)
def test_failures(answer: Callable[[Script], Awaitable[None]], kind: str, message: str) -> None:
    error = failure(answer)
    assert error.kind == kind
    assert message in str(error)


def test_an_error_of_the_reader_ends_the_request() -> None:
    async def run(server: Server) -> None:
        http = client_of(server.url)

        def refuse(now: float, data: bytes) -> None:
            raise RequestError("invalid event", "no")

        with pytest.raises(RequestError, match="no"):
            await http.stream(http.request("POST", "/v1/completions", b"{}"), refuse)
        assert len(await events(http)) == 5
        await http.aclose()

    with scripted() as server:
        asyncio.run(run(server))
        assert [exchange.connection for exchange in server.exchanges] == [0, 1]


def test_nobody_listens() -> None:
    with pytest.raises(RequestError, match="nothing listens there") as caught:
        stream(f"http://{HOST}:{free_port(HOST)}")
    assert caught.value.kind == "connection refused"


def test_headers_and_length() -> None:
    with scripted() as server:
        stream(server.url, Authorization="Bearer key")
        (exchange,) = server.exchanges
    assert exchange.headers["authorization"] == "Bearer key"
    assert exchange.headers["host"] == server.url.removeprefix("http://")
    assert exchange.headers["content-length"] == "2"


def test_a_body_with_usage() -> None:
    async def whole(script: Script) -> None:
        script.whole("200 OK", usage(1, 2))

    async def run(url: str) -> bytes:
        http = client_of(url)
        body = await http.fetch(http.request("GET", "/anything"))
        await http.aclose()
        return body

    with scripted(whole) as server:
        assert b'"completion_tokens": 2' in asyncio.run(run(server.url))


@pytest.mark.parametrize(
    ("api", "url", "expected"),
    [
        ("openai", "http://host:8000", "http://host:8000"),
        ("openai", "host", "http://host:80"),
        ("openai", "https://host/gate/v1/", "https://host:443/gate"),
        ("openai-chat", "http://host:1/v1/chat/completions", "http://host:1"),
        ("triton-generate", "http://[::1]:8000", "http://[::1]:8000"),
        ("triton-grpc", "host:8001", "grpc://host:8001"),
        ("triton-grpc", "grpcs://host", "grpcs://host:443"),
    ],
)
def test_urls(api: str, url: str, expected: str) -> None:
    assert str(address_of(api, url)) == expected


@pytest.mark.parametrize(
    ("api", "url", "message"),
    [
        ("openai", "ftp://host", "does not begin with http:// or https://"),
        ("openai", "grpc://host", "does not begin with http:// or https://"),
        ("triton-grpc", "http://host:8001", "does not begin with grpc:// or grpcs://"),
        ("triton-grpc", "host:8001/v2", "has a path, which gRPC does not"),
        ("openai", "http://", "has no host"),
        ("openai", "http://host:port", "cannot be read"),
        ("openai", "http://host:99999", "cannot be read"),
        ("openai", "http://me:secret@host", "has a user, a query or a fragment"),
    ],
)
def test_bad_urls(api: str, url: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        address_of(api, url)


def test_an_unanswered_connection_is_ended_with_its_task() -> None:
    async def run(url: str) -> Any:
        async with asyncio.timeout(0.05):
            await events(client_of(url))

    with socket.create_server((HOST, 0)) as silent, pytest.raises(TimeoutError):
        asyncio.run(run(f"http://{HOST}:{silent.getsockname()[1]}"))


def test_tls(monkeypatch: pytest.MonkeyPatch, certificate: tuple[Path, Path]) -> None:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(*certificate)
    with scripted(tls=context) as server:
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate[0]))
        assert len(stream(server.url)[0]) == 5
        monkeypatch.delenv("SSL_CERT_FILE")
        with pytest.raises(RequestError, match="certificate") as caught:
            stream(server.url)
    assert caught.value.kind == "TLS error"
