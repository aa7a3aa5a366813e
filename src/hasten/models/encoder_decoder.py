"""What encoder-decoders share: the encoder runs once for a request, and leaves what each decoder layer reads of it.

Shapes: t tokens of the flat batch, h hidden.
"""

from abc import abstractmethod
from typing import cast

import torch.nn as nn
from torch import Tensor

from hasten.layers.attention import Attention, CrossAttention
from hasten.models.base import CausalLM
from hasten.ops.meta import AttentionMeta


class EncoderBlock(nn.Module):
    """One layer of an encoder."""

    attention: Attention


class DecoderBlock(nn.Module):
    """One layer of a decoder."""

    attention: Attention
    cross_attention: CrossAttention


class EncoderDecoder(CausalLM):
    """An encoder, and a decoder whose layers attend to what the encoder made of the prompt."""

    encoder_layers: nn.ModuleList

    @abstractmethod
    def encoded(self, input_ids_t: Tensor, positions_t: Tensor, meta: AttentionMeta) -> Tensor:
        """What decoder layers attend to, [t, h], of token ids [t] and their positions [t]."""

    def encode(self, input_ids_t: Tensor, positions_t: Tensor, meta: AttentionMeta) -> None:
        """Compute inputs whole, and leave keys and values for every decoder layer at their slots of the cache."""
        encoded_th = self.encoded(input_ids_t, positions_t, meta)
        for layer in self.layers.values():
            cast(DecoderBlock, layer).cross_attention.store(encoded_th, meta.slot_mapping)

    def attentions_by_cache(self) -> list[list[Attention | CrossAttention]]:
        """Both attentions of a decoder layer have one cache, in which they have blocks of their own.

        No later step reads keys and values of the encoder's layers: these take turns in the blocks of their input in
        the first cache, until its cross-attention stores its own there.
        """
        encoder = [cast(EncoderBlock, layer).attention for layer in self.encoder_layers]
        decoder = [cast(DecoderBlock, layer) for layer in self.layers.values()]
        by_cache: list[list[Attention | CrossAttention]] = [[each.attention, each.cross_attention] for each in decoder]
        by_cache[0] += encoder
        return by_cache
