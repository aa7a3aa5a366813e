"""The local backend: jobs and servers are processes of this machine, volumes are its folders.

Nothing has to be installed and nothing runs beforehand. Each job and server is owned by a supervisor of its own
(`supervisor.py`), which a command starts and which outlives the terminal; all that is known stands in files under
HASTEN_HOME (`state.py`). Several commands may run at once.
"""

import logging
import os
import platform
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import hasten
from hasten.cluster.backend import Job, LogOptions, Node, Server, ServerUpdate, VolumeRecord
from hasten.cluster.local import serving
from hasten.cluster.local.attach import attach
from hasten.cluster.local.checks import check_job, check_mounts, check_volume, notices
from hasten.cluster.local.end import end_and_remove
from hasten.cluster.local.gpus import GpuQueue, devices
from hasten.cluster.local.launch import JobPlan, to_json
from hasten.cluster.local.logs import LogReader
from hasten.cluster.local.plan import LOCAL_ADDRESS, config_files, job_plan
from hasten.cluster.local.processes import boot_id, host_name
from hasten.cluster.local.settle import settle, settled
from hasten.cluster.local.state import (
    Folder,
    InstanceState,
    State,
    create,
    folders,
    home_folder,
    job_folder,
    locked,
    server_folder,
)
from hasten.cluster.local.supervisor import start
from hasten.cluster.local.view import chosen_instance, job_view
from hasten.cluster.local.volumes import Volumes, user_name
from hasten.cluster.spec import TrainingJob, TritonServer, Volume, Workload, record_of
from hasten.core.errors import ClusterError, ConfigError, NotFoundError, UnsupportedError

_log = logging.getLogger(__name__)
_JOB_GRACE_S = 10.0
Read = TypeVar("Read")


class LocalBackend:
    """Implements `backend.Backend`. `home` is the folder of its state (default: HASTEN_HOME, else ~/.hasten)."""

    name = "local"

    def __init__(self, home: Path | None = None) -> None:
        if not sys.platform.startswith("linux"):
            raise UnsupportedError("the local backend runs on Linux alone: it needs /proc; use --cluster kubernetes")
        self.home = home_folder(home)
        self._volumes = Volumes(self.home)
        self._gpus = GpuQueue(self.home, settle)

    def default_namespace(self) -> str:
        """Namespaces are folders here, and need not be made."""
        return "default"

    def plan_job(self, job: TrainingJob) -> list[dict[str, Any]]:
        """The record of a job."""
        return [_job_spec(job, self._job_plan(job))]

    def submit(self, job: TrainingJob) -> None:
        """Start a job; returns as soon as its supervisor runs."""
        folder = self._job_folder(job.name, job.namespace)
        plan = self._job_plan(job)
        check_mounts(plan.launch, config_files(job, folder.path))
        now = time.time()
        state = _new_state(now)
        state.instances = [
            InstanceState(name=name, created=now, is_chief=number == 0, gpus=plan.gpus)
            for number, name in enumerate(plan.names)
        ]
        _warn(job, state, f"job/{job.name}")
        lock = self._create(folder, _job_spec(job, plan), state, job, f"job {job.name}", job.if_taken)
        try:
            if plan.gpus:
                self._gpus.draw(folder, plan.gpus * len(plan.names))
        except BaseException:
            os.close(lock)
            folder.remove()
            raise
        _start_new(folder, lock, f"job {job.name}")

    def jobs(self, namespace: str | None) -> list[Job]:
        """All jobs, newest first; a record that cannot be read is left out, with a warning."""
        jobs = []
        for folder in folders(self.home, "jobs", namespace):
            if (state := _readable(settled, folder)) is not None:
                jobs.append(job_view(folder, state, events=False))
        return sorted(jobs, key=lambda job: job.created, reverse=True)

    def job(self, name: str, namespace: str) -> Job:
        """One job."""
        folder = self._job_folder(name, namespace)
        return job_view(folder, self._state(folder, f"job {name}"), events=True)

    def delete_job(self, name: str, namespace: str) -> None:
        """End a job's processes, and remove its record and logs."""
        folder = self._job_folder(name, namespace)
        self._state(folder, f"job {name}")
        end_and_remove(folder, _JOB_GRACE_S)

    def job_logs(self, name: str, namespace: str, options: LogOptions) -> Iterator[str]:
        """Lines of an instance (default: the master)."""
        return self._logs(self._job_folder(name, namespace), f"job {name}", options)

    def attach_job(
        self, name: str, namespace: str, instance: str | None, container: str | None, command: list[str]
    ) -> int:
        """Run a command (default: the job's shell) with an instance's environment, folder and mounts."""
        folder = self._job_folder(name, namespace)
        return self._attach(folder, f"job {name}", instance, container, command)

    def _job_folder(self, name: str, namespace: str) -> Folder:
        return job_folder(self.home, name, namespace)

    def _job_plan(self, job: TrainingJob) -> JobPlan:
        check_job(job)
        sources = self._volumes.sources(job.data, job.namespace)
        return job_plan(job, sources, self._job_folder(job.name, job.namespace).path)

    def plan_server(self, server: TritonServer) -> list[dict[str, Any]]:
        """The record of a server."""
        return [serving.spec_of(server, serving.planned(self.home, server))]

    def serve(self, server: TritonServer) -> None:
        """Start a server; returns as soon as its supervisor runs, before it is ready."""
        plan = serving.planned(self.home, server)
        folder = server_folder(self.home, server.name, server.version, server.namespace)
        check_mounts(plan.launch, config_files(server, folder.path))
        state = _new_state(time.time())
        what = f"server {server.name} of version {server.version}"
        _warn(server, state, f"server/{folder.name}")
        with locked(self.home / "ports.lock"):
            if not folder.path.exists():
                serving.check_ports(self.home, plan, folder)
            lock = self._create(folder, serving.spec_of(server, plan), state, server, what, server.if_taken)
        _start_new(folder, lock, what)

    def update_server(self, name: str, version: str | None, namespace: str, update: ServerUpdate) -> None:
        """Change a server; its supervisor replaces the replicas one after the other. One that died is revived."""
        folder = serving.found(self.home, name, version, namespace)
        if update.image is not None:
            _log.warning("--image %s is not used: here servers run as processes", update.image)
        serving.change(self.home, folder, update)

    def servers(self, namespace: str | None) -> list[Server]:
        """All servers, newest first; a record that cannot be read is left out, with a warning."""
        view = partial(serving.view, events=False)
        servers = [_readable(view, folder) for folder in folders(self.home, "servers", namespace)]
        return sorted((found for found in servers if found is not None), key=lambda found: found.created, reverse=True)

    def server(self, name: str, version: str | None, namespace: str) -> Server:
        """One server."""
        return serving.view(serving.found(self.home, name, version, namespace), events=True)

    def delete_server(self, name: str, version: str | None, namespace: str) -> None:
        """End a server; its requests under way have --exit-timeout seconds."""
        folder = serving.found(self.home, name, version, namespace)
        end_and_remove(folder, serving.exit_grace(folder))

    def server_logs(self, name: str, version: str | None, namespace: str, options: LogOptions) -> Iterator[str]:
        """Lines of a replica (default: the first)."""
        folder = serving.found(self.home, name, version, namespace)
        return self._logs(folder, f"server {name}", options)

    def attach_server(
        self,
        name: str,
        version: str | None,
        namespace: str,
        instance: str | None,
        container: str | None,
        command: list[str],
    ) -> int:
        """As `attach_job`; the default command is sh."""
        folder = serving.found(self.home, name, version, namespace)
        return self._attach(folder, f"server {name}", instance, container, command)

    def plan_volume(self, volume: Volume) -> list[dict[str, Any]]:
        """The record of a volume."""
        check_volume(volume)
        return [self._volumes.plan(volume)]

    def create_volume(self, volume: Volume) -> None:
        """Make a folder known by a name."""
        check_volume(volume)
        self._volumes.create(volume)

    def volumes(self, namespace: str | None) -> list[VolumeRecord]:
        """All volumes."""
        return self._volumes.all(namespace)

    def delete_volume(self, name: str, namespace: str) -> None:
        """Forget a volume. Jobs that have it mounted keep it."""
        self._volumes.delete(name, namespace)

    def nodes(self) -> list[Node]:
        """This machine."""
        here = Node(
            name=host_name(),
            address=LOCAL_ADDRESS,
            role="local",
            status="Ready",
            gpus=len(devices()),
            allocated_gpus=self._gpus.allocated(),
        )
        return [here]

    def whoami(self) -> str:
        """The user of this process, the machine and the folder of the state."""
        return f"{user_name()} (uid {os.getuid()}) on {host_name()}, state in {self.home}"

    def version(self) -> str:
        """Versions of hasten, of Python and of the kernel."""
        return f"hasten {hasten.__version__}, Python {platform.python_version()}, Linux {platform.release()}"

    def _state(self, folder: Folder, what: str) -> State:
        state = settled(folder)
        if state is None:
            raise NotFoundError(f"there is no {what} in namespace {folder.namespace}")
        return state

    def _create(
        self, folder: Folder, spec: dict[str, Any], state: State, workload: Workload, what: str, advice: str
    ) -> int:
        settled(folder)  # a job of that name may have outlived its time
        files = {str(copy.relative_to(folder.path)): source for copy, source, _ in config_files(workload, folder.path)}
        return create(folder, spec, state, files, what=what, advice=advice)[1]

    def _logs(self, folder: Folder, what: str, options: LogOptions) -> Iterator[str]:
        _refuse_container(options.container)
        instance = chosen_instance(self._state(folder, what), options.instance, what)
        return LogReader(folder.logs, instance.name, _end_of(folder, instance.name)).lines(options)

    def _attach(
        self, folder: Folder, what: str, instance: str | None, container: str | None, command: list[str]
    ) -> int:
        _refuse_container(container)
        chosen = chosen_instance(self._state(folder, what), instance, what)
        launch, shell = folder.launch()
        return attach(chosen, launch, command or [shell])


def _job_spec(job: TrainingJob, plan: JobPlan) -> dict[str, Any]:
    return {"kind": "job", "asked": record_of(job), "plan": to_json(plan)}


def _new_state(now: float) -> State:
    return State(uid=uuid.uuid4().hex, host=host_name(), boot=boot_id(), created=now)


def _start_new(folder: Folder, lock: int, what: str) -> None:
    """Start the supervisor of what was just made; without one nothing is left of it."""
    try:
        start(folder, lock)
    except (OSError, subprocess.SubprocessError) as error:
        folder.remove()
        raise ClusterError(f"the supervisor of {what} cannot be started: {error}") from error


def _warn(workload: Workload, state: State, source: str) -> None:
    """Warn of what this backend ignores, in the events and in the log."""
    for reason, message in notices(workload):
        state.event(reason, message, source, warning=True)
        _log.warning("%s", message)


def _refuse_container(container: str | None) -> None:
    if container is not None:
        raise UnsupportedError("the local backend has no containers; leave --container out")


def _end_of(folder: Folder, name: str) -> Callable[[], bool]:
    """Tells whether an instance will write no more."""

    def ended() -> bool:
        state = settled(folder)
        if state is None or state.done:
            return True
        return state.ended is not None and any(each.name == name and each.ended is not None for each in state.instances)

    return ended


def _readable(read: Callable[[Folder], Read], folder: Folder) -> Read | None:
    """What is read of a record; None where it has gone meanwhile, or cannot be read, which is logged."""
    try:
        return read(folder)
    except NotFoundError:
        return None
    except (ClusterError, ConfigError) as error:
        _log.warning("%s", error)
        return None
