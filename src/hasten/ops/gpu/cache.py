"""Writing and copying in the paged cache, and the token ids that only the device knows."""

import triton
import triton.language as tl
from torch import Tensor

from hasten.ops.block_caches import BlockCaches
from hasten.ops.cache_scales import CacheScales
from hasten.ops.gpu.eight_bits import in_cache
from hasten.ops.gpu.launch import overlapped, start_next, wait_for_inputs

_WORDS = {8: tl.int64, 4: tl.int32, 2: tl.int16, 1: tl.int8}
"""Types that blocks are copied as, by the greatest power of two, up to 8, that divides their bytes."""
_COPY_BLOCK = 1024
"""Words that one program of `copy_blocks` copies: 8 KiB of the usual block."""


@triton.jit
def _write(
    new_keys,
    new_values,
    keys,
    values,
    slots,
    inverses,
    key_stride,
    value_stride,
    WIDTH: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """Copy one token's keys and values to its slot; heads of D are multiplied by `inverses` for caches of 8 bits."""
    start_next(PDL)
    wait_for_inputs(PDL)
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + row).to(tl.int64)
    if slot >= 0:
        for start in tl.static_range(0, WIDTH, BLOCK):
            at = start + tl.arange(0, BLOCK)
            valid = at < WIDTH
            key = tl.load(new_keys + row * key_stride + at, valid)
            if inverses is not None:
                key = in_cache(key, tl.load(inverses + at // D, valid), keys.dtype.element_ty)
            tl.store(keys + slot * WIDTH + at, key, valid)
            value = tl.load(new_values + row * value_stride + at, valid)
            if inverses is not None:
                value = in_cache(value, tl.load(inverses + (WIDTH + at) // D, valid), values.dtype.element_ty)
            tl.store(values + slot * WIDTH + at, value, valid)


def write_cache(
    key_tmd: Tensor,
    value_tmd: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    slots_t: Tensor,
    *,
    scales: CacheScales | None = None,
) -> None:
    width = key_tmd.shape[1] * key_tmd.shape[2]
    assert key_tmd.stride(1) == value_tmd.stride(1) == key_tmd.shape[2]
    assert key_cache.is_contiguous()
    block = min(2048, triton.next_power_of_2(width))
    _write[(key_tmd.shape[0],)](
        key_tmd, value_tmd, key_cache, value_cache, slots_t, None if scales is None else scales.inverses_2m,
        key_tmd.stride(0), value_tmd.stride(0), WIDTH=width, D=key_tmd.shape[2], BLOCK=block,
        num_warps=max(1, min(8, block // 256)), **overlapped(key_tmd),
    )  # fmt: skip


@triton.jit
def _copy(
    caches,
    sources,
    targets,
    WORD: tl.constexpr,
    WORDS: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """Copy a part of one block of one cache; only its content can be what an earlier kernel writes."""
    n = tl.program_id(0)
    start = tl.load(caches + tl.program_id(1)).to(tl.pointer_type(WORD))
    source = start + tl.load(sources + n).to(tl.int64) * WORDS
    target = start + tl.load(targets + n).to(tl.int64) * WORDS
    at = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    start_next(PDL)
    wait_for_inputs(PDL)
    tl.store(target + at, tl.load(source + at, at < WORDS), at < WORDS)


def copy_blocks(caches: BlockCaches, sources_n: Tensor, targets_n: Tensor) -> None:
    assert sources_n.is_contiguous()
    assert targets_n.is_contiguous()
    for nbytes, addresses in caches.addresses:
        width = next(width for width in _WORDS if nbytes % width == 0)
        words = nbytes // width
        block = min(_COPY_BLOCK, triton.next_power_of_2(words))
        _copy[(len(sources_n), len(addresses), triton.cdiv(words, block))](
            addresses, sources_n, targets_n,
            WORD=_WORDS[width], WORDS=words, BLOCK=block, num_warps=4, **overlapped(sources_n),
        )  # fmt: skip


@triton.jit(do_not_specialize=["count"])
def _resolve(ids, chosen, out, count, BLOCK: tl.constexpr, PDL: tl.constexpr):
    start_next(PDL)
    wait_for_inputs(PDL)
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    valid = at < count
    known = tl.load(ids + at, valid, 0)
    pending = tl.load(chosen - 1 - known, valid & (known < 0), 0)
    tl.store(out + at, tl.where(known < 0, tl.maximum(pending, 0), known), valid)


def resolve_ids(ids_t: Tensor, chosen_r: Tensor) -> Tensor:
    out_t = ids_t.new_empty(ids_t.shape)
    count = ids_t.shape[0]
    _resolve[(triton.cdiv(count, 256),)](ids_t, chosen_r, out_t, count, BLOCK=256, num_warps=4, **overlapped(ids_t))
    return out_t
