"""What `serve update triton` changes in a server's object."""

import io
import shlex
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from hasten.cluster.kubernetes.apply import change
from hasten.cluster.kubernetes.client import FIELD_MANAGER, Cluster
from hasten.cluster.kubernetes.resources import DEPLOYMENTS, MANAGED_BY, Object, labels_of, name_of
from hasten.cluster.kubernetes.servers import FoundServer, templates
from hasten.cluster.manifests.multinode import check_group_name
from hasten.cluster.manifests.objects import owned
from hasten.cluster.manifests.pod import GPU, GPU_CORES, GPU_MEMORY, MANAGER, given, literal
from hasten.cluster.manifests.server import disruption_budgets, server_labels
from hasten.cluster.places import ServerUpdate
from hasten.cluster.spec import TritonServer, pairs
from hasten.core.errors import ConfigError, ExistsError, UnsupportedError

_OWN_OPTIONS = (
    "--model-repository=",
    "--http-port=",
    "--grpc-port=",
    "--metrics-port=",
    "--allow-metrics=",
    "--exit-timeout-secs=",
    "--model-control-mode=",
    "--load-model=",
)
_RANKS = "PET_NPROC_PER_NODE"
_HIDDEN_GPUS = {"name": "NVIDIA_VISIBLE_DEVICES", "value": "void"}
_GPU_FAMILIES = ("nvidia.com/", "aliyun.com/gpu")


def update_server(cluster: Cluster, found: FoundServer, update: ServerUpdate) -> None:
    """Change what the update names. ClusterError where somebody else manages it."""
    body = found.body
    namespace, name = body["metadata"]["namespace"], name_of(body)
    change(cluster, found.resource, namespace, name, lambda managed, live: _edit(managed, live, update))
    if update.replicas is not None and update.replicas > 1 and labels_of(body).get(MANAGED_BY) == MANAGER:
        owner = {**body, "apiVersion": found.resource.api_version, "kind": found.resource.kind}
        for budget in owned(disruption_budgets(_spec_of(found, update.replicas)), owner):
            with suppress(ExistsError):
                cluster.create(budget)


def _spec_of(found: FoundServer, replicas: int) -> TritonServer:
    labels, nodes = labels_of(found.body), sum(number for number, _ in templates(found.body))
    return TritonServer(
        name=labels["servingName"],
        namespace=found.body["metadata"]["namespace"],
        version=labels["servingVersion"],
        model_repository="/",
        replicas=replicas,
        multinode=1 if found.resource == DEPLOYMENTS else max(2, nodes),
    )


def _edit(managed: Object, live: Object, update: ServerUpdate) -> None:
    """Change the fields that are to be applied; `live` is the object as it is."""
    if update.replicas is not None:
        _edit_replicas(managed, live, update.replicas)
    labels, annotations = pairs(update.label, "--label"), pairs(update.annotation, "--annotation")
    _check_labels(labels, live)
    mains = list(_templates_to_change(managed, live))
    for metadata in (managed["metadata"], *(template.setdefault("metadata", {}) for template, _, _ in mains)):
        for key, added in (("labels", labels), ("annotations", annotations)):
            if added:
                metadata[key] = {**metadata.get(key, {}), **added}
    for _, container, now in mains:
        _edit_container(container, now, update)


def _edit_replicas(managed: Object, live: Object, replicas: int) -> None:
    entries = live["metadata"].get("managedFields") or []
    ours = any(one.get("manager") == FIELD_MANAGER and one.get("operation") == "Apply" for one in entries)
    decided = any("f:replicas" in (one.get("fieldsV1") or {}).get("f:spec", {}) for one in entries)
    if ours and not decided:  # hasten leaves it out for an autoscaler alone
        raise ConfigError("--replicas: this server was made with --autoscale, which decides on their number")
    if "leaderWorkerTemplate" in live["spec"]:
        check_group_name(name_of(live), replicas)
    managed.setdefault("spec", {})["replicas"] = replicas


def _check_labels(labels: dict[str, str], live: Object) -> None:
    own = server_labels(TritonServer(name="server", version="1", model_repository="/"))
    for name, value in labels.items():
        if name in own and labels_of(live).get(name) != value:
            raise ConfigError(f"--label {name}={value}: this label tells whose pods are whose; choose another name")


def _templates_to_change(managed: Object, live: Object) -> Iterator[tuple[Any, Any, Any]]:
    """Of each template: itself and its server's container as they are to be applied, and that container as it is."""
    for path in (("template",), ("leaderWorkerTemplate", "leaderTemplate"), ("leaderWorkerTemplate", "workerTemplate")):
        now, part = live["spec"], managed.setdefault("spec", {})
        if not all((now := now.get(step)) is not None for step in path):
            continue
        for step in path:
            part = part.setdefault(step, {})
        main = now["spec"]["containers"][0]
        containers = part.setdefault("spec", {}).setdefault("containers", [])
        mine = next((one for one in containers if one["name"] == main["name"]), None)
        if mine is None:
            mine = {"name": main["name"]}
            containers.append(mine)
        yield part, mine, main


def _edit_container(container: Object, now: Object, update: ServerUpdate) -> None:
    if update.image is not None:
        container["image"] = update.image
    if update.gpus is not None:
        _check_gpus(now, update.gpus)
    wanted = {"cpu": update.cpu, "memory": update.memory, GPU: update.gpus}
    changed = {name: str(amount) for name, amount in wanted.items() if amount is not None}
    if changed:
        container |= given(resources=_changed_resources(container.pop("resources", None) or {}, changed))
    if update.gpus is not None:
        _show_gpus(container, update.gpus)
    _set_variables(container, {name: literal(value) for name, value in pairs(update.env, "--env").items()})
    if update.model_repository is not None or update.load_model or update.extend_command is not None:
        container["command"] = [*now["command"][:2], literal(_new_command(now, update))]


def _changed_resources(resources: Object, changed: dict[str, str]) -> Object:
    """The same as request and as limit; no GPUs are no entry, as where a server is made."""
    amounts = {kind: {**resources.get(kind, {}), **changed} for kind in ("requests", "limits")}
    kept = {kind: {name: one for name, one in of.items() if (name, one) != (GPU, "0")} for kind, of in amounts.items()}
    return given(**{**resources, **kept})


def _check_gpus(now: Object, gpus: int) -> None:
    """ConfigError for whole GPUs of a server that has parts of a shared one, as where both are given at once."""
    shared = [name for name in _limits(now) if name in (GPU_MEMORY, GPU_CORES)]
    if gpus and shared:
        raise ConfigError(
            f"--gpus {gpus}: this server has parts of a shared GPU ({', '.join(shared)}), and takes either those or "
            "whole GPUs: serve another version with --gpus"
        )


def _limits(container: Object) -> Object:
    return (container.get("resources") or {}).get("limits") or {}


def _set_variables(container: Object, values: dict[str, str]) -> None:
    """Change variables where they are, and add new ones behind them."""
    if values:
        env = container.get("env", [])
        changed = [{"name": one["name"], "value": values[one["name"]]} if one["name"] in values else one for one in env]
        known = {one["name"] for one in env}
        added = [{"name": name, "value": value} for name, value in values.items() if name not in known]
        container["env"] = changed + added


def _show_gpus(container: Object, gpus: int) -> None:
    """As they are made: a container without GPUs is kept from those of its node, ranks are counted by them."""
    sees_gpus = any(name.startswith(_GPU_FAMILIES) for name in _limits(container))
    variables = container.get("env", [])
    if sees_gpus:
        container["env"] = [one for one in variables if one != _HIDDEN_GPUS]
    elif _HIDDEN_GPUS not in variables:
        container["env"] = [*variables, dict(_HIDDEN_GPUS)]
    if any(one["name"] == _RANKS for one in container["env"]):
        _set_variables(container, {_RANKS: str(max(1, gpus))})


@dataclass(frozen=True)
class _Command:
    """A server's command line, taken apart."""

    program: Sequence[str]
    options: Sequence[str]
    rest: str
    """What the user added, for the shell as it is."""


def _parsed(text: str) -> _Command | None:
    """The parts of a command that hasten made; None for others."""
    stream = io.StringIO(text)
    words = shlex.shlex(stream, posix=True)
    words.whitespace_split, words.commenters = True, ""
    program: list[str] = []
    options: list[str] = []
    position = 0
    while (word := words.get_token()) is not None:
        if word.startswith(_OWN_OPTIONS):
            options.append(word)
        elif options:
            return _Command(program, options, text[position:])
        else:
            program.append(word)
        position = stream.tell()
    return _Command(program, options, "") if program[:1] == ["exec"] and options else None


def _new_command(container: Object, update: ServerUpdate) -> str:
    command = container.get("command") or []
    parsed = _parsed(command[2].replace("$$", "$")) if len(command) == 3 and command[:2] == ["sh", "-c"] else None
    if parsed is None:
        raise UnsupportedError(
            "--model-repository, --load-model and --extend-command: hasten did not make this server's command and "
            "cannot change it; serve another version instead"
        )
    options = list(parsed.options)
    if update.model_repository is not None:
        options = [one for one in options if not one.startswith("--model-repository=")]
        options.insert(0, f"--model-repository={update.model_repository}")
    if update.load_model:
        options = [one for one in options if not one.startswith(("--model-control-mode=", "--load-model="))]
        options += ["--model-control-mode=explicit", *(f"--load-model={name}" for name in update.load_model)]
    rest = parsed.rest if update.extend_command is None else update.extend_command
    return " ".join([shlex.join([*parsed.program, *options]), *([rest] if rest else [])])
