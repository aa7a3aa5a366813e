"""A backend runs jobs and servers: its verbs, which `local` and `kubernetes` implement, and the records they return."""

from collections.abc import Iterator, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any, Protocol

from hasten.cluster.spec import TrainingJob, TritonServer, Volume, options_given, pairs, record_of, server_of
from hasten.core.errors import ConfigError, UnsupportedError
from hasten.core.option_fields import option

PYTORCHJOB = "PYTORCHJOB"
"""What the column TRAINER says."""


class Status(StrEnum):
    """State of a job, of a server's instance, or of one of a job's."""

    PENDING = "PENDING"
    QUEUING = "QUEUING"
    RUNNING = "RUNNING"
    SUCCEEDED = "SUCCEEDED"
    FAILED = "FAILED"

    @property
    def ended(self) -> bool:
        """Whether it will not change any more."""
        return self in (Status.SUCCEEDED, Status.FAILED)


@dataclass(frozen=True, kw_only=True)
class Event:
    """What happened to a job, or to one of its instances."""

    time: datetime
    kind: str
    """Normal or Warning."""
    reason: str
    source: str
    """Which object, such as `pod/convert-bloom-master-0`."""
    message: str


@dataclass(frozen=True, kw_only=True)
class Instance:
    """A pod, or a process of this machine."""

    name: str
    status: Status
    created: datetime
    ended: datetime | None = None
    is_chief: bool = False
    gpus: int = 0
    node: str | None = None
    """Address of its machine."""
    ready: bool = False
    restarts: int = 0
    reason: str | None = None
    """Why it does not run, or how it failed."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """A training job as it is now."""

    name: str
    namespace: str
    status: Status
    created: datetime
    started: datetime | None = None
    ended: datetime | None = None
    trainer: str = PYTORCHJOB
    priority: str | None = None
    gpus: int = 0
    """Of all its instances together."""
    instances: Sequence[Instance] = ()
    events: Sequence[Event] = ()
    reason: str | None = None
    """Why it is pending or has failed, in one sentence."""

    @property
    def duration(self) -> float:
        """Seconds from its making to its end, or until now."""
        return max(0.0, ((self.ended or datetime.now(UTC)) - self.created).total_seconds())


@dataclass(frozen=True, kw_only=True)
class Server:
    """A server as it is now."""

    name: str
    namespace: str
    version: str
    desired: int
    available: int
    address: str | None
    ports: dict[str, int]
    """Port of each endpoint by Arena's word for it: RESTFUL, GRPC, METRICS."""
    gpus: int = 0
    """Of all its instances together."""
    created: datetime = field(default_factory=lambda: datetime.now(UTC))
    type: str = "Triton"
    instances: Sequence[Instance] = ()
    events: Sequence[Event] = ()
    reason: str | None = None
    """Why it lacks instances, in one sentence."""


@dataclass(frozen=True, kw_only=True)
class Node:
    """A machine of the cluster."""

    name: str
    address: str
    role: str
    status: str
    gpus: int
    allocated_gpus: int


@dataclass(frozen=True, kw_only=True)
class VolumeRecord:
    """A volume as it is listed."""

    name: str
    namespace: str
    access_mode: str
    description: str
    owner: str
    created: datetime


@dataclass(frozen=True, kw_only=True)
class LogOptions:
    """Which lines of a log."""

    follow: bool = False
    since: float | None = None
    """Seconds before now."""
    since_time: datetime | None = None
    tail: int = -1
    """Number of last lines; -1 is all."""
    timestamps: bool = False
    instance: str | None = None
    container: str | None = None


@dataclass(frozen=True, kw_only=True)
class ServerUpdate:
    """What `serve update triton` changes; None leaves as it is."""

    image: str | None = option(None, "image that its containers run")
    gpus: int | None = option(None, "GPUs of each instance")
    cpu: str | None = option(None, "cores of each instance, such as 4 or 500m")
    memory: str | None = option(None, "memory of each instance, such as 16Gi")
    replicas: int | None = option(None, "instances of the server")
    env: Sequence[str] = option((), "environment variable, NAME=VALUE; may be given more than once", short="-e")
    annotation: Sequence[str] = option((), "annotation, NAME=VALUE; may be given more than once", short="-a")
    label: Sequence[str] = option((), "label, NAME=VALUE; may be given more than once", short="-l")
    model_repository: str | None = option(None, "folder of the models, as its containers see it")
    load_model: Sequence[str] = option((), "model to load, others are not; may be given more than once")
    extend_command: str | None = option(None, "further options of the server, as one string for the shell")

    def __post_init__(self) -> None:
        # the rules are those of a server that is made so
        self.applied_to(TritonServer(name="server", version="1", model_repository="/"))

    def applied_to(self, server: TritonServer) -> TritonServer:
        """A server with these options; variables, annotations and labels are added to those that it has."""
        if self.replicas is not None and server.autoscale is not None:
            raise ConfigError("--replicas: this server was created with --autoscale, which decides on their number")
        given = record_of(self)
        for name in [kind for kind in ("env", "annotation", "label") if kind in given]:
            whole = pairs(getattr(server, name), f"--{name}") | pairs(given[name], f"--{name}")
            given[name] = [f"{key}={value}" for key, value in whole.items()]
        return server_of(record_of(server) | given)


class Backend(Protocol):
    """The verbs. All raise ClusterError where the backend fails, NotFoundError and ExistsError by name.

    `namespace=None` is all namespaces.
    """

    name: str

    def default_namespace(self) -> str:
        """Namespace where the user names none."""

    def plan_job(self, job: TrainingJob) -> list[dict[str, Any]]:
        """What `submit` would make, as objects to print; touches nothing."""

    def submit(self, job: TrainingJob) -> None:
        """Start a job; ExistsError where its name is taken."""

    def jobs(self, namespace: str | None) -> list[Job]:
        """All jobs, newest first, with instances and without events."""

    def job(self, name: str, namespace: str) -> Job:
        """One job, with instances and events."""

    def delete_job(self, name: str, namespace: str) -> None:
        """End a job and remove all that was made for it."""

    def job_logs(self, name: str, namespace: str, options: LogOptions) -> Iterator[str]:
        """Lines without their ends. With `follow`, until the instance ends."""

    def attach_job(
        self, name: str, namespace: str, instance: str | None, container: str | None, command: list[str]
    ) -> int:
        """Run a command (default: a shell) inside an instance, on this terminal; returns its exit status."""

    def nodes(self) -> list[Node]:
        """The machines."""

    def plan_volume(self, volume: Volume) -> list[dict[str, Any]]:
        """What `create_volume` would make."""

    def create_volume(self, volume: Volume) -> None:
        """Make a volume known by its name."""

    def volumes(self, namespace: str | None) -> list[VolumeRecord]:
        """Volumes that can be mounted."""

    def delete_volume(self, name: str, namespace: str) -> None:
        """Forget a volume; its data stays."""

    def plan_server(self, server: TritonServer) -> list[dict[str, Any]]:
        """What `serve` would make."""

    def serve(self, server: TritonServer) -> None:
        """Start a server; ExistsError where name and version are taken."""

    def update_server(self, name: str, version: str | None, namespace: str, update: ServerUpdate) -> None:
        """Change a server; its instances are replaced one after the other."""

    def servers(self, namespace: str | None) -> list[Server]:
        """All servers, newest first, with instances and without events."""

    def server(self, name: str, version: str | None, namespace: str) -> Server:
        """One server; ConfigError where `version` is None and there are several."""

    def delete_server(self, name: str, version: str | None, namespace: str) -> None:
        """End a server and remove all that was made for it."""

    def server_logs(self, name: str, version: str | None, namespace: str, options: LogOptions) -> Iterator[str]:
        """As `job_logs`."""

    def attach_server(
        self,
        name: str,
        version: str | None,
        namespace: str,
        instance: str | None,
        container: str | None,
        command: list[str],
    ) -> int:
        """As `attach_job`."""

    def whoami(self) -> str:
        """The user as the backend knows them."""

    def version(self) -> str:
        """Version of the backend."""


def refuse_unsupported(backend: str, spec: TrainingJob | TritonServer | Volume, supported: AbstractSet[str]) -> None:
    """UnsupportedError that names the options which the user gave and the backend cannot do."""
    options = [flag for name, flag in options_given(spec).items() if name not in supported]
    if options:
        raise UnsupportedError(
            f"{backend} cannot do {', '.join(options)}; leave it out or use another backend (--cluster)"
        )
