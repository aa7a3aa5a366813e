"""Frozen configuration, composed and validated once.

`EngineConfig` and its parts also define the command line: every field with `metadata["help"]` is an option.
"""

import dataclasses
import difflib
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypedDict

from hasten.core.dtypes import KV_CACHE_DTYPES, QUANTIZATIONS, CacheDType, KVCacheDType, Quantization, dtype_name
from hasten.core.errors import ConfigError
from hasten.core.model_config import ModelConfig
from hasten.core.option_fields import check_kinds, option, parse_size, require

TOOL_CALL_PARSERS = ("auto", "hermes", "llama3_json", "mistral", "qwen3_coder", "seed_oss", "openai")
REASONING_PARSERS = ("auto", "none", "deepseek_r1", "qwen3", "mistral", "seed_oss", "openai_gptoss")


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How many ranks share the model."""

    tensor_parallel_size: int = option(
        1, "number of ranks that share every layer (tensor parallel)", short="-tp", flag="--tensor-para-size"
    )
    pipeline_parallel_size: int = option(
        1,
        "number of pipeline stages that the layers are dealt to, each with tensor-para-size ranks",
        short="-pp",
        flag="--pipeline-para-size",
    )
    pipeline_layers: str | None = option(
        None, "number of layers in each pipeline stage, such as 10,11,11 (default: as equal as can be)"
    )
    expert_parallel: bool = option(
        False,
        "give each rank whole experts of a mixture, instead of a part of every expert",
        aliases=("enable_expert_parallel",),
    )
    nnodes: int | None = option(
        None,
        "number of hosts with equally many ranks, each of which runs this command (default: what a cluster says)",
    )
    node_rank: int | None = option(None, "number of this host, from 0, which is the one that answers")
    master_addr: str | None = option(None, "name or address of host 0")
    master_port: int | None = option(None, "port of host 0 at which the ranks meet (default: 29500)")

    def __post_init__(self) -> None:
        check_kinds(self)
        require(
            self.tensor_parallel_size >= 1, f"tensor_parallel_size must be at least 1, got {self.tensor_parallel_size}"
        )
        stages = self.pipeline_parallel_size
        require(stages >= 1, f"pipeline_parallel_size must be at least 1, got {stages}")
        require(self.nnodes is None or self.nnodes >= 1, f"nnodes must be at least 1, got {self.nnodes}")
        port = self.master_port
        require(port is None or 1 <= port <= 65535, f"master_port must be from 1 to 65535, got {port}")
        counts = self.dealt_layers
        require(
            not counts or len(counts) == stages,
            f"pipeline_layers {self.pipeline_layers} is for {len(counts)} stages, pipeline_parallel_size is {stages}",
        )

    @property
    def ranks(self) -> int:
        """Ranks of one engine."""
        return self.tensor_parallel_size * self.pipeline_parallel_size

    @property
    def dealt_layers(self) -> tuple[int, ...]:
        """The layers of each pipeline stage, where they are given."""
        if self.pipeline_layers is None:
            return ()
        counts = self.pipeline_layers.split(",")
        require(
            all(count.strip().isdecimal() and int(count) > 0 for count in counts),
            f"pipeline_layers must be positive numbers separated by commas, as 10,11,11; got {self.pipeline_layers!r}",
        )
        return tuple(map(int, counts))

    def validate(self, model: ModelConfig) -> None:
        """Raise ConfigError unless `model` can be split over these ranks."""
        require(
            not self.expert_parallel or model.experts is not None,
            f"expert_parallel: {model.architecture} has no experts; leave the option out",
        )
        require(
            self.pipeline_parallel_size == 1 or model.task == "generate",
            f"pipeline_parallel_size: {model.architecture} generates no text, and has no stages; leave the option out",
        )
        require(
            self.pipeline_parallel_size == 1 or model.encoder is None,
            f"pipeline_parallel_size: {model.architecture} has an encoder, and no stages; leave the option out",
        )
        layers, counts = model.num_layers, self.dealt_layers
        require(
            self.pipeline_parallel_size <= layers,
            f"pipeline_parallel_size {self.pipeline_parallel_size} is more than the {layers} layers of the model",
        )
        require(
            not counts or sum(counts) == layers,
            f"pipeline_layers {self.pipeline_layers} deals {sum(counts)} layers, but the model has {layers}",
        )
        size = self.tensor_parallel_size
        if unfit := self._unfit(size, model):
            sizes = range(1, model.attention.num_heads + 1)
            fitting = (str(size) for size in sizes if self._unfit(size, model) is None)
            raise ConfigError(
                f"tensor parallel size {size} does not divide {unfit}; choose a size that does: {', '.join(fitting)}"
            )

    def _unfit(self, size: int, model: ModelConfig) -> str | None:
        """What of a model cannot be split over `size` ranks, None if all can."""
        heads, kv_heads = model.attention.num_heads, model.attention.num_kv_heads
        # with more ranks than key/value heads, as many ranks hold each
        fits = {
            ("attention heads", heads): heads % size,
            ("key/value heads", kv_heads): min(kv_heads % size, size % kv_heads),
        }
        fits |= {(name, count): count % size for name, count in self._divided(model)}
        return next((f"{name} ({count})" for (name, count), rest in fits.items() if rest), None)

    def _divided(self, model: ModelConfig) -> Iterator[tuple[str, int]]:
        """Counts, with their names, that the ranks must divide evenly."""
        if model.has_mlp:
            yield "the MLP's inner size", model.intermediate_size
        if model.encoder is not None:
            yield "the encoder's attention heads", model.encoder.attention.num_heads
            yield "the inner size of the encoder's MLP", model.encoder.intermediate_size
        if model.experts is None:
            return
        if self.expert_parallel:
            yield "the experts", model.experts.num_experts
        else:
            yield "the experts' inner size", model.experts.inner_size
        if model.experts.shared_size is not None:
            yield "the shared expert's inner size", model.experts.shared_size


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
        "type of the key/value cache: auto (the type that the model computes in), or int8 or fp8 (e4m3), which hold "
        "twice the tokens of fp16 in the same memory, with a scale for each head: that of a checkpoint that has scales "
        "of its cache, else measured at the start",
        choices=KV_CACHE_DTYPES,
    )

    def __post_init__(self) -> None:
        check_kinds(self)
        require(self.block_size >= 1, f"block_size must be at least 1, got {self.block_size}")
        require(
            0 < self.gpu_memory_utilization <= 1,
            f"gpu_memory_utilization must be above 0 and at most 1, got {self.gpu_memory_utilization}",
        )
        require(
            self.kv_cache_memory is None or self.kv_cache_memory > 0,
            f"kv_cache_memory must be positive, got {self.kv_cache_memory}",
        )
        require(
            self.kv_cache_dtype in KV_CACHE_DTYPES,
            f"kv_cache_dtype {self.kv_cache_dtype!r} is not supported; there is {', '.join(KV_CACHE_DTYPES)}",
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
        "maximum tokens per step, with pipeline stages of as many steps together; longer prompts are computed in "
        "chunks of this size (default: 8192 on a GPU, else 2048)",
        type=int,
    )
    max_model_len: int | None = option(
        None, "maximum length of a sequence, prompt and output together (default: the model's own, or 2048)", type=int
    )
    itl_target: float | None = option(
        None,
        "target in milliseconds for the time between tokens: longer prompts join the steps of others in parts that "
        "keep to it, and short prompts overtake their rest; 0: no target (default: 30 in a server, else 0)",
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
        check_kinds(self)
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
        learned = model.max_position_embeddings if model.num_positions else None
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
        "form in which the model writes calls of tools in chats: hermes (Qwen's too), llama3_json, mistral, "
        "qwen3_coder, seed_oss, openai (gpt-oss), or auto, as its chat template shows",
        choices=TOOL_CALL_PARSERS,
    )
    reasoning_parser: str = option(
        "auto",
        "form in which the model marks its reasoning in chats, which answers then have apart from their content: "
        "deepseek_r1 (an answer begins with it), qwen3, mistral, seed_oss, openai_gptoss, none, or auto, as its chat "
        "template shows",
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
        "weights of linear layers and of the head in 8 bits, with a scale for each output column: int8; w8a8, which "
        "rounds each token's activations to int8 too; fp8, weights and activations in e4m3 and the head in int8. int4: "
        "linear layers in 4 bits, with a scale for each group of 128 inputs, and the head in int8, for memory and few "
        "requests at a time. Made from a full-precision checkpoint while it is loaded (default: as the checkpoint is)",
        choices=QUANTIZATIONS,
    )
    load_format: str = option(
        "auto", "auto, or dummy: random weights from a config.json alone", choices=("auto", "dummy")
    )
    verify_checksums: bool = option(True, "compare the checkpoint's files with its manifest while loading")
    revision: str | None = option(None, "branch, tag or commit of a model that is given by its Hugging Face id")
    download_dir: str | None = option(
        None, "cache folder for models that are given by their Hugging Face id (default: Hugging Face's own)"
    )
    progress_bars: bool = option(
        True, "show progress bars where standard error is a terminal", aliases=("use_tqdm_on_load",)
    )
    seed: int = option(0, "seed of requests that bring none")
    enforce_eager: bool = option(False, "launch every step kernel by kernel on a GPU, without CUDA graphs")
    deterministic: bool = option(
        False,
        "a request's tokens and log-probabilities have the same bits in any batch: alone or among others, in chunks or "
        "whole, after a preemption, with prompts from the prefix cache, in every run",
    )
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    cache: CacheConfig = field(default_factory=CacheConfig)
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)

    def __post_init__(self) -> None:
        check_kinds(self)
        if self.dtype != "auto":
            dtype_name(self.dtype)
        require(
            re.fullmatch(r"auto|cpu|cuda(:\d+)?", self.device) is not None,
            f"device {self.device!r} is not known; use cpu, cuda, cuda:NUMBER or auto",
        )
        require(self.load_format in ("auto", "dummy"), f"load_format {self.load_format!r} is not auto or dummy")
        require(
            self.quantization is None or self.quantization in QUANTIZATIONS,
            f"quantization {self.quantization!r} is not supported; there is {', '.join(QUANTIZATIONS)}",
        )
        require(
            self.tool_call_parser in TOOL_CALL_PARSERS,
            f"tool_call_parser {self.tool_call_parser!r} is not known; there is {', '.join(TOOL_CALL_PARSERS)}",
        )
        require(
            self.reasoning_parser in REASONING_PARSERS,
            f"reasoning_parser {self.reasoning_parser!r} is not known; there is {', '.join(REASONING_PARSERS)}",
        )
        self.check_deterministic(self.quantization)

    def check_deterministic(self, quantization: str | None) -> None:
        """Raise ConfigError if weights quantized so cannot be `deterministic` as is asked for."""
        require(
            not self.deterministic or quantization is None,
            f"deterministic: products with {quantization} weights have no fixed order; use full precision",
        )

    @classmethod
    def create(cls, model: str, **options: Any) -> "EngineConfig":
        """Build from flat option names (`tensor_parallel_size=2`, `block_size=32`), aliases of fields included.

        ConfigError for an unknown one; options of vLLM that ask for nothing that hasten does otherwise have no effect.
        """
        given: dict[str, Any] = {}
        for name, value in options.items():
            if name in WITHOUT_EFFECT:
                _check_without_effect(name, value)
                continue
            require(name in _NAMES, _unknown_option(name))
            field_name = _NAMES.get(name, name)
            require(field_name not in given, f"{name} and {field_name} are one option; give it once")
            given[field_name] = _plain(field_name, value)
        taken = {
            part: kind(**{f.name: given.pop(f.name) for f in dataclasses.fields(kind) if f.name in given})
            for part, kind in _PARTS.items()
        }
        return cls(model=model, **given, **taken)


_PARTS: dict[str, type[Any]] = {"parallel": ParallelConfig, "cache": CacheConfig, "scheduler": SchedulerConfig}


def engine_fields() -> "list[dataclasses.Field[Any]]":
    """The fields of EngineConfig and of its parts: every option of an engine but the model."""
    own = [f for f in dataclasses.fields(EngineConfig) if f.name not in (*_PARTS, "model")]
    return own + [f for kind in _PARTS.values() for f in dataclasses.fields(kind)]


_NAMES = {name: f.name for f in engine_fields() for name in (f.name, *f.metadata.get("aliases", ()))}
"""Every name of an option -> the field's."""

_SIZES = frozenset(f.name for f in engine_fields() if f.metadata.get("kind") == "size")

WITHOUT_EFFECT: Mapping[str, tuple[tuple[object, ...] | None, str]] = {
    "enable_chunked_prefill": ((True, None), "long prompts are computed in chunks; see max_num_batched_tokens"),
    "disable_log_stats": (None, ""),
    "disable_custom_all_reduce": (None, ""),
    "trust_remote_code": (None, ""),
    "swap_space": (None, ""),
    "max_seq_len_to_capture": (None, ""),
    "cpu_offload_gb": ((0,), "all weights stay on the device"),
    "data_parallel_size": ((1,), "this is one engine; hasten serve --data-parallel-size runs several"),
    "enable_lora": ((False, None), "adapters are not supported; merge them into the checkpoint"),
    "skip_tokenizer_init": ((False,), "a folder without a tokenizer does without one"),
    "enable_auto_tool_choice": (None, ""),
    "tokenizer_mode": (("auto", "fast"), "the tokenizer is the checkpoint's tokenizer.json"),
    "scheduling_policy": (("fcfs",), "requests begin in the order in which they come; only itl_target changes that"),
    "speculative_config": ((None,), "there is no speculative decoding"),
}
"""Options of vLLM that choose nothing here: the values that ask for what hasten does anyway (None: any value), and why
others are refused."""


def _check_without_effect(name: str, value: object) -> None:
    values, reason = WITHOUT_EFFECT[name]
    if values is not None and value not in values:
        raise ConfigError(f"{name}={value!r:.80} is not supported: {reason}")


def _unknown_option(name: str) -> str:
    near = difflib.get_close_matches(name, [*_NAMES, *WITHOUT_EFFECT], 1)
    hint = f"; did you mean {near[0]}?" if near else ";"
    return f"unknown engine option {name}{hint} there are {', '.join(sorted(f.name for f in engine_fields()))}"


def _plain(name: str, value: Any) -> Any:
    """Data types and devices of torch, paths and lists of layers as the text that stands for them; sizes as numbers."""
    if name in _SIZES and isinstance(value, str):
        return parse_size(value)
    if name == "pipeline_layers" and isinstance(value, list | tuple):
        return ",".join(map(str, value))
    if name in ("dtype", "device"):
        return str(value)
    return os.fspath(value) if isinstance(value, os.PathLike) else value


class EngineOptions(TypedDict, total=False):
    """The options of an engine by the names of their fields, for type checkers and editors."""

    tokenizer: str | os.PathLike[str] | None
    tool_call_parser: str
    reasoning_parser: str
    dtype: Any
    device: Any
    quantization: Quantization | None
    load_format: str
    verify_checksums: bool
    revision: str | None
    download_dir: str | os.PathLike[str] | None
    progress_bars: bool
    use_tqdm_on_load: bool
    seed: int
    enforce_eager: bool
    deterministic: bool
    tensor_parallel_size: int
    pipeline_parallel_size: int
    pipeline_layers: str | Sequence[int] | None
    expert_parallel: bool
    nnodes: int | None
    node_rank: int | None
    master_addr: str | None
    master_port: int | None
    block_size: int
    kv_cache_memory: int | str | None
    gpu_memory_utilization: float
    enable_prefix_caching: bool
    kv_cache_dtype: KVCacheDType
    max_num_seqs: int
    max_num_batched_tokens: int | None
    max_model_len: int | None
    itl_target: float | None
    overlap_steps: bool | None
    max_grammar_seconds: int
    max_grammar_memory: int | str
    kv_cache_memory_bytes: int | str | None
    async_scheduling: bool | None
    enable_expert_parallel: bool
    enable_chunked_prefill: bool | None
    disable_log_stats: bool
    disable_custom_all_reduce: bool
    trust_remote_code: bool
    swap_space: float
    max_seq_len_to_capture: int
    cpu_offload_gb: float
    data_parallel_size: int
    enable_lora: bool | None
    skip_tokenizer_init: bool
    enable_auto_tool_choice: bool
    tokenizer_mode: str
    scheduling_policy: str
    speculative_config: Any
