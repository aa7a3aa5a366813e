"""From hidden states to logits of labels; every rank holds the weights whole. Shapes: r rows, h hidden, l labels."""

from collections.abc import Callable

import torch
import torch.nn as nn
import torch.nn.functional as F  # noqa: N812 - torch's own convention
from torch import Tensor

from hasten.core.model_config import ClassifierConfig

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
