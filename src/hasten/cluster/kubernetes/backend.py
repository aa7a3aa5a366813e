"""A Kubernetes cluster as a backend: every verb is a few requests to its API server.

It keeps nothing of its own: what there is stands in the cluster, where any number of users and tools see the same.
"""

import logging
import time
from collections.abc import Iterator
from dataclasses import fields
from typing import Any

from hasten.cluster.backend import (
    Job,
    LogOptions,
    Node,
    Server,
    ServerUpdate,
    VolumeRecord,
    refuse_unsupported,
)
from hasten.cluster.kubernetes.apply import DELETION_TIMEOUT_S, apply_all, create_all, delete_and_wait
from hasten.cluster.kubernetes.client import Cluster
from hasten.cluster.kubernetes.config import NoClusterError, find_access
from hasten.cluster.kubernetes.exec import run_inside
from hasten.cluster.kubernetes.jobs import FoundJob, find_job, job_record, job_with_events, list_jobs
from hasten.cluster.kubernetes.logs import chosen_container, chosen_pod, log_lines
from hasten.cluster.kubernetes.resources import SELF_REVIEWS, name_of
from hasten.cluster.kubernetes.servers import (
    FoundServer,
    find_server,
    find_servers,
    list_servers,
    server_with_events,
)
from hasten.cluster.kubernetes.update import update_server
from hasten.cluster.kubernetes.volumes import delete_volume, list_nodes, list_volumes, objects_of
from hasten.cluster.manifests.objects import CRDS, job_objects, needs_crds, server_objects
from hasten.cluster.spec import TrainingJob, TritonServer, Volume
from hasten.core.errors import ClusterError, ExistsError

_log = logging.getLogger(__name__)
NAME = "kubernetes"
_LOCAL_ONLY = frozenset(("map_paths",))
_PAUSE = 0.5


def _check(spec: TrainingJob | TritonServer) -> None:
    refuse_unsupported(NAME, spec, {field.name for field in fields(spec)} - _LOCAL_ONLY)


class KubernetesBackend:
    """The cluster of a kubeconfig, or the one that this process runs in.

    `deletion_timeout_s`: how long a deletion may take until it is an error. With `only_plans`, no cluster need be
    configured.
    """

    name = NAME

    def __init__(
        self,
        config_file: str | None = None,
        context: str | None = None,
        *,
        deletion_timeout_s: float = DELETION_TIMEOUT_S,
        only_plans: bool = False,
    ) -> None:
        self._missing: NoClusterError | None = None
        try:
            self._access = find_access(config_file, context)
            self._cluster = Cluster(self._access)
        except NoClusterError as error:
            if not only_plans:
                raise
            self._missing = error
        self._deletion_timeout_s = deletion_timeout_s

    def default_namespace(self) -> str:
        """The context's namespace, or the pod's own; `default` where no cluster is configured."""
        return "default" if self._missing is not None else self._access.namespace

    def plan_job(self, job: TrainingJob) -> list[dict[str, Any]]:
        """Objects of a job; asks the cluster nothing."""
        _check(job)
        return job_objects(job)

    def submit(self, job: TrainingJob) -> None:
        """Make the objects of a job, or none of them."""
        create_all(self._cluster, self.plan_job(job))

    def jobs(self, namespace: str | None) -> list[Job]:
        """All training jobs, newest first."""
        return list_jobs(self._cluster, namespace)

    def job(self, name: str, namespace: str) -> Job:
        """One job, with instances and events."""
        return job_with_events(self._cluster, self._job(name, namespace))

    def delete_job(self, name: str, namespace: str) -> None:
        """Delete a job after its pods and all else that it owns."""
        delete_and_wait(self._cluster, self._job(name, namespace).resource, namespace, name, self._deletion_timeout_s)

    def job_logs(self, name: str, namespace: str, options: LogOptions) -> Iterator[str]:
        """Lines of an instance's log, the chief's if none is named. Followed, it waits for the first pod too."""
        found = self._job(name, namespace)
        if options.follow and not found.pods:
            return self._awaited_log(name, namespace, options)
        return log_lines(self._cluster, chosen_pod(found.pods, options.instance, f"job {name}"), options)

    def _awaited_log(self, name: str, namespace: str, options: LogOptions) -> Iterator[str]:
        while not (found := self._job(name, namespace)).pods and not job_record(found).status.ended:
            time.sleep(_PAUSE)
        yield from log_lines(self._cluster, chosen_pod(found.pods, options.instance, f"job {name}"), options)

    def attach_job(
        self, name: str, namespace: str, instance: str | None, container: str | None, command: list[str]
    ) -> int:
        """Run a command in an instance, the chief if none is named."""
        pod = chosen_pod(self._job(name, namespace).pods, instance, f"job {name}")
        return run_inside(self._cluster, pod, chosen_container(pod, container), command)

    def nodes(self) -> list[Node]:
        """All nodes, by name."""
        return list_nodes(self._cluster)

    def plan_volume(self, volume: Volume) -> list[dict[str, Any]]:
        """Objects of a volume; asks the cluster nothing."""
        return objects_of(volume)

    def create_volume(self, volume: Volume) -> None:
        """Make the objects of a volume, or none of them."""
        create_all(self._cluster, self.plan_volume(volume), first_owns=False)

    def volumes(self, namespace: str | None) -> list[VolumeRecord]:
        """Claims that can be mounted, newest first."""
        return list_volumes(self._cluster, namespace)

    def delete_volume(self, name: str, namespace: str) -> None:
        """Delete what `create_volume` made; the data stays where it is."""
        delete_volume(self._cluster, name, namespace)

    def plan_server(self, server: TritonServer) -> list[dict[str, Any]]:
        """Objects of a server. Some depend on the cluster's CRDs: one that cannot be asked is taken to have all."""
        _check(server)
        try:
            crds = self._crds_for(server)
        except ClusterError as error:
            _log.warning("these are the objects for a cluster with all CRDs of docs/kubernetes.md: %s", error)
            crds = set(CRDS)
        return server_objects(server, crds=crds)

    def serve(self, server: TritonServer) -> None:
        """Make the objects of a server, or none of them."""
        _check(server)
        objects = server_objects(server, crds=self._crds_for(server))
        if find_servers(self._cluster, server.namespace, server.name, server.version):
            raise ExistsError(
                f"there is a server {server.name} of version {server.version} in namespace {server.namespace} already: "
                f"{server.if_taken}"
            )
        apply_all(self._cluster, objects)

    def update_server(self, name: str, version: str | None, namespace: str, update: ServerUpdate) -> None:
        """Change a server; the cluster replaces its pods one after the other."""
        update_server(self._cluster, self._server(name, version, namespace), update)

    def servers(self, namespace: str | None) -> list[Server]:
        """All servers, newest first."""
        return list_servers(self._cluster, namespace)

    def server(self, name: str, version: str | None, namespace: str) -> Server:
        """One server, with instances and events."""
        return server_with_events(self._cluster, self._server(name, version, namespace))

    def delete_server(self, name: str, version: str | None, namespace: str) -> None:
        """Delete a server after its pods and all else that it owns."""
        found = self._server(name, version, namespace)
        delete_and_wait(self._cluster, found.resource, namespace, name_of(found.body), self._deletion_timeout_s)

    def server_logs(self, name: str, version: str | None, namespace: str, options: LogOptions) -> Iterator[str]:
        """Lines of an instance's log, the first one's if none is named."""
        pods = self._server(name, version, namespace).pods
        return log_lines(self._cluster, chosen_pod(pods, options.instance, f"server {name}"), options)

    def attach_server(
        self,
        name: str,
        version: str | None,
        namespace: str,
        instance: str | None,
        container: str | None,
        command: list[str],
    ) -> int:
        """Run a command in an instance, the first if none is named."""
        pod = chosen_pod(self._server(name, version, namespace).pods, instance, f"server {name}")
        return run_inside(self._cluster, pod, chosen_container(pod, container), command)

    def whoami(self) -> str:
        """The name and the groups that the cluster knows the user by."""
        user = self._cluster.review(SELF_REVIEWS)["status"]["userInfo"]
        groups = ", ".join(user.get("groups") or ())
        return f"{user.get('username')} ({groups or 'no groups'}) at {self._cluster.server}, by {self._access.source}"

    def version(self) -> str:
        """Version of the API server."""
        return f"Kubernetes {self._cluster.read('/version')['gitVersion']} at {self._cluster.server}"

    def _job(self, name: str, namespace: str) -> FoundJob:
        return find_job(self._cluster, name, namespace)

    def _server(self, name: str, version: str | None, namespace: str) -> FoundServer:
        return find_server(self._cluster, name, version, namespace)

    def _crds_for(self, server: TritonServer) -> set[str]:
        """Which of the CRDs that manifests make use of the cluster has; none where the server needs none."""
        if not needs_crds(server):
            return set()
        if self._missing is not None:
            raise ClusterError(str(self._missing)) from self._missing
        groups = {entry["name"]: entry for entry in self._cluster.read("/apis")["groups"]}
        found: set[str] = set()
        for crd in CRDS:
            group = groups.get(crd.partition(".")[2])
            for version in group["versions"] if group else ():
                kinds = self._cluster.kinds(version["groupVersion"]).values()
                found |= {entry.full_name for entry in kinds}
        return found & set(CRDS)
