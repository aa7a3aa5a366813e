"""What a process on a GPU can begin before it has imported torch, without Python's lock: its imports take seconds."""

import ctypes
import importlib
import threading
from contextlib import suppress
from pathlib import Path

from hasten.core.gpu_weights import BEGUN


def begin(weights: Path | None = None) -> None:
    """Initialize the CUDA driver, if there is one, and have Triton hash its own files, in a thread.

    Triton names compiled kernels by that hash, of some hundred megabytes. With the folder of a checkpoint, its
    `weights` are read to the first GPU, too (`gpu_weights.py`). Not for programs that fork: a child cannot use an
    initialized driver.
    """
    if weights is not None:
        BEGUN.expect()
    threading.Thread(target=_begin, args=(weights,), name="GPU start", daemon=True).start()


def _begin(weights: Path | None) -> None:
    with suppress(OSError, AttributeError):  # no driver, or another one than expected: nothing is begun then
        if ctypes.CDLL("libcuda.so.1").cuInit(0) == 0:
            if weights is not None:
                BEGUN.begin(weights)
            with suppress(ImportError):
                importlib.import_module("triton.runtime.cache").triton_key()
    BEGUN.give_up()
