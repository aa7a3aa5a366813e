import os
from pathlib import Path

import pytest

from hasten.core.cpus import available_cpus

MANY = 64
QUOTA, PERIOD = "cpu.cfs_quota_us", "cpu.cfs_period_us"


@pytest.fixture(autouse=True)
def many_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(MANY)))


def write(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = root / "cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


@pytest.mark.parametrize(
    ("own", "files", "cpus"),
    [
        ("0::/\n", {"cpu.max": "200000 100000\n"}, 2),
        ("0::/\n", {"cpu.max": "150000 100000\n"}, 2),  # rounded up
        ("0::/\n", {"cpu.max": "1000 100000\n"}, 1),
        ("0::/\n", {"cpu.max": "max 100000\n"}, MANY),
        ("0::/\n", {"cpu.max": "9900000 100000\n"}, MANY),  # the affinity is less
        ("0::/\n", {}, MANY),
        ("0::/a/b\n", {"cpu.max": "max 100000", "a/cpu.max": "300000 100000", "a/b/cpu.max": "500000 100000"}, 3),
        ("0::/not/seen/here\n", {"cpu.max": "400000 100000"}, 4),
        ("4:cpu,cpuacct:/p\n", {f"cpu,cpuacct/p/{QUOTA}": "250000", f"cpu,cpuacct/p/{PERIOD}": "100000"}, 3),
        ("4:cpu,cpuacct:/p\n", {f"cpu/{QUOTA}": "50000", f"cpu/{PERIOD}": "50000"}, 1),
        ("4:cpu:/\n", {f"cpu/{QUOTA}": "-1", f"cpu/{PERIOD}": "100000"}, MANY),
        ("4:memory:/\n0::/\n", {f"memory/{QUOTA}": "1", f"memory/{PERIOD}": "1"}, MANY),
    ],
)  # fmt: skip
def test_quotas(tmp_path: Path, own: str, files: dict[str, str], cpus: int) -> None:
    write(tmp_path, files)
    (tmp_path / "own").write_text(own)
    assert available_cpus(tmp_path / "cgroup", tmp_path / "own") == cpus


def test_a_system_without_control_groups(tmp_path: Path) -> None:
    assert available_cpus(tmp_path / "none", tmp_path / "nowhere") == MANY
