"""The command `hasten`: its subcommands, and what errors look like to its user."""

import os
import sys
from collections.abc import Callable, Sequence

from hasten import __version__
from hasten.cli import convert, demo, generate, repository, serve
from hasten.cli.bench import benchmarks as bench
from hasten.cli.cluster import verbs as cluster
from hasten.cli.options import Parser
from hasten.core.errors import CapacityError, ClusterError, EngineError, HastenError

BAD_INPUT = 2
FAILED = 1
INTERRUPTED = 130
PIPE_CLOSED = 141


def build_parser() -> Parser:
    """The whole command line. Imports nothing heavy: subcommands import what they need when they run."""
    parser = Parser(
        prog="hasten",
        description="Takes a Hugging Face checkpoint to a measured, faster language model.",
    )
    parser.add_argument("--version", action="version", version=f"hasten {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for room in (convert, generate, serve, repository, bench, cluster, demo):
        room.add_parser(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit status.

    0 is success, 1 a failed run or a missed threshold, 2 bad input, 130 an interrupt. An error that hasten did not
    foresee keeps its traceback.
    """
    try:
        args = build_parser().parse_args(argv)
        run: Callable[..., int] = args.run
        status = run(args)
        sys.stdout.flush()
        return status
    except HastenError as error:
        print(f"hasten: error: {error}", file=sys.stderr)
        return FAILED if isinstance(error, EngineError | CapacityError | ClusterError) else BAD_INPUT
    except KeyboardInterrupt:
        print("hasten: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # the reader is gone; without this, Python would complain once more while it flushes at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return PIPE_CLOSED
