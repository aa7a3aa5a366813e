"""Ranks of another host than rank 0's, whose run ends."""

import logging
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

import pytest

from hasten.core.config import EngineConfig
from hasten.core.errors import RankError
from hasten.parallel.rank import RankInfo
from hasten.server import follower
from hasten.server.options import ServeOptions

HANDLER = "import signal; print(signal.getsignal(signal.SIGTERM) is signal.SIG_IGN)"


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Callable[[], None]]]:
    """What happens while the ranks of each run compute, in the order of the runs."""
    left: list[Callable[[], None]] = []
    inherited: list[bytes] = []

    def run_node(
        _config: EngineConfig,
        _info: RankInfo,
        *,
        starting: Callable[[], AbstractContextManager[None]],
        running: Callable[[], AbstractContextManager[None]],
    ) -> None:
        with starting():
            inherited.append(subprocess.run([sys.executable, "-c", HANDLER], capture_output=True, check=True).stdout)
            with running():
                left.pop(0)()

    info = RankInfo(1, 2, 1, "pod-0.svc", 77, starts_node=True)
    monkeypatch.setattr("hasten.engine.launch.launched_rank", lambda _config: info)
    monkeypatch.setattr("hasten.engine.launch.run_node", run_node)
    before = signal.getsignal(signal.SIGTERM)
    yield left
    assert not left
    assert set(inherited) == {b"True\n"}
    assert signal.getsignal(signal.SIGTERM) is before


def dies() -> None:
    raise RankError("rank 0 died")


def is_signalled_and_dies() -> None:
    os.kill(os.getpid(), signal.SIGTERM)
    dies()


def is_signalled_and_ends() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def followed() -> int:
    return follower.follow(ServeOptions(engine=EngineConfig(model="model")))


def test_a_run_that_died_is_waited_for(runs: list[Callable[[], None]], caplog: pytest.LogCaptureFixture) -> None:
    runs += [dies, is_signalled_and_ends]
    with caplog.at_level(logging.ERROR, "hasten"):
        assert followed() == 0
    assert [record.getMessage() for record in caplog.records] == ["rank 0 died; waiting for rank 0 to start again"]


def test_a_host_that_was_signalled_to_end_waits_for_no_other_run(
    runs: list[Callable[[], None]], caplog: pytest.LogCaptureFixture
) -> None:
    runs += [is_signalled_and_dies]
    with caplog.at_level(logging.ERROR, "hasten"):
        assert followed() == 1
    (record,) = caplog.records
    assert record.getMessage() == "rank 0 died; this host was signalled to end and does not wait for rank 0"
