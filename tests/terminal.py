"""Programs whose standard error is a terminal."""

import os
import pty
import subprocess
import sys

from tests.waiting import LIMIT_S


def on_a_terminal(script: str, **environment: str) -> tuple[str, str]:
    """What a script prints on standard output, a pipe, and on standard error, a terminal."""
    leader, follower = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", script],
        stdout=subprocess.PIPE,
        stderr=follower,
        text=True,
        env={**os.environ, "TERM": "xterm", "COLUMNS": "120", **environment},
    )
    os.close(follower)
    shown = bytearray()
    try:
        while piece := os.read(leader, 4096):
            shown += piece
    except OSError:  # Linux reports the terminal's end as an error
        pass
    finally:
        os.close(leader)
    output, _ = process.communicate(timeout=LIMIT_S)
    return output, shown.decode()
