"""The records of backends, as tables for people and as plain data for programs."""

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import fields, is_dataclass
from datetime import UTC, datetime
from enum import Enum
from typing import Any

from hasten.cluster.backend import Event, Instance, Job, Node, Server, Status, VolumeRecord

NOTHING = "N/A"
_UNITS = (("y", 365 * 86400), ("d", 86400), ("h", 3600), ("m", 60))
_TABLE_PORTS = ("RESTFUL", "GRPC")
_INDENT = "  "
_OTHER_THAN_TEXT = re.compile(
    r"[-+]*[.0-9][-+.:_0-9a-fox]*|[-+]?\.?(inf|infinity|nan)|y|n|yes|no|on|off|true|false|null|~|=|<<|", re.IGNORECASE
)
"""Texts that some YAML reader, of version 1.1 or 1.2, takes for a number, a time, a boolean, null or a merge; and more.

PyYAML quotes what it would itself read so. Others read more: kubectl takes `y` for true, and 1e-3 and 0809 for numbers.
"""

Rows = Iterable[Sequence[str]]


def short_duration(seconds: float) -> str:
    """Its largest unit alone, as kubectl writes it: 45s, 3m, 2h, 5d, 1y."""
    whole = max(0, int(seconds))
    for unit, size in _UNITS:
        if whole >= size:
            return f"{whole // size}{unit}"
    return f"{whole}s"


def age(since: datetime, until: datetime | None = None) -> str:
    """Time from one moment to another, or to now."""
    return short_duration(((until or datetime.now(UTC)) - since).total_seconds())


def columns(header: Sequence[str], rows: Rows, *, ruled: bool = False) -> list[str]:
    """Lines of a table whose columns are two spaces apart; `ruled` underlines the header."""
    lines = [list(header), *([["-" * len(word) for word in header]] if ruled else []), *map(list, rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    pattern = "  ".join(f"{{:{width}}}" for width in widths)
    return [pattern.format(*cells).rstrip() for cells in lines]


def job_lines(jobs: Sequence[Job], *, namespaces: bool = False) -> list[str]:
    """The table of `list`."""
    rows = [(job.name, str(job.status), job.trainer, short_duration(job.duration), *_job_gpus(job)) for job in jobs]
    header = ("NAME", "STATUS", "TRAINER", "DURATION", "GPU(Requested)", "GPU(Allocated)", "NODE")
    return _with_namespaces(jobs, header, rows) if namespaces else columns(header, rows)


def top_job_lines(jobs: Sequence[Job], *, namespaces: bool = False) -> list[str]:
    """The table of `top job`: most GPUs first, and their sums."""
    most_first = sorted(jobs, key=lambda job: -job.gpus)
    rows = [(job.name, str(job.status), job.trainer, age(job.created), *_job_gpus(job)) for job in most_first]
    header = ("NAME", "STATUS", "TRAINER", "AGE", "GPU(Requested)", "GPU(Allocated)", "NODE")
    lines = _with_namespaces(most_first, header, rows) if namespaces else columns(header, rows)
    running = [job for job in jobs if job.status is Status.RUNNING]
    allocated, requested = sum(map(allocated_gpus, running)), sum(job.gpus for job in running)
    return [*lines, "", f"Total Allocated/Requested GPUs of Training Jobs: {allocated}/{requested}"]


def _with_namespaces(records: Sequence[Any], header: Sequence[str], rows: Rows) -> list[str]:
    return columns(
        ("NAMESPACE", *header), [(record.namespace, *row) for record, row in zip(records, rows, strict=True)]
    )


def _job_gpus(job: Job) -> tuple[str, str, str]:
    allocated = str(allocated_gpus(job)) if job.status in (Status.PENDING, Status.RUNNING) else NOTHING
    chief = next((each.node for each in job.instances if each.is_chief), None)
    return str(job.gpus), allocated, chief or NOTHING


def allocated_gpus(job: Job) -> int:
    """GPUs of those of its instances that run."""
    return sum(each.gpus for each in job.instances if each.status is Status.RUNNING)


def why(job: Job) -> str | None:
    """Why it waits or has failed, from the best that its backend tells; None for jobs that run or went well."""
    if job.status in (Status.RUNNING, Status.SUCCEEDED):
        return None
    if job.reason:
        return job.reason
    reasons = [each.reason for each in job.instances if each.reason]
    warnings = sorted((event for event in job.events if event.kind == "Warning"), key=lambda event: event.time)
    return next(iter(reasons), None) or (warnings[-1].message if warnings else "its backend has not said why")


def job_details(job: Job, *, events: bool = False, gpus: bool = False) -> list[str]:
    """What `get` prints."""
    summary = [
        ("Name:", job.name),
        ("Status:", str(job.status)),
        ("Namespace:", job.namespace),
        ("Priority:", job.priority or NOTHING),
        ("Trainer:", job.trainer),
        ("Duration:", short_duration(job.duration)),
        ("CreateTime:", _moment(job.created)),
        ("EndTime:", _moment(job.ended)),
    ]
    reason = why(job)
    rows = [(each.name, str(each.status), _age_of(each), *_chief_gpus_node(each)) for each in job.instances]
    header = ("NAME", "STATUS", "AGE", "IS_CHIEF", "GPU(Requested)", "NODE")
    return [
        *_summary(summary if reason is None else [*summary, ("Reason:", _one_line(reason))]),
        *_section("Instances:", header, rows, "there are none yet"),
        *(_gpu_lines(job) if gpus else []),
        *(_event_lines(job.events) if events else []),
    ]


def _chief_gpus_node(instance: Instance) -> tuple[str, str, str]:
    return str(instance.is_chief).lower(), str(instance.gpus), instance.node or NOTHING


def _gpu_lines(job: Job) -> list[str]:
    header = ("INSTANCE", "NODE(IP)", "GPU(Requested)", "GPU(IndexId)", "GPU(DutyCycle)", "GPU Memory(Used/Total)")
    unmeasured = (NOTHING, NOTHING, NOTHING)
    rows = [(each.name, each.node or NOTHING, str(each.gpus), *unmeasured) for each in job.instances]
    sums = f"{_INDENT}Allocated/Requested GPUs of Job: {allocated_gpus(job)}/{job.gpus}"
    return [*_section("GPUs:", header, rows, "there are no instances yet"), "", sums]


def _event_lines(events: Sequence[Event]) -> list[str]:
    rows = [(each.source, each.kind, age(each.time), f"[{each.reason}] {_one_line(each.message)}") for each in events]
    return _section("Events:", ("SOURCE", "TYPE", "AGE", "MESSAGE"), rows, "there are none")


def server_lines(servers: Sequence[Server], *, namespaces: bool = False, all_ports: bool = False) -> list[str]:
    """The table of `serve list`; metrics' ports are shown with `all_ports` alone, GPUs where a server has any."""
    gpus = any(server.gpus for server in servers)
    rows = [_server_row(server, gpus=gpus, all_ports=all_ports) for server in servers]
    header = ("NAME", "TYPE", "VERSION", "DESIRED", "AVAILABLE", "ADDRESS", "PORTS", *(("GPU",) if gpus else ()))
    return _with_namespaces(servers, header, rows) if namespaces else columns(header, rows)


def _server_row(server: Server, *, gpus: bool, all_ports: bool) -> list[str]:
    counts = (str(server.desired), str(server.available))
    ports = _ports(server, None if all_ports else _TABLE_PORTS)
    cells = [server.name, server.type, server.version, *counts, server.address or NOTHING, ports]
    return [*cells, str(server.gpus)] if gpus else cells


def _ports(server: Server, names: Sequence[str] | None = None) -> str:
    reasons = [f"{name}:{port}" for name, port in server.ports.items() if names is None or name in names]
    return ",".join(reasons) or NOTHING


def server_details(server: Server, *, events: bool = False) -> list[str]:
    """What `serve get` prints."""
    summary = [
        ("Name:", server.name),
        ("Namespace:", server.namespace),
        ("Type:", server.type),
        ("Version:", server.version),
        ("Desired:", str(server.desired)),
        ("Available:", str(server.available)),
        ("Age:", age(server.created)),
        ("Address:", server.address or NOTHING),
        ("Port:", _ports(server)),
    ]
    gpus = ("GPU",) if server.gpus else ()
    if server.gpus:
        summary.append(("GPUs:", str(server.gpus)))
    summary += [("Reason:", _one_line(server.reason))] if server.reason else []
    summary += [("Reason:", _one_line(f"{each.name}: {each.reason}")) for each in server.instances if each.reason]
    rows = [_instance_row(each, gpus=bool(gpus)) for each in server.instances]
    header = ("NAME", "STATUS", "AGE", "READY", "RESTARTS", *gpus, "NODE")
    lines = [*_summary(summary), *_section("Instances:", header, rows, "there are none yet")]
    return [*lines, *_event_lines(server.events)] if events else lines


def _instance_row(instance: Instance, *, gpus: bool) -> list[str]:
    cells = [instance.name, str(instance.status), _age_of(instance), f"{int(instance.ready)}/1", str(instance.restarts)]
    return [*cells, *([str(instance.gpus)] if gpus else []), instance.node or NOTHING]


def node_lines(nodes: Sequence[Node]) -> list[str]:
    """The table of `top node`, and the share of GPUs that are taken."""
    rows = [
        (each.name, each.address, each.role, each.status, str(each.gpus), str(each.allocated_gpus)) for each in nodes
    ]
    header = ("NAME", "IPADDRESS", "ROLE", "STATUS", "GPU(Total)", "GPU(Allocated)")
    taken, total = sum(each.allocated_gpus for each in nodes), sum(each.gpus for each in nodes)
    share = 100 * taken / total if total else 0.0
    lines = columns(header, rows)
    rule = "-" * max(map(len, lines))
    return [*lines, rule, f"Allocated/Total GPUs In Cluster: {taken}/{total} ({share:.1f}%)"]


def volume_lines(volumes: Sequence[VolumeRecord], *, namespaces: bool = False) -> list[str]:
    """The table of `data list`."""
    rows = [(each.name, each.access_mode, each.description, each.owner, age(each.created)) for each in volumes]
    header = ("NAME", "ACCESSMODE", "DESCRIPTION", "OWNER", "AGE")
    return _with_namespaces(volumes, header, rows) if namespaces else columns(header, rows)


def _summary(rows: Rows) -> list[str]:
    label, *others = rows
    return columns(label, others)


def _section(title: str, header: Sequence[str], rows: Sequence[Sequence[str]], nothing: str) -> list[str]:
    lines = columns(header, rows, ruled=True) if rows else [nothing]
    return ["", title, *(f"{_INDENT}{line}" for line in lines)]


def _age_of(instance: Instance) -> str:
    return age(instance.created, instance.ended)


def _moment(time: datetime | None) -> str:
    return NOTHING if time is None else time.astimezone().strftime("%Y-%m-%d %H:%M:%S")


def _one_line(text: str) -> str:
    return " ".join(text.split())


def plain(value: Any) -> Any:
    """A record as dicts, lists, texts and numbers; times as RFC 3339 in UTC, a job with its duration in seconds."""
    if isinstance(value, Enum):
        return str(value)
    if value is None or isinstance(value, str | int | float):
        return value
    if isinstance(value, datetime):
        return value.astimezone(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if is_dataclass(value):
        record = {each.name: plain(getattr(value, each.name)) for each in fields(value)}
        return {**record, "duration": round(value.duration, 3)} if isinstance(value, Job) else record
    return [plain(item) for item in value]


def as_json(records: Any) -> str:
    """A record, or several, as JSON."""
    return json.dumps(plain(records), indent=4, ensure_ascii=False)


def as_yaml(*documents: Any) -> str:
    """Records or objects as YAML, a document each."""
    import yaml

    try:
        from yaml import CSafeDumper as SafeDumper
    except ImportError:
        from yaml import SafeDumper  # type: ignore[assignment]  # ten times as slow, otherwise the same

    class Dumper(SafeDumper):
        """Writes a thing that occurs twice two times: a reader of manifests does not expect anchors."""

        def ignore_aliases(self, data: Any) -> bool:
            return True

    def written(dumper: Any, text: str) -> Any:
        style = "|" if "\n" in text else "'" if _OTHER_THAN_TEXT.fullmatch(text) else None
        return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)

    Dumper.add_representer(str, written)
    options: dict[str, Any] = {"sort_keys": False, "allow_unicode": True, "width": 1000}
    return "---\n".join(yaml.dump(plain(document), Dumper=Dumper, **options) for document in documents)
