"""An engine's options as a rank has them: with defaults of its device, and refused where its model lacks something."""

from dataclasses import replace

import torch

from hasten import ops
from hasten.core.config import CacheConfig, EngineConfig, SchedulerConfig
from hasten.core.errors import ConfigError, UnsupportedError
from hasten.core.model_config import ModelConfig
from hasten.engine.memory import DEFAULT_STEP_TOKENS

LEAST_STEP_TOKENS = {"cpu": 96, "cuda": 1024}
"""Tokens of a step that are not divided any further for the stages of a pipeline: products of fewer rows are bound by
reading weights."""
_TEXT_STEP_TOKENS = {"cpu": 1, "cuda": 32_768}
"""Tokens of a step of texts of which vectors or scores are made, at least: nobody waits for the end of a step, and a
GPU takes a third less time over as many tokens in larger steps (docs/performance-log.md)."""
_STEP_BLOCK = 1
"""Tokens of a block of a cache that holds one step's texts, on a GPU: each token's keys and values lie in its own row,
where a product may leave them."""


def resolve_scheduler(config: SchedulerConfig, device: torch.device, stages: int = 1) -> SchedulerConfig:
    """The limits of a step with the defaults of a device in place of what was left open.

    With several pipeline stages the tokens are those of as many steps, which are under way together: the smaller steps
    are, the less a stage waits for the one before.
    """
    tokens = config.max_num_batched_tokens or max(DEFAULT_STEP_TOKENS[device.type], config.max_num_seqs)
    tokens = max(tokens // stages, min(tokens, LEAST_STEP_TOKENS[device.type]), config.max_num_seqs)
    overlap = device.type != "cpu" if config.overlap_steps is None else config.overlap_steps
    return replace(config, max_num_batched_tokens=tokens, overlap_steps=overlap)


def scheduler_of_texts(config: SchedulerConfig, given: SchedulerConfig, device: torch.device) -> SchedulerConfig:
    """The same for a model that makes vectors or scores, where `given` leaves the tokens of a step open."""
    if given.max_num_batched_tokens is not None:
        return config
    tokens = max(config.max_num_batched_tokens or 1, _TEXT_STEP_TOKENS[device.type])
    return replace(config, max_num_batched_tokens=tokens)


def block_size_of(config: CacheConfig, device: torch.device, *, keeps_cache: bool) -> int:
    """Tokens in a block of the cache."""
    return config.block_size if keeps_cache or device.type != "cuda" else _STEP_BLOCK


def check_options(config: EngineConfig, model: ModelConfig, quantization: str | None, ranks: int) -> None:
    """Raise ConfigError for options that a model cannot be run with; `ranks`: of its tensor group."""
    config.check_deterministic(quantization)
    replace(config.parallel, tensor_parallel_size=ranks).validate(model)
    config.scheduler.validate(model)
    name = model.architecture
    if config.deterministic and model.task != "generate":
        raise ConfigError(f"deterministic is for models that generate text; {name} does not")
    if config.deterministic and model.encoder is not None:
        raise ConfigError(f"deterministic is for models without an encoder; {name} has one")


def cache_dtype(config: CacheConfig, model: ModelConfig, device: torch.device) -> torch.dtype | None:
    """A type of 8 bits for the cache, None for that which the model computes in; errors where it cannot be had."""
    if config.eight_bits is None:
        return None
    name = model.architecture
    if model.task != "generate":
        raise ConfigError(
            f"kv_cache_dtype: {name} generates no text, and keeps no keys and values; leave the option out"
        )
    if model.encoder is not None:
        raise ConfigError(f"kv_cache_dtype is for models without an encoder; {name} has one; leave the option out")
    dtype = ops.CACHE_DTYPES[config.eight_bits]
    if not ops.multiplies(dtype, device):
        raise UnsupportedError("kv_cache_dtype: fp8 needs a GPU of compute capability 8.9 or later; use int8, or auto")
    return dtype
