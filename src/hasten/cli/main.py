"""The command `hasten`: its subcommands, and what errors look like to its user."""

import errno
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib import import_module

from hasten import __version__
from hasten.cli.interrupts import INTERRUPTED, TerminatedError, interrupts_beside_imports, say_interrupted
from hasten.cli.options import Parser
from hasten.core.errors import HastenError, exit_status
from hasten.core.files import file_in_the_way

BAD_INPUT = 2
FAILED = 1
PIPE_CLOSED = 141
_UNWRITABLE = frozenset({errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
"""Errors that only writing has."""


_MODULES = {
    **{name: name for name in ("plan", "download", "convert", "quantize", "warm", "generate", "embed", "classify")},
    **{"fill-mask": "fill_mask", "batch": "batch", "serve": "serve", "repository": "repository"},
    **{"bench": "bench.benchmarks", "report": "report", "tune": "tune", "cluster": "cluster.verbs", "demo": "demo"},
}
"""Where each command is, in the order of the help."""


def build_parser(command: str | None = None) -> Parser:
    """The whole command line, or one command of it, which takes a third of the time.

    Imports nothing heavy: subcommands import what they need when they run.
    """
    parser = Parser(
        prog="hasten",
        description="Inference engine and server for transformer language models: convert, benchmark, generate, serve.",
    )
    parser.add_argument("--version", action="version", version=f"hasten {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name in _MODULES if command is None else (command,):
        import_module(f"hasten.cli.{_MODULES[name]}").add_parser(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit status.

    0 is success, 1 a failed run or a missed threshold, 2 bad input, 130 an interrupt, 129 and 143 a hang-up and a
    termination that were cleaned up after, 141 a reader of the output that has gone. An error that hasten did not
    foresee keeps its traceback.
    """
    try:
        _open_standard_streams()
        return _run(sys.argv[1:] if argv is None else argv)
    except KeyboardInterrupt:
        say_interrupted()
        return INTERRUPTED


def _run(argv: Sequence[str]) -> int:
    parser = build_parser(argv[0] if argv and argv[0] in _MODULES else None)
    try:
        args = parser.parse_args(argv)
        parser = args.parser
        run: Callable[..., int] = args.run
        with interrupts_beside_imports():
            status = run(args)
        sys.stdout.flush()
        return status
    except HastenError as error:
        return _fail(parser.named_by_options(str(error)), exit_status(error))
    except TerminatedError as error:
        print("hasten: terminated", file=sys.stderr)
        return error.status
    except BrokenPipeError:
        _discard_output()
        return PIPE_CLOSED
    except OSError as error:
        if error.filename is not None:
            return _fail(_explained(error), BAD_INPUT)
        if error.errno == errno.EBADF and sys.stdout.fileno() == 1:
            return _fail("standard output is closed, and there is something to print", FAILED)
        if error.errno in _UNWRITABLE:
            return _fail(f"cannot write the output: {error.strerror}", FAILED)
        raise


def _fail(message: str, status: int) -> int:
    """Print an error on standard error, after what was printed before it."""
    try:
        sys.stdout.flush()
    except OSError:
        _discard_output()
    print(f"hasten: error: {message}", file=sys.stderr)
    return status


def _explained(error: OSError) -> str:
    """An error of the system about a file."""
    where = f"{error.filename} and {error.filename2}" if error.filename2 is not None else error.filename
    if (file := file_in_the_way(error)) is not None:
        return f"{file} is a file, and a folder is needed there"
    return f"{'cannot write ' if error.errno in _UNWRITABLE else ''}{where}: {error.strerror}"


def _discard_output() -> None:
    """Drop what cannot be written to standard output: Python would complain of it once more at exit."""
    with suppress(OSError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _open_standard_streams() -> None:
    """Give each standard stream that is closed a descriptor, which the next file or socket would get instead.

    Nothing can be written to a closed standard output: what a command prints is then an error as it is on a full disk.
    """
    for number, flags in enumerate((os.O_RDONLY, os.O_RDONLY, os.O_WRONLY)):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, flags)  # the lowest number that is free
    if sys.stdin is None:
        sys.stdin = open(0, closefd=False, encoding="utf-8")  # noqa: SIM115 - for as long as the process lives
    if sys.stdout is None:
        sys.stdout = open(1, "w", closefd=False, encoding="utf-8")  # noqa: SIM115
    if sys.stderr is None:
        sys.stderr = open(2, "w", closefd=False, encoding="utf-8")  # noqa: SIM115
