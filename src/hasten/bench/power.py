"""Power and clocks of GPUs while something is measured, from `nvidia-smi`, which comes with the driver."""

import shutil
import statistics
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime

_INTERVAL_MS = 100
_FIELDS = ("timestamp", "index", "power.draw", "clocks.sm", "clocks.mem")
_TIME = "%Y/%m/%d %H:%M:%S.%f"
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


@dataclass(frozen=True)
class Sample:
    """A GPU at one moment."""

    at: float
    """Seconds, as `time.time` counts them."""
    gpu: str
    watts: float
    sm_clock_mhz: float
    memory_clock_mhz: float


@dataclass
class Meter:
    """Has all samples once the block of `metered` has ended; none where no GPU could be read."""

    samples: list[Sample] = field(default_factory=list)

    def between(self, start: float, end: float) -> Power | None:
        """The means between two moments; of all samples where none lies between them, None where there are none."""
        within = [sample for sample in self.samples if start <= sample.at <= end] or self.samples
        if not within:
            return None
        by_gpu: dict[str, list[float]] = {}
        for sample in within:
            by_gpu.setdefault(sample.gpu, []).append(sample.watts)
        return Power(
            watts=sum(map(statistics.mean, by_gpu.values())),
            sm_clock_mhz=statistics.mean(sample.sm_clock_mhz for sample in within),
            memory_clock_mhz=statistics.mean(sample.memory_clock_mhz for sample in within),
            samples=len(within),
        )


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
        meter.samples = samples_of(output.read())


def _command(fields: Sequence[str], ids: Sequence[str]) -> list[str] | None:
    program = shutil.which("nvidia-smi")
    if program is None or not ids:
        return None
    return [program, f"--id={','.join(ids)}", f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits"]


def samples_of(output: str) -> list[Sample]:
    """The samples of nvidia-smi's lines `timestamp, index, watts, MHz, MHz`; lines without figures are left out."""
    found = []
    for line in output.splitlines():
        cells = [cell.strip() for cell in line.split(",")]
        values = [value for cell in cells[2:] if (value := _float(cell)) is not None]
        if len(cells) == len(_FIELDS) and len(values) == len(cells) - 2:
            found.append(Sample(datetime.strptime(cells[0], _TIME).timestamp(), cells[1], *values))
    return found


def _float(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:  # a GPU that does not report it says [N/A]
        return None
