"""Kernels compiled together, and what stands in their place until then."""

import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tests.waiting import LIMIT_S

compiling = pytest.importorskip("hasten.ops.gpu.compiling")


def test_kernels_of_a_block_are_compiled_at_its_end_and_then_there(tmp_path: Path) -> None:
    """For a GPU that is not there, in a process of its own: here Triton interprets kernels."""
    program = Path(__file__).with_name("compile_together.py")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    done = subprocess.run(
        [sys.executable, str(program)], env=environment, capture_output=True, text=True, check=False, timeout=LIMIT_S
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    assert found == {
        "before": False,
        "during": 0,
        "compiled": ["_add_norm", "_add_norm", "_best_of_chunk", "_best_of_row", "_gather", "_pair"],
        "missing": [],
        "after": True,
        "devices": [3],
    }


def test_launching_a_kernel_that_is_to_be_compiled_does_nothing_but_for_other_threads() -> None:
    launched: list[tuple[Any, ...]] = []
    kernel = SimpleNamespace(run=lambda *each: launched.append(each), function="handle", packed_metadata="packed")
    function: Any = SimpleNamespace(preload=lambda data: kernel if data == "its types" else None)
    compiled: dict[str, Any] = {}
    missing = compiling._Missing(function, "its types", compiled, "key", threading.get_ident())

    def launch() -> None:
        found = compiled["key"]
        metadata = found.launch_metadata((2, 3, 4), 0, 7, 8)
        found.run(2, 3, 4, 0, found.function, found.packed_metadata, metadata, "enter", "exit", 7, 8)

    launch()
    assert not launched
    other = threading.Thread(target=launch)
    other.start()
    other.join()
    assert launched == [(2, 3, 4, 0, "handle", "packed", None, "enter", "exit", 7, 8)]
    assert missing.launcher() is kernel.run
    missing.leave()
    assert not compiled
    compiled["key"] = kernel
    missing.leave()
    assert compiled == {"key": kernel}
