"""One rank: its model and its cache. Rank 0 schedules, and each step's work in numbers is all that the others know.

Only rank 0 has the logits. With overlapped steps a step is launched before the tokens of the one before are known to
its Python: on every rank they stay on the device, where the next step reads them.
"""

import json
import logging
import math
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hasten import ops
from hasten.checkpoint.hub import resolve_engine
from hasten.checkpoint.plan import Checkpoint, open_checkpoint, rank_tensors
from hasten.core.config import CacheConfig, EngineConfig, ParallelConfig, SchedulerConfig
from hasten.core.dtypes import DTypeName, dtype_name
from hasten.core.errors import CapacityError, ConfigError, UnsupportedError
from hasten.core.kernel_cache import check_kernel_cache, kernel_cache
from hasten.core.model_config import ModelConfig
from hasten.core.progress import progress_bar
from hasten.engine.batch import Batch
from hasten.engine.cache_ranges import measured_ranges, stored_ranges
from hasten.engine.graphs import Sizes
from hasten.engine.memory import (
    DEFAULT_MODEL_LEN,
    DEFAULT_STEP_TOKENS,
    available_host_memory,
    free_memory,
)
from hasten.engine.planning.hardware import Device
from hasten.engine.planning.plan import Planner, advice, others_use, setup_of
from hasten.engine.pooling import Pooled, Pooler
from hasten.engine.runner import Runner
from hasten.engine.sampler import Choice, PromptLogprobs, Sampler
from hasten.engine.sequence import Sequence
from hasten.engine.start_times import StartTimes
from hasten.engine.step_message import StepMessage, TableRows
from hasten.layers.linear import PackedModule, set_weight
from hasten.layers.position import RopeTables
from hasten.models.base import Transformer
from hasten.models.encoder import Encoder
from hasten.models.registry import model_class
from hasten.parallel.groups import ALONE, ParallelGroups, TensorGroup
from hasten.parallel.launch import Ranks
from hasten.parallel.liveness import reported
from hasten.parallel.peers import connect, connect_stages, reachable
from hasten.parallel.rank import RankInfo, rank_from_environment
from hasten.quantization.scheme import SCHEMES, Quantizer, matrices

_log = logging.getLogger(__name__)

_LEAST_STEP_TOKENS = 1024
"""Tokens of a step that are not divided any further: products of fewer rows are bound by reading weights."""
_TEXT_STEP_TOKENS = {"cpu": 1, "cuda": 32_768}
"""Tokens of a step of texts of which vectors or scores are made, at least: nobody waits for the end of a step, and a
GPU takes a third less time over as many tokens in larger steps (docs/performance.md)."""
_STEP_BLOCK = 64
"""Least tokens of a block of a cache that holds one step's texts, on a GPU: nobody shares blocks, and fewer of them are
less work for the host."""
_WARMUP_TOKENS, _WARMUP_SEQUENCES = 512, (1, 4, 24, 48, 128)
"""Steps that are run before the first request comes: kernels are made for a few ranges of rows, and these hit each."""
_MOST_EXCHANGED_ROWS = 256
"""Rows of one sum over ranks through each other's memory; NCCL is as fast with more."""
_NOTICED_S = 3.0
"""Seconds of a start that are explained."""
_PROMPT_LOGITS_ROWS = 256
"""Rows of prompt logits computed at a time: a whole prompt's would need vocabulary times length."""

OnPromptLogits = Callable[[slice, Tensor], None]
ChooseTokens = Callable[[], Choice | Pooled | None]


class Launched:
    """A step whose work all ranks have, on rank 0."""

    def __init__(
        self, sequences: list[Sequence], prompts: PromptLogprobs, compute: Callable[[], ChooseTokens | None]
    ) -> None:
        self.sequences = sequences
        """Those that get a next token, in the order of the choice."""
        self.prompts = prompts
        """Log-probabilities of prompts that asked for them."""
        self._compute = compute
        self._is_computed = False
        self._choose: ChooseTokens | None = None

    @property
    def reads_tokens(self) -> bool:
        """Whether the choice depends on tokens that earlier steps chose and that the host does not know yet."""
        return any(sequence.constraint is not None and sequence.pending > 1 for sequence in self.sequences)

    def compute(self) -> None:
        """Put the step on this rank's device, up to the choice of its next tokens, unless it is there."""
        if not self._is_computed:
            self._is_computed = True
            self._choose = self._compute()

    def choose(self) -> Choice | Pooled | None:
        """Choose the next tokens of a step, which is then computed, or give what was made of its texts.

        None where no sequence gets one.
        """
        self.compute()
        with explained_out_of_memory(), torch.inference_mode():
            return None if self._choose is None else self._choose()


class Worker:
    """One rank of the engine."""

    def __init__(self, config: EngineConfig, ranks: Ranks) -> None:
        self.ranks = ranks
        self.start_times = StartTimes()
        self.device = rank_device(config, ranks.world, ranks.local_size, ranks.first)
        self._abort_flag = torch.zeros(1, dtype=torch.int32, pin_memory=self._has_peers)
        """In memory of the host that a GPU sees: not 0 once a rank has failed; no kernel waits for other ranks then."""
        ranks.liveness.on_failure(partial(self._abort_flag.fill_, 1))
        with self.start_times.phase("device"), explained_out_of_memory("starting the device"):
            if self.device.type == "cuda":
                check_kernel_cache(kernel_cache())
                torch.cuda.synchronize(self.device)  # creates its context, which the next use would otherwise do
        with self.start_times.phase("config"):
            config, checkpoint = self._opened(config)
        self.model_config = checkpoint.config
        self.quantization = _quantization(config, checkpoint)
        config.check_deterministic(self.quantization)
        replace(config.parallel, tensor_parallel_size=ranks.groups.tensor.size).validate(self.model_config)
        config.scheduler.validate(self.model_config)
        name = self.model_config.architecture
        if config.deterministic and self.model_config.task != "generate":
            raise ConfigError(f"deterministic is for models that generate text; {name} does not")
        if config.deterministic and self.model_config.encoder is not None:
            raise ConfigError(f"deterministic is for models without an encoder; {name} has one")
        dtype = ops.TORCH_DTYPES[compute_dtype(config.dtype, self.model_config, self.device)]
        self.tokenizer_folder = checkpoint.tokenizer_folder
        phase, explained = self.start_times.phase("weights"), explained_out_of_memory("loading the model", self._advice)
        with phase, explained, ops.fixed_order(config.deterministic):
            model = build_model(
                checkpoint,
                self._groups(dtype),
                dtype,
                self.device,
                quantization=config.quantization or checkpoint.quantization,
                show_progress=config.progress_bars,
            )
        self.stage = ranks.groups.pipeline
        self.defers = self.stage.size > 1 and self.device.type == "cpu" and not self.overlap
        """Whether rank 0 computes its stage of a step only when its tokens are collected: a CPU computes at once, and
        the other stages are to have the next steps by then."""
        self.pooler = pooler_of(model, checkpoint, self.device)
        """What makes vectors or scores of texts; None where text is generated."""
        self.block_size = config.cache.block_size
        """Tokens in a block of the cache."""
        if self.pooler is not None and self.device.type == "cuda":
            self.block_size = max(self.block_size, _STEP_BLOCK)
        self.runner = Runner(
            model,
            dtype,
            self.device,
            self.block_size,
            config.scheduler.max_num_seqs,
            deterministic=config.deterministic,
            hidden_size=self.model_config.hidden_size,
            max_tokens=config.scheduler.max_num_batched_tokens or 0,
            keeps_cache=self.pooler is None,
            cache_dtype=self._cache_dtype(config.cache),
        )
        eight_bits = config.cache.eight_bits is not None
        self._stored_ranges = stored_ranges(self.runner, checkpoint, ranks.groups.tensor) if eight_bits else None
        make = self._make_cache if self.pooler is None else self._make_step_cache
        self.max_model_len, self.num_blocks = make(config)
        self.scheduler_config = config.scheduler
        self.reset()

    def _cache_dtype(self, config: CacheConfig) -> torch.dtype | None:
        """A type of 8 bits for the cache, None for that which the model computes in; errors where it cannot be had."""
        if config.eight_bits is None:
            return None
        if self.pooler is not None:
            name = self.model_config.architecture
            raise ConfigError(
                f"kv_cache_dtype: {name} generates no text, and keeps no keys and values; leave the option out"
            )
        if self.model_config.encoder is not None:
            name = self.model_config.architecture
            raise ConfigError(f"kv_cache_dtype is for models without an encoder; {name} has one; leave the option out")
        dtype = ops.CACHE_DTYPES[config.eight_bits]
        if not ops.multiplies(dtype, self.device):
            raise UnsupportedError(
                "kv_cache_dtype: fp8 needs a GPU of compute capability 8.9 or later; use int8, or auto"
            )
        return dtype

    def _opened(self, config: EngineConfig) -> tuple[EngineConfig, Checkpoint]:
        """The configuration with what this device and this host make of it, and the checkpoint."""
        config = _with_folders(config, self.ranks)
        self.config = config
        """As it was given, with folders for the names of models."""
        groups = self.ranks.groups
        config = replace(config, scheduler=resolve_scheduler(config.scheduler, self.device, groups.pipeline.size))
        self.overlap = bool(config.scheduler.overlap_steps)
        """Whether a step is launched before the tokens of the one before are known here."""
        checkpoint = open_checkpoint(
            config.model,
            ranks=groups.tensor.size,
            verify=config.verify_checksums,
            dummy=self.device if config.load_format == "dummy" else None,
        )
        if checkpoint.pooling is not None and self.config.scheduler.max_num_batched_tokens is None:
            tokens = max(config.scheduler.max_num_batched_tokens or 1, _TEXT_STEP_TOKENS[self.device.type])
            config = replace(config, scheduler=replace(config.scheduler, max_num_batched_tokens=tokens))
        return config, checkpoint

    def reset(self) -> None:
        """Forget all sequences, in whatever state they are."""
        self._sampler = Sampler(self.model_config.eos_token_ids, self.device)
        self._tables = TableRows(self.scheduler_config.max_num_seqs * (1 if self.model_config.encoder is None else 2))

    def forget(self, key: int) -> None:
        """Forget the sequence with this key, which has ended."""
        self._sampler.release(key)
        self._tables.release(key)

    def _groups(self, dtype: torch.dtype) -> ParallelGroups:
        """The groups of this rank, the tensor group with mailboxes where its GPUs can reach each other."""
        ranks, fixed = self.ranks, self.config.deterministic
        tensor = replace(ranks.groups.tensor, fixed_order=fixed)
        if dtype.itemsize == 2 and self._reach(range(tensor.first, tensor.first + tensor.size)):
            assert ranks.store is not None
            width = self.model_config.hidden_size
            peers = connect(ranks.store, tensor, width, _MOST_EXCHANGED_ROWS, self.device, self._abort_flag)
            tensor = replace(tensor, peers=None if peers is None else replace(peers, fixed_order=fixed))
        expert = tensor if self.config.parallel.expert_parallel else ALONE
        return replace(ranks.groups, tensor=tensor, expert=expert)

    @property
    def _has_peers(self) -> bool:
        """Whether there are other ranks' GPUs."""
        return self.device.type == "cuda" and self.ranks.world.size > 1

    def _reach(self, group: list[int] | range) -> bool:
        """Whether these ranks of the world have GPUs of this host that can write each other's memory."""
        ranks = self.ranks
        on_one_host = len({rank // ranks.local_size for rank in group}) == 1
        numbers = [ranks.first + rank % ranks.local_size for rank in group]
        return self.device.type == "cuda" and on_one_host and reachable(numbers)

    def _connect_stages(self, config: SchedulerConfig) -> None:
        """Open this rank's connections to other pipeline stages, through memory of GPUs that reach each other."""
        ranks, link = self.ranks, self.stage.link
        if link is None:
            return
        if ranks.world.least(int(self._reach(link.ranks))):
            assert ranks.store is not None
            hidden_bytes = self.model_config.hidden_size * self.runner.dtype.itemsize
            most = max((config.max_num_batched_tokens or 1) * hidden_bytes, config.max_num_seqs * torch.int32.itemsize)
            connect_stages(ranks.store, ranks.world, link, most, self.device, self._abort_flag)
        link.connect(torch.zeros(1, dtype=torch.int32, device=self.device))

    def _make_cache(self, config: EngineConfig) -> tuple[int, int]:
        """Longest sequence and number of blocks of the cache, which is then there; the same on every rank."""
        block_size, asked = self.block_size, config.scheduler.max_model_len
        length = asked or self.model_config.max_position_embeddings or DEFAULT_MODEL_LEN
        ropes = RopeTables(length, self.device)  # some change with the length: this one, whatever the memory allows
        with explained_out_of_memory("sizing the cache", self._advice):
            self._compile_kernels(config, length, ropes)
            self._connect_stages(config.scheduler)
        ranges = self._cache_ranges(config, length, ropes)
        with self.start_times.phase("memory"), explained_out_of_memory("sizing the cache", self._advice):
            budget = config.cache.kv_cache_memory or self._free_memory(config, length, ropes, ranges)
        inputs = 1 if self.model_config.encoder is None else 2
        """Block tables of a request: its sequence's, and that of its encoder's input, which may be as long."""
        fits = budget // self.runner.block_bytes
        fits = self.ranks.world.least(fits)
        room = fits // inputs * block_size
        if room < 1 or (asked is not None and room < asked):
            # a size that was given contradicts the length, wherever it runs; else this device has too little memory
            given = config.cache.kv_cache_memory is not None
            raise (ConfigError if given else CapacityError)(
                f"the key/value cache has room for {room} tokens ({budget} bytes a rank, "
                f"{self.runner.block_bytes} a block of {block_size}), but one sequence may have {length}"
                f"{' and the encoder as many for it' if inputs > 1 else ''}; "
                "lower max_model_len or raise kv_cache_memory" + ("" if given else self._advice())
            )
        length = min(length, room)
        useful = config.scheduler.max_num_seqs * inputs * -(-length // block_size)
        with explained_out_of_memory("allocating the cache", self._advice):
            with self.start_times.phase("cache"):
                self.runner.allocate_cache(min(useful, fits), -(-length // block_size), ropes, ranges)
            if self.device.type == "cuda":
                with self.start_times.phase("kernels"):
                    self._warm_up(config.scheduler)
                if not config.enforce_eager:
                    with self.start_times.phase("graphs"):
                        sizes = self.runner.graph_sizes(self._most_mixed_tokens(config.scheduler))
                        self.runner.capture_graphs(sizes)
            elif self.ranks.world.size == 1 and not (config.enforce_eager or config.deterministic):
                self.runner.record_steps()
        return length, min(useful, fits)

    def _cache_ranges(self, config: EngineConfig, length: int, ropes: RopeTables) -> list[Tensor] | None:
        """Ranges of keys and values for a cache of 8 bits; None for one in the type that the model computes in."""
        if (name := config.cache.eight_bits) is None:
            return None
        with self.start_times.phase("scales"), explained_out_of_memory("measuring keys and values", self._advice):
            ranges, source = self._stored_ranges, "the checkpoint"
            if ranges is None:
                most_tokens, source = config.scheduler.max_num_batched_tokens or 1, "random tokens"
                ranges = measured_ranges(self.runner, name, self.model_config.vocab_size, ropes, length, most_tokens)
        level = logging.INFO if self.ranks.world.rank == 0 else logging.DEBUG
        _log.log(level, "key/value cache in %s, with a scale for each head from %s", name, source)
        return ranges

    def _advice(self) -> str:
        """The end of a message for whoever has too little memory: what this model needs, and which options would do."""
        if self.model_config.task != "generate" or self.model_config.encoder is not None:
            return ""  # it holds no cache to be planned, or one that is read in another way
        if self.quantization is not None and self.quantization not in SCHEMES:
            return ""  # the checkpoint's own format, of which bits and groups are its files' matter
        if self.ranks.groups.pipeline.size > 1:
            return ""  # it is reckoned for whole models
        gpu = self.device.type == "cuda"
        free, memory = torch.cuda.mem_get_info(self.device) if gpu else (0, available_host_memory())
        own = torch.cuda.memory_reserved(self.device) if gpu else memory
        device = Device(str(self.device), memory, math.inf, math.inf, is_gpu=gpu)
        config = replace(
            self.config, parallel=replace(self.config.parallel, tensor_parallel_size=self.ranks.groups.tensor.size)
        )
        setup = setup_of(config, compute_dtype(config.dtype, self.model_config, self.device), self.device.type)
        setup = replace(setup, quantization=self.quantization, others=others_use(memory, free, own))
        most_ranks = torch.cuda.device_count() if gpu else setup.ranks
        return f"; {advice(Planner(self.model_config, device), setup, most_ranks)}"

    def _make_step_cache(self, config: EngineConfig) -> tuple[int, int]:
        """Longest text and number of blocks of a cache that holds the keys and values of one layer, for one step."""
        assert self.pooler is not None
        block_size, scheduler = self.block_size, config.scheduler
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
            self._compile_kernels(config, length, ropes)
            with self.start_times.phase("cache"):
                self.runner.allocate_cache(num_blocks, -(-length // block_size), ropes)
            if self.device.type == "cuda":
                with self.start_times.phase("kernels"):
                    self.runner.warm_up(tokens, [scheduler.max_num_seqs])
                    self._warm_up(scheduler)
        return length, num_blocks

    def _compile_kernels(self, config: EngineConfig, length: int, ropes: RopeTables) -> None:
        """Compile what steps of all kinds need on a GPU, where no rank's process has kernels yet."""
        if self.device.type == "cpu":
            return
        with self.start_times.phase("compile"):
            if not self.ranks.world.least(int(not ops.any_compiled())):
                return
            scheduler = config.scheduler
            most, sequences = scheduler.max_num_batched_tokens or 1, scheduler.max_num_seqs
            ranges = None if config.cache.eight_bits is None else self.runner.placeholder_ranges
            self.runner.allocate_cache(1, -(-length // self.block_size), ropes, ranges)
            steps = [(most, sequences), *((_WARMUP_TOKENS, count) for count in _WARMUP_SEQUENCES)]
            steps += [(count, count) for count in (*_WARMUP_SEQUENCES, sequences)]
            steps = [(tokens, count) for tokens, count in steps if tokens <= most and count <= sequences]
            graphs = self.pooler is None and not config.enforce_eager
            sizes = self.runner.graph_sizes(self._most_mixed_tokens(scheduler)) if graphs else Sizes([], [])
            self.runner.compile_kernels(steps, sizes, self.ranks.local_size)
            self.runner.release_cache()

    def _warm_up(self, config: SchedulerConfig) -> None:
        """Run steps of all kinds before the first request comes: what they need is compiled and loaded then."""
        most = min(config.max_num_batched_tokens or 1, _WARMUP_TOKENS)
        self.runner.warm_up(most, [count for count in _WARMUP_SEQUENCES if count <= min(config.max_num_seqs, most)])
        self.runner.load_products(config.max_num_batched_tokens or 1)

    def _most_mixed_tokens(self, config: SchedulerConfig) -> int:
        """Tokens of the largest step with prompts that may be a graph."""
        most = config.max_num_batched_tokens or 1
        # Sums of more rows are NCCL's, which can hang in a graph where others set its options.
        return most if self.ranks.groups.tensor.size == 1 else min(most, _MOST_EXCHANGED_ROWS)

    def _free_memory(self, config: EngineConfig, length: int, ropes: RopeTables, ranges: list[Tensor] | None) -> int:
        """Bytes that the cache may take by default: on a GPU what the largest step leaves."""
        if self.device.type == "cpu":
            return free_memory(self.device, config.cache.gpu_memory_utilization, self.ranks.local_size)
        assert config.scheduler.max_num_batched_tokens is not None
        self.runner.allocate_cache(1, -(-length // self.block_size), ropes, ranges)
        working = self.runner.warm_up(config.scheduler.max_num_batched_tokens, [config.scheduler.max_num_seqs])
        self.runner.release_cache()
        torch.cuda.empty_cache()
        # Twice: steps run one by one and steps in graphs keep their memory apart.
        free = free_memory(self.device, config.cache.gpu_memory_utilization, self.ranks.local_size)
        return max(0, free - 2 * working)

    def launch(self, batch: Batch) -> "Launched":
        """Put one step's batch on the devices of all ranks; the choice of its next tokens is to follow.

        On rank 0, before the batch is noted as done.
        """
        message = StepMessage.of(batch, self._tables)
        if self.ranks.world.size > 1:
            self.ranks.publish(message.packed())
        prompts = PromptLogprobs()
        positions = [(sequence, at) for _, sequence, at in batch.prompt_positions()] if message.prompt_rows else []
        sequences = [batch.sequences[place] for place in batch.sampled]

        def compute() -> ChooseTokens | None:
            if self.pooler is not None:
                return self._pool(self.pooler, message, sequences)
            return self._compute(message, sequences, lambda piece, logits: prompts.add(positions[piece], logits))

        launched = Launched(sequences, prompts, compute)
        if not self.defers:
            launched.compute()
        return launched

    def _pool(self, pooler: Pooler, message: StepMessage, sequences: list[Sequence]) -> ChooseTokens:
        """Put a step of texts on this rank's device; what gives what was made of them."""
        with explained_out_of_memory(), torch.inference_mode():
            hidden_th = self.runner.forward(message)
            tasks = [sequence.pooling for sequence in sequences if sequence.pooling is not None]
            pooled = pooler(hidden_th, message.needed, tasks)
        return lambda: pooled

    def _compute(
        self, message: StepMessage, sequences: list[Sequence], on_prompt_logits: OnPromptLogits
    ) -> ChooseTokens | None:
        """Put a step on this rank's device; what chooses its next tokens, where there are any.

        `sequences`: those that get them; on rank 0 alone.
        """
        with explained_out_of_memory(), torch.inference_mode():
            hidden = self.compute(message, on_prompt_logits)
            if not message.sampled or self.pooler is not None:
                return None  # rank 0 alone makes vectors and scores
            if self.stage.is_last:
                return self._prepare(hidden, message, sequences)
            if self.overlap:
                self.runner.expect(message)
            return None

    def compute(self, message: StepMessage, on_prompt_logits: OnPromptLogits) -> Tensor:
        """Hidden states of a step.

        `on_prompt_logits(piece, logits)` is called on rank 0 with logits [r, v] of a piece of `message.prompt_rows`.
        """
        hidden = self.runner.forward(message)
        if not self.stage.is_last:
            return hidden
        for start in range(0, len(message.prompt_rows), _PROMPT_LOGITS_ROWS):
            piece = slice(start, start + _PROMPT_LOGITS_ROWS)
            logits = self.runner.logits(hidden, message.prompt_rows[piece])
            if logits is not None:
                on_prompt_logits(piece, logits)
        return hidden

    def _prepare(self, hidden_th: Tensor, message: StepMessage, sequences: list[Sequence]) -> ChooseTokens:
        """What chooses the next token of each sequence, once what only the host can tell it is known there."""
        rows = message.sampled_rows
        if message.greedy:
            tokens = self.runner.greedy(hidden_th, rows)
            choice = Choice(tokens) if self.ranks.world.rank == 0 else None
            if self.overlap:
                self.runner.remember(message, tokens.unsqueeze(0))
            return lambda: choice
        logits = self.runner.logits(hidden_th, rows)
        prepared = None if logits is None else self._sampler.prepare(logits, sequences, self.runner.chosen)

        def choose() -> Choice | None:
            choice = None if prepared is None else prepared.choose()
            if self.overlap:
                self._remember(message, choice)
            return choice

        return choose

    def _remember(self, message: StepMessage, choice: Choice | None) -> None:
        """Keep what rank 0 chose, on every rank's device, where later steps are to read it."""
        if choice is None:
            chosen = torch.empty(1 + message.searches, message.num_chosen, dtype=torch.int32, device=self.device)
        else:
            chosen = choice.chosen
        self.runner.remember(message, self.ranks.groups.tensor.broadcast(chosen))

    def finish(self) -> None:
        """Wait until this rank's GPU has done all that other stages may wait for."""
        if self._has_peers and self.stage.link is not None:
            torch.cuda.synchronize(self.device)

    def release(self) -> None:
        """Let go what must not outlast the ranks' group."""
        self.runner.release_graphs()

    def give_up(self) -> None:
        """Leave the group after a failure: kernels that wait for another rank end first, whatever they have."""
        self._abort_flag.fill_(1)
        self.release()
        self.ranks.abandon()

    def follow(self) -> None:
        """What ranks other than 0 do until rank 0 says stop."""
        while len(numbers := self.ranks.receive()):
            message = StepMessage.unpacked(numbers)
            Launched([], PromptLogprobs(), partial(self._compute, message, [], _no_logits)).choose()
        self.finish()
        self.release()


def _no_logits(_piece: slice, _logits: Tensor) -> None:
    raise AssertionError("rank 0 alone has logits")


def pooler_of(model: Transformer, checkpoint: Checkpoint, device: torch.device) -> Pooler | None:
    """What makes vectors or scores of a model's hidden states; None where it generates."""
    if checkpoint.pooling is None:
        return None
    classifier = model.classifier if isinstance(model, Encoder) else None
    return Pooler(checkpoint.config, checkpoint.pooling, classifier, device)


def resolve_scheduler(config: SchedulerConfig, device: torch.device, stages: int = 1) -> SchedulerConfig:
    """The limits of a step with the defaults of a device in place of what was left open.

    With several pipeline stages the tokens are those of as many steps, which are under way together: the smaller steps
    are, the less a stage waits for the one before.
    """
    tokens = config.max_num_batched_tokens or max(DEFAULT_STEP_TOKENS[device.type], config.max_num_seqs)
    tokens = max(tokens // stages, min(tokens, _LEAST_STEP_TOKENS), config.max_num_seqs)
    overlap = device.type != "cpu" if config.overlap_steps is None else config.overlap_steps
    return replace(config, max_num_batched_tokens=tokens, overlap_steps=overlap)


@contextmanager
def explained_out_of_memory(doing: str = "computing a step", advice: Callable[[], str] | None = None) -> Iterator[None]:
    """Turn the device's running out of memory into a CapacityError that says what to lower, with further `advice`."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        more = "" if advice is None else advice()
        raise CapacityError(
            f"the device's memory ran out while {doing}; lower max_num_batched_tokens, max_num_seqs, "
            f"kv_cache_memory or gpu_memory_utilization, or use more ranks ({str(error).partition(chr(10))[0]}){more}"
        ) from error


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


def compute_dtype(name: str, model: ModelConfig, device: torch.device) -> DTypeName:
    """The type to compute in: what was asked; else fp32 on a CPU and the checkpoint's own on a GPU."""
    if name != "auto":
        return dtype_name(name)
    return "fp32" if device.type == "cpu" else model.dtype


def _with_folders(config: EngineConfig, ranks: Ranks) -> EngineConfig:
    """The configuration with folders for names: rank 0 looks them up, and downloads what is missing for all.

    A rank whose host does not have rank 0's folder looks its own up.
    """
    if ranks.world.rank == 0:
        config = resolve_engine(config)
    folder = str(ranks.broadcast(config.model))
    if ranks.world.rank == 0:
        return config
    return replace(config, model=folder, revision=None) if Path(folder).exists() else resolve_engine(config)


def build_model(
    checkpoint: Checkpoint,
    groups: ParallelGroups,
    dtype: torch.dtype,
    device: torch.device,
    *,
    quantization: str | None = None,
    show_progress: bool = False,
) -> Transformer:
    """The model of this rank with its weights, laid out for the device; rank 0 logs what it loads.

    With `quantization`, each weight is quantized as it comes: at most one of them is held in full precision besides.
    """
    world, within = groups.world, groups.tensor
    level = logging.INFO if world.rank == 0 else logging.DEBUG
    config, source = checkpoint.config, checkpoint.source
    _log.log(level, "loading %s (%s) from %s to %s", config.architecture, source.kind, source.folder, device)
    if device.type == "cpu" and not ops.cpu_multiplies(dtype):
        name = str(dtype).removeprefix("torch.")
        _log.log(level, "%s is no faster than float32 here: its products are computed in float32", name)
    if device.type == "cpu":
        _load_kernels(level)
    start = time.perf_counter()
    with torch.device("meta"):
        model = model_class(config.architecture)(config, groups)
    model.eval()
    quantizer = None if quantization is None else Quantizer(SCHEMES[quantization], model)
    quantizable = matrices(model)
    nbytes = sum(parameter.numel() for parameter in model.parameters()) * dtype.itemsize
    show = show_progress and world.rank == 0
    with progress_bar("Loading weights", nbytes, unit="bytes", show=show) as bar:
        whole_experts = groups.expert.size > 1
        upload = ops.Upload(device)
        if within.size == 1:
            source.upload = upload
        tensors = rank_tensors(
            checkpoint,
            within.rank,
            within.size,
            dtype,
            expert_parallel=whole_experts,
            names={name for name, _ in model.named_parameters()},
        )
        held = 0
        for name, loaded in tensors:
            owner, _, attribute = name.rpartition(".")
            weight = ops.moved(loaded, upload)
            if not isinstance(weight, Tensor) and name not in quantizable:
                weight = weight.dequantized(dtype)
            if quantizer is not None and isinstance(weight, Tensor):
                weight = quantizer(name, weight)
            set_weight(model.get_submodule(owner), attribute, weight)
            held += weight.nbytes
            bar.advance(math.prod(loaded.shape) * dtype.itemsize)
    with torch.inference_mode():
        for module in model.modules():
            if isinstance(module, PackedModule):
                module.pack()
    size = f"{held / 1e9:.3f} GB" + (f" for each of {world.size} ranks" if world.size > 1 else "")
    shown = quantization or checkpoint.stored_quantization
    types = f"{dtype}" if shown is None else f"{shown} and {dtype}"
    _log.log(level, "loaded %s of weights as %s in %.1f s", size, types, time.perf_counter() - start)
    if shown is not None and config.experts is not None:
        _log.log(level, "quantization %s: the experts of the mixture are in %s", shown, dtype)
    return model


def _load_kernels(level: int) -> None:
    """Have the kernels for a CPU, which the first start compiles."""
    start = time.perf_counter()
    if not ops.records():
        _log.log(
            level, "decoding takes about twice as long without numba, which is not installed: pip install 'hasten[cpu]'"
        )
    elif (seconds := time.perf_counter() - start) > _NOTICED_S:
        _log.log(level, "compiled kernels for this processor in %.1f s; later starts read them", seconds)


def _quantization(config: EngineConfig, checkpoint: Checkpoint) -> str | None:
    """How weights are quantized; ConfigError where both the checkpoint and the configuration say so."""
    if checkpoint.stored_quantization is None:
        return config.quantization or checkpoint.quantization
    if config.quantization is not None:
        raise ConfigError(
            f"{checkpoint.path} is quantized already ({checkpoint.stored_quantization}); leave out quantization "
            f"{config.quantization}, or give the full-precision checkpoint"
        )
    return checkpoint.stored_quantization


def config_to_json(config: EngineConfig) -> str:
    """One line that `config_from_json` reads back."""
    return json.dumps(asdict(config))


def config_from_json(text: str) -> EngineConfig:
    """The configuration that `config_to_json` wrote."""
    raw: dict[str, Any] = json.loads(text)
    return EngineConfig(
        **{
            **raw,
            "parallel": ParallelConfig(**raw["parallel"]),
            "cache": CacheConfig(**raw["cache"]),
            "scheduler": SchedulerConfig(**raw["scheduler"]),
        }
    )


def follow_rank_zero(config: EngineConfig, place: RankInfo) -> None:
    """Be rank `place.rank` until rank 0 says stop; an error is told to the other ranks before it is raised."""
    logging.getLogger("hasten").setLevel(logging.ERROR)  # rank 0 says once what every rank would warn of
    ranks = Ranks(place, None, device_kind(config), config.parallel)
    give_up = ranks.abandon
    try:
        with ranks.guard("following rank 0"):
            worker = Worker(config, ranks)
            give_up = worker.give_up
            worker.follow()
    except BaseException as error:
        ranks.report_failure(error)
        give_up()
        raise
    ranks.leave()


def main() -> None:
    """A rank that rank 0 started: its configuration comes by standard input, its errors go to a pipe."""
    pipe = int(sys.argv[1])
    config = config_from_json(sys.stdin.readline())
    threading.Thread(target=_end_with_parent, daemon=True).start()
    place = rank_from_environment()
    assert place is not None
    try:
        follow_rank_zero(config, place)
    except BaseException as error:
        os.write(pipe, reported(error))
        os._exit(1)
    os._exit(0)


def _end_with_parent() -> None:
    """Rank 0 holds the other end of standard input for as long as it lives."""
    sys.stdin.read()
    os._exit(0)


if __name__ == "__main__":
    main()
