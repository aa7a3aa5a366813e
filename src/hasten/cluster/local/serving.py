"""Creates and updates local servers; running them is the work of their supervisors."""

import dataclasses
import logging
import os
import signal
import time
from pathlib import Path
from typing import Any

from hasten.cluster.backend import Server, ServerUpdate
from hasten.cluster.local.checks import check_mounts, check_server
from hasten.cluster.local.launch import ServerPlan, to_json
from hasten.cluster.local.plan import server_plan
from hasten.cluster.local.settle import settle, settle_owned
from hasten.cluster.local.state import Folder, UnreadableError, folders, locked, server_folder
from hasten.cluster.local.supervisor import signal_supervisor, start
from hasten.cluster.local.view import server_view
from hasten.cluster.local.volumes import Volumes
from hasten.cluster.spec import TritonServer, checked_name, checked_version, mounts, record_of
from hasten.core.errors import ClusterError, ConfigError, NotFoundError
from hasten.core.ports import port_is_free

_log = logging.getLogger(__name__)
_START_S = 60.0
"""How long a supervisor may take to begin, on a busy machine."""
_LOOK_S = 0.02


def planned(home: Path, server: TritonServer) -> ServerPlan:
    """A server's plan; raises for what this machine cannot do."""
    check_server(server)
    sources = Volumes(home).sources(server.data, server.namespace)
    return server_plan(server, sources, server_folder(home, server.name, server.version, server.namespace).path)


def spec_of(server: TritonServer, plan: ServerPlan) -> dict[str, Any]:
    """What is written of a server: its options with absolute paths, as an update may read them in another folder."""
    repository = server.model_repository or ""
    absolute = dataclasses.replace(
        server,
        working_dir=_absolute(server.working_dir or "."),
        model_repository=repository if server.map_paths else _absolute(repository),
        config_file=[f"{_absolute(source)}:{path}" for source, path in mounts(server.config_file, "--config-file")],
    )
    return {"kind": "server", "asked": record_of(absolute), "plan": to_json(plan)}


def _absolute(path: str) -> str:
    return str(Path(path).absolute())


def check_ports(home: Path, plan: ServerPlan, folder: Folder) -> None:
    """ConfigError where the first replica's ports are in use, or another server of this home wants them."""
    for other in folders(home, "servers", None):
        if other != folder:
            _check_other(other, plan)
    for name, port in plan.ports.items():
        if not port_is_free(port, plan.address):
            raise ConfigError(f"--{name}-port {port} is in use on this machine; give another")


def _check_other(other: Folder, plan: ServerPlan) -> None:
    try:
        state = settle(other)
        wanted = set() if state.done else set(other.server_plan().ports.values())
    except NotFoundError:
        return
    except UnreadableError as error:
        _log.warning("%s", error)
        return
    for name, port in plan.ports.items():
        if port in wanted:
            raise ConfigError(f"--{name}-port {port} is a port of server {other.name}; give another")


def found(home: Path, name: str, version: str | None, namespace: str) -> Folder:
    """The record of a server; ConfigError where no version is given and there are several."""
    checked_name(name, "a server's name")
    candidates = [folder for folder in folders(home, "servers", namespace) if folder.name.partition("@")[0] == name]
    if version is not None:
        checked_version(version)
        candidates = [folder for folder in candidates if folder.name == f"{name}@{version}"]
    if not candidates:
        raise NotFoundError(
            f"there is no server {name}{f' of version {version}' if version else ''} in namespace {namespace}"
        )
    if len(candidates) > 1:
        versions = ", ".join(folder.name.partition("@")[2] for folder in candidates)
        raise ConfigError(f"server {name} has the versions {versions}; say which with --version")
    return candidates[0]


def view(folder: Folder, *, events: bool) -> Server:
    """A server as it is; NotFoundError where it is gone."""
    return server_view(folder, settle(folder), folder.server_plan(), events=events)


def exit_grace(folder: Folder) -> float:
    """Seconds that a server's end may take."""
    return float(folder.server_plan().exit_timeout)


def change(home: Path, folder: Folder, update: ServerUpdate) -> None:
    """Write a server's new form, and have its supervisor follow it: a new supervisor where the old one died."""
    with locked(home / "update.lock"):
        server = update.applied_to(folder.server())
        plan = planned(home, server)
        check_mounts(plan.launch, ())
        lock = folder.try_lock()
        if lock is None:
            folder.write_spec(spec_of(server, plan))
            lock = _notify_supervisor(folder)
        if lock is not None:
            _revive(home, folder, server, plan, lock)


def _revive(home: Path, folder: Folder, server: TritonServer, plan: ServerPlan, lock: int) -> None:
    try:
        state = settle_owned(folder)
        check_ports(home, plan, folder)
        folder.write_spec(spec_of(server, plan))
        state = dataclasses.replace(
            state, status="PENDING", reason=None, done=False, ended=None, pid=None, start=None, instances=[]
        )
        state.event("Revived", "a new supervisor was started", f"server/{folder.name}")
        folder.write_state(state)
    except BaseException:
        os.close(lock)
        raise
    start(folder, lock)


def _notify_supervisor(folder: Folder) -> int | None:
    """Have the supervisor read the new plan; one that has only just been started is waited for.

    The folder's lock where it ends before that.
    """
    deadline = time.monotonic() + _START_S
    while not signal_supervisor(folder, signal.SIGHUP):
        if (lock := folder.try_lock()) is not None:
            return lock
        if time.monotonic() > deadline:
            raise ClusterError(f"the supervisor of server {folder.name} does not answer; update it once more")
        time.sleep(_LOOK_S)
    return None
