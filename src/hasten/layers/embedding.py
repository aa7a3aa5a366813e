"""The vocabulary at both ends of a model, divided over the ranks. Shapes: t tokens, r rows, h hidden, v vocabulary."""

import torch
import torch.nn as nn
from torch import Tensor

from hasten import ops
from hasten.layers.linear import PackedModule
from hasten.parallel.groups import tensor_group
from hasten.parallel.shard import padded_vocab


class Embedding(nn.Module):
    """Token embedding; each rank holds a range of the vocabulary."""

    def __init__(self, vocab_size: int, hidden_size: int) -> None:
        super().__init__()
        self.group = tensor_group()
        rows = padded_vocab(vocab_size, self.group.size) // self.group.size
        self.first = self.group.rank * rows if self.group.size > 1 else None
        self.weight = nn.Parameter(torch.empty(rows, hidden_size), requires_grad=False)

    def forward(self, ids_t: Tensor) -> Tensor:
        """Embeddings [t, h], whole on every rank."""
        return self.group.all_reduce(ops.embedding(ids_t, self.weight, self.first))


class Head(PackedModule):
    """The language model head, with weights of its own or tied to the embedding's."""

    packed: ops.PackedLinear

    def __init__(self, vocab_size: int, hidden_size: int, *, tied: Embedding | None) -> None:
        super().__init__()
        self.group = tensor_group()
        self.vocab_size = vocab_size
        self.tied = [tied] if tied is not None else []  # in a list, so that its parameters are not counted twice
        if tied is None:
            rows = padded_vocab(vocab_size, self.group.size) // self.group.size
            self.weight = nn.Parameter(torch.empty(rows, hidden_size), requires_grad=False)

    def pack(self) -> None:
        """Lay the head out; a tied one has no second copy."""
        if self.tied:
            self.packed = ops.pack_linear(self.tied[0].weight.data, shared=True)
        else:
            self.packed = ops.pack_linear(self.weight.data)
            del self.weight

    def forward(self, hidden_rh: Tensor) -> Tensor | None:
        """Logits [r, v] on rank 0; None on the others."""
        logits = self.group.gather(ops.linear(hidden_rh, self.packed))
        return None if logits is None else logits[:, : self.vocab_size]
