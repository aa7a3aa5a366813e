"""Stages that write each other's memory, as threads: a rank waits where a GPU would, for the same counts."""

import random
import time
from collections.abc import Callable
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from functools import partial

import pytest
import torch
from tests.waiting import LIMIT_S
from torch import Tensor

from hasten.parallel.peer_ring import PeerRing, RingMemory
from hasten.parallel.pipeline import StageLink

WIDTH, MOST_TOKENS = 24, 5


def links(stages: int, slots: int, abort_flag: Tensor) -> list[StageLink]:
    """A link of each stage."""
    nbytes = RingMemory.nbytes(slots, MOST_TOKENS * WIDTH * torch.float32.itemsize)
    memory = [RingMemory.of(torch.zeros(nbytes, dtype=torch.uint8), slots) for _ in range(stages)]
    result = []
    for stage in range(stages):
        ring = PeerRing(memory[stage], memory[stage - 1], memory[(stage + 1) % stages], abort_flag)
        result.append(StageLink(list(range(stages)), stage, ring, ring))
    return result


def run_all(programs: list[Callable[[], None]], abort_flag: Tensor) -> None:
    """Run programs that wait for each other; the error of one that fails."""

    def run(program: Callable[[], None]) -> None:
        try:
            program()
        except BaseException:
            abort_flag.fill_(1)
            raise

    with ThreadPoolExecutor(len(programs)) as threads:
        done = [threads.submit(run, program) for program in programs]
        try:
            ended, _ = wait(done, LIMIT_S, FIRST_EXCEPTION)
        finally:
            abort_flag.fill_(1)
    for future in done:
        future.result()
    assert len(ended) == len(programs), "a program waited for ever"


def pause(rng: random.Random) -> None:
    time.sleep(rng.choice([0, 0, 0.001, 0.003]))


def hidden(step: int) -> Tensor:
    """What the first stage makes of a step; steps have different numbers of tokens."""
    return torch.arange(step, step + (1 + step % MOST_TOKENS) * WIDTH, dtype=torch.float32).view(-1, WIDTH)


@pytest.mark.parametrize("every", [1, 7])
@pytest.mark.parametrize("fast", ["first", "last", "none"])
@pytest.mark.parametrize("stages", [2, 3, 4])
def test_whoever_is_fast_every_message_arrives_whole(stages: int, fast: str, every: int) -> None:
    """Each stage adds one; tokens are the sums of a step's rows, and are chosen in one of `every` steps."""
    steps, abort_flag = 40, torch.zeros(1, dtype=torch.int32)
    chain = links(stages, stages + 1, abort_flag)
    chosen = torch.zeros(stages, MOST_TOKENS)
    seen: dict[int, Tensor] = {}

    def slow(stage: int, rng: random.Random) -> None:
        if not (fast == "first" and stage == 0) and not (fast == "last" and stage == stages - 1):
            pause(rng)

    def first() -> None:
        rng, link = random.Random(0), chain[0]
        link.connect(torch.zeros(1))
        for step in range(steps):
            link.await_tokens(step - stages)  # those of an earlier step are read
            if step >= stages and (step - stages) % every == 0:
                seen[step - stages] = chosen[step % stages, : len(hidden(step - stages))].clone()
            sent = hidden(step)
            slow(0, rng)
            link.send(sent)
            sent.fill_(-1)  # as the next replay of a graph does
            if step % every == 0:
                link.expect_tokens(chosen[step % stages, : len(sent)], step)
        link.await_tokens(steps)

    def behind(stage: int) -> None:
        rng, link = random.Random(stage), chain[stage]
        link.connect(torch.zeros(1))
        incoming = torch.zeros(MOST_TOKENS, WIDTH)
        for step in range(steps):
            right = hidden(step)
            link.receive(incoming[: len(right)])
            slow(stage, rng)
            assert torch.equal(incoming[: len(right)], right + stage - 1)
            if stage < stages - 1:
                link.send(incoming[: len(right)] + 1)
            elif step % every == 0:
                link.return_tokens(incoming[: len(right)].sum(1))

    run_all([first, *(partial(behind, stage) for stage in range(1, stages))], abort_flag)
    assert sorted(seen) == list(range(0, steps - stages, every))
    for step, tokens in seen.items():
        assert torch.equal(tokens, (hidden(step) + stages - 2).sum(1))


def test_a_sender_waits_for_a_slot_and_a_failure_ends_the_wait() -> None:
    abort_flag = torch.zeros(1, dtype=torch.int32)
    first, second = links(2, 3, abort_flag)
    for number in range(3):
        first.send(torch.full((1,), number))
    taken = torch.zeros(1, dtype=torch.int64)
    with ThreadPoolExecutor(1) as thread:
        fourth = thread.submit(first.send, torch.full((1,), 3))
        second.receive(taken)
        assert taken.item() == 0
        fourth.result(timeout=LIMIT_S)
        fifth = thread.submit(first.send, torch.full((1,), 4))
        abort_flag.fill_(1)
        fifth.result(timeout=LIMIT_S)


def test_counts_wrap() -> None:
    first, second = links(2, 3, torch.zeros(1, dtype=torch.int32))
    start = (1 << 31) - 4
    for link in (first, second):
        ring = link.connections[0]
        assert isinstance(ring, PeerRing)
        ring._sent = ring._expected = start
        for count in (ring._own.arrived, ring._own.taken):
            count.fill_(start)
    taken = torch.zeros(1, dtype=torch.int64)
    for number in range(9):
        first.send(torch.full((1,), number))
        second.receive(taken)
        assert taken.item() == number
