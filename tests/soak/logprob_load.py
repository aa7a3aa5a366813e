"""Log-probabilities of prompts, as evaluation harnesses request them, beside streams: memory must not grow.

Every answer is compared with what an idle server said of the same prompt.
"""

import argparse
import asyncio
import random
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import aclosing

from tests.soak.asks import TEXT, Ask, FailedError, Place, check, completions_stream, grpc_stream, name_of
from tests.soak.http_client import NoAnswerError, post
from tests.soak.mixed_load import growth
from tests.soak.report import Report, milliseconds
from tests.soak.server import DEMO, Server, sampled, serving

_SCORERS, _BATCH = 4, 8
"""Clients that request log-probabilities at the same time, and the prompts of each request."""
_STREAMS, _STREAM_TOKENS = 6, 60
_PROMPTS = 256
_LONGEST = 256
"""Tokens of a prompt and its outputs."""
_CACHE_BYTES = 64 << 20
_SAMPLE_S = 1.0
_POINTS = 20
"""Of the memory's curve."""
_TOLERANCE = 1e-3
"""Of a log-probability: sums are taken in another order with other requests beside them."""
_FIRST_ID, _LAST_ID = 4, 259
"""Tokens of single bytes."""

Scores = list[float]


async def _scores(place: Place, prompts: Sequence[list[int]]) -> list[Scores]:
    """Log-probabilities of the tokens of each prompt, but for its first, which has none."""
    options = {"max_tokens": 1, "temperature": 0, "logprobs": 1, "echo": True, "seed": 1234}
    answer = await post(place.server.http, "/v1/completions", {"model": TEXT, "prompt": prompts, **options})
    check(answer)
    found = [choice["logprobs"] for choice in answer.json()["choices"]]
    for prompt, logprobs in zip(prompts, found, strict=True):
        lengths = {name: len(values) for name, values in logprobs.items()}
        if set(lengths.values()) != {len(prompt) + 1}:
            raise FailedError("200", f"a prompt of {len(prompt)} tokens and an output of 1 has {lengths}")
    return [logprobs["token_logprobs"][1:-1] for logprobs in found]


class _Load:
    """Clients of both kinds, and what came of their requests."""

    def __init__(self, place: Place, seed: int, report: Report) -> None:
        self._place, self._report = place, report
        self._chances = random.Random(seed)
        lengths = [self._chances.randint(2, _LONGEST - 2) for _ in range(_PROMPTS)]
        self._prompts = [self._chances.choices(range(_FIRST_ID, _LAST_ID + 1), k=length) for length in lengths]
        self._expected: list[Scores] = []
        self.outcomes: Counter[str] = Counter()
        self.seconds: list[float] = []
        self.scored = 0
        """Tokens."""
        self.furthest = 0.0
        """Largest difference of a log-probability from that of an idle server."""

    async def prepare(self) -> None:
        """Learn what the right answers are, while nothing else is computed."""
        for begin in range(0, _PROMPTS, _BATCH):
            self._expected += await _scores(self._place, self._prompts[begin : begin + _BATCH])

    async def score(self, until: float) -> None:
        """Request log-probabilities, one batch after the other."""
        while time.monotonic() < until:
            chosen = self._chances.sample(range(_PROMPTS), _BATCH)
            began = time.monotonic()
            try:
                found = await _scores(self._place, [self._prompts[number] for number in chosen])
            except (FailedError, NoAnswerError) as error:
                self._fail("log-probabilities", error)
                continue
            self.seconds.append(time.monotonic() - began)
            self.outcomes["log-probabilities"] += 1
            for number, scores in zip(chosen, found, strict=True):
                self.scored += len(scores)
                pairs = zip(scores, self._expected[number], strict=True)
                self.furthest = max(self.furthest, *(abs(score - right) for score, right in pairs))

    async def stream(self, until: float) -> None:
        """Read one stream after the other."""
        while time.monotonic() < until:
            kind = self._chances.choice((completions_stream, grpc_stream))
            ask = Ask(f"Anna looked {self._chances.random()}", _STREAM_TOKENS)
            try:
                async with aclosing(kind(self._place, ask)) as pieces:
                    text = "".join([piece async for piece in pieces])
            except (FailedError, NoAnswerError) as error:
                self._fail(name_of(kind), error)
                continue
            self._report.require(bool(text), f"{name_of(kind)}: an empty stream")
            self.outcomes[name_of(kind)] += 1

    def _fail(self, what: str, error: Exception) -> None:
        self.outcomes[f"{what}: failed"] += 1
        self._report.failures.append(f"{what}: {error}")


async def _run(server: Server, report: Report, minutes: float, warm_up: float, seed: int, limit: float) -> None:
    site = Place.of(server)
    load = _Load(site, seed, report)
    await load.prepare()
    samples: list[dict[str, float]] = []
    async with sampled(server, _SAMPLE_S, samples):
        until = time.monotonic() + 60 * minutes
        scorers = [load.score(until) for _ in range(_SCORERS)]
        await asyncio.gather(*scorers, *(load.stream(until) for _ in range(_STREAMS)))
    report.figures["s until all was free"] = round(await server.idle_after(), 3)
    await site.channel.close()
    report.figures["requests"] = dict(sorted(load.outcomes.items()))
    report.figures["tokens scored"] = load.scored
    report.figures["ms of a batch"] = milliseconds(load.seconds)
    report.at_most("difference of a log-probability", load.furthest, _TOLERANCE)
    for name, found in growth(samples, warm_up).items():
        every = max(1, len(samples) // _POINTS)
        report.figures[f"MiB of the {name}, over time"] = [round(sample[name], 1) for sample in samples[::every]]
        report.figures[f"MiB of the {name}"] = {key: round(value, 4) for key, value in found.items()}
        report.at_most(f"growth of the {name}", found["growth"], limit)
    report.require("Traceback" not in server.log, f"the log has a traceback: {server.log[-3000:]}")


def run(*, minutes: float, warm_up: float = 0.2, seed: int = 0, limit: float = 0.02) -> Report:
    """Load a server for so many minutes."""
    report = Report("logprob_load", {"minutes": minutes, "clients": _SCORERS + _STREAMS})
    options = ("--max-model-len", str(_LONGEST), "--kv-cache-memory", str(_CACHE_BYTES))
    with serving(str(DEMO), *options) as server:
        asyncio.run(_run(server, report, minutes, warm_up, seed, limit))
    return report


def main(arguments: Sequence[str] | None = None) -> int:
    """From the command line."""
    parser = argparse.ArgumentParser(prog="logprob_load", description=__doc__)
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--warm-up", type=float, default=0.2, help="share of the time")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit", type=float, default=0.02, help="growth after the warm-up, as a share")
    return run(**vars(parser.parse_args(arguments))).tell()
