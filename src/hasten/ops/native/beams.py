"""How beam searches go on: launches of `code/beams.py`."""

from torch import Tensor

from hasten.ops.beams import BeamChoice, BeamSearches, BeamStates
from hasten.ops.native.launch import Kernel, launch

MOST_KEPT = 256
"""Continuations to look at of one search."""
_beams = Kernel("beams", "19q")


def choose_beams(
    states: BeamStates, searches: BeamSearches, values_rk: Tensor, ids_rk: Tensor, chosen_2b: Tensor, vocab: int
) -> BeamChoice:
    """`hasten.ops.choose_beams` of searches that keep up to `MOST_KEPT`; tensors are contiguous."""
    choice = BeamChoice.empty(chosen_2b, searches)
    count, columns = len(searches.numbers_s), values_rk.shape[1]
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
        chosen_2b.shape[1],
        choice.logprobs_b,
        choice.best_beams_sk,
        choice.best_tokens_sk,
        choice.best_logprobs_sk,
        searches.max_keep,
        vocab,
    )
    return choice
