"""Ctrl-C while a command imports what it needs, and signals that end a command which has to clean up."""

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType

INTERRUPTED = 130
_AGAIN_S = 0.05
_ENDING = (signal.SIGTERM, signal.SIGHUP)


class TerminatedError(BaseException):
    """A signal ended the command; not an Exception, so that nothing on the way up swallows it."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.status = 128 + number


@contextmanager
def interrupts_beside_imports() -> Iterator[None]:
    """Let SIGINT raise KeyboardInterrupt, but not within an import; as it was, off the main thread.

    There it may be lost: torch, for one, takes it for a numpy that is not there, and goes on without. The process ends
    at once instead or, where it has started others, raises KeyboardInterrupt when the import is done.
    """
    before = signal.getsignal(signal.SIGINT)
    is_default = before in (signal.SIG_DFL, signal.default_int_handler)
    if not is_default or threading.current_thread() is not threading.main_thread():
        yield
        return
    signal.signal(signal.SIGINT, _interrupt)
    try:
        yield
    finally:
        if signal.getsignal(signal.SIGINT) is _interrupt:
            signal.signal(signal.SIGINT, before)


@contextmanager
def cleaned_up_when_terminated() -> Iterator[None]:
    """Let SIGTERM and SIGHUP raise TerminatedError, so that folders being written and servers go with the command.

    A signal that is ignored, as SIGHUP is under nohup, stays so, and all do off the main thread.
    """

    def stop(number: int, _frame: FrameType | None) -> None:
        # what is left is cleaning up, which another signal should not cut short
        for each in taken:
            signal.signal(each, signal.SIG_IGN)
        raise TerminatedError(number)

    on_main_thread = threading.current_thread() is threading.main_thread()
    taken = [each for each in _ENDING if on_main_thread and signal.getsignal(each) is signal.SIG_DFL]
    for each in taken:
        signal.signal(each, stop)
    try:
        yield
    finally:
        for each in taken:
            signal.signal(each, signal.SIG_DFL)


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
