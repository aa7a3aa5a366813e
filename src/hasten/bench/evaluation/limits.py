"""Measured figures beside the hardware's limits: roofline, memory, price and energy."""

from collections.abc import Sequence
from dataclasses import dataclass

from hasten.bench.latency import LatencyResult
from hasten.bench.sweep import Point, Sweep
from hasten.core.model_config import ModelConfig
from hasten.engine.planning.hardware import Device
from hasten.engine.planning.plan import Fit, Planner, Setup
from hasten.engine.planning.roofline import Step, decode_step, prompt_step

_SECONDS, _MILLION = 3600.0, 1e6
_MOST_PROMPT_SHARE = 0.95
"""Of the time, that prompts are taken to need at most."""


@dataclass(frozen=True)
class Memory:
    """The memory of each rank."""

    device: str
    nbytes: int
    ranks: int
    dtype: str
    parts: dict[str, int]
    """Bytes of weights by part."""
    kv_bytes_per_token: int
    fit: Fit


@dataclass(frozen=True)
class Reached:
    """A kind of step, as it was measured and as the roofline expects it."""

    what: str
    tokens_per_second: float
    expected_tokens_per_second: float
    limit: str
    """What takes most of the time, by the roofline."""
    bandwidth_share: float
    """Of the device's memory bandwidth that was used, by the bytes that the step has to read."""
    compute_share: float
    """Of the device's arithmetic that was used."""
    operations_per_byte: float
    operations_per_second: float
    """Of each rank."""


@dataclass(frozen=True)
class Roofline:
    """A device's limits, and the steps that were measured under them."""

    device: Device
    ranks: int
    steps: list[Reached]


@dataclass(frozen=True)
class Cost:
    """Dollars for tokens at one concurrency, from a machine's price per hour.

    A prompt's token costs its part of the rate of prompts alone, an output's token what remains of the time.
    """

    price_per_hour: float
    concurrency: int
    input_per_million: float
    output_per_million: float
    requests_per_dollar: float


@dataclass(frozen=True)
class Plan:
    """Device and memory plan of a model."""

    device: Device
    memory: Memory


def plan(model: ModelConfig, device: Device, setup: Setup) -> Plan:
    """What a model takes on each rank of a device."""
    planner = Planner(model, device)
    rank = planner.rank(setup)
    memory = Memory(
        device=device.name,
        nbytes=device.memory,
        ranks=setup.ranks,
        dtype=setup.quantization or setup.dtype,
        parts=rank.parts,
        kv_bytes_per_token=rank.kv_bytes_per_token,
        fit=planner.fit(setup),
    )
    return Plan(device, memory)


def roofline(model: ModelConfig, device: Device, setup: Setup, latencies: Sequence[LatencyResult]) -> Roofline:
    """Steps of hasten's latencies: those of single tokens of each batch, and the prompts of the largest."""
    rank = Planner(model, device).rank(setup)
    steps = []
    for each in latencies:
        context = each.prompt_length + each.output_length // 2
        step = decode_step(model, rank, device, each.batch_size, context, ranks=setup.ranks)
        steps.append(_reached(f"decode, batch {each.batch_size}", step, each.token_ms.p50 / 1000, device))
    largest = max(latencies, key=lambda each: each.batch_size)
    tokens = largest.batch_size * largest.prompt_length
    step = prompt_step(model, rank, device, tokens, largest.prompt_length, ranks=setup.ranks)
    steps.append(_reached(f"prompts, {tokens} tokens", step, largest.first_token_ms.p50 / 1000, device))
    return Roofline(device, setup.ranks, steps)


def _reached(what: str, step: Step, seconds: float, device: Device) -> Reached:
    return Reached(
        what=what,
        tokens_per_second=step.tokens / seconds,
        expected_tokens_per_second=step.tokens_per_second,
        limit=step.limit,
        bandwidth_share=step.read_bytes / seconds / device.bytes_per_second,
        compute_share=step.operations / seconds / device.flops,
        operations_per_byte=step.operations / step.read_bytes,
        operations_per_second=step.operations / seconds,
    )


def cost(price_per_hour: float, sweep: Sweep, point: Point) -> Cost | None:
    """Money per token at a point of a sweep; None where tokens were not counted.

    What all input and output tokens of an hour cost together is the price of the hour.
    """
    load, alone = point.load, sweep.prompts
    if not load.output_throughput or load.total_token_throughput is None or not alone.total_token_throughput:
        return None
    rate = (alone.total_token_throughput - (alone.output_throughput or 0.0)) * _SECONDS
    inputs = (load.total_token_throughput - load.output_throughput) * _SECONDS
    outputs = load.output_throughput * _SECONDS
    share = min(inputs / rate, _MOST_PROMPT_SHARE)
    return Cost(
        price_per_hour=price_per_hour,
        concurrency=point.concurrency,
        input_per_million=price_per_hour * share / inputs * _MILLION,
        output_per_million=price_per_hour * (1 - share) / outputs * _MILLION,
        requests_per_dollar=load.request_throughput * _SECONDS / price_per_hour,
    )
