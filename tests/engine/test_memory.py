import json
import math
from pathlib import Path

import pytest
import torch
from torch import nn

from hasten import LLM, ops
from hasten.checkpoint.plan import open_checkpoint
from hasten.core.errors import CapacityError
from hasten.engine import model_loading, worker
from hasten.engine.memory import available_host_memory, free_memory, host_memory_and_swap
from hasten.engine.model_loading import build_model
from hasten.layers.linear import set_weight
from hasten.parallel.groups import ALL_ALONE

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


def test_swap_counts_for_what_a_host_can_give_at_all(tmp_path: Path) -> None:
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemAvailable: 3 kB\nSwapFree: 4 kB\n")
    assert host_memory_and_swap(meminfo) == 7 << 10
    meminfo.write_text("MemTotal: 5 kB\n")
    assert host_memory_and_swap(meminfo) == math.inf
    assert host_memory_and_swap(tmp_path / "none") == math.inf


@pytest.mark.parametrize("quantization", [None, "int8", "int4"])
def test_the_least_that_weights_take_is_known_before_they_are_read(
    tiny_bloom: Path, quantization: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    needed: list[int] = []
    held: list[int] = []

    def counted(owner: nn.Module, name: str, weight: ops.Weight) -> None:
        held.append(weight.nbytes)
        set_weight(owner, name, weight)

    monkeypatch.setattr(model_loading, "set_weight", counted)
    build_model(
        open_checkpoint(str(tiny_bloom)),
        ALL_ALONE,
        torch.float32,
        torch.device("cpu"),
        quantization=quantization,
        check_memory=lambda least: needed.extend((least, len(held))),
    )
    assert needed == [sum(held), 0]


@pytest.mark.parametrize("load_format", ["auto", "dummy"])
def test_weights_that_do_not_fit_are_refused_before_memory_is_taken(
    tiny_bloom: Path, load_format: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    needed: list[int] = []
    build_model(
        open_checkpoint(str(tiny_bloom)), ALL_ALONE, torch.float32, torch.device("cpu"), check_memory=needed.append
    )
    monkeypatch.setattr(worker, "host_memory_and_swap", lambda: needed[0])
    LLM(tiny_bloom, load_format=load_format, kv_cache_memory="1M").close()
    monkeypatch.setattr(worker, "host_memory_and_swap", lambda: needed[0] - 1)
    monkeypatch.setattr("hasten.engine.model_loading.rank_tensors", None)
    with pytest.raises(CapacityError, match=r"^the weights do not fit into this machine's memory; it needs 0\.\d\d GB"):
        LLM(tiny_bloom, load_format=load_format, kv_cache_memory="1M")


def test_random_weights_beyond_any_memory_are_one_line(tmp_path: Path) -> None:
    sizes = {"hidden_size": 65536, "intermediate_size": 1 << 20, "num_hidden_layers": 40, "num_attention_heads": 512}
    config = {"architectures": ["BertModel"], "model_type": "bert", "vocab_size": 1000, **sizes}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CapacityError, match=r"machine's memory: they take \d{5}\.\d\d GB, and \d+\.\d\d GB are free$"):
        LLM(tmp_path, load_format="dummy", device="cpu")
