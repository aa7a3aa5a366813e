"""Products with experts for each pair of a token and an expert: for few tokens, which seldom share an expert.

Shapes: T tokens, K experts a token, H hidden, I inner features of an expert, P = T * K pairs.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from hasten.core.model_config import GatedUnit
from hasten.ops.gpu.activations import gated
from hasten.ops.gpu.launch import overlapped, start_next, wait_for_inputs
from hasten.ops.mixture import PackedExperts, Routing


@triton.jit(do_not_specialize=["first"])
def _pair_gate_up(
    x,
    weight,
    bias,
    experts,
    inner,
    first,
    H: tl.constexpr,
    I: tl.constexpr,  # noqa: E741 - its name in the shapes above
    K: tl.constexpr,
    COUNT: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GATE: tl.constexpr,
    LIMIT: tl.constexpr,
    OFFSET: tl.constexpr,
    PDL: tl.constexpr,
):
    """The gated unit of one pair, ROWS features of both halves: [P, I]."""
    wait_for_inputs(PDL)
    start_next(PDL)  # behind the wait, so that `_down` may read the choice of experts before its own
    pair = tl.program_id(0)
    expert = tl.load(experts + pair) - first
    if (expert < 0) | (expert >= COUNT):
        return
    n = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    k = tl.arange(0, BLOCK_K)
    feature = expert.to(tl.int64) * 2 * I + tl.where(n < I, n, 0)
    gate_start = weight + feature[:, None] * H + k[None, :]
    x_start = x + (pair // K).to(tl.int64) * H + k
    gate = tl.zeros([ROWS, BLOCK_K], tl.float32)
    up = tl.zeros([ROWS, BLOCK_K], tl.float32)
    for offset in tl.static_range(0, H, BLOCK_K):
        if H % BLOCK_K == 0:
            x_k = tl.load(x_start + offset).to(tl.float32)[None, :]
            gate += tl.load(gate_start + offset).to(tl.float32) * x_k
            up += tl.load(gate_start + I * H + offset).to(tl.float32) * x_k
        else:
            inside = k + offset < H
            x_k = tl.load(x_start + offset, inside, 0.0).to(tl.float32)[None, :]
            gate += tl.load(gate_start + offset, inside[None, :], 0.0).to(tl.float32) * x_k
            up += tl.load(gate_start + I * H + offset, inside[None, :], 0.0).to(tl.float32) * x_k
    gate_n = tl.sum(gate, 1)
    up_n = tl.sum(up, 1)
    if bias is not None:
        bias_start = bias + expert * 2 * I + n
        gate_n += tl.load(bias_start, n < I, 0.0).to(tl.float32)
        up_n += tl.load(bias_start + I, n < I, 0.0).to(tl.float32)
    value = gated(gate_n, up_n, GATE, LIMIT, OFFSET)
    tl.store(inner + pair.to(tl.int64) * I + n, value.to(inner.dtype.element_ty), n < I)


@triton.jit
def _of_choice(values_k, choice, BLOCK_C: tl.constexpr):
    """One of the values of a token's choices [BLOCK_C]."""
    return tl.sum(tl.where(tl.arange(0, BLOCK_C) == choice, values_k, 0), 0)


@triton.jit(do_not_specialize=["first"])
def _down(
    inner,
    weight,
    bias,
    scales,
    experts,
    out,
    first,
    H: tl.constexpr,
    I: tl.constexpr,  # noqa: E741 - its name in the shapes above
    K: tl.constexpr,
    COUNT: tl.constexpr,
    E: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PDL: tl.constexpr,
):
    """The outputs of a token's experts, each times its weight, added up: ROWS features of [T, H].

    Each program of `_pair_gate_up` let this kernel start once the choice of experts was there, which is read before
    the wait and past the first-level cache: no new launch has emptied that.
    """
    start_next(PDL)
    pairs = tl.program_id(0) * K
    c = tl.arange(0, BLOCK_C)
    experts_k = tl.load(experts + pairs + c, c < K, 0, cache_modifier=".cg") - first
    n = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    k = tl.arange(0, BLOCK_K)
    w_start = weight + tl.where(n < H, n, 0).to(tl.int64)[:, None] * I + k[None, :]
    x_start = inner + pairs.to(tl.int64) * I + k
    wait_for_inputs(PDL)
    scales_k = tl.load(scales + pairs + c, c < K, 0.0)
    total = tl.zeros([ROWS, BLOCK_K], tl.float32)
    biases = tl.zeros([ROWS], tl.float32)
    for choice in tl.static_range(K):
        expert = _of_choice(experts_k, choice, BLOCK_C)
        scale = _of_choice(scales_k, choice, BLOCK_C)
        held = True
        if COUNT < E:
            held = (expert >= 0) & (expert < COUNT)
            expert = tl.where(held, expert, 0)
        own = expert.to(tl.int64) * H * I
        for offset in tl.static_range(0, I, BLOCK_K):
            if COUNT < E or offset + BLOCK_K > I:
                inside = held & (k + offset < I)
                w_nk = tl.load(w_start + own + offset, inside[None, :], 0.0)
                x_k = tl.load(x_start + choice * I + offset, inside, 0.0)
            else:
                w_nk = tl.load(w_start + own + offset)
                x_k = tl.load(x_start + choice * I + offset)
            total += w_nk.to(tl.float32) * (x_k.to(tl.float32) * scale)[None, :]
        if bias is not None:
            biases += tl.load(bias + expert * H + n, held & (n < H), 0.0).to(tl.float32) * scale
    value = tl.sum(total, 1) + biases
    tl.store(out + tl.program_id(0).to(tl.int64) * H + n, value.to(out.dtype.element_ty), n < H)


_GATE_UP = ((2880, 2, 1), (float("inf"), 8, 4))
"""By the most input features: output features of a program, of each half, and its warps. So few input features are all
under way at once in the registers of a warp. Measured: docs/performance-log.md."""
_DOWN_ROWS, _DOWN_WARPS = 1, 1
"""A warp that depends on no other keeps more loads under way: measured in docs/performance-log.md."""
_BLOCK = 256
"""Input features at a time: those of one warp, so that a row is summed within it."""


def each_pair(x_th: Tensor, weights: PackedExperts, routing: Routing, unit: GatedUnit) -> Tensor:
    """What this rank's experts make of each token, times their weights and added up, [1, t, h] in fp32.

    See `grouped`, which is for more tokens.
    """
    (count, hidden, inner_size), (tokens, top_k) = weights.shape, routing.experts_tk.shape
    assert routing.counts_be is not None
    common: dict[str, Any] = dict(H=hidden, I=inner_size, K=top_k, COUNT=count, **overlapped(x_th))
    inner = x_th.new_empty(tokens * top_k, inner_size)
    out = x_th.new_empty(1, tokens, hidden, dtype=torch.float32)
    rows, warps = next((rows, warps) for most, rows, warps in _GATE_UP if hidden <= most)
    _pair_gate_up[(tokens * top_k, triton.cdiv(inner_size, rows))](
        x_th, weights.gate_up, weights.gate_up_bias, routing.experts_tk, inner, weights.first,
        ROWS=rows, BLOCK_K=min(_BLOCK, triton.next_power_of_2(hidden)),
        GATE=unit.gate, LIMIT=unit.limit, OFFSET=unit.offset, num_warps=warps, **common,
    )  # fmt: skip
    _down[(tokens, triton.cdiv(hidden, _DOWN_ROWS))](
        inner, weights.down, weights.down_bias, routing.weights_tk, routing.experts_tk, out, weights.first,
        E=routing.counts_be.shape[1], ROWS=_DOWN_ROWS, BLOCK_C=triton.next_power_of_2(top_k),
        BLOCK_K=min(_BLOCK, triton.next_power_of_2(inner_size)), num_warps=_DOWN_WARPS, **common,
    )  # fmt: skip
    return out
