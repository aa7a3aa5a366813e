"""Each kernel beside the plain definition of its op, and beside what the GPU can do at most.

A kernel is launched again and again from one CUDA graph, as a model's step does, on inputs that take turns and together
do not fit into the L2 cache. The definition runs on the same inputs: in a graph too, or, where the host has to wait in
the middle of it, call by call. Results are compared with the definition's in fp32.
"""

import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from itertools import cycle, islice
from typing import TypedDict

import torch
from torch import Tensor

from hasten.bench.kernel_cases import TOLERANCE, Case, Outputs, Run, Setting, cases
from hasten.bench.report import print_table
from hasten.core.errors import ConfigError

_REPETITIONS = 9
_LEAST_LAUNCHES = 8
_MOST_COPIES = 64
"""Inputs that take turns. A kernel that reads less than their share of the L2 cache finds them there, as in a model."""


@dataclass(frozen=True)
class Ceilings:
    """The most that this GPU does, measured."""

    bytes_per_second: float
    flops_per_second: float


@dataclass(frozen=True)
class Result:
    """What was measured of a case; the rates count what has to be moved and computed at least."""

    op: str
    shape: str
    seconds: float
    reference_seconds: float
    bytes_per_second: float
    flops_per_second: float
    share: float
    """Of the ceiling that is the nearer one."""
    error: float
    tolerance: float

    @property
    def is_exact(self) -> bool:
        """Whether the error is within the tolerance."""
        return self.error <= self.tolerance


class KernelsReport(TypedDict):
    """What is written: kernels of one shape of model, on one GPU."""

    device: str
    torch: str
    most: Ceilings
    results: list[Result]


def largest_error(found: Outputs, expected: Outputs) -> float:
    """Largest difference, relative to values above 1; of whole numbers, the share of those that differ."""
    if not isinstance(found, Tensor):
        return max(largest_error(mine, other) for mine, other in zip(found, expected, strict=True))
    assert isinstance(expected, Tensor)
    if found.itemsize == 1:  # a cache in steps of 8 bits
        found, expected = found.float(), expected.float()
    if not found.is_floating_point():
        return float((found != expected).float().mean())
    found = found.sum(0) if found.dim() > expected.dim() else found  # parts, which their reader adds up
    off = (found.float() - expected).abs() / expected.abs().clamp(min=1)
    off = off.masked_fill(found == expected, 0)  # infinities too
    return float(off.nan_to_num(nan=float("inf")).max())


def time_of(runs: list[Run], *, captured: bool = True) -> float:
    """Seconds of one of these, run one after the other: the median of some times all. Each must have run before."""
    every = _captured(runs).replay if captured else partial(_each, runs)
    every()
    times = []
    for _ in range(_REPETITIONS):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        every()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return statistics.median(times) / len(runs)


def _captured(runs: list[Run]) -> torch.cuda.CUDAGraph:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        _each(runs)
    return graph


def _each(runs: list[Run]) -> None:
    for run in runs:
        run()


def ceilings(setting: Setting) -> Ceilings:
    """The faster of reading 4 GiB and copying 2 GiB, and a large matrix product."""
    large = torch.ones(2**30, device=setting.device)
    half, other = large.chunk(2)
    left, right = setting.draw(8192, 8192), setting.draw(8192, 8192)
    times = []
    for most in (large.sum, partial(half.copy_, other), partial(torch.mm, left, right)):
        most()
        times.append(time_of([most] * 4))
    return Ceilings(4 * 2**30 / min(times[:2]), 2 * 8192**3 / times[2])


def measure(case: Case, setting: Setting, most: Ceilings) -> Result:
    """Compare and time one case."""
    cache_size = torch.cuda.get_device_properties(setting.device).L2_cache_size
    copies = min(_MOST_COPIES, 1 + int(4 * cache_size / case.nbytes))
    calls = [case.make() for _ in range(copies)]
    error = largest_error(calls[0].kernel(), calls[0].exact())
    for call in calls:  # compiles what is not compiled yet, which a capture must not do
        call.kernel()
    calls[0].reference()
    launches = max(copies, _LEAST_LAUNCHES)
    kernel_time = time_of([call.kernel for call in islice(cycle(calls), launches)])
    reference_time = time_of([call.reference for call in calls], captured=not case.waits)
    return result(case, kernel_time, reference_time, error, most, setting.dtype)


def result(
    case: Case, seconds: float, reference_seconds: float, error: float, most: Ceilings, dtype: torch.dtype
) -> Result:
    """What was measured, with what follows from it."""
    moved, computed = case.nbytes / seconds, case.flops / seconds
    return Result(
        op=case.op,
        shape=case.shape,
        seconds=seconds,
        reference_seconds=reference_seconds,
        bytes_per_second=moved,
        flops_per_second=computed,
        share=max(moved / most.bytes_per_second, computed / most.flops_per_second),
        error=error,
        tolerance=TOLERANCE[dtype] if case.tolerance is None else case.tolerance,
    )


def run(setting: Setting, only: str | None = None) -> tuple[Ceilings, list[Result]]:
    """Measure all cases, or those whose name contains `only`."""
    torch.manual_seed(0)
    chosen = [case for case in cases(setting) if only is None or only in case.name]
    if not chosen:
        names = sorted({case.op for case in cases(setting)})
        raise ConfigError(f"no kernel is called {only!r}; there are {', '.join(names)}")
    most = ceilings(setting)
    return most, [measure(case, setting, most) for case in chosen]


def show(title: str, most: Ceilings, results: Iterable[Result]) -> None:
    """Print a table."""
    rows = [
        (
            f"{result.op} {result.shape}",
            f"{result.seconds * 1e6:.1f}",
            f"{result.reference_seconds * 1e6:.1f}",
            f"{result.reference_seconds / result.seconds:.2f}",
            f"{result.bytes_per_second / 1e12:.2f}",
            f"{result.flops_per_second / 1e12:.1f}",
            f"{result.share:.0%}",
            f"{result.error:.1e}" + ("" if result.is_exact else " !"),
        )
        for result in results
    ]
    limits = f"{most.bytes_per_second / 1e12:.2f} TB/s and {most.flops_per_second / 1e12:.0f} TFLOP/s at most"
    columns = ("kernel", "µs", "plain torch µs", "times as fast", "TB/s", "TFLOP/s", "of the most", "error")
    print_table(f"{title}: {limits}", columns, rows)
