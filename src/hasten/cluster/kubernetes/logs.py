"""Lines of a container's log, also where the connection is cut while they are followed.

The endpoint and its options: kubernetes.io/docs/reference/kubernetes-api/workload-resources/pod-v1 ("read log of the
specified Pod"). A log is requested with times, so that one that was cut resumes where it ended: `sinceTime` is read in
whole seconds, so lines that were read before come again and are dropped.
"""

import re
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from datetime import UTC
from typing import Any

import urllib3

from hasten.cluster.backend import LogOptions
from hasten.cluster.kubernetes.client import Cluster, Query
from hasten.cluster.kubernetes.errors import NotStartedError
from hasten.cluster.kubernetes.records import instance
from hasten.cluster.kubernetes.resources import PODS, Object, name_of
from hasten.core.errors import ClusterError, NotFoundError

MAIN_CONTAINERS = ("pytorch", "node")
"""What training operators call the container that trains."""
_DEFAULT_CONTAINER = "kubectl.kubernetes.io/default-container"
_STAMP = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?Z")
_PAUSE = 0.5
_SILENCE = 240.0
"""Seconds without a line after which a followed log is asked for again: the connection may have died unnoticed."""


def chosen_pod(pods: Sequence[Object], name: str | None, owner: str) -> Object:
    """The pod of that name, or the first; NotFoundError where there is none."""
    if not pods:
        raise NotFoundError(f"{owner} has no pods: they are not created yet, or have been cleaned up")
    found = pods[0] if name is None else next((pod for pod in pods if name_of(pod) == name), None)
    if found is None:
        known = ", ".join(name_of(pod) for pod in pods)
        raise NotFoundError(f"{owner} has no instance {name}; it has {known}")
    return found


def chosen_container(pod: Object, name: str | None) -> str:
    """The container of that name, or the main one; NotFoundError where there is none."""
    spec = pod["spec"]
    names = [str(container["name"]) for container in spec["containers"]]
    if name is None:
        marked = (pod["metadata"].get("annotations") or {}).get(_DEFAULT_CONTAINER)
        return next((container for container in (marked, *MAIN_CONTAINERS) if container in names), names[0])
    every = names + [str(container["name"]) for container in spec.get("initContainers") or ()]
    if name not in every:
        raise NotFoundError(f"{name_of(pod)} has no container {name}; it has {', '.join(every)}")
    return name


def log_lines(cluster: Cluster, pod: Object, options: LogOptions) -> Iterator[str]:
    """Lines of a pod's log, without their ends."""
    query = [("container", chosen_container(pod, options.container)), *_query(options)]
    if options.follow:
        return _followed(cluster, pod, query, options.timestamps)
    return _read(cluster, pod, [*query, ("timestamps", options.timestamps)])


def _query(options: LogOptions) -> list[tuple[str, Any]]:
    query: list[tuple[str, Any]] = []
    if options.tail >= 0:
        query.append(("tailLines", options.tail))
    if options.since_time is not None:
        query.append(("sinceTime", options.since_time.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")))
    elif options.since is not None:
        query.append(("sinceSeconds", max(1, round(options.since))))
    return query


def _read(cluster: Cluster, pod: Object, query: Query) -> Iterator[str]:
    name = name_of(pod)
    try:
        with closing(cluster.log(pod["metadata"]["namespace"], name, query)) as response:
            yield from _lines(response.stream(1 << 16))
    except NotStartedError as error:
        why = instance(pod).reason or str(error)
        raise ClusterError(f"{name} has no log yet: {why}") from error
    except urllib3.exceptions.HTTPError as error:
        raise ClusterError(f"the log of {name} was cut ({error}): ask again, or follow it with -f") from error


def _lines(chunks: Iterable[bytes], *, unfinished: bool = True) -> Iterator[str]:
    """Lines of bytes; a last one that has no end is left out where it is known to come again."""
    begun: list[bytes] = []
    for chunk in chunks:
        *whole, rest = chunk.split(b"\n")
        for line in whole:
            yield b"".join([*begun, line]).decode(errors="replace")
            begun.clear()
        begun.append(rest)
    if unfinished and any(begun):
        yield b"".join(begun).decode(errors="replace")


@dataclass
class _Position:
    """How far a log was read: the time of its last line, and how many lines have that time."""

    stamp: str = ""
    lines: int = 0

    def advance(self, stamp: str) -> None:
        self.lines = self.lines + 1 if stamp == self.stamp else 1
        self.stamp = stamp


def _followed(cluster: Cluster, pod: Object, query: Query, timestamps: bool) -> Iterator[str]:
    """Lines until the pod has ended, through restarts of its container and lost connections."""
    position, ended = _Position(), False
    while True:
        try:
            for stamp, text in _new_lines(cluster, pod, _from(query, position), position, last=ended):
                yield f"{stamp} {text}" if timestamps and stamp else text
        except NotFoundError:
            return
        except (NotStartedError, urllib3.exceptions.HTTPError):
            pass  # it starts later, or goes on
        if ended:
            return
        ended = _has_ended(cluster, pod)
        if not ended:
            time.sleep(_PAUSE)


def _from(query: Query, position: _Position) -> Query:
    if not position.stamp:
        return query
    kept = [(key, value) for key, value in query if key not in ("tailLines", "sinceSeconds", "sinceTime")]
    return [*kept, ("sinceTime", position.stamp.removesuffix("Z").partition(".")[0] + "Z")]


def _new_lines(
    cluster: Cluster, pod: Object, query: Query, position: _Position, *, last: bool
) -> Iterator[tuple[str, str]]:
    """Times and texts of lines after a position, which moves on."""
    known = replace(position)
    query = [*query, ("timestamps", True), ("follow", True)]
    with closing(cluster.log(pod["metadata"]["namespace"], name_of(pod), query, _SILENCE)) as response:
        for line in _lines(response.stream(1 << 16), unfinished=last):
            stamp, _, text = line.partition(" ")
            if not _STAMP.fullmatch(stamp):
                yield "", line
            elif not _is_known(stamp, known):
                position.advance(stamp)
                yield stamp, text


def _is_known(stamp: str, known: _Position) -> bool:
    """Whether a line came before; those of the last known time are counted off."""
    if not known.stamp or _instant(stamp) > _instant(known.stamp):
        return False
    if stamp == known.stamp:
        known.lines -= 1
        return known.lines >= 0
    return True


def _instant(stamp: str) -> tuple[str, str]:
    """A time that can be compared: the server leaves out zeros at the end of its fraction."""
    whole, _, fraction = stamp.removesuffix("Z").partition(".")
    return whole, fraction.ljust(9, "0")


def _has_ended(cluster: Cluster, pod: Object) -> bool:
    now = cluster.find(PODS, pod["metadata"]["namespace"], name_of(pod))
    return now is None or now["metadata"]["uid"] != pod["metadata"]["uid"] or instance(now).status.ended
