"""Processes that a benchmark starts: they end with it, however it ends."""

import multiprocessing
import os
import signal
import threading


def end_with_parent() -> None:
    """Have this process end by SIGTERM when the process that started it has ended, which may be killed itself."""
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os.kill(os.getpid(), signal.SIGTERM)
