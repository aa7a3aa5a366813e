"""Beam search on the device, and the blocks that it moves."""

from typing import TYPE_CHECKING

from torch import Tensor

from hasten.ops import beams, native, reference
from hasten.ops.beams import BeamChoice, BeamMoves, BeamSearches, BeamStates
from hasten.ops.block_caches import BlockCaches

if TYPE_CHECKING:
    pass


def copy_blocks(caches: BlockCaches, sources_n: Tensor, targets_n: Tensor) -> None:
    """Copy whole blocks within each cache [blocks, ...]: block `targets_n[i]` becomes block `sources_n[i]` [int64].

    Targets are distinct, and none of them is a source: copies have no order.
    """
    if sources_n.is_cuda:
        from hasten.ops.gpu import cache

        cache.copy_blocks(caches, sources_n, targets_n)
    else:
        reference.copy_blocks(caches, sources_n, targets_n)


def move_beams(caches: BlockCaches, tables_sn: Tensor, moves: BeamMoves, parents: Tensor) -> None:
    """Let beams have what the beams that they continue have in the cache; block tables [s, n] are changed in place.

    Full blocks are shared; what is in the block behind them is copied into the beam's own. `parents` are the beams'
    numbers that devices keep. No beam that is continued may continue another.
    """
    if tables_sn.is_cuda:
        from hasten.ops.gpu import beams as kernels

        kernels.move_beams(caches, tables_sn, moves, parents)
        return
    on_cpu = native.kernels()
    if on_cpu is not None and tables_sn.is_contiguous() and all(size % 4 == 0 for size, _ in caches.addresses):
        on_cpu.beams.move_beams(caches, tables_sn, moves, parents)
    else:
        beams.move_beams(caches, tables_sn, moves, parents)


def choose_beams(
    states: BeamStates, searches: BeamSearches, values_rk: Tensor, ids_rk: Tensor, chosen_2b: Tensor, vocab: int
) -> BeamChoice:
    """How searches go on, from the most probable tokens of each beam [r, k], best first, and their log-probabilities.

    The best continuations of all beams together are looked at, those of better beams first among equals; the first
    `width` that do not end go on. Each becomes the beam that it continues if it is the first of that, and else the next
    beam that none continues. States are brought up to date, and beams get their part of `chosen_2b`. Token
    ids beyond the vocabulary, as rows that are not finite may have, become its last one.
    """
    if values_rk.is_cuda:
        from hasten.ops.gpu import beams as kernels

        return kernels.choose_beams(states, searches, values_rk, ids_rk, chosen_2b, vocab)
    on_cpu = native.kernels()
    if on_cpu is not None and searches.max_keep <= on_cpu.beams.MOST_KEPT:
        return on_cpu.beams.choose_beams(states, searches, values_rk, ids_rk, chosen_2b, vocab)
    return beams.choose_beams(states, searches, values_rk, ids_rk, chosen_2b, vocab)
