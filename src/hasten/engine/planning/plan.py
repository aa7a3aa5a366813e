"""Does a model fit, how, and how fast will it be: from its configuration and a device's limits alone."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from hasten import ops
from hasten.core.config import EngineConfig
from hasten.core.dtypes import QUANTIZATIONS, CacheDType, DTypeName
from hasten.core.errors import ConfigError
from hasten.core.model_config import ModelConfig
from hasten.core.parallel_config import ParallelConfig
from hasten.engine.memory import CPU_SHARE, DEFAULT_MODEL_LEN, DEFAULT_STEP_TOKENS
from hasten.engine.planning.footprint import Footprint, footprint
from hasten.engine.planning.hardware import Device
from hasten.engine.planning.roofline import Step, decode_step, prompt_step
from hasten.parallel.shard import padded_vocab

BATCHES = (1, 16, 64, 256)
_CONTEXT_BYTES = 600 << 20
"""Of a GPU's memory: what CUDA, its libraries and the compiled kernels take."""
_FEW_SEQUENCES, _FEW_TOKENS = 16, 1024
"""Of a step that needs little memory besides weights and cache."""
_CACHE_DTYPE: CacheDType = "int8"
"""That is proposed for a cache in 8 bits: every device computes with it."""
Options = dict[str, object]
"""Options of an engine by the names of their fields."""


@dataclass(frozen=True)
class Setup:
    """How a model is to run."""

    dtype: DTypeName
    ranks: int = 1
    quantization: str | None = None
    cache_dtype: CacheDType | None = None
    """A type of 8 bits for the key/value cache; None for `dtype`."""
    expert_parallel: bool = False
    max_model_len: int | None = None
    max_num_seqs: int = 256
    step_tokens: int = 8192
    utilization: float = 0.9
    others: int = 0
    """Bytes of a GPU that other processes use."""
    block_size: int = 16


@dataclass(frozen=True)
class Fit:
    """What one setup leaves for the cache, on each rank."""

    ranks: int
    quantization: str | None
    weight_bytes: int
    working_bytes: int
    """Of the largest step, and of what is there before the model."""
    cache_bytes: int
    """What is left; 0 or less: nothing."""
    cache_tokens: int
    max_model_len: int
    """Tokens of the longest sequence that is asked for."""
    sequences: int
    """Of that length, that the cache holds at once."""

    @property
    def fits(self) -> bool:
        """Whether the cache holds at least one sequence."""
        return self.sequences >= 1


class Planner:
    """Answers for one model on devices of one kind."""

    def __init__(self, model: ModelConfig, device: Device) -> None:
        self.model = model
        self.device = device

    def rank(self, setup: Setup) -> Footprint:
        """What each rank takes; ConfigError where the ranks do not divide the model."""
        _parallel(setup).validate(self.model)
        return footprint(
            self.model,
            setup.dtype,
            ranks=setup.ranks,
            quantization=setup.quantization,
            cache_dtype=setup.cache_dtype,
            whole_experts=setup.expert_parallel,
        )

    def fit(self, setup: Setup) -> Fit:
        """What a setup leaves for the cache."""
        rank = self.rank(setup)
        if self.device.is_gpu:
            working = _CONTEXT_BYTES + 2 * self._step_bytes(setup)
            left = int(self.device.memory * setup.utilization) - setup.others - working - rank.weight_bytes
        else:
            working = self._step_bytes(setup)
            left = int((self.device.memory - setup.ranks * rank.weight_bytes) * CPU_SHARE) // setup.ranks
        length = setup.max_model_len or self.model.max_position_embeddings or DEFAULT_MODEL_LEN
        block = rank.kv_bytes_per_token * setup.block_size
        useful = setup.max_num_seqs * -(-length // setup.block_size)
        tokens = max(0, min(left // block, useful)) * setup.block_size
        if setup.max_model_len is None:
            length = max(1, min(length, tokens))  # the engine shortens what nobody asked for
        return Fit(
            ranks=setup.ranks,
            quantization=setup.quantization,
            weight_bytes=rank.weight_bytes,
            working_bytes=working,
            cache_bytes=max(0, left),
            cache_tokens=tokens,
            max_model_len=length,
            sequences=min(tokens // length, setup.max_num_seqs),
        )

    def _step_bytes(self, setup: Setup) -> int:
        """About what the largest step needs: the widest values of a layer, and the logits."""
        kind = "cuda" if self.device.is_gpu else "cpu"
        model, itemsize = self.model, ops.hidden_dtype(ops.TORCH_DTYPES[setup.dtype], kind).itemsize
        attention = model.attention
        heads = (2 * attention.num_heads + 2 * attention.num_kv_heads) * attention.head_size // setup.ranks
        inner = 2 * model.intermediate_size // setup.ranks if model.has_mlp else 0
        if model.experts is not None:
            inner = max(inner, 3 * model.experts.top_k * model.experts.inner_size // setup.ranks)
        rows = setup.step_tokens * (3 * model.hidden_size + max(heads, inner))
        logits = setup.max_num_seqs * padded_vocab(model.vocab_size, setup.ranks) // setup.ranks
        return (rows + logits) * itemsize

    def sizes(self, setup: Setup, most: int) -> Iterator[int]:
        """Numbers of ranks up to `most` that divide the model."""
        for size in range(1, min(most, self.model.attention.num_heads) + 1):
            try:
                _parallel(replace(setup, ranks=size)).validate(self.model)
            except ConfigError:
                continue
            yield size

    def decode(self, setup: Setup, context: int) -> list[Step]:
        """Expected steps of single tokens, each sequence with `context` tokens."""
        rank = self.rank(setup)
        return [decode_step(self.model, rank, self.device, size, context, ranks=setup.ranks) for size in BATCHES]

    def prompts(self, setup: Setup, length: int) -> Step:
        """An expected step full of prompts of `length` tokens."""
        rank = self.rank(setup)
        return prompt_step(self.model, rank, self.device, setup.step_tokens, length, ranks=setup.ranks)

    def alternatives(self, setup: Setup, most_ranks: int) -> list[Options]:
        """Options that make a model fit which does not, each by itself; those first that cost least."""
        found: list[Options] = []
        shorter = self.fit(replace(setup, max_model_len=None))
        if setup.max_model_len is not None and shorter.fits:
            found.append({"max_model_len": shorter.max_model_len})
        for size in self.sizes(setup, most_ranks):
            if size > setup.ranks and self.fit(replace(setup, ranks=size)).fits:
                found.append({"tensor_parallel_size": size})
                break
        if setup.cache_dtype is None and self.fit(replace(setup, cache_dtype=_CACHE_DTYPE)).fits:
            found.append({"kv_cache_dtype": _CACHE_DTYPE})
        for scheme in QUANTIZATIONS if setup.quantization is None else ():
            if self.fit(replace(setup, quantization=scheme)).fits:
                found.append({"quantization": scheme})
                break
        fewer = replace(setup, max_num_seqs=_FEW_SEQUENCES, step_tokens=_FEW_TOKENS)
        if self.device.is_gpu and setup.step_tokens > _FEW_TOKENS and self.fit(fewer).fits:
            found.append({"max_num_seqs": _FEW_SEQUENCES, "max_num_batched_tokens": _FEW_TOKENS})
        return found


def _parallel(setup: Setup) -> ParallelConfig:
    return ParallelConfig(tensor_parallel_size=setup.ranks, expert_parallel=setup.expert_parallel)


def setup_of(config: EngineConfig, dtype: DTypeName, device_kind: str) -> Setup:
    """What an engine's options ask for."""
    scheduler = config.scheduler
    return Setup(
        dtype=dtype,
        ranks=config.parallel.tensor_parallel_size,
        quantization=config.quantization,
        cache_dtype=config.cache.eight_bits,
        expert_parallel=config.parallel.expert_parallel,
        max_model_len=scheduler.max_model_len,
        max_num_seqs=scheduler.max_num_seqs,
        step_tokens=scheduler.max_num_batched_tokens or max(DEFAULT_STEP_TOKENS[device_kind], scheduler.max_num_seqs),
        utilization=config.cache.gpu_memory_utilization,
        block_size=config.cache.block_size,
    )


def others_use(total: int, free: int, own: int) -> int:
    """Bytes of a GPU that other processes use, where this one has `own` for tensors, and what CUDA takes."""
    return max(0, total - free - own - _CONTEXT_BYTES)


def advice(planner: Planner, setup: Setup, most_ranks: int) -> str:
    """One line for whoever has too little memory: what is needed, what there is, and options that would do."""
    fit = planner.fit(setup)
    token = planner.rank(setup).kv_bytes_per_token
    cache = "" if setup.cache_dtype is None else f"{setup.cache_dtype} "
    each = " a rank" if setup.ranks > 1 else ""
    needs = (
        f"{fit.weight_bytes / 1e9:.2f} GB of weights{each} as {setup.quantization or setup.dtype}, about "
        f"{fit.working_bytes / 1e9:.2f} GB to compute with, and {token / 1e6:.3f} MB of {cache}cache per token, "
        f"of {planner.device.memory / 1e9:.2f} GB"
    )
    if setup.others > _CONTEXT_BYTES:
        needs += f" of which other processes use {setup.others / 1e9:.2f} GB"
    ways = [" and ".join(map(_named, options.items())) for options in planner.alternatives(setup, most_ranks)]
    return f"it needs {needs}; " + (f"what fits: {', or '.join(ways)}" if ways else "`hasten plan` shows what would do")


def _named(option: tuple[str, object]) -> str:
    """An option in a message, as the command line replaces it by its own name."""
    name, value = option
    return f'{name}="{value}"' if isinstance(value, str) else f"{name} {value}"
