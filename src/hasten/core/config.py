"""Frozen configuration, composed and validated once.

`EngineConfig` and its parts also define the command line: every field with `metadata["help"]` is an option.
"""

import dataclasses
import math
import os
import re
from dataclasses import dataclass, field
from typing import Any

from hasten.core.dtypes import KV_CACHE_DTYPES, QUANTIZATIONS, CacheDType, dtype_name
from hasten.core.engine_options import by_field
from hasten.core.model_config import ModelConfig
from hasten.core.option_fields import check_fields, option, require
from hasten.core.parallel_config import ParallelConfig

TOOL_CALL_PARSERS = ("auto", "hermes", "llama3_json", "mistral", "qwen3_coder", "seed_oss", "openai")
REASONING_PARSERS = ("auto", "none", "deepseek_r1", "qwen3", "mistral", "seed_oss", "openai_gptoss")


@dataclass(frozen=True, kw_only=True)
class CacheConfig:
    """The paged key/value cache."""

    block_size: int = option(16, "tokens per block of the key/value cache")
    kv_cache_memory: int | None = option(
        None,
        "bytes of key/value cache per rank, such as 1G or 512MiB (default: from the free memory)",
        kind="size",
        aliases=("kv_cache_memory_bytes",),
    )
    gpu_memory_utilization: float = option(0.9, "fraction of a GPU's memory that the engine may use, weights included")
    enable_prefix_caching: bool = option(True, "share cache blocks between requests whose prompts have a common prefix")
    kv_cache_dtype: str = option(
        "auto",
        "type of the key/value cache: auto (the compute type), or int8 or fp8 (e4m3), which hold twice the tokens of "
        "fp16 in the same memory, with scales for each head from the checkpoint, or else measured at the start",
        choices=KV_CACHE_DTYPES,
    )

    def __post_init__(self) -> None:
        check_fields(self)
        require(self.block_size >= 1, f"block_size must be at least 1, got {self.block_size}")
        require(
            0 < self.gpu_memory_utilization <= 1,
            f"gpu_memory_utilization must be above 0 and at most 1, got {self.gpu_memory_utilization}",
        )
        require(
            self.kv_cache_memory is None or self.kv_cache_memory > 0,
            f"kv_cache_memory must be positive, got {self.kv_cache_memory}",
        )

    @property
    def eight_bits(self) -> CacheDType | None:
        """The type of a cache of 8 bits; None where it has the type that the model computes in."""
        return None if self.kv_cache_dtype == "auto" else "int8" if self.kv_cache_dtype == "int8" else "fp8"


@dataclass(frozen=True, kw_only=True)
class SchedulerConfig:
    """How much one step may take on."""

    max_num_seqs: int = option(256, "maximum sequences per step")
    max_num_batched_tokens: int | None = option(
        None,
        "maximum tokens per step, or of all steps in flight with pipeline stages; longer prompts are computed in "
        "chunks (default: 2048; on a GPU 8192, or 32768 for vectors and scores)",
        type=int,
    )
    max_model_len: int | None = option(
        None, "maximum length of a sequence, prompt and output together (default: the model's own, or 2048)", type=int
    )
    itl_target: float | None = option(
        None,
        "target in milliseconds for the time between tokens: long prompts join the steps of others in chunks that keep "
        "to it, and short prompts overtake them; 0: no target (default: 30 in a server, else 0)",
        type=float,
    )
    overlap_steps: bool | None = option(
        None,
        "asynchronous scheduling: launch a step before the previous one's tokens reach the host (default: on a GPU)",
        aliases=("async_scheduling",),
    )
    max_grammar_seconds: int = option(5, "maximum seconds of CPU time to compile a grammar; larger ones are refused")
    max_grammar_memory: int = option(
        1 << 30, "maximum bytes of memory to compile a grammar, such as 512MiB; larger ones are refused", kind="size"
    )

    def __post_init__(self) -> None:
        check_fields(self)
        names = ("max_num_seqs", "max_num_batched_tokens", "max_model_len", "max_grammar_seconds", "max_grammar_memory")
        for name in names:
            value = getattr(self, name)
            require(value is None or value >= 1, f"{name} must be at least 1, got {value}")
        require(
            self.itl_target is None or 0 <= self.itl_target < math.inf,
            f"itl_target must be a number of milliseconds, 0 for no target, got {self.itl_target}",
        )
        require(
            self.max_num_batched_tokens is None or self.max_num_batched_tokens >= self.max_num_seqs,
            f"max_num_batched_tokens {self.max_num_batched_tokens} is below max_num_seqs {self.max_num_seqs}: "
            "a step could not even decode one token of each; raise the first or lower the second",
        )

    def validate(self, model: ModelConfig) -> None:
        """Raise ConfigError if sequences may grow longer than `model` has positions."""
        learned = model.learned_positions
        require(
            self.max_model_len is None or learned is None or self.max_model_len <= learned,
            f"max_model_len {self.max_model_len} is more than the {learned} positions that the model has learned; "
            f"use at most {learned}",
        )


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Everything that one engine needs to know to start."""

    model: str
    """Folder of the checkpoint (Hugging Face, FasterTransformer or ranked safetensors) or a Hugging Face id."""
    tokenizer: str | None = option(
        None, "folder or file of the tokenizer (default: the model's)", flag="--tokenizer-path", kind="path"
    )
    tool_call_parser: str = option(
        "auto",
        "form of tool calls in chats: hermes (also Qwen's), llama3_json, mistral, qwen3_coder, seed_oss, openai "
        "(gpt-oss), or auto, from the chat template",
        choices=TOOL_CALL_PARSERS,
    )
    reasoning_parser: str = option(
        "auto",
        "marks of reasoning in chats, which answers have apart from their content: deepseek_r1 (answers begin with "
        "it), qwen3, mistral, seed_oss, openai_gptoss, none, or auto, from the chat template",
        choices=REASONING_PARSERS,
    )
    dtype: str = option(
        "auto",
        "type to compute in: fp32, fp16, bf16, or auto (the checkpoint's on a GPU, fp32 on a CPU)",
        short="-dt",
        flag="--data-type",
    )
    device: str = option("auto", "cpu, cuda, or auto (a GPU where there is one)")
    quantization: str | None = option(
        None,
        "quantize a full-precision checkpoint at load. int8: weights of linear layers and the head, with a scale for "
        "each output column; w8a8: activations in int8 as well, with a scale for each token; fp8: weights and "
        "activations in e4m3, the head in int8; int4: linear layers with a scale for each group of 128 inputs, the "
        "head in int8, for memory and few requests at a time (default: as the checkpoint is)",
        choices=QUANTIZATIONS,
    )
    load_format: str = option(
        "auto", "auto, or dummy: random weights from a config.json alone", choices=("auto", "dummy")
    )
    verify_checksums: bool = option(True, "compare the checkpoint's files with its manifest while loading")
    revision: str | None = option(None, "branch, tag or commit of a model given by its Hugging Face id")
    download_dir: str | None = option(
        None, "cache folder for models given by their Hugging Face id (default: Hugging Face's own)"
    )
    progress_bars: bool = option(
        True, "show progress bars where standard error is a terminal", aliases=("use_tqdm_on_load",)
    )
    seed: int = option(0, "seed of requests without one")
    enforce_eager: bool = option(False, "launch every step kernel by kernel on a GPU, without CUDA graphs")
    deterministic: bool = option(
        False,
        "bitwise equal tokens and log-probabilities of a request in any batch: alone or among others, in chunks or "
        "whole, after a preemption, with prompts from the prefix cache, in every run",
    )
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    cache: CacheConfig = field(default_factory=CacheConfig)
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)

    def __post_init__(self) -> None:
        check_fields(self)
        if self.dtype != "auto":
            dtype_name(self.dtype)
        require(
            re.fullmatch(r"auto|cpu|cuda(:\d+)?", self.device) is not None,
            f"device {self.device!r} is not known; use cpu, cuda, cuda:NUMBER or auto",
        )
        self.check_deterministic(self.quantization)

    def check_deterministic(self, quantization: str | None) -> None:
        """Raise ConfigError if weights quantized so cannot be `deterministic` as is asked for."""
        require(
            not self.deterministic or quantization is None,
            f"deterministic: products with {quantization} weights have no fixed order; use full precision",
        )

    @classmethod
    def create(cls, model: str | os.PathLike[str], **options: Any) -> "EngineConfig":
        """Build from flat option names (`tensor_parallel_size=2`, `block_size=32`), aliases of fields included.

        ConfigError for an unknown one; options of vLLM that ask for nothing that hasten does otherwise have no effect.
        """
        require(isinstance(model, str | os.PathLike), f"model must be a folder or a Hugging Face id, got {model!r}")
        given = by_field(options, engine_fields())
        taken = {
            part: kind(**{f.name: given.pop(f.name) for f in dataclasses.fields(kind) if f.name in given})
            for part, kind in _PARTS.items()
        }
        return cls(model=os.fspath(model), **given, **taken)


_PARTS: dict[str, type[Any]] = {"parallel": ParallelConfig, "cache": CacheConfig, "scheduler": SchedulerConfig}


def engine_fields() -> "list[dataclasses.Field[Any]]":
    """The fields of EngineConfig and of its parts: every option of an engine but the model."""
    own = [f for f in dataclasses.fields(EngineConfig) if f.name not in (*_PARTS, "model")]
    return own + [f for kind in _PARTS.values() for f in dataclasses.fields(kind)]
