"""What families share: the stack of layers between embedding and head, and the usual ways to build a layer.

Shapes: t tokens of the flat batch, h hidden.
"""

from typing import ClassVar

import torch.nn as nn
from torch import Tensor

from hasten.core.model_config import ModelConfig
from hasten.layers.attention import Attention
from hasten.layers.embedding import Embedding, Head
from hasten.layers.mlp import MLP, GatedMLP
from hasten.layers.norm import LayerNorm, RMSNorm
from hasten.models.base import CausalLM
from hasten.ops.meta import AttentionMeta
from hasten.ops.partial_sum import PartialSum
from hasten.parallel.groups import ParallelGroups


class Decoder(CausalLM):
    """Embedding, layers, a last norm and the language model head."""

    block: ClassVar[type[nn.Module]]
    """One layer, made of the configuration, its number and the groups of this rank."""

    def build_start(self, config: ModelConfig, groups: ParallelGroups) -> None:
        """The embedding."""
        self.embedding = Embedding(
            config.vocab_size,
            config.hidden_size,
            scale=config.embedding_scale,
            positions=config.num_positions,
            position_offset=config.position_offset,
            group=groups.tensor,
        )

    def make_block(self, config: ModelConfig, layer: int, groups: ParallelGroups) -> nn.Module:
        """One layer, by its number."""
        return self.block(config, layer, groups)

    def make_final_norm(self, config: ModelConfig, groups: ParallelGroups) -> LayerNorm | RMSNorm:
        """The norm before the head."""
        return make_norm(config, groups)

    def build_end(self, config: ModelConfig, groups: ParallelGroups) -> None:
        """The last norm and the head."""
        self.final_norm = self.make_final_norm(config, groups)
        self.head = Head(
            config.vocab_size,
            config.hidden_size,
            tied=self.tied_embedding(config),
            bias=config.head_bias,
            scale=config.logit_scale,
            softcap=config.logit_softcap,
            group=groups.tensor,
        )

    def start(self, input_ids_t: Tensor, positions_t: Tensor) -> Tensor | PartialSum:
        """The embeddings."""
        return self.embedding(input_ids_t, positions_t)

    def end(self, x_th: Tensor | PartialSum) -> Tensor:
        """Hidden states after the last norm."""
        return self.final_norm(x_th)[0]


def make_norm(config: ModelConfig, groups: ParallelGroups) -> LayerNorm:
    """A layer norm of the model's width."""
    return LayerNorm(config.hidden_size, eps=config.norm_eps, bias=config.norm_bias, group=groups.tensor)


class Block(nn.Module):
    """What blocks of every build have: attention behind a norm, and an MLP."""

    mlp_kind: ClassVar[type[MLP] | type[GatedMLP]] = MLP

    def __init__(self, config: ModelConfig, layer: int, groups: ParallelGroups) -> None:
        super().__init__()
        hidden, inner = config.hidden_size, config.intermediate_size
        self.last = layer == config.num_layers - 1
        self.input_norm = make_norm(config, groups)
        self.attention = Attention(hidden, config.attention_of(layer), norm_eps=config.norm_eps, group=groups.tensor)
        self.mlp = self.mlp_kind(hidden, inner, activation=config.activation, bias=config.mlp_bias, group=groups.tensor)


class SequentialBlock(Block):
    """First attention, then the MLP, each behind a norm and added to a residual."""

    def __init__(self, config: ModelConfig, layer: int, groups: ParallelGroups) -> None:
        super().__init__(config, layer, groups)
        self.post_norm = make_norm(config, groups)

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

    def __init__(self, config: ModelConfig, layer: int, groups: ParallelGroups) -> None:
        super().__init__(config, layer, groups)
        self.post_norm = make_norm(config, groups)

    def forward(self, x_th: Tensor | PartialSum, positions_t: Tensor, meta: AttentionMeta) -> Tensor | PartialSum:
        """Hidden states after this layer, or a sum for the next norm to add up."""
        normed_th, residual_th = self.input_norm(x_th)
        attended_th = self.attention(normed_th, positions_t, meta, residual_th, last=self.last)
        normed_th, _ = self.post_norm(meta.output_rows(residual_th, last=self.last))
        return self.mlp(normed_th, attended_th)
