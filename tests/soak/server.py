"""`hasten serve` in a process of its own, and what can be seen of it from outside."""

import asyncio
import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

from tests.soak.http_client import get
from tests.waiting import LIMIT_S

DEMO = Path(__file__).parents[2] / "examples" / "demo-model"
_LOCAL = (
    *("--http-address", "127.0.0.1", "--grpc-address", "127.0.0.1"),
    *("--http-port", "0", "--grpc-port", "0", "--metrics-port", "0"),
)
_IDLE = ("kv_cache_usage_ratio", "requests_running", "requests_waiting")


class Server:
    """One server. Its log is a file in a folder of its own, which goes with it."""

    def __init__(self, *arguments: str) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="hasten-soak-"))
        self._log = self.folder / "log"
        with self._log.open("w") as stream:
            command = [sys.executable, "-m", "hasten", "serve", *_LOCAL, *arguments]
            self.process = subprocess.Popen(command, stdout=stream, stderr=stream, env=_environment())
        try:
            self.http, self.grpc, self.metrics_port = self._ports()
        except BaseException:
            self.kill()
            raise

    @property
    def log(self) -> str:
        return self._log.read_text(errors="replace")

    def _ports(self) -> tuple[int, int, int]:
        until = time.monotonic() + LIMIT_S
        while "Started Metrics Service" not in self.log:
            assert self.process.poll() is None, self.log
            assert time.monotonic() < until, self.log
            time.sleep(0.02)
        http, grpc, metrics = (
            int(found[1])
            for name in ("HTTPService", "GRPCInferenceService", "Metrics Service")
            if (found := re.search(rf"Started {name} at 127\.0\.0\.1:(\d+)", self.log))
        )
        return http, grpc, metrics

    @property
    def engines(self) -> list[int]:
        """Processes of its engines."""
        pid = self.process.pid
        if self.process.poll() is not None:
            return []
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        return [int(child) for child in children if "hasten.server.engine.process" in _read(int(child), "cmdline")]

    @staticmethod
    def lives(pid: int) -> bool:
        """Whether there is such a process."""
        return Path(f"/proc/{pid}").exists()

    def memory(self) -> dict[str, float]:
        """MiB that the server's process and its engines' have in memory."""
        return {"server": _rss(self.process.pid), "engine": sum(map(_rss, self.engines))}

    def cpu_seconds(self) -> float:
        """CPU time that the server's process has taken, without its engines'."""
        # fields 14 and 15; the command, field 2, may have spaces in it
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    async def metrics(self) -> dict[str, float]:
        """Samples by name with labels."""
        lines = (await get(self.metrics_port, "/metrics")).body.decode().splitlines()
        return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines if line[:1] != "#")}

    async def busy(self) -> dict[str, float]:
        """What is not idle: blocks in use, requests running or waiting."""
        samples = await self.metrics()
        names = [f"hasten_{name}{{" for name in _IDLE] + ["nv_inference_pending_request_count{"]
        return {name: value for name, value in samples.items() if value and name.startswith(tuple(names))}

    async def idle_after(self, seconds: float = LIMIT_S) -> float:
        """How long it took until no block was in use and nothing ran; AssertionError after so many seconds."""
        began = time.monotonic()
        while busy := await self.busy():
            assert time.monotonic() - began < seconds, f"after {seconds} s: {busy}"
            await asyncio.sleep(0.02)
        return time.monotonic() - began

    async def ready(self) -> bool:
        return (await get(self.http, "/v2/health/ready")).status == 200

    async def until_ready(self, ready: bool, seconds: float) -> float:
        """How long it took until it said so, or no more; AssertionError after so many seconds."""
        began = time.monotonic()
        while await self.ready() != ready:
            assert time.monotonic() - began < seconds, f"ready: {not ready} for {seconds} s\n{self.log}"
            await asyncio.sleep(0.005)
        return time.monotonic() - began

    def kill(self) -> None:
        """End it and all that it started, however it fares."""
        with contextlib.suppress(OSError):
            for engine in self.engines:
                os.kill(engine, signal.SIGKILL)
        self.process.kill()
        self.process.wait(LIMIT_S)
        shutil.rmtree(self.folder)


def _environment() -> dict[str, str]:
    """Of processes that share a few cores with those that ask them."""
    return {"OMP_NUM_THREADS": "1", **os.environ}


def create_repository(model: Path, target: Path, *options: str) -> Path:
    """A model repository, made by its command."""
    command = [sys.executable, "-m", "hasten", "repository", "create", str(model), str(target), *options]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=_environment())
    return target


def _read(pid: int, name: str) -> str:
    """A file of /proc; empty where the process has ended meanwhile."""
    try:
        return Path(f"/proc/{pid}/{name}").read_text()
    except OSError:
        return ""


def _rss(pid: int) -> float:
    found = re.search(r"^VmRSS:\s+(\d+) kB", _read(pid, "status"), re.MULTILINE)
    return 0.0 if found is None else int(found[1]) / 1024


@contextlib.contextmanager
def serving(*arguments: str) -> Iterator[Server]:
    """A server that is ended at the end."""
    server = Server(*arguments)
    try:
        yield server
    finally:
        server.kill()


@contextlib.asynccontextmanager
async def sampled(server: Server, every: float, samples: list[dict[str, float]]) -> AsyncIterator[None]:
    """Meanwhile its memory is looked at, again and again."""

    async def sample() -> None:
        while True:
            samples.append(server.memory())
            await asyncio.sleep(every)

    task = asyncio.create_task(sample())
    try:
        yield
    finally:
        task.cancel()
