"""How beam searches go on, and what their cache blocks follow: kernels beside their definitions."""

import random

import pytest
import torch
from torch import Tensor

from hasten.ops import BeamChoice, BeamMoves, BeamSearches, BeamStates, BlockCaches, Search
from hasten.ops import beams as definition
from hasten.ops.gpu import beams

VOCAB = 50


def states_of(searches: list[Search], seed: int = 0) -> BeamStates:
    generator = torch.Generator().manual_seed(seed)
    slots, width = (max(column) for column in zip(*((2 + each.slot, 1 + each.width) for each in searches), strict=True))
    states = BeamStates.empty(slots, width, torch.device("cpu"))
    states.logprobs_sw.copy_(-5 * torch.rand(slots, width, generator=generator))
    for search in searches:
        states.order_sw[search.slot, : search.width] = torch.randperm(search.width, generator=generator)
    return states


def candidates_of(rows: int, count: int, seed: int, *, levels: int | None = None) -> tuple[Tensor, Tensor]:
    """The best tokens of each row, best first; with `levels` of that many log-probabilities, so that many are equal."""
    generator = torch.Generator().manual_seed(seed)
    values = -3 * torch.rand(rows, count, generator=generator)
    if levels is not None:
        values = -torch.randint(levels, (rows, count), generator=generator).float()
    ids = torch.stack([torch.randperm(VOCAB, generator=generator)[:count] for _ in range(rows)])
    return values.sort(descending=True).values, ids.int()


def searches_of(kinds: list[tuple[int, int, float, tuple[int, ...]]], *, begin: bool) -> list[Search]:
    """Searches of these widths, rates and end tokens, each with as many slots before it as stand in front."""
    searches, first_row, chosen = [], 0, 2
    for slot, (width, keep, rate, ends) in enumerate(kinds):
        rows = 1 if begin else width
        searches.append(Search(2 * slot, first_row, rows, width, keep, chosen, rate, ends))
        first_row, chosen = first_row + rows, chosen + width + 1  # with sequences without beams between them
    return searches


def on(device: torch.device, states: BeamStates) -> BeamStates:
    return BeamStates(states.logprobs_sw.clone().to(device), states.order_sw.clone().to(device))


def both(
    searches: list[Search], states: BeamStates, values: Tensor, ids: Tensor, device: torch.device
) -> tuple[tuple[BeamStates, BeamChoice], tuple[BeamStates, BeamChoice]]:
    """What the kernel leaves and what the definition leaves."""
    rows = searches[-1].first_chosen + searches[-1].width + 2
    chosen = torch.arange(1000, 1000 + 2 * rows, dtype=torch.int32).view(2, rows)
    cpu = torch.device("cpu")
    left = []
    for choose, where in ((beams.choose_beams, device), (definition.choose_beams, cpu)):
        own = on(where, states)
        given = (values.to(where), ids.to(where), chosen.clone().to(where))
        choice = choose(own, BeamSearches.of(searches, where), *given, VOCAB)
        left.append((on(cpu, own), BeamChoice(*(tensor.cpu() for tensor in choice))))
    return left[0], left[1]


def assert_equal(
    searches: list[Search], found: tuple[BeamStates, BeamChoice], wanted: tuple[BeamStates, BeamChoice]
) -> None:
    assert torch.equal(found[0].order_sw, wanted[0].order_sw)
    torch.testing.assert_close(found[0].logprobs_sw, wanted[0].logprobs_sw, rtol=0, atol=1e-14)
    assert torch.equal(found[1].chosen_2b[0], wanted[1].chosen_2b[0])
    for index, search in enumerate(searches):
        own = slice(search.first_chosen, search.first_chosen + search.width)
        assert torch.equal(found[1].chosen_2b[1, own], wanted[1].chosen_2b[1, own])
        torch.testing.assert_close(found[1].logprobs_b[own], wanted[1].logprobs_b[own], rtol=0, atol=1e-14)
        for first, other in zip(found[1][2:], wanted[1][2:], strict=True):
            assert torch.equal(first[index, : search.keep], other[index, : search.keep])


@pytest.mark.parametrize("begin", [True, False])
@pytest.mark.parametrize("levels", [None, 3])
def test_searches_of_all_shapes_go_on(begin: bool, levels: int | None, device: torch.device) -> None:
    kinds: list[tuple[int, int, float, tuple[int, ...]]] = [
        *[(2, 4, 0.0, ()), (4, 8, 0.0, (3,)), (4, 8, 0.7, (1, 2)), (3, 9, 0.0, (7, 8)), (1, 2, 0.0, (5,))],
        *[(5, 40, 0.0, tuple(range(7))), (40, 40, 0.25, ())],
    ]
    searches = searches_of(kinds[:5] if begin else kinds, begin=begin)
    rows = searches[-1].first_row + searches[-1].rows
    values, ids = candidates_of(rows, 40, len(kinds), levels=levels)
    found, wanted = both(searches, states_of(searches), values, ids, device)
    assert_equal(searches, found, wanted)


def test_the_best_continuations_of_all_beams_go_on_but_for_those_that_end(device: torch.device) -> None:
    """Worked out one by one, over several steps."""
    rng, width = random.Random(3), 3
    kinds: list[tuple[int, int, float, tuple[int, ...]]] = [(width, 9, 0.0, (0, 1))] * 4
    states = states_of(searches_of(kinds, begin=True))
    texts: list[list[tuple[tuple[int, ...], float]]] = [[((), 0.0)] for _ in kinds]
    for step in range(6):
        searches = searches_of(kinds, begin=step == 0)
        values, ids = candidates_of(len(kinds) * (1 if step == 0 else width), 9, rng.randrange(1000))
        (states, choice), _ = both(searches, states, values, ids, device)
        for index, search in enumerate(searches):
            beams_before = texts[index]
            pairs = [
                (logprob + value, beam, token)
                for beam, (_, logprob) in enumerate(beams_before)
                for value, token in zip(
                    values[search.first_row + beam].tolist(), ids[search.first_row + beam].tolist(), strict=True
                )
            ]
            going = [pair for pair in sorted(pairs, reverse=True)[:9] if pair[2] not in (0, 1)][:width]
            own = slice(search.first_chosen, search.first_chosen + width)
            tokens, parents = choice.chosen_2b[:, own].tolist()
            logprobs = choice.logprobs_b[own].tolist()
            assert sorted(zip(parents, tokens, strict=True)) == sorted((beam, token) for _, beam, token in going)
            assert sorted(logprobs) == pytest.approx(sorted(total for total, _, _ in going))
            assert all(parents[parent] == parent for parent in parents)  # nobody's blocks are lost
            texts[index] = [
                ((*beams_before[parent][0], token), logprob)
                for parent, token, logprob in zip(parents, tokens, logprobs, strict=True)
            ]


def test_rows_that_are_not_finite_lead_nowhere_outside_the_vocabulary(device: torch.device) -> None:
    searches = searches_of([(4, 8, 0.5, (3,))] * 2, begin=False)
    values, ids = candidates_of(8, 8, 0)
    values[1], values[4:] = float("nan"), float("nan")
    values[0, 3:] = float("-inf")
    ids[1], ids[5] = 2**31 - 1, -7
    (states, choice), _ = both(searches, states_of(searches), values, ids, device)
    for search in searches:
        tokens, parents = choice.chosen_2b[:, search.first_chosen : search.first_chosen + 4]
        assert bool(((tokens >= 0) & (tokens < VOCAB)).all())
        assert bool(((parents >= 0) & (parents < 4)).all())
        assert sorted(states.order_sw[search.slot, :4].tolist()) == list(range(4))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize(("size", "width"), [(4, 3), (5, 1500)])
def test_beams_have_the_blocks_of_those_that_they_continue(
    size: int, width: int, dtype: torch.dtype, device: torch.device
) -> None:
    """Two searches, one whose choice only the devices know, and a sequence without beams between them."""
    generator = torch.Generator().manual_seed(width)
    tables = torch.randperm(8 * width, generator=generator, dtype=torch.int32).view(8, width)
    shapes = [(8 * width, size, heads, 4) for heads in (2, 2, 1)]
    caches = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    kept = torch.tensor([9, 9, 0, 0, 2, 2, 9], dtype=torch.int32)
    parents = {0: 1, 1: 1, 2: 1} | {4: 0, 5: 0, 6: 2, 7: 2}
    lengths = {row: width * size - 1 if row > 3 else size + 1 for row in parents}  # full blocks, and one begun
    known = [(row, 0, parents[row]) for row in range(3)]
    pending = [(row, 4, -1 - (row - 2)) for row in range(4, 8)]
    moves = [(*move, lengths[move[0]] // size, lengths[move[0]] % size) for move in known + pending]
    left = []
    for move, where in ((beams.move_beams, device), (definition.move_beams, torch.device("cpu"))):
        held, own = BlockCaches.of([cache.clone().to(where) for cache in caches]), tables.clone().to(where)
        move(held, own, BeamMoves.of(moves, where), kept.to(where))
        left.append((own.cpu(), [cache.cpu() for cache in held.tensors]))
    for row, parent in parents.items():
        source, (whole, tail) = parent + 4 * (row > 3), divmod(lengths[row], size)
        for found, content in left:
            assert torch.equal(found[row, :whole], tables[source, :whole])
            assert torch.equal(found[row, whole:], tables[row, whole:])
            for cache, before in zip(content, caches, strict=True):
                own, parents_block = cache[int(found[row, whole]), :tail], before[int(tables[source, whole]), :tail]
                assert torch.equal(own.view(torch.uint8), parents_block.view(torch.uint8))
    untouched = tables[3].long()
    for found, content in left:
        assert torch.equal(found[3], tables[3])
        for cache, before in zip(content, caches, strict=True):
            assert torch.equal(cache.view(torch.uint8)[untouched], before.view(torch.uint8)[untouched])
