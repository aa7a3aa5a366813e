"""What a client may take of the HTTP port: headers and URLs by bytes, connections by number and by time."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import socket
import ssl
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.server.test_security import pki, tls
from tests.server.transport_fixtures import Transports, serving
from tests.waiting import LIMIT_S, attempts, eventually

from hasten.server.options import EndpointOptions, SecurityOptions

__all__ = ["pki"]  # a fixture

LIVE = b"GET /v2/health/live HTTP/1.1\r\nhost: x\r\n\r\n"
TOO_MANY = 16 << 20
"""Bytes; a client that may send so many is not stopped."""


@pytest.fixture(scope="module")
def site() -> Iterator[Transports]:
    with serving(Transports(security=SecurityOptions(max_header_bytes=16384, max_url_bytes=1024))) as result:
        yield result


@pytest.fixture(scope="module")
def hasty() -> Iterator[Transports]:
    """Time-outs that pass soon; what must not time out is tested with a clock that stands still."""
    ends = EndpointOptions(http_idle_timeout_secs=300, http_header_timeout_secs=0.5, http_body_timeout_secs=0.5)
    with serving(Transports(ends=ends)) as result:
        yield result


@contextlib.contextmanager
def connected(site: Transports) -> Iterator[socket.socket]:
    with socket.create_connection(("127.0.0.1", site.http_listener.port), timeout=LIMIT_S) as result:
        yield result


def send_all(connection: socket.socket, pieces: Iterator[bytes]) -> int:
    """Send until the server refuses it or takes no more; how much it took.

    No more is under way at once than the server reads behind what it refuses.
    """
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 16384)
    sent = 0
    with contextlib.suppress(ConnectionError):
        for piece in pieces:
            connection.sendall(piece)
            sent += len(piece)
            if sent > TOO_MANY:
                break
            connection.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                if b" 200 OK" not in connection.recv(20, socket.MSG_PEEK):
                    break
            connection.settimeout(LIMIT_S)
    connection.settimeout(LIMIT_S)
    return sent


def received(connection: socket.socket) -> bytes:
    """All that comes until the server ends the connection."""
    parts = []
    with contextlib.suppress(ConnectionError):
        while part := connection.recv(65536):
            parts.append(part)
    return b"".join(parts)


def statuses(answer: bytes) -> list[int]:
    return [int(part[:3]) for part in answer.split(b"HTTP/1.1 ")[1:]]


def repeated(piece: bytes, before: bytes = b"") -> Iterator[bytes]:
    yield before
    while True:
        yield piece


def stream(count: int) -> bytes:
    """A request whose answer is a stream of so many events."""
    body = json.dumps({"IN": count}).encode()
    head = b"POST /v2/models/decoupled/generate_stream HTTP/1.1\r\ncontent-length: %d\r\n\r\n"
    return head % len(body) + body


HEAD = b"GET /v2/health/live HTTP/1.1\r\n"
FLOODS = {
    "many headers": (HEAD, b"a: b\r\n" * 100, 431),
    "one header": (HEAD + b"a: ", b"b" * 1000, 431),
    "one name": (HEAD, b"b" * 1000, 431),
    "url": (b"GET /", b"u" * 1000, 414),
    "openai's url": (b"GET /v1/", b"u" * 1000, 414),
    "trailers": (HEAD + b"transfer-encoding: chunked\r\n\r\n0\r\n", b"a: b\r\n" * 100, 431),
    "one trailer": (HEAD + b"transfer-encoding: chunked\r\n\r\n0\r\na: ", b"b" * 1000, 431),
    "empty lines": (b"", b"\r\n" * 500, 431),
}


@pytest.mark.parametrize(
    "request_", [b"POST /v2/health/live HTTP/1.1\r\n", b"POST /v2/models/decoupled/generate HTTP/1.1\r\n"]
)
def test_a_body_that_cannot_be_parsed_has_one_answer(
    site: Transports, request_: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    """Whoever was to answer the request before its body turned out to be wrong writes nothing any more."""
    with connected(site) as connection:
        connection.sendall(request_ + b"host: x\r\ntransfer-encoding: chunked\r\n\r\nZZZ\r\n" + LIVE)
        assert statuses(received(connection)) == [400]
    with connected(site) as connection:  # the server's loop has come by since
        connection.sendall(LIVE)
        assert connection.recv(65536).startswith(b"HTTP/1.1 200")
    assert not [record for record in caplog.records if record.exc_info]


H2C = b"connection: Upgrade, HTTP2-Settings\r\nupgrade: h2c\r\nhttp2-settings: AAEAAEAA\r\n"
"""What Java's HttpClient and `curl --http2` say with the first request of a connection."""


@pytest.mark.parametrize("chunked", [False, True])
def test_an_offer_of_another_protocol_is_no_reason_to_lose_a_body(site: Transports, chunked: bool) -> None:
    body = json.dumps({"IN": 3}).encode()
    head = b"POST /v2/models/decoupled/generate_stream HTTP/1.1\r\nhost: x\r\n" + H2C
    plain = b"content-length: %d\r\n\r\n%b" % (len(body), body)
    request = head + (
        b"transfer-encoding: chunked\r\n\r\n%x\r\n%b\r\n0\r\n\r\n" % (len(body), body) if chunked else plain
    )
    with connected(site) as connection:
        for byte in request:  # wherever the pieces end
            connection.sendall(bytes([byte]))
        connection.sendall(request + b"GET /v2/health/live HTTP/1.1\r\nconnection: close\r\n\r\n")
        answer = received(connection)
    assert statuses(answer) == [200, 200, 200]
    assert answer.count(b"data: ") == 6


def test_connect_is_refused(site: Transports) -> None:
    with connected(site) as connection:
        connection.sendall(b"CONNECT /v2/health/live HTTP/1.1\r\nhost: x\r\n\r\n")
        assert statuses(received(connection)) == [400]


def test_a_stream_to_a_client_of_http_1_0_has_no_chunks(site: Transports) -> None:
    with connected(site) as connection:
        connection.sendall(stream(2).replace(b"HTTP/1.1", b"HTTP/1.0"))
        head, _, body = received(connection).partition(b"\r\n\r\n")
    assert b"transfer-encoding" not in head
    assert all(line == b"" or line.startswith(b"data: ") for line in body.split(b"\n"))
    assert body.count(b"data: ") == 2


@pytest.mark.parametrize("name", FLOODS)
def test_a_head_without_end_is_refused_while_it_arrives(site: Transports, name: str) -> None:
    before, piece, status = FLOODS[name]
    with connected(site) as connection:
        sent = send_all(connection, repeated(piece, before))
        assert sent < TOO_MANY
        answer = received(connection)
    if "trailer" in name:  # the request is answered before they have come
        assert statuses(answer) in ([], [200], [431], [200, 431])
        return
    assert statuses(answer) == [status]
    assert b"connection: close" in answer
    error = json.loads(answer.partition(b"\r\n\r\n")[2])["error"]
    message = error["message"] if isinstance(error, dict) else error
    assert isinstance(error, dict) == (name == "openai's url")
    assert "which is the limit; see --max-" in message


def test_no_key_is_needed_to_be_refused_and_none_is_checked_before(site: Transports) -> None:
    with connected(site) as connection:
        connection.sendall(HEAD + b"authorization: " + b"x" * 20000 + b"\r\n\r\n")
        assert statuses(received(connection)) == [431]


def test_heads_at_the_limits_are_served_again_and_again(site: Transports) -> None:
    url = b"/v2/health/live?" + b"u" * 1000
    head = b"GET " + url + b" HTTP/1.1\r\n" + b"".join(b"a%d: %s\r\n" % (index, b"v" * 100) for index in range(100))
    with connected(site) as connection:
        connection.sendall((head + b"\r\n") * 20 + LIVE.replace(b"\r\n\r\n", b"\r\nconnection: close\r\n\r\n"))
        assert statuses(received(connection)) == [200] * 21


def test_a_large_head_behind_others_does_not_come_between_their_answers(site: Transports) -> None:
    with connected(site) as connection:
        connection.sendall(stream(300) + HEAD + b"a: " + b"x" * 20000 + b"\r\n\r\n")
        answer = received(connection)
    assert statuses(answer) in ([200], [200, 431])
    assert answer.count(b"data: ") == 300
    assert answer.partition(b"HTTP/1.1 431")[0].endswith(b"0\r\n\r\n")


def test_what_cannot_be_parsed_behind_a_request_does_not_come_between_its_answer(site: Transports) -> None:
    with connected(site) as connection:
        connection.sendall(stream(20) + b"\x00 no request\r\n\r\n")
        answer = received(connection)
    assert statuses(answer) == [200]
    assert answer.count(b"data: ") == 20
    assert answer.endswith(b"0\r\n\r\n")


def test_a_head_that_comes_too_slowly_is_refused(hasty: Transports) -> None:
    with connected(hasty) as connection:
        connection.sendall(HEAD)
        assert statuses(received(connection)) == [408]
    for _ in attempts("a request in time, and then half of one"):
        with connected(hasty) as connection:
            connection.sendall(LIVE + HEAD)
            if (answers := statuses(received(connection))) != [408]:
                break
    assert answers == [200, 408]


def test_a_body_that_stops_is_refused(hasty: Transports) -> None:
    with connected(hasty) as connection:
        connection.sendall(b"POST /v2/models/add/generate HTTP/1.1\r\ncontent-length: 30\r\n\r\n" + b'{"INPUT0": 1')
        assert statuses(received(connection)) == [408]


def test_who_reads_nothing_is_closed() -> None:
    ends = EndpointOptions(http_write_timeout_secs=0.5)
    with serving(Transports(ends=ends)) as site, connected(site) as lazy:
        lazy.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        lazy.sendall(stream(200_000))
        eventually(lambda: site.service.withdrawn == 1)


def test_more_connections_than_there_may_be_are_refused(caplog: pytest.LogCaptureFixture) -> None:
    ends = EndpointOptions(http_max_connections=3)
    with serving(Transports(ends=ends)) as site, contextlib.ExitStack() as held:
        with caplog.at_level(logging.WARNING, "hasten.server.connections"):
            first = [held.enter_context(connected(site)) for _ in range(3)]
            for connection in first:
                connection.sendall(LIVE)
                assert connection.recv(65536).startswith(b"HTTP/1.1 200")
            for _ in range(5):
                with connected(site) as other:
                    answer = received(other)
                    assert statuses(answer) == [503]
                    assert b"retry-after" in answer
        assert [record.levelname for record in caplog.records] == ["WARNING"]  # once a minute
        first[0].close()
        eventually(lambda: is_served(site))


@pytest.fixture(params=[False, True], ids=["asyncio", "uvloop"])
def loop_factory(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of the loops that a server may run on, whose handshakes differ."""
    if request.param:
        monkeypatch.setattr(asyncio, "new_event_loop", pytest.importorskip("uvloop").new_event_loop)


@contextlib.contextmanager
def encrypted(site: Transports, pki: Path) -> Iterator[socket.socket]:
    context = ssl.create_default_context(cafile=str(pki / "ca.pem"))
    with connected(site) as plain, context.wrap_socket(plain, server_hostname="localhost") as result:
        yield result


@pytest.mark.usefixtures("loop_factory")
def test_handshakes_count_as_connections(pki: Path, caplog: pytest.LogCaptureFixture) -> None:
    ends = EndpointOptions(http_max_connections=2)
    with serving(Transports(tls=tls(pki, mutual=False), ends=ends)) as site, contextlib.ExitStack() as held:
        with caplog.at_level(logging.WARNING):
            silent = [held.enter_context(connected(site)) for _ in range(2)]
            with encrypted(site, pki) as told:
                assert statuses(received(told)) == [503]
            silent += [held.enter_context(connected(site)) for _ in range(100)]
            assert received(silent[-1]) == b""
        assert [record.name for record in caplog.records] == ["hasten.server.connections"]  # once a minute
        silent[0].sendall(b"this is no handshake")
        silent[0].shutdown(socket.SHUT_WR)
        received(silent[0])
        for each in silent[1:]:
            each.close()
        eventually(lambda: is_served_encrypted(site, pki))


def is_served_encrypted(site: Transports, pki: Path) -> bool:
    """Whether there is room for one encrypted connection more."""
    with contextlib.suppress(ConnectionError), encrypted(site, pki) as connection:
        connection.sendall(LIVE)
        return connection.recv(65536).startswith(b"HTTP/1.1 200")
    return False


@pytest.mark.usefixtures("loop_factory")
def test_a_handshake_that_does_not_end_is_ended(pki: Path) -> None:
    ends = EndpointOptions(http_header_timeout_secs=0.5)
    with serving(Transports(tls=tls(pki, mutual=False), ends=ends)) as site:
        for beginning in (b"", b"\x16\x03\x01"):
            with connected(site) as slow:
                slow.sendall(beginning)
                assert received(slow) == b""
        eventually(lambda: is_served_encrypted(site, pki))


@pytest.mark.usefixtures("loop_factory")
def test_a_server_that_stops_waits_for_no_handshake(pki: Path) -> None:
    with contextlib.ExitStack() as opened:
        with serving(Transports(tls=tls(pki, mutual=False))) as site:
            silent = opened.enter_context(connected(site))
            assert is_served_encrypted(site, pki)
        assert received(silent) == b""


def is_served(site: Transports) -> bool:
    """Whether there is room for one connection more."""
    with connected(site) as connection, contextlib.suppress(ConnectionError):
        connection.sendall(LIVE)
        return connection.recv(65536).startswith(b"HTTP/1.1 200")
    return False


def test_who_asks_nothing_is_closed() -> None:
    ends = EndpointOptions(http_idle_timeout_secs=0.5)
    with serving(Transports(ends=ends)) as site:
        with connected(site) as silent:
            assert received(silent) == b""
        for _ in attempts("two requests in time"):
            with connected(site) as answered, contextlib.suppress(ConnectionError):
                answered.sendall(LIVE + LIVE)
                if statuses(received(answered)) == [200, 200]:
                    break


@pytest.mark.parametrize(
    "part",
    [b"POST /v2/models/decoupled/generate HTTP/1.1\r\ncontent-length: 9\r\n\r\n{", b"POST /v2/models/dec"],
    ids=["body", "head"],
)
def test_what_has_come_in_part_when_the_server_stops_is_refused(part: bytes, caplog: pytest.LogCaptureFixture) -> None:
    transports = Transports()
    with contextlib.ExitStack() as opened:
        with serving(transports):
            connection = opened.enter_context(connected(transports))
            connection.sendall(LIVE + part)
            assert connection.recv(65536).startswith(b"HTTP/1.1 200")
        answer = received(connection)
    assert statuses(answer) == [503]
    assert b"the server is stopping" in answer
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


def test_who_reads_nothing_is_left_when_the_server_stops(caplog: pytest.LogCaptureFixture) -> None:
    transports = Transports()
    with contextlib.ExitStack() as opened, serving(transports):
        connection = opened.enter_context(connected(transports))
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.sendall(LIVE + stream(1_000_000))
        assert connection.recv(1000, socket.MSG_PEEK)
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]
