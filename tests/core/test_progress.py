import subprocess
import sys

import pytest
from tests.terminal import on_a_terminal
from tests.waiting import LIMIT_S

from hasten.core.progress import progress_bar

_SCRIPT = """
from hasten.core.progress import progress_bar
with progress_bar("Loading weights", 2_000_000, unit="bytes", show={show}) as bar:
    bar.advance(1_000_000)
    bar.note("12 tok/s")
print("done")
"""


def test_a_bar_is_drawn_on_a_terminal_and_leaves_standard_output_alone() -> None:
    output, shown = on_a_terminal(_SCRIPT.format(show=True))
    assert output == "done\n"
    assert "Loading weights" in shown
    assert "1.0/2.0 MB" in shown
    assert "12 tok/s" in shown


def test_nothing_is_drawn_where_the_caller_or_the_terminal_says_so() -> None:
    assert on_a_terminal(_SCRIPT.format(show=False)) == ("done\n", "")
    assert on_a_terminal(_SCRIPT.format(show=True), TERM="dumb") == ("done\n", "")


def test_nothing_is_drawn_without_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    run = subprocess.run(
        [sys.executable, "-c", _SCRIPT.format(show=True)], capture_output=True, text=True, timeout=LIMIT_S
    )
    assert (run.stdout, run.stderr) == ("done\n", "")
    monkeypatch.setattr(sys, "stderr", None)
    with progress_bar("Loading weights", 1) as bar:
        bar.advance()
