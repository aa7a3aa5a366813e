"""Ranges of keys and values for a cache of 8 bits: those of the checkpoint, or measured on random tokens.

Shapes: m key/value heads of this rank.
"""

import torch
from torch import Tensor

from hasten.checkpoint.plan import Checkpoint
from hasten.core.dtypes import CacheDType
from hasten.core.errors import ConfigError
from hasten.engine.runner import Runner
from hasten.engine.step_message import StepMessage
from hasten.layers.position import RopeTables
from hasten.parallel.groups import TensorGroup
from hasten.parallel.shard import Split, split

_SEQUENCES, _TOKENS = 4, 64
"""Of random tokens, of which keys and values are measured."""
_HEADROOM = {"int8": 2.0, "fp8": 4.0}
"""What the measured ranges are multiplied by, for tokens with greater values: a floating point type loses nothing by
it but the least of its numbers."""


def stored_ranges(runner: Runner, checkpoint: Checkpoint, group: TensorGroup) -> list[Tensor] | None:
    """Ranges [2, m] on the host for each of this rank's attention modules, in order, where the files have scales."""
    if (stored := checkpoint.source.cache_ranges()) is None:
        return None
    attention = checkpoint.config.attention
    return [
        split(stored[module].t(), Split.KV, group.rank, group.size, attention).t().contiguous()
        for module in runner.attention_names
    ]


def measured_ranges(
    runner: Runner, name: CacheDType, vocab_size: int, ropes: RopeTables, longest: int, most_tokens: int
) -> list[Tensor]:
    """The same from steps of random tokens, with some headroom; to be called on all ranks at once.

    `longest`: of a sequence; `most_tokens`: of a step. ConfigError where keys or values are not finite.
    """
    steps = _random_tokens(vocab_size, runner.block_size, longest, most_tokens)
    measured = runner.measured_ranges(steps, ropes)
    if not all(bool(ranges_2m.isfinite().all()) for ranges_2m in measured):
        type_ = str(runner.dtype).removeprefix("torch.")
        raise ConfigError(f"kv_cache_dtype {name}: keys or values of the model are not finite in {type_}; use bf16")
    return [ranges_2m * _HEADROOM[name] for ranges_2m in measured]


def _random_tokens(vocab_size: int, block_size: int, longest: int, most_tokens: int) -> list[StepMessage]:
    """Steps of the same random tokens on every rank and in every run, each of one sequence or of a part of one.

    So neither the tokens nor, where sums have a fixed order, their keys depend on what a step may hold.
    """
    length = min(_TOKENS, longest)
    ids_sl = torch.randint(vocab_size, (_SEQUENCES, length), generator=torch.Generator().manual_seed(0))
    blocks = -(-length // block_size)
    steps: list[StepMessage] = []
    for sequence, ids_l in enumerate(ids_sl.tolist()):
        held = list(range(sequence * blocks, (sequence + 1) * blocks))
        for start in range(0, length, most_tokens):
            ids = ids_l[start : start + most_tokens]
            steps.append(_step(len(steps), ids, start, held))
    return steps


def _step(number: int, ids: list[int], start: int, blocks: list[int]) -> StepMessage:
    return StepMessage(
        number=number,
        ids=ids,
        rows=[0],
        starts=[start],
        counts=[len(ids)],
        needed=[1],
        sampled=[],
        prompt_rows=[],
        edits=[(0, 0, blocks)],
        copies=[],
        positions=[],
        greedy=True,
    )
