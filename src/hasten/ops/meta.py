"""Metadata of a flat batch for attention."""

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from hasten.ops.plan import AttentionPlan


@dataclass(frozen=True, kw_only=True)
class AttentionMeta:
    """One form for prefill, chunks of it, decoding and mixtures: they differ only in numbers.

    The batch has t tokens of s sequences, end to end. Tensors are of whole numbers, on a GPU all int32.
    """

    num_tokens: int
    """Tokens of this batch, or of the part of one."""
    block_tables: Tensor
    """[., b]: numbers of the cache blocks of each sequence; entries past its end may be anything valid. A part of a
    batch has those of the whole. Kernels of a GPU find a sequence's by the plan, and nothing else of their form."""
    slot_mapping: Tensor
    """[t]: cache slot (block * block size + offset) that each token's key and value go to; -1 to store nothing. Of the
    whole batch, in a part too."""
    sequences: list[int]
    """[s] on the host: the row of each sequence in `block_tables`."""
    query_lens: list[int]
    """[s] on the host: tokens of each sequence in this batch."""
    kv_lens: list[int]
    """[s] on the host: tokens of each sequence that attention sees, those of this batch included. Tokens of a sequence
    without any get zeros."""
    output_indices: Tensor | None = None
    """[t]: rows of these tokens in the batch that this is the output part of."""
    plan: AttentionPlan | None = None
    """How the kernels of a GPU divide the work; other devices need none."""
    consecutive: bool = False
    """Whether the blocks of each sequence follow each other, block by block, in the caches: kernels of a GPU read the
    first one's number alone."""
    run: int | None = None
    """Keys, from a multiple of this position on, whose part of a softmax is computed by itself and then added to those
    before it, so that a token's sums have the same order in any batch; None: in an order that suits the device."""
    output_part: "AttentionMeta | None" = None
    """The tokens whose hidden states are needed, if not all are: the last layer computes no others."""
    cross: "AttentionMeta | None" = None
    """Of an encoder-decoder: the same tokens, over the keys that the encoder left for their sequences."""
    numbers: tuple[Tensor, Tensor] | None = None
    """[s] each in int64, where they are tensors already: `sequences` and `kv_lens`."""
    scratch: dict[str, Any] = field(default_factory=dict, compare=False)
    """What an op computes once per step and every layer uses again."""

    def output_rows(self, rows_t: Tensor, *, last: bool) -> Tensor:
        """Those of a batch's rows, one per token, that a layer goes on with: in the last one those of `output_part`."""
        if not last or self.output_part is None:
            return rows_t
        assert self.output_part.output_indices is not None
        return rows_t[self.output_part.output_indices]
