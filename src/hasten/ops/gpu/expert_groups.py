"""Products with experts over pairs that are sorted by expert: for many tokens.

A program multiplies some features of an expert with a tile of its pairs. There are as many programs as the choice of
experts could need at most, whatever it is, and those without a tile end at once: the host need not know it.

Shapes: T tokens, K experts a token, H hidden, I inner features of an expert, P = T * K pairs.
"""

from dataclasses import dataclass
from typing import Any

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from hasten.core.model_config import GatedUnit
from hasten.ops.gpu.activations import gated
from hasten.ops.gpu.launch import has_warp_groups, overlapped, shared_memory, start_next, wait_for_inputs
from hasten.ops.mixture import PackedExperts, Routing


@triton.jit(do_not_specialize=["T", "BLOCKS", "first"])
def _sort(
    experts,
    counts,
    order,
    bounds,
    T,
    BLOCKS,
    first,
    E: tl.constexpr,
    COUNT: tl.constexpr,
    K: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_M: tl.constexpr,
    PDL: tl.constexpr,
):
    """Sort the pairs of BLOCK_T tokens into those of all, by expert and then by token.

    `bounds` [2, COUNT] gets the end of each expert's pairs in `order`, and of its tiles of BLOCK_M pairs.
    """
    start_next(PDL)
    block = tl.program_id(0)
    t = block * BLOCK_T + tl.arange(0, BLOCK_T)
    e = tl.arange(0, BLOCK_E)
    held = (e >= first) & (e < first + COUNT)
    wait_for_inputs(PDL)
    total = tl.zeros([BLOCK_E], tl.int32)
    before = tl.zeros([BLOCK_E], tl.int32)
    for start in range(0, BLOCKS, BLOCK_B):
        b = start + tl.arange(0, BLOCK_B)
        part = tl.load(counts + b[:, None] * E + e[None, :], (b < BLOCKS)[:, None] & held[None, :], 0)
        total += tl.sum(part, 0)
        before += tl.sum(tl.where((b < block)[:, None], part, 0), 0)
    ends = tl.cumsum(total, 0)
    if block == 0:
        tl.store(bounds + e - first, ends, held)
        tl.store(bounds + COUNT + e - first, tl.cumsum((total + BLOCK_M - 1) // BLOCK_M, 0), held)
    taken = tl.zeros([BLOCK_T, BLOCK_E], tl.int32)
    for k in tl.static_range(K):
        expert = tl.load(experts + t * K + k, t < T, -1)
        taken += (expert[:, None] == e[None, :]).to(tl.int32)
    index = tl.cumsum(taken, 0) - taken + (ends - total + before)[None, :]
    for k in tl.static_range(K):
        expert = tl.load(experts + t * K + k, t < T, -1)
        at = tl.sum(tl.where(expert[:, None] == e[None, :], index, 0), 1)
        tl.store(order + at, t * K + k, (expert >= first) & (expert < first + COUNT))


@triton.jit
def _tile(bounds, tile, COUNT: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_M: tl.constexpr):
    """The expert of a tile, COUNT if there is none, its first place in the order of pairs, all, and which are real.

    All bounds are read at once, since each read would wait for the one before it.
    """
    e = tl.arange(0, BLOCK_E)
    ends = tl.load(bounds + e, e < COUNT, 2147483647)
    tile_ends = tl.load(bounds + COUNT + e, e < COUNT, 2147483647)
    before = tile_ends <= tile
    expert = tl.sum(before.to(tl.int32), 0)
    earlier = tl.max(tl.where(before, tile_ends, 0), 0)
    begin = tl.max(tl.where(before, ends, 0), 0)
    end = tl.min(tl.where(before, 2147483647, ends), 0)
    first = begin + (tile - earlier) * BLOCK_M
    index = first + tl.arange(0, BLOCK_M)
    return expert, first, tl.where(index < end, index, begin), index < end


@triton.jit
def row_of(pair, T, K: tl.constexpr, PARTS: tl.constexpr):
    """The row of a pair among outputs [K, T, H] if there are parts, else [T, K, H]."""
    return (pair % K) * T + pair // K if PARTS else pair


@triton.jit
def _grouped_gate_up(
    x,
    weight,
    bias,
    order,
    bounds,
    inner,
    H: tl.constexpr,
    I: tl.constexpr,  # noqa: E741 - its name in the shapes above
    K: tl.constexpr,
    COUNT: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    GATE: tl.constexpr,
    LIMIT: tl.constexpr,
    OFFSET: tl.constexpr,
    DESCRIBED: tl.constexpr,
    PDL: tl.constexpr,
):
    """The gated unit of a tile of pairs, BLOCK_N features of both halves, stored in the order of pairs: [P, I].

    With DESCRIBED, `weight` describes its rows, those of all experts.
    """
    start_next(PDL)
    wait_for_inputs(PDL)
    features: tl.constexpr = (I + BLOCK_N - 1) // BLOCK_N
    expert, _, index, real = _tile(bounds, tl.program_id(0) // features, COUNT, BLOCK_E, BLOCK_M)
    if expert == COUNT:
        return
    first_n = tl.program_id(0) % features * BLOCK_N
    n = first_n + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    token = tl.load(order + index) // K
    x_start = x + token.to(tl.int64)[:, None] * H + k[None, :]
    if not DESCRIBED:
        feature = expert.to(tl.int64) * 2 * I + tl.where(n < I, n, 0)
        gate_start = weight + feature[:, None] * H + k[None, :]
        up_start = gate_start + I * H
    gate = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    up = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for offset in tl.range(0, H, BLOCK_K, num_stages=STAGES):
        inside = (k + offset < H)[None, :]
        x_mk = tl.load(x_start + offset) if H % BLOCK_K == 0 else tl.load(x_start + offset, inside, 0.0)
        if DESCRIBED:
            gate_nk = weight.load([expert * (2 * I) + first_n, offset])
            up_nk = weight.load([expert * (2 * I) + I + first_n, offset])
        elif H % BLOCK_K == 0:
            gate_nk = tl.load(gate_start + offset)
            up_nk = tl.load(up_start + offset)
        else:
            gate_nk = tl.load(gate_start + offset, inside, 0.0)
            up_nk = tl.load(up_start + offset, inside, 0.0)
        gate = tl.dot(gate_nk, x_mk.T, gate, input_precision="ieee")
        up = tl.dot(up_nk, x_mk.T, up, input_precision="ieee")
    if bias is not None:
        bias_start = bias + expert * 2 * I + n
        gate += tl.load(bias_start, n < I, 0.0).to(tl.float32)[:, None]
        up += tl.load(bias_start + I, n < I, 0.0).to(tl.float32)[:, None]
    value = gated(gate, up, GATE, LIMIT, OFFSET).to(inner.dtype.element_ty)
    tl.store(inner + index.to(tl.int64)[None, :] * I + n[:, None], value, real[None, :] & (n < I)[:, None])


@triton.jit(do_not_specialize=["T"])
def _grouped_down(
    inner,
    weight,
    bias,
    scales,
    order,
    bounds,
    out,
    T,
    H: tl.constexpr,
    I: tl.constexpr,  # noqa: E741 - its name in the shapes above
    K: tl.constexpr,
    COUNT: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    DESCRIBED: tl.constexpr,
    PDL: tl.constexpr,
):
    """The outputs of a tile of pairs times their weights, BLOCK_N features, stored by token and choice.

    Features are the rows of the product, since few pairs fill no rows of a matrix instruction. In the largest tiles
    they are the columns: an instruction has up to 256 of these for 64 rows, and reads less per operation. With
    DESCRIBED, `weight` and `inner` describe their rows, those of all experts and of all pairs.
    """
    start_next(PDL)
    pairs_are_rows: tl.constexpr = BLOCK_M >= 128
    wait_for_inputs(PDL)
    features: tl.constexpr = (H + BLOCK_N - 1) // BLOCK_N
    expert, first, index, real = _tile(bounds, tl.program_id(0) // features, COUNT, BLOCK_E, BLOCK_M)
    if expert == COUNT:
        return
    first_n = tl.program_id(0) % features * BLOCK_N
    n = first_n + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    pair = tl.load(order + index)
    scale = tl.load(scales + pair)
    if not DESCRIBED:
        x_start = inner + index.to(tl.int64)[:, None] * I + k[None, :]
        feature = expert.to(tl.int64) * H + tl.where(n < H, n, 0)
        w_start = weight + feature[:, None] * I + k[None, :]
    total = tl.zeros([BLOCK_M, BLOCK_N] if pairs_are_rows else [BLOCK_N, BLOCK_M], tl.float32)
    for offset in tl.range(0, I, BLOCK_K, num_stages=STAGES):
        if DESCRIBED:
            x_mk = inner.load([first, offset])
            w_nk = weight.load([expert * H + first_n, offset])
        elif I % BLOCK_K == 0:
            x_mk = tl.load(x_start + offset)
            w_nk = tl.load(w_start + offset)
        else:
            inside = (k + offset < I)[None, :]
            x_mk = tl.load(x_start + offset, inside, 0.0)
            w_nk = tl.load(w_start + offset, inside, 0.0)
        if pairs_are_rows:
            total = tl.dot(x_mk, w_nk.T, total, input_precision="ieee")
        else:
            total = tl.dot(w_nk, x_mk.T, total, input_precision="ieee")
    if pairs_are_rows:
        total = total.T
    if bias is not None:
        total += tl.load(bias + expert * H + n, n < H, 0.0).to(tl.float32)[:, None]
    value = (total * scale[None, :]).to(out.dtype.element_ty)
    at = row_of(pair, T, K, PARTS).to(tl.int64) * H
    tl.store(out + at[None, :] + n[:, None], value, real[None, :] & (n < H)[:, None])


@dataclass(frozen=True)
class _Cut:
    """How grouped products are cut: pairs, features of each half and of the output, input features, stages, warps."""

    block_m: int
    gate_up_n: int
    down_n: int
    block_k: int
    stages: int
    warps: int


_CUTS = (
    (4, _Cut(16, 32, 64, 128, 4, 4)),
    (16, _Cut(32, 32, 64, 128, 4, 4)),
    (64, _Cut(64, 64, 64, 64, 4, 4)),
    (float("inf"), _Cut(128, 128, 256, 64, 4, 8)),
)
"""By the largest number of pairs of an expert on average. Chosen by counting bytes; docs/performance-log.md."""


def grouped(
    x_th: Tensor, weights: PackedExperts, routing: Routing, unit: GatedUnit, out: Tensor, *, parts: bool
) -> None:
    """Store what each pair's expert makes of its token, times its weight.

    `out` is [K, T, H] if it has `parts`, else [T, K, H]; where another rank holds the expert, it stays as it is.
    """
    assert routing.counts_be is not None
    (count, hidden, inner_size), (tokens, top_k) = weights.shape, routing.experts_tk.shape
    pairs, all_experts = tokens * top_k, routing.counts_be.shape[1]
    cut = next(cut for most, cut in _CUTS if pairs <= most * all_experts)
    order, bounds = _sorted(weights, routing, cut.block_m)
    tiles = pairs // cut.block_m + min(pairs, count)
    inner = x_th.new_empty(pairs, inner_size)
    common = dict(
        H=hidden, I=inner_size, K=top_k, COUNT=count, BLOCK_E=triton.next_power_of_2(count), BLOCK_M=cut.block_m,
        num_warps=cut.warps, **overlapped(x_th),
    )  # fmt: skip
    described = _described(cut, weights, x_th)
    blocks = _blocks(cut, cut.gate_up_n, 2, inner_size, hidden, x_th)
    _grouped_gate_up[(tiles * triton.cdiv(inner_size, blocks["BLOCK_N"]),)](
        x_th, _rows(weights.gate_up, described, blocks["BLOCK_N"], blocks), weights.gate_up_bias, order, bounds, inner,
        GATE=unit.gate, LIMIT=unit.limit, OFFSET=unit.offset, DESCRIBED=described, **blocks, **common,
    )  # fmt: skip
    blocks = _blocks(cut, cut.down_n, 1, hidden, inner_size, x_th)
    _grouped_down[(tiles * triton.cdiv(hidden, blocks["BLOCK_N"]),)](
        _rows(inner, described, cut.block_m, blocks), _rows(weights.down, described, blocks["BLOCK_N"], blocks),
        weights.down_bias, routing.weights_tk, order, bounds, out, tokens,
        PARTS=parts, DESCRIBED=described, **blocks, **common,
    )  # fmt: skip


_DESCRIBED_PAIRS = 128
"""Pairs of a tile from which on the device copies tiles of rows by itself."""


def _described(cut: _Cut, weights: PackedExperts, x_th: Tensor) -> bool:
    """Whether kernels take descriptors of rows, for which these must have whole 16 bytes."""
    _, hidden, inner = weights.shape
    large = cut.block_m >= _DESCRIBED_PAIRS and x_th.dtype.itemsize == 2
    return large and hidden % 8 == 0 and inner % 8 == 0 and has_warp_groups(x_th.device.index)


def _rows(tensor: Tensor | None, described: bool, rows: int, blocks: dict[str, Any]) -> Any:
    """A tensor, or a descriptor that copies `rows` of its rows and a block of their features at a time."""
    if tensor is None or not described:
        return tensor
    return TensorDescriptor.from_tensor(tensor.flatten(0, -2), [rows, blocks["BLOCK_K"]])


def _sorted(weights: PackedExperts, routing: Routing, block_m: int) -> tuple[Tensor, Tensor]:
    """Pairs in the order of experts, [P], and the ends of experts in it and in tiles of `block_m` pairs, [2, COUNT]."""
    assert routing.counts_be is not None
    (tokens, top_k), (blocks, all_experts) = routing.experts_tk.shape, routing.counts_be.shape
    order = routing.experts_tk.new_empty(tokens * top_k)
    bounds = routing.experts_tk.new_empty(2, weights.count)
    _sort[(blocks,)](
        routing.experts_tk, routing.counts_be, order, bounds, tokens, blocks, weights.first,
        E=all_experts, COUNT=weights.count, K=top_k, BLOCK_T=routing.block,
        BLOCK_E=triton.next_power_of_2(all_experts), BLOCK_B=32, BLOCK_M=block_m,
        num_warps=8, **overlapped(order),
    )  # fmt: skip
    return order, bounds


def _blocks(cut: _Cut, features: int, halves: int, out: int, into: int, x_th: Tensor) -> dict[str, Any]:
    """How one product is cut: input features in whole blocks where they can be, and as many stages as fit.

    Each stage has both operands in shared memory, with the features of one half or both.
    """
    block_n = min(features, max(16, triton.next_power_of_2(out)))
    block_k = min(cut.block_k, max(16, into & -into, triton.next_power_of_2(into) if into < cut.block_k else 0))
    stage = (cut.block_m + halves * block_n) * block_k * x_th.dtype.itemsize
    stages = max(1, min(cut.stages, shared_memory(x_th.device.index) // stage))
    return {"BLOCK_N": block_n, "BLOCK_K": block_k, "STAGES": stages}
