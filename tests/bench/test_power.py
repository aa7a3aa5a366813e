"""Power from nvidia-smi, for which a script stands in where there is no GPU."""

from datetime import datetime
from pathlib import Path

import pytest
from tests.waiting import eventually

from hasten.bench.power import GpuState, gpu_states, metered, samples_of

SCRIPT = """#!/bin/sh
case "$*" in
*--loop-ms*)
  printf '%s\\n' '2026/11/30 02:00:01.000, 0, 90.0, 345, 2619' '2026/11/30 02:00:02.000, 0, 300.0, 1900, 2619' \\
    '2026/11/30 02:00:02.010, 1, 100.0, 1700, 2619' '2026/11/30 02:00:02.100, 0, 500.0, 1980, 2619' \\
    '2026/11/30 02:00:02.110, 1, [N/A], 1700, 2619'
  touch {marker}
  exec sleep 100 ;;
*) printf 'NVIDIA H200, 580.1, 700.00, 1980, 3201\\nNVIDIA H200, 580.1, [N/A], 1980, 3201\\n' ;;
esac
"""


@pytest.fixture
def marker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A program `nvidia-smi`; the file exists once it has written its samples."""
    program, marker = tmp_path / "nvidia-smi", tmp_path / "sampled"
    program.write_text(SCRIPT.format(marker=marker))
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    return marker


def test_watts_are_means_of_each_gpu_summed(marker: Path) -> None:
    with metered(["GPU-a", "GPU-b"]) as meter:
        eventually(marker.exists)
    two = datetime(2026, 11, 30, 2, 0, 2).timestamp()
    power = meter.between(two, two + 1)
    assert power is not None
    assert power.watts == 500
    assert power.samples == 3
    assert power.sm_clock_mhz == pytest.approx((1900 + 1700 + 1980) / 3)
    every = meter.between(0, 1)
    assert every is not None
    assert every.samples == 4, "a run that is shorter than the interval has the mean of what surrounds it"


def test_settings_of_gpus(marker: Path) -> None:
    first, second = gpu_states(["0", "1"])
    assert first == GpuState("NVIDIA H200", "580.1", 700.0, 1980.0, 3201.0)
    assert second.power_limit_watts is None


def test_without_gpus_nothing_is_measured(marker: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with metered([]) as meter:
        pass
    assert meter.between(0, 1) is None
    assert samples_of("No devices were found\n") == []
    monkeypatch.setenv("PATH", "")
    assert gpu_states(["0"]) == []
