"""Connections between rank 0 and the other ranks: messages, reports, and ends that have a name."""

import json
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from queue import Empty, Queue
from types import SimpleNamespace
from typing import Any

import pytest
from tests.waiting import LIMIT_S, eventually

from hasten.core.errors import ConfigError, EngineError, RankError
from hasten.parallel.control import Hub, Spoke
from hasten.parallel.liveness import Failure, Liveness, failure_of, reported
from hasten.parallel.rank import LOCAL, RankInfo

pytestmark = pytest.mark.any_python

HOST = socket.gethostname()


class Words:
    """A store of this process."""

    def __init__(self) -> None:
        self.written: Queue[bytes] = Queue()

    def set(self, _key: str, value: str) -> None:
        self.written.put(value.encode())

    def get(self, _key: str) -> bytes:
        value = self.written.get(timeout=LIMIT_S)
        self.written.put(value)
        return value


@contextmanager
def connected(size: int) -> Iterator[tuple[list[Any], list[Liveness]]]:
    """Ranks of this process; each must be closed by the end."""
    store, lives = Words(), [Liveness() for _ in range(size)]
    with ThreadPoolExecutor(size) as pool:
        indices = [RankInfo(rank, size, size, LOCAL, 0) for rank in range(size)]
        futures: list[Any] = [pool.submit(Hub, indices[0], store, lives[0], LIMIT_S)]
        futures += [pool.submit(Spoke, index, store, life) for index, life in zip(indices[1:], lives[1:], strict=True)]
        ranks = [future.result(LIMIT_S) for future in futures]
    try:
        yield ranks, lives
    finally:
        for rank, life in zip(ranks, lives, strict=True):
            life.ending = True
            rank.close()


def end(rank: Any, life: Liveness) -> None:
    """What the system does when its process ends."""
    life.ending = True
    rank.close()


def test_messages_arrive_whole_and_in_order() -> None:
    with connected(3) as ((hub, *spokes), lives):
        messages = [b"", b"1", bytes(3_000_000), b"2"]
        with ThreadPoolExecutor(2) as pool:
            received = [pool.submit(lambda spoke: [spoke.receive() for _ in messages], spoke) for spoke in spokes]
            for message in messages:
                hub.publish(message)
            assert [each.result(LIMIT_S) for each in received] == [messages] * 2
        hub.report(None)
        eventually(lambda: all(life.ending for life in lives[1:]))
        assert [life.failure for life in lives] == [None] * 3


def test_a_rank_that_ends_without_a_word_is_named_to_all() -> None:
    with connected(3) as (ranks, lives):
        end(ranks[2], lives[2])
        text = f"rank 2 of 3 on {HOST} died: its connection to rank 0 broke"
        for life in lives[:2]:
            assert life.await_failure(LIMIT_S) == Failure(text)
        with pytest.raises(RuntimeError, match="the connection to rank 0 broke"):
            ranks[1].receive()
        with pytest.raises(RuntimeError, match=r"the connection to rank \d broke"):
            ranks[0].publish(b"1")


def test_a_report_reaches_all_as_the_error_that_it_is() -> None:
    with connected(3) as (ranks, lives):
        ranks[1].report(failure_of("rank 1 of 3 failed", reported(ConfigError("no such option"))))
        end(ranks[1], lives[1])
        for life in (lives[0], lives[2]):
            life.await_failure(LIMIT_S)
            with pytest.raises(ConfigError, match=r"^no such option$"):
                life.raise_failure()


def test_the_end_of_rank_0_is_named() -> None:
    with connected(2) as (ranks, lives):
        end(ranks[0], lives[0])
        lives[1].await_failure(LIMIT_S)
        with pytest.raises(RankError, match=f"rank 0 of 2 on {HOST} died"):
            lives[1].raise_failure()


def test_strangers_are_no_ranks_and_missing_ranks_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    store, failed, late = Words(), Queue[Exception](), threading.Event()
    clock = SimpleNamespace(monotonic=lambda: 1001.0 if late.is_set() else 0.0)
    monkeypatch.setattr("hasten.parallel.control.time", clock)

    def meet() -> None:
        try:
            Hub(RankInfo(0, 3, 3, LOCAL, 0), store, Liveness(), 1000.0)
        except EngineError as error:
            failed.put(error)

    thread = threading.Thread(target=meet)
    thread.start()
    port = json.loads(store.get("control"))[0]
    hello = json.dumps([1, "elsewhere", "watch", "a token"]).encode()
    for sent in (len(hello).to_bytes(4, "big") + hello, b"\0", b"GET / HTTP/1.1\r\n\r\n"):
        with socket.create_connection((LOCAL, port), LIMIT_S) as stranger:
            stranger.sendall(sent)
            with suppress(ConnectionResetError):
                assert stranger.recv(1) == b""
    late.set()
    thread.join(LIMIT_S)
    assert str(failed.get(timeout=LIMIT_S)) == "ranks 1, 2 did not appear within 1000 s"
    with pytest.raises(Empty):
        failed.get_nowait()


def test_what_waits_for_ranks_that_meet_is_left_behind_by_a_failure() -> None:
    life, for_ever = Liveness(), threading.Event()
    assert life.outlive(lambda: 7) == 7
    threading.Timer(0.1, life.fail, (Failure("rank 1 died"),)).start()
    with pytest.raises(RuntimeError, match="a rank died while the ranks met"):
        life.outlive(for_ever.wait)
    for_ever.set()
    with pytest.raises(RankError, match="rank 1 died"), life.guarded():
        raise AssertionError("it must not begin")


def test_the_first_failure_stands() -> None:
    life = Liveness()
    life.fail(Failure("one"))
    life.fail(Failure("other"))
    assert life.failure == Failure("one")
    life = Liveness()
    life.ending = True
    life.fail(Failure("none, as ranks end"))
    assert life.failure is None
    assert Failure.unpacked(Failure("é", ConfigError("x")).packed()).text == "é"
