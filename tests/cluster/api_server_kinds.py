"""Kinds that the test's API server knows, and the answers `Status` by which it refuses.

kubernetes.io/docs/reference/using-api/api-concepts (groups, versions, resources, discovery),
kubernetes.io/docs/reference/kubernetes-api/common-definitions/status (Status, its reasons and causes).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

Object = dict[str, Any]
Key = tuple[str, str, str]
"""Full name of a kind, namespace, name."""


@dataclass(frozen=True)
class Kind:
    """A kind of objects and where it is served."""

    api_version: str
    kind: str
    plural: str
    namespaced: bool = True
    has_status: bool = True
    custom: bool = False

    @property
    def group(self) -> str:
        return self.api_version.rpartition("/")[0]

    @property
    def full_name(self) -> str:
        return f"{self.plural}.{self.group}" if self.group else self.plural


BUILT_IN = (
    Kind("v1", "Namespace", "namespaces", namespaced=False),
    Kind("v1", "Node", "nodes", namespaced=False),
    Kind("v1", "Pod", "pods"),
    Kind("v1", "Service", "services"),
    Kind("v1", "ConfigMap", "configmaps", has_status=False),
    Kind("v1", "Secret", "secrets", has_status=False),
    Kind("v1", "Event", "events", has_status=False),
    Kind("v1", "PersistentVolume", "persistentvolumes", namespaced=False),
    Kind("v1", "PersistentVolumeClaim", "persistentvolumeclaims"),
    Kind("apps/v1", "Deployment", "deployments"),
    Kind("apps/v1", "ReplicaSet", "replicasets"),
    Kind("apps/v1", "StatefulSet", "statefulsets"),
    Kind("batch/v1", "Job", "jobs"),
    Kind("policy/v1", "PodDisruptionBudget", "poddisruptionbudgets"),
    Kind("autoscaling/v2", "HorizontalPodAutoscaler", "horizontalpodautoscalers"),
)
CUSTOM = (
    Kind("kubeflow.org/v1", "PyTorchJob", "pytorchjobs", custom=True),
    Kind("trainer.kubeflow.org/v1alpha1", "TrainJob", "trainjobs", custom=True),
    Kind("leaderworkerset.x-k8s.io/v1", "LeaderWorkerSet", "leaderworkersets", custom=True),
    Kind("monitoring.coreos.com/v1", "PodMonitor", "podmonitors", has_status=False, custom=True),
    Kind("keda.sh/v1alpha1", "ScaledObject", "scaledobjects", custom=True),
    Kind("inference.networking.k8s.io/v1", "InferencePool", "inferencepools", custom=True),
)
BY_NAME = {kind.full_name: kind for kind in (*BUILT_IN, *CUSTOM)}
BY_KIND = {(kind.api_version, kind.kind): kind for kind in BY_NAME.values()}


class RefusedError(Exception):
    """An answer that is not a success."""

    def __init__(
        self,
        code: int,
        reason: str,
        message: str,
        *,
        details: Object | None = None,
        causes: Sequence[Object] = (),
    ) -> None:
        super().__init__(message)
        self.code = code
        self.status: Object = {
            "kind": "Status",
            "apiVersion": "v1",
            "metadata": {},
            "status": "Failure",
            "message": message,
            "reason": reason,
            "details": {**(details or {}), **({"causes": list(causes)} if causes else {})},
            "code": code,
        }


def _details(kind: Kind, name: str) -> Object:
    return {"name": name, **({"group": kind.group} if kind.group else {}), "kind": kind.plural}


def not_found(kind: Kind, name: str) -> RefusedError:
    return RefusedError(404, "NotFound", f'{kind.full_name} "{name}" not found', details=_details(kind, name))


def already_exists(kind: Kind, name: str) -> RefusedError:
    message = f'{kind.full_name} "{name}" already exists'
    return RefusedError(409, "AlreadyExists", message, details=_details(kind, name))


def changed_meanwhile(kind: Kind, name: str, why: str) -> RefusedError:
    message = f'Operation cannot be fulfilled on {kind.full_name} "{name}": {why}'
    return RefusedError(409, "Conflict", message, details=_details(kind, name))


def invalid(kind: Kind, name: str, field: str, message: str) -> RefusedError:
    cause = {"reason": "FieldValueInvalid", "message": message, "field": field}
    text = f'{kind.kind}.{kind.group} "{name}" is invalid: {field}: {message}'
    return RefusedError(422, "Invalid", text, details=_details(kind, name), causes=[cause])


def bad_request(message: str) -> RefusedError:
    return RefusedError(400, "BadRequest", message)


def forbidden(kind: Kind, name: str, message: str) -> RefusedError:
    named = f'{kind.full_name} "{name}" is forbidden' if name else f"{kind.full_name} is forbidden"
    return RefusedError(403, "Forbidden", f"{named}: {message}", details=_details(kind, name))
