"""Power and clocks of GPUs while something is measured, from `nvidia-smi`, which comes with the driver."""

import shutil
import statistics
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

_INTERVAL_MS = 100
_FIELDS = ("index", "power.draw", "clocks.sm", "clocks.mem")
_STATE = ("name", "driver_version", "power.limit", "clocks.max.sm", "clocks.max.mem")
_QUERY_S, _STOP_S = 20.0, 5.0


@dataclass(frozen=True)
class Power:
    """Of all GPUs of an engine together while something was measured."""

    watts: float
    """Mean of the samples."""
    sm_clock_mhz: float
    memory_clock_mhz: float
    samples: int


@dataclass(frozen=True)
class GpuState:
    """A GPU's settings, as its driver reports them."""

    name: str
    driver: str
    power_limit_watts: float | None
    max_sm_clock_mhz: float | None
    max_memory_clock_mhz: float | None


@dataclass
class Meter:
    """Filled when the block of `metered` ends; None where no GPU could be read."""

    power: Power | None = None


def gpu_states(ids: Sequence[str]) -> list[GpuState]:
    """The settings of GPUs by their ids (UUIDs, or numbers of nvidia-smi); none where nvidia-smi cannot be run."""
    command = _command(_STATE, ids)
    if command is None:
        return []
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=_QUERY_S)
    except (OSError, subprocess.TimeoutExpired):
        return []
    rows = [[cell.strip() for cell in line.split(",")] for line in done.stdout.splitlines()]
    return [
        GpuState(row[0], row[1], *map(_float, row[2:]))
        for row in rows
        if not done.returncode and len(row) == len(_STATE)
    ]


@contextmanager
def metered(ids: Sequence[str]) -> Iterator[Meter]:
    """Sample the power of GPUs while the block runs. Without GPUs or nvidia-smi the meter stays empty."""
    meter, command = Meter(), _command(_FIELDS, ids)
    if command is None:
        yield meter
        return
    # a file, since a pipe that nobody reads would stop the sampler once it is full
    with tempfile.TemporaryFile("w+") as output:
        sampler = subprocess.Popen(
            [*command, f"--loop-ms={_INTERVAL_MS}"], stdout=output, stderr=subprocess.DEVNULL, text=True
        )
        try:
            yield meter
        finally:
            sampler.terminate()
            try:
                sampler.wait(_STOP_S)
            except subprocess.TimeoutExpired:
                sampler.kill()
                sampler.wait()
        output.seek(0)
        meter.power = power_of(output.read())


def _command(fields: Sequence[str], ids: Sequence[str]) -> list[str] | None:
    program = shutil.which("nvidia-smi")
    if program is None or not ids:
        return None
    return [program, f"--id={','.join(ids)}", f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits"]


def power_of(output: str) -> Power | None:
    """The means of nvidia-smi's lines `index, watts, MHz, MHz`: watts are summed over GPUs; None without samples."""
    by_gpu: dict[str, list[tuple[float, float, float]]] = {}
    for line in output.splitlines():
        cells = [cell.strip() for cell in line.split(",")]
        values = [_float(cell) for cell in cells[1:]]
        if len(cells) == len(_FIELDS) and None not in values:
            watts, sm, memory = (value for value in values if value is not None)
            by_gpu.setdefault(cells[0], []).append((watts, sm, memory))
    if not by_gpu:
        return None
    every = [sample for samples in by_gpu.values() for sample in samples]
    return Power(
        watts=sum(statistics.mean(sample[0] for sample in samples) for samples in by_gpu.values()),
        sm_clock_mhz=statistics.mean(sample[1] for sample in every),
        memory_clock_mhz=statistics.mean(sample[2] for sample in every),
        samples=len(every),
    )


def _float(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:  # a GPU that does not report it says [N/A]
        return None
