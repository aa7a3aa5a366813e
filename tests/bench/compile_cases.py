"""Compiles the kernels of `bench kernels` for a GPU that is not there: a line of JSON for each, and no result.

compile_cases.py CAPABILITY DTYPE... (90 is an H100 or H200, 80 an A100)
"""

import json
import sys
from dataclasses import replace
from importlib import import_module
from types import FunctionType, ModuleType, SimpleNamespace
from typing import Any, cast

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from hasten import ops
from hasten.bench.kernel_cases import Setting, cases, model_shape
from hasten.core.dtypes import DTypeName
from hasten.ops import gpu

ROOMS = (
    *("attention", "beams", "cache", "cuts", "draw", "edits", "exchange", "expert_groups", "expert_pairs", "experts"),
    *("gated", "heads", "logprobs", "matmul", "norm", "router", "sampling"),
)
"""Of `ops/gpu`: the ones that launch kernels for `hasten.ops`."""
INNER = ("byte_dots", "grouped", "rounded", "row_rounding")
"""The ones that launch kernels for these."""
LARGE = (
    *("8192", "prefill 94 x 87", "prefill 4 x 2048", "256 x 192", "256 of 16 to 2056", "128 blocks", "192 rows"),
    *("dense int8", "head int8", "int8, 64 rows", "qkv int8, 128 rows", "qkv int8, 512 rows", "down int8, 512 rows"),
    *("dense int4", "down int4", "qkv int4, 16", "qkv int4, 64", "qkv int4, 256", "up int4, 1", "up int4, 64"),
    *("down fp8", "dense fp8", "qkv fp8", "w8a8, 64 rows", "w8a8, 256 rows", "dense w8a8", "head w8a8", "qkv w8a8"),
    *("up w8a8", "w8a8, 16 rows", "fp8, 16 rows", "fp8, 64 rows"),
)
"""Shapes with the kernels of smaller ones."""
VARIANTS = (
    *("by quick_gelu", "by relu", "by silu", "biases", "sinks", "capped", "interleaved", "clipped", "not causal"),
    *("by distance", "rms"),
)
"""Shapes whose kernels differ from others in operations that every GPU has: compiled for the newest alone."""
FIXED = ("16 x 192", "64 x 2048, window 512, capped", "prefill 2 x 560, window 128, sinks")
"""Of attention, to be compiled in a fixed order as well."""


class Unfilled(Setting):
    """Inputs of zeros where a GPU's are random: a compiler looks at their types and sizes alone."""

    def draw(self, *shape: int, scale: float = 1.0) -> torch.Tensor:
        return torch.zeros(shape, dtype=self.dtype, device=self.device)


def _module(room: str) -> ModuleType:
    return import_module(f"{gpu.__name__}.{room}")


def launchers() -> dict[str, FunctionType]:
    """The public functions of `ops/gpu`, by name."""
    return {
        name: member
        for module in map(_module, ROOMS)
        for name, member in vars(module).items()
        if isinstance(member, FunctionType) and member.__module__ == module.__name__ and not name.startswith("_")
    }


def compile_all(capability: int, dtypes: list[DTypeName]) -> None:
    """Run every case with launches that compile instead."""
    target = GPUTarget("cuda", capability, 32)
    driver.set_active(
        SimpleNamespace(
            get_current_target=lambda: target, get_current_device=lambda: 0, get_current_stream=lambda _device: 0
        )
    )
    run = JITFunction.run
    seen = set()

    def compiled(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        if kernel.hash not in seen:
            seen.add(kernel.hash)
            json.dump({"kernel": kernel.name, "shared": kernel.metadata.shared}, sys.stdout)
            sys.stdout.write("\n")

    JITFunction.run = compiled
    overlaps = capability >= 90
    for room in (*ROOMS, *INNER):
        vars(_module(room))["overlapped"] = lambda _tensor: {"PDL": overlaps, "launch_pdl": overlaps}
    for name, launcher in launchers().items():
        if callable(getattr(ops, name, None)):
            setattr(ops, name, launcher)
    model = model_shape("bloom-7b1")
    heads = replace(model.attention, num_heads=8, num_kv_heads=8)
    small = replace(model, hidden_size=1024, intermediate_size=4096, vocab_size=60_000, attention=heads)
    grouped = replace(small, attention=replace(heads, num_kv_heads=2))
    for dtype in dtypes:
        alone, same_keys = (cases(Unfilled(m, ops.TORCH_DTYPES[dtype], torch.device("cpu"))) for m in (small, grouped))
        singles = (case for case in same_keys if case.op == "paged_attention" and "prefill" not in case.shape)
        for case in (*alone, *singles):
            left_out = LARGE if capability >= 90 else (*LARGE, *VARIANTS)
            fits = capability >= 89 or "fp8" not in case.shape
            if fits and not any(part in case.shape for part in left_out):
                case.make().kernel()
            if case.shape in FIXED:
                in_fixed_order(case.make().kernel)
        compile_many_rows(ops.TORCH_DTYPES[dtype])


def in_fixed_order(kernel: Any) -> None:
    """Run a case with a batch whose sums have a fixed order."""
    arguments = (replace(each, run=256) if isinstance(each, ops.AttentionMeta) else each for each in kernel.args)
    kernel.func(*arguments, **kernel.keywords)


def compile_many_rows(dtype: torch.dtype) -> None:
    """Products in a fixed order: as few rows as have kernels of their own, and more."""
    with ops.fixed_order():
        weight = ops.pack_linear(torch.zeros(1024, 1024, dtype=dtype), shared=True)
    for rows in (1, 64, 130, 600):
        x_th = torch.zeros(rows, 1024, dtype=dtype)
        ops.linear(x_th, weight, x_th[0], activation="gelu_tanh")
        ops.linear_parts(x_th, weight)


if __name__ == "__main__":
    compile_all(int(sys.argv[1]), cast(list[DTypeName], sys.argv[2:]))
