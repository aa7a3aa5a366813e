"""What a step is made of."""

import random

from hasten.engine.batch import Batch


def test_copies_are_done_together_unless_one_overwrites_what_another_reads() -> None:
    assert Batch().copy_rounds() == []
    assert Batch(copies=[(1, 4), (1, 5), (2, 6)]).copy_rounds() == [[(1, 4), (1, 5), (2, 6)]]
    assert Batch(copies=[(1, 4), (2, 1), (3, 5)]).copy_rounds() == [[(1, 4)], [(2, 1), (3, 5)]]
    assert Batch(copies=[(1, 4), (2, 1), (3, 2)]).copy_rounds() == [[(1, 4)], [(2, 1)], [(3, 2)]]


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
        rounds = Batch(copies=copies).copy_rounds()
        several += len(rounds) > 1
        for each in rounds:
            for source, target in rng.sample(each, len(each)):
                in_rounds[target] = in_rounds[source]
        assert in_rounds == one_by_one
    assert several > 20
