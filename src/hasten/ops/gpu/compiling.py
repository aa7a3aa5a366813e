"""Kernels compiled by several threads before any of them is launched."""

import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from triton import JITFunction, knobs
from triton.runtime import driver

from hasten.core.cpus import available_cpus

_MOST_THREADS = 16
"""The part of a compilation that holds Python's lock keeps no more threads than these busy."""
_PACKAGE = __name__.rpartition(".")[0]
_compiles_only: ContextVar[bool] = ContextVar("compiles_only", default=False)


@contextmanager
def compiled_together(processes: int) -> Iterator[None]:
    """A block whose kernels are not launched but compiled, by several threads, when it ends.

    Results of the block have no meaning: memory that its kernels would write holds anything. For the same reason no
    kernel may be there before (`any_compiled`): it would be launched and read such memory. `processes`: those of this
    host that compile at the same time.
    """
    assert not any_compiled()
    missing: dict[str, _Missing] = {}
    active = driver.active
    device = active.get_current_device()
    thread = threading.get_ident()

    def collect(*, key: str, fn: Any, **details: Any) -> bool:
        if threading.get_ident() != thread:
            return False  # another thread's kernel, which is to be launched
        if fn.name + key not in missing:
            compiled, data = fn.jit_function.device_caches[device][0], details["compile"]["specialization_data"]
            missing[fn.name + key] = _Missing(fn.jit_function, data, compiled, key, thread)
        return True

    with knobs.runtime.scope():
        knobs.runtime.jit_cache_hook = collect
        token = _compiles_only.set(True)
        try:
            yield
        finally:
            _compiles_only.reset(token)
            for kernel in missing.values():
                kernel.leave()
    count = max(1, min(_MOST_THREADS, available_cpus() // processes))
    # each thread has a device of its own
    with ThreadPoolExecutor(count, initializer=active.set_current_device, initargs=(device,)) as threads:
        # What cannot be compiled fails again where it is launched, where the error says in which step.
        done = [threads.submit(kernel.launcher) for kernel in missing.values()]
        for future in done:
            future.exception()


class _Missing:
    """A kernel that is to be compiled. It stands among the compiled ones meanwhile, where launching it does nothing:

    to look a kernel up that is not there takes some ten times as long, and steps of most sizes launch the same.
    """

    function = packed_metadata = None

    def __init__(
        self, jit_function: JITFunction[Any], data: str, compiled: dict[str, Any], key: str, thread: int
    ) -> None:
        """`compiled`: the kernels of its function, of which it takes the one of this `key`."""
        self._jit_function, self._data, self._thread = jit_function, data, thread
        self._compiled, self._key = compiled, key
        compiled[key] = self

    def leave(self) -> None:
        """Give the place to the kernel itself."""
        if self._compiled.get(self._key) is self:
            del self._compiled[self._key]

    def launch_metadata(self, *_: Any) -> None:
        """As of a kernel that nobody profiles."""

    def run(self, *arguments: Any) -> None:
        """Do nothing, but for a thread other than that of the block: that launches its kernels."""
        if threading.get_ident() != self._thread and (kernel := self._jit_function.preload(self._data)) is not None:
            grid_and_stream, others = arguments[:4], arguments[7:]
            kernel.run(*grid_and_stream, kernel.function, kernel.packed_metadata, None, *others)

    def launcher(self) -> Any:
        """What launches the kernel, compiled and loaded: a first launch would build it while the others wait."""
        kernel = self._jit_function.preload(self._data)
        return None if kernel is None else kernel.run


def compiles_only() -> bool:
    """Whether this is a block of `compiled_together`, where results of kernels have no meaning."""
    return _compiles_only.get()


def any_compiled() -> bool:
    """Whether this process has a kernel of this package, compiled or read from the cache of kernels."""
    modules = [module for name, module in list(sys.modules.items()) if name.startswith(_PACKAGE + ".")]
    functions = {id(value): value for module in modules for value in vars(module).values()}
    jitted = [value for value in functions.values() if isinstance(value, JITFunction)]
    return any(caches[0] for function in jitted for caches in function.device_caches.values())
