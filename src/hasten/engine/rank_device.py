"""Which device a rank computes on."""

import os

import torch

from hasten import ops
from hasten.core.config import EngineConfig
from hasten.core.errors import ConfigError
from hasten.parallel.groups import TensorGroup


def device_kind(config: EngineConfig) -> str:
    """`cpu` or `cuda`: what the configuration asks for, or what there is."""
    return ops.default_device().type if config.device == "auto" else config.device.partition(":")[0]


def rank_device(config: EngineConfig, group: TensorGroup, local_size: int, first: int = 0) -> torch.device:
    """The device of this rank, one of `local_size` on this host; ConfigError where there is no such GPU.

    Where several engines share the host, rank 0 of this one is number `first` among their ranks.
    """
    if device_kind(config) == "cpu":
        return torch.device("cpu")
    number = int(config.device.partition(":")[2] or 0)
    engines = local_size // group.size
    if engines > 1:
        number = first + group.rank
    elif group.size > 1:
        number = int(os.environ.get("LOCAL_RANK", group.rank % local_size))
    if torch.cuda.device_count() == 0:
        chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
        raise ConfigError(
            f"no NVIDIA GPU is visible (CUDA_VISIBLE_DEVICES is {'not set' if chosen is None else repr(chosen)}, "
            f"torch is {torch.__version__}; is the driver installed?); use --device cpu"
        )
    if engines > 1 and local_size > torch.cuda.device_count():
        raise ConfigError(
            f"data_parallel_size {engines} with {_sizes(config, group)} needs {local_size} GPUs, but "
            f"{torch.cuda.device_count()} are visible here; lower one of them"
        )
    if number >= torch.cuda.device_count():
        raise ConfigError(
            f"rank {group.rank} needs GPU {number}, but {torch.cuda.device_count()} are visible here; "
            "use fewer ranks or --device cpu"
        )
    device = torch.device("cuda", number)
    torch.cuda.set_device(device)
    return device


def _sizes(config: EngineConfig, world: TensorGroup) -> str:
    stages = config.parallel.pipeline_parallel_size
    tensor = f"tensor_parallel_size {world.size // stages}"
    return tensor if stages == 1 else f"{tensor} and pipeline_parallel_size {stages}"
