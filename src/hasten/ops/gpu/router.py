"""Which experts tokens go to. Shapes: T tokens, E experts, H hidden, K experts a token."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from hasten.ops.gpu.launch import overlapped, start_next, wait_for_inputs
from hasten.ops.mixture import Routing

_FEW = 64
"""Up to so many tokens, the sums over the hidden size are cut into parts, so that programs fill the device."""
_LOWEST = tl.constexpr(-3.0e38)
"""What stands for a logit that is not a number or minus infinity: above what is masked."""


@triton.jit(do_not_specialize=["T"])
def _logits(
    x,
    router,
    out,
    T,
    H: tl.constexpr,
    E: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_H: tl.constexpr,
    SPLIT_H: tl.constexpr,
    PDL: tl.constexpr,
):
    """Logits of BLOCK_T tokens and BLOCK_E experts in fp32; each part of H stores its own sums, [parts, T, E]."""
    start_next(PDL)
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    e = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)
    h = tl.program_id(2) * SPLIT_H + tl.arange(0, BLOCK_H)
    wait_for_inputs(PDL)
    x_start = x + t.to(tl.int64)[:, None] * H + h[None, :]
    router_start = router + e[:, None] * H + h[None, :]
    total = tl.zeros([BLOCK_T, BLOCK_E], tl.float32)
    for offset in tl.range(0, SPLIT_H, BLOCK_H, num_stages=3):
        inside = (h + offset < H)[None, :]
        x_th = tl.load(x_start + offset, (t < T)[:, None] & inside, 0.0)
        router_eh = tl.load(router_start + offset, (e < E)[:, None] & inside, 0.0)
        total = tl.dot(x_th, router_eh.T, total, input_precision="ieee")
    part = out + tl.program_id(2).to(tl.int64) * T * E
    tl.store(part + t.to(tl.int64)[:, None] * E + e[None, :], total, (t < T)[:, None] & (e < E)[None, :])


@triton.jit(do_not_specialize=["T"])
def _choose(
    logits,
    experts,
    weights,
    counts,
    T,
    E: tl.constexpr,
    K: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_K: tl.constexpr,
    NORMALIZED: tl.constexpr,
    PDL: tl.constexpr,
):
    """The K best experts of BLOCK_T tokens, their weights, and how many of these tokens go to each expert."""
    start_next(PDL)
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    e = tl.arange(0, BLOCK_E)
    k = tl.arange(0, BLOCK_K)
    valid = (t < T)[:, None] & (e < E)[None, :]
    start = logits + t.to(tl.int64)[:, None] * E + e[None, :]
    wait_for_inputs(PDL)
    x = tl.load(start, valid, 0.0)
    for part in tl.static_range(1, PARTS):
        x += tl.load(start + part * T.to(tl.int64) * E, valid, 0.0)
    # no token may choose an expert twice, or one that does not exist, whatever its logits are
    x = tl.where((e < E)[None, :], tl.where(x > _LOWEST, x, _LOWEST), float("-inf"))
    left = x
    chosen = tl.zeros([BLOCK_T, BLOCK_K], tl.int32)
    values = tl.full([BLOCK_T, BLOCK_K], float("-inf"), tl.float32)
    taken = tl.zeros([BLOCK_T, BLOCK_E], tl.int32)
    for choice in tl.static_range(K):
        best, index = tl.max(left, 1, return_indices=True, return_indices_tie_break_left=True)
        here = (k == choice)[None, :]
        chosen = tl.where(here, index[:, None], chosen)
        values = tl.where(here, best[:, None], values)
        is_it = e[None, :] == index[:, None]
        taken += is_it.to(tl.int32)
        left = tl.where(is_it, float("-inf"), left)
    most = tl.max(values, 1)[:, None]
    weight = tl.exp(values - most)
    total = tl.sum(weight, 1)
    if not NORMALIZED:
        total = tl.sum(tl.exp(x - most), 1)
    at = t.to(tl.int64)[:, None] * K + k[None, :]
    stored = (t < T)[:, None] & (k < K)[None, :]
    tl.store(experts + at, chosen, stored)
    tl.store(weights + at, weight / total[:, None], stored)
    tl.store(counts + tl.program_id(0) * E + e, tl.sum(tl.where((t < T)[:, None], taken, 0), 0), e < E)


def route(x_th: Tensor, router_eh: Tensor, top_k: int, normalized: bool) -> Routing:
    """See `hasten.ops.route`."""
    (tokens, hidden), count = x_th.shape, router_eh.shape[0]
    assert x_th.is_contiguous()
    assert router_eh.is_contiguous()
    few = tokens <= _FEW
    block_h = 64 if few else 128
    parts = min(8, triton.cdiv(hidden, block_h)) if few else 1
    split = triton.cdiv(hidden, parts * block_h) * block_h
    block_t, block_e = 16 if few else 64, min(32 if few else 64, max(16, triton.next_power_of_2(count)))
    logits = x_th.new_empty(parts, tokens, count, dtype=torch.float32)
    _logits[(triton.cdiv(tokens, block_t), triton.cdiv(count, block_e), parts)](
        x_th, router_eh, logits, tokens,
        H=hidden, E=count, BLOCK_T=block_t, BLOCK_E=block_e, BLOCK_H=block_h, SPLIT_H=split,
        num_warps=4, **overlapped(x_th),
    )  # fmt: skip
    blocks = triton.cdiv(tokens, block_t)
    experts = x_th.new_empty(tokens, top_k, dtype=torch.int32)
    weights = x_th.new_empty(tokens, top_k, dtype=torch.float32)
    counts = x_th.new_empty(blocks, count, dtype=torch.int32)
    _choose[(blocks,)](
        logits, experts, weights, counts, tokens,
        E=count, K=top_k, PARTS=parts, BLOCK_T=block_t, BLOCK_E=triton.next_power_of_2(count),
        BLOCK_K=triton.next_power_of_2(top_k), NORMALIZED=normalized, num_warps=4 if few else 8, **overlapped(x_th),
    )  # fmt: skip
    return Routing(experts, weights, counts, block_t)
