"""Monitoring and scaling of a server: PodMonitor, autoscalers, InferencePool."""

from collections.abc import Set as AbstractSet
from typing import Any

from hasten.cluster.manifests.config import require_crd
from hasten.cluster.manifests.pod import Object, metadata
from hasten.cluster.manifests.server import METRICS, PODMONITORS, server_labels, serving_labels
from hasten.cluster.spec import LARGEST_PORT, TritonServer, is_number
from hasten.core.errors import ConfigError

_BUSY_PERCENT = 80
"""Use of the cores that the HPA keeps to."""
_WAITING = 4
"""Waiting requests of a replica that KEDA keeps to."""
_WAITING_METRIC = {"hasten": "hasten_requests_waiting", "tritonserver": "nv_inference_pending_request_count"}
_PICKER_PORT = 9002
"""Where an endpoint picker listens, by convention."""


def pod_monitors(server: TritonServer, crds: AbstractSet[str]) -> list[Object]:
    """With --allow-metrics, for the Prometheus operator where the cluster has it."""
    if not server.allow_metrics or PODMONITORS not in crds:
        return []
    spec = {
        "selector": {"matchLabels": serving_labels(server)},
        "podMetricsEndpoints": [{"port": METRICS, "path": "/metrics", "interval": "15s"}],
    }
    return [_object(server, "monitoring.coreos.com/v1", "PodMonitor", spec)]


def scalers(server: TritonServer, crds: AbstractSet[str]) -> list[Object]:
    """With --autoscale, an HPA that looks at the cores, or KEDA that looks at the queues."""
    if server.autoscale is None:
        return []
    if server.autoscale_by == "queue":
        require_crd(crds, "scaledobjects.keda.sh", "--autoscale-by queue")
        return [_scaled_object(server)]
    least, most = server.scale_limits()
    cores = {"name": "cpu", "target": {"type": "Utilization", "averageUtilization": _BUSY_PERCENT}}
    spec = {
        "scaleTargetRef": _target(server),
        "minReplicas": least,
        "maxReplicas": most,
        "metrics": [{"type": "Resource", "resource": cores}],
    }
    return [_object(server, "autoscaling/v2", "HorizontalPodAutoscaler", spec)]


def _scaled_object(server: TritonServer) -> Object:
    least, most = server.scale_limits()
    metric = _WAITING_METRIC[server.runtime]
    pods = f'namespace="{server.namespace}",pod=~"{server.full_name}-.*"'
    trigger = {
        "type": "prometheus",
        "metadata": {
            "serverAddress": server.prometheus,
            "query": f"sum({metric}{{{pods}}})",
            "threshold": str(_WAITING),
        },
    }
    spec = {
        "scaleTargetRef": _target(server),
        "pollingInterval": 15,
        "minReplicaCount": least,
        "maxReplicaCount": most,
        "triggers": [trigger],
    }
    return _object(server, "keda.sh/v1alpha1", "ScaledObject", spec)


def inference_pools(server: TritonServer, crds: AbstractSet[str]) -> list[Object]:
    """With --gateway, the pool of its instances that a gateway chooses from by asking an endpoint picker."""
    if server.gateway is None:
        return []
    require_crd(crds, "inferencepools.inference.networking.k8s.io", "--gateway")
    name, _, port = server.gateway.partition(":")
    if not name or (port and not (is_number(port) and 0 < int(port) <= LARGEST_PORT)):
        raise ConfigError(f"--gateway {server.gateway!r} is not SERVICE or SERVICE:PORT of an endpoint picker")
    spec = {
        "selector": {"matchLabels": serving_labels(server)},
        "targetPorts": [{"number": server.http_port}],
        "endpointPickerRef": {"name": name, "port": {"number": int(port or _PICKER_PORT)}},
    }
    return [_object(server, "inference.networking.k8s.io/v1", "InferencePool", spec)]


def _target(server: TritonServer) -> Object:
    if server.multinode > 1:
        return {"apiVersion": "leaderworkerset.x-k8s.io/v1", "kind": "LeaderWorkerSet", "name": server.full_name}
    return {"apiVersion": "apps/v1", "kind": "Deployment", "name": server.full_name}


def _object(server: TritonServer, version: str, kind: str, spec: dict[str, Any]) -> Object:
    named = metadata(server, server.full_name, server_labels(server))
    return {"apiVersion": version, "kind": kind, "metadata": named, "spec": spec}
