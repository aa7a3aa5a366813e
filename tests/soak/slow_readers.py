"""Clients that ask for much and read nothing: others are served as before, and memory has a bound."""

import argparse
import asyncio
import contextlib
import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
from tests.soak.asks import CALLS, TEXT, Ask, Place, answer, answers, completions, generate, grpc_infer, token_message
from tests.soak.http_client import Connection, request
from tests.soak.report import Report, milliseconds
from tests.soak.server import DEMO, Server, serving
from tritonclient.grpc import service_pb2 as pb

_SMALL_BUFFER = 4096
_OTHERS = (generate, completions, grpc_infer)
_LOGPROBS = 20
_GRPC_REQUESTS = 3000
"""Sent over one stream whose answers nobody reads; each says its id again."""
_GRPC_ID = "x" * 10_000
_FLOOD_S = 3.0
"""Without a request that is taken: no more are."""
_DONE_S = 300.0
_MIB = 1 << 20


def _completion(number: int, tokens: int, n: int) -> tuple[str, dict[str, Any]]:
    body = {"model": TEXT, "prompt": f"Anna {number}", "max_tokens": tokens, "ignore_eos": True, "stream": True}
    return "/v1/completions", body | {"n": n, "logprobs": _LOGPROBS}


def _generation(number: int, tokens: int, n: int) -> tuple[str, dict[str, Any]]:
    options = {"max_tokens": tokens, "ignore_eos": True, "n": n, "logprobs": _LOGPROBS}
    body = {"text_input": f"Anna {number}", "stream": True, "return_logprobs": True}
    return f"/v2/models/{TEXT}/generate_stream", body | {"sampling_parameters": json.dumps(options)}


class _Reader:
    """A stream of long completions with log-probabilities."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    @classmethod
    async def begin(cls, server: Server, number: int, tokens: int, n: int) -> "_Reader":
        """It has its head, and reads no further."""
        connection = await Connection.open(server.http, receive_buffer=_SMALL_BUFFER)
        path, body = (_completion, _generation)[number % 2](number, tokens, n)
        await connection.send(request("POST", path, json.dumps(body).encode()))
        assert (await connection.head()).status == 200
        return cls(connection)

    async def read(self) -> int:
        """Bytes of all that is left."""
        return sum([len(piece) async for piece in self._connection.pieces()])

    def leave(self) -> None:
        self._connection.leave(reset=True)


async def _others(place: Place, count: int) -> list[float]:
    """What requests of others take, one after the other."""
    seconds: list[float] = []
    for number in range(count):
        began = time.monotonic()
        await answer(_OTHERS[number % len(_OTHERS)], place, Ask(f"Ben {number}", 8))
        seconds.append(time.monotonic() - began)
    return seconds


async def _computed(server: Server) -> None:
    """Until the engine has nothing left to compute, whoever reads it or not."""
    until = time.monotonic() + _DONE_S
    while any(name.startswith("hasten_") for name in await server.busy()):
        assert time.monotonic() < until, "the streams are not computed to their end"
        await asyncio.sleep(0.05)


def _in_buffers(port: int) -> int:
    """Bytes that the system holds for clients of a port: sent, and not received."""
    lines = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    return sum(int(line[4].partition(":")[0], 16) for line in lines if int(line[1].partition(":")[2], 16) == port)


@dataclass
class _Waves:
    """What was seen over several waves of readers: seconds of others, and MiB of the server at the end of each."""

    beside: list[float] = field(default_factory=list)
    """While the readers' streams are computed."""
    behind: list[float] = field(default_factory=list)
    """Once they are computed, and read or not."""
    alone: list[float] = field(default_factory=list)
    """When the readers have left."""
    memory: list[tuple[float, float]] = field(default_factory=list)
    """Before and after what is behind."""
    held: list[float] = field(default_factory=list)
    """MiB of answers that were computed, and that the server kept until they were read."""


async def _wave(place: Place, options: argparse.Namespace, into: _Waves, *, slow: bool) -> None:
    server = place.server
    size = (options.tokens, options.completions)
    found = [await _Reader.begin(server, number, *size) for number in range(options.readers)]
    reading = [] if slow else [asyncio.create_task(reader.read()) for reader in found]
    into.beside += await _others(place, options.others)
    await _computed(server)
    await asyncio.gather(*reading)
    before = server.memory()["server"]
    into.behind += await _others(place, options.others)
    into.memory.append((before, server.memory()["server"]))
    if slow:
        stays, sent = found[0], _in_buffers(server.http)
        into.held.append((await stays.read() - sent / len(found)) / _MIB)
    for reader in found:
        reader.leave()
    await server.idle_after()
    into.alone += await _others(place, options.others)


async def _flood(place: Place, report: Report) -> None:
    """Over one gRPC stream, far more requests than it has room for; its answers are never read."""
    channel = grpc.aio.insecure_channel(f"127.0.0.1:{place.server.grpc}")
    call = channel.stream_stream(f"{CALLS}ModelStreamInfer", pb.ModelInferRequest.SerializeToString)()
    message = token_message(Ask("Anna looked", 1))
    message.id = _GRPC_ID
    sent = 0
    with contextlib.suppress(TimeoutError):
        for _ in range(_GRPC_REQUESTS):
            await asyncio.wait_for(call.write(message), _FLOOD_S)
            sent += 1
    found = {"requests that were taken": sent, "MiB of the server": round(place.server.memory()["server"], 1)}
    report.figures["a gRPC stream that nobody reads"] = found
    report.require(sent < _GRPC_REQUESTS, "the server takes any number of requests whose answers nobody reads")
    call.cancel()
    await channel.close()
    await place.server.idle_after()


def _judge(report: Report, slow: _Waves, fast: _Waves, options: argparse.Namespace) -> None:
    times = {
        "alone": slow.alone,
        "beside readers that read": fast.beside,
        "beside slow readers": slow.beside,
        "with their answers unread": slow.behind,
    }
    report.figures |= {f"ms of others, {name}": milliseconds(values) for name, values in times.items()}
    for name, values, than in (
        ("p50 beside slow readers, against readers that read", slow.beside, fast.beside),
        ("p50 with answers unread, against alone", slow.behind, slow.alone),
    ):
        report.at_most(name, statistics.median(values) / statistics.median(than), options.limit)
    for name, waves in (("readers that read", fast), ("slow readers", slow)):
        report.figures[f"MiB of the server, {name}"] = [round(after, 1) for _, after in waves.memory]
    ends = [after for _, after in slow.memory]
    first = ends[min(1, len(ends) - 1)]
    report.at_most("growth from the second wave to the last", ends[-1] / first - 1, options.growth)
    report.at_most("growth while nobody reads", max(end / begin for begin, end in slow.memory) - 1, options.growth)
    report.figures["MiB of an answer that the server kept, each wave"] = [round(held, 1) for held in slow.held]
    report.require(min(slow.held) > 0, "the answers fit into the system's buffers: ask for more")


async def _run(server: Server, report: Report, options: argparse.Namespace) -> None:
    site = Place.of(server)
    before = await answers(site, Ask("Anna looked", 12))
    slow, fast = _Waves(), _Waves()
    for _ in range(options.waves):
        await _wave(site, options, fast, slow=False)
        await _wave(site, options, slow, slow=True)
    _judge(report, slow, fast, options)
    await _flood(site, report)
    report.require(await answers(site, Ask("Anna looked", 12)) == before, "a proper request got another answer")
    report.require("Traceback" not in server.log, f"the log has a traceback: {server.log[-3000:]}")
    await site.channel.close()


def run(**options: Any) -> Report:
    """With the options of the command line."""
    report = Report("slow_readers", dict(options))
    with serving(str(DEMO)) as server:
        asyncio.run(_run(server, report, argparse.Namespace(**options)))
    return report


def parser() -> argparse.ArgumentParser:
    """Of the command line."""
    result = argparse.ArgumentParser(prog="slow_readers", description=__doc__)
    result.add_argument("--readers", type=int, default=4, help="clients that do not read")
    result.add_argument("--tokens", type=int, default=700, help="of each of their completions")
    result.add_argument(
        "--completions", type=int, default=8, help="of each: they must not fit into the system's buffers"
    )
    result.add_argument("--others", type=int, default=30, help="requests of others, each time")
    result.add_argument("--waves", type=int, default=4, help="times that such clients come")
    result.add_argument("--limit", type=float, default=1.5, help="of the p50 of others, as a ratio")
    result.add_argument("--growth", type=float, default=0.05, help="of the server's memory, as a share")
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    """From the command line."""
    return run(**vars(parser().parse_args(arguments))).tell()
