"""A server of one model for as long as it is measured, in processes of its own.

Imports no torch, since the server's process imports this module: it starts as `hasten serve` does.
"""

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import tritonclient.grpc as grpcclient
from tritonclient.utils import InferenceServerException

from hasten.core.config import EngineConfig
from hasten.core.errors import EngineError, HastenError
from hasten.server.listeners import open_port
from hasten.server.options import EndpointOptions, LogOptions, ModelOptions, ServeOptions

HOST = "127.0.0.1"
TOKEN_MODEL, TEXT_MODEL = "fastertransformer", "text"
_START_S, _STOP_S = 900.0, 60.0


@dataclass(frozen=True)
class Served:
    """A server that runs, and the seconds from its process's start until it was ready."""

    address: str
    """HOST:PORT of gRPC."""
    http_port: int
    start_s: float


@contextmanager
def served(engine: EngineConfig, log: Path) -> Iterator[Served]:
    """A server of the model in processes of its own, with its log in a file; EngineError if it does not get ready."""
    ports = free_ports()
    options = ServeOptions(
        engine=engine,
        endpoints=EndpointOptions(
            http_address=HOST, grpc_address=HOST, http_port=ports[0], grpc_port=ports[1], metrics_port=ports[2]
        ),
        model=ModelOptions(name=TOKEN_MODEL, text_name=TEXT_MODEL),
        log=LogOptions(log_file=str(log)),
    )
    process = multiprocessing.get_context("spawn").Process(target=_serve, args=(options,))
    start = time.perf_counter()
    process.start()
    try:
        address = f"{HOST}:{ports[1]}"
        wait_until_ready(address, process.is_alive, log)
        yield Served(address, ports[0], time.perf_counter() - start)
    finally:
        process.terminate()
        process.join(_STOP_S)
        if process.is_alive():
            process.kill()


def _serve(options: ServeOptions) -> None:
    from hasten.server.app import run_server

    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        raise SystemExit(run_server(options))
    except HastenError as error:
        raise SystemExit(f"hasten: error: {error}") from None


def _end_with_parent() -> None:
    """Who measures may be killed, and can tell nobody then."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os.kill(os.getpid(), signal.SIGTERM)


def free_ports() -> list[int]:
    """Three ports of this machine that nobody listens on: for HTTP, gRPC and metrics."""
    with ExitStack() as opened:
        listeners = [opened.enter_context(open_port(HOST, 0, "a free port")) for _ in range(3)]
        return [int(listener.getsockname()[1]) for listener in listeners]


def wait_until_ready(address: str, is_alive: Callable[[], bool], log: Path) -> None:
    """Return once the server at a gRPC address is ready; EngineError with its last words if its process ends before."""
    until = time.monotonic() + _START_S
    with grpcclient.InferenceServerClient(address) as client:
        while not _is_ready(client):
            if not is_alive() or time.monotonic() > until:
                said = log.read_text().splitlines() if log.exists() else []
                errors = [line for line in said if line.startswith("E")]
                raise EngineError("the server did not get ready; it said: " + " / ".join(errors or said[-1:]))
            time.sleep(0.01)


def _is_ready(client: grpcclient.InferenceServerClient) -> bool:
    try:
        return bool(client.is_server_ready())
    except InferenceServerException:
        return False  # its port is not open yet
