import fcntl
import os
import pty
import select
import struct
import sys
import termios
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from tests.cluster.kubernetes_fixtures import World, serving, training, world
from tests.waiting import LIMIT_S, eventually

from hasten.core.errors import ClusterError, ConfigError, NotFoundError

__all__ = ["world"]


@pytest.fixture
def running(world: World) -> World:
    """A cluster with a running job."""
    world.backend.submit(training())
    world.run(world.train("convert-bloom"))
    return world


def attach(world: World, *command: str) -> int:
    return world.backend.attach_job("convert-bloom", "default", None, None, list(command))


@contextmanager
def streams(monkeypatch: pytest.MonkeyPatch, typed: int | Path, printed: int | Path) -> Iterator[None]:
    """Standard input and output are these files or descriptors."""
    with open(typed, closefd=False) if isinstance(typed, int) else typed.open() as source:  # noqa: SIM117
        with open(printed, "w", closefd=False) if isinstance(printed, int) else printed.open("w") as sink:
            with monkeypatch.context() as patch:
                patch.setattr(sys, "stdin", source)
                patch.setattr(sys, "stdout", sink)
                yield


@pytest.mark.parametrize("protocol", ["v5.channel.k8s.io", "v4.channel.k8s.io"])
def test_output_errors_and_the_exit_status(
    running: World, protocol: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    running.server.rules.protocols = (protocol,)
    text = "a 'b' \"c\"\n$HOME é"
    with streams(monkeypatch, Path(os.devnull), tmp_path / "out"):
        status = attach(running, "sh", "-c", 'printf %s "$1"; echo oops >&2; exit 7', "sh", text)
    assert status == 7
    assert (tmp_path / "out").read_text() == text
    assert capfd.readouterr().err == "oops\n"


def test_a_command_that_is_no_text(running: World) -> None:
    with pytest.raises(ConfigError, match=r"the command's word 'a\\udcff' is not UTF-8"):
        attach(running, "echo", "a\udcff")


def test_what_is_typed_arrives_and_ends(running: World, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    data = bytes(range(256)) * 2000
    (tmp_path / "in").write_bytes(data)
    with streams(monkeypatch, tmp_path / "in", tmp_path / "out"):
        assert attach(running, "cat") == 0
    assert (tmp_path / "out").read_bytes() == data


class Typist:
    """Sits at a terminal of 133 columns and 41 lines."""

    def __init__(self) -> None:
        self._keys, self.terminal = pty.openpty()
        fcntl.ioctl(self.terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 41, 133, 0, 0))
        self.seen = b""

    def type(self, text: bytes) -> None:
        os.write(self._keys, text)

    def see(self, wanted: bytes) -> None:
        """Wait until this is on the screen."""
        deadline = time.monotonic() + LIMIT_S
        while wanted not in self.seen:
            ready, _, _ = select.select([self._keys], [], [], max(0, deadline - time.monotonic()))
            assert ready, self.seen
            self.seen += os.read(self._keys, 4096)

    def close(self) -> None:
        os.close(self._keys)
        os.close(self.terminal)


def test_an_interactive_terminal(running: World, monkeypatch: pytest.MonkeyPatch) -> None:
    typist = Typist()
    before = termios.tcgetattr(typist.terminal)

    def work() -> None:
        # A program and not the shell's prompt: line editors may hold back an interrupt until the next key.
        typist.type(b'tty; stty size; sh -c \'trap "echo cau""ght; exit" INT; echo re""ady; ')
        typist.type(b"while :; do sleep 0.1; done'\n")
        typist.see(b"ready")
        typist.type(b"\x03")
        typist.see(b"caught")
        typist.type(b"exit 3\n")

    worker = threading.Thread(target=work)
    worker.start()
    with streams(monkeypatch, typist.terminal, typist.terminal):
        assert attach(running) == 3  # without a command: a shell
    worker.join()
    assert b"41 133" in typist.seen
    assert termios.tcgetattr(typist.terminal) == before
    typist.close()


def test_a_connection_that_is_lost(running: World, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    out = tmp_path / "out"

    def drop() -> None:
        eventually(lambda: out.exists() and "started" in out.read_text())
        running.server.drop_connections()

    threading.Thread(target=drop).start()
    lost = "the connection to convert-bloom-master-0 was lost before its command ended"
    with streams(monkeypatch, Path(os.devnull), out), pytest.raises(ClusterError, match=lost):
        attach(running, "sh", "-c", "echo started; exec sleep 60")


def test_a_command_that_cannot_be_started(running: World, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with (
        streams(monkeypatch, Path(os.devnull), tmp_path / "out"),
        pytest.raises(ClusterError, match=r"the command did not run in convert-bloom-master-0: .*no-such-program"),
    ):
        attach(running, "no-such-program")


def test_attach_is_refused_with_a_reason(running: World) -> None:
    with pytest.raises(NotFoundError, match="no instance x"):
        running.backend.attach_job("convert-bloom", "default", "x", None, ["true"])
    running.server.rules.denied.add(("create", "pods/exec"))
    with pytest.raises(ClusterError, match="admin may not create pods/exec in namespace default"):
        attach(running, "true")
    running.backend.serve(serving())
    with pytest.raises(NotFoundError, match="server ft-triton-bloom has no pods"):
        running.backend.attach_server("ft-triton-bloom", None, "default", None, None, ["true"])
