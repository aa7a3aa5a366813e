"""A server's Deployment, Service and PodDisruptionBudget, named and labelled as Arena does it."""

import json
import math
import shlex
from collections.abc import Set as AbstractSet

from hasten.cluster.manifests.pod import (
    MANAGER,
    Object,
    Storage,
    container,
    environment,
    given,
    literal,
    merged,
    metadata,
    pod,
    storage,
)
from hasten.cluster.spec import TritonServer, pairs, record_of
from hasten.core.errors import ConfigError

SPEC = "hasten/spec"
"""Annotation of the main object."""
PODMONITORS = "podmonitors.monitoring.coreos.com"
HTTP, GRPC, METRICS = "http-serving", "grpc-serving", "http-metrics"
"""Names of the ports."""

_PROBE_PERIOD = 5
_FAREWELL = 5
"""Seconds from an instance's leaving the Service until it is terminated: clients come for as long as that."""
_LEEWAY = 10
"""Seconds from the server's own deadline until it is killed."""


def server_metadata(server: TritonServer) -> Object:
    """Metadata of the main object, with all options of the server: an update changes those, and plans again."""
    return metadata(server, server.full_name, server_labels(server), {SPEC: json.dumps(record_of(server))})


def server_labels(server: TritonServer) -> dict[str, str]:
    """Arena's labels."""
    return {**selector_labels(server), "release": f"{server.name}-{server.version}"}


def selector_labels(server: TritonServer) -> dict[str, str]:
    """What its pods have, and no other's."""
    return {
        "app": "tritoninferenceserver",
        "servingName": server.name,
        "servingVersion": server.version,
        "servingType": "triton-serving",
    }


def serving_labels(server: TritonServer) -> dict[str, str]:
    """What those of its pods have that answer requests: of a group of nodes, the first."""
    leads = {"leaderworkerset.sigs.k8s.io/worker-index": "0"} if server.multinode > 1 else {}
    return {**selector_labels(server), **leads}


def check_server(server: TritonServer) -> None:
    """ConfigError for options that cannot hold together."""
    if server.autoscale is None:
        if server.prometheus is not None or server.autoscale_by != "cpu":
            raise ConfigError("--autoscale-by and --prometheus need --autoscale MIN:MAX")
        return
    least, _ = server.scale_limits()
    if server.replicas != 1:
        raise ConfigError("--autoscale decides on the number of replicas: leave --replicas out")
    if least == 0:
        raise ConfigError("--autoscale: MIN must be at least 1, for without a server nothing shows that one is needed")
    if server.autoscale_by == "cpu" and (server.prometheus is not None or not server.cpu):
        raise ConfigError("--autoscale-by cpu needs --cpu, which is what the use is measured by, and no --prometheus")
    if server.autoscale_by == "queue" and not (server.prometheus and server.allow_metrics):
        raise ConfigError("--autoscale-by queue needs --allow-metrics and --prometheus ADDRESS, which has them")


def may_have_several(server: TritonServer) -> bool:
    """Whether there can be more replicas than one."""
    return server.replicas > 1 or (server.autoscale is not None and server.scale_limits()[1] > 1)


def deployment(server: TritonServer, crds: AbstractSet[str]) -> Object:
    """The replicas, each on one node."""
    # A new instance is ready before an old one goes, unless both would want the same port of a node.
    surge = 0 if server.host_network else 1
    spec = {
        **replicas(server),
        "selector": {"matchLabels": selector_labels(server)},
        "strategy": {"type": "RollingUpdate", "rollingUpdate": {"maxSurge": surge, "maxUnavailable": 1 - surge}},
        "progressDeadlineSeconds": max(600, server.startup_timeout + 60),
        "template": pod_template(server, crds),
    }
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": server_metadata(server),
        "spec": spec,
    }


def replicas(server: TritonServer) -> Object:
    """The field, which is left to the autoscaler where there is one."""
    return {} if server.autoscale is not None else {"replicas": server.replicas}


def pod_template(server: TritonServer, crds: AbstractSet[str], *variables: Object) -> Object:
    """A pod that answers requests."""
    held = storage(server)
    main = server_container(server, held, *variables, serves=True)
    spread = {
        "maxSkew": 1,
        "topologyKey": "kubernetes.io/hostname",
        "whenUnsatisfiable": "ScheduleAnyway",
        "labelSelector": {"matchLabels": selector_labels(server)},
    }
    return {
        "metadata": pod_metadata(server, scrape_annotations(server, crds)),
        "spec": pod(
            server,
            main,
            held.volumes,
            terminationGracePeriodSeconds=grace_seconds(server),
            **given(topologySpreadConstraints=[spread] if may_have_several(server) else None),
        ),
    }


def grace_seconds(server: TritonServer) -> int:
    """Seconds from the word to end until a pod is killed."""
    return _FAREWELL + server.exit_timeout + _LEEWAY


def pod_metadata(server: TritonServer, annotations: dict[str, str]) -> Object:
    """Labels and annotations of its pods."""
    labels = {**server_labels(server), "app.kubernetes.io/managed-by": MANAGER}
    return {
        "labels": merged(labels, server.label, "--label"),
        **given(annotations=merged(annotations, server.annotation, "--annotation")),
    }


def scrape_annotations(server: TritonServer, crds: AbstractSet[str]) -> dict[str, str]:
    """What a Prometheus without the operator goes by."""
    if not server.allow_metrics or PODMONITORS in crds:
        return {}
    return {
        "prometheus.io/scrape": "true",
        "prometheus.io/port": str(server.metrics_port),
        "prometheus.io/path": "/metrics",
    }


def server_container(server: TritonServer, held: Storage, *variables: Object, serves: bool) -> Object:
    """The container; one that serves has ports and probes, and time to say goodbye."""
    ports = [(HTTP, server.http_port), (GRPC, server.grpc_port)]
    ports += [(METRICS, server.metrics_port)] if server.allow_metrics else []
    front = {
        "lifecycle": {"preStop": {"sleep": {"seconds": _FAREWELL}}},
        "ports": [{"name": name, "containerPort": port} for name, port in ports],
        **_probes(server),
    }
    return container(
        server,
        "triton",
        ["sh", "-c", literal(server_command(server))],
        environment(server, *_variables(server), *variables),
        held,
        **(front if serves else {}),
    )


def _variables(server: TritonServer) -> list[Object]:
    variables: list[Object] = []
    if server.data_subpath_expr:  # what expressions are made of
        for name, field in (("POD_NAME", "metadata.name"), ("POD_NAMESPACE", "metadata.namespace")):
            variables.append({"name": name, "valueFrom": {"fieldRef": {"fieldPath": field}}})
    for name, secret in pairs(server.env_from_secret, "--env-from-secret").items():
        variables.append({"name": name, "valueFrom": {"secretKeyRef": {"name": secret, "key": name}}})
    return variables


def _probes(server: TritonServer) -> Object:
    """Loading has its time; only then does not being ready take an instance out, and not being alive end it."""
    ready = {"httpGet": {"path": "/v2/health/ready", "port": HTTP}, "periodSeconds": _PROBE_PERIOD, "timeoutSeconds": 5}
    alive = {"httpGet": {"path": "/v2/health/live", "port": HTTP}, "periodSeconds": 10, "timeoutSeconds": 10}
    return {
        "startupProbe": {**ready, "failureThreshold": math.ceil(server.startup_timeout / _PROBE_PERIOD)},
        "readinessProbe": {**ready, "failureThreshold": 3},
        "livenessProbe": {**alive, "failureThreshold": 6},
    }


def server_command(server: TritonServer) -> str:
    """The server's command line for a shell, which the server replaces so that signals reach it."""
    program = ["hasten", "serve"] if server.runtime == "hasten" else ["tritonserver"]
    options = [f"--model-repository={server.model_repository}"]
    options += [f"--{name}-port={port}" for name, port in server.ports.items()]
    options += ["--http-address=0.0.0.0"] if server.runtime == "hasten" else []  # a pod's clients are elsewhere
    options += [f"--allow-metrics={str(server.allow_metrics).lower()}", f"--exit-timeout-secs={server.exit_timeout}"]
    if server.load_model:
        options += ["--model-control-mode=explicit", *(f"--load-model={name}" for name in server.load_model)]
    words = ["exec", *program, *options]
    return " ".join([shlex.join(words), *([server.extend_command] if server.extend_command else [])])


def service(server: TritonServer) -> Object:
    """The Service. One that is reachable from outside leaves the metrics out: they ask for no key."""
    ports = [(HTTP, server.http_port), (GRPC, server.grpc_port)]
    if server.allow_metrics and not server.expose_service:
        ports.append((METRICS, server.metrics_port))
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": metadata(server, server.full_name, server_labels(server)),
        "spec": {
            "type": "LoadBalancer" if server.expose_service else "ClusterIP",
            "selector": serving_labels(server),
            "ports": [{"name": name, "port": port, "targetPort": name} for name, port in ports],
        },
    }


def disruption_budgets(server: TritonServer) -> list[Object]:
    """With several replicas, nodes are drained one replica at a time."""
    if not may_have_several(server):
        return []
    return [
        {
            "apiVersion": "policy/v1",
            "kind": "PodDisruptionBudget",
            "metadata": metadata(server, server.full_name, server_labels(server)),
            "spec": {
                "maxUnavailable": 1,
                "selector": {"matchLabels": serving_labels(server)},
                "unhealthyPodEvictionPolicy": "AlwaysAllow",
            },
        }
    ]
