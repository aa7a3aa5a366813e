"""Which texts a step takes, and what the device gets of them."""

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from hasten.core.config import SchedulerConfig
from hasten.core.types import EmbeddingOutput, PoolingParams, PoolingRequestOutput, Request
from hasten.engine.batch import Batch
from hasten.engine.block_manager import BlockManager
from hasten.engine.inputs import BlockTables, Inputs
from hasten.engine.step_message import StepMessage
from hasten.engine.text_scheduler import TextScheduler, TextSequence, as_ids

PARAMS = PoolingParams()


def scheduler(tokens: int, texts: int) -> TextScheduler:
    config = SchedulerConfig(max_num_batched_tokens=tokens, max_num_seqs=texts)
    return TextScheduler(config, BlockManager(4, 4, enable_prefix_caching=False))


def text(
    length: int, rows: NDArray[np.int32] | None = None, masks: tuple[int, ...] = (), first: int = 10
) -> TextSequence:
    ids = tuple(range(first, first + length))
    request = Request(request_id=str(first), prompt_token_ids=ids, pooling=PARAMS, masks=masks)
    return TextSequence(request, as_ids(ids), length, rows)


def taken(scheduler: TextScheduler) -> list[list[int]]:
    """Lengths of the texts of each step."""
    found: list[list[int]] = []
    while (batch := scheduler.schedule()).sequences:
        assert batch.number == len(found)
        assert batch.needed == batch.counts == [each.length for each in batch.sequences]
        assert batch.sampled == list(range(len(batch.counts)))
        assert scheduler.advance(batch) == []
        found.append(batch.counts)
    return found


def test_a_step_takes_what_comes_first_as_far_as_there_is_room() -> None:
    texts = scheduler(10, 3)
    for length in (4, 6, 1, 1, 1, 1, 12, 2, 9):
        texts.add(text(length))
    assert taken(texts) == [[4, 6], [1, 1, 1], [1], [12], [2], [9]]
    assert texts.has_work, "none was finished"


def test_there_is_room_until_the_next_step_is_full() -> None:
    texts = scheduler(10, 3)
    for lengths, room in (((4, 5), True), ((1,), False)):
        for length in lengths:
            assert texts.has_room
            texts.add(text(length))
        assert texts.has_room == room
    texts.schedule()
    assert texts.has_room
    for _ in range(3):
        texts.add(text(1))
    assert not texts.has_room, "as many texts as a step takes"
    texts.finish(texts.waiting[0].key)
    assert texts.has_room
    texts.add(text(20))
    assert texts.schedule().counts == [1, 1]
    assert not texts.has_room
    assert texts.schedule().counts == [20]
    assert texts.has_room


def test_a_text_is_forgotten_wherever_it_stands() -> None:
    texts, given = scheduler(4, 4), [text(4), text(3), text(2)]
    for each in given:
        texts.add(each)
    assert texts.schedule().counts == [4]
    for each in (given[0], given[1]):
        assert texts.get(each.key) is each
        texts.finish(each.key)
        texts.finish(each.key)  # a second time it is known no more
        assert texts.get(each.key) is None
    assert [each.is_waiting for each in given] == [False, True, True]
    assert texts.schedule().counts == [2]
    assert texts.has_work
    texts.finish(given[2].key)
    assert not texts.has_work


def test_ids_of_more_than_32_bits_are_refused() -> None:
    assert as_ids((7, 2**31 - 1)).tolist() == [7, 2**31 - 1]
    with pytest.raises(OverflowError):
        as_ids((7, 2**31))


def batch(*texts: TextSequence) -> Batch:
    counts = [each.length for each in texts]
    return Batch(3, list(texts), counts, counts, list(range(len(texts))))


@pytest.mark.parametrize("rows", [None, np.array([5, 9, 6], dtype=np.int32)])
def test_all_ranks_get_the_same_step(rows: NDArray[np.int32] | None) -> None:
    given = batch(text(3, rows), text(2, masks=(1,), first=40))
    message = StepMessage.of_texts(given, needs_first=rows is None)
    assert list(message.ids) == [10, 11, 12, 40, 41]
    assert list(message.positions) == ([] if rows is None else [5, 9, 6, 0, 1])
    assert message.prompt_rows == [4]
    received = StepMessage.unpacked(message.packed())
    for name, value in vars(message).items():
        assert np.array_equal(getattr(received, name), value), name


@pytest.mark.parametrize(("needs_first", "rows"), [(True, [0, 3, 4, 5]), (False, [2, 3, 4, 9])])
def test_hidden_states_that_are_needed(needs_first: bool, rows: list[int]) -> None:
    lengths, needed = [3, 2, 5], [1, 2, 1]
    given = batch(*map(text, lengths))
    given.needed = needed
    inputs = Inputs(BlockTables(8, 16), 4, None, torch.device("cpu"), causal=False)
    part = inputs.tokens(StepMessage.of_texts(given, needs_first=needs_first)).meta.output_part
    assert part is not None
    assert part.output_indices is not None
    assert part.output_indices.tolist() == rows
    assert part.query_lens == needed
    assert part.kv_lens == lengths


@pytest.mark.parametrize("block_size", [1, 3, 4, 16])
def test_texts_lie_in_blocks_of_their_own(block_size: int) -> None:
    lengths = [4, 1, 9, 3]
    inputs = Inputs(BlockTables(8, 16), block_size, None, torch.device("cpu"), causal=False)
    tokens = inputs.tokens(StepMessage.of_texts(batch(*map(text, lengths))))
    assert tokens.positions.tolist() == [at for length in lengths for at in range(length)]
    meta = tokens.meta
    assert meta.query_lens == meta.kv_lens == lengths
    slots, used = iter(meta.slot_mapping.tolist()), list[int]()
    for sequence, length in zip(meta.sequences, lengths, strict=True):
        table = meta.block_tables[sequence].tolist()
        assert [next(slots) for _ in range(length)] == [
            table[at // block_size] * block_size + at % block_size for at in range(length)
        ]
        used += table[: -(-length // block_size)]
    assert used == list(range(sum(-(-length // block_size) for length in lengths)))
    assert int(meta.block_tables.max()) == used[-1], "what is behind a text's end may be read, but not used"


def test_token_ids_of_an_output_become_a_list_when_they_are_asked_for() -> None:
    output = PoolingRequestOutput("7", "a text", as_ids((5, 6)), EmbeddingOutput([0.5]))
    assert output.prompt_token_ids == [5, 6]
    assert output.prompt_token_ids is output.prompt_token_ids
    assert all(type(token) is int for token in output.prompt_token_ids)
    assert repr(output) == (
        "PoolingRequestOutput(request_id='7', prompt='a text', prompt_token_ids=[5, 6], "
        "outputs=EmbeddingOutput(embedding=[0.5]), finished=True)"
    )


def test_a_vector_becomes_a_list_when_it_is_asked_for() -> None:
    numbers = np.array([0.5, -2.0, 3.0], dtype=np.float32)
    row, listed = EmbeddingOutput(numbers), EmbeddingOutput([0.5, -2.0, 3.0])
    assert row.tobytes() == listed.tobytes() == numbers.tobytes()
    assert row.hidden_size == listed.hidden_size == 3
    assert row.embedding == [0.5, -2.0, 3.0]
    assert row.embedding is row.embedding
    assert row == listed
    assert row != EmbeddingOutput([0.5])
    assert row != [0.5, -2.0, 3.0]
    assert repr(row) == repr(listed) == "EmbeddingOutput(embedding=[0.5, -2.0, 3.0])"
