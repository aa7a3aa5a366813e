"""How beam searches go on, and cache blocks that follow them. A program per search, and per beam and cache.

The candidates of each beam come best first, so the best continuations of all beams are found by merging: the best of
the beams' next candidates is taken until there are enough. What was known before a kernel is read before a barrier.
"""

import triton
import triton.language as tl
from torch import Tensor

from hasten.ops.beams import BeamChoice, BeamMoves, BeamSearches, BeamStates
from hasten.ops.block_caches import BlockCaches
from hasten.ops.gpu.launch import overlapped, wait_for_inputs

_WORDS = {8: tl.int64, 4: tl.int32, 2: tl.int16, 1: tl.int8}
"""Types that tokens of a block are copied as, by the greatest power of two, up to 8, that divides their bytes."""
_BLOCK = 1024
"""Words that a program copies at a time, and numbers of a table."""


@triton.jit
def _choose(
    searches,
    rates,
    end_starts,
    end_ids,
    candidates,
    ids,
    state_logprobs,
    state_order,
    tokens,
    parents,
    logprobs,
    best_beams,
    best_tokens,
    best_logprobs,
    moved,
    moved_logprobs,
    STRIDE: tl.constexpr,
    VOCAB: tl.constexpr,
    WIDTH: tl.constexpr,
    KEEP: tl.constexpr,
    LANES: tl.constexpr,
    ENDS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PDL: tl.constexpr,
):
    """The best continuations of one search, and which beam each that goes on becomes."""
    wait_for_inputs(PDL)
    s = tl.program_id(0)
    own = searches + s * COLUMNS
    slot, first_row, rows = tl.load(own), tl.load(own + 1), tl.load(own + 2)
    width, keep, first = tl.load(own + 3), tl.load(own + 4), tl.load(own + 5)
    rate = tl.load(rates + s)
    end = tl.load(end_starts + s) + tl.arange(0, ENDS)
    ends_e = tl.load(end_ids + end, end < tl.load(end_starts + s + 1), -1)

    lane = tl.arange(0, LANES)
    held = lane < rows
    begun = held & (rows > 1)
    order = tl.load(state_order + slot * WIDTH + lane, begun, 0)
    before = tl.load(state_logprobs + slot * WIDTH + order, begun, 0.0)
    tl.debug_barrier()
    looked_at = tl.zeros([LANES], tl.int32)
    claimed = tl.zeros([LANES], tl.int32)
    going, others = 0, 0
    for j in range(keep):
        total = before + tl.load(candidates + (first_row + order) * STRIDE + looked_at, held, 0.0).to(tl.float64)
        score = total - rate * looked_at.to(tl.float64)
        # rows that are not finite end their search, but must not lead out of bounds before
        score = tl.where(held & (score == score), score, float("-inf"))
        at = tl.min(tl.where(held & (score == tl.max(score, 0)), lane, LANES - 1), 0)
        taken = lane == at
        beam = tl.sum(tl.where(taken, order, 0), 0)
        best = tl.sum(tl.where(taken, total, 0.0), 0)
        token = tl.load(ids + (first_row + beam) * STRIDE + tl.sum(tl.where(taken, looked_at, 0), 0)).to(tl.int32)
        token = tl.minimum(tl.maximum(token, 0), VOCAB - 1)
        looked_at += taken.to(tl.int32)
        tl.store(best_beams + s * KEEP + j, beam)
        tl.store(best_tokens + s * KEEP + j, token)
        tl.store(best_logprobs + s * KEEP + j, best)
        goes = (tl.sum((ends_e == token).to(tl.int32), 0) == 0) & (going < width)
        is_first = tl.sum(tl.where(lane == beam, claimed, 0), 0) == 0
        stays = goes & is_first
        leaves = goes & (is_first == 0)
        tl.store(parents + first + beam, beam, stays)
        tl.store(tokens + first + beam, token, stays)
        tl.store(logprobs + first + beam, best, stays)
        tl.store(state_logprobs + slot * WIDTH + beam, best, stays)
        tl.store(state_order + slot * WIDTH + going, beam, stays)
        other = moved + (s * WIDTH + others) * 3
        tl.store(other, beam, leaves)
        tl.store(other + 1, token, leaves)
        tl.store(other + 2, going, leaves)
        tl.store(moved_logprobs + s * WIDTH + others, best, leaves)
        claimed = tl.where((lane == beam) & goes, 1, claimed)
        going += goes.to(tl.int32)
        others += leaves.to(tl.int32)
    tl.debug_barrier()

    idle = (claimed == 0) & (lane < width)
    rank = tl.cumsum(idle.to(tl.int32), 0) - 1
    joins = idle & (rank < others)
    other = moved + (s * WIDTH + rank) * 3
    best_w = tl.load(moved_logprobs + s * WIDTH + rank, joins, 0.0)
    tl.store(parents + first + lane, tl.load(other, joins, 0), joins)
    tl.store(tokens + first + lane, tl.load(other + 1, joins, 0), joins)
    tl.store(logprobs + first + lane, best_w, joins)
    tl.store(state_logprobs + slot * WIDTH + lane, best_w, joins)
    tl.store(state_order + slot * WIDTH + tl.load(other + 2, joins, 0), lane, joins)


def choose_beams(
    states: BeamStates, searches: BeamSearches, values_rk: Tensor, ids_rk: Tensor, chosen_2b: Tensor, vocab: int
) -> BeamChoice:
    assert values_rk.is_contiguous()
    assert ids_rk.is_contiguous()
    assert chosen_2b.is_contiguous()
    choice, width = BeamChoice.empty(chosen_2b, searches), states.order_sw.shape[1]
    count, lanes = len(searches.numbers_s), triton.next_power_of_2(searches.max_width)
    _choose[(count,)](
        searches.numbers_s,
        searches.rates_s,
        searches.end_starts,
        searches.end_ids,
        values_rk,
        ids_rk,
        states.logprobs_sw,
        states.order_sw,
        chosen_2b[0],
        chosen_2b[1],
        choice.logprobs_b,
        choice.best_beams_sk,
        choice.best_tokens_sk,
        choice.best_logprobs_sk,
        chosen_2b.new_empty(count, width, 3),
        choice.logprobs_b.new_empty(count, width),
        STRIDE=values_rk.shape[1],
        VOCAB=vocab,
        WIDTH=width,
        KEEP=searches.max_keep,
        LANES=lanes,
        ENDS=triton.next_power_of_2(max(searches.max_ends, 1)),
        COLUMNS=searches.numbers_s.shape[1],
        num_warps=1 if lanes <= 128 else 4,
        **overlapped(values_rk),
    )
    return choice


@triton.jit
def _source(rows, first_rows, parents, kept, m):
    """The row of a beam, and that of its parent."""
    parent = tl.load(parents + m)
    parent = tl.load(kept - 1 - parent, parent < 0, parent)
    return tl.load(rows + m), tl.load(first_rows + m) + parent


@triton.jit
def _share(tables, rows, first_rows, parents, whole, kept, width, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """Let the row of a beam begin with the full blocks of its parent."""
    wait_for_inputs(PDL)
    m = tl.program_id(0)
    row, source = _source(rows, first_rows, parents, kept, m)
    blocks = tl.where(row == source, 0, tl.load(whole + m))
    for start in range(0, blocks, BLOCK):
        at = start + tl.arange(0, BLOCK)
        tl.store(tables + row * width + at, tl.load(tables + source * width + at, at < blocks), at < blocks)


@triton.jit
def _copy_tails(
    tables,
    caches,
    rows,
    first_rows,
    parents,
    whole,
    tails,
    kept,
    width,
    WORD: tl.constexpr,
    TOKEN_WORDS: tl.constexpr,
    BLOCK_WORDS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Copy the tokens in the unfinished block of a parent to that of a beam, in one cache."""
    m = tl.program_id(0)
    row, source = _source(rows, first_rows, parents, kept, m)
    words = tl.where(row == source, 0, tl.load(tails + m) * TOKEN_WORDS)
    if words > 0:
        start = tl.load(caches + tl.program_id(1)).to(tl.pointer_type(WORD))
        column = tl.load(whole + m)
        from_block = start + tl.load(tables + source * width + column).to(tl.int64) * BLOCK_WORDS
        to_block = start + tl.load(tables + row * width + column).to(tl.int64) * BLOCK_WORDS
        for first in range(0, words, BLOCK):
            at = first + tl.arange(0, BLOCK)
            tl.store(to_block + at, tl.load(from_block + at, at < words), at < words)


def move_beams(caches: BlockCaches, tables_sn: Tensor, moves: BeamMoves, parents: Tensor) -> None:
    assert tables_sn.is_contiguous()
    rows_m, first_rows_m, parents_m, whole_m, tail_m = moves
    width = tables_sn.shape[1]
    common = (rows_m, first_rows_m, parents_m, whole_m)
    _share[(len(rows_m),)](tables_sn, *common, parents, width, BLOCK=_BLOCK, num_warps=4, **overlapped(tables_sn))
    # Not overlapped with what is before or behind it: kernels of a step read block tables before they wait.
    for nbytes, addresses in caches.addresses:
        token = nbytes // caches.tensors[0].shape[1]
        word = next(word for word in _WORDS if token % word == 0)
        _copy_tails[(len(rows_m), len(addresses))](
            tables_sn, addresses, *common, tail_m, parents, width,
            WORD=_WORDS[word], TOKEN_WORDS=token // word, BLOCK_WORDS=nbytes // word, BLOCK=_BLOCK, num_warps=4,
        )  # fmt: skip
