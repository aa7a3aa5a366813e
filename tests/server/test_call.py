"""Many prompts of one request, however many they are, share the event loop with others."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing

import pytest
from tests.server.turns import Turns

from hasten.server.engine.client import Progress
from hasten.server.openai.call import _merged
from hasten.server.together import TASKS_PER_TURN

MANY = 10 * TASKS_PER_TURN


async def progresses(turns: Turns, go: asyncio.Event) -> AsyncGenerator[Progress, None]:
    turns.count()
    await go.wait()
    yield Progress([], finished=True)


def test_few_prompts_begin_and_one_is_answered_in_a_turn() -> None:
    async def check() -> None:
        begun, answered, go = Turns(), Turns(), asyncio.Event()
        async with aclosing(_merged([progresses(begun, go) for _ in range(MANY)])) as merged:
            reading = asyncio.ensure_future(anext(merged))
            while begun.total < MANY:
                await asyncio.sleep(0)
            go.set()  # all are ready at once
            numbers = {(await reading)[0]}
            async for number, _ in merged:
                answered.count()
                numbers.add(number)
        for turns in (begun, answered):
            turns.close()
        assert numbers == set(range(MANY))
        assert begun.most == TASKS_PER_TURN
        assert answered.most == 1

    asyncio.run(check())


def test_an_error_of_one_prompt_ends_all() -> None:
    async def failing() -> AsyncGenerator[Progress, None]:
        raise ValueError("no")
        yield  # it is a generator

    async def check() -> None:
        turns = Turns()
        merged = _merged([failing(), *(progresses(turns, asyncio.Event()) for _ in range(MANY))])
        with pytest.raises(ValueError, match="no"):
            await anext(merged)
        turns.close()
        assert len(asyncio.all_tasks()) == 1

    asyncio.run(check())
