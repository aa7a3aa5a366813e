"""The advice in the error of a device with too little memory: options that would fit."""

import math
from dataclasses import replace

import torch

from hasten.core.config import EngineConfig
from hasten.core.model_config import ModelConfig
from hasten.engine.memory import available_host_memory
from hasten.engine.model_loading import compute_dtype
from hasten.parallel.groups import ParallelGroups
from hasten.quantization.scheme import SCHEMES


def memory_advice(
    config: EngineConfig, model: ModelConfig, quantization: str | None, device: torch.device, groups: ParallelGroups
) -> str:
    """The end of a message for whoever has too little memory: what this model needs, and which options would do."""
    if model.task != "generate" or model.encoder is not None:
        return ""  # it holds no cache to be planned, or one that is read in another way
    if quantization is not None and quantization not in SCHEMES:
        return ""  # the checkpoint's own format, of which bits and groups are its files' matter
    if groups.pipeline.size > 1:
        return ""  # it is reckoned for whole models
    # a start with enough memory does without
    from hasten.engine.planning.hardware import Device
    from hasten.engine.planning.plan import Planner, advice, others_use, setup_of

    gpu = device.type == "cuda"
    free, memory = torch.cuda.mem_get_info(device) if gpu else (0, available_host_memory())
    own = torch.cuda.memory_reserved(device) if gpu else memory
    whole = Device(str(device), memory, math.inf, math.inf, is_gpu=gpu)
    config = replace(config, parallel=replace(config.parallel, tensor_parallel_size=groups.tensor.size))
    setup = setup_of(config, compute_dtype(config.dtype, model, device), device.type)
    setup = replace(setup, quantization=quantization, others=others_use(memory, free, own))
    most_ranks = torch.cuda.device_count() if gpu else setup.ranks
    return f"; {advice(Planner(model, whole), setup, most_ranks)}"
