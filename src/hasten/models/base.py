"""The interface of models."""

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import torch.nn as nn
from torch import Tensor

from hasten.core.model_config import ModelConfig
from hasten.layers.attention import Attention, CrossAttention
from hasten.layers.embedding import Embedding, Head
from hasten.models.weight_map import WeightMap
from hasten.ops.meta import AttentionMeta
from hasten.ops.partial_sum import PartialSum
from hasten.parallel.groups import ALL_ALONE, ParallelGroups


class Transformer(nn.Module):
    """A model over a flat batch of tokens, up to its hidden states, or one pipeline stage of it."""

    hf_harmless: ClassVar[frozenset[str]] = frozenset()
    """Keys of its config.json, besides those that every model has, that change nothing it computes."""

    def __init__(self, config: ModelConfig, groups: ParallelGroups = ALL_ALONE) -> None:
        super().__init__()
        self.stage, self.group = groups.pipeline, groups.tensor

    @staticmethod
    @abstractmethod
    def config_from_hf(raw: Mapping[str, Any]) -> ModelConfig:
        """Read Hugging Face's config.json; ConfigError names the key that is missing or not supported."""

    @staticmethod
    @abstractmethod
    def weight_map(config: ModelConfig) -> WeightMap:
        """Names, layouts and splits of all weights of a model so configured."""

    @abstractmethod
    def forward(self, inputs: Tensor, positions_t: Tensor, meta: AttentionMeta) -> Tensor:
        """Hidden states after the last norm, or for the next stage: [t, h].

        `inputs` are token ids [t], or hidden states [t, h] of the stage before; `positions_t` those of the tokens. The
        last stage has hidden states of the tokens of `meta.output_part` alone, where it names some.
        """

    def attentions_by_cache(self) -> list[list[Attention | CrossAttention]]:
        """Layers of attention, those together that share a cache: each has its own where nothing else is said."""
        return [[module] for module in self.modules() if isinstance(module, Attention)]


class CausalLM(Transformer):
    """A language model, or one pipeline stage of it: a decoder.

    The first stage begins with the embedding, the last one ends with the head; each has its own of the layers.
    """

    embedding: Embedding
    """Of the first stage."""
    head: Head
    """Of the last stage: makes logits of hidden states."""

    def __init__(self, config: ModelConfig, groups: ParallelGroups = ALL_ALONE) -> None:
        super().__init__(config, groups)
        if self.stage.is_first:
            self.build_start(config, groups)
        layers = self.stage.layers(config.num_layers)
        self.layers = nn.ModuleDict({str(layer): self.make_block(config, layer, groups) for layer in layers})
        """By their numbers in the whole model."""
        if self.stage.is_last:
            self.build_end(config, groups)

    @abstractmethod
    def build_start(self, config: ModelConfig, groups: ParallelGroups) -> None:
        """Make the embedding, and what else stands before the layers."""

    @abstractmethod
    def make_block(self, config: ModelConfig, layer: int, groups: ParallelGroups) -> nn.Module:
        """One layer, by its number."""

    @abstractmethod
    def build_end(self, config: ModelConfig, groups: ParallelGroups) -> None:
        """Make the head, and what else stands behind the layers."""

    def tied_embedding(self, config: ModelConfig) -> Embedding | None:
        """The embedding whose weight the head shares; None where it has its own, as in a stage without an embedding."""
        return self.embedding if config.tie_word_embeddings and self.stage.is_first else None

    @abstractmethod
    def start(self, input_ids_t: Tensor, positions_t: Tensor) -> Tensor | PartialSum:
        """What the first layer reads, [t, h], from token ids [t] and their positions [t]."""

    @abstractmethod
    def end(self, x_th: Tensor | PartialSum) -> Tensor:
        """Hidden states for the head, of what the last layer gives."""

    def forward(self, inputs: Tensor, positions_t: Tensor, meta: AttentionMeta) -> Tensor:
        """Hidden states for the head, or for the next stage: [t, h]."""
        x_th: Tensor | PartialSum = self.start(inputs, positions_t) if self.stage.is_first else inputs
        for layer in self.layers.values():
            x_th = layer(x_th, positions_t, meta)
        return self.end(x_th) if self.stage.is_last else self.group.complete(x_th)

    def logits(self, hidden_rh: Tensor) -> Tensor | None:
        """Logits [r, v] of chosen rows of the hidden states on rank 0; None on the others."""
        return self.head(hidden_rh)
