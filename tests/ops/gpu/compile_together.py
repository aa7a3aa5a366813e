"""Kernels for a GPU that is not there, compiled together: what was compiled, and what is missing then, as JSON."""

import json
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from hasten import ops
from hasten.ops.gpu import attention, norm, sampling
from hasten.ops.meta import AttentionMeta
from hasten.ops.plan import AttentionPlan, Planner


def main() -> None:
    """Compile, then ask for the same kernels once more."""
    target, devices = GPUTarget("cuda", 90, 32), list[int]()
    driver.set_active(
        SimpleNamespace(
            get_current_target=lambda: target,
            get_current_device=lambda: 3,
            set_current_device=devices.append,
            get_current_stream=lambda _device: 0,
        )
    )
    found: dict[str, Any] = {"before": ops.any_compiled()}
    compiled: list[str] = []
    knobs.runtime.jit_post_compile_hook = _named_in(compiled, skip=False)
    with ops.compiled_together(processes=1):
        _compute()
        during = len(compiled)
    missing: list[str] = []
    knobs.runtime.jit_cache_hook = _named_in(missing, skip=True)
    run = JITFunction.run
    JITFunction.run = lambda self, *args, warmup, **options: run(self, *args, warmup=True, **options)
    _compute()
    found |= {"during": during, "compiled": sorted(compiled), "missing": missing, "after": ops.any_compiled()}
    found["devices"] = sorted(set(devices))
    json.dump(found, sys.stdout)


def _named_in(names: list[str], *, skip: bool) -> Callable[..., bool]:
    """A hook that notes the kernel's name, and says whether to leave it out."""

    def hook(*, fn: Any, **_: Any) -> bool:
        names.append(fn.name)
        return skip

    return hook


def _compute() -> None:
    for dtype in (torch.float16, torch.bfloat16):
        weight_h: Any = torch.zeros(64, dtype=dtype)
        for rows in (1, 3):
            norm.norm(torch.zeros(rows, 64, dtype=dtype), weight_h, None, 1e-5, rms=True)
    sampling.greedy(torch.zeros(2, 300))
    _attend_long_prompt()


def _attend_long_prompt() -> None:
    counts, none = np.array([2048]), np.array([0])
    arrays = Planner(2, 1, multiprocessors=132).plan(none, none, counts, counts)
    plan = AttentionPlan(None, None, **{name: torch.from_numpy(array) for name, array in arrays.items()})
    numbers = torch.zeros(2048, dtype=torch.int32)
    meta = AttentionMeta(
        num_tokens=2048,
        block_tables=numbers,
        slot_mapping=numbers,
        sequences=[0],
        query_lens=[2048],
        kv_lens=[2048],
        plan=plan,
    )
    query_tnd, cache = torch.zeros(2048, 2, 64, dtype=torch.float16), torch.zeros(128, 16, 1, 64, dtype=torch.float16)
    attention.paged_attention(query_tnd, cache, cache, meta, 0.125, None)


if __name__ == "__main__":
    main()
