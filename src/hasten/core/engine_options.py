"""Options of an engine by name: aliases, what other engines' options ask for, and values in their plain form."""

import dataclasses
import difflib
import os
from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

from hasten.core.dtypes import KVCacheDType, Quantization
from hasten.core.option_fields import parse_size, require
from hasten.core.vllm_arguments import WITHOUT_EFFECT, refusal

_STORED_FORMATS = ("awq", "awq_marlin", "gptq", "gptq_marlin", "compressed-tensors", "mxfp4")
"""Formats of quantized checkpoints for which vLLM has a value of `quantization`."""


def by_field(options: Mapping[str, Any], fields: "Sequence[dataclasses.Field[Any]]") -> dict[str, Any]:
    """Options by the names of `fields`, whose aliases they may be given by; ConfigError for an unknown one.

    Options of vLLM that ask for nothing that hasten does otherwise are left out, and so is None, which stands for the
    default there.
    """
    names = {name: each for each in fields for name in (each.name, *each.metadata.get("aliases", ()))}
    given: dict[str, Any] = {}
    for name, value in options.items():
        if name in WITHOUT_EFFECT:
            reason = refusal(WITHOUT_EFFECT, name, value)
            require(reason is None, f"{name}={value!r:.80} is not supported: {reason}")
            continue
        require(name in names, _unknown_option(name, names))
        described = names[name]
        require(
            name != "quantization" or value not in _STORED_FORMATS,
            f"quantization={value!r} is not an option: a checkpoint in that format is read as its config.json says; "
            "leave it out",
        )
        require(described.name not in given, f"{name} and {described.name} are one option; give it once")
        if value is not None:
            given[described.name] = _plain(described, value)
    return given


def _unknown_option(name: str, names: "Mapping[str, dataclasses.Field[Any]]") -> str:
    near = difflib.get_close_matches(name, [*names, *WITHOUT_EFFECT], 1)
    hint = f"; did you mean {near[0]}?" if near else ";"
    return f"unknown engine option {name}{hint} there are {', '.join(sorted({each.name for each in names.values()}))}"


def _plain(described: "dataclasses.Field[Any]", value: Any) -> Any:
    """Data types and devices of torch, paths and lists of layers as the text that stands for them; sizes as numbers."""
    if described.metadata.get("kind") == "size" and isinstance(value, str):
        return parse_size(value)
    if described.name == "pipeline_layers" and isinstance(value, list | tuple):
        return ",".join(map(str, value))
    if described.name in ("dtype", "device"):
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
    max_logprobs: int | None
    limit_mm_per_prompt: Any
    task: str | None
    runner: str | None
    convert: str | None
    generation_config: str | None
    override_generation_config: Any
    hf_overrides: Any
    rope_scaling: Any
    rope_theta: float | None
    logits_processors: Any
    compilation_config: Any
    structured_outputs_config: Any
    num_gpu_blocks_override: int | None
    distributed_executor_backend: str | None
