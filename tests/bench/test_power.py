"""Power from nvidia-smi, for which a script stands in where there is no GPU."""

from pathlib import Path

import pytest
from tests.waiting import eventually

from hasten.bench.power import GpuState, gpu_states, metered, power_of

SCRIPT = """#!/bin/sh
case "$*" in
*--loop-ms*)
  printf '0, 300.0, 1900, 2619\\n1, 100.0, 1700, 2619\\n0, 500.0, 1980, 2619\\n1, [N/A], 1700, 2619\\n'
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
    assert meter.power is not None
    assert meter.power.watts == 500
    assert meter.power.samples == 3
    assert meter.power.sm_clock_mhz == pytest.approx((1900 + 1700 + 1980) / 3)


def test_settings_of_gpus(marker: Path) -> None:
    first, second = gpu_states(["0", "1"])
    assert first == GpuState("NVIDIA H200", "580.1", 700.0, 1980.0, 3201.0)
    assert second.power_limit_watts is None


def test_without_gpus_nothing_is_measured(marker: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with metered([]) as meter:
        pass
    assert meter.power is None
    assert power_of("No devices were found\n") is None
    monkeypatch.setenv("PATH", "")
    assert gpu_states(["0"]) == []
