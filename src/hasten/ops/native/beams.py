"""How beam searches go on: launches of `code/beams.py`."""

import torch
from torch import Tensor

from hasten.ops.beams import BeamChoice, BeamMoves, BeamSearches, BeamStates
from hasten.ops.block_caches import BlockCaches
from hasten.ops.native.launch import Kernel, empty, launch

MOST_KEPT = 256
"""Continuations to look at of one search."""
_beams = Kernel("beams", "19q")
_move = Kernel("move", "12q")


def _fp64(rows: int, columns: int) -> Tensor:
    return empty(rows, 2 * columns).view(torch.float64)


def choose_beams(
    states: BeamStates, searches: BeamSearches, values_rk: Tensor, ids_rk: Tensor, chosen_2b: Tensor, vocab: int
) -> BeamChoice:
    """`hasten.ops.choose_beams` of searches that keep up to `MOST_KEPT`; tensors are contiguous."""
    count, columns, beams = len(searches.numbers_s), values_rk.shape[1], chosen_2b.shape[1]
    keep = searches.max_keep
    choice = BeamChoice(
        chosen_2b,
        logprobs_b=_fp64(1, beams)[0],
        best_beams_sk=empty(count, keep).view(torch.int32),
        best_tokens_sk=empty(count, keep).view(torch.int32),
        best_logprobs_sk=_fp64(count, keep),
    )
    launch(
        _beams,
        8 * values_rk.numel(),
        count,
        searches.numbers_s,
        searches.rates_s,
        searches.end_starts,
        searches.end_ids,
        values_rk,
        ids_rk,
        columns,
        states.logprobs_sw,
        states.order_sw,
        states.order_sw.shape[1],
        chosen_2b,
        beams,
        choice.logprobs_b,
        choice.best_beams_sk,
        choice.best_tokens_sk,
        choice.best_logprobs_sk,
        searches.max_keep,
        vocab,
    )
    return choice


def move_beams(caches: BlockCaches, tables_sn: Tensor, moves: BeamMoves, parents: Tensor) -> None:
    """`hasten.ops.move_beams` in caches whose blocks are of whole words of 4 bytes; tables are contiguous."""
    count = len(moves.rows_m)
    table = (parents, tables_sn, tables_sn.shape[1])
    for size, starts in caches.addresses:
        launch(_move, count * len(starts) * size, count, *moves, *table, len(starts), starts, size // 4)
