"""Child processes of one job or server: captures their output, reaps them, and leaves none behind."""

import os
import selectors
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress

from hasten.cluster.local.logs import LogWriter
from hasten.cluster.local.processes import (
    adopt_orphans,
    kill_all,
    members,
    orphans,
    reap_orphans,
    send,
    start_of,
)
from hasten.cluster.local.state import Folder

_READ = 1 << 16
_LONGEST_WAIT_S = 3600.0
"""The kernel's own limit is some weeks."""
_OUTPUT_DRAIN_S = 1.0
"""How long the output of a process that has ended may still be on its way."""


class ShutdownRequested(Exception):  # noqa: N818 - no error
    """This supervisor was signalled to end what it watches."""


class Child:
    """One instance that runs, or ran."""

    def __init__(self, mark: str, process: "subprocess.Popen[bytes]", output: int, log: LogWriter) -> None:
        self.mark = mark
        self.pid = process.pid
        self.start = start_of(process.pid)
        self.code: int | None = None
        """Its exit code once it has ended; less than 0 is a signal's number."""
        self.process = process
        self.output = output
        self.open = True
        """Whether `output` is to be read."""
        self.log = log

    def members(self) -> list[int]:
        """Its process and all that it started."""
        return members(self.mark, [] if self.start is None else [(self.pid, self.start)])

    def read(self) -> bool:
        """Keep what it wrote; False once there will be no more."""
        data = os.read(self.output, _READ)
        if data:
            self.log.write(data)
        return bool(data)

    def how_it_ended(self) -> str:
        """The end of a sentence about it."""
        lost = f"; {self.log.lost} bytes of its output were lost: {self.log.error}" if self.log.lost else ""
        if self.code is None or self.code >= 0:
            return f"ended with exit code {self.code}{lost}"
        name = signal.Signals(-self.code).name
        return f"was killed by {name}{', as by a lack of memory' if name == 'SIGKILL' else ''}{lost}"


class Children:
    """Starts children and waits for what happens to them, in one thread: a turn takes what there is."""

    def __init__(self, folder: Folder, uid: str) -> None:
        self._folder = folder
        self._uid = uid
        self._selector = selectors.DefaultSelector()
        self._running: list[Child] = []
        self._shutdown_requested = False
        self._looked_for = False
        adopt_orphans()
        self._wake, self._woken = socket.socketpair()
        for end in (self._wake, self._woken):
            end.setblocking(False)
        self._selector.register(self._woken, selectors.EVENT_READ, self._drain)
        signal.set_wakeup_fd(self._wake.fileno(), warn_on_full_buffer=False)
        handlers: dict[signal.Signals, Callable[..., object]] = {
            signal.SIGCHLD: lambda *_: None,
            signal.SIGTERM: self._ask,
            signal.SIGINT: self._ask,
            signal.SIGHUP: self._look,
        }
        for kind, handler in handlers.items():
            signal.signal(kind, handler)

    @property
    def running(self) -> list[Child]:
        """Those that have not ended."""
        return list(self._running)

    def _ask(self, *_: object) -> None:
        self._shutdown_requested = True

    def _look(self, *_: object) -> None:
        self._looked_for = True

    def _drain(self) -> None:
        with suppress(BlockingIOError):
            self._woken.recv(_READ)

    def news(self) -> bool:
        """Whether somebody changed the plan since the last call (SIGHUP)."""
        changed, self._looked_for = self._looked_for, False
        return changed

    def start(self, name: str, command: Sequence[str], env: Mapping[str, str], working_dir: str) -> Child:
        """Start an instance in a session of its own; OSError where its program or folder cannot be had."""
        log = LogWriter(self._folder.logs, name)
        reader, writer = os.pipe()
        try:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=writer,
                stderr=writer,
                env=env,
                cwd=working_dir,
                start_new_session=True,
                preexec_fn=adopt_orphans,
            )
        except BaseException:
            os.close(reader)
            log.close()
            raise
        finally:
            os.close(writer)
        os.set_blocking(reader, False)
        child = Child(self.mark(name), process, reader, log)
        self._selector.register(reader, selectors.EVENT_READ, child)
        self._running.append(child)
        return child

    def mark(self, name: str) -> str:
        """What the environment of an instance has to carry."""
        return f"{self._uid}/{name}"

    def turn(self, seconds: float) -> None:
        """Wait for output, an end or a signal, at most that long; ShutdownRequested if this supervisor is to end."""
        self._turn(seconds)
        if self._shutdown_requested:
            self._shutdown_requested = False
            raise ShutdownRequested

    def _turn(self, seconds: float) -> None:
        for key, _ in self._selector.select(min(max(0.0, seconds), _LONGEST_WAIT_S)):
            if isinstance(key.data, Child):
                self._read(key.data)
            else:
                key.data()
        for child in self.running:
            if child.process.poll() is not None:
                self._reap(child)
        reap_orphans({child.pid for child in self._running})

    def _read(self, child: Child) -> None:
        with suppress(BlockingIOError):
            if not child.read():
                self._close(child)

    def _close(self, child: Child) -> None:
        if child.open:
            child.open = False
            self._selector.unregister(child.output)
            os.close(child.output)
            child.log.close()

    def _reap(self, child: Child) -> None:
        """An instance ends with its first process, as a container does: what that left running is killed."""
        others = {other.pid for other in self._running if other is not child}
        # an instance that runs adopts its own orphans, so those that came here are of instances that have ended
        kill_all(lambda: [*child.members(), *orphans(others)])
        deadline = time.monotonic() + _OUTPUT_DRAIN_S
        with selectors.DefaultSelector() as last:
            if child.open:
                last.register(child.output, selectors.EVENT_READ)
            while child.open and last.select(max(0.0, deadline - time.monotonic())):
                self._read(child)
        self._close(child)
        self._running.remove(child)
        child.code = child.process.returncode

    def wait_for(self, children: Collection[Child], seconds: float) -> None:
        """Give children a time to end by themselves."""
        deadline = time.monotonic() + seconds
        while any(child.code is None for child in children) and time.monotonic() < deadline:
            self._turn(deadline - time.monotonic())

    def end(self, children: Collection[Child], grace: float, *, group: bool = True) -> None:
        """Send SIGTERM, to the process groups or to the first processes alone, and SIGKILL after the grace."""
        for child in children:
            if child.code is None:
                with suppress(ProcessLookupError):
                    (os.killpg if group else os.kill)(child.pid, signal.SIGTERM)
        self.wait_for(children, grace)
        for child in children:
            if child.code is None:
                send(child.members(), signal.SIGKILL)
        while any(child.code is None for child in children):
            self._turn(0.1)
