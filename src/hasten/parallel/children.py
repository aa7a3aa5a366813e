"""Ranks that this process starts as child processes."""

import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from typing import IO

import torch

from hasten.parallel.liveness import GRACE_S, Failure, Liveness, failure_of, rank_name
from hasten.parallel.rank import RankInfo


class Children:
    """Ranks that are started by this process as children that end with it."""

    def __init__(self, module: str, configuration: str, info: RankInfo) -> None:
        """Start the ranks of this host: all of them, or all but rank 0, which is this process."""
        self.liveness = Liveness()
        """What knows of the first death that nobody asked for."""
        self._size = info.size
        self._ended = 0
        self._changed = threading.Condition()
        ranks = range(info.rank or 1, min(info.rank + info.local_size, info.size))
        self._processes = [self._start(module, configuration, info, rank) for rank in ranks]

    def _start(self, module: str, configuration: str, info: RankInfo, rank: int) -> "subprocess.Popen[bytes]":
        reader, writer = os.pipe()
        environment = {
            **os.environ,
            "RANK": str(rank),
            "WORLD_SIZE": str(info.size),
            "LOCAL_RANK": str(info.first + rank % info.local_size),
            "LOCAL_WORLD_SIZE": str(info.local_size),
            "OMP_NUM_THREADS": str(max(1, torch.get_num_threads() // info.local_size)),
            "MASTER_ADDR": info.address,
            "MASTER_PORT": str(info.port),
        }
        process = subprocess.Popen(
            [sys.executable, "-m", module, str(writer)],
            stdin=subprocess.PIPE,
            env=environment,
            pass_fds=[writer],
            start_new_session=True,  # Ctrl-C goes to rank 0 alone, which ends the others in order
        )
        os.close(writer)
        assert process.stdin is not None
        with suppress(BrokenPipeError):  # of a rank that has died already, which is noticed below
            process.stdin.write(configuration.encode() + b"\n")
            process.stdin.flush()
        threading.Thread(target=self._watch, args=(process, rank, os.fdopen(reader, "rb")), daemon=True).start()
        return process

    def _watch(self, process: "subprocess.Popen[bytes]", rank: int, errors: IO[bytes]) -> None:
        with errors:
            report = errors.read()
        code = process.wait()
        where = f"{rank_name(rank, self._size)} (process {process.pid}) died"
        how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        if report or code:
            self.liveness.fail(failure_of(where, report) if report else Failure(f"{where}: {how}"))
        with self._changed:
            self._ended += 1
            self._changed.notify_all()

    def wait(self) -> None:
        """Wait until all have ended; raises the error of the first that failed."""
        with self._changed:
            self._changed.wait_for(lambda: self._ended == len(self._processes) or self.liveness.failure is not None)
        self.liveness.raise_failure()

    def end(self) -> None:
        """Let the children leave, and end those that do not."""
        self.liveness.ending = True
        for process in self._processes:
            if process.stdin is not None:
                with suppress(OSError):
                    process.stdin.close()
        deadline = time.monotonic() + GRACE_S
        for process in self._processes:
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
