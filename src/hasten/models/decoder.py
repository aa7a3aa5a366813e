"""What families share: the stack of layers between embedding and head, and the usual ways to build a layer.

Shapes: t tokens of the flat batch, h hidden.
"""

from typing import ClassVar

import torch.nn as nn
from torch import Tensor

from hasten.core.config import ModelConfig
from hasten.layers.attention import Attention
from hasten.layers.embedding import Embedding, Head
from hasten.layers.mlp import MLP, GatedMLP
from hasten.layers.norm import LayerNorm, RMSNorm
from hasten.models.base import CausalLM
from hasten.ops.meta import AttentionMeta
from hasten.ops.partial_sum import PartialSum


class Decoder(CausalLM):
    """Embedding, layers, a last norm and the language model head."""

    block: ClassVar[type[nn.Module]]
    """One layer, made of the configuration and its number."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        vocab, hidden = config.vocab_size, config.hidden_size
        self.embedding = Embedding(
            vocab,
            hidden,
            scale=config.embedding_scale,
            positions=config.num_positions,
            position_offset=config.position_offset,
        )
        self.layers = nn.ModuleList(self.make_block(config, layer) for layer in range(config.num_layers))
        self.final_norm = self.make_final_norm(config)
        self.head = Head(
            vocab,
            hidden,
            tied=self.embedding if config.tie_word_embeddings else None,
            bias=config.head_bias,
            scale=config.logit_scale,
            softcap=config.logit_softcap,
        )

    @classmethod
    def make_block(cls, config: ModelConfig, layer: int) -> nn.Module:
        """One layer, by its number."""
        return cls.block(config, layer)

    @staticmethod
    def make_final_norm(config: ModelConfig) -> LayerNorm | RMSNorm:
        """The norm before the head."""
        return make_norm(config)

    def forward(self, input_ids_t: Tensor, positions_t: Tensor, meta: AttentionMeta) -> Tensor:
        """Hidden states after the last norm, of the tokens of `meta.output_part` where it names some: [t, h]."""
        x_th = self.embedding(input_ids_t, positions_t)
        for layer in self.layers:
            x_th = layer(x_th, positions_t, meta)
        normed_th: Tensor = self.final_norm(x_th)[0]
        return normed_th


def make_norm(config: ModelConfig) -> LayerNorm:
    """A layer norm of the model's width."""
    return LayerNorm(config.hidden_size, eps=config.norm_eps, bias=config.norm_bias)


class Block(nn.Module):
    """What blocks of every build have: attention behind a norm, and an MLP."""

    mlp_kind: ClassVar[type[MLP] | type[GatedMLP]] = MLP

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        hidden, inner = config.hidden_size, config.intermediate_size
        self.last = layer == config.num_layers - 1
        self.input_norm = make_norm(config)
        self.attention = Attention(hidden, config.attention_of(layer), norm_eps=config.norm_eps)
        self.mlp = self.mlp_kind(hidden, inner, activation=config.activation, bias=config.mlp_bias)


class SequentialBlock(Block):
    """First attention, then the MLP, each behind a norm and added to a residual."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__(config, layer)
        self.post_norm = make_norm(config)

    def forward(self, x_th: Tensor | PartialSum, positions_t: Tensor, meta: AttentionMeta) -> Tensor | PartialSum:
        """Hidden states after this layer, or a sum for the next norm to add up."""
        normed_th, residual_th = self.input_norm(x_th)
        x_th = self.attention(normed_th, positions_t, meta, residual_th, last=self.last)
        normed_th, residual_th = self.post_norm(x_th)
        return self.mlp(normed_th, residual_th)


class ParallelBlock(Block):
    """Attention and MLP side by side, behind one norm and added to one residual."""

    def forward(self, x_th: Tensor | PartialSum, positions_t: Tensor, meta: AttentionMeta) -> Tensor | PartialSum:
        """Hidden states after this layer, or a sum for the next norm to add up."""
        normed_th, residual_th = self.input_norm(x_th)
        attended_th = self.attention(normed_th, positions_t, meta, residual_th, last=self.last)
        return self.mlp(meta.output_rows(normed_th, last=self.last), attended_th)


class TwinNormBlock(Block):
    """Attention and MLP side by side, each behind a norm of its own, and added to one residual."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__(config, layer)
        self.post_norm = make_norm(config)

    def forward(self, x_th: Tensor | PartialSum, positions_t: Tensor, meta: AttentionMeta) -> Tensor | PartialSum:
        """Hidden states after this layer, or a sum for the next norm to add up."""
        normed_th, residual_th = self.input_norm(x_th)
        attended_th = self.attention(normed_th, positions_t, meta, residual_th, last=self.last)
        normed_th, _ = self.post_norm(meta.output_rows(residual_th, last=self.last))
        return self.mlp(normed_th, attended_th)
