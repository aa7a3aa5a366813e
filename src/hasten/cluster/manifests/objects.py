"""Specs of jobs, servers and volumes as Kubernetes objects; nothing here creates them in a cluster.

The first object of a job and of a server owns the others: create it first, then `owned(others, owner)`. Deleting it
deletes them, and nothing is left behind where creating one of them fails.
"""

import json
from collections.abc import Set as AbstractSet

from hasten.cluster.manifests.config import CRDS, config_maps, missing_crd, owned, require_crd
from hasten.cluster.manifests.indexed_job import indexed_job
from hasten.cluster.manifests.job import job_labels, pytorch_job
from hasten.cluster.manifests.multinode import leader_worker_set
from hasten.cluster.manifests.pod import Object
from hasten.cluster.manifests.scale import inference_pools, pod_monitors, scalers
from hasten.cluster.manifests.server import check_server, deployment, disruption_budgets, server_labels, service
from hasten.cluster.manifests.tensorboard import tensorboard_objects
from hasten.cluster.manifests.train_job import train_job
from hasten.cluster.manifests.volume import volume_objects
from hasten.cluster.spec import TrainingJob, TritonServer

__all__ = [
    "CRDS",
    "job_objects",
    "main_object",
    "missing_crd",
    "needs_crds",
    "owned",
    "server_objects",
    "volume_objects",
]


def job_objects(job: TrainingJob) -> list[Object]:
    """The job itself, the ConfigMap of its files, and its TensorBoard.

    UnsupportedError for options that a job of its kind cannot do, ConfigError for those that cannot hold in a cluster.
    """
    main = {"pytorchjob": pytorch_job, "trainer": train_job, "indexed": indexed_job}[job.api]
    return _plain([main(job), *config_maps(job, job_labels(job)), *tensorboard_objects(job)])


def needs_crds(server: TritonServer) -> bool:
    """Whether a server's objects depend on the CRDs that its cluster has."""
    queues = server.autoscale is not None and server.autoscale_by == "queue"
    return server.multinode > 1 or server.allow_metrics or server.gateway is not None or queues


def server_objects(server: TritonServer, *, crds: AbstractSet[str]) -> list[Object]:
    """The Deployment or LeaderWorkerSet of a server, its Service, and what its options ask for besides.

    `crds` are the CRDs that the cluster has, as plural.group. ClusterError where one of those needed is not among them.
    """
    return _plain(
        [
            main_object(server, crds),
            service(server),
            *config_maps(server, server_labels(server)),
            *disruption_budgets(server),
            *pod_monitors(server, crds),
            *scalers(server, crds),
            *inference_pools(server, crds),
        ]
    )


def main_object(server: TritonServer, crds: AbstractSet[str]) -> Object:
    """The Deployment or LeaderWorkerSet of a server."""
    check_server(server)
    if server.multinode == 1:
        return deployment(server, crds)
    require_crd(crds, "leaderworkersets.leaderworkerset.x-k8s.io", "--multinode")
    return leader_worker_set(server, crds)


def _plain(objects: list[Object]) -> list[Object]:
    """The same without shared parts: YAML would write references."""
    return json.loads(json.dumps(objects))
