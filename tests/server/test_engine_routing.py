"""Which of several engines gets a request, and what becomes of requests whose engine dies: without any process."""

import pytest

from hasten.engine.stats import EngineStats
from hasten.server.engine.assigned import PrefixTable, prefixes_of
from hasten.server.engine.queue import QueueFullError, QueueLimits, RequestQueue
from hasten.server.engine.ticket import Ticket
from hasten.server.engine.wire import Step

BLOCK = 16


def ticket(
    number: int,
    tokens: int = BLOCK,
    *,
    text: int | None = None,
    width: int = 1,
    priority: int = 0,
    output: int | None = None,
) -> Ticket:
    """A request of so many tokens; those with the same `text` begin alike. Without an `output` it may end earlier."""
    prompt = tuple(
        range(1000 * (number if text is None else -text), 1000 * (number if text is None else -text) + tokens)
    )
    most, may_stop, prefixes = output or 256, output is None, prefixes_of(prompt, BLOCK)
    return Ticket(number, prompt, width, bytearray(10), priority, most, may_stop, prefixes=prefixes)


def queue(engines: int, places: int = 8, **limits: int) -> RequestQueue:
    result = RequestQueue(QueueLimits(**limits), engines)
    for engine in result.engines:
        engine.attach(places, 1000, BLOCK)
    return result


def put(requests: RequestQueue, *tickets: Ticket) -> list[int]:
    """The engines that requests go to, which come one after the other."""
    return [engine for each in tickets for engine in _put(requests, each)]


def _put(requests: RequestQueue, each: Ticket) -> list[int]:
    requests.put(each)
    return assigned(requests)


def assigned(requests: RequestQueue) -> list[int]:
    return [each.engine.index for each in requests.assign_next() if each.engine is not None]


def begin(each: Ticket, *, waiting: int = 0) -> None:
    assert each.engine is not None
    each.engine.observe(Step(EngineStats(running=1, waiting=waiting, steps=1), started={each.number: 0.0}), 0.0)


def test_a_prefix_is_all_tokens_of_whole_blocks_but_the_last_token() -> None:
    prompt = tuple(range(40))
    first, second = prefixes_of(prompt, BLOCK)
    assert prefixes_of(prompt[:33], BLOCK) == (first, second)
    assert prefixes_of(prompt[:32], BLOCK) == (first,)
    assert prefixes_of(prompt[:16], BLOCK) == ()
    assert prefixes_of((7, *prompt[1:]), BLOCK)[1] != second, "the same block after another one"
    assert len(prefixes_of(tuple(range(100_000)), BLOCK)) == 1024
    salted = prefixes_of(prompt, BLOCK, "a")
    assert len({first, second, *salted, *prefixes_of(prompt, BLOCK, "b")}) == 6
    assert salted == prefixes_of(prompt, BLOCK, "a")


def test_a_table_forgets_what_was_used_longest_ago_and_ends_before_beginnings() -> None:
    table = PrefixTable()
    table.reset(3, BLOCK)
    table.add((1, 2, 3))
    assert table.cached_tokens((1, 2, 3)) == 3 * BLOCK
    assert table.cached_tokens((1, 9)) == BLOCK
    assert table.cached_tokens((9, 2)) == 0
    table.add((7,))
    assert table.cached_tokens((1, 2, 3)) == 2 * BLOCK
    table.reset(3, BLOCK)
    assert table.cached_tokens((1,)) == 0


def test_equal_engines_take_turns() -> None:
    requests = queue(3)
    assert put(requests, *map(ticket, range(6))) == [0, 1, 2, 0, 1, 2]


def test_an_idle_server_spreads_what_it_caches() -> None:
    requests = queue(2)
    for number in range(4):
        each = ticket(number, 100)
        assert put(requests, each) == [number % 2]
        requests.remove(each)


def test_a_cached_prefix_decides_until_its_engine_is_further_behind_than_it_saves() -> None:
    requests = queue(2, places=64)
    first = ticket(0, 480)
    assert put(requests, first) == [0]
    requests.remove(first)
    same = [ticket(number, 480, text=0) for number in range(1, 20)]
    # one in flight counts as 64 tokens and the 16 of it that are not cached: six are more than the 464 that are
    assert put(requests, *same[:7]) == [0] * 6 + [1]
    assert set(put(requests, *same[7:])) == {0, 1}, "both have it by now"
    loads = [engine.sequences for engine in requests.engines]
    assert abs(loads[0] - loads[1]) <= 8


def test_the_longest_prefix_wins() -> None:
    requests = queue(2)
    short, long = ticket(0, 33, text=1), ticket(1, 200, text=1)
    requests.engines[1].assign(long)
    requests.engines[0].assign(short)
    for each in (short, long):
        requests.remove(each)
    assert put(requests, ticket(2, 300, text=1)) == [1]


def test_prompts_that_wait_to_be_computed_count_with_their_tokens() -> None:
    requests = queue(2)
    long = ticket(0, 1000)
    assert put(requests, long, ticket(1), ticket(2), ticket(3)) == [0, 1, 1, 1]
    begin(long)
    assert requests.engines[0].tokens_ahead == 0
    assert put(requests, ticket(4)) == [0]


def test_outputs_whose_length_is_known_count_with_it() -> None:
    requests = queue(2)
    long, short = ticket(0, output=60), [ticket(number, output=5) for number in range(1, 7)]
    assert put(requests, long, *short) == [0, *(1,) * 6]
    assert [engine.tokens_to_come for engine in requests.engines] == [240, 120]
    assert put(requests, ticket(7), ticket(8)) == [1, 0]
    requests.engines[0].set_compiling(long, True)
    assert requests.engines[0].tokens_to_come == 64
    requests.remove(long)
    assert [engine.tokens_to_come for engine in requests.engines] == [64, 184]


def test_nobody_waits_while_an_engine_has_a_place() -> None:
    requests = queue(2, places=2)
    first = ticket(0, 2000)
    assert put(requests, first) == [0]
    begin(first)
    assert put(requests, ticket(1, 2000, text=0), ticket(2, 2000, text=0)) == [0, 1]
    assert put(requests, ticket(3, 2000, text=0)) == [1]
    assert sorted(put(requests, ticket(4), ticket(5), ticket(6))) == [0, 1]  # one more each waits in the engine
    assert requests.num_waiting == 1
    requests.remove(first)
    assert assigned(requests) == [0]


def test_limits_are_those_of_all_engines_together() -> None:
    requests = queue(2, places=1, max_queue_size=3)
    assert len(put(requests, *map(ticket, range(4)))) == 4  # two run, two are ahead in the engines
    put(requests, ticket(4))
    with pytest.raises(QueueFullError, match="3 requests wait already"):
        requests.put(ticket(5))


def test_the_engine_that_has_a_request_loses_it() -> None:
    requests = queue(2)
    tickets = [ticket(number) for number in range(4)]
    where = put(requests, *tickets)
    for each, index in zip(tickets, where, strict=True):
        engine = requests.remove(each)
        assert engine is requests.engines[index]
        assert requests.remove(each) is None
    assert requests.is_empty
    assert [(e.sequences, e.tokens_ahead, e.tokens_to_come) for e in requests.engines] == [(0, 0, 0), (0, 0, 0)]


def test_what_a_dead_engine_had_not_begun_goes_to_another_one_at_its_old_turn() -> None:
    requests = queue(2, places=2)
    tickets = [ticket(number) for number in range(8)]
    where = put(requests, *tickets)
    assert where == [0, 1, 0, 1, 0, 1]
    begin(tickets[0], waiting=1)
    lost = requests.engines[0].detach()
    assert [(each.number, each.may_move) for each in lost] == [(0, False), (2, True), (4, True)]
    for each in lost[1:]:
        requests.put_back(each)
    assert assigned(requests) == [], "the other one is full"
    for each in (tickets[1], tickets[3], tickets[5]):
        requests.remove(each)
    order = [each.number for each in requests.assign_next()]
    assert order == [2, 4, 6]
    assert not tickets[2].may_move, "it may have been what the engine died of"
    requests.engines[0].attach(2, 1000, BLOCK)
    assert assigned(requests) == [0]
    assert requests.engines[0].prefixes.cached_tokens(tickets[0].prefixes) == 0


def test_an_engine_that_stands_still_gets_nothing_while_another_one_computes() -> None:
    requests = queue(2)
    requests.engines[0].stalled = True
    assert put(requests, ticket(0), ticket(1)) == [1, 1]
    requests.engines[1].stalled = True
    assert put(requests, ticket(2)) == [0]


def test_the_wait_is_the_shortest_of_engines_that_share_who_waits() -> None:
    def seconds(engines: int, waiting: int) -> float:
        requests = queue(engines, places=1)
        running = [Ticket(number, (1,), 1, bytearray(), 0, 100) for number in range(engines)]
        put(requests, *running)
        for steps in range(40):
            for each in running:
                assert each.engine is not None
                step = Step(EngineStats(running=1, steps=steps), started={each.number: 0.0} if steps == 0 else {})
                each.engine.observe(step, steps * 0.01)
        for number in range(engines, engines + waiting):
            requests.put(Ticket(number, (1,), 1, bytearray(), 0, 100))
            assigned(requests)
        wait = requests.estimated_wait()
        assert wait is not None
        return wait

    assert seconds(1, 4) == pytest.approx(4.6, abs=0.1)
    assert seconds(2, 8) == pytest.approx(seconds(1, 4), abs=0.1)
    assert seconds(4, 8) == pytest.approx(seconds(1, 2), abs=0.1)
