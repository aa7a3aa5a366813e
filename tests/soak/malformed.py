"""Malformed requests over each transport: none may be the server's fault, and nothing may be left behind of any."""

import argparse
import asyncio
import contextlib
import os
import random
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import TypeVar

import grpc
from tests.encoders import save_encoder
from tests.soak import nasty
from tests.soak.asks import CALLS, Ask, Place, answers
from tests.soak.attacks import REGION, GrpcAttack, HttpAttack, generate, openai, over_grpc, triton
from tests.soak.http_client import Answer, Connection, NoAnswerError, post
from tests.soak.pooling_attacks import BY_HAND, VECTOR_TOKENS, VECTORS, pooling
from tests.soak.report import Report, leak
from tests.soak.server import DEMO, Server, create_repository, serving

_ANSWER_S, _UNOWED_S = 60.0, 0.2
_CLIENTS = 16
_STATES = (501, 503)
"""Of the server or its models: not supported, not available."""
_KEPT = 20
"""Failures that are shown."""
_OWN_FAULT = ("internal error", "server's log says more")
_AS_TRITON = ("failed to poll from model repository", "should be at least")
"""What Triton calls internal although it is the client's fault, as clients of Triton know it."""
_TEMPLATE = "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}assistant:"

Attack = TypeVar("Attack", HttpAttack, GrpcAttack)


@dataclass
class Tally:
    """What came back over one transport."""

    codes: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    slowest: tuple[float, str] = (0.0, "")
    """Seconds, and what took them."""

    def timed(self, began: float, what: object) -> None:
        """Keep what took longest."""
        self.slowest = max(self.slowest, (time.monotonic() - began, f"{what!r:.300}"))

    def take(self, code: str, text: str, what: object, *, fault: bool) -> None:
        """Count an answer; `fault`: its code says that it is the server's."""
        if fault and any(known in text for known in _AS_TRITON):
            code, fault = f"{code} as Triton", False
        self.codes[code] += 1
        if fault or any(said in text for said in _OWN_FAULT) or (code not in ("200", "OK") and leak(text)):
            self.wrong.append(f"{code} {text[:300]!r} for {what!r:.2000}")


async def send_all(port: int, attacks: Iterator[HttpAttack], tally: Tally) -> None:
    """Send one after the other, over one connection for as long as it lasts."""
    connection: Connection | None = None
    for attack in attacks:
        connection = connection or await Connection.open(port)
        began = time.monotonic()
        try:
            await connection.send(attack.raw)
            answer = await asyncio.wait_for(connection.answer(), _ANSWER_S if attack.owed else _UNOWED_S)
            _judge(answer, attack, tally)
        except (NoAnswerError, TimeoutError) as error:
            code = "none" if attack.owed else "none owed"
            tally.take(code, f"{type(error).__name__} {error}", attack, fault=attack.owed)
        tally.timed(began, attack)
        if not (attack.owed and connection.keeps_alive):
            connection.leave()
            connection = None
    if connection is not None:
        connection.leave()


def _judge(answer: Answer, attack: HttpAttack, tally: Tally) -> None:
    text = answer.body.decode(errors="replace")
    tally.take(str(answer.status), text, attack, fault=answer.status >= 500 and answer.status not in _STATES)


async def _grpc(place: Place, streams: grpc.Channel, attacks: Iterator[GrpcAttack], tally: Tally) -> None:
    for attack in attacks:
        began = time.monotonic()
        code, text = await _called(place, streams, attack)
        tally.timed(began, attack)
        tally.take(code, text, attack, fault=code in ("INTERNAL", "UNKNOWN", "DEADLINE_EXCEEDED"))


async def _called(place: Place, streams: grpc.Channel, attack: GrpcAttack) -> tuple[str, str]:
    try:
        if attack.method == "ModelStreamInfer":
            return await asyncio.to_thread(_streamed, streams, attack)
        call = place.channel.unary_unary(CALLS + attack.method)
        return "OK", repr(await call(attack.messages[0], timeout=_ANSWER_S))
    except grpc.RpcError as error:
        return error.code().name, error.details() or ""


def _streamed(streams: grpc.Channel, attack: GrpcAttack) -> tuple[str, str]:
    """With a client that blocks: the other one cannot tell how a stream ended that it still wrote to."""
    call = streams.stream_stream(CALLS + attack.method)
    return "OK", " ".join(map(repr, call(iter(attack.messages), timeout=_ANSWER_S)))


async def _raw(port: int) -> None:
    """Bytes that are no gRPC; whatever comes back, the server goes on."""
    for raw in nasty.RAW_GRPC:
        connection = await Connection.open(port)
        with contextlib.suppress(Exception):
            await connection.send(raw)
            await asyncio.wait_for(connection.answer(), _UNOWED_S)
        connection.leave(reset=True)


def _chances(make: Callable[[random.Random], Attack], name: str, seed: int, count: int) -> Iterator[Attack]:
    return (make(random.Random(f"{seed} {name} {number}")) for number in range(count))


async def _attack(place: Place, count: int, seed: int) -> dict[str, Tally]:
    """Send so many requests over each transport, those written by hand among them."""
    port = place.server.http
    tallies: dict[str, Tally] = {}
    doors: tuple[tuple[str, Callable[[random.Random], HttpAttack], Sequence[HttpAttack]], ...] = (
        ("http", triton, nasty.TRITON),
        ("generate", generate, nasty.GENERATE),
        ("openai", openai, nasty.OPENAI),
        ("pooling", pooling, BY_HAND),
    )
    for name, make, by_hand in doors:
        tally = tallies[name] = Tally()
        attacks = chain(by_hand, _chances(make, name, seed, max(0, count - len(by_hand))))
        await _side_by_side([send_all(port, attacks, tally) for _ in range(_CLIENTS)])
    tally = tallies["grpc"] = Tally()
    calls = chain(nasty.GRPC, _chances(over_grpc, "grpc", seed, max(0, count - len(nasty.GRPC))))
    with grpc.insecure_channel(f"127.0.0.1:{place.server.grpc}") as streams:
        await _side_by_side([_grpc(place, streams, calls, tally) for _ in range(_CLIENTS)])
    await _raw(place.server.grpc)
    return tallies


async def _side_by_side(clients: Sequence[Awaitable[None]]) -> None:
    await asyncio.gather(*clients)


@contextlib.contextmanager
def _region(server: Server) -> Iterator[None]:
    """A region of shared memory that is there."""
    path = Path("/dev/shm") / f"hasten-soak-{os.getpid()}"
    path.write_bytes(bytes(1024))
    body = {"key": f"/{path.name}", "byte_size": 1024}
    try:
        answer = asyncio.run(post(server.http, f"/v2/systemsharedmemory/region/{REGION}/register", body))
        assert answer.status == 200, answer
        yield
    finally:
        path.unlink()


@contextlib.contextmanager
def _repository() -> Iterator[Path]:
    """The demo model's repository, with a chat template, and short sequences."""
    with tempfile.TemporaryDirectory() as folder:
        model = Path(shutil.copytree(DEMO, Path(folder) / DEMO.name))
        (model / "chat_template.jinja").write_text(_TEMPLATE)
        encoder = save_encoder(Path(folder) / VECTORS, "Bert", num_hidden_layers=2)
        create_repository(encoder, Path(folder) / "models", "--name", VECTOR_TOKENS)
        yield create_repository(model, Path(folder) / "models", "--max-model-len", "64")


async def _run(server: Server, report: Report, count: int, seed: int) -> None:
    site = Place.of(server)
    before = await answers(site, Ask("Anna looked", 12))
    engines = server.engines
    tallies = await _attack(site, count, seed)
    report.figures["seconds until all blocks were free"] = round(await server.idle_after(), 3)
    report.require(await answers(site, Ask("Anna looked", 12)) == before, "a proper request got another answer")
    await site.channel.close()
    for name, tally in tallies.items():
        report.figures[name] = {"requests": tally.codes.total(), **dict(sorted(tally.codes.items()))}
        report.figures[name]["slowest"] = {"ms": round(1000 * tally.slowest[0]), "request": tally.slowest[1]}
        report.failures += [f"{name}: {text}" for text in tally.wrong[:_KEPT]]
        report.require(tally.codes.total() >= count, f"{name}: only {tally.codes.total()} requests were judged")
    report.require(server.process.poll() is None, "the server has ended")
    report.require(
        len(engines) == 2 and server.engines == engines, f"the engines' processes were {engines}, are {server.engines}"
    )
    _, traceback, rest = server.log.partition("Traceback")
    report.require(not traceback, f"the log has a traceback: {rest[:3000]}")


def run(*, requests: int, seed: int = 0) -> Report:
    """Send so many malformed requests over each transport."""
    report = Report("malformed")
    with _repository() as models:
        control = ("--model-control-mode", "explicit", "--load-model", "*", "--allow-client-shm")
        with serving("--model-repository", str(models), *control) as server, _region(server):
            asyncio.run(_run(server, report, requests, seed))
    return report


def main(arguments: Sequence[str] | None = None) -> int:
    """From the command line."""
    parser = argparse.ArgumentParser(prog="malformed", description=__doc__)
    parser.add_argument("--requests", type=int, default=10_000, help="over each transport")
    parser.add_argument("--seed", type=int, default=0)
    return run(**vars(parser.parse_args(arguments))).tell()
