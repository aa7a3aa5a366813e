"""Commands in the test's pods, which are processes of this machine.

Their streams share one websocket (RFC 6455), each message beginning with the number of its stream:
kubernetes.io/docs/reference/using-api/websockets and KEP-4006 (v4.channel.k8s.io, and v5.channel.k8s.io, where 255 and
a number end that stream).
"""

import base64
import fcntl
import hashlib
import json
import os
import pty
import socket
import struct
import subprocess
import sys
import termios
import threading
from collections.abc import Iterator
from contextlib import suppress
from io import BufferedIOBase
from typing import Any

_TAKE_TERMINAL = """
import fcntl, os, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
os.execvp(sys.argv[1], sys.argv[1:])
"""
"""Makes the terminal of a new session its controlling one, so that keys send signals."""
_MAGIC = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
_STDIN, _STDOUT, _STDERR, _ERROR, _RESIZE, _CLOSE = 0, 1, 2, 3, 4, 255
_TEXT, _BINARY, _END, _PING, _PONG = 1, 2, 8, 9, 10


def accept_key(key: str) -> str:
    """Answer to a websocket's key."""
    return base64.b64encode(hashlib.sha1(key.encode() + _MAGIC).digest()).decode()


class WebSocket:
    """The server's end of a websocket."""

    def __init__(self, connection: socket.socket, reader: BufferedIOBase) -> None:
        self._connection, self._reader, self._lock = connection, reader, threading.Lock()

    def send(self, channel: int, data: bytes) -> None:
        """One binary message."""
        self._frame(_BINARY, bytes([channel]) + data)

    def close(self) -> None:
        """Say that this is the end."""
        with suppress(OSError):
            self._frame(_END, struct.pack(">H", 1000))

    def _frame(self, opcode: int, data: bytes) -> None:
        size = len(data)
        if size <= 125:
            header = struct.pack(">BB", 0x80 | opcode, size)
        elif size <= 0xFFFF:
            header = struct.pack(">BBH", 0x80 | opcode, 126, size)
        else:
            header = struct.pack(">BBQ", 0x80 | opcode, 127, size)
        with self._lock:
            self._connection.sendall(header + data)

    def messages(self) -> Iterator[tuple[int, bytes]]:
        """Channel and content of each message until the other side ends."""
        while (frame := self._read_frame()) is not None:
            opcode, data = frame
            if opcode == _PING:
                self._frame(_PONG, data)
            elif opcode in (_TEXT, _BINARY) and data:
                yield data[0], data[1:]

    def _read_frame(self) -> tuple[int, bytes] | None:
        head = self._reader.read(2)
        if len(head) < 2 or head[0] & 0x0F == _END:
            return None
        size = head[1] & 0x7F
        if size > 125:
            size = int.from_bytes(self._reader.read(2 if size == 126 else 8), "big")
        mask = self._reader.read(4)
        data = self._reader.read(size)
        return head[0] & 0x0F, bytes(byte ^ mask[index % 4] for index, byte in enumerate(data))


def run_command(websocket: WebSocket, command: list[str], *, terminal: bool) -> None:
    """Run a command with its streams on a websocket, until it ends or the other side does."""
    try:
        process, master = _start(command, terminal=terminal)
    except FileNotFoundError as error:
        message = f"error executing command in container: {error}"
        failed = {"metadata": {}, "status": "Failure", "reason": "InternalError", "message": message, "code": 500}
        websocket.send(_ERROR, json.dumps(failed).encode())
        return websocket.close()
    typed = master if master is not None else process.stdin.fileno() if process.stdin else -1
    streams = [(process.stdout, _STDOUT), (process.stderr, _STDERR)]
    outputs = [(stream.fileno(), channel) for stream, channel in streams if stream]
    outputs += [(master, _STDOUT)] if master is not None else []
    readers = [threading.Thread(target=_pump, args=(websocket, *output)) for output in outputs]
    feeder = threading.Thread(target=_feed, args=(websocket, process, typed, terminal), daemon=True)
    for thread in (*readers, feeder):
        thread.start()
    for thread in readers:
        thread.join()
    with suppress(OSError):  # the other side may be gone
        websocket.send(_ERROR, json.dumps(_outcome(process.wait())).encode())
        websocket.close()
    feeder.join(5)
    return _close_all(process, master)


def _start(command: list[str], *, terminal: bool) -> tuple[subprocess.Popen[bytes], int | None]:
    """The process, and the other end of its terminal if it has one."""
    if not terminal:
        return subprocess.Popen(command, stdin=-1, stdout=-1, stderr=-1), None
    master, slave = pty.openpty()
    start = [sys.executable, "-c", _TAKE_TERMINAL, *command]
    process = subprocess.Popen(start, stdin=slave, stdout=slave, stderr=slave, start_new_session=True)
    os.close(slave)
    return process, master


def _close_all(process: subprocess.Popen[bytes], master: int | None) -> None:
    for stream in (process.stdin, process.stdout, process.stderr):
        if stream is not None:
            with suppress(OSError):
                stream.close()
    if master is not None:
        os.close(master)


def _pump(websocket: WebSocket, source: int, channel: int) -> None:
    with suppress(OSError):  # a pseudo terminal whose last program has ended
        while data := os.read(source, 4096):
            websocket.send(channel, data)


def _feed(websocket: WebSocket, process: subprocess.Popen[bytes], typed: int, terminal: bool) -> None:
    with suppress(OSError, ValueError):
        for channel, data in websocket.messages():
            if channel == _STDIN:
                os.write(typed, data)
            elif channel == _RESIZE and terminal:
                size = json.loads(data)
                fcntl.ioctl(typed, termios.TIOCSWINSZ, struct.pack("HHHH", size["Height"], size["Width"], 0, 0))
            elif channel == _CLOSE and data == bytes([_STDIN]) and process.stdin:
                process.stdin.close()
        if process.poll() is None:
            process.kill()


def _outcome(status: int) -> dict[str, Any]:
    if status == 0:
        return {"metadata": {}, "status": "Success"}
    message = f"command terminated with non-zero exit code: exit status {status}"
    causes = [{"reason": "ExitCode", "message": str(status)}]
    failed = {"metadata": {}, "status": "Failure", "reason": "NonZeroExitCode", "message": message}
    return {**failed, "details": {"causes": causes}}
