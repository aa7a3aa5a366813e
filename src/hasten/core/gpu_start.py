"""What a process on a GPU can begin before it has imported torch, without Python's lock: its imports take seconds."""

import ctypes
import importlib
import threading
from contextlib import suppress


def begin() -> None:
    """Initialize the CUDA driver, if there is one, and have Triton hash its own files, in a thread.

    Triton names compiled kernels by that hash, of some hundred megabytes. Not for programs that fork: a child cannot
    use an initialized driver.
    """
    threading.Thread(target=_begin, name="GPU start", daemon=True).start()


def _begin() -> None:
    with suppress(OSError, AttributeError):  # no driver, or another one than expected: nothing is begun then
        if ctypes.CDLL("libcuda.so.1").cuInit(0) == 0:
            with suppress(ImportError):
                importlib.import_module("triton.runtime.cache").triton_key()
