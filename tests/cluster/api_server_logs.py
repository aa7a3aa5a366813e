"""Logs of the test's pods.

kubernetes.io/docs/reference/kubernetes-api/workload-resources/pod-v1 ("read log of the specified Pod"): `follow`,
`tailLines`, `sinceSeconds`, `sinceTime` (whole seconds), `timestamps`, `container`. Without `container` a pod with
several is refused, and so is one whose container has not started.
"""

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from tests.cluster.api_server_kinds import Object, bad_request


def _stamp(nanoseconds: int) -> str:
    """RFC 3339 with nanoseconds, without zeros at its end, as Go writes it."""
    whole = datetime.fromtimestamp(nanoseconds // 10**9, UTC).strftime("%Y-%m-%dT%H:%M:%S")
    fraction = f"{nanoseconds % 10**9:09d}".rstrip("0")
    return f"{whole}.{fraction}Z" if fraction else f"{whole}Z"


@dataclass
class Log:
    """What a container has written."""

    lines: list[tuple[int, str]] = field(default_factory=list)
    changed: threading.Condition = field(default_factory=threading.Condition)
    cuts: int = 0
    abrupt: bool = False

    def write(self, *texts: str, at: int | None = None) -> None:
        """Add lines, now or at a time in nanoseconds."""
        with self.changed:
            self.lines += [(time.time_ns() if at is None else at, text) for text in texts]
            self.changed.notify_all()

    def cut(self, *, abrupt: bool = False) -> None:
        """End all streams of this log; abruptly, as a connection that breaks, or as a server that ends its answer."""
        with self.changed:
            self.cuts, self.abrupt = self.cuts + 1, abrupt
            self.changed.notify_all()


def container_of(pod: Object, wanted: str | None) -> str:
    """The container that is asked for; refused as the server does it."""
    name = pod["metadata"]["name"]
    names = [each["name"] for key in ("containers", "initContainers") for each in pod["spec"].get(key) or ()]
    if wanted is None and len(names) > 1:
        raise bad_request(f"a container name must be specified for pod {name}, choose one of: [{' '.join(names)}]")
    chosen = wanted or names[0]
    if chosen not in names:
        raise bad_request(f"container {chosen} is not valid for pod {name}")
    statuses = pod.get("status", {}).get("containerStatuses") or ()
    state: Any = next((each.get("state", {}) for each in statuses if each["name"] == chosen), {})
    if not (state.keys() & {"running", "terminated"}):
        reason = state.get("waiting", {}).get("reason", "ContainerCreating")
        raise bad_request(f'container "{chosen}" in pod "{name}" is waiting to start: {reason}')
    return chosen


def lines_of(log: Log, query: dict[str, str]) -> list[tuple[int, str]]:
    """Lines that options choose."""
    since = 0
    if "sinceSeconds" in query:
        since = time.time_ns() - int(query["sinceSeconds"]) * 10**9
    if "sinceTime" in query:
        since = int(datetime.fromisoformat(query["sinceTime"]).timestamp()) * 10**9
    chosen = [line for line in log.lines if line[0] >= since]
    tail = int(query.get("tailLines", len(chosen)))
    return chosen[len(chosen) - min(tail, len(chosen)) :]


def log_chunks(log: Log, query: dict[str, str], running: Callable[[], bool]) -> Iterator[bytes]:
    """The answer, in pieces; ConnectionError where it is cut abruptly."""
    stamped, follow = query.get("timestamps") == "true", query.get("follow") == "true"

    def encoded(lines: list[tuple[int, str]]) -> bytes:
        return "".join(f"{_stamp(at)} {text}\n" if stamped else f"{text}\n" for at, text in lines).encode()

    with log.changed:
        read, cuts, first = len(log.lines), log.cuts, lines_of(log, query)
    yield encoded(first)
    while follow:
        alive = running()
        with log.changed:
            if read == len(log.lines) and cuts == log.cuts and alive:
                log.changed.wait(0.05)
            new, read = log.lines[read:], len(log.lines)
            cut, abrupt = cuts != log.cuts, log.abrupt
        if new and not cut:  # what was written since comes to those who ask again
            yield encoded(new)
        if cut and abrupt:
            raise ConnectionError("cut")
        if cut or not alive:
            return
