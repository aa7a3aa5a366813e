"""Times of watched blocks, by a clock that the tests set, of a real block manager."""

import pytest

from hasten.core.types import Request
from hasten.engine.block_manager import BlockManager
from hasten.engine.block_watch import BlockTimes, BlockWatch
from hasten.engine.sequence import Sequence

SIZE = 4


class Watched:
    """A block manager all of whose blocks are watched."""

    def __init__(self, blocks: int, *, caching: bool = True) -> None:
        self.now = 0.0
        self.manager = BlockManager(blocks, SIZE, enable_prefix_caching=caching)
        self.watch = self.manager.watch = BlockWatch(1, clock=lambda: self.now)

    def compute(self, *tokens: int) -> Sequence:
        """A sequence that has found and computed all its tokens but the last."""
        sequence = Sequence(Request(request_id="r", prompt_token_ids=tokens), 0)
        self.manager.share_prefix(sequence)
        count = len(tokens) - 1 - sequence.num_computed
        assert self.manager.reserve(sequence, count) == []
        sequence.num_computed += count
        self.manager.register(sequence)
        return sequence

    def after(self, seconds: float, sequence: Sequence) -> None:
        """Time passes, and a sequence ends."""
        self.now += seconds
        self.manager.free(sequence)


def test_a_known_block_lives_until_it_is_handed_out_anew() -> None:
    watched = Watched(1)
    watched.after(3.0, watched.compute(1, 2, 3, 4, 5))
    assert watched.watch.take() is None
    watched.now += 2.0
    watched.after(1.0, watched.compute(1, 2, 3, 4, 6))
    watched.now += 4.0
    watched.compute(7, 7, 7, 7, 7)
    assert watched.watch.take() == BlockTimes(lifetimes=[10.0], idle=[4.0], reuse_gaps=[5.0])
    assert watched.watch.take() is None


def test_a_block_that_two_hold_is_idle_once_both_are_gone() -> None:
    watched = Watched(2)
    first = watched.compute(1, 2, 3, 4, 5)
    watched.now = 1.0
    second = watched.compute(1, 2, 3, 4, 6)
    watched.after(1.0, first)
    watched.after(1.0, second)
    watched.now = 8.0
    watched.compute(*range(20, 29))
    assert watched.watch.take() == BlockTimes(lifetimes=[8.0], idle=[5.0], reuse_gaps=[1.0])


@pytest.mark.parametrize("caching", [True, False])
def test_a_block_with_nothing_to_keep_lives_until_it_is_let_go(caching: bool) -> None:
    watched = Watched(2, caching=caching)
    watched.after(2.0, watched.compute(1, 2, 3))
    watched.now = 9.0
    watched.compute(1, 2, 3)
    assert watched.watch.take() == BlockTimes(lifetimes=[2.0])


def test_a_cache_that_is_emptied_says_nothing_of_what_it_held() -> None:
    watched = Watched(1)
    watched.after(1.0, watched.compute(1, 2, 3, 4, 5))
    watched.manager.forget_prefixes()
    watched.after(1.0, watched.compute(7, 7, 7, 7, 7))
    assert watched.watch.take() is None
    watched.compute(8, 8, 8, 8, 8)
    assert watched.watch.take() == BlockTimes(lifetimes=[1.0], idle=[0.0])


@pytest.mark.parametrize("each", [16, 64, 100])
def test_blocks_at_every_place_of_equal_requests_are_watched(each: int) -> None:
    watch, taken = BlockWatch(64), [0] * each
    for number in range(2000 * each):
        watch.taken(number)
        if number in watch._watched:
            taken[number % each] += 1
    assert sum(taken) / (2000 * each) == pytest.approx(1 / 64, rel=0.1)
    assert min(taken) > 0
