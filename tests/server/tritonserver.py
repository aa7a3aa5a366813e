"""A real tritonserver with its Python backend, out of NVIDIA's wheel `nvidia-pytriton`."""

import os
import platform
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

import pytest
import tritonclient.grpc

WHEEL = "nvidia-pytriton==0.7.0"
PLACE = "HASTEN_TRITON"
"""Environment variable: a folder that the wheel is installed in already, such as an environment's site-packages."""
_START_S = 60.0
_STOP_S = 15.0


def find_wheel(cache: pytest.Cache) -> Path:
    """A folder with the wheel, installed once into pytest's cache (55 MB to load, 144 MB on disk, without the packages
    that it depends on: the server alone needs none). Skips the test where it cannot be had.
    """
    if place := os.environ.get(PLACE):
        return Path(place)
    if sys.platform != "linux" or platform.machine() != "x86_64":
        pytest.skip(f"there is no wheel {WHEEL} for this machine")
    folder = Path(cache.mkdir("tritonserver")) / WHEEL
    if not folder.is_dir():
        unfinished = folder.with_suffix(".unfinished")
        shutil.rmtree(unfinished, ignore_errors=True)
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps", WHEEL]
        done = subprocess.run([*pip, "--target", str(unfinished)], capture_output=True, text=True, check=False)
        if done.returncode != 0:
            pytest.skip(f"{WHEEL} cannot be installed; set {PLACE} to where it is: {done.stderr.strip()[-300:]}")
        unfinished.rename(folder)
    return folder


def make_backends(wheel: Path, target: Path) -> Path:
    """A folder of backends whose Python backend runs this Python. Skips where that needs a library that is not here."""
    inside = wheel / "pytriton" / "tritonserver"
    shutil.copytree(inside / "backends", target)
    stub = target / "python" / "triton_python_backend_stub"
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    shutil.copy(inside / "python_backend_stubs" / version / stub.name, stub)
    stub.chmod(0o755)
    needed = subprocess.run(["ldd", stub], env=environment(wheel), capture_output=True, text=True, check=True).stdout
    if missing := [line.strip() for line in needed.splitlines() if "not found" in line]:
        pytest.skip(f"Triton's Python backend needs a shared library that is not here: {missing[0]}")
    return target


def environment(wheel: Path) -> dict[str, str]:
    """Variables that the server runs under."""
    libraries = [str(wheel / "nvidia_pytriton.libs"), sysconfig.get_config_var("LIBDIR")]
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


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


class TritonServer:
    """A running server in model control mode explicit; as a context it is stopped at the end."""

    def __init__(
        self, wheel: Path, backends: Path, repository: Path, log: Path, *models: str, options: Sequence[str] = ()
    ) -> None:
        self.http_port, self.grpc_port, self.metrics_port = _free_ports(3)
        self.log = log
        program = wheel / "pytriton" / "tritonserver" / "bin" / "tritonserver"
        command = [
            *(str(program), "--model-repository", str(repository), "--backend-directory", str(backends)),
            *("--http-port", str(self.http_port), "--grpc-port", str(self.grpc_port)),
            *("--metrics-port", str(self.metrics_port), "--model-control-mode", "explicit"),
            *(f"--load-model={model}" for model in models),
            *options,
        ]
        with log.open("w") as file:
            self.process = subprocess.Popen(command, env=environment(wheel), stdout=file, stderr=file)

    @property
    def url(self) -> str:
        """Of gRPC."""
        return f"127.0.0.1:{self.grpc_port}"

    def __enter__(self) -> "TritonServer":
        deadline = time.monotonic() + _START_S
        with tritonclient.grpc.InferenceServerClient(self.url) as client:
            while not self._is_ready(client):
                if self.process.poll() is not None or time.monotonic() > deadline:
                    self.process.kill()
                    self.process.wait()
                    pytest.fail(f"tritonserver did not become ready:\n{self.log.read_text()[-5000:]}")
                time.sleep(0.1)
        return self

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
