"""What the server's log shows when it has started, as Triton's does: models, what they run on, options."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from hasten.server.options import ServeOptions

if TYPE_CHECKING:
    from tritonclient.grpc import service_pb2

    from hasten.server.engine.client import EngineClient


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Rows under a header, in a frame."""
    lines = [header, *rows]
    widths = [max(len(line[at]) for line in lines) for at in range(len(header))]
    rule = "+" + "+".join("-" * (width + 2) for width in widths) + "+"
    shown = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in lines
    ]
    return "\n".join([rule, shown[0], rule, *shown[1:], rule, ""])


def backend_table(backends: Mapping[str, Sequence[str]]) -> str:
    """What computes, and the models that it does."""
    return table(("Backend", "Models"), ((name, " ".join(models)) for name, models in backends.items()))


def model_table(entries: "Iterable[service_pb2.RepositoryIndexResponse.ModelIndex]") -> str:
    """Every model and how it stands."""
    rows = []
    for entry in entries:
        reason = " ".join(entry.reason.split())
        state = f"{entry.state}: {reason}" if reason else entry.state or "not loaded"
        rows.append((entry.name, entry.version or "-", state))
    return table(("Model", "Version", "Status"), rows)


def engine_table(engines: "Mapping[tuple[str, str], EngineClient]") -> str:
    """What each engine runs on."""
    rows = []
    for (model, version), engine in engines.items():
        several = len(engine.replicas) > 1
        for index, replica in enumerate(engine.replicas):
            info, name = replica.info, f"{model}, replica {index}" if several else model
            cache = f"{info.num_blocks} x {info.block_size}"
            row = (name, version, info.device, str(info.ranks), info.types, cache, f"{info.load_seconds:.1f} s")
            rows.append(row)
    return table(("Engine", "Version", "Device", "Ranks", "Type", "Cache (tokens)", "Load time"), rows)


def option_table(options: ServeOptions, metadata: "service_pb2.ServerMetadataResponse") -> str:
    """Every option of the server."""
    rows = [
        ("server_id", metadata.name),
        ("server_version", metadata.version),
        ("server_extensions", " ".join(metadata.extensions)),
    ]
    if options.engine is not None:
        rows.append(("model", options.engine.model))
    rows += [(f"model_repository_path[{at}]", path) for at, path in enumerate(options.model_repository)]
    models = options.model if options.engine is not None else options.repository
    for part in (models, options.server, options.endpoints, options.security):
        values = {field.name: getattr(part, field.name) for field in dataclasses.fields(part)}
        rows += [(name, _shown(value)) for name, value in values.items() if name != "server_id"]
    return table(("Option", "Value"), rows)


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return str(int(value))
    if isinstance(value, tuple):
        return " ".join(map(str, value))
    return "" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
