"""What goes on in the test's cluster by itself: garbage collection, kubelets that end pods, volumes that are bound.

kubernetes.io/docs/concepts/architecture/garbage-collection and .../working-with-objects/owners-dependents: what has
owners goes when none of them is there any more, by uid; an owner that is deleted in the foreground stays, with a
deletionTimestamp and the finalizer foregroundDeletion, until those of its dependents are gone that block it.
"""

import threading
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from tests.cluster.api_server_kinds import BY_NAME, Key, Kind, Object
from tests.waiting import LIMIT_S

if TYPE_CHECKING:
    from tests.cluster.api_server_store import Store

FOREGROUND = "foregroundDeletion"


class Controllers:
    """They work in a thread of their own, so that a deletion takes its time as it does in a cluster."""

    def __init__(self, store: "Store") -> None:
        self._store = store
        self._wake = threading.Event()
        self._idle = threading.Event()
        self._stopped = False
        self._thread = threading.Thread(target=self._collect_forever, name="garbage-collector", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End them."""
        self._stopped = True
        self._wake.set()
        self._thread.join(LIMIT_S)

    def settle(self, seconds: float) -> bool:
        """Wait until there is nothing left to do."""
        self._idle.clear()
        self.kick()
        return self._idle.wait(seconds)

    def bind(self, kind: Kind) -> None:
        """The volume controller: a claim is bound to the volume that names it."""
        if kind.kind not in ("PersistentVolume", "PersistentVolumeClaim"):
            return
        wanted = {}
        for body in self._store.objects.values():
            if body["kind"] == "PersistentVolume" and (reference := body["spec"].get("claimRef")):
                wanted[reference["namespace"], reference["name"]] = body["metadata"]["name"]
        for key, body in list(self._store.objects.items()):
            if key[0] == "persistentvolumeclaims" and "phase" not in body.get("status", {}):
                volume = wanted.get((key[1], key[2]))
                bound = {"spec": {**body["spec"], "volumeName": volume}, "status": {"phase": "Bound"}}
                self._store.put(key, {**body, **(bound if volume else {})})

    def kick(self) -> None:
        """There may be something to do."""
        self._wake.set()

    def _collect_forever(self) -> None:
        while True:
            with self._store.lock:
                self._wake.clear()
                if self._stopped:  # looked at after `clear`: what is set since wakes this thread
                    return
                waits = self._collect()
                if waits is None:  # said under the lock: what changes later is not done yet
                    self._idle.set()
            self._wake.wait(waits)

    def _collect(self) -> float | None:
        """One round of the garbage collector and of the kubelets; seconds until the next is due, if one is."""
        while self._collect_once():
            pass
        objects = self._store.objects.values()
        # those that became due since the last look are among them: nobody else would wake this thread for them
        dues = [body["_due"] for body in objects if "_due" in body and not body["metadata"].get("finalizers")]
        return max(0.001, min(dues) - time.monotonic()) if dues else None

    def _collect_once(self) -> bool:
        uids = {each["metadata"]["uid"]: each for each in self._store.objects.values()}
        for key, each in list(self._store.objects.items()):
            metadata = each["metadata"]
            owners = metadata.get("ownerReferences") or ()
            if metadata.get("deletionTimestamp"):
                if self._finish(key, each):
                    return True
                continue
            gone = owners and not any(owner["uid"] in uids for owner in owners)
            going = any(_in_foreground(uids[owner["uid"]]) for owner in owners if owner["uid"] in uids)
            if gone or going:
                self._store.delete(BY_NAME[key[0]], key[1], key[2], "Background")
                return True
        return False

    def _finish(self, key: Key, one: Object) -> bool:
        metadata = one["metadata"]
        finalizers = metadata.get("finalizers") or []
        if FOREGROUND in finalizers and not self._blocked(metadata["uid"]):
            metadata["finalizers"] = [name for name in finalizers if name != FOREGROUND]
            self._store.put(key, one)
            return True
        if not finalizers and one.get("_due", 0) <= time.monotonic():
            self._store.drop(key)
            return True
        return False

    def _blocked(self, uid: str) -> bool:
        references = (
            ref for body in self._store.objects.values() for ref in body["metadata"].get("ownerReferences") or ()
        )
        return any(ref["uid"] == uid and ref.get("blockOwnerDeletion") for ref in references)


def has_ended(pod: Object) -> bool:
    """Whether all its containers have."""
    return pod.get("status", {}).get("phase") in ("Succeeded", "Failed")


def _in_foreground(owner: Object) -> bool:
    return FOREGROUND in (owner["metadata"].get("finalizers") or ()) and "deletionTimestamp" in owner["metadata"]


def set_defaults(kind: Kind, made: Object) -> None:
    """Of the many defaults those that change what is read back: kubernetes.io/docs/reference/kubernetes-api."""
    if kind.kind in ("Deployment", "LeaderWorkerSet"):
        made["spec"].setdefault("replicas", 1)
    if kind.kind == "Pod":
        made.setdefault("status", {"phase": "Pending"})
    if kind.kind == "PersistentVolumeClaim":
        made.setdefault("status", {})
    for ports in _ports(made.get("spec")):
        for port in ports:
            port.setdefault("protocol", "TCP")


def _ports(value: Any) -> Iterator[list[Object]]:
    if isinstance(value, list):
        for item in value:
            yield from _ports(item)
    elif isinstance(value, dict):
        for key, below in value.items():
            if key == "ports" and isinstance(below, list):
                yield below
            else:
                yield from _ports(below)
