"""Signals that end a command which has something to clean up."""

import os
import signal
import threading
from collections.abc import Iterator

import pytest

from hasten.cli import demo
from hasten.cli.interrupts import TerminatedError, cleaned_up_when_terminated
from hasten.cli.main import main


@pytest.fixture(autouse=True)
def defaults() -> Iterator[None]:
    """Handlers as a command finds them: Ray, for one, leaves one of its own for SIGTERM in this process."""
    before = {number: signal.signal(number, signal.SIG_DFL) for number in (signal.SIGTERM, signal.SIGHUP)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_is_an_exception_once(number: signal.Signals) -> None:
    def end_twice() -> None:
        try:
            os.kill(os.getpid(), number)
        finally:
            os.kill(os.getpid(), number)  # while it is cleaned up
            cleaned.append(number)

    cleaned: list[int] = []
    with pytest.raises(TerminatedError) as caught, cleaned_up_when_terminated():
        end_twice()
    assert cleaned == [number]
    assert caught.value.status == 128 + number
    assert signal.getsignal(number) is signal.SIG_DFL


def test_what_is_ignored_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with cleaned_up_when_terminated():
            os.kill(os.getpid(), signal.SIGHUP)
            assert signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_off_the_main_thread_signals_stay_as_they_are() -> None:
    seen = []

    def run() -> None:
        with cleaned_up_when_terminated():
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert seen == [signal.SIG_DFL]


def test_a_demo_that_is_terminated_takes_its_server_with_it(
    tmp_path: object, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    servers = []

    class Server:
        returncode = None

        def __init__(self, command: list[str]) -> None:
            servers.append(self)
            self.killed = self.waited = False

        def poll(self) -> None: ...

        def kill(self) -> None:
            self.killed = True

        def wait(self) -> None:
            self.waited = True

    monkeypatch.setattr(demo, "_steps", lambda *_: [])
    monkeypatch.setattr("subprocess.Popen", Server)
    monkeypatch.setattr("hasten.bench.served.wait_until_ready", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    assert main(["demo", "--no-report", "--output-dir", str(tmp_path)]) == 143
    assert [(server.killed, server.waited) for server in servers] == [(True, True)]
    assert capsys.readouterr().err == "hasten: terminated\n"
