"""A rank that follows rank 0: as a call, and as the program that rank 0 starts."""

import json
import logging
import os
import sys
import threading
from dataclasses import asdict
from typing import Any

from hasten.core.config import CacheConfig, EngineConfig, SchedulerConfig
from hasten.core.parallel_config import ParallelConfig
from hasten.engine.rank_device import device_kind
from hasten.engine.worker import Worker
from hasten.parallel.launch import Ranks
from hasten.parallel.liveness import reported
from hasten.parallel.rank import RankInfo, rank_from_environment


def config_to_json(config: EngineConfig) -> str:
    """One line that `config_from_json` reads back."""
    return json.dumps(asdict(config))


def config_from_json(text: str) -> EngineConfig:
    """The configuration that `config_to_json` wrote."""
    raw: dict[str, Any] = json.loads(text)
    return EngineConfig(
        **{
            **raw,
            "parallel": ParallelConfig(**raw["parallel"]),
            "cache": CacheConfig(**raw["cache"]),
            "scheduler": SchedulerConfig(**raw["scheduler"]),
        }
    )


def follow_rank_zero(config: EngineConfig, info: RankInfo) -> None:
    """Be rank `info.rank` until rank 0 says stop; an error is reported to the other ranks before it is raised."""
    logging.getLogger("hasten").setLevel(logging.ERROR)  # rank 0 says once what every rank would warn of
    ranks = Ranks(info, None, device_kind(config), config.parallel)
    give_up = ranks.abandon
    try:
        with ranks.guard("following rank 0"):
            worker = Worker(config, ranks)
            give_up = worker.give_up
            worker.follow()
    except BaseException as error:
        ranks.report_failure(error)
        give_up()
        raise
    ranks.leave()


def main() -> None:
    """A rank that rank 0 started: its configuration comes by standard input, its errors go to a pipe."""
    pipe = int(sys.argv[1])
    config = config_from_json(sys.stdin.readline())
    threading.Thread(target=_end_with_parent, daemon=True).start()
    info = rank_from_environment()
    assert info is not None
    try:
        follow_rank_zero(config, info)
    except BaseException as error:
        os.write(pipe, reported(error))
        os._exit(1)
    os._exit(0)


def _end_with_parent() -> None:
    """Rank 0 holds the other end of standard input for as long as it lives."""
    sys.stdin.read()
    os._exit(0)


if __name__ == "__main__":
    main()
