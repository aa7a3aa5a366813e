"""Attention of long prompts: keys and values of their sequences are gathered from the cache, then read tile by tile.

Blocks of a cache lie anywhere, so that each key's address is computed; gathered ones are neighbours, and the device's
copy engine fetches a tile of them into shared memory while the one before is multiplied. Gathering 16,384 keys costs
1% of the attention of as many queries.
Shapes: t tokens, n query heads, m key/value heads, d head size, k gathered keys.
"""

from functools import cache
from importlib import import_module
from types import ModuleType
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from hasten.ops.gpu.attend import FAR, shaped, with_sink
from hasten.ops.gpu.launch import start_next, wait_for_inputs
from hasten.ops.plan import GATHER_COLUMNS, TILE, TILE_COLUMNS, AttentionPlan

_GATHERED_BYTES = 64 << 20
"""What gathered keys and values may take, unless those of a single head are more: other heads' are gathered behind."""

_GATHER_OPTIONS = ("BLOCK_SIZE", "D", "BLOCK_D", "PDL", "launch_pdl")
"""Those that it has of the options of all kernels of attention."""


@triton.jit
def _gather(
    keys,
    values,
    tables,
    items,
    out,
    block_stride,
    token_stride,
    head_stride,
    gathered,
    BLOCK_SIZE: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TILE: tl.constexpr,
    COLUMNS: tl.constexpr,
    PDL: tl.constexpr,
):
    """TILE keys of a head and their values, with zeros behind a sequence's last: out [2, heads, gathered, BLOCK_D]."""
    start_next(PDL)
    item = items + tl.program_id(0) * COLUMNS
    head = tl.program_id(1).to(tl.int64)
    table = tables + tl.load(item)
    n = tl.arange(0, TILE)
    key_n = tl.load(item + 1) + n
    held_n = key_n < tl.load(item + 2)
    block_n = tl.load(table + key_n // BLOCK_SIZE, held_n, 0).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    mask_nd = held_n[:, None] & (d < D)[None, :]
    at_n = block_n * block_stride + (key_n % BLOCK_SIZE) * token_stride + head * head_stride
    at_nd = at_n[:, None] + d[None, :]
    target_nd = out + (head * gathered + tl.program_id(0) * TILE + n)[:, None] * BLOCK_D + d[None, :]
    wait_for_inputs(PDL)
    tl.store(target_nd, tl.load(keys + at_nd, mask_nd, 0.0).to(out.dtype.element_ty))
    target_nd += tl.num_programs(1).to(tl.int64) * gathered * BLOCK_D
    tl.store(target_nd, tl.load(values + at_nd, mask_nd, 0.0).to(out.dtype.element_ty))


@triton.jit
def _absorbed(
    q_md,
    keys,
    values,
    row,
    start,
    sum_md,
    weight_m,
    top_m,
    position_m,
    slope_m,
    bias,
    scale,
    cap,
    BLOCK_N: tl.constexpr,
    HAS_SLOPES: tl.constexpr,
    WINDOW: tl.constexpr,
    CAPPED: tl.constexpr,
    FARTHEST: tl.constexpr,
    MASKED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The softmax so far with the keys from `start` on added to it; not MASKED, every query sees all of them."""
    score_mn = tl.dot(q_md, keys.load([row + start, 0]).T, input_precision=PRECISION)
    distance_mn = start + tl.arange(0, BLOCK_N)[None, :] - position_m[:, None]
    if MASKED or CAPPED or HAS_SLOPES or FARTHEST:
        score_mn = shaped(score_mn * scale, distance_mn, slope_m, bias, cap, HAS_SLOPES, CAPPED, FARTHEST)
        scale = 1.0  # else multiplied with where the exponent is computed, by one instruction with the subtraction
    if MASKED:
        seen_mn = distance_mn <= 0
        if WINDOW:
            seen_mn = seen_mn & (distance_mn > -WINDOW)
        score_mn = tl.where(seen_mn, score_mn, FAR)
    new_m = tl.maximum(top_m, tl.max(score_mn, 1) * scale)
    decay_m = tl.exp2(top_m - new_m)
    p_mn = tl.exp2(score_mn * scale - new_m[:, None])
    weight_m = weight_m * decay_m + tl.sum(p_mn, 1)
    sum_md = sum_md * decay_m[:, None]
    v_nd = values.load([row + start, 0])
    return tl.dot(p_mn.to(v_nd.dtype), v_nd, sum_md, input_precision=PRECISION), weight_m, new_m


@triton.jit(do_not_specialize=["first_head"])
def _long_tile(
    query,
    keys,
    values,
    slopes,
    sinks,
    scales,
    items,
    out,
    query_stride,
    gathered,
    first_head,
    scale,
    cap,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
    HAS_SLOPES: tl.constexpr,
    WINDOW: tl.constexpr,
    CAPPED: tl.constexpr,
    FARTHEST: tl.constexpr,
    PRECISION: tl.constexpr,
    COLUMNS: tl.constexpr,
    PDL: tl.constexpr,
):
    """A tile of a sequence's queries, of one head, against all gathered keys that they see.

    `keys` and `values` describe [heads * gathered, BLOCK_D]; heads of this launch begin at query head `first_head`.
    `slopes` and `scales` are those of `_tile` in `attention.py`.
    """
    start_next(PDL)
    own_head = tl.program_id(0)
    head = first_head + own_head
    item = items + tl.program_id(1) * COLUMNS
    row = own_head // GROUP * gathered + tl.load(item)
    query_row = tl.load(item + 1).to(tl.int64)
    out_row = tl.load(item + 2).to(tl.int64)
    count = tl.load(item + 3)
    position = tl.load(item + 4)
    m = tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    mask_md = (m < count)[:, None] & (d < D)[None, :]
    wait_for_inputs(PDL)
    q_md = tl.load(query + (query_row + m)[:, None] * query_stride + head * D + d[None, :], mask_md, 0.0)
    slope = 0.0
    if HAS_SLOPES:
        slope = tl.load(slopes + head).to(tl.float32) * 1.4426950408889634
    if scales is not None:
        scale *= tl.load(scales + head // GROUP)
    slope_m = tl.zeros([BLOCK_M], tl.float32) + slope
    bias = slopes + head * (2 * FARTHEST + 1)
    position_m = position + m
    sum_md = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    weight_m = tl.zeros([BLOCK_M], tl.float32)
    top_m = tl.full([BLOCK_M], FAR, tl.float32)
    # every query sees the keys from `near` to `whole`
    whole = (position + 1) // BLOCK_N * BLOCK_N
    near = 0
    if WINDOW:
        near = tl.cdiv(tl.maximum(position + BLOCK_M - WINDOW, 0), BLOCK_N) * BLOCK_N
        near = tl.minimum(near, whole)
        begin = tl.maximum(position - WINDOW + 1, 0) // BLOCK_N * BLOCK_N
        for start in tl.range(begin, near, BLOCK_N, num_stages=STAGES):
            sum_md, weight_m, top_m = _absorbed(
                q_md, keys, values, row, start, sum_md, weight_m, top_m, position_m, slope_m, bias, scale, cap,
                BLOCK_N, HAS_SLOPES, WINDOW, CAPPED, FARTHEST, True, PRECISION,
            )  # fmt: skip
    for start in tl.range(near, whole, BLOCK_N, num_stages=STAGES):
        sum_md, weight_m, top_m = _absorbed(
            q_md, keys, values, row, start, sum_md, weight_m, top_m, position_m, slope_m, bias, scale, cap,
            BLOCK_N, HAS_SLOPES, WINDOW, CAPPED, FARTHEST, False, PRECISION,
        )  # fmt: skip
    for start in tl.range(whole, position + count, BLOCK_N, num_stages=1):
        sum_md, weight_m, top_m = _absorbed(
            q_md, keys, values, row, start, sum_md, weight_m, top_m, position_m, slope_m, bias, scale, cap,
            BLOCK_N, HAS_SLOPES, WINDOW, CAPPED, FARTHEST, True, PRECISION,
        )  # fmt: skip
    if sinks is not None:
        sink = tl.load(sinks + head).to(tl.float32) * 1.4426950408889634
        sum_md, weight_m, top_m = with_sink(sum_md, weight_m, top_m, sink)
    if scales is not None:
        sum_md *= tl.load(scales + (HEADS + head) // GROUP)
    target = out + ((out_row + m)[:, None] * HEADS + head) * D + d[None, :]
    # a weight is at least 1, that of the greatest score
    tl.store(target, (sum_md / weight_m[:, None]).to(out.dtype.element_ty), mask_md)


def attend_gathered(
    query_tnd: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    slopes: Tensor,
    sinks_n: Tensor | None,
    scales_2m: Tensor | None,
    block_tables: Tensor,
    plan: AttentionPlan,
    out_tnd: Tensor,
    scale: float,
    cap: float,
    common: dict[str, Any],
) -> None:
    """The attention of a plan's long tiles, into their rows of `out_tnd` [t, n, d].

    `common` are the options of all kernels of attention, `scale` and `cap` those of scores in powers of two.
    """
    assert plan.gathers is not None
    assert plan.long_tiles is not None
    heads, kv_heads, width = common["HEADS"], key_cache.shape[2], common["BLOCK_D"]
    group, gathered = heads // kv_heads, TILE * len(plan.gathers)
    options = _options(width, query_tnd.dtype == torch.float32)
    own = {name: option for name, option in common.items() if name != "BLOCK_SIZE"}
    plain = sinks_n is None and not any(common[name] for name in ("HAS_SLOPES", "WINDOW", "CAPPED", "FARTHEST"))
    pairs = _pairs() if plain else None
    if pairs is not None and not pairs.serves(query_tnd, group, width):
        pairs = None
    at_once = max(1, _GATHERED_BYTES // (2 * gathered * width * query_tnd.itemsize))
    for first in range(0, kv_heads, at_once):
        count = min(at_once, kv_heads - first)
        both = query_tnd.new_empty(2, count * gathered, width)
        caches = (cache[:, :, first : first + count] for cache in (key_cache, value_cache))
        _gather[(len(plan.gathers), count)](
            *caches, block_tables, plan.gathers, both, *key_cache.stride()[:3], gathered, TILE=TILE,
            COLUMNS=GATHER_COLUMNS, **{name: common[name] for name in _GATHER_OPTIONS if name in common},
        )  # fmt: skip
        if pairs is not None:
            pairs.attend_pairs(
                query_tnd, both, scales_2m, plan.long_tiles, out_tnd, gathered=gathered, first_head=first * group,
                heads=count * group, group=group, scale=scale,
            )  # fmt: skip
            continue
        keys, values = (TensorDescriptor.from_tensor(each, [options["BLOCK_N"], width]) for each in both)
        _long_tile[(count * group, len(plan.long_tiles))](
            query_tnd, keys, values, slopes, sinks_n, scales_2m, plan.long_tiles, out_tnd, query_tnd.stride(0),
            gathered, first * group, scale, cap, GROUP=group, BLOCK_M=TILE, COLUMNS=TILE_COLUMNS, **options, **own,
        )  # fmt: skip


@cache
def _pairs() -> ModuleType | None:
    """Attention for two heads at a time; None where triton lacks something of the language that it is written in.

    Triton calls that language experimental, and may name its parts anew.
    """
    try:
        return import_module("hasten.ops.gpu.pair_attention")
    except (ImportError, AttributeError):
        return None


def _options(width: int, wide: bool) -> dict[str, Any]:
    """Keys at a time, stages and warps for heads of a padded size; measured: docs/performance-log.md."""
    if wide:
        return {"BLOCK_N": 16, "STAGES": 1, "num_warps": 4, "PRECISION": "ieee"}
    keys, stages = (64, 3) if width <= 128 else (32, 2)
    return {"BLOCK_N": keys, "STAGES": stages, "num_warps": 4, "PRECISION": "tf32"}
