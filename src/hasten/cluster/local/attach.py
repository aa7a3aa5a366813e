"""A command beside an instance: its environment, folder and mounts, on this terminal."""

import os
import signal
import subprocess
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from hasten.cluster.local.launch import Launch
from hasten.cluster.local.mounts import mount_command
from hasten.cluster.local.processes import environment_of, lives
from hasten.cluster.local.state import InstanceState
from hasten.core.errors import ClusterError

_BY_SIGNAL = 128
_TERMINAL = ("TERM", "COLORTERM", "COLUMNS", "LINES")
"""What the terminal says of itself: this one is not the one that the job was submitted from."""


def attach(instance: InstanceState, launch: Launch, command: Sequence[str]) -> int:
    """Run a command until it ends; returns its exit status. ClusterError where the instance does not run.

    What it starts is marked as the instance's, and ends with it.
    """
    if instance.pid is None or not lives(instance.pid, instance.start):
        raise ClusterError(f"{instance.name} does not run ({instance.reason or instance.status.lower()})")
    try:
        env = environment_of(instance.pid) | {name: os.environ[name] for name in _TERMINAL if name in os.environ}
    except OSError as error:
        raise ClusterError(f"the environment of {instance.name} cannot be read: {error.strerror}") from error
    whole, folder = list(command), launch.working_dir
    if launch.mounts:
        whole, folder = mount_command(command, launch.mounts, folder), "/"
    with _interrupts_are_the_commands():
        try:
            status = subprocess.run(whole, env=env, cwd=folder, check=False).returncode
        except OSError as error:
            raise ClusterError(f"cannot run {command[0]}: {error.strerror}") from error
    return status if status >= 0 else _BY_SIGNAL - status


@contextmanager
def _interrupts_are_the_commands() -> Iterator[None]:
    """Ctrl-C goes to the command, which shares the terminal; here it changes nothing."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    # a handler, for an ignored signal would be ignored by the command too
    before = signal.signal(signal.SIGINT, lambda *_: None)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
