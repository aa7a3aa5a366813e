"""What the device is told of a batch, beside what the sequences themselves say."""

import random
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from hasten import ops
from hasten.core.config import SchedulerConfig
from hasten.engine.batch import Batch
from hasten.engine.block_manager import BlockManager
from hasten.engine.graphs import sizes
from hasten.engine.inputs import BlockTables, DecodeLayout, Inputs, Tokens
from hasten.engine.scheduler import Scheduler
from hasten.engine.sequence import Sequence
from hasten.ops import plan
from hasten.ops.plan import Planner

MakeSequence = Callable[..., Sequence]
CPU = torch.device("cpu")
PLANNER = Planner(heads=4, multiprocessors=0)
LINE = 32
"""int32 numbers in 128 bytes."""
GARBAGE = 0x55555555
"""What memory holds that nobody has written."""


class Run:
    """Random requests through a scheduler, with tokens that are known to it one step late, or at once."""

    def __init__(
        self, make: MakeSequence, *, overlap: bool, block_size: int = 4, blocks: int = 40, seed: int = 0, **options: Any
    ) -> None:
        self.rng = random.Random(seed)
        self.overlap = overlap
        self.blocks = BlockManager(blocks, block_size)
        limits: dict[str, Any] = {"max_num_seqs": 5, "max_num_batched_tokens": 16} | options
        self.scheduler = Scheduler(SchedulerConfig(**limits), self.blocks)
        self.most = limits["max_num_seqs"]
        self.make = make
        self.truth: dict[int, list[int]] = {}
        """Key -> tokens of the prompt and all that were chosen, known to the scheduler or not."""
        self.chosen = torch.zeros(self.most, dtype=torch.int32)
        """As the runner keeps them for the next step."""
        self.flight: list[Sequence] = []

    def add(self, length: int, **params: Any) -> None:
        """A prompt that may begin as others do."""
        first = self.rng.choice((10, 60))
        sequence = self.make(range(first, first + length), temperature=1.0, **params)
        self.scheduler.add(sequence)
        self.truth[sequence.key] = list(sequence.token_ids)

    def steps(self) -> Iterator[Batch]:
        """Each batch as it is launched, until nothing is left."""
        while self.scheduler.has_work:
            batch = self.scheduler.schedule()
            if batch.sequences:
                yield batch
                for child in self.scheduler.advance(batch):
                    self.truth[child.key] = list(child.token_ids)
            if self.overlap:
                self._deliver()
            self.flight = [batch.sequences[place] for place in batch.sampled]
            tokens = [self.rng.randrange(100, 1000) for _ in self.flight]
            self.chosen[: len(tokens)] = torch.tensor(tokens, dtype=torch.int32)
            for sequence, token in zip(self.flight, tokens, strict=True):
                self.truth[sequence.key].append(token)
            if not self.overlap:
                self._deliver()

    def _deliver(self) -> None:
        for sequence in self.flight:
            if self.scheduler.get(sequence.key) is None:
                continue  # it ended before this token, which is nobody's
            sequence.append(self.truth[sequence.key][len(sequence.token_ids)])
            if len(sequence.token_ids) >= sequence.max_length or self.rng.random() < 0.03:
                self.scheduler.finish(sequence.key)
        self.flight = []


def busy(make: MakeSequence, *, overlap: bool, seed: int, **options: Any) -> Run:
    run = Run(make, overlap=overlap, seed=seed, **options)
    run.add(50, max_tokens=4)  # alone for some steps, none of which chooses a token
    for _ in range(14):
        length = run.rng.choice((1, 2, 3, 4, 5, 15, 16, 17, 30))
        more: dict[str, Any] = run.rng.choice(({}, {}, {"n": 3}, {"prompt_logprobs": 0}))
        run.add(length, max_tokens=run.rng.randint(1, 20), **more)
    return run


def slot(sequence: Sequence, position: int, block_size: int) -> int:
    return sequence.block_table[position // block_size] * block_size + position % block_size


def expect_meta(meta: ops.AttentionMeta, work: list[tuple[Sequence, int, int]], block_size: int, blocks: int) -> None:
    """`meta` is of these sequences, with positions from the first to before the end."""
    counts = [end - first for _, first, end in work]
    assert meta.query_start.tolist() == np.cumsum([0, *counts]).tolist()
    assert meta.seq_lens.tolist() == meta.kv_lens == [end for *_, end in work]
    assert meta.query_lens == counts
    assert meta.num_tokens == sum(counts)
    assert meta.slot_mapping.tolist() == [
        slot(sequence, position, block_size) for sequence, first, end in work for position in range(first, end)
    ]
    assert meta.block_tables.shape[0] == len(work)
    for (sequence, _, end), table in zip(work, meta.block_tables.tolist(), strict=True):
        needed = -(-end // block_size)
        assert table[:needed] == sequence.block_table[:needed]
        assert all(0 <= block < blocks for block in table)
    types = {meta.query_start.dtype, meta.seq_lens.dtype, meta.block_tables.dtype}
    assert types == {torch.int32}
    assert meta.slot_mapping.dtype == torch.int64


def expect_plan(meta: ops.AttentionMeta, query_rows: list[int]) -> None:
    """Every query is read at its row of the whole batch, written to its own, and sees its sequence up to itself."""
    assert meta.plan is not None
    found: dict[int, tuple[int, int, int]] = {}
    for sequence, query_row, out_row, count, position in _items(meta.plan.tiles):
        for place in range(count):
            assert out_row + place not in found
            found[out_row + place] = (query_row + place, sequence, position + place + 1)
    keys: dict[int, list[tuple[int, int]]] = defaultdict(list)
    for sequence, query_row, out_row, first, end, length, place, splits in _items(meta.plan.splits):
        assert len(keys[out_row]) == place < splits
        keys[out_row].append((first, end))
        found[out_row] = (query_row, sequence, length)
    for out_row, pieces in keys.items():
        assert [first for first, _ in pieces] == [0, *(end for _, end in pieces[:-1])]
        assert pieces[-1][1] == found[out_row][2]
    starts = meta.query_start.tolist()
    expected = {
        starts[sequence] + place: (query_rows[starts[sequence] + place], sequence, kv_len - count + place + 1)
        for sequence, (count, kv_len) in enumerate(zip(meta.query_lens, meta.kv_lens, strict=True))
        for place in range(count)
    }
    assert found == expected


def _items(items: Tensor | None) -> list[list[int]]:
    return [] if items is None else items.tolist()


@pytest.mark.parametrize("overlap", [False, True], ids=["steps", "overlapped"])
@pytest.mark.parametrize("planned", [False, True], ids=["cpu", "planned"])
@pytest.mark.parametrize("seed", range(4))
def test_every_batch_of_a_busy_scheduler(seed: int, planned: bool, overlap: bool, make_sequence: MakeSequence) -> None:
    block_size, blocks = 4, 24
    run = busy(make_sequence, overlap=overlap, seed=seed, block_size=block_size, blocks=blocks)
    inputs = Inputs(BlockTables(run.most, 20), block_size, PLANNER if planned else None, CPU)
    seen: dict[str, int] = defaultdict(int)
    for batch in run.steps():
        tokens = inputs.tokens(batch, batch.needed)
        work = [(s, s.num_computed, s.num_computed + n) for s, n in zip(batch.sequences, batch.counts, strict=True)]
        ids = [token for s, first, end in work for token in run.truth[s.key][first:end]]
        assert ops.resolve_ids(tokens.ids, run.chosen).tolist() == ids
        pending = [sequence for sequence in batch.sequences if sequence.pending]
        assert (tokens.ids < 0).sum() == len(pending)
        assert tokens.any_pending == bool(pending)
        assert tokens.positions.tolist() == [position for _, first, end in work for position in range(first, end)]
        expect_meta(tokens.meta, work, block_size, blocks)
        assert tokens.meta.output_indices is None
        last = tokens.meta.output_part
        assert (last is None) == (batch.needed == batch.counts)
        if last is not None:
            needed = zip(work, batch.needed, strict=True)
            expect_meta(last, [(s, end - n, end) for (s, _, end), n in needed if n], block_size, blocks)
            assert last.output_indices is not None
            rows = [
                row
                for end, n in zip(np.cumsum(batch.counts).tolist(), batch.needed, strict=True)
                for row in range(end - n, end)
            ]
            assert last.output_indices.tolist() == rows
            assert last.output_part is None
            if planned:
                expect_plan(last, rows)
        if planned:
            expect_plan(tokens.meta, list(range(batch.num_tokens)))
        else:
            assert tokens.meta.plan is None
        for kind, there in {
            "pending": bool(pending),
            "singles": batch.num_tokens == len(batch.sequences),
            "mixture": {1} < set(batch.counts),
            "none needed": not any(batch.needed),
            "all needed": last is None,
            "prompt logits": any(n > 1 for n in batch.needed),
            "copies": bool(batch.copies),
        }.items():
            seen[kind] += there
    assert run.scheduler.stats.preemptions > 0
    assert run.blocks.prefix_hits > 0
    assert seen.pop("pending") > 0 or not overlap
    assert all(seen.values()), dict(seen)


def test_rows_of_tables_are_kept_while_there_is_room_and_follow_every_change(make_sequence: MakeSequence) -> None:
    tables = BlockTables(2, 4)
    one, two, three = (make_sequence([1]) for _ in range(3))
    for key, sequence in enumerate((one, two, three)):
        sequence.key = key
    one.block_table, two.block_table, three.block_table = [5], [6, 7], [9]
    rows = tables.rows([one, two])
    assert len(set(rows)) == 2
    assert tables.array[rows[0], :1].tolist() == [5]
    assert tables.array[rows[1], :2].tolist() == [6, 7]
    one.block_table += [8, 3]  # more of them: the version stays
    two.block_table = [6, 1]  # one is another: the version changes
    two.table_version += 1
    assert tables.rows([two, one]) == rows[::-1]
    assert tables.array[rows[0], :3].tolist() == [5, 8, 3]
    assert tables.array[rows[1], :2].tolist() == [6, 1]
    (row,) = tables.rows([three])  # takes the place of one that does not run
    assert tables.array[row, 0] == 9
    again = tables.rows([three, two])
    assert sorted(again) == [0, 1]
    assert tables.array[again[1], :2].tolist() == [6, 1]


@pytest.mark.parametrize(("tokens", "sequences"), [(1, 1), (12, 1), (12, 5), (12, 12), (900, 3)])
@pytest.mark.parametrize("planned", [False, True], ids=["cpu", "planned"])
def test_a_rehearsal_stores_nothing_and_stay_within_the_tables(tokens: int, sequences: int, planned: bool) -> None:
    inputs = Inputs(BlockTables(16, 10), 4, PLANNER if planned else None, CPU)
    made = inputs.warmup_tokens(tokens, sequences)
    assert made.ids.shape == made.positions.shape == (tokens,)
    assert not made.ids.any()
    assert not made.any_pending
    assert made.meta.slot_mapping.eq(-1).all()
    assert sum(made.meta.query_lens) == tokens
    assert max(made.meta.query_lens) - min(made.meta.query_lens) < sequences
    assert made.meta.block_tables.shape[1] <= 10
    assert max(made.meta.kv_lens) <= 40
    assert not made.meta.block_tables.any()
    if tokens > sequences:
        assert made.meta.output_part is not None
        assert made.meta.output_part.query_lens == [1] * sequences
    else:
        assert made.meta.output_part is None


# --- steps of single tokens -------------------------------------------------------------------------------------------


@pytest.fixture
def pinned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that only a GPU's driver can give, with whatever content."""
    real = torch.empty

    def empty(*shape: Any, pin_memory: bool = False, **options: Any) -> Tensor:
        made = real(*shape, **options)
        return made.fill_(GARBAGE) if pin_memory else made

    monkeypatch.setattr(torch, "empty", empty)


@pytest.mark.parametrize(("size", "splits", "blocks"), [(1, 2, 1), (4, 9, 33), (24, 48, 7), (256, 512, 128)])
def test_sections_of_a_layout_begin_at_lines_and_lie_apart(size: int, splits: int, blocks: int) -> None:
    layout = DecodeLayout(size, splits, blocks)
    whole = torch.zeros(layout.total, dtype=torch.int32)
    views = layout.views(whole)
    assert {name: tuple(view.shape) for name, view in views.items()} == {
        "ids": (size,),
        "positions": (size,),
        "slots": (size,),
        "seq_lens": (size,),
        "splits": (splits, plan.SPLIT_COLUMNS),
        "tables": (size, blocks),
    }
    for number, view in enumerate(views.values(), start=1):
        assert view.storage_offset() % LINE == 0
        assert view.is_contiguous()
        assert not view.any()  # no section before has written here
        view.fill_(number)
    assert (
        [int(view.min()) for view in views.values()] == [int(view.max()) for view in views.values()] == [*range(1, 7)]
    )
    assert layout.total < sum(view.numel() for view in views.values()) + 6 * LINE


def test_what_is_put_into_a_layout_is_what_the_model_reads() -> None:
    layout = DecodeLayout(5, 11, 3)
    whole = torch.arange(layout.total, dtype=torch.int32)
    views, tokens = layout.views(whole), layout.tokens(whole)
    meta = tokens.meta
    assert meta.plan is not None
    assert meta.plan.splits is not None
    for name, read in {
        "ids": tokens.ids,
        "positions": tokens.positions,
        "slots": meta.slot_mapping,
        "seq_lens": meta.seq_lens,
        "tables": meta.block_tables,
        "splits": meta.plan.splits,
    }.items():
        assert torch.equal(read, views[name])
        assert read.data_ptr() == views[name].data_ptr()  # so a graph reads what the next step writes
    assert meta.plan.tiles is None
    assert tokens.any_pending
    assert meta.query_lens == [1] * 5
    assert meta.num_tokens == 5
    assert meta.output_indices is None
    assert meta.output_part is None


@pytest.mark.parametrize("overlap", [False, True], ids=["steps", "overlapped"])
@pytest.mark.parametrize("room", [0, 3], ids=["full", "filled up"])
@pytest.mark.usefixtures("pinned_memory")
def test_single_tokens_by_a_layout(room: int, overlap: bool, make_sequence: MakeSequence) -> None:
    block_size, blocks = 4, 200
    run = busy(make_sequence, overlap=overlap, seed=2, block_size=block_size, blocks=blocks, max_num_seqs=8)
    inputs = Inputs(BlockTables(run.most, 20), block_size, PLANNER, CPU)
    checked = 0
    for batch in run.steps():
        count = len(batch.sequences)
        if batch.num_tokens > count:
            continue
        checked += 1
        layout = inputs.decode_layout(count + room)
        assert (layout.size, layout.blocks) == (count + room, 20)
        tokens = layout.tokens(inputs.decode_numbers(batch, layout))
        expect_single(tokens, batch, run, block_size, room)
    assert checked > 20


def expect_single(tokens: Tokens, batch: Batch, run: Run, block_size: int, room: int) -> None:
    """One token of each sequence, and `room` tokens of none."""
    count, meta = len(batch.sequences), tokens.meta
    positions = [sequence.num_computed for sequence in batch.sequences]
    truth = [run.truth[s.key][position] for s, position in zip(batch.sequences, positions, strict=True)]
    assert ops.resolve_ids(tokens.ids, run.chosen).tolist() == truth + [0] * room
    assert tokens.positions.tolist() == positions + [0] * room
    assert meta.seq_lens.tolist() == [position + 1 for position in positions] + [0] * room
    slots = [slot(s, position, block_size) for s, position in zip(batch.sequences, positions, strict=True)]
    assert meta.slot_mapping.tolist() == slots + [-1] * room
    for sequence, position, table in zip(batch.sequences, positions, meta.block_tables.tolist(), strict=False):
        needed = position // block_size + 1
        assert table[:needed] == sequence.block_table[:needed]
    assert meta.plan is not None
    assert meta.plan.splits is not None
    keys: dict[int, list[int]] = defaultdict(list)
    for sequence, query_row, out_row, first, end, length, place, splits in meta.plan.splits.tolist():
        if sequence < 0:
            assert splits == 1  # and nothing else of it is read
            continue
        assert query_row == out_row == sequence
        assert length == positions[sequence] + 1
        assert len(keys[sequence]) < length
        assert place < splits
        keys[sequence] += range(first, end)
    assert sorted(keys) == list(range(count))
    for row, position in enumerate(positions):
        assert keys[row] == list(range(position + 1))


@pytest.mark.parametrize("most", [*range(1, 70), 100, 255, 256, 257, 288, 289, 512, 1000])
def test_sizes_of_graphs(most: int) -> None:
    made = sizes(most)
    assert made == sorted(set(made))
    assert made[0] == 1
    assert made[-1] == most
    for count in range(1, most + 1):
        size = next(size for size in made if size >= count)
        # what fills a batch up is at most 7 tokens, or a fifth of it
        assert size - count <= max(7, size // 5)


def test_the_sizes_of_the_default_number_of_sequences() -> None:
    assert sizes(256) == [1, 2, 4, *range(8, 65, 8), *range(80, 257, 16)]
