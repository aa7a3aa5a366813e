"""SIGTERM: no new work, what is under way is finished, exit status 0; and after the exit timeout it is ended."""

import argparse
import asyncio
import signal
import time
from collections import Counter
from collections.abc import Sequence

from tests.soak.asks import KINDS, WHOLES, Ask, FailedError, Kind, Place, answer, answers, name_of
from tests.soak.http_client import Connection, NoAnswerError, get, request
from tests.soak.report import Report
from tests.soak.server import DEMO, Server, serving

_LONG = 1900
_GRACE_S = 5.0
"""For the exit of a server that has nothing left to wait for, beyond its timeout."""
_REFUSALS = ("503", "UNAVAILABLE")
_RUNNING = "hasten_requests_running"
_PROMPT_TOKENS = "hasten_prefix_cache_query_tokens_total"
"""Counts a prompt once its request has begun, however soon it ends."""
_HELD = '{"model":"demo-model","prompt":"Ben","max_tokens":%d,"ignore_eos":true,"stream":true,"n":8,"logprobs":20}'
"""Some 14 MB, which do not fit into the system's buffers."""
_STUCK = '{"model":"demo-model","prompt":"Anna","max_tokens":%d,"ignore_eos":true,"stream":true,"n":64,"logprobs":20}'


async def _exit(server: Server, began: float) -> float:
    """How long after `began` it ended; it is waited for without end, since a test has its own."""
    while server.process.poll() is None:
        await asyncio.sleep(0.01)
    return time.monotonic() - began


async def _refused(place: Place, report: Report) -> None:
    """What is asked now must be refused, although the server lives."""
    for kind in WHOLES:
        try:
            await answer(kind, place, Ask("Ben", 2))
            report.failures.append(f"{name_of(kind)} was answered after SIGTERM")
        except FailedError as error:
            report.require(error.status in _REFUSALS, f"{name_of(kind)} after SIGTERM: {error}")
    report.require(not await place.server.ready(), "the server is ready after SIGTERM")
    report.require((await get(place.server.http, "/v2/health/live")).status == 200, "not live while work goes on")


async def _sum(server: Server, metric: str) -> float:
    """Of a metric over all models."""
    return sum(value for name, value in (await server.metrics()).items() if name.startswith(f"{metric}{{"))


async def _reaches(server: Server, metric: str, value: float) -> None:
    while await _sum(server, metric) < value:
        await asyncio.sleep(0.02)


async def _finishes(server: Server, report: Report, each: int, tokens: int, grace: float) -> None:
    site = Place.of(server)
    before = await _sum(server, _PROMPT_TOKENS)
    expected = await answers(site, Ask("Anna looked", tokens))
    await server.idle_after()
    of_each = await _sum(server, _PROMPT_TOKENS) - before
    held = await _unread(server, _HELD)  # the server goes on until this one has left
    await _reaches(server, _RUNNING, 1)
    before = await _sum(server, _PROMPT_TOKENS)
    kinds = [kind for kind in KINDS for _ in range(each)]
    tasks = [asyncio.create_task(answer(kind, site, Ask("Anna looked", tokens))) for kind in kinds]
    await _reaches(server, _PROMPT_TOKENS, before + each * of_each)
    signalled = time.monotonic()
    server.process.send_signal(signal.SIGTERM)
    while await site.server.ready():
        await asyncio.sleep(0.01)
    await _refused(site, report)
    held.leave(reset=True)
    found = await asyncio.gather(*tasks, return_exceptions=True)
    worked = time.monotonic() - signalled
    wrong = [
        f"{name_of(kind)} got {got!r:.200}"
        for kind, got in zip(kinds, found, strict=True)
        if got != expected[name_of(kind)]
    ]
    report.require(not wrong, f"{len(wrong)} requests under way were not finished: {wrong[:3]}")
    report.figures["requests under way that were finished"] = sum(isinstance(got, str) for got in found)
    report.figures["s that they took from SIGTERM on"] = round(worked, 2)
    report.at_most("s from the last answer to the exit", await _exit(server, signalled) - worked, grace)
    report.require(server.process.poll() == 0, f"exit status {server.process.poll()}")
    await site.channel.close()


async def _end_of(kind: Kind, place: Place) -> str:
    try:
        await answer(kind, place, Ask("Anna looked", _LONG))
        return "answered"
    except FailedError as error:
        return f"{error.status}{' in mid-stream' if error.begun else ''}"
    except NoAnswerError:
        return "connection closed"


async def _unread(server: Server, body: str) -> Connection:
    """A stream that nobody reads."""
    connection = await Connection.open(server.http, receive_buffer=4096)
    await connection.send(request("POST", "/v1/completions", (body % _LONG).encode()))
    await connection.head()
    return connection


async def _is_cut(server: Server, report: Report, each: int, timeout: float, grace: float) -> None:
    """With more work than the exit timeout allows, and a client that does not read."""
    site = Place.of(server)
    stuck = await _unread(server, _STUCK)
    kinds = [kind for kind in KINDS for _ in range(each)]
    tasks = [asyncio.create_task(_end_of(kind, site)) for kind in kinds]
    await _reaches(server, _RUNNING, len(kinds))
    signalled = time.monotonic()
    server.process.send_signal(signal.SIGTERM)
    ends = Counter(f"{name_of(kind)}: {how}" for kind, how in zip(kinds, await asyncio.gather(*tasks), strict=True))
    seconds = await _exit(server, signalled)
    report.figures["how they were cut off"] = dict(sorted(ends.items()))
    report.require(not any(how.endswith("answered") for how in ends), "the work was too short to be cut off")
    report.at_most(f"s to the exit with an exit timeout of {timeout:g} s", seconds, timeout + grace)
    report.require(seconds >= timeout, "the exit timeout was not waited for")
    report.require(server.process.poll() == 0, f"exit status {server.process.poll()} after the exit timeout")
    stuck.leave()
    await site.channel.close()


def run(*, each: int, tokens: int, timeout: float, grace: float = _GRACE_S) -> Report:
    """With `each` requests under way over each transport, of so many tokens; and with longer ones than the timeout."""
    report = Report("termination")
    with serving(str(DEMO), "--exit-timeout-secs", "120") as server:
        asyncio.run(_finishes(server, report, each, tokens, grace))
        report.require("Traceback" not in server.log, f"the log has a traceback: {server.log[-3000:]}")
    with serving(str(DEMO), "--exit-timeout-secs", str(timeout)) as server:
        engines = server.engines
        asyncio.run(_is_cut(server, report, each, timeout, grace))
        report.require(not any(map(server.lives, engines)), "the engine's process outlived the server")
        report.require("Traceback" not in server.log, f"the log has a traceback: {server.log[-3000:]}")
    return report


def main(arguments: Sequence[str] | None = None) -> int:
    """From the command line."""
    parser = argparse.ArgumentParser(prog="termination", description=__doc__)
    parser.add_argument("--each", type=int, default=8, help="requests over each transport")
    parser.add_argument("--tokens", type=int, default=200, help="of each request that is to be finished")
    parser.add_argument("--grace", type=float, default=_GRACE_S, help="seconds for the exit itself")
    parser.add_argument("--timeout", type=float, default=2.0, help="exit timeout for requests that are longer")
    return run(**vars(parser.parse_args(arguments))).tell()
