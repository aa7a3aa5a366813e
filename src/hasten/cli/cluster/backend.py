"""Options of every command of `hasten cluster`: backend, namespace, form of the output."""

import argparse
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from hasten.cluster import table
from hasten.cluster.backend import Backend
from hasten.core.errors import ClusterError, ConfigError, HastenError, UnsupportedError
from hasten.core.extras import require_extra

BACKEND_VARIABLE = "HASTEN_CLUSTER"
LOCAL, KUBERNETES = "local", "kubernetes"
FORMATS = ("wide", "json", "yaml")
LEVELS = {"debug": "DEBUG", "info": "INFO", "warn": "WARNING", "error": "ERROR"}
JOB_TYPES = {"pytorchjob": "pytorchjob", "pytorch": "pytorchjob", "trainjob": "trainjob", "job": "job"}
SERVER_TYPES = {"triton": "triton", "triton-serving": "triton"}


def _local(args: argparse.Namespace) -> Backend:
    for name, flag in (("kubeconfig", "--config"), ("context", "--context")):
        if getattr(args, name, None) is not None:
            raise UnsupportedError(
                f"{flag} is of Kubernetes: add --cluster kubernetes, or set {BACKEND_VARIABLE} to it"
            )
    from hasten.cluster.local.backend import LocalBackend

    return LocalBackend()


def _kubernetes(args: argparse.Namespace) -> Backend:
    from hasten.cluster.kubernetes.backend import KubernetesBackend

    only_plans = getattr(args, "dry_run", False)
    return KubernetesBackend(getattr(args, "kubeconfig", None), getattr(args, "context", None), only_plans=only_plans)


BACKENDS: dict[str, Callable[[argparse.Namespace], Backend]] = {LOCAL: _local, KUBERNETES: _kubernetes}


def add_backend_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of all verbs. They have no defaults, so that those before a verb hold where it has none."""
    group = parser.add_argument_group("backend")

    def add(*flags: str, **options: Any) -> None:
        group.add_argument(*flags, default=argparse.SUPPRESS, **options)

    add("-n", "--namespace", metavar="NAME", help="namespace of the jobs, servers and volumes (default: the backend's)")
    add(
        "--cluster",
        dest="backend",
        choices=tuple(BACKENDS),
        help=f"where: processes of this machine, or a Kubernetes cluster (default: ${BACKEND_VARIABLE}, or {LOCAL})",
    )
    add("--config", dest="kubeconfig", metavar="FILE", help="kubeconfig (default: as kubectl's)")
    add("--context", metavar="NAME", help="context of the kubeconfig (default: its current one)")
    add("--loglevel", choices=tuple(LEVELS), help="what to log on standard error (default: warn)")
    add("--arena-namespace", action=_Refused, metavar="NAME", help="Arena's own namespace: hasten has none")


class _Refused(argparse.Action):
    def __call__(self, *_: Any) -> None:
        raise UnsupportedError(
            "--arena-namespace says where Arena finds its operators; hasten needs none of its own: leave it out"
        )


def open_backend(args: argparse.Namespace) -> Backend:
    """The backend that the command line, or else the environment, names."""
    require_extra("cluster", "hasten cluster")
    _log(getattr(args, "loglevel", None))
    name = getattr(args, "backend", None) or os.environ.get(BACKEND_VARIABLE) or LOCAL
    if name not in BACKENDS:
        raise ConfigError(f"{BACKEND_VARIABLE} is {name!r}, which is none of {', '.join(BACKENDS)}")
    return BACKENDS[name](args)


def _log(level: str | None) -> None:
    if level is None:
        return
    import logging

    logging.basicConfig(stream=sys.stderr, format="%(levelname)s %(name)s: %(message)s", force=True)
    logging.getLogger("hasten").setLevel(LEVELS[level])
    # its requests alone: the Kubernetes client would log bodies, and with them secrets
    logging.getLogger("urllib3").setLevel(LEVELS[level])


def namespace(args: argparse.Namespace, backend: Backend) -> str:
    """The namespace that the user names, or the backend's own."""
    named: str | None = getattr(args, "namespace", None)
    return backend.default_namespace() if named is None else named


def one_or_all(args: argparse.Namespace, backend: Backend) -> str | None:
    """As `namespace`; None, all of them, with --all-namespaces."""
    return None if args.all_namespaces else namespace(args, backend)


def add_all_namespaces(parser: argparse.ArgumentParser) -> None:
    """Add -A."""
    parser.add_argument(
        "-A", "--all-namespaces", "--allNamespaces", action="store_true", help="of all namespaces, and name them"
    )


def add_output(parser: argparse.ArgumentParser) -> None:
    """Add -o."""
    parser.add_argument("-o", "--output", choices=FORMATS, help="print a table (wide), JSON or YAML")


def add_type(parser: argparse.ArgumentParser, types: dict[str, str]) -> None:
    """Add -T."""

    def known(text: str) -> str:
        if text not in types:
            raise UnsupportedError(f"--type {text}: there are only {', '.join(types)}")
        return types[text]

    parser.add_argument("-T", "--type", type=known, metavar="TYPE", help=f"of this type alone: {', '.join(types)}")


def add_dry_run(parser: argparse.ArgumentParser) -> None:
    """Add --dry-run."""
    parser.add_argument("--dry-run", action="store_true", help="print the objects as YAML, and touch nothing")


def print_lines(lines: Iterable[str], *, follow: bool = False) -> int:
    """Print lines; those of a log that grows at once. Returns the exit status of success."""
    for line in lines:
        sys.stdout.write(f"{line}\n")
        if follow:
            sys.stdout.flush()
    return 0


def print_records(records: Any, output: str | None, lines: Callable[[], Sequence[str]]) -> int:
    """Print records as the user asks, or as lines of a table."""
    if output == "json":
        return print_lines([table.as_json(records)])
    if output == "yaml":
        print(table.as_yaml(records), end="")
        return 0
    return print_lines(lines())


def print_objects(objects: Sequence[dict[str, Any]]) -> int:
    """Print what a dry run would make."""
    print(table.as_yaml(*objects), end="")
    return 0


def for_each(names: Sequence[str], act: Callable[[str], None], done: str) -> int:
    """Do something with every name, say what is done, and go on where it fails.

    Returns 0, 1 if any failed, and 2 if any was bad input.
    """
    status = 0
    for name in names:
        try:
            act(name)
        except HastenError as error:
            print(f"hasten: error: {error}", file=sys.stderr)
            status = max(status, 1 if isinstance(error, ClusterError) else 2)
        else:
            print(done.format(name))
    return status
