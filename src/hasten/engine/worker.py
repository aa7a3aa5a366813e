"""One rank: its model and its cache. Rank 0 schedules, and each step's work in numbers is all that the others know.

Only rank 0 has the logits. With overlapped steps a step is launched before the tokens of the one before are known to
its Python: on every rank they stay on the device, where the next step reads them.
"""

import logging
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from hasten import ops
from hasten.checkpoint.plan import Checkpoint, open_checkpoint
from hasten.core.config import EngineConfig
from hasten.core.errors import CapacityError
from hasten.core.kernel_cache import check_kernel_cache, kernel_cache
from hasten.engine import deferred
from hasten.engine.batch import Batch
from hasten.engine.cache_ranges import stored_ranges
from hasten.engine.cache_setup import CacheSetup
from hasten.engine.deferred import Budget
from hasten.engine.launched_step import ChooseTokens, Launched
from hasten.engine.memory import explained_out_of_memory, host_memory_and_swap
from hasten.engine.memory_advice import memory_advice
from hasten.engine.model_loading import build_model, compute_dtype, quantization_of, with_folders
from hasten.engine.peer_links import PeerLinks
from hasten.engine.pooling import Pooler
from hasten.engine.rank_device import rank_device
from hasten.engine.rank_options import (
    block_size_of,
    cache_dtype,
    check_options,
    resolve_scheduler,
    scheduler_of_texts,
)
from hasten.engine.recorded_choice import Chosen
from hasten.engine.runner import Runner
from hasten.engine.sampler import Choice, PromptLogprobs, Sampler
from hasten.engine.sequence import Sequence
from hasten.engine.start_times import StartTimes
from hasten.engine.step_message import StepMessage, TableRows
from hasten.models.base import Transformer
from hasten.models.encoder import Encoder
from hasten.parallel.launch import Ranks
from hasten.parallel.threads import ThreadChoice

_log = logging.getLogger(__name__)

_PROMPT_LOGITS_ROWS = 256
"""Rows of prompt logits computed at a time: a whole prompt's would need vocabulary times length."""

OnPromptLogits = Callable[[slice, Tensor], None]


class Worker:
    """One rank of the engine."""

    def __init__(self, config: EngineConfig, ranks: Ranks) -> None:
        self.ranks = ranks
        self.start_times = StartTimes()
        self.device = rank_device(config, ranks.world, ranks.local_size, ranks.first)
        self._links = PeerLinks(ranks, self.device)
        self._start_device()
        with self.start_times.phase("config"):
            config, checkpoint = self._opened(config)
        self.model_config, groups = checkpoint.config, ranks.groups
        self.quantization = quantization_of(config, checkpoint)
        check_options(config, self.model_config, self.quantization, groups.tensor.size)
        dtype = ops.TORCH_DTYPES[compute_dtype(config.dtype, self.model_config, self.device)]
        self.tokenizer_folder = checkpoint.tokenizer_folder
        advice = partial(memory_advice, self.config, self.model_config, self.quantization, self.device, groups)
        model = self._load(config, checkpoint, dtype, advice)
        self.stage = groups.pipeline
        self.defers = self.stage.size > 1 and self.device.type == "cpu" and not self.overlap
        """Whether rank 0 computes its stage of a step only when its tokens are collected: a CPU computes at once, and
        the other stages are to have the next steps by then."""
        self.pooler = pooler_of(model, checkpoint, self.device)
        """What makes vectors or scores of texts; None where text is generated."""
        self.block_size = block_size_of(config.cache, self.device, keeps_cache=self.pooler is None)
        """Tokens in a block of the cache."""
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
            cache_dtype=cache_dtype(config.cache, self.model_config, self.device),
        )
        eight_bits = config.cache.eight_bits is not None
        setup = CacheSetup(
            config,
            self.model_config,
            self.device,
            ranks,
            self.runner,
            self.pooler,
            self.block_size,
            stored_ranges(self.runner, checkpoint, groups.tensor) if eight_bits else None,
            self.start_times,
            advice,
            partial(self._links.connect_stages, config.scheduler, self._hidden_bytes(dtype)),
        )
        self.max_model_len, self.num_blocks = setup.make() if self.pooler is None else setup.make_for_step()
        self.scheduler_config = config.scheduler
        self._threads = ThreadChoice()
        self._budget = Budget(interactive=bool(config.scheduler.itl_target))
        self.reset()

    def _hidden_bytes(self, dtype: torch.dtype) -> int:
        """Bytes of a token's hidden states."""
        return self.model_config.hidden_size * ops.hidden_dtype(dtype, self.device.type).itemsize

    def _start_device(self) -> None:
        """Create a GPU's context, once its cache of kernels is known to be safe."""
        with self.start_times.phase("device"), explained_out_of_memory("starting the device"):
            if self.device.type == "cuda":
                check_kernel_cache(kernel_cache())
                torch.cuda.synchronize(self.device)  # creates its context, which the next use would otherwise do

    def _load(
        self, config: EngineConfig, checkpoint: Checkpoint, dtype: torch.dtype, advice: Callable[[], str]
    ) -> Transformer:
        """The model of this rank with its weights."""
        if self.device.type == "cpu":
            with self.start_times.phase("compile"):
                ops.compile_cpu_kernels(
                    dtype, quantized=self.quantization is not None, show_progress=config.progress_bars
                )
        phase, explained = self.start_times.phase("weights"), explained_out_of_memory("loading the model", advice)
        with phase, explained, ops.fixed_order(config.deterministic):
            return build_model(
                checkpoint,
                self._links.groups(config, self.model_config, dtype),
                dtype,
                self.device,
                quantization=config.quantization or checkpoint.quantization,
                show_progress=config.progress_bars,
                check_memory=partial(self._check_memory, advice) if self.device.type == "cpu" else None,
            )

    def _check_memory(self, advice: Callable[[], str], needed: int) -> None:
        """CapacityError where the ranks of this host need more than it has for their weights, `needed` bytes here."""
        free = host_memory_and_swap()  # before any of the others takes its part
        needed = self.ranks.world.least(needed) * self.ranks.local_size
        if needed > free:
            more = advice() or f": they take {needed / 1e9:.2f} GB, and {free / 1e9:.2f} GB are free"
            raise CapacityError(f"the weights do not fit into this machine's memory{more}")

    def _opened(self, config: EngineConfig) -> tuple[EngineConfig, Checkpoint]:
        """The configuration with what this device and this host make of it, and the checkpoint."""
        config = with_folders(config, self.ranks)
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
        if checkpoint.pooling is not None:
            scheduler = scheduler_of_texts(config.scheduler, self.config.scheduler, self.device)
            config = replace(config, scheduler=scheduler)
        return config, checkpoint

    def reset(self) -> None:
        """Forget all sequences, in whatever state they are."""
        self._sampler = Sampler(self.model_config.eos_token_ids, self.device)
        self._last_greedy: Chosen | None = None
        self._tables = TableRows(self.scheduler_config.max_num_seqs * (1 if self.model_config.encoder is None else 2))

    def forget(self, key: int) -> None:
        """Forget the sequence with this key, which has ended."""
        self._sampler.release(key)
        self._tables.release(key)

    def launch(self, batch: Batch) -> "Launched":
        """Put one step's batch on the devices of all ranks; the choice of its next tokens is to follow.

        On rank 0, before the batch is noted as done.
        """
        if self.pooler is None:
            message = StepMessage.of(batch, self._tables)
        else:
            message = StepMessage.of_texts(batch, needs_first=self.pooler.needs_first)
        if (lacking := self.runner.lacking(message)) is not None and self._budget.allows:
            self._do_deferred(lacking)
        if self.ranks.world.size > 1:
            self.ranks.publish(message.packed())
        prompts = PromptLogprobs(list(batch.prompt_runs()))
        sequences = [batch.sequences[index] for index in batch.sampled]

        def compute() -> ChooseTokens | None:
            if self.pooler is not None:
                return self._pool(self.pooler, message, sequences)
            return self._compute(message, sequences, prompts.add)

        launched = Launched(sequences, prompts, compute)
        if not self.defers:
            launched.compute()
        return launched

    def prepare_next(self) -> bool:
        """Do a piece of what the start left for later, on all ranks; False where none is left. On rank 0."""
        number = self.runner.deferred.next
        if number is not None:
            self._do_deferred(number)
        return number is not None

    def _do_deferred(self, number: int) -> None:
        """Do this piece, on all ranks. Without memory for it a rank alone does without; several end."""
        if self.ranks.world.size > 1:
            self.ranks.publish(deferred.packed(number))
        began = time.monotonic()
        try:
            self._do(number)
        except CapacityError as error:
            if self.ranks.world.size > 1:
                raise  # others have it, and all must compute alike
            _log.warning("%s; the engine goes on without it", error)
        self._budget.spend(time.monotonic() - began)

    def _do(self, number: int) -> None:
        piece = self.runner.deferred.take(number)
        with explained_out_of_memory(f"preparing {piece.name}"), torch.inference_mode():
            piece.do()

    def _pool(self, pooler: Pooler, message: StepMessage, sequences: list[Sequence]) -> ChooseTokens:
        """Put a step of texts on this rank's device; what gives what was made of them."""
        with explained_out_of_memory(), torch.inference_mode():
            hidden_th = self.runner.forward(message)
            params = [sequence.pooling for sequence in sequences if sequence.pooling is not None]
            masks = [len(sequence.masks) for sequence in sequences]
            pooled = pooler(hidden_th, message.needed, params, masks, message.prompt_rows)
        return lambda: pooled

    def _compute(
        self, message: StepMessage, sequences: list[Sequence], on_prompt_logits: OnPromptLogits
    ) -> ChooseTokens | None:
        """Put a step on this rank's device; what chooses its next tokens, where there are any.

        `sequences`: those that get them; on rank 0 alone.
        """
        with explained_out_of_memory(), torch.inference_mode():
            if self.pooler is not None:  # rank 0 alone makes vectors and scores, but all ranks logits
                for _ in self.pooler.mask_logits(self.runner.forward(message), message.prompt_rows):
                    pass
                return None
            with self._threads.step(message.num_tokens) if self.runner.any_threads else nullcontext():
                hidden = self.compute(message, on_prompt_logits)
            if not message.sampled:
                return None
            if self.stage.is_last:
                with self._threads.rest_of_step():
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
            choice = Choice(self._greedy(tokens)) if self.ranks.world.rank == 0 else None
            if self.overlap:
                self.runner.remember(message, tokens.unsqueeze(0))
            return lambda: choice
        logits = self.runner.logits(hidden_th, rows)
        prepared = None if logits is None else self._sampler.prepare(logits, sequences, self.runner.chosen)

        def choose() -> Choice | None:
            with self._threads.rest_of_step():
                choice = None if prepared is None else prepared.choose()
            if self.overlap:
                self._remember(message, choice)
            return choice

        return choose

    def _greedy(self, tokens_r: Tensor) -> Chosen:
        """The most probable tokens as a choice: that of the last step where they are in the same tensor."""
        if self._last_greedy is None or self._last_greedy.tokens_r is not tokens_r:
            self._last_greedy = Chosen(tokens_r)
        return self._last_greedy

    def _remember(self, message: StepMessage, choice: Choice | None) -> None:
        """Keep what rank 0 chose, on every rank's device, where later steps are to read it."""
        if choice is None:
            chosen = torch.empty(1 + message.searches, message.num_chosen, dtype=torch.int32, device=self.device)
        else:
            chosen = choice.chosen
        self.runner.remember(message, self.ranks.groups.tensor.broadcast(chosen))

    def finish(self) -> None:
        """Wait until this rank's GPU has done all that other stages may wait for."""
        if self._links.has_peers and self.stage.link is not None:
            torch.cuda.synchronize(self.device)

    def release(self) -> None:
        """Let go what must not outlast the ranks' group."""
        self.runner.release_graphs()

    def give_up(self) -> None:
        """Leave the group after a failure: kernels that wait for another rank end first, whatever they have."""
        self._links.release()
        self.release()
        self.ranks.abandon()

    def follow(self) -> None:
        """What ranks other than 0 do until rank 0 says stop."""
        while len(numbers := self.ranks.receive()):
            if (piece := deferred.unpacked(numbers)) is not None:
                self._do(piece)
                continue
            message = StepMessage.unpacked(numbers)
            Launched([], PromptLogprobs([]), partial(self._compute, message, [], _no_logits)).choose()
        self.finish()
        self.release()


def _no_logits(_piece: slice, _logits: Tensor) -> None:
    raise AssertionError("rank 0 alone has logits")


def pooler_of(model: Transformer, checkpoint: Checkpoint, device: torch.device) -> Pooler | None:
    """What makes vectors or scores of a model's hidden states; None where it generates."""
    if checkpoint.pooling is None:
        return None
    classifier, words = (model.classifier, model.masked_words) if isinstance(model, Encoder) else (None, None)
    return Pooler(checkpoint.config, checkpoint.pooling, classifier, words, device)
