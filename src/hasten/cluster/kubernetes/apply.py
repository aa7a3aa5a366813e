"""Creates, updates and deletes several objects as a unit."""

import json
import time
from collections.abc import Callable, Sequence
from typing import Any

from hasten.cluster.kubernetes.client import FIELD_MANAGER, Cluster
from hasten.cluster.kubernetes.errors import ChangedError
from hasten.cluster.kubernetes.resources import Object, Resource, name_of
from hasten.cluster.manifests.objects import owned
from hasten.core.errors import ClusterError, ExistsError, NotFoundError

DELETION_TIMEOUT_S = 90.0
"""Seconds that a deletion may take: pods have 30 to end by themselves, and their nodes are notified first."""
_ATTEMPTS = 5


def create_all(cluster: Cluster, objects: Sequence[Object], *, first_owns: bool = True) -> None:
    """Make all objects or none; the first owns the others, so that they go when it goes.

    kubernetes.io/docs/concepts/overview/working-with-objects/owners-dependents
    """
    _make_all(cluster, objects, cluster.create, first_owns=first_owns)


def apply_all(cluster: Cluster, objects: Sequence[Object]) -> None:
    """As `create_all`, by server-side apply, so that hasten's fields can be distinguished from others' later on."""
    for body in objects:
        if cluster.find(cluster.resource_of(body), body["metadata"].get("namespace"), name_of(body)) is not None:
            raise ExistsError(
                f"there is a {body['kind']} {name_of(body)} already: take another --name or --version, or delete it"
            )

    def apply(body: Object) -> Object:
        applied, new = cluster.apply(body)
        if not new:
            raise ExistsError(
                f"somebody created {body['kind']} {name_of(body)} at the same time, and it is changed now"
            )
        return applied

    _make_all(cluster, objects, apply, first_owns=True)


def _make_all(
    cluster: Cluster, objects: Sequence[Object], make: Callable[[Object], Object], *, first_owns: bool
) -> None:
    created: list[Object] = []
    try:
        for body in objects:
            created.append(make(owned([body], created[0])[0] if created and first_owns else body))
    except BaseException as error:
        remains = _remove(cluster, created)
        if remains and isinstance(error, ClusterError):
            raise type(error)(f"{error}. Not removed again, because that failed too: {', '.join(remains)}") from error
        raise


def _remove(cluster: Cluster, created: Sequence[Object]) -> list[str]:
    """Delete objects, the last first; what could not be deleted is reported."""
    remains = []
    for body in reversed(created):
        try:
            cluster.delete(cluster.resource_of(body), body["metadata"].get("namespace"), name_of(body))
        except NotFoundError:
            continue
        except ClusterError:
            remains.append(f"{body['kind']} {name_of(body)}")
    return remains


def delete_and_wait(cluster: Cluster, resource: Resource, namespace: str | None, name: str, timeout_s: float) -> None:
    """Delete an object after all that it owns, and wait until it is gone: then its name is free again."""
    uid = cluster.get(resource, namespace, name)["metadata"]["uid"]
    cluster.delete(resource, namespace, name, "Foreground")
    pause, end = 0.02, time.monotonic() + timeout_s
    while (found := cluster.find(resource, namespace, name)) is not None and found["metadata"]["uid"] == uid:
        if time.monotonic() > end:
            holders = ", ".join(found["metadata"].get("finalizers") or ["nothing known"])
            raise ClusterError(
                f"{resource.kind} {name} is to be deleted but still there after {timeout_s:.0f} s; it waits for: "
                f"{holders}. Look at its pods and their nodes"
            )
        time.sleep(pause)
        pause = min(1.0, pause * 2)


def change(
    cluster: Cluster, resource: Resource, namespace: str, name: str, edit: Callable[[Object, Object], None]
) -> None:
    """Server-side apply of what hasten manages of an object, after `edit(managed, live)` has changed it."""
    for left in reversed(range(_ATTEMPTS)):
        live = cluster.get(resource, namespace, name)
        body = managed_part(live, resource)
        edit(body, live)
        try:
            cluster.apply(body)
            return
        except ChangedError:
            if not left:
                raise


def managed_part(live: Object, resource: Resource) -> Object:
    """The fields of an object that hasten applied: to leave one out of the next apply would take it away.

    `uid` and `resourceVersion` make the apply fail if the object is not the one that was read.
    """
    fields = [
        entry["fieldsV1"]
        for entry in live["metadata"].get("managedFields") or []
        if entry.get("manager") == FIELD_MANAGER and entry.get("operation") == "Apply" and not entry.get("subresource")
    ]
    body: Object = _part(live, fields[0]) if fields else {}
    body |= {"apiVersion": resource.api_version, "kind": resource.kind}
    kept = {key: live["metadata"][key] for key in ("name", "namespace", "uid", "resourceVersion")}
    body["metadata"] = {**body.get("metadata", {}), **kept}
    return body


def _part(value: Any, fields: dict[str, Any]) -> Any:
    """What a tree of FieldsV1 names of a value: `f:` a field, `k:` an item by its keys, `v:` an item by its value."""
    chosen = {key: below for key, below in fields.items() if key != "."}
    if not chosen:
        return value if not fields or not isinstance(value, dict | list) else type(value)()
    if isinstance(value, list):
        return _part_of_list(value, chosen)
    return {key[2:]: _part(value[key[2:]], below) for key, below in chosen.items() if key[2:] in value}


def _part_of_list(items: list[Any], chosen: dict[str, Any]) -> list[Any]:
    """Items in their live order: an apply puts a list into the order that it names, and pods would be replaced."""
    indexed = {key: _index(items, key) for key in chosen}
    return [_item(items, key, chosen[key]) for key in sorted(chosen, key=lambda key: indexed[key])]


def _index(items: list[Any], key: str) -> int:
    """Where the item of a FieldsV1 key is; behind all others where it is not."""
    wanted = json.loads(key[2:])
    matching = (at for at, item in enumerate(items) if _is_item(item, wanted, by_value=key.startswith("v:")))
    return next(matching, len(items))


def _is_item(item: Any, wanted: Any, *, by_value: bool) -> bool:
    return item == wanted if by_value else all(item.get(name) == value for name, value in wanted.items())


def _item(items: list[Any], key: str, below: dict[str, Any]) -> Any:
    wanted, index = json.loads(key[2:]), _index(items, key)
    if key.startswith("v:") or index == len(items):
        return wanted
    # not all keys are hasten's: a port's protocol is there by default
    return _part(items[index], below) or wanted
