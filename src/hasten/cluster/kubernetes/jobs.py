"""Training jobs in a cluster: the Kubeflow training operator's PyTorchJobs, Kubeflow Trainer's TrainJobs, Indexed Jobs.

What their controllers write: `status.conditions`, and labels on the pods that they make for a job.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from hasten.cluster.backend import PYTORCHJOB, Event, Instance, Job, Status
from hasten.cluster.kubernetes.client import Cluster
from hasten.cluster.kubernetes.errors import ForbiddenError, MissingKindError
from hasten.cluster.kubernetes.records import (
    accelerators,
    count,
    created,
    events_of,
    instance,
    moment,
    newest_first,
    pod_gpus,
    true_condition,
)
from hasten.cluster.kubernetes.resources import (
    EVENTS,
    JOBS,
    MANAGED_BY,
    PODS,
    PYTORCH_JOBS,
    TRAIN_JOBS,
    Object,
    Resource,
    labels_of,
    name_of,
)
from hasten.cluster.manifests.pod import MANAGER
from hasten.core.errors import HastenError, NotFoundError

_INDEX = "batch.kubernetes.io/job-completion-index"


@dataclass(frozen=True)
class _Kind:
    """A kind of training job, and how its operator labels pods."""

    resource: Resource
    trainer: str
    job_label: str
    role_label: str
    index_label: str
    succeeded: str
    own_label: str | None = None
    """A label, NAME=VALUE, of those that are training jobs, where others make objects of this kind too."""

    def has(self, body: Object) -> bool:
        """Whether an object is a training job."""
        name, _, value = (self.own_label or "").partition("=")
        return not name or labels_of(body).get(name) == value


_KINDS = (
    _Kind(
        PYTORCH_JOBS,
        PYTORCHJOB,
        "training.kubeflow.org/job-name",
        "training.kubeflow.org/replica-type",
        "training.kubeflow.org/replica-index",
        "Succeeded",
    ),
    _Kind(
        TRAIN_JOBS,
        "TRAINJOB",
        "jobset.sigs.k8s.io/jobset-name",
        "jobset.sigs.k8s.io/replicatedjob-name",
        _INDEX,
        "Complete",
    ),
    _Kind(
        JOBS,
        "JOB",
        "batch.kubernetes.io/job-name",
        "",
        _INDEX,
        "Complete",
        f"{MANAGED_BY}={MANAGER}",
    ),
)
_ROLES = ("master", "node", "worker")
"""Roles of pods whose first one is the job's chief, the first role that there is."""


@dataclass(frozen=True)
class FoundJob:
    """A job with its pods, the chief first."""

    kind: _Kind
    body: Object
    pods: Sequence[Object]

    @property
    def resource(self) -> Resource:
        """Kind of its object."""
        return self.kind.resource


def list_jobs(cluster: Cluster, namespace: str | None) -> list[Job]:
    """All training jobs, newest first."""
    found = []
    errors: dict[_Kind, HastenError] = {}
    for kind in _KINDS:
        try:
            found += _jobs_of(cluster, kind, namespace)
        except (MissingKindError, ForbiddenError) as error:
            errors[kind] = _clearest(cluster, kind, error)
    if not found:
        _raise_of_operators(errors)
    if not found and namespace is not None:
        cluster.check_namespace(namespace)
    return newest_first(map(job_record, found))


def _raise_of_operators(errors: Mapping[_Kind, HastenError]) -> None:
    """Raise the first error where no kind that has an operator could be looked at: nothing found may mean anything."""
    operators = [kind for kind in _KINDS if kind.own_label is None]
    if all(kind in errors for kind in operators):
        raise errors[operators[0]]


def _clearest(
    cluster: Cluster, kind: _Kind, error: MissingKindError | ForbiddenError
) -> MissingKindError | ForbiddenError:
    """Rights are checked before the server looks whether it knows a kind: a kind that it lacks is the better answer."""
    if isinstance(error, ForbiddenError):
        try:
            cluster.resource_of({"apiVersion": kind.resource.api_version, "kind": kind.resource.kind})
        except MissingKindError as missing:
            return missing
    return error


def _jobs_of(cluster: Cluster, kind: _Kind, namespace: str | None) -> list[FoundJob]:
    bodies = cluster.list_all(kind.resource, namespace, labels=kind.own_label or "")
    if not bodies:
        return []
    pods = defaultdict(list)
    labels = ",".join(filter(None, (kind.job_label, kind.own_label)))
    for pod in cluster.list_all(PODS, namespace, labels=labels):
        metadata = pod["metadata"]
        pods[metadata["namespace"], metadata["labels"][kind.job_label]].append(pod)
    return [
        FoundJob(kind, item, _in_order(kind, pods[item["metadata"]["namespace"], name_of(item)])) for item in bodies
    ]


def find_job(cluster: Cluster, name: str, namespace: str) -> FoundJob:
    """A job by its name; NotFoundError where there is none."""
    errors: dict[_Kind, HastenError] = {}
    for kind in _KINDS:
        try:
            body = cluster.find(kind.resource, namespace, name)
        except (MissingKindError, ForbiddenError) as error:
            errors[kind] = _clearest(cluster, kind, error)
            continue
        if body is not None and kind.has(body):
            pods = cluster.list_all(PODS, namespace, labels=f"{kind.job_label}={name}")
            return FoundJob(kind, body, _in_order(kind, pods))
    _raise_of_operators(errors)
    cluster.check_namespace(namespace)
    raise NotFoundError(f"there is no training job {name} in namespace {namespace}: see `hasten cluster list`")


def job_with_events(cluster: Cluster, found: FoundJob) -> Job:
    """A job with all that happened to it and to its pods."""
    uids = frozenset(item["metadata"]["uid"] for item in (found.body, *found.pods))
    events = events_of(cluster.list_all(EVENTS, found.body["metadata"]["namespace"]), uids)
    job = job_record(found)
    return replace(job, events=events, reason=_reason_with_events(job, found, events))


def _in_order(kind: _Kind, pods: Sequence[Object]) -> list[Object]:
    def position(pod: Object) -> tuple[int, int, str]:
        labels = labels_of(pod)
        role = labels.get(kind.role_label, "").lower()
        return (
            _ROLES.index(role) if role in _ROLES else len(_ROLES),
            count(labels.get(kind.index_label, "")),
            name_of(pod),
        )

    return sorted(pods, key=position)


def job_record(found: FoundJob) -> Job:
    """A job as its object and pods tell it."""
    body, status = found.body, found.body.get("status") or {}
    instances = [instance(pod, chief=number == 0) for number, pod in enumerate(found.pods)]
    state = _state(found, instances)
    return Job(
        name=name_of(body),
        namespace=body["metadata"]["namespace"],
        status=state,
        created=created(body),
        started=moment(status.get("startTime")) or _time_of(body, "Running"),
        ended=(moment(status.get("completionTime")) or _time_of(body, found.kind.succeeded, "Failed"))
        if state.ended
        else None,
        trainer=found.kind.trainer,
        priority=_priority(body),
        gpus=requested_gpus(body),
        instances=instances,
        reason=_reason(state, body, instances),
    )


def _state(found: FoundJob, instances: Sequence[Instance]) -> Status:
    """The first that holds of Succeeded, Failed, Running, Queuing; of all but PyTorchJobs, pods say that they run."""
    held = true_condition(found.body, found.kind.succeeded, "Failed", "Running", "Queuing")
    if held is not None:
        names = {found.kind.succeeded: Status.SUCCEEDED, "Failed": Status.FAILED, "Running": Status.RUNNING}
        return names.get(held["type"], Status.QUEUING)
    runs = found.resource != PYTORCH_JOBS and any(item.status is Status.RUNNING for item in instances)
    return Status.RUNNING if runs else Status.PENDING


def _time_of(body: Object, *conditions: str) -> Any:
    held = true_condition(body, *conditions)
    return moment(held.get("lastTransitionTime")) if held else None


def _templates(body: Object) -> list[tuple[int, dict[str, Any]]]:
    """How many pods are made of each template at a time."""
    spec = body.get("spec") or {}
    if spec.get("template"):
        return [(spec.get("parallelism") or 1, spec["template"].get("spec") or {})]
    replicas = spec.get("pytorchReplicaSpecs") or {}
    specs = [(item.get("replicas"), (item.get("template") or {}).get("spec") or {}) for item in replicas.values()]
    return [(1 if number is None else number, spec) for number, spec in specs]


def requested_gpus(body: Object) -> int:
    """GPUs that a job asks for, of all its instances together."""
    trainer = (body.get("spec") or {}).get("trainer")
    if trainer is not None:
        resources = trainer.get("resourcesPerNode") or {}
        each = accelerators(resources.get("limits") or resources.get("requests"))
        return int(trainer.get("numNodes") or 1) * each
    return sum(number * pod_gpus(template) for number, template in _templates(body))


def _priority(body: Object) -> str | None:
    policy = ((body.get("spec") or {}).get("runPolicy") or {}).get("schedulingPolicy") or {}
    named = [template.get("priorityClassName") for _, template in _templates(body)]
    return policy.get("priorityClass") or next((item for item in named if item), None)


def _reason(state: Status, body: Object, instances: Sequence[Instance]) -> str | None:
    if state in (Status.RUNNING, Status.SUCCEEDED):
        return None
    reason = next((f"{item.name}: {item.reason}" for item in instances if item.reason), None)
    if state is Status.FAILED:
        failed = true_condition(body, "Failed")
        return reason or (failed.get("message") if failed else None)
    waiting = true_condition(body, "Suspended", "Queuing")
    if waiting and not instances:
        return f"{waiting['type'].lower()}: {waiting.get('message') or waiting.get('reason') or 'waits for its turn'}"
    return reason or ("its pods are being started" if instances else "there are no pods yet")


def _reason_with_events(job: Job, found: FoundJob, events: Sequence[Event]) -> str | None:
    """Where pods do not say why they wait, events do: a quota, a volume that cannot be mounted."""
    has_reasons = any(item.reason for item in job.instances)
    if job.status not in (Status.PENDING, Status.QUEUING) or has_reasons:
        return job.reason
    warning = next((event for event in reversed(events) if event.kind == "Warning"), None)
    if warning is not None:
        return f"{warning.source}: {warning.reason}: {warning.message}"
    untouched = not job.instances and not (found.body.get("status") or {}).get("conditions")
    if untouched:
        return f"there are no pods yet, and no operator has taken up this {found.resource.kind}: does it run?"
    return job.reason
