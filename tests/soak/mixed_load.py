"""Mixed load with clients that leave by chance, for minutes: memory must not grow, and no block may stay in use.

The cache is small, so that all of it is in use after the warm-up: a block that is used for the first time takes memory
that it keeps. In the warm-up there are more clients than later, so that it has seen the largest batches.
"""

import argparse
import asyncio
import random
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import aclosing
from statistics import mean
from typing import Any

from tests.soak.asks import KINDS, Ask, FailedError, Place, answers, name_of
from tests.soak.attacks import generate, openai, triton
from tests.soak.http_client import Connection, NoAnswerError, get
from tests.soak.report import Report, milliseconds
from tests.soak.server import DEMO, Server, sampled, serving

_CLIENTS, _MORE_CLIENTS = 12, 24
_CACHE_BYTES = 64 << 20
_LONGEST = 256
_MOST_TOKENS = 60
_SAMPLE_S = 1.0
_WINDOW = 0.1
"""Share of the time, after the warm-up and at the end, whose means are compared."""
_POINTS = 20
"""Of the memory's curve."""
_LEAVES, _MALFORMED, _LOOKS = 0.25, 0.05, 0.05
"""How many of the requests are withdrawn, malformed, or none but a look at the server."""
_WORDS = (
    "the a of to and in was he she it on with as at his her had said that for Anna Ben Clara David river garden house "
    "letter lamp bread window morning evening storm harbour violin keys coat dog cat market bridge looked walked found"
).split()


class _Clients:
    """What many clients do, and what came of it."""

    def __init__(self, place: Place, seed: int, report: Report) -> None:
        self._place, self._report = place, report
        self._chances = random.Random(seed)
        self.outcomes: Counter[str] = Counter()
        self.seconds: list[float] = []

    async def work(self, until: float) -> None:
        """Ask one thing after the other."""
        while time.monotonic() < until:
            choice = self._chances.random()
            if choice < _MALFORMED:
                await self._attack()
            elif choice < _MALFORMED + _LOOKS:
                await self._look()
            else:
                await self._ask()

    async def _ask(self) -> None:
        chances = self._chances
        kind = chances.choice(KINDS)
        prompt = " ".join(chances.choices(_WORDS, k=chances.randint(1, 24)))
        ask = Ask(prompt, chances.randint(1, _MOST_TOKENS), resets=chances.random() < 0.5)
        patience = chances.expovariate(8) if chances.random() < _LEAVES else None
        began = time.monotonic()
        try:
            async with asyncio.timeout(patience), aclosing(kind(self._place, ask)) as pieces:
                text = "".join([piece async for piece in pieces])
            self.seconds.append(time.monotonic() - began)
            self.outcomes[f"{name_of(kind)}: {'answered' if text else 'nothing'}"] += 1
        except TimeoutError:
            self.outcomes[f"{name_of(kind)}: left"] += 1
        except (FailedError, NoAnswerError) as error:
            self._report.failures.append(f"{name_of(kind)}: {error}")

    async def _attack(self) -> None:
        attack = self._chances.choice((triton, generate, openai))(self._chances)
        connection = await Connection.open(self._place.server.http)
        try:
            await connection.send(attack.raw)
            async with asyncio.timeout(30 if attack.owed else 0.2):
                status = (await connection.answer()).status
            self._report.require(status != 500, f"500 for {attack!r:.1000}")
            self.outcomes["malformed: answered"] += 1
        except (NoAnswerError, TimeoutError):
            self._report.require(not attack.owed, f"no answer for {attack!r:.1000}")
            self.outcomes["malformed: left"] += 1
        finally:
            connection.leave(reset=True)

    async def _look(self) -> None:
        server = self._place.server
        port, path = self._chances.choice(
            [(server.metrics_port, "/metrics"), (server.http, "/v2/models/stats"), (server.http, "/v2/health/ready")]
        )
        status = (await get(port, path)).status
        self._report.require(status == 200, f"{path}: {status}")
        self.outcomes[f"GET {path}"] += 1


def growth(samples: Sequence[dict[str, float]], warm_up: float) -> dict[str, Any]:
    """Of each process, MiB after the warm-up, a share of the time, and at the end, and by which share they differ."""
    window, begin = max(1, int(_WINDOW * len(samples))), int(warm_up * len(samples))
    made: dict[str, Any] = {}
    for name in samples[0]:
        values = [sample[name] for sample in samples]
        first, last = mean(values[begin : begin + window]), mean(values[-window:])
        made[name] = {"start": values[0], "after the warm-up": first, "end": last, "growth": last / first - 1}
    return made


async def _run(server: Server, report: Report, minutes: float, warm_up: float, seed: int, limit: float) -> None:
    site = Place.of(server)
    ask = Ask("Anna looked", 12)
    before = await answers(site, ask)
    clients = _Clients(site, seed, report)
    samples: list[dict[str, float]] = []
    async with sampled(server, _SAMPLE_S, samples):
        began = time.monotonic()
        warm, until = began + 60 * minutes * warm_up, began + 60 * minutes
        await asyncio.gather(
            *(clients.work(until) for _ in range(_CLIENTS)), *(clients.work(warm) for _ in range(_MORE_CLIENTS))
        )
    report.figures["s until all was free"] = round(await server.idle_after(), 3)
    report.require(await answers(site, ask) == before, "a proper request got another answer")
    await site.channel.close()
    report.figures["requests"] = clients.outcomes.total()
    report.figures["ends"] = dict(sorted(clients.outcomes.items()))
    report.figures["ms of an answer"] = milliseconds(clients.seconds)
    for name, found in growth(samples, warm_up).items():
        every = max(1, len(samples) // _POINTS)
        report.figures[f"MiB of the {name}, over time"] = [round(sample[name], 1) for sample in samples[::every]]
        report.figures[f"MiB of the {name}"] = {key: round(value, 4) for key, value in found.items()}
        report.at_most(f"growth of the {name}", found["growth"], limit)
    report.require("Traceback" not in server.log, f"the log has a traceback: {server.log[-3000:]}")


def run(*, minutes: float, warm_up: float = 0.2, seed: int = 0, limit: float = 0.02) -> Report:
    """Load a server for so many minutes."""
    report = Report("mixed_load", {"minutes": minutes, "clients": _CLIENTS})
    options = ("--max-model-len", str(_LONGEST), "--kv-cache-memory", str(_CACHE_BYTES))
    with serving(str(DEMO), *options) as server:
        asyncio.run(_run(server, report, minutes, warm_up, seed, limit))
    return report


def main(arguments: Sequence[str] | None = None) -> int:
    """From the command line."""
    parser = argparse.ArgumentParser(prog="mixed_load", description=__doc__)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--warm-up", type=float, default=0.2, help="share of the time")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit", type=float, default=0.02, help="growth after the warm-up, as a share")
    return run(**vars(parser.parse_args(arguments))).tell()
