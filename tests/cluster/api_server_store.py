"""What the test's API server keeps, and what its controllers do with it.

kubernetes.io/docs/reference/using-api/api-concepts: resourceVersion, uid, generation, lists in pages with `continue`,
dry runs; /docs/concepts/overview/working-with-objects/finalizers and /docs/concepts/architecture/garbage-collection:
deletionTimestamp, foreground and background deletion, owners by uid; /docs/concepts/workloads/pods/pod-lifecycle:
a pod on a node is gone once its kubelet says so; /docs/concepts/storage/persistent-volumes: binding.
"""

import copy
import json
import re
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from typing import Any

from tests.cluster import api_server_apply as fields
from tests.cluster.api_server_controllers import FOREGROUND, Controllers, has_ended, set_defaults
from tests.cluster.api_server_kinds import (
    BY_KIND,
    BY_NAME,
    CUSTOM,
    Key,
    Kind,
    Object,
    RefusedError,
    already_exists,
    changed_meanwhile,
    invalid,
    not_found,
)
from tests.waiting import LIMIT_S

_NAME = re.compile(r"[a-z0-9]([-a-z0-9.]*[a-z0-9])?")
_CONTROLLER = "kube-controller-manager"


def now() -> str:
    """The time as `metav1.Time` writes it."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


class Store:
    """All objects of a cluster. `write` and `remove` are for those who are part of it: controllers and kubelets."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.crds = {kind.full_name for kind in CUSTOM}
        self.kubelet_seconds = 0.05
        """How long a pod on a node takes to end."""
        self.admission: list[Callable[[Kind, Object], None]] = []
        """Called with what is to be made or changed; may raise RefusedError, as admission webhooks and quotas do."""
        self.objects: dict[Key, Object] = {}
        self._encoded: dict[Key, tuple[str, bytes]] = {}
        self._version = 1000
        self._addresses = 0
        self._controllers = Controllers(self)
        for name in ("default", "kube-system"):
            self.write({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}})

    def close(self) -> None:
        """End the controllers."""
        self._controllers.close()

    def kinds(self) -> list[Kind]:
        """Kinds that are served now."""
        return [kind for kind in BY_NAME.values() if not kind.custom or kind.full_name in self.crds]

    def get(self, kind: Kind, namespace: str, name: str) -> Object:
        """A copy of an object."""
        with self.lock:
            if (found := self.objects.get((kind.full_name, namespace, name))) is None:
                raise not_found(kind, name)
            return copy.deepcopy(found)

    def create(self, kind: Kind, namespace: str, body: Object, manager: str, *, dry_run: bool = False) -> Object:
        """What POST does."""
        with self.lock:
            output = copy.deepcopy(body)
            output["metadata"].pop("managedFields", None)
            self._prepare(kind, namespace, output)
            output["metadata"]["managedFields"] = fields.written({}, output, manager, kind.api_version)
            return self._add(kind, namespace, output, dry_run=dry_run)

    def apply(
        self, kind: Kind, namespace: str, name: str, body: Object, manager: str, *, force: bool, dry_run: bool = False
    ) -> tuple[Object, bool]:
        """What a server-side apply does: the object, and whether it is new."""
        with self.lock:
            live = self.objects.get((kind.full_name, namespace, name))
            metadata = body["metadata"]
            if live is None:
                if metadata.get("uid") or metadata.get("resourceVersion"):
                    raise changed_meanwhile(kind, name, "the object to be changed does not exist any more")
                output = copy.deepcopy(body)
                self._prepare(kind, namespace, output)
                output = fields.applied(kind, output, body, manager, force=force)
                return self._add(kind, namespace, output, dry_run=dry_run), True
            for key in ("uid", "resourceVersion"):
                if metadata.get(key, live["metadata"][key]) != live["metadata"][key]:
                    raise changed_meanwhile(kind, name, f"Precondition failed: {key} is {live['metadata'][key]}")
            result = fields.applied(kind, live, body, manager, force=force)
            return self._replace(kind, namespace, live, result, dry_run=dry_run), False

    def merge_patch(
        self, kind: Kind, namespace: str, name: str, patch: Object, manager: str, *, dry_run: bool = False
    ) -> Object:
        """What a JSON merge patch does (RFC 7386)."""
        with self.lock:
            live = self.objects.get((kind.full_name, namespace, name))
            if live is None:
                raise not_found(kind, name)
            wanted = (patch.get("metadata") or {}).get("resourceVersion", live["metadata"]["resourceVersion"])
            if wanted != live["metadata"]["resourceVersion"]:
                raise changed_meanwhile(kind, name, "the object has been modified")
            result = _patched(copy.deepcopy(live), patch)
            result["metadata"]["managedFields"] = fields.written(live, result, manager, kind.api_version)
            return self._replace(kind, namespace, live, result, dry_run=dry_run)

    def delete(self, kind: Kind, namespace: str, name: str, policy: str, *, dry_run: bool = False) -> Object:
        """What DELETE does: the object as it goes or stays."""
        with self.lock:
            if (found := self.objects.get((kind.full_name, namespace, name))) is None:
                raise not_found(kind, name)
            if dry_run:
                return copy.deepcopy(found)
            changed = copy.deepcopy(found)
            metadata = changed["metadata"]
            if policy == "Foreground" and FOREGROUND not in metadata.get("finalizers", ()):
                metadata["finalizers"] = [*metadata.get("finalizers", ()), FOREGROUND]
            on_node = kind.kind == "Pod" and changed["spec"].get("nodeName") and not has_ended(changed)
            if metadata.get("finalizers") or on_node:
                metadata.setdefault("deletionTimestamp", now())
                metadata.setdefault("deletionGracePeriodSeconds", 30 if on_node else 0)
                changed["_due"] = time.monotonic() + (self.kubelet_seconds if on_node else 0)
                self.put((kind.full_name, namespace, name), changed)
            else:
                self.drop((kind.full_name, namespace, name))
            self._controllers.kick()
            return changed

    def write(self, body: Object, *, manager: str = _CONTROLLER) -> Object:
        """Make an object or change fields of one, status included, as those who are part of the cluster do."""
        with self.lock:
            kind = BY_KIND[body["apiVersion"], body["kind"]]
            namespace = body["metadata"].get("namespace", "default") if kind.namespaced else ""
            live = self.objects.get((kind.full_name, namespace, body["metadata"]["name"]))
            if live is not None:
                return self.merge_patch(kind, namespace, body["metadata"]["name"], body, manager)
            output = copy.deepcopy(body)
            status = output.get("status")
            self._prepare(kind, namespace, output)
            output |= {"status": status} if status is not None else {}
            output["metadata"]["managedFields"] = fields.written({}, output, manager, kind.api_version)
            return self._add(kind, namespace, output, dry_run=False)

    def remove(self, api_version: str, kind: str, namespace: str, name: str) -> None:
        """Delete in the background."""
        self.delete(BY_KIND[api_version, kind], namespace, name, "Background")

    def all(self, *kinds: str) -> list[Object]:
        """Copies of all objects of some kinds, or of all but namespaces."""
        with self.lock:
            chosen = [manifest for manifest in self.objects.values() if manifest["kind"] in kinds or not kinds]
            return [copy.deepcopy(manifest) for manifest in chosen if kinds or manifest["kind"] != "Namespace"]

    def names(self, *kinds: str) -> list[str]:
        """`Kind/name` of all objects of some kinds, or of all but namespaces."""
        return sorted(f"{each['kind']}/{each['metadata']['name']}" for each in self.all(*kinds))

    def settle(self, seconds: float = LIMIT_S) -> None:
        """Wait until the controllers have nothing left to do."""
        assert self._controllers.settle(seconds), f"still at work on {self.names()}"

    def select(self, kind: Kind, namespace: str | None, matches: Callable[[Object], bool]) -> list[Key]:
        """Keys of objects, in the order of lists."""
        with self.lock:
            return sorted(
                key
                for key, each in self.objects.items()
                if key[0] == kind.full_name and namespace in (None, key[1]) and matches(each)
            )

    def encoded(self, keys: list[Key]) -> list[bytes]:
        """Objects as JSON, which is kept: a list of many should take the server little time."""
        with self.lock:
            return list(self._encode(keys))

    def _encode(self, keys: list[Key]) -> Iterator[bytes]:
        for key in keys:
            if (found := self.objects.get(key)) is None:
                continue
            version = found["metadata"]["resourceVersion"]
            kept = self._encoded.get(key)
            if kept is None or kept[0] != version:
                # items of built-in lists have no apiVersion and kind of their own
                hidden = ("_due",) if BY_NAME[key[0]].custom else ("_due", "apiVersion", "kind")
                text = json.dumps({name: value for name, value in found.items() if name not in hidden})
                kept = self._encoded[key] = (version, text.encode())
            yield kept[1]

    @property
    def version(self) -> str:
        """The newest resourceVersion."""
        return str(self._version)

    def _prepare(self, kind: Kind, namespace: str, made: Object) -> None:
        """Checks and defaults of a new object."""
        metadata = made["metadata"]
        name = metadata.get("name", "")
        if not _NAME.fullmatch(name) or len(name) > 253:
            raise invalid(kind, name, "metadata.name", f'Invalid value: "{name}": a lowercase RFC 1123 subdomain')
        if kind.namespaced:
            self._check_namespace(kind, namespace, name)
            metadata["namespace"] = namespace
        if (kind.full_name, namespace, name) in self.objects:
            raise already_exists(kind, name)
        metadata |= {"uid": str(uuid.uuid4()), "creationTimestamp": metadata.get("creationTimestamp") or now()}
        metadata["generation"] = 1
        if kind.has_status:
            made.pop("status", None)  # it is written through the subresource alone
        set_defaults(kind, made)
        if kind.kind == "Service" and made["spec"].get("clusterIP") is None:
            self._addresses += 1
            made["spec"]["clusterIP"] = f"10.96.0.{self._addresses}"

    def _check_namespace(self, kind: Kind, namespace: str, name: str) -> None:
        found = self.objects.get(("namespaces", "", namespace))
        if found is None:
            raise not_found(BY_NAME["namespaces"], namespace)
        if found["metadata"].get("deletionTimestamp"):
            why = f"unable to create new content in namespace {namespace} because it is being terminated"
            raise RefusedError(403, "Forbidden", f'{kind.full_name} "{name}" is forbidden: {why}')

    def _add(self, kind: Kind, namespace: str, made: Object, *, dry_run: bool) -> Object:
        for check in self.admission:
            check(kind, made)
        if dry_run:
            return made
        self.put((kind.full_name, namespace, made["metadata"]["name"]), made)
        self._controllers.bind(kind)
        self._controllers.kick()
        return copy.deepcopy(made)

    def _replace(self, kind: Kind, namespace: str, live: Object, result: Object, *, dry_run: bool) -> Object:
        for check in self.admission:
            check(kind, result)
        set_defaults(kind, result)
        if kind.kind == "Deployment" and live["spec"].get("selector") != result["spec"].get("selector"):
            raise invalid(kind, result["metadata"]["name"], "spec.selector", "field is immutable")
        if _content(live) == _content(result) or dry_run:
            return result
        if live.get("spec") != result.get("spec"):
            result["metadata"]["generation"] += 1
        self.put((kind.full_name, namespace, result["metadata"]["name"]), result)
        self._controllers.bind(kind)
        self._controllers.kick()
        return copy.deepcopy(result)

    def put(self, key: Key, body: Object) -> None:
        """Keep an object under a new resourceVersion."""
        self._version += 1
        body["metadata"]["resourceVersion"] = str(self._version)
        self.objects[key] = body

    def drop(self, key: Key) -> None:
        """Forget an object."""
        self._version += 1
        del self.objects[key]
        self._encoded.pop(key, None)


def _content(body: Object) -> Object:
    return {**body, "metadata": {**body["metadata"], "managedFields": _untimed(body)}}


def _untimed(body: Object) -> list[Any]:
    entries = body["metadata"].get("managedFields") or ()
    return [{name: value for name, value in entry.items() if name != "time"} for entry in entries]


def _patched(value: Any, patch: Any) -> Any:
    if not isinstance(patch, dict):
        return patch
    output = dict(value) if isinstance(value, dict) else {}
    for key, below in patch.items():
        if below is None:
            output.pop(key, None)
        else:
            output[key] = _patched(output.get(key), below)
    return output
