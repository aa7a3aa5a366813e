"""Processes of engines. They can be started ahead: what they import takes seconds, and depends on no configuration."""

import atexit
import socket
import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from hasten.core.cpus import available_cpus


@dataclass(frozen=True)
class EngineProcess:
    """A process that waits for the message that says what to load."""

    process: "subprocess.Popen[bytes]"
    connection: socket.socket
    """The server's end of the socket to it."""

    def kill(self) -> None:
        """End it at once, and wait until it has ended."""
        self.connection.close()
        with self.process:
            self.process.kill()


_ahead: list[EngineProcess] = []


def start_ahead(count: int, weights: Path | None = None) -> None:
    """Start processes for the next calls of `start`, which says so if the system cannot.

    Those that are not taken by then end with this process. `weights`: the folder that one engine alone will load to the
    first GPU.
    """
    atexit.register(_end_ahead)
    with suppress(OSError):
        for _ in range(min(count, available_cpus())):
            _ahead.append(_started(weights))


def _end_ahead() -> None:
    while _ahead:
        _ahead.pop().kill()


def start() -> EngineProcess:
    """A process that was started ahead, or a new one; OSError where the system cannot."""
    return _ahead.pop(0) if _ahead else _started()


def _started(weights: Path | None = None) -> EngineProcess:
    """A process with the other end of a socket. Its messages, and those of its libraries, go to stderr."""
    ours, theirs = socket.socketpair()
    try:
        with theirs:
            process = subprocess.Popen(
                [
                    *(sys.executable, "-m", "hasten.server.engine.process", str(theirs.fileno())),
                    *([] if weights is None else [str(weights)]),
                ],
                stdin=subprocess.PIPE,  # closed when this process ends, however it does
                stdout=2,
                pass_fds=[theirs.fileno()],
                start_new_session=True,  # Ctrl-C goes to the server alone, which ends the engine in order
            )
        ours.setblocking(False)
        return EngineProcess(process, ours)
    except BaseException:
        ours.close()
        raise
