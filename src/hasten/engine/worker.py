"""One rank: its model, its cache and its scheduler, which every rank runs over the same messages.

A step begins with a message from rank 0: the tokens that the last step chose, the sequences that end, those that come.
Ranks then schedule and compute alike; only rank 0 has the logits.
"""

import json
import os
import sys
import threading
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any, TypedDict

import torch
from torch import Tensor

from hasten import ops
from hasten.checkpoint.plan import Checkpoint, open_checkpoint, rank_tensors
from hasten.core.config import (
    CacheConfig,
    DTypeName,
    EngineConfig,
    ModelConfig,
    ParallelConfig,
    SchedulerConfig,
    dtype_name,
)
from hasten.core.errors import CapacityError, ConfigError
from hasten.core.types import Request, SamplingParams
from hasten.engine.batch import Batch
from hasten.engine.block_manager import BlockManager
from hasten.engine.memory import free_memory
from hasten.engine.runner import Runner
from hasten.engine.scheduler import Scheduler
from hasten.engine.sequence import Sequence
from hasten.layers.linear import PackedModule
from hasten.models.base import CausalLM
from hasten.models.registry import model_class
from hasten.parallel.groups import TensorGroup, use_group
from hasten.parallel.launch import RankPlace, Ranks, place_from_environment

_DEFAULT_MODEL_LEN = 2048
_PROMPT_LOGITS_ROWS = 256
"""Rows of prompt logits made at a time: a whole prompt's would need vocabulary times length."""


class NewSequence(TypedDict):
    """What a rank must know of a sequence that comes."""

    request_id: str
    token_ids: list[int]
    n: int
    prompt_logprobs: bool


class Message(TypedDict):
    """What rank 0 tells the others before a step."""

    tokens: list[tuple[int, int]]
    """(sequence key, token) chosen by the step before."""
    finished: list[int]
    """Keys of sequences that end, in order."""
    added: list[NewSequence]
    stop: bool


class Worker:
    """One rank of the engine."""

    def __init__(self, config: EngineConfig, ranks: Ranks) -> None:
        self.ranks = ranks
        self.device = rank_device(config, ranks.group)
        checkpoint = open_checkpoint(
            config.model,
            ranks=ranks.group.size,
            verify=config.verify_checksums,
            dummy=config.load_format == "dummy",
        )
        self.model_config = checkpoint.config
        replace(config.parallel, tensor_parallel_size=ranks.group.size).validate(self.model_config)
        dtype = ops.TORCH_DTYPES[compute_dtype(config.dtype, self.model_config, self.device)]
        self.tokenizer_folder = checkpoint.tokenizer_folder
        model = build_model(checkpoint, ranks.group, dtype, self.device)
        self.runner = Runner(model, self.model_config, dtype, self.device, config.cache.block_size)
        self.max_model_len, num_blocks = self._size_cache(config)
        self.runner.allocate_cache(
            num_blocks, config.scheduler.max_num_seqs, -(-self.max_model_len // config.cache.block_size)
        )
        blocks = BlockManager(num_blocks, config.cache.block_size, enable_prefix_cache=config.cache.enable_prefix_cache)
        self.scheduler = Scheduler(config.scheduler, blocks)

    def _size_cache(self, config: EngineConfig) -> tuple[int, int]:
        """Longest sequence and number of blocks; the same on every rank."""
        block_size, asked = config.cache.block_size, config.scheduler.max_model_len
        length = asked or self.model_config.max_position_embeddings or _DEFAULT_MODEL_LEN
        useful = config.scheduler.max_num_seqs * -(-length // block_size)
        budget = config.cache.kv_cache_memory or free_memory(
            self.device, config.cache.memory_utilization, self.ranks.local_size
        )
        fits = budget // self.runner.block_bytes
        if self.ranks.group.size > 1:
            smallest = torch.tensor(fits)
            torch.distributed.all_reduce(smallest, op=torch.distributed.ReduceOp.MIN)
            fits = int(smallest)
        if fits < 1 or (asked is not None and fits * block_size < asked):
            raise CapacityError(
                f"the key/value cache has room for {fits * block_size} tokens ({budget} bytes a rank, "
                f"{self.runner.block_bytes} a block of {block_size}), but one sequence may have {length}; "
                "lower max_model_len or raise kv_cache_memory"
            )
        return min(length, fits * block_size), min(useful, fits)

    def apply(self, message: Message) -> None:
        """Bring the scheduler up to date with rank 0's message."""
        for key, token in message["tokens"]:
            sequence = self.scheduler.get(key)
            if sequence is not None:
                sequence.token_ids.append(token)
        for key in message["finished"]:
            self.scheduler.finish(key)
        for new in message["added"]:
            params = SamplingParams(n=new["n"], prompt_logprobs=0 if new["prompt_logprobs"] else None)
            request = Request(request_id=new["request_id"], prompt_token_ids=tuple(new["token_ids"]), params=params)
            self.scheduler.add(Sequence(request, 0))

    @torch.inference_mode()
    def compute(
        self, batch: Batch, on_prompt_logits: Callable[[Sequence, int, Tensor], None] | None = None
    ) -> Tensor | None:
        """Run one step's batch: on rank 0 the logits [r, v] of the sequences that get a next token.

        `on_prompt_logits(sequence, first, logits)` is called on rank 0 with the logits of prompt positions `first` and
        following, for sequences that asked for prompt log-probabilities.
        """
        counts = batch.needed()
        hidden = self.runner.forward(batch, counts)
        rows, end = [], 0
        for place, (sequence, needed) in enumerate(zip(batch.sequences, counts, strict=True)):
            start, end = end, end + needed
            if sequence.wants_prompt_logits:
                self._prompt_logits(sequence, hidden[start:end], on_prompt_logits)
            if batch.catches_up(place):
                rows.append(end - 1)
        return self.runner.logits(hidden, rows) if rows else None

    def _prompt_logits(
        self, sequence: Sequence, hidden_th: Tensor, consume: Callable[[Sequence, int, Tensor], None] | None
    ) -> None:
        count = min(hidden_th.shape[0], sequence.prompt_len - sequence.num_computed)
        for first in range(0, count, _PROMPT_LOGITS_ROWS):
            part = hidden_th[first : min(first + _PROMPT_LOGITS_ROWS, count)]
            logits = self.runner.logits(part, list(range(part.shape[0])))
            if logits is not None and consume is not None:
                consume(sequence, sequence.num_computed + first, logits)

    def follow(self) -> None:
        """What ranks other than 0 do until rank 0 says stop."""
        while True:
            message: Message = self.ranks.broadcast(None)  # type: ignore[assignment]  # rank 0 sent a Message
            if message["stop"]:
                return
            self.apply(message)
            batch = self.scheduler.schedule()
            self.compute(batch)
            self.scheduler.advance(batch)


def device_kind(config: EngineConfig) -> str:
    """`cpu` or `cuda`: what the configuration asks for, or what there is."""
    return ops.default_device().type if config.device == "auto" else config.device.partition(":")[0]


def rank_device(config: EngineConfig, group: TensorGroup) -> torch.device:
    """The device of this rank; ConfigError where there is no such GPU."""
    if device_kind(config) == "cpu":
        return torch.device("cpu")
    number = int(config.device.partition(":")[2] or 0)
    if group.size > 1:
        number = int(os.environ.get("LOCAL_RANK", group.rank))
    if number >= torch.cuda.device_count():
        raise ConfigError(
            f"rank {group.rank} needs GPU {number}, but {torch.cuda.device_count()} are visible here; "
            "use fewer ranks or --device cpu"
        )
    device = torch.device("cuda", number)
    torch.cuda.set_device(device)
    return device


def compute_dtype(name: str, model: ModelConfig, device: torch.device) -> DTypeName:
    """The type to compute in: what was asked; else fp32 on a CPU and the checkpoint's own on a GPU."""
    if name != "auto":
        return dtype_name(name)
    return "fp32" if device.type == "cpu" else model.dtype


def build_model(checkpoint: Checkpoint, group: TensorGroup, dtype: torch.dtype, device: torch.device) -> CausalLM:
    """The model of this rank with its weights, laid out for the device."""
    with use_group(group), torch.device("meta"):
        model = model_class(checkpoint.config.architecture)(checkpoint.config)
    model.eval()
    for name, tensor in rank_tensors(checkpoint, group.rank, group.size, dtype):
        owner, _, attribute = name.rpartition(".")
        weight = torch.nn.Parameter(tensor.to(device), requires_grad=False)
        setattr(model.get_submodule(owner), attribute, weight)
    with torch.inference_mode():
        for module in model.modules():
            if isinstance(module, PackedModule):
                module.pack()
    return model


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


def follow_rank_zero(config: EngineConfig, place: RankPlace) -> None:
    """Be rank `place.rank` until rank 0 says stop; an error is told to the other ranks before it is raised."""
    ranks = Ranks(place, None, device_kind(config))
    try:
        with ranks.guard("following rank 0"):
            Worker(config, ranks).follow()
    except BaseException as error:
        ranks.report_failure(error)
        raise
    ranks.leave()


def main() -> None:
    """A rank that rank 0 started: its configuration comes by standard input, its errors go to a pipe."""
    pipe = int(sys.argv[1])
    config = config_from_json(sys.stdin.readline())
    threading.Thread(target=_end_with_parent, daemon=True).start()
    place = place_from_environment()
    assert place is not None
    try:
        follow_rank_zero(config, place)
    except BaseException as error:
        os.write(pipe, f"{type(error).__name__}: {error}".encode())
        os._exit(1)
    os._exit(0)


def _end_with_parent() -> None:
    """Rank 0 holds the other end of standard input for as long as it lives."""
    sys.stdin.read()
    os._exit(0)


if __name__ == "__main__":
    main()
