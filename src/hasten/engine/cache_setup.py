"""The key/value cache of a rank: how large it is, and the kernels that steps over it need."""

import logging
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from hasten import ops
from hasten.core.config import EngineConfig
from hasten.core.errors import CapacityError, ConfigError
from hasten.core.model_config import ModelConfig
from hasten.engine.cache_ranges import measured_ranges
from hasten.engine.graphs import Sizes, decode_sizes
from hasten.engine.memory import DEFAULT_MODEL_LEN, explained_out_of_memory, free_memory
from hasten.engine.pooling import Pooler
from hasten.engine.runner import Runner
from hasten.engine.start_times import StartTimes
from hasten.layers.position import RopeTables
from hasten.parallel.launch import Ranks
from hasten.parallel.peers import MOST_EXCHANGED_ROWS

_log = logging.getLogger(__name__)

_WARMUP_TOKENS, _WARMUP_SEQUENCES = 512, (1, 4, 24, 48, 128)
"""Steps that are run before the first request comes: kernels are made for a few ranges of rows, and these hit each."""


@dataclass(frozen=True)
class CacheSetup:
    """Sizes and allocates the cache of a rank, and warms the rank up; all ranks do so together."""

    config: EngineConfig
    """With limits of a step for this device."""
    model_config: ModelConfig
    device: torch.device
    ranks: Ranks
    runner: Runner
    pooler: Pooler | None
    block_size: int
    """Tokens of a block."""
    stored_ranges: list[Tensor] | None
    """Ranges of keys and values that the checkpoint has, for a cache of 8 bits."""
    times: StartTimes
    advice: Callable[[], str]
    """The end of a message for whoever has too little memory."""
    connect_stages: Callable[[], None]
    """Opens the connections to other pipeline stages, whose memory the cache must leave."""

    def make(self) -> tuple[int, int]:
        """Longest sequence and number of blocks of the cache, which is then there; the same on every rank."""
        block_size, wanted = self.block_size, self.config.scheduler.max_model_len
        length = wanted or self.model_config.max_position_embeddings or DEFAULT_MODEL_LEN
        ropes = RopeTables(length, self.device)  # some change with the length: this one, whatever the memory allows
        with explained_out_of_memory("sizing the cache", self.advice):
            self._compile_kernels(length, ropes)
            self.connect_stages()
        ranges = self._cache_ranges(length, ropes)
        with self.times.phase("memory"), explained_out_of_memory("sizing the cache", self.advice):
            budget = self.config.cache.kv_cache_memory or self._free_memory(length, ropes, ranges)
        inputs = 1 if self.model_config.encoder is None else 2
        """Block tables of a request: its sequence's, and that of its encoder's input, which may be as long."""
        fits = budget // self.runner.block_bytes
        fits = self.ranks.world.least(fits)
        room = fits // inputs * block_size
        if room < 1 or (wanted is not None and room < wanted):
            # a size that was given contradicts the length, wherever it runs; else this device has too little memory
            given = self.config.cache.kv_cache_memory is not None
            raise (ConfigError if given else CapacityError)(
                f"the key/value cache has room for {room} tokens ({budget} bytes a rank, "
                f"{self.runner.block_bytes} a block of {block_size}), but one sequence may have {length}"
                f"{' and the encoder as many for it' if inputs > 1 else ''}; "
                "lower max_model_len or raise kv_cache_memory" + ("" if given else self.advice())
            )
        length = min(length, room)
        useful = self.config.scheduler.max_num_seqs * inputs * -(-length // block_size)
        with explained_out_of_memory("allocating the cache", self.advice):
            with self.times.phase("cache"):
                self.runner.allocate_cache(min(useful, fits), -(-length // block_size), ropes, ranges)
            if self.device.type == "cuda":
                with self.times.phase("kernels"):
                    self._warm_up()
                if not self.config.enforce_eager:
                    with self.times.phase("graphs"):
                        self._capture_graphs()
                self.runner.defer_products(self.config.scheduler.max_num_batched_tokens or 1)
            elif self.ranks.groups.tensor.size == 1 and not (self.config.enforce_eager or self.config.deterministic):
                self.runner.record_steps()
        return length, min(useful, fits)

    def make_for_step(self) -> tuple[int, int]:
        """Longest text and number of blocks of a cache that holds the keys and values of one layer, for one step."""
        assert self.pooler is not None
        block_size, scheduler = self.block_size, self.config.scheduler
        limits = (
            scheduler.max_model_len,
            self.model_config.max_position_embeddings,
            self.pooler.pooling.texts.max_length,
        )
        length = min((limit for limit in limits if limit is not None), default=DEFAULT_MODEL_LEN)
        tokens = max(scheduler.max_num_batched_tokens or 1, length)
        num_blocks = tokens // block_size + scheduler.max_num_seqs
        with explained_out_of_memory("allocating the keys and values of a step"):
            ropes = RopeTables(length, self.device)
            self._compile_kernels(length, ropes)
            with self.times.phase("cache"):
                self.runner.allocate_cache(num_blocks, -(-length // block_size), ropes)
            if self.device.type == "cuda":
                with self.times.phase("kernels"):
                    self.runner.warm_up(tokens, [scheduler.max_num_seqs])
                    self._warm_up()
                self.runner.defer_products(tokens)
        return length, num_blocks

    def _cache_ranges(self, length: int, ropes: RopeTables) -> list[Tensor] | None:
        """Ranges of keys and values for a cache of 8 bits; None for one in the type that the model computes in."""
        if (name := self.config.cache.eight_bits) is None:
            return None
        with self.times.phase("scales"), explained_out_of_memory("measuring keys and values", self.advice):
            ranges, source = self.stored_ranges, "the checkpoint"
            if ranges is None:
                most_tokens, source = self.config.scheduler.max_num_batched_tokens or 1, "random tokens"
                ranges = measured_ranges(self.runner, name, self.model_config.vocab_size, ropes, length, most_tokens)
        level = logging.INFO if self.ranks.world.rank == 0 else logging.DEBUG
        _log.log(level, "key/value cache in %s, with a scale for each head from %s", name, source)
        return ranges

    def _compile_kernels(self, length: int, ropes: RopeTables) -> None:
        """Compile what steps of all kinds need on a GPU, where no rank's process has kernels yet."""
        if self.device.type == "cpu":
            return
        with self.times.phase("compile"):
            if not self.ranks.world.least(int(not ops.any_compiled())):
                return
            scheduler = self.config.scheduler
            most, sequences = scheduler.max_num_batched_tokens or 1, scheduler.max_num_seqs
            ranges = None if self.config.cache.eight_bits is None else self.runner.placeholder_ranges
            self.runner.allocate_cache(1, -(-length // self.block_size), ropes, ranges)
            # one sequence as long as may be: keys of long prompts are gathered, by kernels of their own
            steps = [(most, sequences), (min(most, length), 1)]
            steps += [(_WARMUP_TOKENS, count) for count in _WARMUP_SEQUENCES]
            steps += [(count, count) for count in (*_WARMUP_SEQUENCES, sequences)]
            graphs = self.pooler is None and not self.config.enforce_eager
            sizes = self.runner.graph_sizes(self._most_mixed_tokens()) if graphs else Sizes([], [])
            if not graphs:
                steps += [(rows, min(rows, sequences)) for rows in ops.library_rows(most)]
                steps += [(size.tokens, size.tokens) for size in decode_sizes(sequences)]
            steps = [(tokens, count) for tokens, count in steps if tokens <= most and count <= sequences]
            self.runner.compile_kernels(steps, sizes, self.ranks.local_size)
            self.runner.release_cache()

    def _warm_up(self) -> None:
        """Run steps of all kinds before the first request comes: what they need is compiled and loaded then."""
        scheduler = self.config.scheduler
        most = min(scheduler.max_num_batched_tokens or 1, _WARMUP_TOKENS)
        counts = [count for count in _WARMUP_SEQUENCES if count <= min(scheduler.max_num_seqs, most)]
        self.runner.load_kernels(most, counts)

    def _capture_graphs(self) -> None:
        try:
            self.runner.capture_graphs(self.runner.graph_sizes(self._most_mixed_tokens()))
        except torch.OutOfMemoryError as error:
            raise CapacityError(
                "no memory is left for CUDA graphs; lower gpu_memory_utilization, kv_cache_memory or max_num_seqs, "
                f"or do without them (enforce_eager) ({str(error).partition(chr(10))[0]})"
            ) from error

    def _most_mixed_tokens(self) -> int:
        """Tokens of the largest step with prompts that may be a graph."""
        most = self.config.scheduler.max_num_batched_tokens or 1
        # Sums of more rows are NCCL's, which can hang in a graph where others set its options.
        return most if self.ranks.groups.tensor.size == 1 else min(most, MOST_EXCHANGED_ROWS)

    def _free_memory(self, length: int, ropes: RopeTables, ranges: list[Tensor] | None) -> int:
        """Bytes that the cache may take by default: on a GPU what the largest step leaves."""
        utilization, scheduler = self.config.cache.gpu_memory_utilization, self.config.scheduler
        if self.device.type == "cpu":
            return free_memory(self.device, utilization, self.ranks.local_size)
        assert scheduler.max_num_batched_tokens is not None
        self.runner.allocate_cache(1, -(-length // self.block_size), ropes, ranges)
        working = self.runner.warm_up(scheduler.max_num_batched_tokens, [scheduler.max_num_seqs])
        self.runner.release_cache()
        torch.cuda.empty_cache()
        # Twice: steps run one by one and steps in graphs keep their memory apart.
        free = free_memory(self.device, utilization, self.ranks.local_size)
        return max(0, free - 2 * working)
