"""Who manages which field: server-side apply and what it makes of other writes.

kubernetes.io/docs/reference/using-api/server-side-apply:
- a manager's fields are a tree FieldsV1: `f:NAME` a field, `k:{...}` an item of a list by its keys, `v:...` an item of
  a set, `.` the item or map itself;
- an apply that gives a field another value than it has, while another manager has that field, is a conflict (409);
  with `force` the field changes hands; the same value is shared;
- a field that the same manager applied before and does not apply now is removed, unless another manager has it;
- any other write takes the fields that it changes, under its own manager and the operation Update;
- `metadata.managedFields` must not be in what is applied; a uid or resourceVersion that is given must be the object's.

Lists merge by keys, in the order of what is applied, where the API's schema says so (x-kubernetes-list-type,
x-kubernetes-list-map-keys; for built-in kinds the merge keys of kubernetes.io/docs/reference/kubernetes-api); all
others are replaced as one value. A custom resource is taken to say it for its pod templates as the built-in kinds do,
as the CRDs of Kubeflow and of LeaderWorkerSet, which are generated from the same types.
"""

import copy
import json
from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Any

from tests.cluster.api_server_kinds import Kind, Object, RefusedError, bad_request

Path = tuple[str, ...]
Fields = frozenset[Path]

_KEYS: dict[str, tuple[str, ...]] = {
    "containers": ("name",),
    "initContainers": ("name",),
    "env": ("name",),
    "volumes": ("name",),
    "volumeMounts": ("mountPath",),
    "imagePullSecrets": ("name",),
    "topologySpreadConstraints": ("topologyKey", "whenUnsatisfiable"),
    "conditions": ("type",),
    "ownerReferences": ("uid",),
}
_CONTAINER_PORTS, _SERVICE_PORTS = ("containerPort", "protocol"), ("port", "protocol")
_KEY_DEFAULTS = {"protocol": "TCP"}
_SETS = frozenset(("finalizers",))
_BY_SERVER = ("name", "namespace", "uid", "resourceVersion", "generation", "creationTimestamp", "managedFields")
_UNMANAGED = frozenset(
    [("f:apiVersion",), ("f:kind",), ("f:metadata",), *(("f:metadata", f"f:{name}") for name in _BY_SERVER)]
)


def _list_keys(name: str, items: list[Any]) -> tuple[str, ...] | None:
    if name == "ports" and items and all(isinstance(each, dict) for each in items):
        return _CONTAINER_PORTS if "containerPort" in items[0] else _SERVICE_PORTS
    return _KEYS.get(name)


def _key_of(item: Object, keys: tuple[str, ...]) -> str:
    chosen = {key: item.get(key, _KEY_DEFAULTS.get(key)) for key in keys}
    return "k:" + json.dumps(chosen, sort_keys=True, separators=(",", ":"))


def fields_of(value: Any) -> Fields:
    """All fields of an object that a manager can have."""
    found: set[Path] = set()
    _walk(value, "", (), found)
    return frozenset(path for path in found if path not in _UNMANAGED and not _is_unmanaged_metadata(path))


def _is_unmanaged_metadata(path: Path) -> bool:
    return len(path) > 2 and path[:2] in _UNMANAGED


def _walk(value: Any, name: str, path: Path, found: set[Path]) -> None:
    if isinstance(value, dict) and value:
        for key, below in value.items():
            _walk(below, key, (*path, f"f:{key}"), found)
    elif isinstance(value, list) and (keys := _list_keys(name, value)) is not None:
        for item in value:
            step = (*path, _key_of(item, keys))
            found.add((*step, "."))
            for key, below in item.items():
                _walk(below, key, (*step, f"f:{key}"), found)
    elif isinstance(value, list) and name in _SETS:
        found.update((*path, "v:" + json.dumps(item)) for item in value)
    else:
        found.add(path)


def tree(fields: Iterable[Path]) -> Object:
    """Fields as FieldsV1."""
    made: Object = {}
    for path in sorted(fields):
        here = made
        for step in path:
            here = here.setdefault(step, {})
    return made


def paths(fields: Object, path: Path = ()) -> Fields:
    """FieldsV1 as fields."""
    found: set[Path] = set()
    for step, below in fields.items():
        found |= paths(below, (*path, step)) if below else {(*path, step)}
    return frozenset(found)


def lookup(value: Any, path: Path) -> Any:
    """What stands in a field; `...` where nothing does."""
    name = ""
    for step in path:
        if step == ".":
            return value if value is ... else "present"
        if step.startswith("f:"):
            name = step[2:]
            value = value.get(name, ...) if isinstance(value, dict) else ...
        else:
            value = _item(value, step, name)
        if value is ...:
            return ...
    return value


def _item(value: Any, step: str, name: str) -> Any:
    if not isinstance(value, list):
        return ...
    if step.startswith("v:"):
        return step if json.loads(step[2:]) in value else ...
    keys = _list_keys(name, value) or ()
    return next((each for each in value if _key_of(each, keys) == step), ...)


def merged(live: Any, applied: Any, name: str = "") -> Any:
    """What was applied, laid over what there is."""
    if isinstance(live, dict) and isinstance(applied, dict):
        laid = {key: merged(live[key], value, key) if key in live else value for key, value in applied.items()}
        return {**live, **laid}
    if isinstance(live, list) and isinstance(applied, list):
        keys = _list_keys(name, applied or live)
        if keys is not None:
            return _merged_items(live, applied, keys)
        if name in _SETS:
            return live + [item for item in applied if item not in live]
    return applied


def _merged_items(live: list[Object], applied: list[Object], keys: tuple[str, ...]) -> list[Object]:
    """Items in the order that was applied; those of others stay between the items that they stood between."""
    known = {_key_of(item, keys): item for item in live}
    given = {_key_of(item, keys): item for item in applied}
    both = {key: merged(known[key], item) if key in known else item for key, item in given.items()}
    theirs, ours, result = list(known), list(given), []
    while theirs or ours:
        if theirs and ours and theirs[0] == ours[0]:
            result.append(both.pop(ours.pop(0)))
            theirs.pop(0)
        elif theirs and theirs[0] not in given:
            result.append(known[theirs.pop(0)])
        elif theirs and theirs[0] not in both:  # it came earlier, where the applied list has it
            theirs.pop(0)
        else:
            result.append(both.pop(ours.pop(0)))
    return result


def _removed(value: Any, path: Path) -> None:
    """Take one field out of an object, and what is empty without it."""
    holder, step = lookup(value, path[:-1]), path[-1]
    if holder is ... or step == ".":
        return
    if step.startswith("f:") and isinstance(holder, dict):
        holder.pop(step[2:], None)
    elif isinstance(holder, list):
        found = _item(holder, step, path[-2][2:])
        kept = [each for each in holder if each is not found and (step[:2] != "v:" or each != json.loads(step[2:]))]
        holder[:] = kept
    if not holder and len(path) > 2 and path[-2].startswith("f:"):
        _removed(value, path[:-1])


def _give_up(value: Any, gone: Fields, kept: Fields) -> None:
    """Take fields out of an object: items of lists as a whole where nobody has anything of them."""
    items = [path[:-1] for path in gone if path[-1] == "."]
    whole = [item for item in items if not any(path[: len(item)] == item for path in kept)]
    for path in sorted(whole, key=len):
        _removed(value, path)
    for path in sorted(gone, key=len, reverse=True):
        if not any(path[: len(item)] == item for item in whole):
            _removed(value, path)


class Managers:
    """The managed fields of one object."""

    def __init__(self, entries: Iterable[Object] = ()) -> None:
        self.entries = [copy.deepcopy(entry) for entry in entries]

    def _entry(self, manager: str, operation: str, api_version: str) -> Object:
        for entry in self.entries:
            if (entry["manager"], entry["operation"], entry["apiVersion"]) == (manager, operation, api_version):
                return entry
        made: Object = {"manager": manager, "operation": operation, "apiVersion": api_version}
        made |= {"time": "", "fieldsType": "FieldsV1", "fieldsV1": {}}
        self.entries.append(made)
        return made

    def take(self, manager: str, operation: str, api_version: str, fields: Fields, *, shared: bool = False) -> None:
        """Give fields to a manager; `shared` leaves them with others too."""
        mine = self._entry(manager, operation, api_version)
        for entry in self.entries:
            kept = paths(entry["fieldsV1"])
            if entry is mine:
                kept = fields if operation == "Apply" else kept | fields
            elif not shared:
                kept -= fields
            entry["fieldsV1"] = tree(kept)
        mine["time"] = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        self.entries = [entry for entry in self.entries if entry["fieldsV1"]]

    def forget(self, existing: Fields) -> None:
        """Drop fields that are not there any more."""
        for entry in self.entries:
            entry["fieldsV1"] = tree(paths(entry["fieldsV1"]) & existing)
        self.entries = [entry for entry in self.entries if entry["fieldsV1"]]

    def others(self, manager: str) -> list[tuple[Object, Fields]]:
        """Entries that are not this manager's applies."""
        rest = [entry for entry in self.entries if (entry["manager"], entry["operation"]) != (manager, "Apply")]
        return [(entry, paths(entry["fieldsV1"])) for entry in rest]


def written(before: Object, after: Object, manager: str, api_version: str) -> list[Object]:
    """Managed fields after a write that is not an apply."""
    managers = Managers(before.get("metadata", {}).get("managedFields") or ())
    fields = fields_of(after)
    changed = frozenset(path for path in fields if lookup(before, path) != lookup(after, path))
    managers.take(manager, "Update", api_version, changed)
    managers.forget(fields)
    return managers.entries


def applied(kind: Kind, live: Object, body: Object, manager: str, *, force: bool) -> Object:
    """The object after an apply; RefusedError where others manage what would change."""
    if body["metadata"].get("managedFields"):
        raise bad_request("metadata.managedFields must be nil")
    managers = Managers(live["metadata"].get("managedFields") or ())
    fields = fields_of(body)
    others = managers.others(manager)
    disputed = {path for path in fields if lookup(live, path) not in (..., lookup(body, path))}
    conflicts = [(each, path) for each, theirs in others for path in sorted(theirs & disputed)]
    if conflicts and not force:
        raise _conflict(kind, body, conflicts)
    mine = managers._entry(manager, "Apply", kind.api_version)
    shared = frozenset().union(*(theirs for _, theirs in others)) if others else frozenset()
    result = merged(copy.deepcopy(live), copy.deepcopy(body))
    _give_up(result, paths(mine["fieldsV1"]) - fields - shared, kept=fields | shared)
    managers.take(manager, "Apply", kind.api_version, fields, shared=True)
    if force:
        managers.take(manager, "Apply", kind.api_version, fields & disputed)
        managers.take(manager, "Apply", kind.api_version, fields, shared=True)
    managers.forget(fields_of(result))
    result["metadata"]["managedFields"] = managers.entries
    return result


def _conflict(kind: Kind, body: Object, conflicts: list[tuple[Object, Path]]) -> RefusedError:
    causes = []
    for each, path in conflicts:
        field = "".join(f".{step[2:]}" if step.startswith("f:") else _shown(step) for step in path)
        message = f'conflict with "{each["manager"]}" using {each["apiVersion"]}'
        causes.append({"reason": "FieldManagerConflict", "message": message, "field": field})
    text = f"Apply failed with {len(causes)} conflict{'s' if len(causes) > 1 else ''}: " + "; ".join(
        f"{each['message']}: {each['field']}" for each in causes
    )
    return RefusedError(409, "Conflict", text, details={"name": body["metadata"]["name"]}, causes=causes)


def _shown(step: str) -> str:
    if step == ".":
        return ""
    keys = json.loads(step[2:])
    return "[" + ",".join(f"{key}={json.dumps(value)}" for key, value in keys.items()) + "]"
