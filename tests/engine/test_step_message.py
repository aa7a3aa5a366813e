"""What a step's numbers say, and how they travel."""

import random
from collections.abc import Callable
from dataclasses import replace

import numpy as np

from hasten.engine.batch import Batch
from hasten.engine.block_manager import BlockManager
from hasten.engine.inputs import BlockTables
from hasten.engine.sequence import Sequence
from hasten.engine.step_message import StepMessage, TableEdit, TableRows

MakeSequence = Callable[..., Sequence]


EMPTY = StepMessage(0, [], [], [], [], [], [], [], [], [], [], greedy=True)


def rounds_of(copies: list[tuple[int, int]]) -> list[list[tuple[int, int]]]:
    return replace(EMPTY, copies=copies).copy_rounds()


def test_copies_are_done_together_unless_one_overwrites_what_another_reads() -> None:
    assert rounds_of([]) == []
    assert rounds_of([(1, 4), (1, 5), (2, 6)]) == [[(1, 4), (1, 5), (2, 6)]]
    assert rounds_of([(1, 4), (2, 1), (3, 5)]) == [[(1, 4)], [(2, 1), (3, 5)]]
    assert rounds_of([(1, 4), (2, 1), (3, 2)]) == [[(1, 4)], [(2, 1)], [(3, 2)]]


def test_rounds_in_any_order_leave_what_copying_one_by_one_leaves() -> None:
    rng = random.Random(0)
    several = 0
    for _ in range(200):
        targets = rng.sample(range(12), 6)
        copies: list[tuple[int, int]] = []
        for number, target in enumerate(targets):
            # a block that was given out before in this step has one holder, and is nobody's source
            source = rng.choice([block for block in range(12) if block not in targets[: number + 1]])
            copies.append((source, target))
        one_by_one, in_rounds = list(range(12)), list(range(12))
        for source, target in copies:
            one_by_one[target] = one_by_one[source]
        rounds = rounds_of(copies)
        several += len(rounds) > 1
        for each in rounds:
            for source, target in rng.sample(each, len(each)):
                in_rounds[target] = in_rounds[source]
        assert in_rounds == one_by_one
    assert several > 20


def with_table(sequence: Sequence, table: list[int]) -> Sequence:
    sequence.block_table = table
    return sequence


def test_rows_of_tables_are_kept_while_there_is_room_and_follow_every_change(make_sequence: MakeSequence) -> None:
    rows, tables = TableRows(2), BlockTables(2, 4)

    def update(*sequences: Sequence) -> tuple[list[int], list[TableEdit]]:
        indices, edits = rows.assign_rows(list(sequences))
        tables.apply(edits)
        for row, sequence in zip(indices, sequences, strict=True):
            assert tables.array[row, : len(sequence.block_table)].tolist() == sequence.block_table
        return indices, edits

    first_item, second_item, third = (with_table(make_sequence([1]), table) for table in ([5], [6, 7], [9]))
    (first, second), _ = update(first_item, second_item)
    assert first != second
    assert update(first_item, second_item) == ([first, second], [])
    first_item.block_table += [8, 3]  # more of them: the version stays
    second_item.block_table = [6, 1]  # one is another: the version changes
    second_item.table_version += 1
    assert update(second_item, first_item) == ([second, first], [(second, 1, [1]), (first, 1, [8, 3])])
    update(third)  # takes the row of one that does not run
    indices, _ = update(third, second_item)
    assert sorted(indices) == [0, 1]
    rows.release(third.key)
    rows.release(third.key)
    update(first_item)
    assert update(second_item) == ([indices[1]], [])  # an ended sequence gave its row first


def test_a_message_does_not_grow_with_the_length_of_sequences(make_sequence: MakeSequence) -> None:
    """What one token more of each sequence takes, a new block included."""
    sizes = []
    for length in (32, 3200):
        blocks, rows = BlockManager(3 * 256, 16), TableRows(4)
        sequences = [make_sequence(range(number, length + number)) for number in range(3)]
        for count in (length - 1, 1, 1):
            batch = Batch()
            for sequence in sequences:
                copies = blocks.reserve(sequence, count)
                assert copies is not None
                batch.add(sequence, count, copies)
            numbers = StepMessage.of(batch, rows).packed()
            for sequence in sequences:
                sequence.num_computed += count
                if sequence.num_computed == sequence.length:
                    sequence.append(7)
        sizes.append(numbers.nbytes)
    assert sizes[0] == sizes[1] < 220


def test_what_beams_share_is_not_sent_again(make_sequence: MakeSequence) -> None:
    blocks, rows = BlockManager(256, 4), TableRows(2)
    parent, child = (make_sequence(range(400)) for _ in range(2))
    assert blocks.reserve(parent, 400) == []
    parent.num_computed = 400
    blocks.share(parent, child, 99)
    child.num_computed = 396
    rows.assign_rows([parent, child])
    assert blocks.reserve(child, 4) == []  # the last block is the child's own from the start
    child.num_computed = 400
    _, edits = rows.assign_rows([parent, child])
    assert [(first, len(table)) for _, first, table in edits] == [(99, 1)]
    version = child.table_version
    blocks.share(parent, child, 99)
    assert child.table_version == version
    blocks.share(parent, child, 100)
    _, edits = rows.assign_rows([parent, child])
    assert [(first, table) for _, first, table in edits] == [(99, parent.block_table[99:])]
    child.table_version += 1
    assert rows.assign_rows([parent, child])[1] == []


def test_numbers_arrive_as_they_were(make_sequence: MakeSequence) -> None:
    assert StepMessage.unpacked(EMPTY.packed()) == EMPTY
    message = StepMessage(
        number=70_001,
        ids=[-1, 5, 250_879],
        rows=[3, 1],
        starts=[70_000, 0],
        counts=[1, 2],
        needed=[1, 2],
        sampled=[0],
        prompt_rows=[1, 2],
        edits=[(3, 9, [4]), (1, 0, [2, 8])],
        copies=[(4, 5), (6, 7)],
        positions=[7, 8, 9],
        moves=[(0, 0, 2), (1, 0, -17)],
        num_chosen=4,
        searches=True,
        greedy=False,
    )
    assert message.packed().dtype == np.int32
    assert StepMessage.unpacked(message.packed()) == message
    assert message.sampled_rows == [0]
