from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hasten.ops import plan
from hasten.ops.plan import Integers, Planner

LENGTHS = st.lists(st.one_of(st.integers(1, 200), st.integers(1, 40_000)), max_size=40)
NOTHING = np.zeros(0, dtype=np.int64)


def numbers(values: list[int]) -> Integers:
    return np.array(values, dtype=np.int64)


def make_splits(kv_lens: list[int], most: int) -> list[list[int]]:
    """Runs of sequences whose numbers and rows all differ, so that a swapped column shows."""
    own = np.arange(len(kv_lens))
    return plan.kv_splits(3 * own + 1, 2 * own + 5, own + 100, numbers(kv_lens), most, plan.MIN_SPLIT_LEN).tolist()


@given(kv_lens=LENGTHS, spare=st.integers(0, 300))
def test_splits_hold_every_key_of_every_sequence_once_and_in_order(kv_lens: list[int], spare: int) -> None:
    result = make_splits(kv_lens, len(kv_lens) + spare)
    for index, kv_len in enumerate(kv_lens):
        own = [split for split in result if split[0] == 3 * index + 1]
        assert own[0][3] == 0
        assert own[-1][4] == kv_len
        assert all(before[4] == after[3] for before, after in pairwise(own))
        assert all(begin < end for _, _, _, begin, end, *_ in own)
        assert all(split[1:3] == [2 * index + 5, index + 100] for split in own)
        assert all(split[5] == kv_len for split in own)
    assert len({split[0] for split in result}) == len(kv_lens)


@given(kv_lens=LENGTHS, spare=st.integers(0, 300))
def test_splits_of_a_sequence_stand_together_and_know_their_place(kv_lens: list[int], spare: int) -> None:
    """The program that finishes last finds the others' results by its own row less its place."""
    result = make_splits(kv_lens, len(kv_lens) + spare)
    for row, split in enumerate(result):
        offset, count = split[6:]
        assert 0 <= offset < count
        together = result[row - offset : row - offset + count]
        assert [other[0] for other in together] == [split[0]] * count
        assert [other[6] for other in together] == list(range(count))


@given(kv_lens=LENGTHS, spare=st.integers(0, 300))
def test_splits_are_no_more_than_asked_and_begin_where_a_block_of_keys_does(kv_lens: list[int], spare: int) -> None:
    result = make_splits(kv_lens, len(kv_lens) + spare)
    assert len(result) <= len(kv_lens) + spare
    assert all(split[3] % 32 == 0 for split in result)


@given(kv_lens=LENGTHS, heads=st.sampled_from([1, 8, 12, 32, 112]), multiprocessors=st.sampled_from([0, 8, 132]))
def test_no_sequence_is_left_to_one_program_while_others_have_much_less(
    kv_lens: list[int], heads: int, multiprocessors: int
) -> None:
    """A split is at most twice what an equal share of all keys would be, unless it is short anyway."""
    most = Planner(heads, heads, multiprocessors).max_num_splits(len(kv_lens))
    assert most >= 2 * len(kv_lens)
    result = make_splits(kv_lens, most)
    assert len(result) <= most
    shard = sum(kv_lens) / max(1, most)
    assert all(end - begin <= max(64, 2 * shard + 32) for _, _, _, begin, end, *_ in result)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "programs"), [(32, 8, 8), (32, 4, 4), (17, 1, 1), (64, 1, 1), (71, 1, 2), (142, 2, 4)]
)
def test_heads_with_the_same_keys_are_one_program_up_to_64(heads: int, kv_heads: int, programs: int) -> None:
    splits = Planner(heads, kv_heads, 132).max_num_splits(1)
    assert splits * programs == 4 * 132
    assert Planner(heads, kv_heads, 132).max_num_splits(1000) == 2000


def test_short_keys_of_a_group_are_not_cut() -> None:
    def splits(heads: int, kv_heads: int, keys: int) -> int:
        rows, lens = numbers([0]), numbers([keys])
        return len(Planner(heads, kv_heads, 132).plan(rows, rows, numbers([1]), lens)["splits"])

    assert [splits(32, 32, keys) for keys in (64, 192, 257)] == [1, 3, 5]
    assert [splits(32, 8, keys) for keys in (64, 129, 512, 513, 32_768)] == [1, 3, 8, 9, 64]
    grouped = Planner(32, 8, 132)
    assert [grouped.min_split_len(count) for count in (16, 17)] == [64, 256]


def test_few_sequences_are_cut_into_enough_runs_to_fill_the_device() -> None:
    assert Planner(32, 32, 132).max_num_splits(1) == 66
    assert Planner(5, 5, 132).max_num_splits(1) == 423
    assert Planner(32, 32, 132).max_num_splits(256) == 512
    assert len(make_splits([8192], 66)) > 60
    assert make_splits([64], 66) == [[1, 5, 100, 0, 64, 64, 0, 1]]
    assert make_splits([65], 66) == [[1, 5, 100, 0, 64, 65, 0, 2], [1, 5, 100, 64, 65, 65, 1, 2]]


def test_in_a_fixed_order_splits_are_single_runs_or_whole_sequences() -> None:
    planner = Planner(32, 32, 132, run=64, max_kv_len=2048)
    assert [planner.max_num_splits(count) for count in (1, 2, 4, 16, 256)] == [32, 64, 128, 128, 256]

    def ends(kv_lens: list[int]) -> list[int]:
        rows, lens = numbers(list(range(len(kv_lens)))), numbers(kv_lens)
        result = planner.plan(rows, rows, np.ones_like(lens), lens)["splits"]
        assert len(result) <= planner.max_num_splits(len(kv_lens))
        return [int(end) for end in result[:, 4]]

    assert ends([130, 1]) == [64, 128, 130, 1]
    assert ends([2048] * 4 + [0]) == [2048] * 4 + [0]


WORK = st.lists(st.tuples(st.integers(1, 300), st.integers(0, 2000)), max_size=20)
"""(queries, keys before them) of each sequence."""


@given(work=WORK)
def test_tiles_hold_every_query_once_with_its_rows_and_position(work: list[tuple[int, int]]) -> None:
    counts = numbers([count for count, _ in work])
    context = numbers([before for _, before in work])
    starts = np.cumsum(counts) - counts
    result = plan.tiles(np.arange(len(work)) + 7, starts + 11, starts + 1000, counts, context + counts)
    held: list[tuple[int, int, int, int]] = []
    for sequence, query_row, out_row, count, position in result.tolist():
        assert 1 <= count <= plan.TILE
        held += [(sequence, query_row + n, out_row + n, position + n) for n in range(count)]
    wanted = [
        (index + 7, start + 11 + n, start + 1000 + n, before + n)
        for index, ((count, before), start) in enumerate(zip(work, starts.tolist(), strict=True))
        for n in range(count)
    ]
    assert sorted(held) == wanted


@given(work=WORK.filter(bool))
def test_gathered_keys_are_each_sequences_end_to_end_and_tiles_begin_at_theirs(work: list[tuple[int, int]]) -> None:
    counts = numbers([count for count, _ in work])
    context = numbers([before for _, before in work])
    tables, rows = 3 * np.arange(len(work)) + 1, np.cumsum(counts) - counts
    arrays = plan.long_tiles(tables, rows + 11, rows, counts, context + counts)
    assert arrays["gathers"].shape[1] == plan.GATHER_COLUMNS
    found: dict[int, list[int]] = {}
    for index, (table, first, kv_len) in enumerate(arrays["gathers"].tolist()):
        found.setdefault(table, []).append(plan.TILE * index)
        assert first == plan.TILE * (len(found[table]) - 1)
        assert kv_len == sum(work[table // 3])
    starts = {first: [0, 0] for first, *_ in found.values()}
    for base, query_row, out_row, count, position in arrays["long_tiles"].tolist():
        assert query_row == out_row + 11
        starts[base][0] += count
        starts[base][1] = max(starts[base][1], position + count)
    assert list(found) == tables.tolist()
    assert list(starts.values()) == [[count, count + before] for count, before in work]
    gathered = [plan.TILE * len(found[table]) for table in tables.tolist()]
    assert gathered == [-(-sum(each) // plan.GATHERED_KEYS) * plan.GATHERED_KEYS for each in work]


GATHERED = [
    ([8192], [8192], [True]),
    ([2048, 2048], [2048, 2048], [True, True]),
    ([2048, 2047, 1000], [2048, 2047, 1000], [True, True, False]),
    ([600, 8, 1], [9000, 9000, 9000], [False, False, False]),
    ([600, 1400, 1], [9000, 9000, 9000], [True, True, False]),
    ([1400], [9000], [False]),
    ([1500], [16_000], [True]),
    ([511, 700], [100_000, 16_000], [False, False]),
    ([4000, 4000], [200_000, 100_000], [True, False]),
    ([1000], [900], [False]),
    ([2, 8000, 3, 1, 70], [16_384, 8000, 1023, 5000, 1024], [True, True, False, False, True]),
]
"""New tokens of sequences, what they see, and whether their keys are gathered; a dry run's may see less."""


@pytest.mark.parametrize(("query_lens", "kv_lens", "expected"), GATHERED, ids=str)
def test_keys_of_long_prompts_are_gathered(query_lens: list[int], kv_lens: list[int], expected: list[bool]) -> None:
    rows = np.arange(len(query_lens))
    planner = Planner(32, 8, multiprocessors=132)

    def owners(planner: Planner, *, causal: bool = True) -> set[int]:
        arrays = planner.plan(7 * rows, rows, numbers(query_lens), numbers(kv_lens), causal=causal)
        assert ("gathers" in arrays) == ("long_tiles" in arrays)
        return {table // 7 for table, *_ in arrays.get("gathers", NOTHING).tolist()}

    assert owners(planner) == {row for row, gathered in enumerate(expected) if gathered}
    assert owners(planner, causal=False) == set()
    assert owners(replace(planner, gathers=False)) == set()
    assert owners(replace(planner, run=64, max_kv_len=200_000)) == set()


@given(work=WORK)
def test_tiles_with_the_most_keys_come_first(work: list[tuple[int, int]]) -> None:
    counts = numbers([count for count, _ in work])
    rows = np.arange(len(work))
    result = plan.tiles(rows, rows, rows, counts, counts + numbers([before for _, before in work]))
    keys = [position + count for *_, count, position in result.tolist()]
    assert keys == sorted(keys, reverse=True)


@pytest.mark.parametrize("most", [0, 1, 100])
def test_nothing_to_do_is_no_items(most: int) -> None:
    splits = plan.kv_splits(NOTHING, NOTHING, NOTHING, NOTHING, most, plan.MIN_SPLIT_LEN)
    tiles = plan.tiles(NOTHING, NOTHING, NOTHING, NOTHING, NOTHING)
    assert splits.shape == (0, plan.SPLIT_COLUMNS)
    assert tiles.shape == (0, plan.TILE_COLUMNS)
    assert splits.dtype == tiles.dtype == np.int32


def test_as_many_runs_as_sequences_leave_each_whole() -> None:
    result = make_splits([5000, 3, 700], 3)
    assert [split[3:] for split in result] == [[0, n, n, 0, 1] for n in (5000, 700, 3)]


def test_long_splits_begin_first_and_equal_ones_in_the_order_of_their_sequences() -> None:
    kv_lens = [64, 640, 3, 300, 64, 640]
    whole, cut = make_splits(kv_lens, 6), make_splits(kv_lens, 10)
    assert [split[0] for split in whole] == [4, 16, 10, 1, 13, 7]
    lengths = [split[4] - split[3] for split in cut if split[6] == 0]
    assert len(cut) > 6
    assert lengths == sorted(lengths, reverse=True)


@given(kv_lens=st.lists(st.integers(2, 400), min_size=1, max_size=20))
def test_tiles_of_texts_whose_tokens_see_all_others(kv_lens: list[int]) -> None:
    own, lens = np.arange(len(kv_lens)), numbers(kv_lens)
    planner = Planner(4, 4, multiprocessors=8)
    result = planner.plan(3 * own + 1, np.cumsum(lens) - lens, lens, lens, causal=False)
    assert list(result) == ["tiles"]
    tiles = result["tiles"].tolist()
    assert [tile[5] for tile in tiles] == sorted((tile[5] for tile in tiles), reverse=True)
    for index, kv_len in enumerate(kv_lens):
        mine = [tile for tile in tiles if tile[0] == 3 * index + 1]
        assert all(tile[5] == kv_len for tile in mine)
        assert [tile[4] for tile in mine] == list(range(0, kv_len, plan.TILE))
        assert sum(tile[3] for tile in mine) == kv_len
