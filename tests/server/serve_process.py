"""`hasten serve` in a process of its own."""

import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.waiting import LIMIT_S, eventually

LOCAL = (
    *("--http-address", "127.0.0.1", "--grpc-address", "127.0.0.1"),
    *("--http-port", "0", "--grpc-port", "0", "--metrics-port", "0"),
)
"""Options: free ports of this machine alone."""
_READY = "Started Metrics Service"


@contextmanager
def serve_process(log: Path, *arguments: str) -> Iterator[dict[str, str]]:
    """A server with its log in a file; HOST:PORT by the service's name. Asked to end, it must end well."""
    with log.open("w") as stream:
        command = [sys.executable, "-m", "hasten", "serve", *LOCAL, *arguments]
        process = subprocess.Popen(command, stdout=stream, stderr=stream)
    try:
        eventually(lambda: _READY in log.read_text() or process.poll() is not None, log.read_text)
        assert process.poll() is None, log.read_text()
        yield dict(re.findall(r"Started (\w+)(?: Service)? at (127\.0\.0\.1:\d+)", log.read_text()))
        process.terminate()
        assert process.wait(LIMIT_S) == 0, log.read_text()
    finally:
        process.kill()
        process.wait()
