"""Attention over the paged cache, for any mixture of prompts, chunks and single tokens.

Shapes: t tokens, n query heads, m key/value heads, d head size. Caches are [blocks, block size, m, d] in any strides
but a unit one for d. The host divides the work (`plan.py`): single tokens by splits of their keys, several by tiles,
and tiles of long prompts over keys that are gathered first (`long_attention.py`). Queries without keys get zeros.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from hasten.ops.cache_scales import CacheScales
from hasten.ops.gpu.attend import LOG2_E, attend, attend_runs, with_sink
from hasten.ops.gpu.launch import has_warp_groups, overlapped, start_next, wait_for_inputs
from hasten.ops.gpu.library import with_room
from hasten.ops.gpu.long_attention import attend_gathered
from hasten.ops.gpu.splits import one_query, query_group
from hasten.ops.meta import AttentionMeta
from hasten.ops.plan import SPLIT_COLUMNS, SPLIT_STEP, TILE, AttentionPlan, group_rows, programs_per_split


@triton.jit
def _tile(
    query,
    keys,
    values,
    slopes,
    sinks,
    scales,
    tables,
    items,
    out,
    query_stride,
    block_stride,
    token_stride,
    head_stride,
    scale,
    cap,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ONE_BLOCK: tl.constexpr,
    AHEAD: tl.constexpr,
    HAS_SLOPES: tl.constexpr,
    WINDOW: tl.constexpr,
    CAPPED: tl.constexpr,
    CAUSAL: tl.constexpr,
    FARTHEST: tl.constexpr,
    PRECISION: tl.constexpr,
    RUN: tl.constexpr,
    COLUMNS: tl.constexpr,
    CONSECUTIVE: tl.constexpr,
    LETS_NEXT: tl.constexpr,
    PDL: tl.constexpr,
):
    """A tile of a sequence's queries, of one head, against all keys that they see.

    With RUN, BLOCK_M queries of it, by runs of that many keys, as for single queries. Where FARTHEST is not 0, `slopes`
    are biases by distance instead, 2 * FARTHEST + 1 of each head. `scales`: those of caches of 8 bits.
    LETS_NEXT: whether the next kernel may read what this one waits for.
    """
    if not LETS_NEXT:
        start_next(PDL)
    head = tl.program_id(0)
    item = items + tl.program_id(1) * COLUMNS
    table = tables + tl.load(item)
    query_row = tl.load(item + 1).to(tl.int64)
    out_row = tl.load(item + 2).to(tl.int64)
    count = tl.load(item + 3)
    position = tl.load(item + 4)
    m = tl.arange(0, BLOCK_M)
    if RUN:
        first = tl.program_id(2) * BLOCK_M
        count = tl.maximum(tl.minimum(count - first, BLOCK_M), 0)
        query_row, out_row, position = query_row + first, out_row + first, position + first
    d = tl.arange(0, BLOCK_D)
    in_head = d < D
    wait_for_inputs(PDL)
    if LETS_NEXT:
        start_next(PDL)
    mask_md = (m < count)[:, None] & in_head[None, :]
    q_md = tl.load(query + (query_row + m)[:, None] * query_stride + head * D + d[None, :], mask_md, 0.0)
    slope = 0.0
    if HAS_SLOPES:
        slope = tl.load(slopes + head).to(tl.float32) * 1.4426950408889634
    if scales is not None:
        scale *= tl.load(scales + head // GROUP)
    base = (head // GROUP).to(tl.int64) * head_stride
    if CONSECUTIVE:
        base += tl.load(table).to(tl.int64) * block_stride
    end = position + count
    if RUN:
        end = tl.where(count > 0, end, 0)
    if not CAUSAL:
        length = tl.load(item + 5)
        end = tl.minimum(end + WINDOW - 1, length) if WINDOW else length
    begin = 0
    if WINDOW:
        begin = tl.maximum(position - WINDOW + 1, 0) // BLOCK_N * BLOCK_N
    slope_m = tl.zeros([BLOCK_M], tl.float32) + slope
    last_m = position + m
    if not CAUSAL:
        last_m = tl.zeros([BLOCK_M], tl.int32) + (end - 1)
    biases = slopes + head * (2 * FARTHEST + 1)
    if RUN:
        first_run = begin // RUN * RUN
        sink, value_scale = None, None
        if sinks is not None:
            sink = tl.load(sinks + head).to(tl.float32) * 1.4426950408889634
            first_run *= 0  # the first run has the sink, even if the window begins behind its keys
        if scales is not None:
            value_scale = tl.load(scales + (HEADS + head) // GROUP)
        sum_md, weight_m, top_m = attend_runs(
            q_md, keys + base, values + base, table, first_run, begin, end, position + m, last_m, slope_m, biases, sink,
            value_scale, block_stride, token_stride, scale, cap, BLOCK_SIZE, D, BLOCK_M, BLOCK_D, BLOCK_N, ONE_BLOCK,
            AHEAD, HAS_SLOPES, WINDOW, CAPPED, CAUSAL, FARTHEST, PRECISION, RUN,
        )  # fmt: skip
    else:
        sum_md, weight_m, top_m = attend(
            q_md, keys + base, values + base, table, None, begin, end, position + m, last_m, slope_m, biases,
            block_stride, token_stride, scale, cap, BLOCK_SIZE, D, BLOCK_M, BLOCK_D, BLOCK_N, ONE_BLOCK, AHEAD,
            HAS_SLOPES, WINDOW, CAPPED, CAUSAL, FARTHEST, PRECISION, CONSECUTIVE,
        )  # fmt: skip
        if sinks is not None:
            sink = tl.load(sinks + head).to(tl.float32) * 1.4426950408889634
            sum_md, weight_m, top_m = with_sink(sum_md, weight_m, top_m, sink)
        if scales is not None:
            sum_md *= tl.load(scales + (HEADS + head) // GROUP)
    target = out + ((out_row + m)[:, None] * HEADS + head) * D + d[None, :]
    # A weight is at least 1, that of the greatest score, or 0 where there are no keys.
    tl.store(target, (sum_md / tl.maximum(weight_m, 1.0)[:, None]).to(out.dtype.element_ty), mask_md)


def paged_attention(
    query_tnd: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    meta: AttentionMeta,
    scale: float,
    alibi_slopes_n: Tensor | None,
    *,
    window: int | None = None,
    softcap: float | None = None,
    sinks_n: Tensor | None = None,
    causal: bool = True,
    bias_nr: Tensor | None = None,
    scales: CacheScales | None = None,
) -> Tensor:
    plan = meta.plan
    assert plan is not None
    heads, d = query_tnd.shape[1:]
    block_size, kv_heads = key_cache.shape[1:3]
    out_tnd = with_room(query_tnd, meta.num_tokens, heads, d)
    common = dict(
        HEADS=heads,
        BLOCK_SIZE=block_size,
        D=d,
        BLOCK_D=max(16, triton.next_power_of_2(d)),
        HAS_SLOPES=alibi_slopes_n is not None,
        WINDOW=window or 0,
        CAPPED=softcap is not None,
        FARTHEST=0 if bias_nr is None else bias_nr.shape[1] // 2,
        **overlapped(query_tnd),
    )
    assert alibi_slopes_n is None or bias_nr is None, "positions are relative in one way alone"
    slopes = next((biases for biases in (alibi_slopes_n, bias_nr) if biases is not None), query_tnd)
    held = None if scales is None else scales.scales_2m
    shared = (query_tnd, key_cache, value_cache, slopes, sinks_n, held, meta.block_tables)
    block_stride, token_stride, head_stride, _ = key_cache.stride()
    if meta.consecutive:
        token_stride = block_stride // block_size  # that of an axis of one token means nothing
    strides = (query_tnd.stride(0), block_stride, token_stride, head_stride)
    numbers = (*strides, scale * LOG2_E, (softcap or 0.0) * LOG2_E)
    wide, group = query_tnd.dtype == torch.float32, heads // kv_heads
    if plan.long_tiles is not None:
        attend_gathered(*shared, plan, out_tnd, scale * LOG2_E, (softcap or 0.0) * LOG2_E, common)
    beside = _is_beside(plan)
    if plan.tiles is not None:
        whole = scales is None and d <= 128 and not wide and has_warp_groups(query_tnd.device.index)
        options = _consecutive(d, wide) if meta.consecutive else _tiles(meta.run, d, block_size, wide, whole)
        _tile[(heads, len(plan.tiles), TILE // options["BLOCK_M"])](
            *shared, plan.tiles, out_tnd, *numbers, GROUP=group, COLUMNS=plan.tiles.shape[1], CAUSAL=causal,
            CONSECUTIVE=meta.consecutive, LETS_NEXT=beside, **options, **common,
        )  # fmt: skip
    if plan.splits is not None:
        parts = _parts(meta, plan.splits, heads, common["BLOCK_D"])
        kernel, options = _single(
            group, meta.num_tokens, common["BLOCK_D"], block_size, wide, scales is not None, meta.run
        )
        fixed = kv_heads * triton.cdiv(group, options.get("BLOCK_M", 1))
        programs = programs_per_split(heads, kv_heads) if meta.run is None else fixed
        kernel[(programs, len(plan.splits))](
            *shared, plan.splits, out_tnd, *parts, *numbers, COLUMNS=SPLIT_COLUMNS, BESIDE=beside, **options, **common
        )
    return out_tnd


def _is_beside(plan: AttentionPlan) -> bool:
    """Whether splits are computed beside tiles: these leave memory idle and those arithmetic units."""
    return plan.tiles is not None and plan.splits is not None


def _tiles(run: int | None, head_size: int, block_size: int, wide: bool, whole: bool) -> dict[str, Any]:
    """The options of the kernel for tiles.

    `whole`: in a fixed order, whether four warps can compute a tile together, 16 rows each. On other devices they would
    divide the keys, those of 8 bits are widened in registers, and of larger heads no two runs' sums fit there.
    """
    if run is not None:
        together = {"BLOCK_M": TILE, "num_warps": 4, "num_stages": 4} if whole else {}
        return {**_fixed(block_size, wide), **together, "RUN": run}
    keys = _product(16 if wide and head_size > 128 else 32, block_size, wide)
    return {**keys, "BLOCK_M": TILE, "AHEAD": False, "RUN": 0, "num_warps": 4, "num_stages": 1 if wide else 2}


def _consecutive(head_size: int, wide: bool) -> dict[str, Any]:
    """The options for tiles of sequences whose blocks follow each other; measured: docs/performance-log.md."""
    if wide:
        keys, stages = 16 if head_size > 128 else 32, 1
    else:
        keys, stages = (64, 3) if head_size <= 128 else (32, 2)
    product = {"BLOCK_N": keys, "ONE_BLOCK": False, "PRECISION": "ieee" if wide else "tf32"}
    return {**product, "BLOCK_M": TILE, "AHEAD": False, "RUN": 0, "num_warps": 4, "num_stages": stages}


def _fixed(block_size: int, wide: bool) -> dict[str, Any]:
    """The options of both kernels in a fixed order, whatever the number of queries and the size of a group.

    With several warps for 16 rows, matrix units divide the keys of a step among them in one kernel and not in the
    other, and their weights are added up in another order.
    """
    keys = _product(_FIXED_KEYS, block_size, wide)
    warps = {"num_stages": 1, "num_warps": 4} if wide else {"num_stages": 3, "num_warps": 1}
    return {**keys, **warps, "BLOCK_M": _FIXED_ROWS, "AHEAD": True}


_FIXED_KEYS, _FIXED_ROWS = 16, 16
"""Keys at a time, and rows of the matrix product."""


def _single(
    group: int, queries: int, width: int, block_size: int, wide: bool, narrow: bool, run: int | None
) -> tuple[Any, dict[str, Any]]:
    """The kernel for single queries, and its options, for groups of heads of a padded size.

    A single query whose heads have keys of their own takes that for groups too: it leaves multiprocessors idle in any
    case, and matrix units compute a split of 64 keys at once.
    `wide`: queries are in fp32; `narrow`: caches are in 8 bits; `run`: that of a fixed order.
    """
    if run is not None:
        return query_group, {**_fixed(block_size, wide), "GROUP": group, "RUN": run}
    if group == 1 and (queries > 1 or width > _WIDEST_ALONE or wide or narrow):
        lanes, stages, warps = _cut(queries, narrow)
        return one_query, {"BLOCK_N": lanes, "STAGES": stages, "num_warps": warps}
    rows = group_rows(group)
    keys, stages, warps = _group_cut(queries, rows, width, wide, narrow)
    product = _product(keys, block_size, wide)
    return query_group, {
        **product,
        "GROUP": group,
        "BLOCK_M": rows,
        "AHEAD": True,
        "RUN": 0,
        "num_stages": stages,
        "num_warps": warps,
    }


_WIDEST_ALONE = 128
"""Head size up to which that was measured: docs/performance-log.md."""


def _product(keys: int, block_size: int, wide: bool) -> dict[str, Any]:
    """What `attend` must know of its products: `keys` at a time, which begin at a multiple of that number."""
    one_block = block_size % keys == 0 and SPLIT_STEP % keys == 0
    return {"BLOCK_N": keys, "ONE_BLOCK": one_block, "PRECISION": "ieee" if wide else "tf32"}


def _cut(queries: int, narrow: bool) -> tuple[int, int, int]:
    """Keys at a time, stages and warps of a program for single queries of one head.

    Small programs fill the device evenly; but one sequence wants its few programs to be quick, and with many the memory
    is busy anyway and larger pieces suit it. Keys in 8 bits are half as many bytes, so more of them are on their way.
    Measured: docs/performance-log.md.
    """
    if narrow and queries > 2:
        return 8, 5, 1
    return (8, 3, 1) if 2 < queries <= 128 else (16, 3, 2)


def _group_cut(queries: int, rows: int, width: int, wide: bool, narrow: bool) -> tuple[int, int, int]:
    """Keys at a time, stages and warps of a program for single queries of a group of heads, of padded sizes.

    Few programs each have much in flight, but leave room for others beside them; with many the memory is busy anyway,
    and a single warp waits for no other. Keys in 8 bits are half as many bytes, and were measured up to 16 queries.
    Measured: docs/performance-log.md.
    """
    warps = -(-rows * width // 2048)  # 64 registers of a thread hold its share of the sums
    if wide:
        return 16, 1, max(4, warps)
    if queries <= 16 or (queries <= 128 and not narrow):
        return min(64, 8192 // width), 3 if 16 < queries <= 48 else 2, max(4, warps)
    if queries <= 32:
        return min(32, 4096 // width), 4, max(2, warps)
    return 16, 3, warps


def _parts(meta: AttentionMeta, splits: Tensor, heads: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """Where splits of one query leave their results for each other; one place for all layers, which take turns."""
    buffers = meta.scratch.get("parts")
    if buffers is None:
        buffers = meta.scratch["parts"] = (
            splits.new_empty(len(splits), heads, width, dtype=torch.float32),
            splits.new_empty(len(splits), heads, 2, dtype=torch.float32),
            splits.new_zeros(meta.num_tokens, heads),
        )
    return buffers
