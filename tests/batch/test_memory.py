"""How much memory a batch takes does not depend on how many rows its input has."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tests.batch.simulated import MODEL

ROOT = Path(__file__).parents[2]
FEW, MANY = 2_000, 40_000
PER_ROW = 40
"""Bytes: a row that is done is a byte, its id a hash of eight; what a row has as objects is more than a thousand."""
PEAK = """
import resource, sys
from tests.batch.simulated import main
main(*sys.argv[1:])
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def peak_bytes(folder: Path, rows: int) -> int:
    folder.mkdir()
    body = {"model": MODEL, "prompt": [7], "max_tokens": 5, "temperature": 0}
    with (folder / "in").open("w") as file:
        for number in range(rows):
            row = {"custom_id": f"id-{number}", "method": "POST", "url": "/v1/completions", "body": body}
            file.write(json.dumps(row) + "\n")
    done = subprocess.run(
        [sys.executable, "-c", PEAK, str(folder / "in"), str(folder / "out"), "10000", "0"],
        env=os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'src'}", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads((folder / "out" / "summary.json").read_text())["results"] == rows
    return int(done.stdout) * 1024


@pytest.mark.slow
@pytest.mark.any_python
def test_twenty_times_as_many_rows_take_no_more_memory(tmp_path: Path) -> None:
    few, many = peak_bytes(tmp_path / "few", FEW), peak_bytes(tmp_path / "many", MANY)
    assert many - few < (8 << 20) + PER_ROW * MANY
