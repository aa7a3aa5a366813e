from pathlib import Path

import pytest
import torch

from hasten.core.errors import CapacityError
from hasten.engine.memory import available_host_memory, free_memory

FREE = 64 << 30
LIMIT, USED, CACHED = "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"


def available(root: Path, own: str, files: dict[str, str], meminfo: str = f"MemAvailable: {FREE >> 10} kB\n") -> int:
    for name, text in {
        "own": own,
        "meminfo": meminfo,
        **{f"cgroup/{name}": text for name, text in files.items()},
    }.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return available_host_memory(root / "meminfo", root / "cgroup", root / "own")


@pytest.mark.parametrize(
    ("own", "files", "free"),
    [
        ("0::/\n", {}, FREE),
        ("0::/\n", {"memory.max": "1000\n", "memory.current": "300\n"}, 700),
        ("0::/\n", {"memory.max": "max\n", "memory.current": "300\n"}, FREE),
        ("0::/\n", {"memory.max": "1000", "memory.current": "1300"}, 0),
        ("0::/\n", {"memory.max": str(1 << 50), "memory.current": "0"}, FREE),
        ("0::/a/b\n", {"memory.max": "max", "a/b/memory.max": "50", "a/b/memory.current": "9"}, 41),
        ("0::/a/b\n", {"a/memory.max": "40", "a/memory.current": "9", "a/b/memory.max": "max"}, 31),
        ("0::/a\n", {"b/memory.max": "40", "b/memory.current": "9"}, FREE),  # another group's
        ("0::/not/seen/here\n", {"memory.max": "1000", "memory.current": "300"}, 700),
        ("7:memory:/p\n", {f"memory/p/{LIMIT}": "1000", f"memory/p/{USED}": "100"}, 900),
        ("7:memory:/p\n", {f"memory/{LIMIT}": str(2**63 - 4096), f"memory/{USED}": "100"}, FREE),
        ("4:cpu:/\n", {f"memory/{LIMIT}": "1000", f"memory/{USED}": "100"}, FREE),
        ("0::/\n", {"memory.max": "1000", "memory.current": "300", "memory.stat": "anon 5\ninactive_file 200\n"}, 900),
        ("7:memory:/\n", {f"memory/{LIMIT}": "9", f"memory/{USED}": "8", "memory/memory.stat": f"{CACHED} 7"}, 8),
    ],
)  # fmt: skip
def test_limits_of_the_process_and_of_what_it_lies_in(
    tmp_path: Path, own: str, files: dict[str, str], free: int
) -> None:
    assert available(tmp_path, own, files) == free


def test_a_host_that_does_not_say_how_much_is_free(tmp_path: Path) -> None:
    with pytest.raises(CapacityError, match="set kv_cache_memory"):
        available(tmp_path, "", {}, "MemTotal: 5 kB\n")


def test_ranks_divide_what_a_host_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hasten.engine.memory.available_host_memory", lambda: 1600)
    assert free_memory(torch.device("cpu"), 0.9, ranks=1) == 400
    assert free_memory(torch.device("cpu"), 0.9, ranks=4) == 100
