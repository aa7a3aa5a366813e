"""Log-probabilities in one pass over the logits. Shapes: r rows, v vocabulary, b logits of a block, c chunks of a row.

The order of logits is that of their images (`sampling.py`), so a chunk's most probable tokens are its greatest keys.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from hasten.ops import reference
from hasten.ops.gpu.launch import overlapped, wait_for_inputs
from hasten.ops.gpu.sampling import _LAST, _NO_KEY, _image, _read
from hasten.ops.logprobs import TopLogprobs

_CHUNK = 4096
"""Logits of one program: with more of them, taking out the greatest one by one takes longer than reading."""
_MAX_TOP = 32
"""Tokens that a program lists; for more, sorting in plain torch is faster."""


@triton.jit
def _chunk_top(
    logits,
    tokens,
    keys,
    sums,
    stride,
    SIZE: tl.constexpr,
    COUNT: tl.constexpr,
    TOP: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """A chunk's greatest keys, its greatest logit, its sum of exponentials and how many logits exceed the token's."""
    wait_for_inputs(PDL)
    r, c, chunks = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    row = logits + r * stride
    tokens_b = c * BLOCK + tl.arange(0, BLOCK)
    x_b = _read(row, tokens_b, SIZE)
    chosen = tl.load(row + tl.maximum(tl.load(tokens + r), 0)).to(tl.float32)
    best = tl.max(x_b, 0)
    shift = tl.where(best > float("-inf"), best, 0.0)
    own = sums + (r * chunks + c) * 3
    tl.store(own, best)
    tl.store(own + 1, tl.sum(tl.exp(x_b - shift), 0))
    tl.store(own + 2, tl.sum((x_b > chosen).to(tl.int32), 0).to(tl.float32))
    keys_b = (_image(x_b, 0).to(tl.int64) << 32) | (_LAST - tokens_b)
    for k in range(COUNT):
        key = tl.max(keys_b, 0)
        tl.store(keys + (r * chunks + c) * TOP + k, key)
        keys_b = tl.where(keys_b == key, _NO_KEY, keys_b)


@triton.jit
def _row_top(
    logits,
    tokens,
    keys,
    sums,
    chosen,
    ranks,
    values,
    ids,
    stride,
    chunks,
    COUNT: tl.constexpr,
    TOP: tl.constexpr,
    CHUNKS: tl.constexpr,
    PDL: tl.constexpr,
):
    """What a row's chunks come to."""
    wait_for_inputs(PDL)
    r = tl.program_id(0).to(tl.int64)
    chunk = tl.arange(0, CHUNKS)
    own, held = sums + (r * chunks + chunk) * 3, chunk < chunks
    best_c = tl.load(own, held, float("-inf"))
    best = tl.max(best_c, 0)
    shift = tl.where(best > float("-inf"), best, 0.0)
    total = tl.sum(tl.load(own + 1, held, 0.0) * tl.exp(best_c - shift), 0)
    logarithm = tl.log(total)
    token = tl.maximum(tl.load(tokens + r), 0)
    tl.store(chosen + r, tl.load(logits + r * stride + token).to(tl.float32) - shift - logarithm)
    # Each count is a whole number below 2^24, so is their sum: exact in fp32.
    tl.store(ranks + r, tl.sum(tl.load(own + 2, held, 0.0), 0).to(tl.int32) + 1)
    at = tl.arange(0, CHUNKS * TOP)
    keys_t = tl.load(keys + r * chunks * TOP + at, (at < chunks * TOP) & (at % TOP < COUNT), _NO_KEY)
    for k in range(COUNT):
        key = tl.max(keys_t, 0)
        keys_t = tl.where(keys_t == key, _NO_KEY, keys_t)
        image = (key >> 32).to(tl.int32)
        value = (image ^ ((image >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
        tl.store(values + r * COUNT + k, value - shift - logarithm)
        tl.store(ids + r * COUNT + k, (0x7FFFFFFF - (key & 0x7FFFFFFF)).to(tl.int32))


def top_logprobs(logits_rv: Tensor, tokens_r: Tensor, count: int) -> TopLogprobs:
    if count > _MAX_TOP:
        return reference.top_logprobs(logits_rv, tokens_r, count)
    rows, size = logits_rv.shape
    assert logits_rv.stride(1) == 1
    count = min(count, size)
    chunks, top = triton.cdiv(size, _CHUNK), triton.next_power_of_2(max(count, 1))
    keys = logits_rv.new_empty(rows, chunks, top, dtype=torch.int64)
    sums = logits_rv.new_empty(rows, chunks, 3, dtype=torch.float32)
    chosen_r = logits_rv.new_empty(rows, dtype=torch.float32)
    ranks_r = logits_rv.new_empty(rows, dtype=torch.int32)
    values_rk = logits_rv.new_empty(rows, count, dtype=torch.float32)
    ids_rk = logits_rv.new_empty(rows, count, dtype=torch.int32)
    options = overlapped(logits_rv)
    stride = logits_rv.stride(0)
    _chunk_top[(rows, chunks)](
        logits_rv, tokens_r, keys, sums, stride, SIZE=size, COUNT=count, TOP=top, BLOCK=_CHUNK, num_warps=4, **options
    )
    _row_top[(rows,)](
        logits_rv,
        tokens_r,
        keys,
        sums,
        chosen_r,
        ranks_r,
        values_rk,
        ids_rk,
        stride,
        chunks,
        COUNT=count,
        TOP=top,
        CHUNKS=triton.next_power_of_2(chunks),
        num_warps=4,
        **options,
    )
    return TopLogprobs(chosen_r, ranks_r, values_rk, ids_rk)
