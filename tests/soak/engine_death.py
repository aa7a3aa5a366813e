"""The engine's process is killed while requests are under way: they must end, and it must come back."""

import argparse
import asyncio
import os
import signal
import time
from collections import Counter
from collections.abc import Sequence

from tests.soak.asks import KINDS, Ask, FailedError, Kind, Place, answer, answers, name_of
from tests.soak.report import Report, milliseconds
from tests.soak.server import DEMO, Server, serving

_TOKENS = 1800
_ERROR_S = 2.0
_BACK_S = 60.0
_EXPECTED = {"503", "UNAVAILABLE", "200 in mid-stream", "OK in mid-stream", "200", "OK"}
"""How a request may end: refused, or with an error in its stream."""


async def _ended(kind: Kind, place: Place, tokens: int = _TOKENS) -> tuple[float, str]:
    """When a request ended, and how."""
    try:
        await answer(kind, place, Ask("Anna looked", tokens))
        return time.monotonic(), "answered"
    except FailedError as error:
        return time.monotonic(), f"{error.status}{' in mid-stream' if error.begun else ''}"
    except Exception as error:
        return time.monotonic(), repr(error)


async def _round(place: Place, each: int, report: Report, ends: Counter[str]) -> dict[str, list[float]]:
    """Kill it once; the times from then on."""
    server = place.server
    tasks = {asyncio.create_task(_ended(kind, place)): kind for kind in KINDS for _ in range(each)}
    while sum((await server.busy()).values()) < len(tasks):
        await asyncio.sleep(0.02)
    (engine,) = server.engines
    killed = time.monotonic()
    os.kill(engine, signal.SIGKILL)
    unready = asyncio.create_task(server.until_ready(False, _BACK_S))
    found = await asyncio.gather(*tasks)
    times = {"error": [moment - killed for moment, _ in found]}
    for kind, (_, how) in zip(tasks.values(), found, strict=True):
        ends[f"{name_of(kind)}: {how}"] += 1
        report.require(how in _EXPECTED, f"a request over {name_of(kind)} ended with {how}")
    times["not ready"] = [await unready]
    meanwhile = asyncio.gather(*(_ended(kind, place, 4) for kind in KINDS))
    await server.until_ready(True, _BACK_S)
    times["ready again"] = [time.monotonic() - killed]
    await answers(place, Ask("Anna looked", 4))
    times["answers again"] = [time.monotonic() - killed]
    for kind, (_, how) in zip(KINDS, await meanwhile, strict=True):
        ends[f"asked meanwhile, {name_of(kind)}: {how}"] += 1
        report.require(how in ("answered", "503"), f"asked meanwhile over {name_of(kind)}: {how}")
    return times


async def _run(server: Server, report: Report, rounds: int, each: int, limit: float) -> None:
    site = Place.of(server)
    before = await answers(site, Ask("Anna looked", 12))
    times: dict[str, list[float]] = {}
    ends: Counter[str] = Counter()
    for _ in range(rounds):
        for name, values in (await _round(site, each, report, ends)).items():
            times.setdefault(name, []).extend(values)
        report.require(await answers(site, Ask("Anna looked", 12)) == before, "a request got another answer")
    report.figures["ends"] = dict(sorted(ends.items()))
    report.figures |= {f"ms until {name}": milliseconds(values) for name, values in times.items()}
    report.at_most("s until the last error", max(times["error"]), limit)
    report.at_most("s until not ready", max(times["not ready"]), limit)
    await server.idle_after()
    report.require("Traceback" not in server.log, f"the log has a traceback: {server.log[-3000:]}")
    await site.channel.close()


def run(*, rounds: int, each: int, limit: float = _ERROR_S) -> Report:
    """Kill the engine so many times, with `each` requests under way over each transport."""
    report = Report("engine_death", {"kills": rounds, "requests each time": each * len(KINDS)})
    with serving(str(DEMO)) as server:
        asyncio.run(_run(server, report, rounds, each, limit))
    return report


def main(arguments: Sequence[str] | None = None) -> int:
    """From the command line."""
    parser = argparse.ArgumentParser(prog="engine_death", description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--each", type=int, default=3, help="requests over each transport")
    parser.add_argument(
        "--limit", type=float, default=_ERROR_S, help="seconds until all have errors, and it is not ready"
    )
    return run(**vars(parser.parse_args(arguments))).tell()
