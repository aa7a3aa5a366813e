"""What the device gets of a batch, compared with what the sequences themselves say."""

import random
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from hasten import ops
from hasten.core.config import SchedulerConfig
from hasten.engine.batch import Batch
from hasten.engine.block_manager import BlockManager
from hasten.engine.graphs import Size, decode_sizes, mixed_sizes
from hasten.engine.inputs import BlockTables, Inputs, Tokens
from hasten.engine.scheduler import Scheduler
from hasten.engine.sequence import Sequence
from hasten.engine.step_message import StepMessage, TableRows
from hasten.ops import transfer
from hasten.ops.plan import Planner
from hasten.ops.transfer import Sections

MakeSequence = Callable[..., Sequence]
CPU = torch.device("cpu")
PLANNER = Planner(heads=4, kv_heads=4, multiprocessors=0)
BLOCK_SIZE = 4
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
            self.flight = [batch.sequences[index] for index in batch.sampled]
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


def slots_of(work: list[tuple[Sequence, int, int]], block_size: int) -> list[int]:
    return [slot(sequence, position, block_size) for sequence, first, end in work for position in range(first, end)]


def expect_meta(meta: ops.AttentionMeta, work: list[tuple[Sequence, int, int]], block_size: int, blocks: int) -> None:
    """`meta` is of these sequences, with positions from the first to before the end."""
    counts = [end - first for _, first, end in work]
    assert meta.kv_lens == [end for *_, end in work]
    assert meta.query_lens == counts
    assert meta.num_tokens == sum(counts)
    tables = meta.block_tables.tolist()
    for row, (sequence, _, end) in zip(meta.sequences, work, strict=True):
        needed = -(-end // block_size)
        assert tables[row][:needed] == sequence.block_table[:needed]
    assert all(0 <= block < blocks for table in tables for block in table)
    assert meta.block_tables.dtype == torch.int32


def expect_plan(meta: ops.AttentionMeta, query_rows: list[int], tables: Tensor) -> None:
    """Every query is read at its row of the whole batch, written to its own, and sees its sequence up to itself.

    A query that sees no keys belongs to no sequence.
    """
    assert meta.plan is not None
    blocks = tables.flatten().tolist()
    found: dict[int, tuple[int, list[int], int]] = {}
    for start, query_row, out_row, count, position in _items(meta.plan.tiles):
        for index in range(count):
            assert out_row + index not in found
            sees = max(0, position + index + 1)
            found[out_row + index] = (query_row + index, blocks[start : start + -(-sees // BLOCK_SIZE)], sees)
    keys: dict[int, list[tuple[int, int]]] = defaultdict(list)
    for start, query_row, out_row, first, end, length, index, splits in _items(meta.plan.splits):
        if splits == 0:
            assert not any((start, query_row, out_row, first, end, length, index))
            continue
        assert len(keys[out_row]) == index < splits
        keys[out_row].append((first, end))
        found[out_row] = (query_row, blocks[start : start + -(-length // BLOCK_SIZE)], length)
    for out_row, pieces in keys.items():
        assert [first for first, _ in pieces] == [0, *(end for _, end in pieces[:-1])]
        assert pieces[-1][1] == found[out_row][2]
    own = iter(query_rows)
    expected = []
    for row, count, kv_len in zip(meta.sequences, meta.query_lens, meta.kv_lens, strict=True):
        for sees in range(kv_len - count + 1, kv_len + 1):
            table = meta.block_tables[row].tolist() if kv_len else []
            expected.append((next(own), table[: -(-max(0, sees) // BLOCK_SIZE)], max(0, sees)))
    assert [found[row] for row in range(len(expected))] == expected
    assert len(found) == len(expected)


def _items(items: Tensor | None) -> list[list[int]]:
    return [] if items is None else items.tolist()


@pytest.mark.parametrize("overlap", [False, True], ids=["steps", "overlapped"])
@pytest.mark.parametrize("planned", [False, True], ids=["cpu", "planned"])
@pytest.mark.parametrize("seed", range(4))
def test_every_batch_of_a_busy_scheduler(seed: int, planned: bool, overlap: bool, make_sequence: MakeSequence) -> None:
    block_size, blocks = BLOCK_SIZE, 24
    run = busy(make_sequence, overlap=overlap, seed=seed, block_size=block_size, blocks=blocks)
    inputs = Inputs(BlockTables(run.most, 20), block_size, PLANNER if planned else None, CPU)
    seen: dict[str, int] = defaultdict(int)
    rows = TableRows(run.most)
    for batch in run.steps():
        tokens = inputs.tokens(StepMessage.of(batch, rows))
        work = [(s, s.num_computed, s.num_computed + n) for s, n in zip(batch.sequences, batch.counts, strict=True)]
        ids = [token for s, first, end in work for token in run.truth[s.key][first:end]]
        assert ops.resolve_ids(tokens.ids, run.chosen).tolist() == ids
        pending = [sequence for sequence in batch.sequences if sequence.pending]
        assert (tokens.ids < 0).sum() == len(pending)
        assert tokens.any_pending == bool(pending)
        assert tokens.positions.tolist() == [position for _, first, end in work for position in range(first, end)]
        expect_meta(tokens.meta, work, block_size, blocks)
        assert tokens.meta.slot_mapping.tolist() == slots_of(work, block_size)
        assert tokens.meta.output_indices is None
        last = tokens.meta.output_part
        assert (last is None) == (batch.needed == batch.counts)
        if last is not None:
            needed = zip(work, batch.needed, strict=True)
            expect_meta(last, [(s, end - n, end) for (s, _, end), n in needed if n], block_size, blocks)
            assert last.output_indices is not None
            last_rows = [
                row
                for end, n in zip(np.cumsum(batch.counts).tolist(), batch.needed, strict=True)
                for row in range(end - n, end)
            ]
            assert last.output_indices.tolist() == last_rows
            assert last.output_part is None
            if planned:
                expect_plan(last, last_rows, tokens.meta.block_tables)
        if planned:
            expect_plan(tokens.meta, list(range(batch.num_tokens)), tokens.meta.block_tables)
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


@pytest.mark.parametrize(("tokens", "sequences"), [(1, 1), (12, 1), (12, 5), (12, 12), (900, 3)])
@pytest.mark.parametrize("planned", [False, True], ids=["cpu", "planned"])
def test_a_warm_up_stores_nothing_and_stays_within_the_tables(tokens: int, sequences: int, planned: bool) -> None:
    inputs = Inputs(BlockTables(16, 10), 4, PLANNER if planned else None, CPU)
    result = inputs.warmup_tokens(tokens, sequences)
    assert result.ids.shape == result.positions.shape == (tokens,)
    assert not result.ids.any()
    assert not result.any_pending
    assert result.meta.slot_mapping.eq(-1).all()
    assert sum(result.meta.query_lens) == tokens
    assert max(result.meta.query_lens) - min(result.meta.query_lens) < sequences
    assert result.meta.block_tables.shape[1] <= 10
    assert max(result.meta.kv_lens) <= 40
    assert not result.meta.block_tables.any()
    if tokens > sequences:
        assert result.meta.output_part is not None
        assert result.meta.output_part.query_lens == [1] * sequences
    else:
        assert result.meta.output_part is None


@pytest.mark.parametrize(("max_len", "gathers"), [(1500, False), (2048, True), (100_000, True)])
def test_a_warm_up_of_one_long_sequence_has_the_kernels_of_long_prompts(max_len: int, gathers: bool) -> None:
    inputs = Inputs(BlockTables(1, -(-max_len // 16)), 16, PLANNER, CPU)
    plan = inputs.warmup_tokens(min(8192, max_len), 1).meta.plan
    assert plan is not None
    assert (plan.gathers is not None) == gathers


# --- steps in graphs --------------------------------------------------------------------------------------------------


@pytest.fixture
def pinned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory of the host with whatever content."""
    monkeypatch.setattr(transfer, "host_buffer", lambda shape, _device: torch.full(shape, GARBAGE, dtype=torch.int32))


SECTIONS: list[dict[str, tuple[int, ...]]] = [
    {"ids": (1,), "splits": (2, 8), "tables": (1,)},
    {"ids": (5,), "positions": (5,), "tiles": (7, 5), "tables": (33,)},
    {"ids": (256,), "slots": (256,), "splits": (512, 8), "tables": (256 * 128,)},
]


@pytest.mark.parametrize("shapes", SECTIONS, ids=len)
def test_sections_begin_at_lines_and_lie_apart(shapes: dict[str, tuple[int, ...]]) -> None:
    sections = Sections(shapes)
    whole = torch.zeros(sections.total, dtype=torch.int32)
    views = sections.views(whole)
    assert {name: tuple(view.shape) for name, view in views.items()} == shapes
    for number, view in enumerate(views.values(), start=1):
        assert view.storage_offset() % LINE == 0
        assert view.is_contiguous()
        assert not view.any()  # no section before has written here
        view.fill_(number)
    assert [int(view.min()) for view in views.values()] == [int(view.max()) for view in views.values()]
    assert sections.total < sum(view.numel() for view in views.values()) + len(shapes) * LINE


@pytest.mark.usefixtures("pinned_memory")
def test_packed_arrays_stand_in_their_sections_and_nothing_travels_that_need_not() -> None:
    sections = Sections({"ids": (40,), "tiles": (9, 5), "splits": (3, 8), "tables": (1000,)})
    arrays = {"ids": np.arange(7), "tables": np.arange(50), "tiles": np.ones((2, 5), dtype=np.int64)}
    assert sections.hold(arrays)
    host = sections.packed(arrays, CPU)
    assert len(host) < 64 + 64 + 32 + 50 + LINE
    whole = torch.full((sections.total,), GARBAGE, dtype=torch.int32)
    whole[: len(host)] = host
    views = {name: view.tolist() for name, view in sections.views(whole).items()}
    assert views["ids"] == [*range(7)] + [0] * 33
    assert views["tiles"] == [[1] * 5] * 2 + [[0] * 5] * 7
    assert views["splits"] == [[0] * 8] * 3
    assert views["tables"] == [*range(50)] + [GARBAGE] * 950
    assert not sections.hold({"ids": np.arange(41)})
    assert not sections.hold({"tiles": np.zeros((10, 5), dtype=np.int64)})
    assert not sections.hold({"slots": np.arange(1)})


@pytest.mark.parametrize("overlap", [False, True], ids=["steps", "overlapped"])
@pytest.mark.parametrize("room", [0, 1, 3, 70], ids=["full", "one more", "padded", "by tiles"])
@pytest.mark.usefixtures("pinned_memory")
def test_padded_steps_in_their_sections(room: int, overlap: bool, make_sequence: MakeSequence) -> None:
    blocks = 200
    run = busy(make_sequence, overlap=overlap, seed=2, block_size=BLOCK_SIZE, blocks=blocks, max_num_seqs=8)
    inputs = Inputs(BlockTables(run.most, 20), BLOCK_SIZE, PLANNER, CPU)
    seen: dict[str, int] = defaultdict(int)
    rows = TableRows(run.most)
    for batch in run.steps():
        kind = kind_of(batch)
        step = inputs.step(StepMessage.of(batch, rows))
        seen[kind] += 1
        if kind == "prompt logits":
            continue
        count, outputs = batch.num_tokens, sum(batch.needed)
        size = Size(count + room, None if kind == "single tokens" else min(count + room, outputs + room))
        sections = inputs.sections(size.tokens, size.outputs, 8 + room)
        arrays = size.arrays(inputs, step)
        assert sections.hold(arrays)
        whole = torch.full((sections.total,), GARBAGE, dtype=torch.int32)
        host = sections.packed(arrays, CPU)
        whole[: len(host)] = host
        tokens = inputs.seen(step.padded(size.tokens, size.outputs), sections.views(whole))
        expect_padded(tokens, batch, run, arrays["tables"].reshape(len(batch.sequences), -1))
    assert min(seen.values()) > 3, seen


def kind_of(batch: Batch) -> str:
    if max(batch.needed) > 1:
        return "prompt logits"
    return "single tokens" if sum(batch.needed) == batch.num_tokens else "with prompts"


def expect_padded(tokens: Tokens, batch: Batch, run: Run, tables: Any) -> None:
    """The tokens of the batch, and behind them some that store nothing, see nothing and are no part of it."""
    count, meta = batch.num_tokens, tokens.meta
    room = meta.num_tokens - count
    work = [(s, s.num_computed, s.num_computed + n) for s, n in zip(batch.sequences, batch.counts, strict=True)]
    truth = [token for s, first, end in work for token in run.truth[s.key][first:end]]
    assert ops.resolve_ids(tokens.ids, run.chosen).tolist() == truth + [0] * room
    assert tokens.positions.tolist() == [p for _, first, end in work for p in range(first, end)] + [0] * room
    assert meta.slot_mapping.tolist() == slots_of(work, BLOCK_SIZE) + [-1] * room
    assert sum(meta.query_lens) == meta.num_tokens
    assert meta.kv_lens[: len(work)] == [end for *_, end in work]
    assert not any(meta.kv_lens[len(work) :])
    flat = meta.block_tables[: tables.size]
    assert flat.tolist() == tables.ravel().tolist()
    expect_plan(replace(meta, block_tables=flat.view(tables.shape)), list(range(meta.num_tokens)), flat)
    part = meta.output_part
    if part is None:
        assert meta.query_lens == [1] * meta.num_tokens
        return
    needed = [row for row, n in zip(np.cumsum(batch.counts) - 1, batch.needed, strict=True) if n]
    padding = [0] * (part.num_tokens - len(needed))
    assert part.output_indices is not None
    assert part.output_indices.tolist() == needed + padding
    expect_plan(replace(part, block_tables=flat.view(tables.shape)), needed + padding, flat)


@pytest.mark.parametrize("most", [*range(1, 70), 100, 255, 256, 257, 288, 289, 512, 1000])
def test_sizes_of_steps_of_single_tokens(most: int) -> None:
    result = decode_sizes(most)
    assert all(size.outputs is None for size in result)
    tokens = [size.tokens for size in result]
    assert tokens == sorted(set(tokens))
    assert tokens[0] == 1
    assert tokens[-1] == most
    for count in range(1, most + 1):
        size = next(size for size in tokens if size >= count)
        # padding is at most 7 tokens, or a fifth of the step
        assert size - count <= max(7, size // 5)


@pytest.mark.parametrize("most", [1, 16, 40, 64, 300, 512, 1024, 1300, 8192])
@pytest.mark.parametrize("sequences", [1, 48, 256])
def test_sizes_of_steps_with_prompts(most: int, sequences: int) -> None:
    result = mixed_sizes(most, sequences)
    tokens = [size.tokens for size in result]
    assert tokens == sorted(set(tokens))
    assert tokens[-1] == min(most, 1536)
    assert all(size.outputs == min(size.tokens, sequences) for size in result)
    for count in range(33, tokens[-1] + 1):
        size = next(size for size in tokens if size >= count)
        # there is no graph of 448 tokens, which takes longer than one of 512
        assert size - count < max(32, size // (7 if 416 < count <= 448 else 8))


def test_the_sizes_of_the_defaults() -> None:
    assert [size.tokens for size in decode_sizes(256)] == [1, 2, 4, *range(8, 65, 8), *range(80, 257, 16)]
    assert len(mixed_sizes(8192, 256)) == 29
