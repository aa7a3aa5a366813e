"""Beam search on a device: its state between steps, the choice of continuations, and blocks that follow the choice.

Shapes: s searches, w beams of the widest search, r rows of candidates, k candidates of a row, b beams of all searches
and whatever else the step chooses tokens for, m moves, n blocks of a table.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hasten.ops.block_caches import BlockCaches
from hasten.ops.cache_scales import octets
from hasten.ops.plan import Integers
from hasten.ops.transfer import send

SEARCH_COLUMNS = 6
"""Numbers of a search: those of `Search` but for its rate and its end tokens."""


class Search(NamedTuple):
    """One search in a step."""

    slot: int
    """Its row of `BeamStates`."""
    first_row: int
    """Where the candidates of its beams begin; the beams are in the order of their numbers."""
    rows: int
    """Beams that have candidates: all of them, or, in its first step, number 0 alone."""
    width: int
    """Beams that go on."""
    keep: int
    """Continuations to look at: at least `width` of them do not end."""
    first_chosen: int
    """Where its beams begin among all for which the step chooses tokens."""
    rate: float
    """Taken off a beam's second best continuation for the comparison, twice off the next, and so on."""
    end_tokens: tuple[int, ...]


@dataclass(frozen=True)
class BeamStates:
    """What searches keep between steps, on a device, a slot per search."""

    logprobs_sw: Tensor
    """fp64: the sum of log-probabilities of each beam."""
    order_sw: Tensor
    """int32: the numbers of the beams, best first."""

    @classmethod
    def empty(cls, slots: int, width: int, device: torch.device) -> "BeamStates":
        """Slots of searches that have not begun."""
        logprobs_sw = torch.zeros(slots, width, dtype=torch.float64, device=device)
        return cls(logprobs_sw, torch.zeros(slots, width, dtype=torch.int32, device=device))

    def grown(self, slots: int, width: int) -> "BeamStates":
        """A copy with at least as many slots and beams per slot as this and as given."""
        old_slots, old_width = self.order_sw.shape
        larger = BeamStates.empty(max(slots, old_slots), max(width, old_width), self.order_sw.device)
        larger.logprobs_sw[:old_slots, :old_width] = self.logprobs_sw
        larger.order_sw[:old_slots, :old_width] = self.order_sw
        return larger


@dataclass(frozen=True)
class BeamSearches:
    """The searches of a step, on the device of their candidates; int32 but for the rates."""

    numbers_s: Tensor
    """[s, `SEARCH_COLUMNS`]"""
    rates_s: Tensor
    """fp64"""
    end_starts: Tensor
    """[s + 1], where the end tokens of each search start."""
    end_ids: Tensor
    max_width: int
    max_keep: int
    max_ends: int

    @classmethod
    def of(cls, searches: Sequence[Search], device: torch.device) -> "BeamSearches":
        """Searches as the host knows them, in one copy."""
        arrays: dict[str, Integers] = {
            "numbers": np.array([search[:SEARCH_COLUMNS] for search in searches], dtype=np.int32),
            "rates": np.array([search.rate for search in searches], dtype=np.float64).view(np.int32),
            "end_starts": np.cumsum([0, *(len(search.end_tokens) for search in searches)], dtype=np.int32),
            "end_ids": np.array([token for search in searches for token in search.end_tokens], dtype=np.int32),
        }
        sent = send(arrays, device)
        return cls(
            numbers_s=sent["numbers"],
            rates_s=sent["rates"].view(torch.float64),
            end_starts=sent["end_starts"],
            end_ids=sent["end_ids"],
            max_width=max(search.width for search in searches),
            max_keep=max(search.keep for search in searches),
            max_ends=max(len(search.end_tokens) for search in searches),
        )


class BeamChoice(NamedTuple):
    """How searches go on, on the device of their candidates."""

    chosen_2b: Tensor
    """int32: the next token of each beam, and of whatever else the step chooses tokens for; then the number of the beam
    that each beam continues, undefined where there is none."""
    logprobs_b: Tensor
    """fp64: the beams' sums of log-probabilities, the next token included; undefined where there is none."""
    best_beams_sk: Tensor
    """int32: the beams that the best continuations continue, best first, whether they end or not; from a search's
    `keep` on undefined, as the next two."""
    best_tokens_sk: Tensor
    """int32"""
    best_logprobs_sk: Tensor
    """fp64, sums."""

    @staticmethod
    def room(count: int, device: torch.device) -> Tensor:
        """`chosen_2b` before a choice. On a CPU it is no result of torch's, so that a choice can be recorded."""
        if device.type == "cpu":
            return torch.from_numpy(np.zeros((2, count), np.int32))
        return torch.zeros(2, count, dtype=torch.int32, device=device)

    @classmethod
    def empty(cls, chosen_2b: Tensor, searches: BeamSearches) -> "BeamChoice":
        """Room for a choice; what is in `chosen_2b` stays where no beam stands."""
        best = (len(searches.numbers_s), searches.max_keep)
        logprobs_b = chosen_2b.new_empty(chosen_2b.shape[1], dtype=torch.float64)
        best_logprobs_sk = chosen_2b.new_empty(best, dtype=torch.float64)
        return cls(chosen_2b, logprobs_b, chosen_2b.new_empty(best), chosen_2b.new_empty(best), best_logprobs_sk)


class BeamMoves(NamedTuple):
    """Beams whose cache blocks are to follow a choice before the step computes them; int32."""

    rows_m: Tensor
    """Rows of the beams in the block tables."""
    first_rows_m: Tensor
    """Rows of the beams with number 0 of their searches."""
    parents_m: Tensor
    """Numbers of the beams that they continue; -1 - i stands for number i of those that devices keep."""
    whole_m: Tensor
    """Blocks that are full: these are shared, so the row is to have those of the parent's row."""
    tail_m: Tensor
    """Tokens in the block behind them, to be copied from the parent's block into the beam's own."""

    @classmethod
    def of(cls, moves: Iterable[tuple[int, int, int, int, int]], device: torch.device) -> "BeamMoves":
        """Moves as the host knows them, in one copy."""
        columns = np.ascontiguousarray(np.array(list(moves), dtype=np.int32).T)
        return cls(*send({"moves": columns}, device)["moves"])


def choose_beams(
    states: BeamStates, searches: BeamSearches, values_rk: Tensor, ids_rk: Tensor, chosen_2b: Tensor, vocab: int
) -> BeamChoice:
    """The definition of `ops.choose_beams`, on a CPU."""
    ids_rk = ids_rk.clamp(0, vocab - 1)
    choice = BeamChoice.empty(chosen_2b, searches)
    chosen: Integers = chosen_2b.numpy()
    found = choice.best_beams_sk.numpy(), choice.best_tokens_sk.numpy(), choice.best_logprobs_sk.numpy()
    numbers: Integers = searches.numbers_s.numpy()
    alike: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for index, (_, _, rows, width, keep, _) in enumerate(numbers.tolist()):
        alike[rows, width, keep].append(index)
    for indices in alike.values():
        best = _best(states, numbers[indices], searches.rates_s.numpy()[indices], values_rk.numpy(), ids_rk.numpy())
        for column, of_best in zip(found, best, strict=True):
            column[indices, : of_best.shape[1]] = of_best
    starts, end_ids = searches.end_starts.tolist(), searches.end_ids.numpy()
    for index, (slot, _, _, width, keep, first_chosen) in enumerate(numbers.tolist()):
        ends = np.isin(found[1][index, :keep], end_ids[starts[index] : starts[index + 1]])
        going = np.flatnonzero(~ends)[:width]
        beams = found[0][index, going]
        seats = _seats(beams.tolist(), width)
        at = [first_chosen + seat for seat in seats]
        chosen[:, at] = found[1][index, going], beams
        choice.logprobs_b.numpy()[at] = states.logprobs_sw.numpy()[slot, seats] = found[2][index, going]
        states.order_sw.numpy()[slot, : len(seats)] = seats
    return choice


def _best(
    states: BeamStates,
    numbers_sc: Integers,
    rates_s: NDArray[np.float64],
    values_rk: NDArray[np.float32],
    ids_rk: Integers,
) -> tuple[Integers, Integers, NDArray[np.float64]]:
    """The best continuations, best first, of searches with equally many beams and equally many to look at.

    Beams and tokens of each, and sums of log-probabilities in fp64, as long outputs want it.
    """
    slots_s, first_rows_s = numbers_sc[:, 0], numbers_sc[:, 1]
    _, _, rows, _, keep, _ = numbers_sc[0].tolist()
    if rows == 1:
        order_sw, before_sw = np.zeros((len(slots_s), 1), np.int32), np.zeros((len(slots_s), 1))
    else:
        order_sw = states.order_sw.numpy()[slots_s, :rows]
        before_sw = np.take_along_axis(states.logprobs_sw.numpy()[slots_s, :rows], order_sw, axis=1)
    rows_sw = first_rows_s[:, np.newaxis] + order_sw
    totals_swk = before_sw[..., np.newaxis] + values_rk[rows_sw, :keep].astype(np.float64)
    scores_swk = totals_swk - rates_s[:, np.newaxis, np.newaxis] * np.arange(totals_swk.shape[2])
    count, flat = totals_swk.shape[2], (len(slots_s), -1)
    order_sk = (-scores_swk.reshape(flat)).argsort(axis=1, kind="stable")[:, :keep]
    return (
        np.take_along_axis(order_sw, order_sk // count, axis=1),
        np.take_along_axis(ids_rk[rows_sw, :keep].reshape(flat), order_sk, axis=1),
        np.take_along_axis(totals_swk.reshape(flat), order_sk, axis=1),
    )


def _seats(parents: list[int], width: int) -> list[int]:
    """The number of the beam that each continuation becomes: its parent's for the first of them.

    So few blocks change hands, and no beam that is continued becomes another. The others get what is left, in order.
    """
    unclaimed = set(parents)
    idle = iter(sorted(set(range(width)) - unclaimed))
    seats = []
    for parent in parents:
        seats.append(parent if parent in unclaimed else next(idle))
        unclaimed.discard(parent)
    return seats


def move_beams(caches: BlockCaches, tables_sn: Tensor, moves: BeamMoves, parents: Tensor) -> None:
    """The definition of `ops.move_beams`, on a CPU."""
    rows_m, first_rows_m, parents_m, whole_m, tail_m = (column.long() for column in moves)
    kept_m = parents[(-1 - parents_m).clamp(min=0)].long()
    sources_m = first_rows_m + kept_m.where(parents_m < 0, parents_m)
    shared_mn = torch.arange(tables_sn.shape[1], device=tables_sn.device) < whole_m.unsqueeze(1)
    tables_sn[rows_m] = tables_sn[sources_m].where(shared_mn, tables_sn[rows_m])
    copied = ((sources_m != rows_m) & (tail_m > 0)).nonzero().squeeze(1)
    if not len(copied):
        return
    columns = whole_m[copied]
    from_k, to_k = (tables_sn[rows[copied], columns].long() for rows in (sources_m, rows_m))
    for cache in map(octets, caches.tensors):
        cache.index_copy_(0, to_k, cache.index_select(0, from_k))
