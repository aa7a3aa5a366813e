"""From command-line options to the specs that a backend gets, and the messages about what it did."""

import argparse
import shlex
from typing import Any, TypeVar

from hasten.cli.cluster.backend import namespace
from hasten.cli.options import field_names, given
from hasten.cluster.backend import Backend, ServerUpdate
from hasten.cluster.spec import TrainingJob, TritonServer, Volume
from hasten.core.errors import ConfigError

Spec = TypeVar("Spec", TrainingJob, TritonServer, Volume, ServerUpdate)


def build_spec(kind: type[Spec], args: argparse.Namespace, **others: Any) -> Spec:
    """Make a spec of the options that the user gave; `others` come before them."""
    values: dict[str, Any] = {**given(args, kind), **others}
    if "name" in field_names(kind) - values.keys():
        raise ConfigError("--name is required")
    tuples: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}
    return kind(**tuples)


def see_it(args: argparse.Namespace, backend: Backend, *words: str) -> str:
    """How to see what was made, as a command to copy."""
    where = namespace(args, backend)
    named = [] if where == backend.default_namespace() else ["-n", where]
    chosen = [] if getattr(args, "backend", None) is None else ["--cluster", args.backend]
    return f"see it: {shlex.join(['hasten', 'cluster', *words, *named, *chosen])}"
