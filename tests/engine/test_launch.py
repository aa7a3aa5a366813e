"""Several engines on one host: which GPUs each has, and how many threads."""

import os
from pathlib import Path

import pytest
import torch

from hasten.core.config import EngineConfig
from hasten.core.errors import ConfigError
from hasten.engine.launch import start_engine
from hasten.engine.rank_device import rank_device
from hasten.parallel.groups import TensorGroup
from hasten.parallel.launch import Ranks
from hasten.parallel.rank import LOCAL, RankInfo, rank_from_environment

DEMO = Path(__file__).parents[2] / "examples" / "demo-model"


@pytest.fixture
def four_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)


@pytest.mark.usefixtures("four_gpus")
def test_each_engine_has_gpus_of_its_own() -> None:
    config = EngineConfig.create("m", device="cuda")
    alone = [rank_device(config, TensorGroup(0, 1), 4, first).index for first in range(4)]
    assert alone == [0, 1, 2, 3]
    pairs = [[rank_device(config, TensorGroup(rank, 2), 4, first).index for rank in (0, 1)] for first in (0, 2)]
    assert pairs == [[0, 1], [2, 3]]
    chosen = EngineConfig.create("m", device="cuda:3")
    assert rank_device(chosen, TensorGroup(0, 1), 1).index == 3


@pytest.mark.usefixtures("four_gpus")
def test_more_gpus_than_there_are() -> None:
    config = EngineConfig.create("m", device="cuda", tensor_parallel_size=2)
    match = "data_parallel_size 3 with tensor_parallel_size 2 needs 6 GPUs, but 4 are visible here"
    for first in (0, 2, 4):
        with pytest.raises(ConfigError, match=match):
            rank_device(config, TensorGroup(0, 2), 6, first)


def test_ranks_of_another_engine_are_counted_before_those_of_this_one() -> None:
    environment = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "5", "LOCAL_WORLD_SIZE": "6", "MASTER_PORT": "9"}
    index = rank_from_environment(environment)
    assert index == RankInfo(1, 2, 6, LOCAL, 9, 4)
    assert index.engines == 3


def test_one_gpu_is_not_that_of_several_engines() -> None:
    config = EngineConfig.create("m", device="cuda:0")
    with pytest.raises(ConfigError, match="device cuda:0 is one GPU, but data_parallel_size is 2"):
        start_engine(config, index=1, count=2)
    with pytest.raises(ConfigError, match="one of 4 ranks that torchrun, mpirun or a cluster started"):
        start_engine(EngineConfig.create("m"), RankInfo(0, 4, 4, LOCAL, 9), count=2)


def test_engines_divide_the_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr("hasten.parallel.threads.available_cpus", lambda: 6)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(6)
        ranks = Ranks(RankInfo(0, 1, 3, LOCAL, 0, 1), None, "cpu")
        assert (ranks.engines, ranks.world.size, torch.get_num_threads()) == (3, 1, 2)
        ranks.leave()
        assert torch.get_num_threads() == 6
        monkeypatch.setitem(os.environ, "OMP_NUM_THREADS", "6")
        Ranks(RankInfo(0, 1, 3, LOCAL, 0, 1), None, "cpu")
        assert torch.get_num_threads() == 6
    finally:
        torch.set_num_threads(before)


def test_a_split_that_is_none_is_refused_before_ranks_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("hasten.engine.launch.Children")
    for load_format in ("auto", "dummy"):
        config = EngineConfig.create(str(DEMO), tensor_parallel_size=7, load_format=load_format)
        with pytest.raises(ConfigError, match=r"size 7 does not divide attention heads \(4\)"):
            start_engine(config)
