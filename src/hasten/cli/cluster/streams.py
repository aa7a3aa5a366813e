"""`logs` and `attach`, which jobs and servers share."""

import argparse
from datetime import UTC, datetime

from hasten.cli.cluster.parser import VerbParser
from hasten.cluster.backend import LogOptions
from hasten.cluster.spec import seconds
from hasten.core.errors import ConfigError

_ALL_LINES = -1
_MOST_LINES = 2**63 - 1
"""Kubernetes' number of lines is a 64-bit integer."""


def add_instance_options(parser: argparse.ArgumentParser) -> None:
    """Add the choice of an instance and a container."""
    parser.add_argument("-i", "--instance", metavar="NAME", help="which instance (default: the chief, or the first)")
    parser.add_argument("-c", "--container", metavar="NAME", help="which of its containers (default: the first)")


def add_log_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `logs`."""
    parser.add_argument("-f", "--follow", action="store_true", help="go on until the instance ends")
    times = parser.add_mutually_exclusive_group()
    times.add_argument("--since", metavar="TIME", help="lines of the last 5s, 2m or 3h alone")
    times.add_argument("--since-time", metavar="TIME", help="lines after this moment alone, RFC 3339")
    parser.add_argument(
        "-t", "--tail", type=int, default=_ALL_LINES, metavar="N", help="number of last lines (default: -1, all)"
    )
    parser.add_argument("--timestamps", action="store_true", help="begin each line with its time")
    add_instance_options(parser)


def log_options(args: argparse.Namespace) -> LogOptions:
    """What the options of `add_log_options` ask for."""
    if args.tail < _ALL_LINES:
        raise ConfigError(f"--tail must be at least -1 (all lines), got {args.tail}")
    if args.tail > _MOST_LINES:
        raise ConfigError(f"--tail must be at most {_MOST_LINES}, got {args.tail}")
    return LogOptions(
        follow=args.follow,
        since=None if args.since is None else seconds(args.since, "--since"),
        since_time=None if args.since_time is None else _moment(args.since_time),
        tail=args.tail,
        timestamps=args.timestamps,
        instance=args.instance,
        container=args.container,
    )


def _moment(text: str) -> datetime:
    try:
        found = datetime.fromisoformat(text)
        if found.tzinfo is not None:
            return found.astimezone(UTC)
    except (ValueError, OverflowError):
        pass
    raise ConfigError(f"--since-time {text!r} is not a moment of RFC 3339, such as 2026-08-01T12:00:00Z")


def add_attach_options(parser: VerbParser) -> None:
    """Add the options of `attach`, and the command behind them."""
    add_instance_options(parser)
    parser.words_before_command = 1
    parser.usage = f"{parser.prog} [options] NAME [--] [COMMAND ...]"
    parser.epilog = "The COMMAND is what stands behind the name or behind `--`; a shell where there is none."
