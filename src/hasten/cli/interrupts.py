"""Ctrl-C while a command imports what it needs."""

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType

INTERRUPTED = 130
_AGAIN_S = 0.05


@contextmanager
def interrupts_beside_imports() -> Iterator[None]:
    """Let SIGINT raise KeyboardInterrupt, but not within an import; as it was, off the main thread.

    There it may be lost: torch, for one, takes it for a numpy that is not there, and goes on without. The process ends
    at once instead or, where it has started others, raises KeyboardInterrupt when the import is done.
    """
    is_default = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if not is_default or threading.current_thread() is not threading.main_thread():
        yield
        return
    signal.signal(signal.SIGINT, _interrupt)
    try:
        yield
    finally:
        if signal.getsignal(signal.SIGINT) is _interrupt:
            signal.signal(signal.SIGINT, signal.default_int_handler)


def say_interrupted() -> None:
    """Print why the command ends."""
    print("hasten: interrupted", file=sys.stderr, flush=True)


def _interrupt(number: int, frame: FrameType | None) -> None:
    if not _imports(frame):
        raise KeyboardInterrupt
    if not _has_children():
        with suppress(OSError):
            sys.stdout.flush()
        say_interrupted()
        os._exit(INTERRUPTED)
    again = threading.Timer(_AGAIN_S, os.kill, (os.getpid(), number))
    again.daemon = True
    again.start()


def _imports(frame: FrameType | None) -> bool:
    """Whether a frame is part of an import."""
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False


def _has_children() -> bool:
    try:
        os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        return True
    except ChildProcessError:
        return False
