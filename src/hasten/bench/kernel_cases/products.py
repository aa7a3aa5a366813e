"""Products with weights."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any, get_args

import torch
from torch import Tensor

from hasten import ops
from hasten.bench.kernel_cases.case import A_STEP, FP8_TOLERANCE, TOLERANCE, Call, Case, Outputs, call, rows_text
from hasten.bench.kernel_cases.setting import Setting, cache_text
from hasten.ops import (
    HeadTransform,
    PackedLinear,
    reference,
)
from hasten.quantization.scheme import SCHEMES


def linears(setting: Setting, rows: int) -> Iterator[Case]:
    """The products of a layer and the head's."""
    yield from layers(setting, rows)
    yield linear(setting, "head", rows, setting.model.hidden_size, setting.model.vocab_size)


def layers(setting: Setting, rows: int) -> Iterator[Case]:
    """The products of a layer."""
    hidden, inner = setting.model.hidden_size, setting.model.intermediate_size
    yield project(setting, rows)
    yield linear(setting, "dense", rows, setting.heads[0] * setting.heads[2], hidden, parts=True)
    yield linear(setting, "up", rows, hidden, inner, activation=setting.model.activation)
    yield linear(setting, "down", rows, inner, hidden, parts=True)


def fp8(setting: Setting) -> Iterator[Case]:
    """Products with weights in fp8, where the device has them."""
    if ops.multiplies(torch.float8_e4m3fn, setting.device):
        for rows in (1, 16, 64, 256, 8192):
            yield from layers(replace(setting, quantization="fp8"), rows)


def activations(setting: Setting) -> Iterator[Case]:
    """Those of other models behind the same product."""
    hidden, inner = setting.model.hidden_size, setting.model.intermediate_size
    for activation in get_args(ops.Activation):
        if activation != setting.model.activation:
            yield linear(setting, f"up by {activation}", 1, hidden, inner, activation=activation)


def product(setting: Setting, op: str, name: str, rows: int, into: int, out: int, make: Callable[[], Call]) -> Case:
    """A product of a layer, with the weight in the scheme of the setting."""
    scheme = setting.quantization
    weight_bytes = {"int8": into * out + 4 * out, "int4": into * out / 2 + 2 * out * -(-into // 128)}.get(
        scheme or "", into * out * setting.itemsize
    )
    return Case(
        op=op,
        shape=f"{name}{'' if scheme is None else f' {scheme}'}, {rows_text(rows)}",
        make=make,
        nbytes=rows * (into + out) * setting.itemsize + weight_bytes,
        flops=2 * rows * into * out,
        tolerance=FP8_TOLERANCE if scheme == "fp8" else None,
    )


def packed(setting: Setting, into: int, out: int) -> PackedLinear:
    """A random weight as the device reads it."""
    weight = setting.draw(out, into, scale=into**-0.5)
    if setting.quantization is None:
        return ops.pack_linear(weight, shared=True)
    return ops.pack_linear(SCHEMES[setting.quantization].quantize(weight, "drawn"), shared=True)


def linear(
    setting: Setting,
    name: str,
    rows: int,
    into: int,
    out: int,
    *,
    parts: bool = False,
    activation: ops.Activation | None = None,
) -> Case:
    """A linear layer; with `parts`, one that a norm adds up."""

    def make() -> Call:
        x, weight = setting.draw(rows, into), packed(setting, into, out)
        if parts:
            return call(ops.linear_parts, partial(reference.linear, bias_o=None, activation=None), x, weight)
        kernel, definition = (partial(op, activation=activation) for op in (ops.linear, reference.linear))
        return call(kernel, definition, x, weight, setting.draw(out) if activation else None)

    return product(setting, "linear_parts" if parts else "linear", name, rows, into, out, make)


def project(setting: Setting, rows: int, *, clip: float | None = None, rotated: bool = False) -> Case:
    """Queries, keys and values, stored in the cache."""
    heads, kv_heads, size = setting.heads
    into, out = setting.model.hidden_size, (heads + 2 * kv_heads) * size

    def projected(project: Callable[..., Tensor], *inputs: Any) -> Outputs:
        return project(*inputs, heads), inputs[3], inputs[4]

    def make() -> Call:
        slots_t = torch.randperm(rows, device=setting.device)
        inputs = (setting.draw(rows, into), packed(setting, into, out), setting.draw(out), *setting.caches(rows))
        transform = HeadTransform(
            positions_t=torch.arange(rows, device=setting.device),
            table_pr=torch.rand(rows, size, device=setting.device),
        )
        options = {"transform": transform if rotated else None, "scales": setting.scales()}
        kernel, definition = (
            partial(projected, partial(op, clip=clip, **options))  # type: ignore[arg-type]
            for op in (ops.project, reference.project)
        )
        return call(kernel, definition, *inputs, slots_t)

    name = f"qkv{'' if clip is None else ', clipped'}{', rotated' if rotated else ''}{cache_text(setting)}"
    case = product(setting, "project", name, rows, into, out, make)
    return replace(case, waits=True, tolerance=case.tolerance or A_STEP.get(setting.cache_dtype or ""))


def project_consecutive(setting: Setting, rows: int) -> Case:
    """Queries, keys and values of texts, each token's in its own row, where the product may leave them."""
    heads, kv_heads, size = setting.heads
    into, out = setting.model.hidden_size, (heads + 2 * kv_heads) * size

    def definition(
        x_th: Tensor, weight: PackedLinear, bias_o: Tensor, keys: Tensor, values: Tensor, slots_t: Tensor
    ) -> Outputs:
        return reference.project(x_th, weight, bias_o, keys, values, slots_t, heads), keys, values

    def make() -> Call:
        keys, values = setting.draw(2, rows, 1, kv_heads, size)
        slots_t = torch.arange(rows, device=setting.device)
        inputs = (setting.draw(rows, into), packed(setting, into, out), setting.draw(out), keys, values)
        return call(partial(ops.project_consecutive, num_heads=heads), definition, *inputs, slots_t)

    return replace(product(setting, "project_consecutive", "qkv", rows, into, out, make), waits=True)


def gated(setting: Setting, rows: int) -> Case:
    """A gated unit's product."""
    into, out = setting.model.hidden_size, 2 * setting.model.intermediate_size

    def make() -> Call:
        kernel, definition = (
            partial(op, bias_o=None, gate="silu") for op in (ops.gated_linear, reference.gated_linear)
        )
        return call(kernel, definition, setting.draw(rows, into), packed(setting, into, out))

    # the halves of the product are rounded before they meet
    case = product(setting, "gated_linear", "gate and up", rows, into, out, make)
    return replace(case, tolerance=4 * TOLERANCE[setting.dtype])
