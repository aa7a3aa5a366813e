"""The greatest logits of each row, and log-probabilities, in one pass over the logits and a second one over few.

The first pass leaves the maximum of each group of neighbouring logits. The k greatest logits of a row lie in the k
groups with the greatest maxima, whatever the logits are, so the second pass reads those groups alone. Among equals the
lowest id comes first: of equal maxima, then, the first groups count.

Shapes: r rows, v vocabulary, g groups of a row, b logits or groups, c chunks of a row, k greatest logits.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from hasten.ops import reference
from hasten.ops.gpu.launch import overlapped, wait_for_inputs
from hasten.ops.gpu.sampling import _image, _read
from hasten.ops.logprobs import TopLogprobs

_CHUNK = 4096
"""Logits of one program of the first pass."""
_GROUP = 32
_MAX_COUNT = 1024
"""Logits that a program of the second pass finds; for more, sorting in plain torch is faster."""
_RANKED = 32
"""Logits of a row that the others are compared with at a time."""


@triton.jit
def _group_best(
    logits,
    tokens,
    maxima,
    sums,
    stride,
    groups,
    SIZE: tl.constexpr,
    CHUNK_GROUPS: tl.constexpr,
    GROUP: tl.constexpr,
    NORMED: tl.constexpr,
    PDL: tl.constexpr,
):
    """The maxima of a chunk's groups; `NORMED`: its maximum, sum of exponentials, and logits above the token's too."""
    wait_for_inputs(PDL)
    r, c = tl.program_id(0).to(tl.int64), tl.program_id(1)
    row = logits + r * stride
    own_g = c * CHUNK_GROUPS + tl.arange(0, CHUNK_GROUPS)
    x_gb = _read(row, own_g[:, None] * GROUP + tl.arange(0, GROUP)[None, :], SIZE)
    best_g = tl.max(x_gb, 1)
    tl.store(maxima + r * groups + own_g, best_g, own_g < groups)
    if NORMED:
        chosen = tl.load(row + tl.maximum(tl.load(tokens + r), 0)).to(tl.float32)
        best = tl.max(best_g, 0)
        shift = tl.where(best > float("-inf"), best, 0.0)
        own = sums + (r * tl.num_programs(1) + c) * 3
        tl.store(own, best)
        tl.store(own + 1, tl.sum(tl.sum(tl.exp(x_gb - shift), 1), 0))
        tl.store(own + 2, tl.sum(tl.sum((x_gb > chosen).to(tl.int32), 1), 0).to(tl.float32))


@triton.jit
def _keep_greatest(image_b, held_b, numbers_b, COUNT: tl.constexpr, out):
    """Store the numbers of the COUNT greatest images, in the order in which they stand; of equal ones the first.

    At least COUNT are held, and COUNT is at most `_MAX_COUNT`.
    """
    image_b = tl.where(held_b, image_b, -(1 << 31))
    low = tl.min(tl.where(held_b, image_b, 0x7FFFFFFF), 0).to(tl.int64)
    high = tl.max(image_b, 0).to(tl.int64)
    while low < high:  # at least COUNT images reach `low`, and fewer any number above `high`
        middle = (low + high + 1) >> 1
        reach = tl.sum((image_b >= middle.to(tl.int32)).to(tl.int32), 0)
        low = tl.where(reach >= COUNT, middle, low)
        high = tl.where(reach < COUNT, middle - 1, tl.where(reach == COUNT, middle, high))
    cut = low.to(tl.int32)
    more_b = held_b & (image_b > cut)
    equal_b = held_b & (image_b == cut)
    wanted = COUNT - tl.sum(more_b.to(tl.int32), 0)
    # both counts in one number: fewer than 2048 are above the cut
    counts_b = tl.cumsum(more_b.to(tl.int32) + (equal_b.to(tl.int32) << 11), 0)
    equals_b = counts_b >> 11
    slot_b = (counts_b & 2047) + tl.minimum(equals_b, wanted) - 1
    tl.store(out + slot_b, numbers_b, more_b | (equal_b & (equals_b <= wanted)))


@triton.jit
def _row_best(
    logits,
    tokens,
    maxima,
    sums,
    kept,
    chosen,
    ranks,
    values,
    ids,
    stride,
    groups,
    chunks,
    SIZE: tl.constexpr,
    COUNT: tl.constexpr,
    COUNT_GROUPS: tl.constexpr,
    TOP: tl.constexpr,
    TOP_GROUPS: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUP: tl.constexpr,
    CHUNKS: tl.constexpr,
    RANKED: tl.constexpr,
    NORMED: tl.constexpr,
    PDL: tl.constexpr,
):
    """What a row's groups come to; `NORMED`: as log-probabilities, with that of the row's token and its rank."""
    wait_for_inputs(PDL)
    r = tl.program_id(0).to(tl.int64)
    row = logits + r * stride
    norm = 0.0
    if NORMED:
        chunk = tl.arange(0, CHUNKS)
        own, held = sums + (r * chunks + chunk) * 3, chunk < chunks
        best_c = tl.load(own, held, float("-inf"))
        best = tl.max(best_c, 0)
        shift = tl.where(best > float("-inf"), best, 0.0)
        norm = shift + tl.log(tl.sum(tl.load(own + 1, held, 0.0) * tl.exp(best_c - shift), 0))
        token = tl.maximum(tl.load(tokens + r), 0)
        tl.store(chosen + r, tl.load(row + token).to(tl.float32) - norm)
        # Each count is a whole number below 2^24, so is their sum: exact in fp32.
        tl.store(ranks + r, tl.sum(tl.load(own + 2, held, 0.0), 0).to(tl.int32) + 1)
    if COUNT > 0:
        group_g = tl.arange(0, GROUPS)
        image_g = _image(tl.load(maxima + r * groups + group_g, group_g < groups, 0.0), 0)
        own_groups = kept + r * 2 * TOP
        _keep_greatest(image_g, group_g < groups, group_g, COUNT_GROUPS, own_groups)
        tl.debug_barrier()

        at_b = tl.arange(0, TOP_GROUPS * GROUP)
        held_b = at_b < COUNT_GROUPS * GROUP
        tokens_b = tl.load(own_groups + at_b // GROUP, held_b, 0) * GROUP + at_b % GROUP
        held_b &= tokens_b < SIZE
        image_b = _image(_read(row, tl.where(held_b, tokens_b, SIZE), SIZE), 0)
        own_tokens = own_groups + TOP
        _keep_greatest(image_b, held_b, tokens_b, COUNT, own_tokens)
        tl.debug_barrier()

        at_k = tl.arange(0, TOP)
        tokens_k = tl.load(own_tokens + at_k, at_k < COUNT, SIZE)
        x_k = _read(row, tokens_k, SIZE)
        image_k = _image(x_k, 0)
        rank_k = tl.zeros([TOP], tl.int32)
        for start in range(0, COUNT, RANKED):
            at_j = start + tl.arange(0, RANKED)
            image_j = _image(_read(row, tl.load(own_tokens + at_j, at_j < COUNT, SIZE), SIZE), 0)
            before_j = (at_j < COUNT)[None, :] & (at_j[None, :] < at_k[:, None])
            above_kj = (at_j < COUNT)[None, :] & (image_j[None, :] > image_k[:, None])
            above_kj |= before_j & (image_j[None, :] == image_k[:, None])
            rank_k += tl.sum(above_kj.to(tl.int32), 1)
        tl.store(values + r * COUNT + rank_k, tl.where(x_k == 0, 0.0, x_k) - norm, at_k < COUNT)
        tl.store(ids + r * COUNT + rank_k, tokens_k, at_k < COUNT)


def _best(x_rv: Tensor, tokens_r: Tensor, count: int, *, normed: bool) -> TopLogprobs:
    rows, size = x_rv.shape
    assert x_rv.stride(1) == 1
    count = min(count, size)
    groups, chunks = triton.cdiv(size, _GROUP), triton.cdiv(size, _CHUNK)
    count_groups, top = min(count, groups), triton.next_power_of_2(max(count, 1))
    top_groups = triton.next_power_of_2(max(count_groups, 1))
    maxima = x_rv.new_empty(rows, groups, dtype=torch.float32)
    sums = x_rv.new_empty(rows, chunks if normed else 0, 3, dtype=torch.float32)
    found = TopLogprobs(
        x_rv.new_empty(rows if normed else 0, dtype=torch.float32),
        x_rv.new_empty(rows if normed else 0, dtype=torch.int32),
        x_rv.new_empty(rows, count, dtype=torch.float32),
        x_rv.new_empty(rows, count, dtype=torch.int32),
    )
    common = {"SIZE": size, "GROUP": _GROUP, "NORMED": normed, **overlapped(x_rv)}
    _group_best[(rows, chunks)](
        x_rv, tokens_r, maxima, sums, x_rv.stride(0), groups, CHUNK_GROUPS=_CHUNK // _GROUP, num_warps=4, **common
    )
    _row_best[(rows,)](
        x_rv,
        tokens_r,
        maxima,
        sums,
        x_rv.new_empty(rows, 2, top, dtype=torch.int32),
        *found,
        x_rv.stride(0),
        groups,
        chunks,
        COUNT=count,
        COUNT_GROUPS=count_groups,
        TOP=top,
        TOP_GROUPS=top_groups,
        GROUPS=triton.next_power_of_2(groups),
        CHUNKS=triton.next_power_of_2(chunks),
        RANKED=min(top, _RANKED),
        num_warps=8 if top_groups <= 256 else 16,
        **common,
    )
    return found


def top_logprobs(logits_rv: Tensor, tokens_r: Tensor, count: int) -> TopLogprobs:
    if count > _MAX_COUNT:
        return reference.top_logprobs(logits_rv, tokens_r, count)
    return _best(logits_rv, tokens_r, count, normed=True)


def largest(x_rv: Tensor, count: int) -> tuple[Tensor, Tensor]:
    if count > _MAX_COUNT:
        return reference.largest(x_rv, count)
    found = _best(x_rv, x_rv.new_empty(0, dtype=torch.int32), count, normed=False)
    return found.values_rk, found.ids_rk
