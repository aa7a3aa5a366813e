"""Control connections between rank 0 and every other rank: one for the steps' work, one for liveness.

Collectives are for tensors. A connection of our own is broken the moment that its process ends, and within seconds when
its host does, whatever either side is doing.
"""

import fcntl
import hmac
import json
import os
import secrets
import socket
import struct
import threading
import time
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from typing import Protocol

from hasten.core.errors import EngineError
from hasten.parallel.liveness import GRACE_S, Failure, Liveness, rank_name
from hasten.parallel.rank import LOCAL, RankInfo

_PROBE_AFTER_S, _PROBE_EVERY_S, _PROBES = 2, 1, 4
"""Unanswered probes after which a host is taken for dead."""
_ACCEPT_S, _HELLO_S, _HELLO_BYTES = 0.1, 5.0, 4096
_RETRY_S, _CONNECT_S = 0.2, 5.0
_SIOCGIFADDR = 0x8915
_STEPS, _WATCH = "steps", "watch"


class KeyValues(Protocol):
    """Where ranks leave words for each other."""

    def set(self, key: str, value: str) -> None:
        """Write."""

    def get(self, key: str) -> bytes:
        """Read, once there is something."""


def _connection(raw: socket.socket) -> Connection:
    """A connection of whole messages that sends at once and notices a dead host."""
    raw.settimeout(None)
    raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    raw.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, _PROBE_AFTER_S)
    raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, _PROBE_EVERY_S)
    raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, _PROBES)
    timeout_ms = 1000 * (_PROBE_AFTER_S + _PROBE_EVERY_S * _PROBES)
    raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, timeout_ms)  # where something is under way
    return Connection(raw.detach())


def _own_address(raw: socket.socket) -> str:
    """This side's address, as IPv4 where it is that."""
    return str(raw.getsockname()[0]).removeprefix("::ffff:")


def _shut(connection: Connection) -> None:
    """End both directions: whoever reads or writes, on either side, goes on at once."""
    with suppress(OSError), socket.socket(fileno=connection.fileno()) as raw:
        try:
            raw.shutdown(socket.SHUT_RDWR)
        finally:
            raw.detach()


class Hub:
    """Rank 0's connections to all other ranks."""

    def __init__(self, info: RankInfo, store: KeyValues, liveness: Liveness, seconds: float) -> None:
        """Wait until all ranks are connected; EngineError after `seconds`, RuntimeError where one dies."""
        self._size, self._liveness = info.size, liveness
        self._steps: dict[int, Connection] = {}
        self._watched: dict[int, Connection] = {}
        self._hosts: dict[int, str] = {}
        self.address = ""
        """Of this host, as the other ranks see it."""
        token = secrets.token_hex()
        with _listener(info.address) as listener:
            store.set("control", json.dumps([listener.getsockname()[1], token, socket.gethostname()]))
            self._accept_all(listener, token, seconds)
        liveness.on_failure(self._report_failure)
        liveness.on_failure(self._interrupt)
        self._watcher = threading.Thread(target=self._watch, daemon=True)
        self._watcher.start()

    def _accept_all(self, listener: socket.socket, token: str, seconds: float) -> None:
        listener.settimeout(_ACCEPT_S)
        deadline = time.monotonic() + seconds
        while len(self._steps) + len(self._watched) < 2 * (self._size - 1):
            if self._liveness.failure is not None:
                raise RuntimeError("a rank died while starting")
            if time.monotonic() > deadline:
                missing = ", ".join(str(rank) for rank in range(1, self._size) if rank not in self._watched)
                raise EngineError(f"ranks {missing} did not appear within {seconds:.0f} s")
            with suppress(TimeoutError):
                raw, _ = listener.accept()
                self._admit(_own_address(raw), _connection(raw), token)

    def _admit(self, address: str, connection: Connection, token: str) -> None:
        """Keep a connection to this host's `address` if it is one of this run's ranks."""
        with suppress(OSError, EOFError, ValueError):
            os.set_blocking(connection.fileno(), False)  # a stranger may send a part of a message and no more
            if connection.poll(_HELLO_S):
                rank, host, purpose, shown = json.loads(connection.recv_bytes(_HELLO_BYTES))
                if hmac.compare_digest(shown, token):
                    os.set_blocking(connection.fileno(), True)
                    self._hosts[rank], self.address = host, address
                    (self._steps if purpose == _STEPS else self._watched)[rank] = connection
                    return
        connection.close()

    def publish(self, data: bytes | memoryview) -> None:
        """Send a message to all ranks; RuntimeError where one is gone."""
        for rank, connection in self._steps.items():
            try:
                connection.send_bytes(data)
            except OSError as error:
                raise RuntimeError(f"the connection to rank {rank} broke ({error.strerror or error})") from error

    def _watch(self) -> None:
        """Wait for reports, and for connections that break: whoever knows why has a while to say so."""
        watched = {connection: rank for rank, connection in self._watched.items()}
        lost: Failure | None = None
        while not self._liveness.ending and self._liveness.failure is None:
            ready = wait(list(watched), None if lost is None else GRACE_S)
            if lost is not None and not ready:
                self._liveness.fail(lost)
            for connection in ready:
                assert isinstance(connection, Connection)
                try:
                    self._liveness.fail(Failure.unpacked(connection.recv_bytes()))
                except (EOFError, OSError) as error:
                    rank = watched.pop(connection)
                    lost = lost or self._loss(rank, error)
                    if not isinstance(error, EOFError | ConnectionError):
                        self._liveness.fail(lost)  # nobody is left there to say why

    def _loss(self, rank: int, error: Exception) -> Failure:
        host = self._hosts[rank]
        broke = isinstance(error, EOFError | ConnectionError)
        how = "its connection to rank 0 broke" if broke else f"its host does not answer ({error})"
        return Failure(f"{rank_name(rank, self._size, host)} died: {how}")

    def _report_failure(self) -> None:
        failure = self._liveness.failure
        if failure is not None:
            self.report(failure)

    def report(self, failure: Failure | None) -> None:
        """Let all ranks know of a failure, or of an end in order."""
        for connection in self._watched.values():
            with suppress(OSError):
                connection.send_bytes(b"" if failure is None else failure.packed())

    def _interrupt(self) -> None:
        for connection in self._steps.values():
            _shut(connection)

    def close(self) -> None:
        """Close all connections; `Liveness.ending` is set."""
        for connection in (*self._steps.values(), *self._watched.values()):
            _shut(connection)
        self._watcher.join()
        for connection in (*self._steps.values(), *self._watched.values()):
            connection.close()


class Spoke:
    """Another rank's connections to rank 0."""

    def __init__(self, info: RankInfo, store: KeyValues, liveness: Liveness) -> None:
        """Connect; RuntimeError where rank 0 does not listen."""
        port, token, self._host = json.loads(store.get("control"))
        self._size, self._liveness = info.size, liveness
        self.address = ""
        """Of this host, as rank 0 sees it."""

        def connected(purpose: str) -> Connection:
            try:
                raw = _reach(info.address, port, _CONNECT_S)
            except OSError as error:
                raise RuntimeError(f"rank 0 does not listen at port {port} ({error.strerror or error})") from error
            self.address = _own_address(raw)
            connection = _connection(raw)
            connection.send_bytes(json.dumps([info.rank, socket.gethostname(), purpose, token]).encode())
            return connection

        self._steps, self._watched = connected(_STEPS), connected(_WATCH)
        liveness.on_failure(lambda: _shut(self._steps))
        self._watcher = threading.Thread(target=self._watch, daemon=True)
        self._watcher.start()

    def receive(self) -> bytes:
        """The next message that rank 0 published; RuntimeError where it is gone or a rank died."""
        try:
            return self._steps.recv_bytes()
        except (EOFError, OSError) as error:
            raise RuntimeError("the connection to rank 0 broke") from error

    def _watch(self) -> None:
        while True:
            try:
                message = self._watched.recv_bytes()
            except (EOFError, OSError):
                self._liveness.fail(Failure(f"{rank_name(0, self._size, self._host)} died: its connection broke"))
                return
            if message:
                self._liveness.fail(Failure.unpacked(message))
            else:
                self._liveness.ending = True

    def report(self, failure: Failure | None) -> None:
        """Let rank 0 know of this rank's failure."""
        if failure is not None:
            with suppress(OSError):
                self._watched.send_bytes(failure.packed())

    def close(self) -> None:
        """Close all connections; `Liveness.ending` is set."""
        _shut(self._steps)
        _shut(self._watched)
        self._watcher.join()
        self._steps.close()
        self._watched.close()


def _listener(address: str) -> socket.socket:
    """Where the other ranks connect to: on every interface, unless all are on this host."""
    if address == LOCAL:
        return socket.create_server((LOCAL, 0))
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("", 0))


def _reach(address: str, port: int, seconds: float) -> socket.socket:
    """A connection to rank 0's host; OSError where there is none within `seconds`."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            return socket.create_connection((address, port), max(_RETRY_S, deadline - time.monotonic()))
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(_RETRY_S)


def await_host(address: str, port: int, seconds: float) -> None:
    """Wait until rank 0's host listens; EngineError where it does not within `seconds`."""
    try:
        _reach(address, port, seconds).close()
    except OSError as error:
        raise EngineError(
            f"rank 0 was not to be reached at {address}, port {port}, for {seconds:.0f} s ({error.strerror or error}); "
            "check that it runs, and the address and port of its host"
        ) from error


def interface_of(address: str) -> str | None:
    """The network interface of this host that has an address of IPv4; None for any other."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            with suppress(OSError):
                found = fcntl.ioctl(probe, _SIOCGIFADDR, struct.pack("256s", name.encode()))
                if socket.inet_ntoa(found[20:24]) == address:
                    return name
    return None
