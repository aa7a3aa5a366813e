"""Clients that leave in mid-stream, in every way a client can: what they asked for must be forgotten at once."""

import argparse
import asyncio
import random
import time
from collections import Counter
from collections.abc import AsyncGenerator, Sequence

from tests.soak.asks import STREAMS, WHOLES, Ask, Kind, Place, answers, grpc_stream, name_of
from tests.soak.report import Report
from tests.soak.server import DEMO, Server, serving

_TOKENS = 1900
"""Far more than anybody stays for."""
_LEAST_PIECES, _MOST_PIECES = 1, 4
_LIMIT_S = 1.0


class _Client:
    """One that reads a few pieces of an answer and then waits to leave."""

    def __init__(self, place: Place, kind: Kind, number: int, chances: random.Random) -> None:
        self._place = place if kind is not grpc_stream or chances.random() < 0.5 else Place.of(place.server)
        self.own_channel = self._place is not place
        self._resets = chances.random() < 0.5
        self._pieces = chances.randint(_LEAST_PIECES, _MOST_PIECES)
        self.way = f"{name_of(kind)}, {self._how(kind)}"
        self._stream: AsyncGenerator[str, None] = kind(self._place, Ask(f"Anna {number}", _TOKENS, self._resets))

    def _how(self, kind: Kind) -> str:
        if kind is grpc_stream:
            return "channel closed" if self.own_channel else "call cancelled"
        return "connection reset" if self._resets else "connection closed"

    async def arrive(self) -> None:
        """Read a few pieces."""
        for _ in range(self._pieces):
            await anext(self._stream)

    async def leave(self) -> None:
        if self.own_channel:
            await self._place.channel.close()
        await self._stream.aclose()


async def _mid_stream(place: Place, count: int, chances: random.Random, report: Report) -> float:
    """How long after the last one left everything was free."""
    clients = [_Client(place, STREAMS[number % len(STREAMS)], number, chances) for number in range(count)]
    await asyncio.gather(*(client.arrive() for client in clients))
    busy = await place.server.busy()
    running = sum(value for name, value in busy.items() if name.startswith("hasten_requests_running"))
    report.require(running == count, f"{running:g} requests ran when {count} clients were to leave")
    await asyncio.gather(*(client.leave() for client in clients))
    report.figures["ways of leaving"] = dict(Counter(client.way for client in clients))
    return await place.server.idle_after()


async def _waiting(place: Place, count: int) -> float:
    """The same of clients that had got nothing yet, of calls that answer once."""
    kinds = [WHOLES[number % len(WHOLES)] for number in range(count)]
    asks = [Ask(f"Ben {number}", _TOKENS, number % 2 == 0) for number in range(count)]
    tasks = [asyncio.create_task(anext(kind(place, ask))) for kind, ask in zip(kinds, asks, strict=True)]
    until = time.monotonic() + 60
    while sum((await place.server.busy()).values()) < count and time.monotonic() < until:
        await asyncio.sleep(0.05)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    return await place.server.idle_after()


async def _run(server: Server, report: Report, clients: int, seed: int, limit: float) -> None:
    site = Place.of(server)
    before = await answers(site, Ask("Anna looked", 12))
    seconds = await _mid_stream(site, clients, random.Random(seed), report)
    report.at_most("s until all was free, left in mid-stream", seconds, limit)
    report.at_most("s until all was free, left before the answer", await _waiting(site, clients), limit)
    report.require(await answers(site, Ask("Anna looked", 12)) == before, "a proper request got another answer")
    report.require("Traceback" not in server.log, f"the log has a traceback: {server.log[-3000:]}")
    await site.channel.close()


def run(*, clients: int, seed: int = 0, limit: float = _LIMIT_S) -> Report:
    """Let so many clients leave at once."""
    report = Report("departures", {"clients": clients})
    with serving(str(DEMO)) as server:
        asyncio.run(_run(server, report, clients, seed, limit))
    return report


def main(arguments: Sequence[str] | None = None) -> int:
    """From the command line."""
    parser = argparse.ArgumentParser(prog="departures", description=__doc__)
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit", type=float, default=_LIMIT_S, help="seconds until all blocks are free")
    return run(**vars(parser.parse_args(arguments))).tell()
