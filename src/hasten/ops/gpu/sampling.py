"""The most probable tokens. Shapes: r rows, v vocabulary, b logits of a block.

The bits of an fp32 number, with those below the sign turned over where it is negative, are an integer in the same
order: its image.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from hasten.ops.draws import NONE_LEFT
from hasten.ops.gpu.launch import overlapped, wait_for_inputs

_CHUNK = 2048
"""Logits of one program of `greedy`: a single row of 250,000 then has work for 120 of them."""

_INFINITE = tl.constexpr(0x7F800000)
"""The image of infinity; minus infinity has its complement."""
_LAST = tl.constexpr(0x7FFFFFFF)
_NO_KEY = tl.constexpr(-(1 << 63))
_NONE_LEFT = tl.constexpr(NONE_LEFT)


@triton.jit
def _read(row, tokens_b, SIZE: tl.constexpr):
    """Logits in fp32. NaN reads as infinity, which no maximum overlooks; behind the row is minus infinity."""
    x_b = tl.load(row + tokens_b, tokens_b < SIZE, float("-inf")).to(tl.float32)
    return tl.where(x_b == x_b, x_b, float("inf"))


@triton.jit
def _image(x, BITS: tl.constexpr):
    """The images of fp32 numbers without their lowest bits. Zero has two signs and one image."""
    bits = tl.where(x == 0, 0.0, x).to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)) >> BITS


@triton.jit(do_not_specialize=["begin"])
def _best_of_chunk(logits, keys, stride, begin, SIZE: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """The greatest key of a chunk: the image of the logit, and then how far its token is from the last possible.

    `begin`: the token of the first logit.
    """
    wait_for_inputs(PDL)
    row, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    tokens_b = chunk * BLOCK + tl.arange(0, BLOCK)
    image_b = _image(_read(logits + row * stride, tokens_b, SIZE), 0)
    keys_b = (image_b.to(tl.int64) << 32) | (_LAST - (begin + tokens_b))
    tl.store(keys + row * tl.num_programs(1) + chunk, tl.max(keys_b, 0))


@triton.jit
def _best_of_row(keys, out, chunks, CHUNKS: tl.constexpr, TOKENS: tl.constexpr, PDL: tl.constexpr):
    """The greatest key of a row's chunks, or with TOKENS its token."""
    wait_for_inputs(PDL)
    row, chunk = tl.program_id(0), tl.arange(0, CHUNKS)
    key = tl.max(tl.load(keys + row * chunks + chunk, chunk < chunks, _NO_KEY), 0)
    if TOKENS:
        image = key >> 32
        finite = (image > ~_INFINITE) & (image < _INFINITE)
        none = tl.where(image < _INFINITE, _NONE_LEFT, -1)
        tl.store(out + row, tl.where(finite, _LAST - (key & _LAST), none))
    else:
        tl.store(out + row, key)


def _keys(logits_rv: Tensor, first: int) -> Tensor:
    """The greatest key of each chunk: [r, chunks]."""
    rows, size = logits_rv.shape
    assert logits_rv.stride(1) == 1
    chunks = max(1, triton.cdiv(size, _CHUNK))
    keys = logits_rv.new_empty(rows, chunks, dtype=torch.int64)
    options = overlapped(logits_rv)
    _best_of_chunk[(rows, chunks)](
        logits_rv, keys, logits_rv.stride(0), first, SIZE=size, BLOCK=_CHUNK, num_warps=4, **options
    )
    return keys


def _best(keys: Tensor, dtype: torch.dtype) -> Tensor:
    """Of each row's keys the greatest one, int64, or its token, int32: [r]."""
    rows, chunks = keys.shape
    found_r = keys.new_empty(rows, dtype=dtype)
    _best_of_row[(rows,)](
        keys,
        found_r,
        chunks,
        CHUNKS=triton.next_power_of_2(chunks),
        TOKENS=dtype == torch.int32,
        num_warps=1,
        **overlapped(keys),
    )
    return found_r


def greedy(logits_rv: Tensor) -> Tensor:
    return _best(_keys(logits_rv, 0), torch.int32)


def greedy_keys(logits_rv: Tensor, first: int) -> Tensor:
    return _best(_keys(logits_rv, first), torch.int64)


def tokens_of_keys(keys_r: Tensor) -> Tensor:
    return _best(keys_r.unsqueeze(1), torch.int32)
