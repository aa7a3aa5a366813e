"""Records of jobs, servers and instances, as commands show them."""

from collections.abc import Sequence
from datetime import UTC, datetime

from hasten.cluster.backend import Event, Instance, Job, Server, Status
from hasten.cluster.local.launch import ServerPlan
from hasten.cluster.local.plan import LOCAL_ADDRESS
from hasten.cluster.local.settle import elsewhere
from hasten.cluster.local.state import Folder, InstanceState, State
from hasten.core.errors import NotFoundError

_WORDS = {"http": "RESTFUL", "grpc": "GRPC", "metrics": "METRICS"}


def job_view(folder: Folder, state: State, *, events: bool) -> Job:
    """A job as it is."""
    return Job(
        name=folder.name,
        namespace=folder.namespace,
        status=Status(state.status),
        created=_moment(state.created),
        started=_moment_or_none(state.started),
        ended=_moment_or_none(state.ended),
        gpus=sum(instance.gpus for instance in state.instances),
        instances=[_instance(instance) for instance in state.instances],
        events=_events(state) if events else (),
        reason=f"runs on {state.host}" if not state.done and elsewhere(state) else state.reason,
    )


def server_view(folder: Folder, state: State, plan: ServerPlan, *, events: bool) -> Server:
    """A server as it is."""
    name, _, version = folder.name.partition("@")
    return Server(
        name=name,
        namespace=folder.namespace,
        version=version,
        desired=plan.replicas,
        available=sum(instance.ready for instance in state.instances),
        address=LOCAL_ADDRESS,
        ports={_WORDS[name]: port for name, port in plan.ports.items()},
        gpus=plan.replicas * plan.gpus,
        created=_moment(state.created),
        instances=[_instance(instance) for instance in state.instances],
        events=_events(state) if events else (),
        reason=f"runs on {state.host}" if not state.done and elsewhere(state) else state.reason,
    )


def _instance(state: InstanceState) -> Instance:
    """An instance; of a server's the node is the address of HTTP, by which replicas differ."""
    node = LOCAL_ADDRESS if state.pid is not None else None
    if node is not None and "http" in state.ports:
        node = f"{node}:{state.ports['http']}"
    return Instance(
        name=state.name,
        status=Status(state.status),
        created=_moment(state.created),
        ended=_moment_or_none(state.ended),
        is_chief=state.is_chief,
        gpus=state.gpus,
        node=node,
        ready=state.ready,
        restarts=state.restarts,
        reason=state.reason,
    )


def _events(state: State) -> list[Event]:
    return [Event(**{**event, "time": _moment(event["time"])}) for event in state.events]


def _moment(seconds: float) -> datetime:
    return datetime.fromtimestamp(seconds, UTC)


def _moment_or_none(seconds: float | None) -> datetime | None:
    return None if seconds is None else _moment(seconds)


def chosen_instance(state: State, name: str | None, what: str) -> InstanceState:
    """The instance that is asked for, or the chief; NotFoundError names those that there are."""
    by_name: dict[str, InstanceState] = {instance.name: instance for instance in state.instances}
    if name is None and state.instances:
        return state.instances[0]
    if name in by_name:
        return by_name[name]
    raise NotFoundError(f"{what} has no instance {name or ''}".rstrip() + f"; there are: {_listed(list(by_name))}")


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names) or "none"
