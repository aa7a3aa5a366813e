"""What a supervisor runs: plans, as they stand in a record. Imports nothing that takes time."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Launch:
    """How to start a process."""

    command: list[str]
    env: dict[str, str]
    """What is added to the environment of the command that submitted it."""
    working_dir: str
    mounts: list[tuple[str, str, bool]] = field(default_factory=list)
    """Source, path, whether for reading only."""


@dataclass(frozen=True, kw_only=True)
class JobPlan:
    """What a job's supervisor runs."""

    launch: Launch
    names: list[str]
    """Of its instances; the first is the chief."""
    gpus: int
    """Of each instance."""
    nproc_per_node: str | None
    retry: int
    running_timeout: float | None
    ttl_after_finished: float | None
    clean_task_policy: str


@dataclass(frozen=True, kw_only=True)
class ServerPlan:
    """What a server's supervisor runs. `ports` go to the first replica; the others get free ones."""

    launch: Launch
    name: str
    replicas: int
    gpus: int
    """Of each replica."""
    ports: dict[str, int]
    address: str
    exit_timeout: float
    startup_timeout: float


def to_json(plan: JobPlan | ServerPlan) -> dict[str, Any]:
    """A plan for a record."""
    return dataclasses.asdict(plan)


def launch_of(record: Mapping[str, Any]) -> Launch:
    """The part of a plan that jobs and servers have in common."""
    return Launch(**record["launch"])


def job_plan_of(record: Mapping[str, Any]) -> JobPlan:
    """The plan in a job's record."""
    return JobPlan(**{**record, "launch": launch_of(record)})


def server_plan_of(record: Mapping[str, Any]) -> ServerPlan:
    """The plan in a server's record."""
    return ServerPlan(**{**record, "launch": launch_of(record)})
