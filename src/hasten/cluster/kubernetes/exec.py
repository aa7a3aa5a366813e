"""A command inside a running container, on this terminal.

The streams of a terminal share one websocket, each message beginning with the number of its stream: 0 stdin, 1 stdout,
2 stderr, 3 the end of the command as an object Status, 4 the size of the terminal, and in version 5 of the protocol
255 with the number of a stream that ends (kubernetes.io/docs/reference/using-api/websockets; KEP-4006).
"""

import json
import os
import re
import select
import signal
import sys
import termios
import tty
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, BinaryIO

from kubernetes.client import ApiException, CoreV1Api
from kubernetes.stream import stream
from websocket import WebSocketException

from hasten.cluster.kubernetes.client import Cluster
from hasten.cluster.kubernetes.errors import Attempt, answered, unreachable
from hasten.cluster.kubernetes.resources import PODS, Object, name_of
from hasten.cluster.spec import checked_text
from hasten.core.errors import ClusterError

SHELL = ("/bin/sh", "-c", "if command -v bash >/dev/null 2>&1; then exec bash; else exec sh; fi")
"""What runs where the user names no command."""
_STDIN, _STDOUT, _STDERR, _ERROR, _RESIZE = range(5)
_BLOCK = 1 << 12
"""Bytes of input at once: less than what a socket takes that can be written to."""
_WAIT, _SHORT_WAIT = 0.5, 0.02
_REFUSED = re.compile(r"Handshake status (\d+)")


def run_inside(cluster: Cluster, pod: Object, container: str, command: list[str]) -> int:
    """Run a command and pass on what is typed and printed; returns its exit status."""
    for word in command:
        checked_text(word, "the command's word")
    typed = _stdin()
    terminal = typed is not None and os.isatty(typed) and sys.stdout.isatty()
    session = _connect(cluster, pod, container, command or list(SHELL), terminal, typed is not None)
    try:
        with _raw(typed if terminal else None), _resizing(session, terminal):
            _exchange(session, typed)
    except (OSError, WebSocketException):
        pass  # whether the command came to its end is known from its last message, or from there being none
    finally:
        session.sock.shutdown()
    return _exit_status(session.read_channel(_ERROR), name_of(pod))


def _stdin() -> int | None:
    try:
        return sys.stdin.fileno()
    except (AttributeError, OSError, ValueError):
        return None


def _connect(cluster: Cluster, pod: Object, container: str, command: list[str], terminal: bool, typed: bool) -> Any:
    name, namespace = name_of(pod), pod["metadata"]["namespace"]
    try:
        return stream(
            CoreV1Api(cluster.client).connect_get_namespaced_pod_exec,
            name,
            namespace,
            container=container,
            command=command,
            stdin=typed,
            stdout=True,
            stderr=not terminal,
            tty=terminal,
            binary=True,
            _preload_content=False,
        )
    except ApiException as error:
        path = PODS.path(namespace, name, "exec")
        attempt = Attempt(cluster.server, "GET", "exec into", path, PODS, namespace, name, "exec")
        raise _handshake_error(attempt, error, cluster.access.configuration.proxy) from error


def _handshake_error(attempt: Attempt, error: ApiException, proxy: str | None) -> ClusterError:
    """What the client tells of a refused handshake is one text: status, headers and body."""
    reason = str(error.reason)
    refused = _REFUSED.search(reason)
    if refused is None:
        return unreachable(attempt, Exception(reason), proxy)
    return answered(attempt, int(refused.group(1)), reason.rpartition("-+-+- ")[2].encode())


def _exchange(session: Any, typed: int | None) -> None:
    """Pass bytes on in both directions until the server closes the connection."""
    outputs = {_STDOUT: sys.stdout, _STDERR: sys.stderr}
    socket = session.sock.sock
    while session.is_open():
        # what is typed is read only when a block of it can be sent at once: a command that waits for its output to be
        # read takes no input; and a TLS connection may hold bytes that are not seen to be waiting, hence the time-out
        writable = typed is not None and bool(select.select([], [socket], [], 0)[1])
        ready = select.select([socket, *([typed] if writable else [])], [], [], _WAIT if writable else _SHORT_WAIT)[0]
        if typed is not None and typed in ready and not _pass_typed(session, typed):
            typed = None
        session.update(timeout=0)
        for channel, output in outputs.items():
            _write(output, session.read_channel(channel))
    for channel, output in outputs.items():
        _write(output, session.read_channel(channel))


def _pass_typed(session: Any, typed: int) -> bool:
    data = os.read(typed, _BLOCK)
    if data:
        session.write_channel(_STDIN, data)
    else:
        session.close_channel(_STDIN)
    return bool(data)


def _write(output: Any, data: bytes | str) -> None:
    if not data:
        return
    raw: BinaryIO | None = getattr(output, "buffer", None)
    octets = data if isinstance(data, bytes) else data.encode()
    if raw is not None:
        raw.write(octets)
    else:
        output.write(octets.decode(errors="replace"))
    output.flush()


@contextmanager
def _raw(terminal: int | None) -> Iterator[None]:
    """Every key goes to the command at once, control-C too."""
    if terminal is None:
        yield
        return
    before = termios.tcgetattr(terminal)
    tty.setraw(terminal, termios.TCSADRAIN)  # what was typed already is kept
    try:
        yield
    finally:
        termios.tcsetattr(terminal, termios.TCSADRAIN, before)


@contextmanager
def _resizing(session: Any, terminal: bool) -> Iterator[None]:
    """Send the command the size of this terminal, now and whenever it changes."""
    if not terminal:
        yield
        return

    def send_size(*_: object) -> None:
        with suppress(OSError, WebSocketException):
            size = os.get_terminal_size(sys.stdout.fileno())
            session.write_channel(_RESIZE, json.dumps({"Width": size.columns, "Height": size.lines}).encode())

    before = signal.signal(signal.SIGWINCH, send_size)
    send_size()
    try:
        yield
    finally:
        signal.signal(signal.SIGWINCH, before)


def _exit_status(message: bytes | str, pod: str) -> int:
    """Exit status from the command's last message."""
    if not message:
        raise ClusterError(f"the connection to {pod} was lost before its command ended")
    status = json.loads(message)
    if status.get("status") == "Success":
        return 0
    causes = (status.get("details") or {}).get("causes") or []
    codes = [cause["message"] for cause in causes if cause.get("reason") == "ExitCode"]
    if codes and str(codes[0]).isdecimal():
        return int(codes[0])
    raise ClusterError(f"the command did not run in {pod}: {status.get('message') or status}")
