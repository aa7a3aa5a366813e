"""Volumes and nodes of a cluster."""

import os
from collections import Counter

from hasten.cluster.backend import Node, VolumeRecord
from hasten.cluster.kubernetes.client import Cluster
from hasten.cluster.kubernetes.records import accelerators, created, newest_first, pod_gpus
from hasten.cluster.kubernetes.resources import (
    CLAIMS,
    MANAGED_BY,
    NODES,
    PODS,
    SECRETS,
    VOLUMES,
    Object,
    Resource,
    labels_of,
    name_of,
)
from hasten.cluster.manifests.objects import volume_objects
from hasten.cluster.manifests.pod import MANAGER
from hasten.cluster.manifests.volume import earlier_volume_name, is_of, secret_name, volume_name
from hasten.cluster.spec import Volume
from hasten.core.errors import ClusterError, NotFoundError

SECRET_VARIABLE = "HASTEN_ACCESS_KEY_SECRET"
_ALIVE = "status.phase!=Succeeded,status.phase!=Failed"
_ROLE = "node-role.kubernetes.io/"


def objects_of(volume: Volume) -> list[Object]:
    """A volume's objects, with the key that stands in the environment."""
    return volume_objects(volume, os.environ.get(SECRET_VARIABLE) if volume.access_key_id else None)


def list_volumes(cluster: Cluster, namespace: str | None) -> list[VolumeRecord]:
    """Claims that are bound, and hasten's own whether they are or not."""
    claims = cluster.list_all(CLAIMS, namespace)
    if not claims and namespace is not None:
        cluster.check_namespace(namespace)
    usable = (claim for claim in claims if (claim.get("status") or {}).get("phase") == "Bound" or _is_ours(claim))
    return newest_first(map(_record, usable))


def _record(claim: Object) -> VolumeRecord:
    annotations = claim["metadata"].get("annotations") or {}
    phase = (claim.get("status") or {}).get("phase")
    notes = [annotations.get("description", ""), "" if phase == "Bound" else f"({str(phase).lower()}, not bound yet)"]
    return VolumeRecord(
        name=name_of(claim),
        namespace=claim["metadata"]["namespace"],
        access_mode=",".join(claim["spec"].get("accessModes") or ()),
        description=" ".join(note for note in notes if note),
        owner=annotations.get("owner", ""),
        created=created(claim),
    )


def _is_ours(item: Object) -> bool:
    return labels_of(item).get(MANAGED_BY) == MANAGER


def delete_volume(cluster: Cluster, name: str, namespace: str) -> None:
    """Remove the claim, the volume and the secret that hasten made, and none that others made or that others claim."""
    volume = Volume(name=name, namespace=namespace)
    claim = cluster.find(CLAIMS, namespace, name)
    if claim is not None and not _is_ours(claim):
        raise ClusterError(f"volume {name} was not created by hasten: remove it where it was created, or with kubectl")
    parts: list[tuple[Resource, str | None, str]] = [(CLAIMS, namespace, name)] if claim else []
    for held in (volume_name(volume), earlier_volume_name(volume)):
        found = cluster.find(VOLUMES, None, held)
        if found is not None and _is_ours(found) and is_of(found, volume):
            parts.append((VOLUMES, None, held))
    secret = cluster.find(SECRETS, namespace, secret_name(volume))
    if secret is not None and _is_ours(secret):
        parts.append((SECRETS, namespace, secret_name(volume)))
    if not parts:
        cluster.check_namespace(namespace)
        raise NotFoundError(f"there is no volume {name} in namespace {namespace}: see `hasten cluster data list`")
    _check_unused(cluster, name, namespace)
    for resource, where, part in parts:
        cluster.delete(resource, where, part)


def _check_unused(cluster: Cluster, name: str, namespace: str) -> None:
    """A claim that is mounted would stay, half deleted, until its last pod is gone."""
    users = [
        name_of(pod)
        for pod in cluster.list_all(PODS, namespace, fields=_ALIVE)
        if any(
            (volume.get("persistentVolumeClaim") or {}).get("claimName") == name
            for volume in pod["spec"].get("volumes") or ()
        )
    ]
    if users:
        raise ClusterError(f"volume {name} is mounted by {', '.join(sorted(users))}: delete the job or server first")


def list_nodes(cluster: Cluster) -> list[Node]:
    """All nodes, with the GPUs that their pods have."""
    taken: Counter[str] = Counter()
    for pod in cluster.list_all(PODS, None, fields=_ALIVE):
        taken[pod["spec"].get("nodeName", "")] += pod_gpus(pod["spec"])
    nodes = [_node(item, taken[name_of(item)]) for item in cluster.list_all(NODES, None)]
    return sorted(nodes, key=lambda node: node.name)


def _node(item: Object, taken: int) -> Node:
    status = item.get("status") or {}
    addresses = {address["type"]: address["address"] for address in status.get("addresses") or ()}
    roles = sorted(label.removeprefix(_ROLE) for label in labels_of(item) if label.startswith(_ROLE))
    return Node(
        name=name_of(item),
        address=addresses.get("InternalIP") or addresses.get("Hostname") or "",
        role=",".join(role for role in roles if role) or "<none>",
        status=_node_status(item),
        gpus=accelerators(status.get("allocatable")),
        allocated_gpus=taken,
    )


def _node_status(item: Object) -> str:
    conditions = {each["type"]: each["status"] for each in (item.get("status") or {}).get("conditions") or ()}
    ready = "Ready" if conditions.get("Ready") == "True" else "NotReady"
    return f"{ready},SchedulingDisabled" if item["spec"].get("unschedulable") else ready
