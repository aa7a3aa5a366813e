"""The ConfigMap of --config-file, and what several manifests need besides: CRDs by name, and who owns what."""

import base64
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from pathlib import Path
from typing import Any

from hasten.cluster.manifests.pod import Object, config_key, metadata, object_name
from hasten.cluster.spec import Workload, mounts
from hasten.core.errors import ClusterError, ConfigError

_MOST_BYTES = 1_000_000
"""Less than what a ConfigMap may hold (1 MiB), with room for its names."""

CRDS: Mapping[str, tuple[str, str]] = {
    "pytorchjobs.kubeflow.org": (
        "Kubeflow's training operator",
        "kubectl apply --server-side -k 'github.com/kubeflow/trainer/manifests/overlays/standalone?ref=v1.9.3'",
    ),
    "trainjobs.trainer.kubeflow.org": (
        "Kubeflow Trainer, and its runtimes",
        "see https://www.kubeflow.org/docs/components/trainer/operator-guides/installation/",
    ),
    "leaderworkersets.leaderworkerset.x-k8s.io": (
        "LeaderWorkerSet",
        "see https://lws.sigs.k8s.io/docs/installation/",
    ),
    "scaledobjects.keda.sh": ("KEDA", "see https://keda.sh/docs/latest/deploy/"),
    "inferencepools.inference.networking.k8s.io": (
        "the Gateway API Inference Extension",
        "see https://gateway-api-inference-extension.sigs.k8s.io/guides/",
    ),
    "podmonitors.monitoring.coreos.com": (
        "the Prometheus operator",
        "see https://prometheus-operator.dev/docs/getting-started/installation/",
    ),
}
"""What brings a CRD, and how to install that."""


def missing_crd(name: str, needed_by: str) -> ClusterError:
    """The error that names a CRD which the cluster lacks."""
    product, how = CRDS[name]
    return ClusterError(f"{needed_by} needs {product}, but this cluster has no CRD {name}; to install it: {how}")


def require_crd(crds: AbstractSet[str], name: str, needed_by: str) -> None:
    """ClusterError unless the cluster has the CRD."""
    if name not in crds:
        raise missing_crd(name, needed_by)


def config_maps(spec: Workload, labels: Mapping[str, str]) -> list[Object]:
    """One ConfigMap with all of --config-file, or none. The files are read here and now."""
    texts: dict[str, str] = {}
    others: dict[str, str] = {}
    size = 0
    for number, (source, _) in enumerate(mounts(spec.config_file, "--config-file")):
        content = _read(source)
        size += len(content)
        try:
            texts[config_key(number)] = content.decode()
        except UnicodeDecodeError:
            others[config_key(number)] = base64.b64encode(content).decode()
    if size > _MOST_BYTES:
        raise ConfigError(f"the files of --config-file have {size} bytes, more than 1 MB; put them into a volume")
    if not texts and not others:
        return []
    config_map = {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": metadata(spec, f"{object_name(spec)}-config", labels),
    }
    return [{**config_map, **({"data": texts} if texts else {}), **({"binaryData": others} if others else {})}]


def _read(path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise ConfigError(f"--config-file {path}: {error.strerror}") from None


def owned(objects: Sequence[Object], owner: Mapping[str, Any]) -> list[Object]:
    """The objects as dependents of `owner`, an object as the cluster returned it: they are deleted with it."""
    reference = {
        "apiVersion": owner["apiVersion"],
        "kind": owner["kind"],
        "name": owner["metadata"]["name"],
        "uid": owner["metadata"]["uid"],
    }
    return [{**body, "metadata": {**body["metadata"], "ownerReferences": [reference]}} for body in objects]
