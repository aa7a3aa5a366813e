"""Products with experts for each pair of a token and an expert: for few tokens, which seldom share an expert.

Shapes: T tokens, K experts a token, H hidden, I inner features of an expert, P = T * K pairs.
"""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from hasten.core.model_config import GatedUnit
from hasten.ops.gpu.activations import gated
from hasten.ops.gpu.expert_groups import row_of
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
    start_next(PDL)  # behind the wait, so that `_pair_down` may read the choice of experts before its own
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


@triton.jit(do_not_specialize=["first", "T"])
def _pair_down(
    inner,
    weight,
    bias,
    scales,
    experts,
    out,
    first,
    T,
    H: tl.constexpr,
    I: tl.constexpr,  # noqa: E741 - its name in the shapes above
    K: tl.constexpr,
    COUNT: tl.constexpr,
    PARTS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PDL: tl.constexpr,
):
    """The output of one pair times its weight, ROWS features, stored by token and choice.

    Each program of `_pair_gate_up` let this kernel start once the choice of experts was there, which is read before
    the wait and past the first-level cache: no new launch has emptied that.
    """
    start_next(PDL)
    pair = tl.program_id(0)
    expert = tl.load(experts + pair, cache_modifier=".cg") - first
    if (expert < 0) | (expert >= COUNT):
        wait_for_inputs(PDL)
        return
    n = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    k = tl.arange(0, BLOCK_K)
    feature = expert.to(tl.int64) * H + tl.where(n < H, n, 0)
    w_start = weight + feature[:, None] * I + k[None, :]
    x_start = inner + pair.to(tl.int64) * I + k
    wait_for_inputs(PDL)
    scale = tl.load(scales + pair)
    total = tl.zeros([ROWS, BLOCK_K], tl.float32)
    for offset in tl.static_range(0, I, BLOCK_K):
        inside = k + offset < I
        w_nk = tl.load(w_start + offset) if offset + BLOCK_K <= I else tl.load(w_start + offset, inside[None, :], 0.0)
        x_k = tl.load(x_start + offset, inside, 0.0)
        total += w_nk.to(tl.float32) * x_k.to(tl.float32)[None, :]
    value = tl.sum(total, 1)
    if bias is not None:
        value += tl.load(bias + expert * H + n, n < H, 0.0).to(tl.float32)
    value = (value * scale).to(out.dtype.element_ty)
    at = row_of(pair, T, K, PARTS).to(tl.int64) * H
    tl.store(out + at + n, value, n < H)


_GATE_UP_ROWS, _DOWN_ROWS = 8, 8
"""Output features of a program, of each half where there are two."""
_BLOCK = 256
"""Input features at a time: those of one warp, so that a row is summed within it."""


def each_pair(
    x_th: Tensor, weights: PackedExperts, routing: Routing, unit: GatedUnit, out: Tensor, *, parts: bool
) -> None:
    """Store what each pair's expert makes of its token, times its weight: see `grouped`, which is for more tokens."""
    (count, hidden, inner_size), (tokens, top_k) = weights.shape, routing.experts_tk.shape
    pairs = tokens * top_k
    common: dict[str, Any] = dict(H=hidden, I=inner_size, K=top_k, COUNT=count, num_warps=4, **overlapped(x_th))
    inner = x_th.new_empty(pairs, inner_size)
    _pair_gate_up[(pairs, triton.cdiv(inner_size, _GATE_UP_ROWS))](
        x_th, weights.gate_up, weights.gate_up_bias, routing.experts_tk, inner, weights.first,
        ROWS=_GATE_UP_ROWS, BLOCK_K=min(_BLOCK, triton.next_power_of_2(hidden)),
        GATE=unit.gate, LIMIT=unit.limit, OFFSET=unit.offset, **common,
    )  # fmt: skip
    _pair_down[(pairs, triton.cdiv(hidden, _DOWN_ROWS))](
        inner, weights.down, weights.down_bias, routing.weights_tk, routing.experts_tk, out, weights.first, tokens,
        PARTS=parts, ROWS=_DOWN_ROWS, BLOCK_K=min(_BLOCK, triton.next_power_of_2(inner_size)), **common,
    )  # fmt: skip
