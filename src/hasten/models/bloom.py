"""BLOOM: layer norms before each part, ALiBi instead of positions, GELU by tanh, fused QKV.

Shapes: t tokens of the flat batch, h hidden, r rows that need logits, v vocabulary.
Source: BigScience Workshop, "BLOOM: A 176B-Parameter Open-Access Multilingual Language Model", 2022.
"""

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import torch.nn as nn
from torch import Tensor

from hasten.core.errors import UnsupportedError
from hasten.core.model_config import AttentionConfig, ModelConfig
from hasten.layers.attention import Attention
from hasten.layers.mlp import MLP
from hasten.layers.norm import LayerNorm
from hasten.models import hf_config
from hasten.models.decoder import Decoder, make_norm
from hasten.models.decoder_weights import BOTH_NORMS, decoder_weights, plain_layer
from hasten.models.weight_map import HEAD_MAJOR, WeightMap, WeightSpec, norm
from hasten.ops.meta import AttentionMeta
from hasten.ops.partial_sum import PartialSum
from hasten.parallel.groups import ParallelGroups


class BloomBlock(nn.Module):
    """One layer: attention and MLP, each behind a norm and added to a residual."""

    def __init__(self, config: ModelConfig, layer: int, groups: ParallelGroups) -> None:
        super().__init__()
        self.last = layer == config.num_layers - 1
        self.input_norm = LayerNorm(config.hidden_size, eps=config.norm_eps, group=groups.tensor)
        self.attention = Attention(config.hidden_size, config.attention, group=groups.tensor)
        self.post_norm = LayerNorm(config.hidden_size, eps=config.norm_eps, group=groups.tensor)
        self.mlp = MLP(config.hidden_size, config.intermediate_size, activation=config.activation, group=groups.tensor)
        self.residual_after_norm = config.residual_after_norm

    def forward(self, x_th: Tensor | PartialSum, positions_t: Tensor, meta: AttentionMeta) -> Tensor | PartialSum:
        """Hidden states after this layer, or a sum for the next norm to add up."""
        if self.residual_after_norm:
            normed_th, _ = self.input_norm(x_th)
            normed_th, _ = self.post_norm(self.attention(normed_th, positions_t, meta, normed_th, last=self.last))
            return self.mlp(normed_th, normed_th)
        normed_th, residual_th = self.input_norm(x_th, self.attention.qkv.packed)
        x_th = self.attention(normed_th, positions_t, meta, residual_th, last=self.last)
        normed_th, residual_th = self.post_norm(x_th, self.mlp.up.packed)
        return self.mlp(normed_th, residual_th)


class BloomForCausalLM(Decoder):
    """BLOOM with its language model head, tied to the embedding or not."""

    block: ClassVar[type[nn.Module]] = BloomBlock

    def build_start(self, config: ModelConfig, groups: ParallelGroups) -> None:
        """The embedding and its norm."""
        super().build_start(config, groups)
        self.embedding_norm = make_norm(config, groups)

    def start(self, input_ids_t: Tensor, positions_t: Tensor) -> Tensor:
        """The embeddings after their norm."""
        return self.embedding.normed(input_ids_t, positions_t, self.embedding_norm)

    hf_harmless: ClassVar[frozenset[str]] = frozenset(
        """
        attention_dropout attention_softmax_in_fp32 bias_dropout_fusion hidden_dropout initializer_range
        masked_softmax_fusion n_inner offset_alibi skip_bias_add skip_bias_add_qkv
        """.split()
    )

    @staticmethod
    def config_from_hf(raw: Mapping[str, Any]) -> ModelConfig:
        """Read Hugging Face's config.json, old key names (`n_embed`, `num_attention_heads`) included."""
        return _config_from_hf(raw)

    @staticmethod
    def weight_map(config: ModelConfig) -> WeightMap:
        """Names, layouts and splits of all weights."""
        return decoder_weights(
            config,
            _of_layer,
            prefix="transformer.",
            embedding="word_embeddings",
            first=norm("embedding_norm", "word_embeddings_layernorm", bias=True),
            last=norm("final_norm", "ln_f", bias=True),
        )


_VOCAB_SIZE = 250880
"""What transformers takes where config.json is silent: every published BLOOM has this vocabulary."""


def _config_from_hf(raw: Mapping[str, Any]) -> ModelConfig:
    hidden, heads = hf_config.width_and_heads(raw, ("n_embed", "hidden_size"), ("num_attention_heads", "n_head"))
    # transformers leaves the biases of two linears per layer out in this mode, which no BLOOM was trained in
    slices = hf_config.count(raw, "pretraining_tp", default=1)
    if hf_config.flag(raw, "slow_but_exact", False) and slices > 1:
        raise UnsupportedError(
            f"slow_but_exact with pretraining_tp {slices} is not supported; set slow_but_exact to false, "
            "which computes the model as it was trained"
        )
    return ModelConfig(
        architecture="BloomForCausalLM",
        num_layers=hf_config.count(raw, "num_hidden_layers", "n_layer"),
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        vocab_size=hf_config.count(raw, "vocab_size", default=_VOCAB_SIZE),
        attention=AttentionConfig(num_heads=heads, num_kv_heads=heads, head_size=hidden // heads),
        norm_eps=hf_config.fraction(raw, "layer_norm_epsilon", 1e-5),
        residual_after_norm=hf_config.flag(raw, "apply_residual_connection_post_layernorm", False),
        max_position_embeddings=None if raw.get("seq_length") is None else hf_config.count(raw, "seq_length"),
        **hf_config.usual(raw, tied=True, bos=1, eos=2),
    )


def _of_layer(layer: int) -> Iterator[WeightSpec]:
    return plain_layer(
        layer,
        f"h.{layer}",
        norms=BOTH_NORMS,
        qkv={"self_attention.query_key_value": "qkv"},
        dense="self_attention.dense",
        up="mlp.dense_h_to_4h",
        down="mlp.dense_4h_to_h",
        qkv_layout=HEAD_MAJOR,
    )
