"""The process that owns a job or a server.

Each job and server has its own, which outlives the terminal. It holds the lock of the record's folder, handed over by
the command that made the folder, starts the instances, and alone writes the record.
"""

import os
import signal
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from hasten.cluster.local.children import Child, Children, ShutdownRequested
from hasten.cluster.local.environment import instance_environment
from hasten.cluster.local.gpus import GpuQueue, Wait, devices
from hasten.cluster.local.launch import Launch
from hasten.cluster.local.mounts import mount_command
from hasten.cluster.local.processes import MARK, lives, start_of
from hasten.cluster.local.settle import settle
from hasten.cluster.local.state import Folder, InstanceState
from hasten.core.errors import ConfigError

ERRORS = "supervisor.log"
_FIRST_PAUSE_S, _LONGEST_PAUSE_S, _DOUBLINGS = 0.5, 60.0, 10
_ROOM_S = 1.0
"""How often a record is tried that could not be written."""
_START = '"$@" &'
"""The shell ends at once, so that the supervisor is nobody's child."""


def back_off(failures: int) -> float:
    """Seconds until the next start after a number of failures: longer and longer, up to a minute."""
    return min(_LONGEST_PAUSE_S, _FIRST_PAUSE_S * 2.0 ** min(failures, _DOUBLINGS))


def start(folder: Folder, lock: int) -> None:
    """Start the supervisor of a folder, and hand it the lock that this process holds."""
    command = [sys.executable, "-P", "-m", "hasten.cluster.local", str(folder.path), str(lock)]
    environment = {name: value for name, value in os.environ.items() if name != MARK}
    try:
        with (folder.path / ERRORS).open("ab") as errors:
            subprocess.run(
                ["/bin/sh", "-c", _START, "sh", *command],
                stdin=subprocess.DEVNULL,
                stdout=errors,
                stderr=errors,
                cwd="/",
                env=environment,
                pass_fds=[lock],
                start_new_session=True,
                check=True,
            )
    finally:
        os.close(lock)


def signal_supervisor(folder: Folder, kind: signal.Signals) -> bool:
    """Send a signal to the supervisor that a record names, if it lives."""
    state = folder.state()
    if state.pid is None or not lives(state.pid, state.start):
        return False
    try:
        os.kill(state.pid, kind)
    except ProcessLookupError:  # it has just ended
        return False
    return True


class Supervisor(ABC):
    """What supervisors of jobs and of servers share."""

    kind = "job"

    def __init__(self, folder: Folder) -> None:
        self.folder = folder
        self.state = folder.state()
        self.children = Children(folder, self.state.uid)
        self.gpus = GpuQueue(folder.home, settle)
        self.devices = devices()
        self._unsaved = False

    def run(self) -> None:
        """Do all of it. Whatever fails in here leaves no process behind; the next command that looks tells the end."""
        try:
            self._run()
        except Exception:
            self.children.end(self.children.running, 0.0)
            raise

    def _run(self) -> None:
        self.state.pid, self.state.start = os.getpid(), start_of(os.getpid())
        self.save()
        try:
            # looked for once the process id is written: whoever left it there before that could send no signal
            self._wait_for_room()
            if self.folder.end_mark.exists():
                raise ShutdownRequested
            self.work()
        except ShutdownRequested:
            self.end_all()
        self.conclude()
        with suppress(ShutdownRequested):
            self._wait_for_room()

    def _wait_for_room(self) -> None:
        """Until the record is written, or is to be deleted."""
        while self._unsaved and not self.folder.end_mark.exists():
            self.turn(_ROOM_S)

    def conclude(self) -> None:
        """Give all back, and say that nothing will change any more."""
        self.give_gpus_back()
        self.state.done = True
        self.save()

    def give_gpus_back(self) -> None:
        """Let others have them: nothing of this runs any more."""
        for ticket in self.gpus.of(self.folder):
            self.gpus.give_back(ticket)

    @abstractmethod
    def work(self) -> None:
        """What is to be done until it ends by itself."""

    @abstractmethod
    def end_all(self) -> None:
        """End what runs, because somebody asked."""

    def save(self) -> None:
        """Write the record; on a full disk `turn` does it, as soon as there is room."""
        try:
            self.folder.write_state(self.state)
        except ConfigError as error:
            if not self._unsaved:
                why = error.__cause__.strerror if isinstance(error.__cause__, OSError) else error
                self.note("Unwritable", f"the record could not be written: {why}", warning=True)
            self._unsaved = True
        else:
            self._unsaved = False

    def turn(self, seconds: float) -> None:
        """Wait at most that long for what happens to the children; ShutdownRequested if this supervisor is to end."""
        if self._unsaved:
            self.save()
        self.children.turn(min(seconds, _ROOM_S) if self._unsaved else seconds)

    def note(self, reason: str, message: str, instance: str | None = None, *, warning: bool = False) -> None:
        """Add an event; it is written with the next `save`."""
        source = f"{self.kind}/{self.folder.name}" if instance is None else f"instance/{instance}"
        self.state.event(reason, message, source, warning=warning)

    def draw(self, count: int, label: str) -> Path | Wait:
        """A ticket for GPUs, or why there is none yet, as on a full disk."""
        try:
            return self.gpus.draw(self.folder, count, label)
        except ConfigError as error:
            return Wait(str(error), 0)

    def take(self, ticket: Path) -> list[str] | Wait:
        """GPUs for a ticket, or why there are none yet: on a full disk nobody can be noted as their owner."""
        try:
            return self.gpus.take(ticket, self.devices)
        except ConfigError as error:
            return Wait(str(error), 0)

    def launch(
        self, instance: InstanceState, launch: Launch, command: list[str], env: Mapping[str, str]
    ) -> Child | str:
        """Start an instance and note that in the record; or why it cannot be started."""
        whole = instance_environment({**env, **launch.env}, self.children.mark(instance.name), instance.devices)
        folder = launch.working_dir
        if launch.mounts:
            command, folder = mount_command(command, launch.mounts, folder), "/"
        try:
            child = self.children.start(instance.name, command, whole, folder)
        except (OSError, ValueError) as error:
            return f"{instance.name} could not be started: {error}"
        instance.pid, instance.start = child.pid, child.start
        instance.status, instance.reason, instance.ended = "RUNNING", None, None
        self.state.started = self.state.started or time.time()
        return child
