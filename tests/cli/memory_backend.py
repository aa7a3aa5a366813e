"""A backend that keeps what it is asked for in lists, and runs nothing."""

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

from hasten.cli.main import main
from hasten.cluster.backend import Backend, Instance, Job, LogOptions, Node, Server, ServerUpdate, Status, VolumeRecord
from hasten.cluster.spec import TrainingJob, TritonServer, Volume
from hasten.core.errors import ConfigError, ExistsError, NotFoundError

NODE = "192.168.123.35"


def cluster(*argv: str) -> int:
    """Run `hasten cluster` with some arguments in this process; its exit status."""
    return main(["cluster", *argv])


def ago(**times: float) -> datetime:
    """The moment so long before now, and a little more: ages are rounded down."""
    return datetime.now(UTC) - timedelta(**times) - timedelta(milliseconds=300)


def instance(name: str, status: Status = Status.RUNNING, **others: Any) -> Instance:
    """An instance that began five minutes ago."""
    made: dict[str, Any] = {"created": ago(minutes=5), "gpus": 1, "node": NODE, "is_chief": True, **others}
    return Instance(name=name, status=status, **made)


def job(name: str, status: Status = Status.RUNNING, **others: Any) -> Job:
    """A job of one instance and one GPU that began five minutes ago."""
    made: dict[str, Any] = {
        "namespace": "default",
        "created": ago(minutes=5),
        "gpus": 1,
        "instances": (instance(f"{name}-master-0", status),),
        **others,
    }
    return Job(name=name, status=status, **made)


class MemoryBackend(Backend):
    """Every verb, in memory. `asked` has the arguments of verbs that leave no record."""

    name = "memory"

    def __init__(self) -> None:
        self.submitted: list[TrainingJob] = []
        self.served: list[TritonServer] = []
        self.made_volumes: list[Volume] = []
        self.job_records: list[Job] = []
        self.server_records: list[Server] = []
        self.volume_records: list[VolumeRecord] = []
        self.node_records: list[Node] = []
        self.lines = ["first", "  second", ""]
        self.asked: list[Any] = []

    def default_namespace(self) -> str:
        return "default"

    def plan_job(self, job: TrainingJob) -> list[dict[str, Any]]:
        labels = {"app": "pytorchjob"}
        return [
            {"kind": "ConfigMap", "metadata": {"name": job.name, "labels": labels}},
            {"kind": "PyTorchJob", "metadata": {"name": job.name, "labels": labels}, "spec": {"command": job.command}},
        ]

    def submit(self, job: TrainingJob) -> None:
        if any(each.name == job.name for each in self.submitted):
            raise ExistsError(
                f"there is a job {job.name} in {job.namespace} already; delete it, or choose another name"
            )
        self.submitted.append(job)

    def jobs(self, namespace: str | None) -> list[Job]:
        return [job_record for job_record in self.job_records if namespace in (None, job_record.namespace)]

    def job(self, name: str, namespace: str) -> Job:
        for each in self.jobs(namespace):
            if each.name == name:
                return each
        raise NotFoundError(f"there is no job {name} in namespace {namespace}")

    def delete_job(self, name: str, namespace: str) -> None:
        self.job_records.remove(self.job(name, namespace))

    def job_logs(self, name: str, namespace: str, options: LogOptions) -> Iterator[str]:
        self.asked.append((self.job(name, namespace).name, options))
        return iter(self.lines)

    def attach_job(
        self, name: str, namespace: str, instance: str | None, container: str | None, command: list[str]
    ) -> int:
        self.asked.append((name, namespace, instance, container, command))
        return 7

    def nodes(self) -> list[Node]:
        return self.node_records

    def plan_volume(self, volume: Volume) -> list[dict[str, Any]]:
        return [{"kind": "PersistentVolumeClaim", "metadata": {"name": volume.name}}]

    def create_volume(self, volume: Volume) -> None:
        self.made_volumes.append(volume)

    def volumes(self, namespace: str | None) -> list[VolumeRecord]:
        return [volume_record for volume_record in self.volume_records if namespace in (None, volume_record.namespace)]

    def delete_volume(self, name: str, namespace: str) -> None:
        found = [each for each in self.volumes(namespace) if each.name == name]
        if not found:
            raise NotFoundError(f"there is no volume {name} in namespace {namespace}")
        self.volume_records.remove(found[0])

    def plan_server(self, server: TritonServer) -> list[dict[str, Any]]:
        return [{"kind": kind, "metadata": {"name": server.full_name}} for kind in ("Deployment", "Service")]

    def serve(self, server: TritonServer) -> None:
        self.served.append(server)

    def update_server(self, name: str, version: str | None, namespace: str, update: ServerUpdate) -> None:
        self.asked.append((name, version, namespace, update))

    def servers(self, namespace: str | None) -> list[Server]:
        return [server_record for server_record in self.server_records if namespace in (None, server_record.namespace)]

    def server(self, name: str, version: str | None, namespace: str) -> Server:
        found = [each for each in self.servers(namespace) if each.name == name and version in (None, each.version)]
        if len(found) > 1:
            raise ConfigError(f"server {name} has several versions; choose one with --version")
        if not found:
            raise NotFoundError(f"there is no server {name} in namespace {namespace}")
        return found[0]

    def delete_server(self, name: str, version: str | None, namespace: str) -> None:
        self.server_records.remove(self.server(name, version, namespace))

    def server_logs(self, name: str, version: str | None, namespace: str, options: LogOptions) -> Iterator[str]:
        self.asked.append((self.server(name, version, namespace).version, options))
        return iter(self.lines)

    def attach_server(
        self,
        name: str,
        version: str | None,
        namespace: str,
        instance: str | None,
        container: str | None,
        command: list[str],
    ) -> int:
        self.asked.append((name, version, namespace, instance, container, command))
        return 0

    def whoami(self) -> str:
        return "somebody"

    def version(self) -> str:
        return "1.0"
