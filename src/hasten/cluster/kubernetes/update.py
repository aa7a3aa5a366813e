"""`serve update triton`: the options of a server are changed and its main object is planned again.

Only the fields of the new plan that the update names are applied: the rest of a server stays as it is, whatever created
or changed it since (an autoscaler, kubectl, an earlier version of hasten with other plans).
"""

from collections.abc import Iterator
from collections.abc import Set as AbstractSet
from contextlib import suppress

from hasten.cluster.backend import ServerUpdate
from hasten.cluster.kubernetes.apply import change
from hasten.cluster.kubernetes.client import Cluster
from hasten.cluster.kubernetes.resources import Object, name_of
from hasten.cluster.kubernetes.servers import FoundServer, templates
from hasten.cluster.manifests.objects import CRDS, main_object, owned
from hasten.cluster.manifests.pod import GPU
from hasten.cluster.manifests.server import SPEC, disruption_budgets
from hasten.cluster.spec import TritonServer, pairs, server_of
from hasten.core.errors import ExistsError, UnsupportedError
from hasten.core.text import from_json

_TEMPLATES = (("template",), ("leaderWorkerTemplate", "leaderTemplate"), ("leaderWorkerTemplate", "workerTemplate"))


def update_server(cluster: Cluster, found: FoundServer, update: ServerUpdate) -> None:
    """Change what the update names. ClusterError where somebody else manages it."""
    namespace, name = found.body["metadata"]["namespace"], name_of(found.body)
    change(cluster, found.resource, namespace, name, lambda managed, live: _edit(managed, live, update))
    if update.replicas is not None:
        owner = {**found.body, "apiVersion": found.resource.api_version, "kind": found.resource.kind}
        for budget in owned(disruption_budgets(update.applied_to(_server(found.body))), owner):
            with suppress(ExistsError):
                cluster.create(budget)


def _server(live: Object) -> TritonServer:
    """The server that an object was made for; UnsupportedError where that is not known."""
    record = (live["metadata"].get("annotations") or {}).get(SPEC)
    if record is None:
        raise UnsupportedError(
            f"{name_of(live)} has no annotation {SPEC}: hasten, or this version of it, did not create this server and "
            "cannot change it; use what created it, or serve another version"
        )
    try:
        return server_of(from_json(record))
    except (TypeError, ValueError, AttributeError) as error:
        raise UnsupportedError(
            f"the annotation {SPEC} of {name_of(live)} is of another version of hasten ({error}): use that one, or "
            "serve another version"
        ) from error


def _edit(managed: Object, live: Object, update: ServerUpdate) -> None:
    """Change the fields that are to be applied; `live` is the object as it is."""
    server = _server(live)
    before, plan = (main_object(each, set(CRDS)) for each in (server, update.applied_to(server)))
    _copy(plan, managed, "metadata", "annotations", SPEC)
    if update.replicas is not None:
        _copy(plan, managed, "spec", "replicas")
    metadata = [("labels", name) for name in pairs(update.label, "--label")]
    metadata += [("annotations", name) for name in pairs(update.annotation, "--annotation")]
    for path in metadata:
        _copy(plan, managed, "metadata", *path)
    for (planned, part), (_, old) in zip(_templates(plan, managed), templates(before), strict=True):
        for path in metadata:
            _copy(planned, part, "metadata", *path)
        _edit_container(_main(old), _main(planned), part, update)


def _copy(plan: Object, managed: Object, *path: str) -> None:
    """Give a field its planned value; one that is not in the plan is not managed any more."""
    first, *rest = path
    if first not in plan:
        managed.pop(first, None)
    elif rest:
        _copy(plan[first], managed.setdefault(first, {}), *rest)
    else:
        managed[first] = plan[first]


def _templates(plan: Object, managed: Object) -> Iterator[tuple[Object, Object]]:
    """The templates of a plan, each with what is managed of it."""
    for path in _TEMPLATES:
        planned, part = plan["spec"], managed.setdefault("spec", {})
        if path[0] in planned:
            for step in path:
                planned, part = planned[step], part.setdefault(step, {})
            yield planned, part


def _main(template: Object) -> Object:
    container: Object = template["spec"]["containers"][0]
    return container


def _edit_container(before: Object, planned: Object, template: Object, update: ServerUpdate) -> None:
    containers = template.setdefault("spec", {}).setdefault("containers", [])
    container = next((item for item in containers if item["name"] == planned["name"]), None)
    if container is None:
        container = {"name": planned["name"]}
        containers.append(container)
    if update.image is not None:
        _copy(planned, container, "image")
    for name, value in (("cpu", update.cpu), ("memory", update.memory), (GPU, update.gpus)):
        for kind in ("requests", "limits") if value is not None else ():
            _copy(planned, container, "resources", kind, name)
    if update.model_repository is not None or update.load_model or update.extend_command is not None:
        _copy(planned, container, "command")
    # some follow from the number of GPUs
    changed = {
        item["name"]
        for item in [*before["env"], *planned["env"]]
        if (item in before["env"]) != (item in planned["env"])
    }
    if names := changed | set(pairs(update.env, "--env")):
        container["env"] = _merged(container.get("env", []), planned["env"], names)


def _merged(managed: list[Object], planned: list[Object], names: AbstractSet[str]) -> list[Object]:
    """Variables of these names as they are planned: in their old position, new ones behind the others."""
    wanted = {item["name"]: item for item in planned if item["name"] in names}
    kept = [wanted.pop(item["name"], None) if item["name"] in names else item for item in managed]
    return [item for item in kept if item is not None] + list(wanted.values())
