"""Models are loaded, unloaded and loaded again under load: what was accepted is answered, and answered rightly."""

import argparse
import asyncio
import itertools
import random
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

from tests.soak.asks import KINDS, TEXT, TOKENS, Ask, FailedError, Kind, Place, answer, answers, name_of
from tests.soak.http_client import post
from tests.soak.report import Report, milliseconds
from tests.soak.server import DEMO, Server, create_repository, serving
from tests.waiting import LIMIT_S

_CLIENTS = 8
_ASKS = (Ask("Anna looked", 3), Ask("Ben found", 40), Ask("The storm", 250))
_PAUSE_S, _REFUSED_S = 0.02, 0.2
"""Between two requests of a client, and more after one that was refused."""
_REFUSALS = {
    "404": ("is not found", "has no available versions", "does not exist"),
    "NOT_FOUND": ("is not found", "has no available versions"),
    "503": ("is not at ready state", "takes no new requests", "is not ready"),
    "UNAVAILABLE": ("is not at ready state", "takes no new requests"),
}
"""How a model is refused that is not there."""


def is_refusal(error: FailedError) -> bool:
    """Whether the request was refused since its model is not there; a stream tells it with an error of its own."""
    texts = _REFUSALS.get(error.status, _REFUSALS["404"] if error.status in ("200", "OK") else ())
    return not error.begun and any(text in error.message for text in texts)


class _Clients:
    """Ask all the time, and know what the answers must be."""

    def __init__(self, place: Place, expected: dict[int, dict[str, str]], report: Report) -> None:
        self._place, self._expected, self._report = place, expected, report
        self.ends: Counter[str] = Counter()
        self.done = False

    async def work(self, chances: random.Random) -> None:
        while not self.done:
            await self._ask(chances.randrange(len(_ASKS)), chances.choice(KINDS))
            await asyncio.sleep(_PAUSE_S)

    async def _ask(self, number: int, kind: Kind) -> None:
        name = name_of(kind)
        try:
            got = await answer(kind, self._place, _ASKS[number])
        except FailedError as error:
            how = "refused" if is_refusal(error) else f"lost: {error}"
        except Exception as error:
            how = f"lost: {error!r}"
        else:
            how = "answered" if got == self._expected[number][name] else f"wrong answer: {got!r:.300}"
        self.ends[f"{name}: {how.partition(':')[0]}"] += 1
        self._report.require(how in ("answered", "refused"), f"{name}: {how}")
        if how == "refused":
            await asyncio.sleep(_REFUSED_S)


async def _control(server: Server, action: str, model: str, *, status: int = 200, **parameters: str) -> None:
    found = await post(server.http, f"/v2/repository/models/{model}/{action}", {"parameters": parameters})
    assert found.status == status, f"{action} {model}: {found}"


async def _reload(server: Server, model: str) -> None:
    """Load what serves: the old one serves until the new one does."""
    await _control(server, "load", model)


async def _replace(server: Server, model: str) -> None:
    """Unload and load; in between nobody is served."""
    await _control(server, "unload", model)
    await asyncio.sleep(0.3)
    await _control(server, "load", model)


async def _fail(server: Server, model: str) -> None:
    """Load it with a configuration that cannot be; the old one goes on."""
    config = '{"backend": "hasten", "parameters": {"kind": {"string_value": "token"}, "x": {"string_value": "y"}}}'
    await _control(server, "load", model, status=400, config=config)


_CHANGES: tuple[tuple[str, Callable[[Server, str], Awaitable[None]], str], ...] = (
    ("load the token model again", _reload, TOKENS),
    ("unload and load the text model", _replace, TEXT),
    ("unload and load the token model", _replace, TOKENS),
    ("load the text model again", _reload, TEXT),
    ("fail to load the token model", _fail, TOKENS),
)


async def _one_engine(server: Server) -> float:
    """How long it took until the engines that were replaced had ended."""
    began = time.monotonic()
    while len(server.engines) != 1:
        assert time.monotonic() - began < LIMIT_S, f"engines: {server.engines}"
        await asyncio.sleep(0.05)
    return time.monotonic() - began


async def _run(server: Server, report: Report, rounds: int, pause: float, seed: int) -> None:
    site = Place.of(server)
    expected = {number: await answers(site, ask) for number, ask in enumerate(_ASKS)}
    clients = _Clients(site, expected, report)
    tasks = [asyncio.create_task(clients.work(random.Random(f"{seed} {number}"))) for number in range(_CLIENTS)]
    seconds: dict[str, list[float]] = {}
    for name, change, model in itertools.islice(itertools.cycle(_CHANGES), rounds * len(_CHANGES)):
        await asyncio.sleep(pause)
        began = time.monotonic()
        await change(server, model)
        seconds.setdefault(name, []).append(time.monotonic() - began)
    clients.done = True
    await asyncio.gather(*tasks)
    report.figures["s until one engine was left"] = round(await _one_engine(server), 2)
    report.figures["s until all was free"] = round(await server.idle_after(), 3)
    await site.channel.close()
    report.figures["ends"] = dict(sorted(clients.ends.items()))
    report.figures |= {f"ms to {name}": milliseconds(values) for name, values in seconds.items()}
    report.require(any("answered" in end for end in clients.ends), "nothing was answered")
    report.require("Traceback" not in server.log, f"the log has a traceback: {server.log[-3000:]}")


def run(*, rounds: int, pause: float = 2.0, seed: int = 0) -> Report:
    """Go through all changes so many times."""
    report = Report("reload", {"rounds": rounds, "clients": _CLIENTS})
    with tempfile.TemporaryDirectory() as folder:
        models = create_repository(DEMO, Path(folder) / "models")
        control = ("--model-control-mode", "explicit", "--load-model", "*")
        with serving("--model-repository", str(models), *control) as server:
            asyncio.run(_run(server, report, rounds, pause, seed))
    return report


def main(arguments: Sequence[str] | None = None) -> int:
    """From the command line."""
    parser = argparse.ArgumentParser(prog="reload", description=__doc__)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--pause", type=float, default=2.0, help="seconds between two changes")
    parser.add_argument("--seed", type=int, default=0)
    return run(**vars(parser.parse_args(arguments))).tell()
