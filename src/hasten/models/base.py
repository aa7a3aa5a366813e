"""What every model offers to the rooms to its left."""

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import torch.nn as nn
from torch import Tensor

from hasten.core.config import ModelConfig
from hasten.layers.embedding import Head
from hasten.models.weight_map import WeightMap
from hasten.ops.meta import AttentionMeta


class CausalLM(nn.Module):
    """A decoder-only language model over a flat batch of tokens."""

    head: Head
    """Makes logits of hidden states."""

    hf_harmless: ClassVar[frozenset[str]] = frozenset()
    """Keys of its config.json, besides those that every model has, that change nothing it computes."""

    @abstractmethod
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()

    @staticmethod
    @abstractmethod
    def config_from_hf(raw: Mapping[str, Any]) -> ModelConfig:
        """Read Hugging Face's config.json; ConfigError names the key that is missing or not supported."""

    @staticmethod
    @abstractmethod
    def weight_map(config: ModelConfig) -> WeightMap:
        """Names, layouts and splits of all weights of a model so configured."""

    @abstractmethod
    def forward(self, input_ids_t: Tensor, positions_t: Tensor, meta: AttentionMeta) -> Tensor:
        """Hidden states after the last norm, from token ids [t] and their positions [t].

        They are [t, h], or of the tokens of `meta.output_part` alone where it names some.
        """

    def logits(self, hidden_rh: Tensor) -> Tensor | None:
        """Logits [r, v] of chosen rows of the hidden states on rank 0; None on the others."""
        return self.head(hidden_rh)
