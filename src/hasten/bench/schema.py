"""JSON schemas of what benchmarks write, made of the types of their reports.

The version counts up when a field goes or means something else; fields may be added without that.
"""

import dataclasses
import types
import typing
from collections.abc import Mapping
from importlib import import_module
from typing import Any

from hasten.core.errors import ConfigError

VERSION = 1
_REPORTS: Mapping[str, str] = {
    "embed": "hasten.bench.embed:EmbedReport",
    "kernels": "hasten.bench.kernels:KernelsReport",
    "lambada": "hasten.bench.lambada:LambadaReport",
    "latency": "hasten.bench.latency:LatencyReport",
    "load": "hasten.bench.load.metrics:LoadReport",
    "report": "hasten.bench.evaluation.form:ModelReport",
    "serving": "hasten.bench.serving:ServingReport",
    "startup": "hasten.bench.startup:StartupReport",
    "suite": "hasten.bench.suite:SuiteReport",
    "throughput": "hasten.bench.throughput:ThroughputReport",
    "tune": "hasten.bench.tune:TuneReport",
}
"""Benchmark -> where the type of its report is."""
BENCHMARKS = tuple(_REPORTS)
_COMMANDS = {"report": "hasten report", "tune": "hasten tune"}
"""Those that are no subcommand of `hasten bench`."""
_PLAIN: Mapping[Any, str] = {
    bool: "boolean",
    int: "integer",
    float: "number",
    str: "string",
    type(None): "null",
}


def head(benchmark: str) -> dict[str, Any]:
    """How each report begins: which benchmark it is of, and the version of its schema."""
    return {"benchmark": benchmark, "schema": VERSION}


def schema(benchmark: str) -> dict[str, Any]:
    """The JSON schema of a benchmark's report."""
    if benchmark not in _REPORTS:
        raise ConfigError(f"benchmark {benchmark!r} is not known; there are {', '.join(BENCHMARKS)}")
    module, _, name = _REPORTS[benchmark].partition(":")
    report = _of(getattr(import_module(module), name))
    fixed = {"benchmark": {"const": benchmark}, "schema": {"const": VERSION}, "options": {"type": "object"}}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": _COMMANDS.get(benchmark, f"hasten bench {benchmark}"),
        **report,
        "properties": fixed | report["properties"],
        "required": [*fixed, *report["required"]],
    }


def _of(kind: Any) -> dict[str, Any]:
    """The schema of a type."""
    if kind is Any:
        return {}
    if kind in _PLAIN:
        return {"type": _PLAIN[kind]}
    if dataclasses.is_dataclass(kind) or typing.is_typeddict(kind):
        return _object(kind)
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return {"anyOf": [_of(each) for each in arguments]}
    if origin in (list, tuple):
        return {"type": "array", "items": _of(arguments[0])}
    return {"type": "object", "additionalProperties": _of(arguments[1])}


def _object(kind: Any) -> dict[str, Any]:
    """Of a dataclass or a TypedDict, with what its docstring says of it."""
    hints = typing.get_type_hints(kind)
    required = sorted(kind.__required_keys__) if typing.is_typeddict(kind) else list(hints)
    about = {"description": kind.__doc__.partition("\n")[0]} if kind.__doc__ else {}
    properties = {name: _of(hint) for name, hint in hints.items()}
    return {"type": "object", **about, "properties": properties, "required": required}
