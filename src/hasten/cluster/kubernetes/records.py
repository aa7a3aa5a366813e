"""Pods, nodes and events of the API, as the records of a backend.

Phases, conditions and reasons of waiting: kubernetes.io/docs/concepts/workloads/pods/pod-lifecycle.
"""

from collections.abc import Iterable, Sequence
from datetime import datetime
from typing import Any

from hasten.cluster.backend import Event, Instance, Status
from hasten.cluster.kubernetes.resources import Object, name_of

_ACCELERATORS = frozenset(
    (
        "nvidia.com/gpu",
        "nvidia.com/gpu.shared",
        "amd.com/gpu",
        "aliyun.com/gpu",
        "aws.amazon.com/neuron",
        "cambricon.com/mlu",
        "google.com/tpu",
        "habana.ai/gaudi",
        "huawei.com/Ascend910",
        "hygon.com/dcu",
    )
)
_ACCELERATOR_FAMILIES = ("nvidia.com/mig-", "gpu.intel.com/i915", "gpu.intel.com/xe", "huawei.com/Ascend")
_PHASES = {
    "Pending": Status.PENDING,
    "Running": Status.RUNNING,
    "Succeeded": Status.SUCCEEDED,
    "Failed": Status.FAILED,
    # the node does not answer: nobody knows better than that it ran
    "Unknown": Status.RUNNING,
}
_STARTING = frozenset(("ContainerCreating", "PodInitializing"))


def moment(text: str | None) -> datetime | None:
    """A time of the API."""
    return datetime.fromisoformat(text) if text else None


def created(item: Object) -> datetime:
    """When an object was made."""
    return datetime.fromisoformat(item["metadata"]["creationTimestamp"])


def count(quantity: Any) -> int:
    """A number of devices, which have no units smaller than one."""
    text = str(quantity)
    return int(text) if text.isdecimal() else 0


def accelerators(resources: dict[str, Any] | None) -> int:
    """How many GPUs, or what stands for them, are among resources."""
    return sum(
        count(number)
        for name, number in (resources or {}).items()
        if name in _ACCELERATORS or name.startswith(_ACCELERATOR_FAMILIES)
    )


def pod_gpus(spec: dict[str, Any] | None) -> int:
    """GPUs of a pod: those of its containers; one that runs before them may use theirs."""
    return sum(_container_gpus(entry) for entry in (spec or {}).get("containers") or ())


def _container_gpus(container: dict[str, Any]) -> int:
    resources = container.get("resources")
    return accelerators(resources.get("limits") or resources.get("requests")) if resources else 0


def instance(pod: Object, *, chief: bool = False) -> Instance:
    """A pod as an instance."""
    status = pod.get("status") or {}
    containers: Sequence[dict[str, Any]] = status.get("containerStatuses") or ()
    phase = _PHASES.get(status.get("phase", "Pending"), Status.PENDING)
    return Instance(
        name=name_of(pod),
        status=phase,
        created=created(pod),
        ended=_ended(containers) if phase.ended else None,
        is_chief=chief,
        gpus=pod_gpus(pod.get("spec")),
        node=status.get("hostIP"),
        ready=bool(containers) and all(entry.get("ready", False) for entry in containers),
        restarts=sum(entry.get("restartCount", 0) for entry in containers),
        reason=_why(pod, phase, status),
    )


def _why(pod: Object, phase: Status, status: dict[str, Any]) -> str | None:
    if phase.ended is False and pod["metadata"].get("deletionTimestamp"):
        return "it is being deleted"
    return None if phase is Status.SUCCEEDED else pod_reason(status)


def _ended(containers: Iterable[dict[str, Any]]) -> datetime | None:
    ends = [entry.get("state", {}).get("terminated", {}).get("finishedAt") for entry in containers]
    return max((end for end in map(moment, ends) if end), default=None)


def pod_reason(status: dict[str, Any]) -> str | None:
    """Why a pod does not run as it should; None if nothing is known or all is well."""
    phase = status.get("phase", "Pending")
    if phase == "Unknown":
        return "its node does not answer"
    if phase == "Failed" and status.get("reason"):
        return _joined(status["reason"], status.get("message"))
    for entry in [*(status.get("initContainerStatuses") or ()), *(status.get("containerStatuses") or ())]:
        if reason := _container_reason(entry):
            return reason
    return _scheduling_reason(status) if phase == "Pending" else None


def _container_reason(entry: dict[str, Any]) -> str | None:
    state = entry.get("state") or {}
    waiting, terminated = state.get("waiting"), state.get("terminated")
    if waiting and waiting.get("reason") not in (*_STARTING, None):
        last = (entry.get("lastState") or {}).get("terminated")
        return _joined(waiting["reason"], waiting.get("message")) + (f"; before: {_end(entry, last)}" if last else "")
    if terminated and terminated.get("exitCode"):
        return _end(entry, terminated)
    return None


def _end(entry: dict[str, Any], terminated: dict[str, Any]) -> str:
    end = f"container {entry['name']} ended with status {terminated.get('exitCode')}"
    reason = terminated.get("reason")
    return _joined(end + (f" ({reason})" if reason not in (None, "Error") else ""), terminated.get("message"))


def _scheduling_reason(status: dict[str, Any]) -> str | None:
    for condition in status.get("conditions") or ():
        if condition.get("type") == "PodScheduled" and condition.get("status") == "False":
            message = str(condition.get("message") or "")
            advice = ""
            if "persistentvolumeclaim" in message and "not found" in message:
                advice = "; create the volume with `hasten cluster data create`, or mount another"
            return _joined(condition.get("reason") or "Unschedulable", message) + advice
    return None


def _joined(reason: str, message: str | None) -> str:
    return f"{reason}: {message.strip()}" if message and message.strip() else reason


def true_condition(item: Object, *types: str) -> dict[str, Any] | None:
    """The first of an object's conditions of these types, in their order, that holds."""
    conditions = {entry["type"]: entry for entry in (item.get("status") or {}).get("conditions") or ()}
    held = (conditions[name] for name in types if name in conditions)
    return next((entry for entry in held if entry.get("status") == "True"), None)


def events_of(events: Iterable[Object], uids: frozenset[str]) -> list[Event]:
    """Events of some objects, the oldest first."""
    found = [_event(entry) for entry in events if entry.get("involvedObject", {}).get("uid") in uids]
    return sorted(found, key=lambda event: event.time)


def _event(entry: Object) -> Event:
    about = entry["involvedObject"]
    time = entry.get("lastTimestamp") or (entry.get("series") or {}).get("lastObservedTime") or entry.get("eventTime")
    times = (entry.get("series") or {}).get("count") or entry.get("count") or 1
    return Event(
        time=moment(time) or created(entry),
        kind=entry.get("type") or "Normal",
        reason=entry.get("reason") or "",
        source=f"{about.get('kind', 'object').lower()}/{about.get('name', '')}",
        message=(entry.get("message") or "").strip() + (f" ({times} times)" if times > 1 else ""),
    )


def newest_first(records: Iterable[Any]) -> list[Any]:
    """Records by the time of their making, and by name where that is the same."""
    return sorted(records, key=lambda entry: (-entry.created.timestamp(), entry.namespace, entry.name))
