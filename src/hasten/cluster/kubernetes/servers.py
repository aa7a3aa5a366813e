"""Servers in a cluster: Deployments and LeaderWorkerSets that the labels of Arena's Triton servers mark."""

from collections import defaultdict
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from hasten.cluster.backend import Server
from hasten.cluster.kubernetes.client import Cluster
from hasten.cluster.kubernetes.errors import ForbiddenError, MissingKindError
from hasten.cluster.kubernetes.records import (
    count,
    created,
    events_of,
    instance,
    newest_first,
    pod_gpus,
    true_condition,
)
from hasten.cluster.kubernetes.resources import (
    DEPLOYMENTS,
    EVENTS,
    LEADER_WORKER_SETS,
    PODS,
    REPLICA_SETS,
    SERVICES,
    STATEFUL_SETS,
    Object,
    Resource,
    labels_of,
    name_of,
)
from hasten.cluster.manifests.server import GRPC, HTTP, METRICS
from hasten.cluster.spec import checked_name, checked_version
from hasten.core.errors import ConfigError, NotFoundError

_TYPE = "servingType=triton-serving"
_GROUPS_NAME = "leaderworkerset.sigs.k8s.io/name"
"""Label of the StatefulSets that are made for a LeaderWorkerSet."""
_INDEX = "leaderworkerset.sigs.k8s.io/worker-index"
_ENDPOINTS = {HTTP: "RESTFUL", GRPC: "GRPC", METRICS: "METRICS"}

_Key = tuple[str, str, str]


@dataclass(frozen=True)
class FoundServer:
    """A server with its Service and its pods, those that lead a group first."""

    resource: Resource
    body: Object
    service: Object | None
    pods: Sequence[Object]


def find_servers(
    cluster: Cluster, namespace: str | None, name: str | None = None, version: str | None = None
) -> list[FoundServer]:
    """Servers of that name and version, or all."""
    selector = _selector(name, version)
    bodies = [(DEPLOYMENTS, item) for item in cluster.list_all(DEPLOYMENTS, namespace, labels=selector)]
    with suppress(MissingKindError, ForbiddenError):  # who may not see them has made none
        groups = cluster.list_all(LEADER_WORKER_SETS, namespace, labels=selector)
        bodies += [(LEADER_WORKER_SETS, item) for item in groups]
    if not bodies:
        if namespace is not None:
            cluster.check_namespace(namespace)
        return []
    services = {_key(item): item for item in cluster.list_all(SERVICES, namespace, labels=selector)}
    pods = defaultdict(list)
    for pod in cluster.list_all(PODS, namespace, labels=selector):
        pods[_key(pod)].append(pod)
    return [FoundServer(kind, item, services.get(_key(item)), _in_order(pods[_key(item)])) for kind, item in bodies]


def _selector(name: str | None, version: str | None) -> str:
    chosen = [_TYPE]
    chosen += [f"servingName={checked_name(name, 'a server')}"] if name is not None else []
    chosen += [f"servingVersion={checked_version(version)}"] if version is not None else []
    return ",".join(chosen)


def find_server(cluster: Cluster, name: str, version: str | None, namespace: str) -> FoundServer:
    """One server; ConfigError where it has several versions and none was named."""
    found = find_servers(cluster, namespace, name, version)
    if not found:
        wanted = f"server {name}" + (f" of version {version}" if version else "")
        raise NotFoundError(f"there is no {wanted} in namespace {namespace}: see `hasten cluster serve list`")
    if len(found) > 1:
        versions = ", ".join(sorted(labels_of(item.body).get("servingVersion", "") for item in found))
        raise ConfigError(f"server {name} has the versions {versions}: name one with --version")
    return found[0]


def list_servers(cluster: Cluster, namespace: str | None) -> list[Server]:
    """All servers, newest first."""
    return newest_first(map(server_record, find_servers(cluster, namespace)))


def server_with_events(cluster: Cluster, found: FoundServer) -> Server:
    """A server with all that happened to it, to its pods and to what makes them."""
    namespace, labels = found.body["metadata"]["namespace"], labels_of(found.body)
    if found.resource == DEPLOYMENTS:
        makers, selector = REPLICA_SETS, _selector(labels.get("servingName"), labels.get("servingVersion"))
    else:
        makers, selector = STATEFUL_SETS, f"{_GROUPS_NAME}={name_of(found.body)}"
    about = [found.body, *found.pods]
    with suppress(ForbiddenError):  # without this right there are fewer events
        about += cluster.list_all(makers, namespace, labels=selector)
    uids = frozenset(item["metadata"]["uid"] for item in about)
    server = replace(server_record(found), events=events_of(cluster.list_all(EVENTS, namespace), uids))
    return replace(server, reason=server.reason or _reason_of_events(server))


def _reason_of_events(server: Server) -> str | None:
    """Where neither conditions nor pods tell why instances are missing, events do: a quota, a refused pod."""
    if server.available >= server.desired or any(item.reason for item in server.instances):
        return None
    warning = next((event for event in reversed(server.events) if event.kind == "Warning"), None)
    return None if warning is None else f"{warning.source}: {warning.reason}: {warning.message}"


def _key(item: Object) -> _Key:
    labels = labels_of(item)
    return item["metadata"].get("namespace", ""), labels.get("servingName", ""), labels.get("servingVersion", "")


def _in_order(pods: Sequence[Object]) -> list[Object]:
    return sorted(pods, key=lambda pod: (count(labels_of(pod).get(_INDEX, "0")), name_of(pod)))


def server_record(found: FoundServer) -> Server:
    """A server as its objects tell it."""
    body, status = found.body, found.body.get("status") or {}
    labels, desired = labels_of(body), body["spec"].get("replicas", 1)
    grouped = found.resource == LEADER_WORKER_SETS
    return Server(
        name=labels.get("servingName") or name_of(body),
        namespace=body["metadata"]["namespace"],
        version=labels.get("servingVersion", ""),
        desired=desired,
        available=status.get("readyReplicas" if grouped else "availableReplicas", 0),
        address=_address(found.service),
        ports=_ports(found.service),
        gpus=desired * sum(number * pod_gpus(item["spec"]) for number, item in templates(body)),
        created=created(body),
        instances=[instance(pod, chief=labels_of(pod).get(_INDEX) == "0") for pod in found.pods],
        reason=_refusal(body),
    )


def _refusal(body: Object) -> str | None:
    """What refuses a Deployment's pods, such as a quota or the standard of its namespace: there is no pod to tell."""
    failure = true_condition(body, "ReplicaFailure")
    return None if failure is None else f"{failure.get('reason')}: {failure.get('message')}"


def templates(body: Object) -> list[tuple[int, dict[str, Any]]]:
    """Templates of a replica's pods, and how many of each it has."""
    group = body["spec"].get("leaderWorkerTemplate")
    if group is None:
        return [(1, body["spec"]["template"])]
    workers, leader = group["workerTemplate"], group.get("leaderTemplate")
    size = group.get("size", 1)
    return [(1, leader), (size - 1, workers)] if leader else [(size, workers)]


def _address(service: Object | None) -> str | None:
    if service is None:
        return None
    outside = ((service.get("status") or {}).get("loadBalancer") or {}).get("ingress") or [{}]
    address = outside[0].get("ip") or outside[0].get("hostname") or service["spec"].get("clusterIP")
    return None if address in (None, "", "None") else str(address)


def _ports(service: Object | None) -> dict[str, int]:
    ports = service["spec"].get("ports") or () if service else ()
    return {_ENDPOINTS[item["name"]]: item["port"] for item in ports if item.get("name") in _ENDPOINTS}
