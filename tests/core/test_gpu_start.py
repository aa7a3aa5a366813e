"""What a process on a GPU begins before it has torch: where there is no driver, one that fails, and one that works."""

import ctypes
import threading
from types import SimpleNamespace
from typing import Any

import pytest

from hasten.core import gpu_start


def _begun(monkeypatch: Any, load: Any) -> list[str]:
    """The libraries that were asked for, and whether Triton has hashed its files."""
    cache = pytest.importorskip("triton.runtime.cache")
    done: list[str] = []

    def driver(name: str) -> Any:
        done.append(name)
        return load()

    monkeypatch.setattr(ctypes, "CDLL", driver)
    monkeypatch.setattr(cache, "triton_key", lambda: done.append("key"))
    gpu_start.begin()
    for thread in threading.enumerate():
        if thread.name == "GPU start":
            thread.join()
    return done


@pytest.mark.any_python
def test_the_compilers_key_is_computed_where_a_driver_works(monkeypatch: Any) -> None:
    assert _begun(monkeypatch, lambda: SimpleNamespace(cuInit=lambda _flags: 0)) == ["libcuda.so.1", "key"]


@pytest.mark.any_python
def test_without_a_driver_that_works_nothing_is_begun(monkeypatch: Any) -> None:
    def missing() -> None:
        raise OSError("libcuda.so.1: cannot open shared object file")

    assert _begun(monkeypatch, missing) == ["libcuda.so.1"]
    assert _begun(monkeypatch, lambda: SimpleNamespace(cuInit=lambda _flags: 100)) == ["libcuda.so.1"]
