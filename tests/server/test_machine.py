"""Descriptors and CPUs of a server in a process of its own: as many as it may have, and a warning when none is left."""

import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx
from tests.waiting import LIMIT_S

DEMO = Path(__file__).parents[2] / "examples" / "demo-model"
LOCAL = ["--http-address", "127.0.0.1", "--http-port", "0", "--allow-grpc", "false", "--allow-metrics", "false"]
LIMIT = 128


@contextmanager
def limited(log: Path, soft: int, hard: int) -> "Iterator[tuple[subprocess.Popen[bytes], int]]":
    """A server that starts with these limits, and the port of HTTP."""
    command = [sys.executable, "-m", "hasten", "serve", *LOCAL, str(DEMO)]
    limits = f'ulimit -Sn {soft} && ulimit -Hn {hard} && exec "$@"'
    with log.open("w") as stream:
        process = subprocess.Popen(["sh", "-c", limits, "sh", *command], stderr=stream, stdout=stream)
    try:
        yield process, int(wait_for(log, process, r"Started HTTPService at 127\.0\.0\.1:(\d+)"))
    finally:
        process.terminate()
        process.wait(LIMIT_S)


def wait_for(log: Path, process: "subprocess.Popen[bytes]", pattern: str) -> str:
    until = time.monotonic() + LIMIT_S
    while (found := re.search(pattern, log.read_text())) is None:
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < until, log.read_text()
        time.sleep(0.02)
    return found[1]


def test_a_server_without_descriptors_says_so_once_a_minute_and_serves_again(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with limited(log, LIMIT // 2, LIMIT) as (process, port):
        (line,) = re.findall(r"^Max open files +(\d+) +(\d+)", Path(f"/proc/{process.pid}/limits").read_text(), re.M)
        assert line == (str(LIMIT), str(LIMIT)), "the soft limit is raised to the hard one"
        assert re.search(rf"CPUs: \d+; file descriptors: at most {LIMIT}\b", log.read_text())
        with ExitStack() as connections:
            for _ in range(LIMIT + 20):
                connections.enter_context(socket.create_connection(("127.0.0.1", port), LIMIT_S))
            wait_for(log, process, f"(all {LIMIT} file descriptors are in use)")
        with httpx.Client(transport=httpx.HTTPTransport(retries=50), timeout=LIMIT_S) as client:
            assert until_served(client, f"http://127.0.0.1:{port}/v2/health/ready").status_code == 200
        assert log.read_text().count("file descriptors are in use") == 1


def until_served(client: httpx.Client, url: str) -> httpx.Response:
    until = time.monotonic() + LIMIT_S
    while True:
        try:
            return client.get(url)
        except httpx.TransportError:
            assert time.monotonic() < until
            time.sleep(0.05)


def test_a_server_counts_the_cpus_that_it_may_use(tmp_path: Path) -> None:
    log = tmp_path / "log"
    allowed = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(allowed)})
        with limited(log, LIMIT, LIMIT):
            assert "CPUs: 1;" in log.read_text()
    finally:
        os.sched_setaffinity(0, allowed)
