"""How beam searches go on: see `hasten.ops.choose_beams`. Addresses are of int32 numbers and fp64 log-probabilities."""

import numpy as np

from hasten.ops.native.code.functions import kernel, part
from hasten.ops.native.code.simd import load, load_f32, load_f64, load_i32, load_i64, stack, store, store_f32, store_i32
from hasten.ops.native.code.wide import store_f64

MOST_KEPT = 256
"""Continuations of a search that there is room for."""
_scores = stack(8 * MOST_KEPT)
_claims = stack(4 * MOST_KEPT)


@part
def _put(scores, beams, tokens, totals, held, keep, score, beam, token, total):
    """Put a continuation into the best ones so far, behind its equals, if it is one of them; how many there are now."""
    if held == keep:
        if not score > load_f64(scores + 8 * (held - 1)):
            return held
    else:
        held += 1
    at = held - 1
    while at > 0 and score > load_f64(scores + 8 * at - 8):
        store_f64(scores + 8 * at, load_f64(scores + 8 * at - 8))
        store_f64(totals + 8 * at, load_f64(totals + 8 * at - 8))
        store_i32(beams + 4 * at, load_i32(beams + 4 * at - 4))
        store_i32(tokens + 4 * at, load_i32(tokens + 4 * at - 4))
        at -= 1
    store_f64(scores + 8 * at, score)
    store_f64(totals + 8 * at, total)
    store_i32(beams + 4 * at, beam)
    store_i32(tokens + 4 * at, token)
    return held


@part
def _ends(token, first, end):
    while first < end:
        if load_i32(first) == token:
            return True
        first += 4
    return False


@part
def _go_on(beams, tokens, totals, held, width, end_ids, ends_end, order, logprobs, chosen, parents, chosen_logprobs):
    """Let the best continuations that do not end be the beams from now on."""
    claims = _claims()
    for beam_number in range(width):
        store_i32(claims + 4 * beam_number, np.int32(0))
    going = 0
    for at in range(held):
        if going < width and not _ends(load_i32(tokens + 4 * at), end_ids, ends_end):
            claim = claims + 4 * load_i32(beams + 4 * at)
            store_i32(claim, load_i32(claim) | np.int32(1))
            going += 1
    number, idle = 0, 0
    for at in range(held):
        token = load_i32(tokens + 4 * at)
        if number < going and not _ends(token, end_ids, ends_end):
            beam, total = load_i32(beams + 4 * at), load_f64(totals + 8 * at)
            seat = np.int64(beam)
            if load_i32(claims + 4 * seat) == 1:
                store_i32(claims + 4 * seat, np.int32(2))
            else:
                while load_i32(claims + 4 * idle):
                    idle += 1
                seat = np.int64(idle)
                idle += 1
            store_i32(order + 4 * number, np.int32(seat))
            store_f64(logprobs + 8 * seat, total)
            store_f64(chosen_logprobs + 8 * seat, total)
            store_i32(chosen + 4 * seat, token)
            store_i32(parents + 4 * seat, beam)
            number += 1


@kernel
def _beams(p, thread, threads):
    """The continuations of all searches, from the candidates [r, k] of their beams."""
    searches, numbers, rates = load_i64(p), load_i64(p + 8), load_i64(p + 16)
    end_starts, end_ids = load_i64(p + 24), load_i64(p + 32)
    values, ids, columns = load_i64(p + 40), load_i64(p + 48), load_i64(p + 56)
    all_logprobs, orders, seats = load_i64(p + 64), load_i64(p + 72), load_i64(p + 80)
    all_chosen, successors, chosen_logprobs = load_i64(p + 88), load_i64(p + 96), load_i64(p + 104)
    best_beams, best_tokens, best_totals, most = (
        load_i64(p + 112),
        load_i64(p + 120),
        load_i64(p + 128),
        load_i64(p + 136),
    )
    last_token = np.int32(load_i64(p + 144) - 1)
    scores = _scores()
    for s in range(searches * thread // threads, searches * (thread + 1) // threads):
        own, rate = numbers + 24 * s, load_f64(rates + 8 * s)
        slot, first_row, rows = np.int64(load_i32(own)), load_i32(own + 4), load_i32(own + 8)
        width, keep, first = load_i32(own + 12), load_i32(own + 16), load_i32(own + 20)
        order, logprobs = orders + 4 * seats * slot, all_logprobs + 8 * seats * slot
        beams, tokens, totals = best_beams + 4 * most * s, best_tokens + 4 * most * s, best_totals + 8 * most * s
        held = 0
        for rank in range(rows):
            beam = load_i32(order + 4 * rank) if rows > 1 else np.int32(0)
            before = load_f64(logprobs + 8 * beam) if rows > 1 else 0.0
            for column in range(min(keep, columns)):
                at = 4 * (columns * (first_row + beam) + column)
                total = before + np.float64(load_f32(values + at))
                token = min(max(load_i32(ids + at), np.int32(0)), last_token)
                score = total - rate * column
                held = _put(scores, beams, tokens, totals, held, keep, score, beam, token, total)
        _go_on(
            beams,
            tokens,
            totals,
            held,
            width,
            end_ids + 4 * load_i32(end_starts + 4 * s),
            end_ids + 4 * load_i32(end_starts + 4 * s + 4),
            order,
            logprobs,
            all_chosen + 4 * first,
            all_chosen + 4 * (successors + first),
            chosen_logprobs + 8 * first,
        )


@kernel
def _move(p, thread, threads):
    """Let m beams have what others have in block tables, and in caches whose blocks have `words` of 4 bytes."""
    moves, rows, firsts, parents, whole, tails = (
        load_i64(p),
        load_i64(p + 8),
        load_i64(p + 16),
        load_i64(p + 24),
        load_i64(p + 32),
        load_i64(p + 40),
    )
    kept, tables, columns = load_i64(p + 48), load_i64(p + 56), 4 * load_i64(p + 64)
    caches, starts, words = load_i64(p + 72), load_i64(p + 80), load_i64(p + 88)
    for number in range(moves * caches * thread // threads, moves * caches * (thread + 1) // threads):
        m, cache = number // caches, load_i64(starts + 8 * (number % caches))
        parent = np.int64(load_i32(parents + 4 * m))
        if parent < 0:
            parent = np.int64(load_i32(kept + 4 * (-1 - parent)))
        row, source = np.int64(load_i32(rows + 4 * m)), load_i32(firsts + 4 * m) + parent
        end = 4 * np.int64(load_i32(whole + 4 * m))
        if number % caches == 0:
            for at in range(0, end, 4):
                store_i32(tables + columns * row + at, load_i32(tables + columns * source + at))
        if row != source and load_i32(tails + 4 * m) > 0:
            other = cache + 4 * words * load_i32(tables + columns * source + end)
            own = cache + 4 * words * load_i32(tables + columns * row + end)
            vectors = words // 16 * 16
            for word in range(0, 4 * vectors, 64):
                store(own + word, load(other + word))
            for word in range(4 * vectors, 4 * words, 4):
                store_f32(own + word, load_f32(other + word))
