"""How the ranks of an engine start: rank 0 as an `Engine`, the others as workers that follow it."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from hasten.checkpoint.plan import stored_config
from hasten.core.config import EngineConfig
from hasten.core.errors import ConfigError
from hasten.engine.engine import Engine
from hasten.engine.follower import config_to_json, follow_rank_zero
from hasten.engine.rank_device import device_kind
from hasten.parallel.children import Children
from hasten.parallel.control import await_host
from hasten.parallel.launch import JOIN_TIMEOUT_S, Ranks, check_no_group
from hasten.parallel.rank import LOCAL, RankInfo, free_local_port, rank_info

WORKER = "hasten.engine.follower"
"""The program of a rank that another process starts."""


def launched_rank(config: EngineConfig) -> RankInfo | None:
    """This process's rank among those that others started; ConfigError where `config` asks for another number."""
    info, parallel = rank_info(config.parallel), config.parallel
    size, stages = parallel.tensor_parallel_size, parallel.pipeline_parallel_size
    if info is None:
        return None
    if info.size % stages:
        raise ConfigError(
            f"pipeline_parallel_size is {stages}, but this is one of {info.size} ranks that torchrun, mpirun or a "
            "cluster started, which that does not divide"
        )
    if size not in (1, info.size // stages):
        each = f" and pipeline_parallel_size {stages}" if stages > 1 else ""
        raise ConfigError(
            f"tensor_parallel_size is {size}{each}, but this is one of {info.size} ranks that torchrun, mpirun or a "
            "cluster started; leave the option out or give their number"
        )
    return info


def start_engine(config: EngineConfig, info: RankInfo | None = None, *, index: int = 0, count: int = 1) -> Engine:
    """Start the other ranks, unless `info` says that others did, and number `index` of `count` engines on this host.

    Each engine has GPUs of its own, and its share of the threads and memory of a host without any. Raises as `LLM`
    does; nothing is left behind if that fails.
    """
    size = config.parallel.ranks
    if count > 1:
        _check_several(config, info, count)
    if info is None and size * count > 1:
        info = RankInfo(
            0, size, size * count, LOCAL, free_local_port() if size > 1 else 0, index * size, starts_node=size > 1
        )
    children = None
    if info is not None and info.size > 1:
        check_no_group()
    if info is not None and info.starts_node:
        _check_split(config)
        children = Children(WORKER, config_to_json(config), info)
    ranks: Ranks | None = None
    try:
        ranks = Ranks(info, children, device_kind(config), config.parallel)
        return Engine(config, ranks)
    except BaseException as error:
        if ranks is not None:
            ranks.report_failure(error)
            ranks.abandon()
        elif children is not None:
            children.end()
        raise


def _check_several(config: EngineConfig, info: RankInfo | None, count: int) -> None:
    if info is not None:
        raise ConfigError(
            f"data_parallel_size is {count}, but this is one of {info.size} ranks that torchrun, mpirun or a cluster "
            "started, which serve one engine; leave the option out"
        )
    if ":" in config.device:
        raise ConfigError(
            f"device {config.device} is one GPU, but data_parallel_size is {count}; give cuda, and choose GPUs with "
            "CUDA_VISIBLE_DEVICES"
        )


def _check_split(config: EngineConfig) -> None:
    """ConfigError, before any rank starts, where a model of this host cannot be split over them."""
    path, parallel = Path(config.model), config.parallel
    if path.exists():
        parallel.validate(stored_config(path, parallel.tensor_parallel_size, dummy=config.load_format == "dummy"))


def run_worker(config: EngineConfig) -> bool:
    """The whole life of a rank above 0 that torchrun, mpirun or an operator started: it computes until rank 0 ends.

    True once it has ended; False, at once, where this process is rank 0 or alone. Raises as `LLM` does.
    """
    info = launched_rank(config)
    if info is None or info.rank == 0:
        return False
    if info.starts_node:
        run_node(config, info)
    else:
        follow_rank_zero(config, info)
    return True


def run_node(
    config: EngineConfig,
    info: RankInfo,
    *,
    starting: Callable[[], AbstractContextManager[None]] = nullcontext,
    running: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> None:
    """All ranks of a host other than rank 0's, until rank 0 ends; raises the error of the first that fails.

    They start once rank 0 is there; EngineError where it is not within two minutes. `starting` is entered before they
    start, so that they inherit what it sets, and `running` within it, while they run.
    """
    await_host(info.address, info.port, JOIN_TIMEOUT_S)
    with starting():
        children = Children(WORKER, config_to_json(config), info)
        try:
            with running():
                children.wait()
        finally:
            children.end()
