"""Ends a job or server, and removes everything created for it."""

import os
import signal
import time

from hasten.cluster.local.settle import elsewhere, settle_owned
from hasten.cluster.local.state import Folder
from hasten.cluster.local.supervisor import signal_supervisor
from hasten.core.errors import ClusterError, NotFoundError

_SLACK_S = 10.0
"""How long a supervisor may take above the grace of its instances before it is taken for dead."""
_LOOK_S = 0.02


def end_and_remove(folder: Folder, grace: float) -> None:
    """Have its supervisor end it, or do that where the supervisor does not; then delete its folder.

    Returns when nothing of it is left. Where two delete the same, both succeed.
    """
    if elsewhere(state := folder.state()) and not state.done:
        raise ClusterError(
            f"{folder.name} runs on {state.host}: delete it there, or move {folder.path} elsewhere if that machine is "
            "gone"
        )
    try:
        lock = _own(folder, grace)
    except (NotFoundError, FileNotFoundError):
        return
    try:
        settle_owned(folder)
        folder.remove()
    finally:
        os.close(lock)


def _own(folder: Folder, grace: float) -> int:
    folder.mark_end()
    deadline = time.monotonic() + grace + _SLACK_S
    signalled = False
    while (lock := folder.try_lock()) is None:
        if time.monotonic() > deadline:
            signal_supervisor(folder, signal.SIGKILL)
        elif not signalled:
            signalled = signal_supervisor(folder, signal.SIGTERM)
        time.sleep(_LOOK_S)
    return lock
