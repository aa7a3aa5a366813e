"""Seconds from nothing to the first token, by phase: each start is a process of its own.

What an engine does behind that, when there is time, is measured apart (`deferred_s`).

A cold start has no compiled kernels and no weights in the system's file cache, as in a new container; a warm one has
what the start before it left. Python's and torch's own files may be cached in both.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

from hasten.bench.report import Environment, print_table
from hasten.core.errors import ConfigError, EngineError, error_of

_KERNEL_CACHES = ("TRITON_CACHE_DIR", "CUDA_CACHE_PATH", "XDG_CACHE_HOME")
"""Environment variables that name folders of compiled kernels: those of a GPU, and of a CPU."""
_WEIGHTS = ("*.safetensors", "*.bin")


@dataclass(frozen=True)
class Start:
    """One kind of start: medians over its repetitions."""

    kind: str
    """cold or warm."""
    phases: dict[str, float]
    """Seconds of each, in order; they add up to `total_s` but for rounding and medians."""
    total_s: float
    """From the start of the process to the first token."""
    second_token_s: float
    """Of the same request once more."""
    deferred_s: float
    """Of all that the start leaves for when there is time: its graphs, products of a library, the tokenizer."""
    totals_s: list[float]
    """Of each repetition."""


@dataclass(frozen=True)
class Measured:
    """What `measure` found, and on what."""

    starts: list[Start]
    environment: Mapping[str, Any]


class StartupReport(TypedDict):
    """What is written: starts of each kind."""

    environment: Environment
    results: list[Start]


def measure(model: str, options: Mapping[str, Any], *, repetitions: int = 3, cold: bool = True) -> Measured:
    """Start the model's engine in processes of their own: cold and warm in turns, or warm ones alone.

    `model` is a folder, `options` are the engine's. Raises what the engine raises where it cannot be loaded.
    """
    if repetitions < 1:
        raise ConfigError(f"repetitions must be at least 1, got {repetitions}")
    found: dict[str, list[dict[str, Any]]] = {"cold": [], "warm": []} if cold else {"warm": []}
    for number in range(repetitions):
        with _kernel_caches() if cold else _own_caches() as environment:
            if cold:
                _forget_files(Path(model))
                found["cold"].append(_start(model, options, environment))
            elif number == 0:
                _start(model, options, environment)  # whatever was there before, the next start finds what it left
            found["warm"].append(_start(model, options, environment))
    return Measured([_median(kind, runs) for kind, runs in found.items()], found["warm"][0]["environment"])


@contextmanager
def _kernel_caches() -> Iterator[Mapping[str, str]]:
    """An environment with empty caches of kernels."""
    with tempfile.TemporaryDirectory() as folder:
        yield {**os.environ, **{name: str(Path(folder, name.lower())) for name in _KERNEL_CACHES}}


@contextmanager
def _own_caches() -> Iterator[Mapping[str, str]]:
    """The environment as it is."""
    yield os.environ


def _forget_files(folder: Path) -> None:
    """Let the system drop what it holds of the weights; what it has not written to the disk yet stays."""
    for pattern in _WEIGHTS:
        for file in folder.rglob(pattern):
            descriptor = os.open(file, os.O_RDONLY)
            try:
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(descriptor)


def _start(model: str, options: Mapping[str, Any], environment: Mapping[str, str]) -> dict[str, Any]:
    arguments = json.dumps({"model": model, "options": dict(options), "spawned": time.monotonic()})
    command = [sys.executable, "-m", "hasten.bench.startup_child", arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    lines = done.stdout.splitlines()
    if done.returncode or not lines:
        reason = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise EngineError(f"a start ended with status {done.returncode}: {reason}")
    measured: dict[str, Any] = json.loads(lines[-1])
    if "error" in measured:
        raise error_of(measured["error"], measured["message"])
    return measured


def _median(kind: str, runs: Sequence[Mapping[str, Any]]) -> Start:
    phases = {name: statistics.median(run["seconds"][name] for run in runs) for name in runs[0]["seconds"]}
    totals = [run["total_s"] for run in runs]
    second = statistics.median(run["second_token_s"] for run in runs)
    deferred = statistics.median(run["deferred_s"] for run in runs)
    return Start(kind, phases, statistics.median(totals), second, deferred, totals)


def show(measured: Measured) -> None:
    """Print a table: a row for each phase, a column for each kind of start."""
    starts = measured.starts
    rows = [(name, *(f"{start.phases[name]:.2f}" for start in starts)) for name in starts[0].phases]
    rows.append(("to the first token", *(f"{start.total_s:.2f}" for start in starts)))
    rows.append(("the same request again", *(f"{start.second_token_s:.3f}" for start in starts)))
    rows.append(("left for later", *(f"{start.deferred_s:.2f}" for start in starts)))
    device = measured.environment["device"]
    title = f"seconds of a start, {measured.environment['dtype']} on {device}, median of {len(starts[0].totals_s)}"
    print_table(title, ("phase", *(start.kind for start in starts)), rows)
