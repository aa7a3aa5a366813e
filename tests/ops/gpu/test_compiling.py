"""Kernels compiled together, for a GPU that is not there: in a process of its own, where Triton compiles."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")


def test_kernels_of_a_block_are_compiled_at_its_end_and_then_there(tmp_path: Path) -> None:
    program = Path(__file__).with_name("compile_together.py")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    done = subprocess.run(
        [sys.executable, str(program)], env=environment, capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    assert found == {
        "before": False,
        "during": 0,
        "compiled": ["_add_norm", "_add_norm", "_best_of_chunk", "_best_of_row", "_gather", "_long_tile"],
        "missing": [],
        "after": True,
        "devices": [3],
    }
