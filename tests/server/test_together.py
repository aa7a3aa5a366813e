"""Tasks that begin and end together, however many they are."""

import asyncio
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any

import pytest
from tests.server.turns import Turns

from hasten.server.together import TASKS_PER_TURN, running, together, whenever

MANY = 10 * TASKS_PER_TURN


async def at_once(turns: Turns) -> None:
    turns.count()


async def forever(ended: Callable[[], None]) -> None:
    try:
        await asyncio.Event().wait()
    finally:
        ended()


async def careful(ended: Callable[[], None]) -> None:
    try:
        await asyncio.Event().wait()
    finally:
        await asyncio.sleep(0)  # a second cancellation would end this
        ended()


async def failing() -> None:
    raise ValueError("no")


def test_few_of_many_begin_in_one_turn_of_the_event_loop() -> None:
    async def check() -> None:
        turns = Turns()
        await together([at_once(turns) for _ in range(MANY)])
        turns.close()
        assert turns.most == TASKS_PER_TURN

    asyncio.run(check())


def test_few_of_many_are_cancelled_in_one_turn_the_last_ones_first() -> None:
    async def check() -> None:
        turns, order = Turns(), list[int]()

        def ended(number: int) -> None:
            turns.count()
            order.append(number)

        async with running([forever(partial(ended, number)) for number in range(MANY)]) as tasks:
            await asyncio.sleep(0)
            assert not any(task.done() for task in tasks)
        turns.close()
        assert turns.most == TASKS_PER_TURN
        assert order == list(reversed(range(MANY)))

    asyncio.run(check())


def test_an_error_ends_the_others_and_keeps_those_to_come_from_beginning() -> None:
    async def check() -> None:
        begun = 0

        async def count() -> None:
            nonlocal begun
            begun += 1
            await asyncio.Event().wait()

        parts: list[Coroutine[Any, Any, None]] = [failing(), *(count() for _ in range(MANY))]
        with pytest.raises(ValueError, match="no"):
            await together(parts)
        assert begun == TASKS_PER_TURN - 1
        assert len(asyncio.all_tasks()) == 1

    asyncio.run(check())


def test_a_caller_that_is_cancelled_cancels_each_of_its_tasks_once() -> None:
    async def check() -> None:
        ends: list[int] = []
        parts = [careful(lambda: ends.append(1)) for _ in range(MANY)]
        caller = asyncio.create_task(together(parts))
        while len(asyncio.all_tasks()) < MANY + 2:
            await asyncio.sleep(0)
        caller.cancel()
        with pytest.raises(asyncio.CancelledError):
            await caller
        assert len(ends) == MANY

    asyncio.run(check())


def test_changes_that_come_while_the_caller_is_busy_are_one() -> None:
    async def check() -> None:
        changed, go = asyncio.Event(), asyncio.Event()

        async def work() -> None:
            for _ in range(3):
                changed.set()
            await go.wait()

        moments = []
        async for done in whenever(changed, work()):
            moments.append(done)
            go.set()
        assert moments == [False, True]

    asyncio.run(check())
