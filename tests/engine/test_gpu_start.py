"""What a start compiles, on a real GPU: each in a process of its own, with an empty cache of kernels."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.gpu

DEMO = Path(__file__).parents[2] / "examples" / "demo-model"


@pytest.mark.parametrize("options", [{}, {"enforce_eager": True}, {"deterministic": True}], ids=str)
def test_all_kernels_of_common_requests_are_compiled_together(options: dict[str, Any], tmp_path: Path) -> None:
    program = Path(__file__).with_name("start_child.py")
    options |= {"dtype": "fp16", "max_num_seqs": 32, "max_model_len": 512, "kv_cache_memory": 1 << 28}
    done = subprocess.run(
        [sys.executable, str(program), str(DEMO), json.dumps(options)],
        env=os.environ | {"TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
        timeout=180,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert (found["start"], found["requests"]) == ([], [])
