"""`python -m hasten.cluster.local FOLDER LOCK`: own a job or a server until all is done.

LOCK is the descriptor of the lock on the record's folder, handed over by who made it.
"""

import logging
import os
import signal
import sys
from pathlib import Path

from hasten.cluster.local.jobs import JobSupervisor
from hasten.cluster.local.servers import ServerSupervisor
from hasten.cluster.local.state import Folder


def main(folder: str, lock: str) -> None:
    """Own a folder until all is done."""
    os.set_inheritable(int(lock), False)
    os.umask(0o077)
    # standard error tells why a supervisor failed; warnings are for the commands that users see
    logging.getLogger("hasten").setLevel(logging.ERROR)
    # the shell that started this process let it ignore these, and so would all that it starts
    signal.signal(signal.SIGQUIT, signal.SIG_DFL)
    owned = Folder(Path(folder))
    kind = JobSupervisor if owned.path.parents[1].name == "jobs" else ServerSupervisor
    kind(owned).run()


if __name__ == "__main__":
    main(*sys.argv[1:])
