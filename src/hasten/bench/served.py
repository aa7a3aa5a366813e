"""A server of one model for as long as it is measured, in processes of its own.

Imports no torch, since the server's process imports this module: it starts as `hasten serve` does.
"""

import multiprocessing
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import tritonclient.grpc as grpcclient
from tritonclient.utils import InferenceServerException

from hasten.bench.child import end_with_parent
from hasten.core.config import EngineConfig
from hasten.core.errors import EngineError, HastenError
from hasten.core.ports import free_ports
from hasten.server.options import EndpointOptions, LogOptions, ModelOptions, ServeOptions

HOST = "127.0.0.1"
_LOCAL = (HOST, "localhost", "::1")
TOKEN_MODEL, TEXT_MODEL = "fastertransformer", "text"
_START_S, _STOP_S, _ANSWER_S = 900.0, 60.0, 10.0
CALL_S = 600.0
"""Seconds in which a request to a server must be answered."""


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
    ports = free_ports(3, HOST)
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

    end_with_parent()
    try:
        raise SystemExit(run_server(options))
    except HastenError as error:
        raise SystemExit(f"hasten: error: {error}") from None


def channel_options(address: str) -> list[tuple[str, int]]:
    """Options of gRPC for a client: a server of this machine is reached without a proxy, whatever the environment says.

    Messages may have any size, as they may for Triton's client without options.
    """
    options = [("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1)]
    host = address.rpartition(":")[0].strip("[]")
    return [*options, ("grpc.enable_http_proxy", 0)] if host in _LOCAL else options


def environment_without_proxy() -> dict[str, str]:
    """This process's environment for one that asks a server of this machine: no proxy comes between."""
    environment = dict(os.environ)
    # gRPC reads the first if there is one, and the second otherwise; other libraries read the second in either case
    for name in ("no_grpc_proxy", "no_proxy", "NO_PROXY"):
        if name in environment or name == "no_proxy":
            environment[name] = ",".join([*filter(None, [environment.get(name)]), *_LOCAL])
    return environment


def wait_until_ready(address: str, is_alive: Callable[[], bool], log: Path) -> None:
    """Return once the server at a gRPC address is ready; EngineError with its last words if its process ends before."""
    until = time.monotonic() + _START_S
    with grpcclient.InferenceServerClient(address, channel_args=channel_options(address)) as client:
        while not _is_ready(client):
            late = time.monotonic() > until
            if late or not is_alive():
                said = log.read_text(encoding="utf-8", errors="replace").strip().split("\n") if log.exists() else []
                errors = [line for line in said if line.startswith("E")]
                how = f"was not ready within {_START_S:.0f} s" if late else "ended before it was ready"
                words = " / ".join(errors or said[-1:]) or "nothing"
                raise EngineError(f"the server at {address} {how}; its log says: {words}")
            time.sleep(0.01)


def _is_ready(client: grpcclient.InferenceServerClient) -> bool:
    try:
        return bool(client.is_server_ready(client_timeout=_ANSWER_S))
    except InferenceServerException:
        return False  # its port is not open yet
