"""The vocabulary at both ends of a model, divided over the ranks. Shapes: t tokens, r rows, h hidden, v vocabulary."""

from collections.abc import Iterable

import torch
import torch.nn as nn
from torch import Tensor

from hasten import ops
from hasten.layers.linear import PackedModule, ReplicatedLinear, set_weight
from hasten.layers.norm import LayerNorm
from hasten.ops.partial_sum import PartialSum
from hasten.parallel.groups import ALONE, TensorGroup
from hasten.parallel.shard import padded_vocab


class Embedding(PackedModule):
    """Token embedding, with that of learned positions or without; each rank holds a range of the vocabulary."""

    weight: ops.Table

    def __init__(
        self,
        vocab_size: int,
        width: int,
        *,
        hidden_size: int | None = None,
        scale: float | None = None,
        positions: int = 0,
        position_offset: int = 0,
        types: int = 0,
        group: TensorGroup = ALONE,
    ) -> None:
        """`scale`: what embeddings are multiplied by, rounded to their type; a tied head takes them as they are.

        `hidden_size`: what they are projected to, where that is not their own `width`. `positions`: rows of the table
        of positions, which every rank holds whole; that of position p is row p + `position_offset`. `types`: of tokens,
        whose embeddings are added too; that of type k at position p is then p + k * `positions`.
        """
        super().__init__()
        self.group = group
        self.scale = scale
        rows = padded_vocab(vocab_size, self.group.size) // self.group.size
        self.first = self.group.rank * rows if self.group.size > 1 else None
        self.weight = nn.Parameter(torch.empty(rows, width), requires_grad=False)
        hidden_size = hidden_size or width
        self.projection = (
            None if hidden_size == width else ReplicatedLinear(width, hidden_size, bias=False, group=group)
        )
        self.position_offset = position_offset
        self.positions = nn.Parameter(torch.empty(positions, hidden_size), requires_grad=False) if positions else None
        self.types = nn.Parameter(torch.empty(types, hidden_size), requires_grad=False) if types else None

    def pack(self) -> None:
        """Make one table of positions and types: each token then has one row to add. Round the scale."""
        if self.scale is not None:
            # of packed tables there are those in bf16 alone
            dtype = torch.bfloat16 if isinstance(self.weight, ops.PackedLinear) else self.weight.dtype
            self.scale = float(torch.tensor(self.scale, dtype=dtype))
        if self.types is not None:
            assert self.positions is not None
            whole = (self.types.unsqueeze(1) + self.positions).flatten(0, 1)
            self.positions = nn.Parameter(whole, requires_grad=False)
            self.types = None

    def forward(self, ids_t: Tensor, positions_t: Tensor, table_ph: Tensor | None = None) -> Tensor | PartialSum:
        """Embeddings, [t, h]; with several ranks, or with learned positions, a sum for the next norm to add up.

        `table_ph`: of positions, in place of its own.
        """
        rows_th = ops.embedding(ids_t, self.weight, self.first)
        if self.scale is not None:
            rows_th = rows_th * self.scale
        if self.projection is not None:
            rows_th = self.projection(rows_th)  # of the rows that this rank holds: the rest are zeros, and remain so
        over_ranks = self.first is not None
        if self.positions is None:
            return PartialSum(rows_th, over_ranks=True) if over_ranks else rows_th
        # the norm takes the rows of these positions as it does those of a residual: no kernel of their own
        positions_ph = (self.positions if table_ph is None else table_ph)[self.position_offset :]
        return PartialSum(rows_th, residual=positions_ph, residual_indices=positions_t, over_ranks=over_ranks)

    def normed(self, ids_t: Tensor, positions_t: Tensor, norm: LayerNorm) -> Tensor:
        """Embeddings after `norm`: [t, h], whole on every rank."""
        plain = self.positions is None and self.projection is None and self.scale is None
        if plain and self.first is None and norm.bias is not None:
            return ops.embedding_norm(ids_t, self.weight, norm.weight, norm.bias, norm.eps)
        return norm(self(ids_t, positions_t))[0]


class Head(PackedModule):
    """The language model head, with weights of its own or tied to the embedding's."""

    weight: ops.Weight
    packed: ops.PackedLinear

    def __init__(
        self,
        vocab_size: int,
        hidden_size: int,
        *,
        tied: Embedding | None,
        bias: bool = False,
        scale: float | None = None,
        softcap: float | None = None,
        group: TensorGroup = ALONE,
    ) -> None:
        """With `scale` logits are multiplied by it; then, with `softcap` c, they become c * tanh(logit / c)."""
        super().__init__()
        self.group = group
        self.scale = scale
        self.softcap = softcap
        self.vocab_size = vocab_size
        self.tied = [tied] if tied is not None else []  # in a list, so that its parameters are not counted twice
        rows = padded_vocab(vocab_size, self.group.size) // self.group.size
        if tied is None:
            self.weight = nn.Parameter(torch.empty(rows, hidden_size), requires_grad=False)
        self.bias = nn.Parameter(torch.empty(rows), requires_grad=False) if bias else None

    def pack(self) -> None:
        """Lay the head out; a tied one has no second copy."""
        if self.tied:
            loaded = self.tied[0].weight
            assert not isinstance(loaded, ops.PackedLinear), "it is packed once"
            weight = ops.relocated(loaded)
            self.packed = ops.pack_linear(weight, shared=True)
            set_weight(self.tied[0], "weight", self.packed if self.packed.is_table else weight)
        else:
            self.packed = ops.pack_linear(self.weight)
            del self.weight

    def matrices(self) -> Iterable[tuple[nn.Module, str]]:
        """The weight, be it the embedding's."""
        return ((self.tied[0] if self.tied else self, "weight"),)

    def local_logits(self, hidden_rh: Tensor) -> Tensor:
        """This rank's shard of the logits, [r, v / ranks], with what pads the vocabulary at its end."""
        logits_rv = ops.linear(hidden_rh, self.packed, self.bias)
        if self.scale is not None:
            logits_rv = ops.scaled(logits_rv, self.scale)
        if self.softcap is None:
            return logits_rv
        return (logits_rv.float() / self.softcap).tanh_().mul_(self.softcap).to(logits_rv.dtype)

    def gather(self, local_rv: Tensor) -> Tensor | None:
        """Logits [r, v] on rank 0; None on the others."""
        logits = self.group.gather(local_rv)
        return logits if logits is None or logits.shape[1] == self.vocab_size else logits[:, : self.vocab_size]

    def greedy(self, local_rv: Tensor) -> Tensor:
        """The most probable token of each row, int32 [r], on every rank; below 0 where there is none (`ops.greedy`)."""
        if self.group.size == 1:
            return ops.greedy(local_rv[:, : self.vocab_size])
        first = self.group.rank * local_rv.shape[1]
        valid = max(0, min(local_rv.shape[1], self.vocab_size - first))  # the last ranks may hold padding alone
        return ops.tokens_of_keys(self.group.greatest(ops.greedy_keys(local_rv[:, :valid], first)))

    def forward(self, hidden_rh: Tensor) -> Tensor | None:
        """Logits [r, v] on rank 0; None on the others."""
        return self.gather(self.local_logits(hidden_rh))
