from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from hasten.core.types import Request
from hasten.engine.block_manager import BlockManager
from hasten.engine.sequence import Sequence

if TYPE_CHECKING:
    from tests.engine.conftest import MakeSequence, Shadow

SIZE = 4


def compute(manager: BlockManager, cache: Shadow, sequence: Sequence, count: int | None = None) -> bool:
    """Let a sequence compute its next tokens, all of them by default; False if blocks ran out."""
    count = len(sequence.token_ids) - sequence.num_computed if count is None else count
    copies = manager.reserve(sequence, count)
    if copies is None:
        return False
    cache.copy(copies)
    cache.write(sequence, count)
    sequence.num_computed += count
    manager.register(sequence)
    return True


def snapshot(manager: BlockManager, sequence: Sequence) -> tuple[object, ...]:
    return (
        list(manager._references),
        list(manager._free),
        dict(manager._known),
        list(manager._content),
        list(sequence.block_table),
        sequence.table_version,
        sequence.num_computed,
    )


def salted(tokens: Iterable[int], salt: str, start: tuple[int, ...] = ()) -> Sequence:
    return Sequence(Request(request_id="r", prompt_token_ids=tuple(tokens), cache_salt=salt), 0, start=start)


def machine_for(shadow: type[Shadow]) -> type[RuleBasedStateMachine]:
    class Walk(RuleBasedStateMachine):
        """Sequences that come, grow, fork, end and are withdrawn in any order."""

        def __init__(self) -> None:
            super().__init__()
            self.manager = BlockManager(10, SIZE)
            self.cache = shadow(self.manager)
            self.sequences: list[Sequence] = []

        def pick(self, number: int) -> Sequence:
            return self.sequences[number % len(self.sequences)]

        @rule(tokens=st.lists(st.integers(0, 1), min_size=1, max_size=14), salt=st.sampled_from(["", "a"]))
        def come(self, tokens: list[int], salt: str) -> None:
            sequence = salted(tokens, salt)
            for other in self.sequences:
                assert other.root == sequence.root or not set(other.block_table) & set(sequence.block_table)
            self.sequences.append(sequence)
            self.manager.share_prefix(sequence)
            assert sequence.num_computed < len(tokens)

        @precondition(lambda self: self.sequences)
        @rule(number=st.integers(0, 20), part=st.integers(1, 8))
        def catch_up(self, number: int, part: int) -> None:
            sequence = self.pick(number)
            left = len(sequence.token_ids) - sequence.num_computed
            before = snapshot(self.manager, sequence)
            if left and not compute(self.manager, self.cache, sequence, min(part, left)):
                assert snapshot(self.manager, sequence) == before

        @precondition(lambda self: self.sequences)
        @rule(number=st.integers(0, 20), token=st.integers(0, 1))
        def choose_token(self, number: int, token: int) -> None:
            sequence = self.pick(number)
            if sequence.num_computed == len(sequence.token_ids):
                sequence.token_ids.append(token)

        @precondition(lambda self: self.sequences)
        @rule(number=st.integers(0, 20))
        def fork(self, number: int) -> None:
            parent = self.pick(number)
            if parent.num_computed >= parent.prompt_len:
                child = parent.fork(1)
                self.manager.fork(parent, child)
                self.sequences.append(child)

        @precondition(lambda self: self.sequences)
        @rule(number=st.integers(0, 20), resume=st.booleans())
        def give_way(self, number: int, resume: bool) -> None:
            sequence = self.pick(number)
            self.manager.free(sequence)
            assert (sequence.block_table, sequence.num_computed) == ([], 0)
            if resume:
                self.manager.share_prefix(sequence)
            else:
                self.sequences.remove(sequence)

        @invariant()
        def books_agree(self) -> None:
            self.cache.check(self.sequences)

        def teardown(self) -> None:
            for sequence in self.sequences:
                self.manager.free(sequence)
            self.cache.check([])
            assert self.manager.num_used == 0

    return Walk


def test_random_walks_keep_the_books_and_the_contents(shadow: type[Shadow]) -> None:
    run_state_machine_as_test(
        machine_for(shadow),
        settings=settings(max_examples=150, stateful_step_count=40, deadline=None, derandomize=True),
    )


@pytest.fixture
def walk(shadow: type[Shadow]) -> Callable[..., tuple[BlockManager, Shadow]]:
    def make(num_blocks: int = 12, *, enable_prefix_caching: bool = True) -> tuple[BlockManager, Shadow]:
        manager = BlockManager(num_blocks, SIZE, enable_prefix_caching=enable_prefix_caching)
        return manager, shadow(manager)

    return make


Walk = Callable[..., tuple["BlockManager", "Shadow"]]


@pytest.mark.parametrize("length", [1, SIZE - 1, SIZE, SIZE + 1, 2 * SIZE, 2 * SIZE + 1, 3 * SIZE + 2])
def test_equal_prompts_share_all_full_blocks_but_leave_the_last_token(
    walk: Walk, make_sequence: MakeSequence, length: int
) -> None:
    manager, cache = walk()
    first, second = make_sequence(range(length)), make_sequence(range(length))
    manager.share_prefix(first)
    assert first.block_table == []
    assert compute(manager, cache, first)
    manager.share_prefix(second)
    shared = (length - 1) // SIZE
    assert second.block_table == first.block_table[:shared]
    assert second.num_computed == shared * SIZE < length
    assert (manager.prefix_queries, manager.prefix_hits) == (2 * length, shared * SIZE)
    assert compute(manager, cache, second)
    cache.check([first, second])


@given(pair=st.tuples(*[st.lists(st.integers(0, 1), min_size=1, max_size=14)] * 2))
@settings(max_examples=200, deadline=None, derandomize=True)
def test_exactly_the_common_full_blocks_are_shared(
    shadow: type[Shadow], make_sequence: MakeSequence, pair: tuple[list[int], list[int]]
) -> None:
    manager = BlockManager(8, SIZE)
    cache = shadow(manager)
    first, second = (make_sequence(tokens) for tokens in pair)
    assert compute(manager, cache, first)
    manager.share_prefix(second)
    common = next((i for i, (a, b) in enumerate(zip(*pair, strict=False)) if a != b), min(map(len, pair)))
    assert len(second.block_table) == min(common // SIZE, (len(pair[1]) - 1) // SIZE)
    cache.check([first, second])


def test_prompts_of_different_salts_share_nothing(walk: Walk) -> None:
    manager, cache = walk(num_blocks=40)
    prompt, kept = [1] * (3 * SIZE), list[Sequence]()
    for salt in ("", "a", "b"):
        first, second = salted(prompt, salt), salted(prompt, salt)
        manager.share_prefix(first)
        assert first.block_table == []
        assert compute(manager, cache, first)
        manager.share_prefix(second)
        assert second.block_table == first.block_table[:2]
        manager.free(second)
        manager.share_prefix(second)  # as after a preemption
        assert second.block_table == first.block_table[:2]
        kept += [first, second]
    cache.check(kept)


def test_inputs_of_encoders_of_different_salts_share_nothing() -> None:
    manager, prompt = BlockManager(40, SIZE), tuple(range(10))
    tables = []
    for salt in ("", "a", "b"):
        first, second = encoded(manager, prompt, 2 * SIZE, salt), encoded(manager, prompt, 2 * SIZE, salt)
        assert first is not None
        assert second is not None
        assert of_input(first) == of_input(second)
        assert first.block_table[:2] == second.block_table[:2]
        tables.append({*of_input(first), *first.block_table[:2]})
    assert len(set[int]().union(*tables)) == sum(map(len, tables))


def test_the_same_block_after_another_beginning_is_another_block(walk: Walk, make_sequence: MakeSequence) -> None:
    manager, cache = walk()
    assert compute(manager, cache, make_sequence([1, 1, 1, 1, 7, 7, 7, 7, 0]))
    other = make_sequence([2, 2, 2, 2, 7, 7, 7, 7, 0])
    manager.share_prefix(other)
    assert other.block_table == []
    behind = make_sequence([7, 7, 7, 7, 0])
    manager.share_prefix(behind)
    assert behind.block_table == []


def test_nothing_is_shared_without_the_cache_or_where_all_logits_are_asked_for(
    walk: Walk, make_sequence: MakeSequence
) -> None:
    manager, cache = walk(enable_prefix_caching=False)
    assert compute(manager, cache, make_sequence(range(9)))
    again = make_sequence(range(9))
    manager.share_prefix(again)
    assert again.block_table == []
    assert manager._known == {}

    manager, cache = walk()
    assert compute(manager, cache, make_sequence(range(9)))
    whole = make_sequence(range(9), prompt_logprobs=0)
    manager.share_prefix(whole)
    assert (whole.block_table, whole.num_computed) == ([], 0)
    plain = make_sequence(range(9))
    manager.share_prefix(plain)
    assert len(plain.block_table) == 2


def test_output_is_shared_as_well_after_a_preemption(walk: Walk, make_sequence: MakeSequence) -> None:
    manager, cache = walk()
    sequence = make_sequence(range(5), output=[5, 6, 7, 8])
    assert compute(manager, cache, sequence)
    table = list(sequence.block_table)
    manager.free(sequence)
    manager.share_prefix(sequence)
    assert (sequence.block_table, sequence.num_computed) == (table[:2], 8)
    cache.check([sequence])


def test_blocks_without_content_go_first_then_the_longest_unused_and_a_tail_before_its_beginning(
    walk: Walk, make_sequence: MakeSequence
) -> None:
    manager, cache = walk(num_blocks=6)
    old, new = make_sequence([1] * 9), make_sequence([2] * 9)
    assert compute(manager, cache, old)
    assert compute(manager, cache, new)
    tables = list(old.block_table), list(new.block_table)
    manager.free(old)
    manager.free(new)
    wanted = [tables[1][2], tables[0][2], tables[0][1], tables[0][0], tables[1][1], tables[1][0]]
    assert list(manager._free) == wanted
    taker = make_sequence([3] * 20)
    assert manager.reserve(taker, 20) == []
    assert taker.block_table == wanted[:5]
    last = make_sequence([2] * 9)
    manager.share_prefix(last)
    assert last.block_table == tables[1][:1]  # its beginning outlived its tail


def test_a_block_in_use_again_is_not_handed_out(walk: Walk, make_sequence: MakeSequence) -> None:
    manager, cache = walk(num_blocks=3)
    first = make_sequence(range(9))
    assert compute(manager, cache, first)
    manager.free(first)
    again = make_sequence(range(9))
    manager.share_prefix(again)
    assert manager.num_used == 2
    other = make_sequence([9] * 5)
    before = snapshot(manager, other)
    assert manager.reserve(other, 5) is None
    assert snapshot(manager, other) == before
    cache.check([again, other])


@pytest.mark.parametrize("prefix_cache", [True, False])
@pytest.mark.parametrize("length", range(1, 2 * SIZE + 2))
def test_siblings_share_a_prompt_and_copy_before_they_write(
    walk: Walk, make_sequence: MakeSequence, length: int, prefix_cache: bool
) -> None:
    manager, cache = walk(num_blocks=20, enable_prefix_caching=prefix_cache)
    parent = make_sequence(range(length))
    assert compute(manager, cache, parent)
    used = manager.num_used
    children = [parent.fork(index) for index in (1, 2)]
    for child in children:
        manager.fork(parent, child)
        assert child.block_table == parent.block_table
        assert child.num_computed == length - 1
    assert manager.num_used == used
    family = [parent, *children]
    cache.check(family)
    parent.token_ids.append(100)
    for sequence in family:
        assert compute(manager, cache, sequence)
        cache.check(family)
    for token, child in enumerate(children):
        child.token_ids.append(200 + token)
        assert compute(manager, cache, child)
        cache.check(family)
    # they keep sharing what none of them writes: the full blocks before the one with the prompt's last token
    whole = (length - 1) // SIZE
    assert {tuple(s.block_table[:whole]) for s in family} == {tuple(parent.block_table[:whole])}
    assert len({s.block_table[whole] for s in family}) == 3


def test_a_copy_needs_a_free_block(walk: Walk, make_sequence: MakeSequence) -> None:
    manager, cache = walk(num_blocks=2)
    parent = make_sequence(range(6))
    assert compute(manager, cache, parent)
    child = parent.fork(1)
    manager.fork(parent, child)
    before = snapshot(manager, child)
    assert manager.reserve(child, 1) is None
    assert snapshot(manager, child) == before
    manager.free(parent)
    assert manager.reserve(child, 1) == []
    cache.check([child])


def test_room_reserved_but_not_used_is_not_reserved_twice(walk: Walk, make_sequence: MakeSequence) -> None:
    manager, _ = walk(num_blocks=3)
    sequence = make_sequence(range(12))
    assert manager.reserve(sequence, 12) == []
    version = sequence.table_version
    assert manager.reserve(sequence, 2) == []
    assert len(sequence.block_table) == 3
    assert sequence.table_version == version


def test_room_to_spare_does_not_pay_for_copies(walk: Walk, make_sequence: MakeSequence) -> None:
    manager, cache = walk(num_blocks=3)
    parent = make_sequence(range(6))
    assert compute(manager, cache, parent)
    child = parent.fork(1)
    manager.fork(parent, child)
    child.num_computed = 2  # so that its second block is more than it needs
    before = snapshot(manager, child)
    assert manager.reserve(child, 1) is None  # two copies, one free block
    assert snapshot(manager, child) == before


def test_a_block_with_a_pending_token_is_known_when_the_token_is(walk: Walk, make_sequence: MakeSequence) -> None:
    manager, _ = walk()
    sequence = make_sequence(range(SIZE - 1))
    assert manager.reserve(sequence, SIZE - 1) == []
    sequence.num_computed = SIZE - 1
    sequence.pending = 1
    assert sequence.length == SIZE
    assert manager.reserve(sequence, 1) == []
    sequence.num_computed = SIZE
    manager.register(sequence)
    assert manager._known == {}
    sequence.append(9)
    assert (sequence.length, sequence.pending) == (SIZE, 0)
    manager.register(sequence)
    assert [tokens for _, tokens in manager._known] == [(*range(SIZE - 1), 9)]


def test_nobody_looks_for_a_prefix_with_a_token_pending(walk: Walk, make_sequence: MakeSequence) -> None:
    manager, _ = walk()
    sequence = make_sequence(range(9))
    sequence.pending = 1
    with pytest.raises(AssertionError):
        manager.share_prefix(sequence)


# --- encoders' inputs -------------------------------------------------------------------------------------------------


def encoded(manager: BlockManager, prompt: tuple[int, ...], output: int = 0, salt: str = "") -> Sequence | None:
    """A decoder's sequence whose encoder read the prompt, with so many tokens more than its first; None: no room."""
    sequence = salted(prompt, salt, start=(0,))
    sequence.token_ids += [9] * output
    given = sequence.encoder_input
    assert given is not None
    if not manager.hold_input(sequence):
        return None
    manager.share_prefix(sequence)
    if not given.is_computed:
        given.is_computed = True
        manager.register_input(given)
    count = len(sequence.token_ids) - sequence.num_computed
    if manager.reserve(sequence, count) is None:
        manager.free(sequence)
        return None
    sequence.num_computed += count
    manager.register(sequence)
    return sequence


def of_input(sequence: Sequence | None) -> list[int]:
    assert sequence is not None
    assert sequence.encoder_input is not None
    return sequence.encoder_input.block_table


def test_equal_inputs_share_what_the_encoder_left_and_different_ones_nothing() -> None:
    manager, prompt = BlockManager(40, SIZE), tuple(range(10))
    first = encoded(manager, prompt, output=2 * SIZE)
    same, longer, other = (encoded(manager, ids, output=2 * SIZE) for ids in (prompt, (*prompt, 10), prompt[::-1]))
    assert first is not None
    assert of_input(same) == of_input(first)
    assert len({*of_input(first), *of_input(longer), *of_input(other)}) == 3 + 3 + 3
    # the decoders' tokens are equal as well, and depend on the inputs
    assert same is not None
    assert same.block_table[:2] == first.block_table[:2]
    for different in (longer, other):
        assert different is not None
        assert not set(different.block_table) & set(first.block_table)
    for sequence in (first, same, longer, other):
        assert sequence is not None
        manager.free(sequence)
        manager.free(sequence)
    assert manager.num_used == 0


def test_a_decoder_never_finds_the_blocks_of_an_input(make_sequence: MakeSequence) -> None:
    manager = BlockManager(40, SIZE)
    encoded(manager, (0,) * (3 * SIZE))
    plain = make_sequence((0,) * (3 * SIZE))
    manager.share_prefix(plain)
    assert plain.block_table == []


def test_an_input_is_there_until_its_last_holder_goes_and_is_computed_again_where_a_block_is_lost() -> None:
    manager, prompt = BlockManager(6, SIZE), tuple(range(3 * SIZE))
    parent = encoded(manager, prompt)
    assert parent is not None
    child = parent.fork(1)
    manager.fork(parent, child)
    assert manager.hold_input(child)
    manager.free(parent)
    assert of_input(child) != []
    manager.free(child)
    assert manager.num_used == 0
    found = encoded(manager, prompt)
    assert manager.prefix_hits == len(prompt)
    assert found is not None
    manager.free(found)
    # 5 blocks in use are as many as lose the input's last one
    other = encoded(manager, tuple(range(50, 50 + 4 * SIZE)))
    assert other is not None
    assert encoded(manager, prompt) is None
    manager.free(other)
    again = encoded(manager, prompt)
    assert len(set(of_input(again))) == 3
    assert manager.prefix_hits == len(prompt)


def test_an_input_without_room_changes_nothing() -> None:
    manager = BlockManager(2, SIZE, enable_prefix_caching=False)
    assert encoded(manager, tuple(range(3 * SIZE))) is None
    assert encoded(manager, tuple(range(2 * SIZE))) is None
    assert manager.num_used == 0


@pytest.mark.parametrize("caching", [True, False])
def test_blocks_before_the_window_go_back(caching: bool) -> None:
    manager = BlockManager(60, SIZE, window=10, enable_prefix_caching=caching)
    sequence = salted(range(200), "")
    for computed in (0, 63, 73, 74, 137, 138, 200):
        assert manager.reserve(sequence, computed - sequence.num_computed) == []
        sequence.num_computed = computed
        manager.register(sequence)
        manager.release_unseen(sequence)
        assert len(sequence.block_table) == -(-computed // SIZE)
        assert sequence.num_released == max(0, computed - 10) // 64 * 64 // SIZE
        assert manager.num_used == len(sequence.block_table) - sequence.num_released
    other = salted(range(150), "")
    manager.share_prefix(other)
    assert other.num_computed == (148 if caching else 0)  # what was let go is known until it is handed out anew
    for each in (sequence, other):
        manager.free(each)
    assert (manager.num_used, sequence.num_released) == (0, 0)


def test_blocks_that_are_not_known_yet_stay() -> None:
    manager = BlockManager(60, SIZE, window=10)
    sequence = salted(range(200), "")
    manager.reserve(sequence, 200)
    sequence.num_computed = 200
    manager.release_unseen(sequence)
    assert sequence.num_released == 0
