"""From hidden states to logits of labels or words. Every rank holds the weights whole, but those of the vocabulary.

Shapes: r rows, h hidden, l labels, v vocabulary.
"""

from collections.abc import Callable, Iterable

import torch
import torch.nn as nn
import torch.nn.functional as F  # noqa: N812 - torch's own convention
from torch import Tensor

from hasten import ops
from hasten.core.model_config import ClassifierConfig, MaskedWordsConfig
from hasten.layers.embedding import Embedding, Head
from hasten.parallel.groups import ALONE, TensorGroup

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"tanh": torch.tanh, "gelu": F.gelu, "relu": F.relu}


class _Dense(nn.Module):
    def __init__(self, in_features: int, out_features: int, *, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features), requires_grad=False)
        self.bias = nn.Parameter(torch.empty(out_features), requires_grad=False) if bias else None

    def forward(self, x_rh: Tensor) -> Tensor:
        return F.linear(x_rh, self.weight.float(), None if self.bias is None else self.bias.float())


class _Norm(nn.Module):
    def __init__(self, size: int, *, eps: float, bias: bool) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(size), requires_grad=False)
        self.bias = nn.Parameter(torch.empty(size), requires_grad=False) if bias else None

    def forward(self, x_rh: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.float()
        return F.layer_norm(x_rh, self.weight.shape, self.weight.float(), bias, self.eps)


class Classifier(nn.Module):
    """A dense layer, an activation and a norm, as far as the configuration has them, then a linear layer; in fp32."""

    def __init__(self, hidden_size: int, config: ClassifierConfig, *, norm_eps: float, norm_bias: bool) -> None:
        super().__init__()
        self.activation = config.dense
        self.dense = None if config.dense is None else _Dense(hidden_size, hidden_size, bias=config.dense_bias)
        self.norm = _Norm(hidden_size, eps=norm_eps, bias=norm_bias) if config.norm else None
        self.out = _Dense(hidden_size, len(config.labels), bias=config.bias)

    def forward(self, x_rh: Tensor) -> Tensor:
        """Logits, [r, l]."""
        x_rh = x_rh.float()
        if self.dense is not None and self.activation is not None:
            x_rh = _ACTIVATIONS[self.activation](self.dense(x_rh))
        return self.out(x_rh if self.norm is None else self.norm(x_rh))


class _WordsHead(Head):
    def matrices(self) -> Iterable[tuple[nn.Module, str]]:
        """None, so that an encoder's embedding stays as it is where its layers are quantized."""
        return ()


class MaskedWords(nn.Module):
    """A dense layer, an activation and a norm, in fp32, then the head."""

    def __init__(
        self,
        vocab_size: int,
        hidden_size: int,
        config: MaskedWordsConfig,
        *,
        tied: Embedding | None,
        norm_eps: float,
        norm_bias: bool,
        group: TensorGroup = ALONE,
    ) -> None:
        """`tied`: the embedding whose weight the head has; None: it has its own."""
        super().__init__()
        self.activation = config.activation
        self.dense = _Dense(hidden_size, hidden_size, bias=config.dense_bias)
        self.norm = _Norm(hidden_size, eps=norm_eps, bias=norm_bias)
        self.head = _WordsHead(vocab_size, hidden_size, tied=tied, bias=config.bias, group=group)

    def forward(self, hidden_rh: Tensor) -> Tensor | None:
        """Logits [r, v] on rank 0; None on the others, which must call it too."""
        normed_rh = self.norm(ops.activated(self.dense(hidden_rh.float()), self.activation))
        logits: Tensor | None = self.head(normed_rh.to(hidden_rh.dtype))
        return logits
