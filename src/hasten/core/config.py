"""Frozen configuration, composed and validated once.

`EngineConfig` and its parts also define the command line: every field with `metadata["help"]` is an option.
"""

import dataclasses
import re
from dataclasses import dataclass, field
from typing import Any, Literal

from hasten.core.errors import ConfigError

DTypeName = Literal["fp32", "fp16", "bf16"]
"""Names of the data types, as FasterTransformer writes them in config.ini."""

DTYPES: tuple[DTypeName, ...] = ("fp32", "fp16", "bf16")
_DTYPE_ALIASES: dict[str, DTypeName] = {
    "fp32": "fp32",
    "float32": "fp32",
    "float": "fp32",
    "fp16": "fp16",
    "float16": "fp16",
    "half": "fp16",
    "bf16": "bf16",
    "bfloat16": "bf16",
}


def dtype_name(text: str) -> DTypeName:
    """Short name of a data type given as `fp16`, `float16`, `torch.float16` or `half`; ConfigError for others."""
    name = _DTYPE_ALIASES.get(text.removeprefix("torch."))
    if name is None:
        raise ConfigError(f"data type {text!r} is not known; use one of {', '.join(DTYPES)}")
    return name


def option(default: Any, help: str, **metadata: Any) -> Any:  # noqa: A002 - `help` is argparse's own word
    """A dataclass field that the command line offers, with its help text and, optionally, its choices."""
    return field(default=default, metadata={"help": help, **metadata})


_MOST_LAYERS = 10_000
"""More layers than any model has: a nonsensical number would otherwise fill the memory with names of weights."""


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


@dataclass(frozen=True, kw_only=True)
class AttentionConfig:
    """Heads and positions of one attention layer, before any split over ranks."""

    num_heads: int
    num_kv_heads: int
    head_size: int
    position: Literal["alibi"] = "alibi"

    def __post_init__(self) -> None:
        for name in ("num_heads", "num_kv_heads", "head_size"):
            _require(getattr(self, name) > 0, f"{name} must be positive, got {getattr(self, name)}")
        _require(
            self.num_heads % self.num_kv_heads == 0,
            f"num_heads {self.num_heads} is not a multiple of num_kv_heads {self.num_kv_heads}",
        )


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """What a decoder-only transformer looks like, whatever format its weights came in."""

    architecture: str
    """Hugging Face's class name, for example `BloomForCausalLM`."""
    num_layers: int
    hidden_size: int
    intermediate_size: int
    vocab_size: int
    attention: AttentionConfig
    norm_eps: float = 1e-5
    activation: Literal["gelu_tanh"] = "gelu_tanh"
    residual_after_norm: bool = False
    """BLOOM's `apply_residual_connection_post_layernorm`: the residual is the norm's output, not its input."""
    tie_word_embeddings: bool = True
    dtype: DTypeName = "fp32"
    """Type of the weights in the checkpoint."""
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    pad_token_id: int | None = None
    max_position_embeddings: int | None = None
    """Longest sequence that the model was trained for, where its configuration says so."""

    def __post_init__(self) -> None:
        for name in ("num_layers", "hidden_size", "intermediate_size", "vocab_size"):
            _require(getattr(self, name) > 0, f"{name} must be positive, got {getattr(self, name)}")
        _require(self.num_layers < _MOST_LAYERS, f"num_layers {self.num_layers} cannot be right")
        width = self.attention.num_heads * self.attention.head_size
        _require(width == self.hidden_size, f"heads x head size = {width} differs from hidden_size {self.hidden_size}")


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How many ranks share the model."""

    tensor_parallel_size: int = option(
        1, "number of ranks that share every layer (tensor parallel)", flag="--tensor-para-size"
    )

    def __post_init__(self) -> None:
        _require(
            self.tensor_parallel_size >= 1, f"tensor_parallel_size must be at least 1, got {self.tensor_parallel_size}"
        )

    def validate(self, model: ModelConfig) -> None:
        """Raise ConfigError unless `model` can be split over these ranks."""
        size, attention = self.tensor_parallel_size, model.attention
        for name, count in (
            ("attention heads", attention.num_heads),
            ("key/value heads", attention.num_kv_heads),
            ("the MLP's inner size", model.intermediate_size),
        ):
            _require(
                count % size == 0,
                f"tensor parallel size {size} does not divide {name} ({count}); choose a size that does",
            )


@dataclass(frozen=True, kw_only=True)
class CacheConfig:
    """The paged key/value cache."""

    block_size: int = option(16, "tokens in a block of the key/value cache")
    kv_cache_memory: int | None = option(
        None, "bytes for the key/value cache of a rank (default: from the memory that is free)", type=int
    )
    memory_utilization: float = option(0.9, "share of a GPU's memory that the engine may use, weights included")
    enable_prefix_cache: bool = option(True, "share cache blocks between requests whose prompts begin alike")

    def __post_init__(self) -> None:
        _require(self.block_size >= 1, f"block_size must be at least 1, got {self.block_size}")
        _require(
            0 < self.memory_utilization <= 1,
            f"memory_utilization must be above 0 and at most 1, got {self.memory_utilization}",
        )
        _require(
            self.kv_cache_memory is None or self.kv_cache_memory > 0,
            f"kv_cache_memory must be positive, got {self.kv_cache_memory}",
        )


@dataclass(frozen=True, kw_only=True)
class SchedulerConfig:
    """How much one step may take on."""

    max_num_seqs: int = option(256, "most sequences in one step")
    max_num_batched_tokens: int | None = option(
        None,
        "most tokens in one step; longer prompts are computed in chunks of this size "
        "(default: 8192 on a GPU, else 2048)",
        type=int,
    )
    max_model_len: int | None = option(
        None, "longest sequence, prompt and output together (default: the model's own, or 2048)", type=int
    )
    overlap_steps: bool | None = option(
        None, "launch a step before the tokens of the one before are known here (default: on a GPU)"
    )

    def __post_init__(self) -> None:
        for name in ("max_num_seqs", "max_num_batched_tokens", "max_model_len"):
            value = getattr(self, name)
            _require(value is None or value >= 1, f"{name} must be at least 1, got {value}")
        _require(
            self.max_num_batched_tokens is None or self.max_num_batched_tokens >= self.max_num_seqs,
            f"max_num_batched_tokens {self.max_num_batched_tokens} is below max_num_seqs {self.max_num_seqs}: "
            "a step could not even decode one token of each; raise the first or lower the second",
        )


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Everything that one engine needs to know to start."""

    model: str
    """Folder of the checkpoint: Hugging Face, FasterTransformer or ranked safetensors."""
    tokenizer: str | None = option(
        None, "folder or file of the tokenizer (default: the model's)", flag="--tokenizer-path"
    )
    dtype: str = option(
        "auto",
        "type to compute in: fp32, fp16, bf16, or auto (the checkpoint's on a GPU, fp32 on a CPU)",
        short="-dt",
        flag="--data-type",
    )
    device: str = option("auto", "cpu, cuda, or auto (a GPU where there is one)")
    load_format: str = option(
        "auto", "auto, or dummy: random weights from a config.json alone", choices=("auto", "dummy")
    )
    verify_checksums: bool = option(True, "compare the checkpoint's files with its manifest while loading")
    seed: int = option(0, "seed of requests that bring none")
    enforce_eager: bool = option(False, "launch every step kernel by kernel on a GPU, without CUDA graphs")
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    cache: CacheConfig = field(default_factory=CacheConfig)
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)

    def __post_init__(self) -> None:
        if self.dtype != "auto":
            dtype_name(self.dtype)
        _require(
            re.fullmatch(r"auto|cpu|cuda(:\d+)?", self.device) is not None,
            f"device {self.device!r} is not known; use cpu, cuda, cuda:NUMBER or auto",
        )
        _require(self.load_format in ("auto", "dummy"), f"load_format {self.load_format!r} is not auto or dummy")

    @classmethod
    def create(cls, model: str, **options: Any) -> "EngineConfig":
        """Build from flat option names (`tensor_parallel_size=2`, `block_size=32`); ConfigError for unknown ones."""
        parts: dict[str, type[Any]] = {"parallel": ParallelConfig, "cache": CacheConfig, "scheduler": SchedulerConfig}
        taken: dict[str, Any] = {}
        for part, kind in parts.items():
            names = [f.name for f in dataclasses.fields(kind)]
            taken[part] = kind(**{name: options.pop(name) for name in names if name in options})
        own = {f.name for f in dataclasses.fields(cls)} - set(parts) - {"model"}
        unknown = sorted(set(options) - own)
        _require(not unknown, f"unknown engine option {', '.join(unknown)}")
        return cls(model=model, **options, **taken)
