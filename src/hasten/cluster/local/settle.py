"""Cleans up after a supervisor that died: ends the processes of its job or server, and corrects the record.

The next command that reads the record does this: `list`, `get`, `submit` of a job that needs GPUs, or the supervisor of
one that waits for them. Processes without a supervisor are killed without a grace period: their output is lost.
"""

import logging
import os
import time
from contextlib import suppress

from hasten.cluster.backend import Status
from hasten.cluster.local.processes import boot_id, host_name, kill_all, members
from hasten.cluster.local.state import Folder, State
from hasten.core.errors import ClusterError, ConfigError, NotFoundError

_log = logging.getLogger(__name__)
_ERRORS = "supervisor.log"


def settle(folder: Folder) -> State:
    """The state of a job or server, put right first if nobody owns it; NotFoundError if it is gone."""
    state = folder.state()
    if state.done or elsewhere(state):
        return state
    lock = folder.try_lock()
    if lock is None:
        return state
    try:
        return settle_owned(folder)
    finally:
        os.close(lock)


def settle_owned(folder: Folder) -> State:
    """The same, for who holds the lock."""
    state = folder.state()
    if state.done:
        return state
    killed = _clean_up(state)
    reason = _reason(folder, state)
    for instance in state.instances:
        if not Status(instance.status).ended:
            instance.status, instance.ended, instance.reason = "FAILED", time.time(), reason
            instance.ready = False
    if not Status(state.status).ended:
        state.status, state.ended, state.reason = "FAILED", time.time(), reason
    ended = f"; {killed} of its processes were ended" if killed else ""
    state.event("SupervisorLost", reason + ended, f"folder/{folder.name}", warning=True)
    state.done = True
    try:
        folder.write_state(state)
    except ConfigError as error:  # a full disk: it is reported all the same, can be deleted, and is settled again
        _log.warning("%s", error)
    return state


def elsewhere(state: State) -> bool:
    """Whether it runs on another machine that shares this home: that one alone knows how it does."""
    return state.host != host_name()


def _clean_up(state: State) -> int:
    if state.boot != boot_id():
        return 0
    leaders = [(each.pid, each.start) for each in state.instances if each.pid is not None and each.start is not None]

    def find() -> list[int]:
        return members(f"{state.uid}/", leaders)

    count = len(find())
    if left := kill_all(find):
        raise ClusterError(f"processes {', '.join(map(str, left))} of a job without a supervisor cannot be ended")
    return count


def _reason(folder: Folder, state: State) -> str:
    if state.boot != boot_id():
        return "the machine was started anew while it ran"
    with suppress(OSError):
        said = (folder.path / _ERRORS).read_text(encoding="utf-8", errors="replace").strip()
        if said:
            last = said.rpartition("\n")[2]
            return f"its supervisor failed: {last}"
    return "its supervisor was killed" + (" before it began" if state.pid is None else "")


def settled(folder: Folder) -> State | None:
    """As `settle`; None for what is gone, and for what has outlived its time to live, which is removed now."""
    try:
        state = settle(folder)
        if state.done and state.expires is not None and state.expires <= time.time():
            lock = folder.try_lock()
            if lock is not None:
                folder.remove()
                os.close(lock)
            return None
    except NotFoundError:
        return None
    return state
