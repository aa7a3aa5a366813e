"""A server whose instances are groups of nodes, as a LeaderWorkerSet: a group starts, fails and ends as one.

Every pod of a group runs the same command. LeaderWorkerSet sets LWS_LEADER_ADDRESS, LWS_GROUP_SIZE and
LWS_WORKER_INDEX, which hasten reads; other servers get them under torchrun's names, as PET_*. Only the leader answers.
"""

from collections.abc import Set as AbstractSet

from hasten.cluster.manifests.pod import Object, pod, storage
from hasten.cluster.manifests.server import (
    grace_seconds,
    pod_metadata,
    pod_template,
    replicas,
    server_container,
    server_metadata,
)
from hasten.cluster.spec import TritonServer
from hasten.core.errors import ConfigError

_MEETING_PORT = 29500
_LONGEST_LABEL = 63
_HASH = "-0123456789"
"""What Kubernetes adds to a StatefulSet's name in the label controller-revision-hash of its pods, at its longest."""


def check_group_name(name: str, replicas: int) -> None:
    """ConfigError where groups of that many replicas would have pods whose labels are too long.

    The pods of each group are of a StatefulSet of their own, NAME-INDEX.
    """
    longest = _LONGEST_LABEL - len(f"-{max(0, replicas - 1)}{_HASH}")
    if len(name) > longest:
        raise ConfigError(
            f"--name and --version make {name!r}, which is too long for --multinode with up to {replicas} replicas: "
            f"at most {longest} letters"
        )


def leader_worker_set(server: TritonServer, crds: AbstractSet[str]) -> Object:
    """The object."""
    check_group_name(server.full_name, server.scale_limits()[1] if server.autoscale else server.replicas)
    spec = {
        **replicas(server),
        "startupPolicy": "LeaderCreated",
        "leaderWorkerTemplate": {
            "size": server.multinode,
            "restartPolicy": "RecreateGroupOnPodRestart",
            "leaderTemplate": pod_template(server, crds, *_ranks(server)),
            "workerTemplate": _worker(server),
        },
    }
    return {
        "apiVersion": "leaderworkerset.x-k8s.io/v1",
        "kind": "LeaderWorkerSet",
        "metadata": server_metadata(server),
        "spec": spec,
    }


def _ranks(server: TritonServer) -> list[Object]:
    """The variables of torchrun for a server other than hasten's; Kubernetes fills in those of the group."""
    if server.runtime == "hasten":
        return []
    values = {
        "PET_NNODES": "$(LWS_GROUP_SIZE)",
        "PET_NODE_RANK": "$(LWS_WORKER_INDEX)",
        "PET_NPROC_PER_NODE": str(max(1, server.gpus)),
        "PET_MASTER_ADDR": "$(LWS_LEADER_ADDRESS)",
        "PET_MASTER_PORT": str(_MEETING_PORT),
    }
    return [{"name": name, "value": value} for name, value in values.items()]


def _worker(server: TritonServer) -> Object:
    held = storage(server)
    main = server_container(server, held, *_ranks(server), serves=False)
    # it computes for as long as the leader answers
    spec = pod(server, main, held.volumes, terminationGracePeriodSeconds=grace_seconds(server))
    return {"metadata": pod_metadata(server, {}), "spec": spec}
