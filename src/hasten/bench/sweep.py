"""A served model with increasing numbers of requests in flight: throughput of all users, and of each."""

import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from hasten.bench.load.arrivals import AT_ONCE
from hasten.bench.load.client import ClientOptions
from hasten.bench.load.lengths import Lengths
from hasten.bench.load.measure import LoadOptions, measure
from hasten.bench.load.metrics import LoadResult
from hasten.bench.load.prompts import PromptWriter
from hasten.bench.load.target import Target, find_target
from hasten.bench.load.workload import Schedule, Workload, WorkloadOptions
from hasten.bench.power import Power, metered
from hasten.bench.served import HOST, TOKEN_MODEL, served
from hasten.bench.slo import Slo
from hasten.core.config import EngineConfig
from hasten.core.errors import ConfigError
from hasten.engine.text import Tokenizer
from hasten.server.create import has_tokenizer

# without the text of end tokens, which --ignore-eos may bring, their events would be missing
_SAMPLING = {"temperature": 0.0, "ignore_eos": True, "skip_special_tokens": False}
_GAIN = 1.03
"""Of the throughput, below which a larger concurrency is taken to bring nothing."""


@dataclass(frozen=True)
class Point:
    """A concurrency, and what was measured with this number of requests in flight."""

    concurrency: int
    load: LoadResult
    user_tokens_per_second: float | None
    """Of a user who reads the median stream; None where tokens are not counted."""
    power: Power | None
    joules_per_token: float | None
    """Of output tokens; None without GPUs."""


@dataclass(frozen=True)
class Sweep:
    """A server under one workload at several concurrencies."""

    label: str
    address: str
    prompt_length: int
    output_length: int
    points: list[Point]
    prompts: LoadResult
    """The same prompts with one token of output each, at the largest concurrency."""
    start_s: float | None
    """Seconds until the server was ready; None where it ran already."""


@dataclass(frozen=True, kw_only=True)
class SweepOptions:
    """What is measured at each concurrency."""

    prompt_length: int = 128
    output_length: int = 128
    least_requests: int = 16
    rounds: int = 3
    """Requests per concurrency."""

    def requests(self, concurrency: int) -> int:
        """Requests of a run."""
        return max(self.least_requests, self.rounds * concurrency)


@dataclass(frozen=True)
class Server:
    """A server that can be measured."""

    label: str
    target: Target
    writer: PromptWriter
    start_s: float | None = None
    gpus: Sequence[str] = ()
    """Ids of the GPUs that it computes on, where it runs on this machine."""

    def run(self, concurrency: int, options: SweepOptions, *, output_length: int | None = None) -> Point:
        """Measure with this number of requests in flight, each sent when another ends."""
        length = output_length or options.output_length
        # each run has prompts of its own, so that none is in a cache
        requests = WorkloadOptions(
            prompt_length=Lengths(options.prompt_length, options.prompt_length),
            output_length=Lengths(length, length),
            seed=2 * concurrency + (output_length is not None),
        )
        workload = Workload(requests, self.writer, takes_ids=True)
        schedule = Schedule(rate=AT_ONCE, num_prompts=options.requests(concurrency))
        client = ClientOptions(target=self.target, max_concurrency=concurrency)
        load = LoadOptions(schedules=[schedule], warm_ups=2, show_progress=False)
        with metered(self.gpus) as meter:
            [(result, end)] = [(each, time.time()) for each in measure(client, workload, self.writer, load)]
        return _point(concurrency, result, meter.between(end - result.duration, end))


def _point(concurrency: int, result: LoadResult, power: Power | None) -> Point:
    per_token = result.tpot or result.itl
    joules = None
    if power is not None and result.output_throughput:
        joules = power.watts / result.output_throughput
    return Point(concurrency, result, None if per_token is None else 1000 / per_token.p50, power, joules)


@contextmanager
def started(engine: EngineConfig, gpus: Sequence[str] = ()) -> Iterator[Server]:
    """A server of a model, started for as long as the block runs; EngineError where it does not start."""
    if not has_tokenizer(engine):
        raise ConfigError(f"{engine.model} has no tokenizer, and texts cannot be served; give --tokenizer-path")
    writer = PromptWriter(Tokenizer.from_folder(engine.tokenizer or engine.model))
    with tempfile.TemporaryDirectory() as folder, served(engine, Path(folder, "log")) as server:
        target = find_target("openai", f"http://{HOST}:{server.http_port}", TOKEN_MODEL, {}, _SAMPLING, {})
        yield Server("hasten", target, writer, server.start_s, gpus)


def running(url: str, writer: PromptWriter) -> Server:
    """A server of OpenAI's API at a URL; EngineError where it does not answer."""
    return Server("openai", find_target("openai", url, None, {}, _SAMPLING, {}), writer)


def sweep(
    server: Server,
    concurrencies: Sequence[int],
    options: SweepOptions,
    say: Callable[[str], None] = lambda _: None,
) -> Sweep:
    """Measure each concurrency in order, until one brings no more throughput than those before it."""
    points: list[Point] = []
    for concurrency in concurrencies:
        say(f"{server.label}, {concurrency} in flight")
        point = server.run(concurrency, options)
        best = max((each.load.output_throughput or 0.0 for each in points), default=0.0)
        points.append(point)
        if (point.load.output_throughput or 0.0) < best * _GAIN:
            break
    say(f"{server.label}, prompts alone")
    prompts = server.run(points[-1].concurrency, options, output_length=1).load
    return Sweep(
        label=server.label,
        address=str(server.target.address),
        prompt_length=options.prompt_length,
        output_length=options.output_length,
        points=points,
        prompts=prompts,
        start_s=server.start_s,
    )


def knee(points: Sequence[Point], slo: Slo) -> Point | None:
    """The point of the highest throughput that keeps an objective; None where none does."""
    kept = [point for point in points if point.load.keeps(slo)]
    return max(kept, key=lambda point: point.load.output_throughput or 0.0, default=None)
