"""Kinds of objects and where an API server keeps them."""

from dataclasses import dataclass
from typing import Any

from hasten.cluster.spec import checked_namespace, checked_object_name

Object = dict[str, Any]
"""A Kubernetes object, as JSON."""


@dataclass(frozen=True)
class Resource:
    """A kind of objects under one path of the API (kubernetes.io/docs/reference/using-api/api-concepts)."""

    api_version: str
    kind: str
    plural: str
    namespaced: bool = True

    @property
    def group(self) -> str:
        """API group; empty for the core."""
        return self.api_version.rpartition("/")[0]

    @property
    def full_name(self) -> str:
        """Plural and group, as a CustomResourceDefinition is named."""
        return f"{self.plural}.{self.group}" if self.group else self.plural

    def path(self, namespace: str | None = None, name: str | None = None, subresource: str | None = None) -> str:
        """Path of one object, or of all in a namespace, or of all there are.

        ConfigError for a name that no object can have: an empty name or a dot would be the path of all objects.
        """
        parts = [version_path(self.api_version)]
        if self.namespaced and namespace is not None:
            parts += ["namespaces", checked_namespace(namespace)]
        parts.append(self.plural)
        if name is not None:
            parts.append(checked_object_name(name, f"the name of a {self.kind},"))
        return "/".join([*parts, *([subresource] if subresource is not None else [])])


def version_path(api_version: str) -> str:
    """Path of a group and version, where discovery lists its resources."""
    return f"/apis/{api_version}" if "/" in api_version else f"/api/{api_version}"


MANAGED_BY = "app.kubernetes.io/managed-by"
"""Label of what hasten made."""
NAMESPACES = Resource("v1", "Namespace", "namespaces", namespaced=False)
NODES = Resource("v1", "Node", "nodes", namespaced=False)
PODS = Resource("v1", "Pod", "pods")
SERVICES = Resource("v1", "Service", "services")
EVENTS = Resource("v1", "Event", "events")
SECRETS = Resource("v1", "Secret", "secrets")
CLAIMS = Resource("v1", "PersistentVolumeClaim", "persistentvolumeclaims")
VOLUMES = Resource("v1", "PersistentVolume", "persistentvolumes", namespaced=False)
DEPLOYMENTS = Resource("apps/v1", "Deployment", "deployments")
REPLICA_SETS = Resource("apps/v1", "ReplicaSet", "replicasets")
STATEFUL_SETS = Resource("apps/v1", "StatefulSet", "statefulsets")
PYTORCH_JOBS = Resource("kubeflow.org/v1", "PyTorchJob", "pytorchjobs")
TRAIN_JOBS = Resource("trainer.kubeflow.org/v1alpha1", "TrainJob", "trainjobs")
JOBS = Resource("batch/v1", "Job", "jobs")
LEADER_WORKER_SETS = Resource("leaderworkerset.x-k8s.io/v1", "LeaderWorkerSet", "leaderworkersets")
SELF_REVIEWS = Resource("authentication.k8s.io/v1", "SelfSubjectReview", "selfsubjectreviews", namespaced=False)


def name_of(item: Object) -> str:
    """Name of an object."""
    return str(item["metadata"]["name"])


def labels_of(item: Object) -> dict[str, str]:
    """Labels of an object."""
    return item["metadata"].get("labels") or {}
