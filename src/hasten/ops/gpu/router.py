"""Which experts tokens go to. Shapes: T tokens, E experts, H hidden, K experts a token."""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from hasten.ops.gpu.launch import multiprocessors, overlapped, row_warps, start_next, wait_for_inputs
from hasten.ops.gpu.norm import added_up, normed
from hasten.ops.gpu.sums import constants_of, terms_of
from hasten.ops.mixture import Routing
from hasten.ops.partial_sum import PartialSum

_LOWEST = tl.constexpr(-3.0e38)
"""What stands for a logit that is not a number or minus infinity: above what is masked."""
_NONE = tl.constexpr(-(2**31))
"""The rank of what cannot be chosen, or is chosen already."""
_SLOTS = tl.constexpr(1024)
"""Cache slots that are looked at together."""


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
    x_start = x + t.to(tl.int64)[:, None] * H + h[None, :]
    router_start = router + e[:, None] * H + h[None, :]
    if SPLIT_H == BLOCK_H:
        # the only block of the router is read while earlier kernels still run
        inside = (h < H)[None, :]
        router_eh = tl.load(router_start, (e < E)[:, None] & inside, 0.0)
        wait_for_inputs(PDL)
        x_th = tl.load(x_start, (t < T)[:, None] & inside, 0.0)
        total = tl.dot(x_th, router_eh.T, input_precision="ieee")
    else:
        wait_for_inputs(PDL)
        total = tl.zeros([BLOCK_T, BLOCK_E], tl.float32)
        for offset in tl.range(0, SPLIT_H, BLOCK_H, num_stages=3):
            inside = (h + offset < H)[None, :]
            x_th = tl.load(x_start + offset, (t < T)[:, None] & inside, 0.0)
            router_eh = tl.load(router_start + offset, (e < E)[:, None] & inside, 0.0)
            total = tl.dot(x_th, router_eh.T, total, input_precision="ieee")
    part = out + tl.program_id(2).to(tl.int64) * T * E
    tl.store(part + t.to(tl.int64)[:, None] * E + e[None, :], total, (t < T)[:, None] & (e < E)[None, :])


@triton.jit
def _ranks(bits):
    """The bits of numbers in fp32 as integers in the same order, and such integers as those bits."""
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit(do_not_specialize=["part_stride", "added_stride"])
def _norm_logits(
    parts,
    part_stride,
    bias,
    added,
    added_stride,
    added_bias,
    residual,
    residual_rows,
    total_out,
    weight,
    out,
    router,
    logits,
    eps,
    H: tl.constexpr,
    BLOCK_H: tl.constexpr,
    PARTS: tl.constexpr,
    ADDED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_ADDED_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    HAS_ROWS: tl.constexpr,
    OFFSET: tl.constexpr,
    PDL: tl.constexpr,
):
    """The logit of one expert for a single token, whose norm every program computes; the first one stores it."""
    start_next(PDL)
    expert = tl.program_id(0)
    h = tl.arange(0, BLOCK_H)
    valid = h < H
    gain = tl.load(weight + h, valid, 0.0).to(tl.float32)
    if OFFSET:
        gain += 1.0
    bias_h = 0.0
    if HAS_BIAS:
        bias_h = tl.load(bias + h, valid, 0.0).to(tl.float32)
    added_bias_h = 0.0
    if HAS_ADDED_BIAS:
        added_bias_h = tl.load(added_bias + h, valid, 0.0).to(tl.float32)
    router_h = tl.load(router + expert * H + h, valid, 0.0).to(tl.float32)
    wait_for_inputs(PDL)
    x = added_up(
        tl.zeros([], tl.int64), h, valid, bias_h, added_bias_h, parts, part_stride, added, added_stride, residual,
        residual_rows, H, PARTS, ADDED, HAS_BIAS, HAS_ADDED_BIAS, HAS_RESIDUAL, HAS_ROWS,
    ).to(total_out.dtype.element_ty)  # fmt: skip
    y = normed(x.to(tl.float32), valid, gain, 0.0, eps, H, RMS=True).to(out.dtype.element_ty)
    if expert == 0:
        tl.store(total_out + h, x, valid)
        tl.store(out + h, y, valid)
    tl.store(logits + expert, tl.sum(y.to(tl.float32) * router_h, 0))


@triton.jit
def _stand_ins(t, slots, T):
    """The tokens themselves; for padding, which comes last and has no slot, others in turn."""
    s = tl.arange(0, _SLOTS)
    real = tl.zeros([_SLOTS], tl.int32)
    for start in range(0, T, _SLOTS):
        real += (tl.load(slots + start + s, start + s < T, -1) >= 0).to(tl.int32)
    count = tl.sum(real, 0)
    return tl.where(t < count, t, t % tl.maximum(count, 1))


@triton.jit(do_not_specialize=["T"])
def _choose(
    logits,
    bias,
    slots,
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
    HAS_SLOTS: tl.constexpr,
    PDL: tl.constexpr,
):
    """The K best experts of BLOCK_T tokens, their weights, and how many of these tokens go to each expert.

    Logits are compared as integers, of which a warp finds the greatest with one instruction.
    """
    start_next(PDL)
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    e = tl.arange(0, BLOCK_E)
    k = tl.arange(0, BLOCK_K)
    valid = (t < T)[:, None] & (e < E)[None, :]
    row = _stand_ins(t, slots, T) if HAS_SLOTS else t
    start = logits + row.to(tl.int64)[:, None] * E + e[None, :]
    wait_for_inputs(PDL)
    x = tl.load(start, valid, 0.0)
    for part in tl.static_range(1, PARTS):
        x += tl.load(start + part * T.to(tl.int64) * E, valid, 0.0)
    if bias is not None:
        x += tl.load(bias + e, e < E, 0.0).to(tl.float32)[None, :]
    # no token may choose an expert twice, or one that does not exist, whatever its logits are; 0 and -0 are equal
    x = tl.where(x > _LOWEST, tl.where(x == 0.0, 0.0, x), _LOWEST)
    left = tl.where((e < E)[None, :], _ranks(x.to(tl.int32, bitcast=True)), _NONE)
    chosen = tl.zeros([BLOCK_T, BLOCK_K], tl.int32)
    ranks = tl.full([BLOCK_T, BLOCK_K], _NONE, tl.int32)
    taken = tl.zeros([BLOCK_T, BLOCK_E], tl.int32)
    for choice in tl.static_range(K):
        best = tl.max(left, 1)
        index = tl.min(tl.where(left == best[:, None], e[None, :], BLOCK_E), 1)
        here = (k == choice)[None, :]
        chosen = tl.where(here, index[:, None], chosen)
        ranks = tl.where(here, best[:, None], ranks)
        is_it = e[None, :] == index[:, None]
        taken += is_it.to(tl.int32)
        left = tl.where(is_it, _NONE, left)
    values = tl.where((k < K)[None, :], _ranks(ranks).to(tl.float32, bitcast=True), float("-inf"))
    most = tl.max(values, 1)[:, None]
    weight = tl.exp(values - most)
    total = tl.sum(weight, 1)
    if not NORMALIZED:
        total = tl.sum(tl.exp(tl.where((e < E)[None, :], x, float("-inf")) - most), 1)
    at = t.to(tl.int64)[:, None] * K + k[None, :]
    stored = (t < T)[:, None] & (k < K)[None, :]
    tl.store(experts + at, chosen, stored)
    tl.store(weights + at, weight / total[:, None], stored)
    tl.store(counts + tl.program_id(0) * E + e, tl.sum(tl.where((t < T)[:, None], taken, 0), 0), e < E)


@dataclass(frozen=True)
class _Cut:
    """How logits are cut, and tokens for the choice: tokens, experts, bytes of input features; tokens, warps."""

    block_t: int
    block_e: int
    bytes_h: int
    most_parts: int
    choose_t: int
    choose_warps: int


_CUTS = (
    (1, _Cut(16, 32, 256, 16, 1, 1)),
    (64, _Cut(16, 32, 256, 16, 4, 4)),
    (256, _Cut(16, 64, 256, 8, 4, 4)),
    (1024, _Cut(64, 64, 256, 8, 16, 8)),
    (float("inf"), _Cut(64, 64, 256, 8, 64, 8)),
)
"""Each with the most tokens that it is for. The choice has a warp per token where there are few."""


_FIXED_CUT = _Cut(16, 32, 256, 4, 16, 8)
"""Of any number of tokens, where each token's sums are to have a fixed order."""


def route(
    x_th: Tensor,
    router_eh: Tensor,
    top_k: int,
    normalized: bool,
    slots_t: Tensor | None = None,
    *,
    bias_e: Tensor | None = None,
    fixed_order: bool = False,
) -> Routing:
    """See `hasten.ops.route`; padding goes to the experts of other tokens, whose weights are read anyway."""
    tokens = x_th.shape[0]
    assert x_th.is_contiguous()
    assert router_eh.is_contiguous()
    cut = _FIXED_CUT if fixed_order else next(cut for most, cut in _CUTS if tokens <= most)
    if tokens <= 1:
        slots_t = None  # there is no other token for padding to follow
    logits = _computed(x_th, router_eh, cut)
    return _chosen(logits, top_k, normalized, cut, slots_t, bias_e)


def _chosen(
    logits: Tensor, top_k: int, normalized: bool, cut: _Cut, slots_t: Tensor | None, bias_e: Tensor | None
) -> Routing:
    """The experts of tokens by logits in parts, [parts, T, E]."""
    tokens, count = logits.shape[1:]
    blocks = triton.cdiv(tokens, cut.choose_t)
    experts = logits.new_empty(tokens, top_k, dtype=torch.int32)
    weights = logits.new_empty(tokens, top_k)
    counts = logits.new_empty(blocks, count, dtype=torch.int32)
    _choose[(blocks,)](
        logits, bias_e, logits if slots_t is None else slots_t, experts, weights, counts, tokens,
        E=count, K=top_k, PARTS=len(logits), BLOCK_T=cut.choose_t, BLOCK_E=triton.next_power_of_2(count),
        BLOCK_K=triton.next_power_of_2(top_k), NORMALIZED=normalized, HAS_SLOTS=slots_t is not None,
        num_warps=cut.choose_warps, **overlapped(logits),
    )  # fmt: skip
    return Routing(experts, weights, counts, cut.choose_t)


def norm_route(
    x_th: PartialSum,
    weight_h: Tensor,
    eps: float,
    router_eh: Tensor,
    top_k: int,
    normalized: bool,
    *,
    unit_offset: bool = False,
    bias_e: Tensor | None = None,
) -> tuple[Tensor, Tensor, Routing]:
    """See `hasten.ops.norm_route`, of a single token."""
    (rows, width), count = x_th.shape, router_eh.shape[0]
    assert rows == 1
    assert router_eh.is_contiguous()
    total_th, out_th = weight_h.new_empty(1, width), weight_h.new_empty(1, width)
    logits = weight_h.new_empty(1, 1, count, dtype=torch.float32)
    _norm_logits[(count,)](
        *terms_of(x_th, weight_h), total_th, weight_h, out_th, router_eh, logits, eps,
        H=width, BLOCK_H=triton.next_power_of_2(width), **constants_of(x_th), OFFSET=unit_offset,
        num_warps=row_warps(width), **overlapped(weight_h),
    )  # fmt: skip
    return out_th, total_th, _chosen(logits, top_k, normalized, _CUTS[0][1], None, bias_e)


def _computed(x_th: Tensor, router_eh: Tensor, cut: _Cut) -> Tensor:
    """Logits in parts to be added up, [parts, T, E] in fp32: as many as fill the device."""
    (tokens, hidden), count = x_th.shape, router_eh.shape[0]
    block_e, block_h = min(cut.block_e, max(16, triton.next_power_of_2(count))), cut.bytes_h // x_th.dtype.itemsize
    tiles = triton.cdiv(tokens, cut.block_t) * triton.cdiv(count, block_e)
    wanted = triton.next_power_of_2(max(1, triton.cdiv(multiprocessors(x_th.device.index), max(1, tiles))))
    wanted = cut.most_parts if cut is _FIXED_CUT else wanted
    parts = min(cut.most_parts, wanted, triton.next_power_of_2(triton.cdiv(hidden, block_h)))
    split = triton.cdiv(hidden, parts * block_h) * block_h
    logits = x_th.new_empty(triton.cdiv(hidden, split), tokens, count, dtype=torch.float32)
    _logits[(triton.cdiv(tokens, cut.block_t), triton.cdiv(count, block_e), len(logits))](
        x_th, router_eh, logits, tokens,
        H=hidden, E=count, BLOCK_T=cut.block_t, BLOCK_E=block_e, BLOCK_H=block_h, SPLIT_H=split,
        num_warps=4, **overlapped(x_th),
    )  # fmt: skip
    return logits
