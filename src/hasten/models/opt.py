"""OPT: learned positions from row 2 of their table, ReLU; 350m has norms behind each part and narrow embeddings.

Shapes: t tokens of the flat batch, h hidden.
Source: Zhang et al., "OPT: Open Pre-trained Transformer Language Models", 2022.
"""

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any, ClassVar

import torch.nn as nn
from torch import Tensor

from hasten.core.errors import UnsupportedError
from hasten.core.model_config import AttentionConfig, ModelConfig
from hasten.layers.embedding import Embedding, Head
from hasten.layers.linear import ReplicatedLinear
from hasten.layers.norm import LayerNorm
from hasten.models import hf_config
from hasten.models.base import CausalLM
from hasten.models.decoder import SequentialBlock, make_norm
from hasten.models.decoder_weights import decoder_weights, plain_layer, separate_qkv
from hasten.models.weight_map import Axis, WeightMap, WeightSpec, linear, norm, positions
from hasten.ops.meta import AttentionMeta
from hasten.ops.partial_sum import PartialSum
from hasten.parallel.groups import ParallelGroups
from hasten.parallel.shard import Split

_SUPPORTED = {"layer_norm_elementwise_affine": True, "learned_embeddings": True, "scale_embeddings": False}
"""Keys of which no published checkpoint has the other value."""


class OPTPostNormBlock(SequentialBlock):
    """One layer of 350m: attention and MLP, each added to a residual and then normed.

    The norms have the names of those before attention and MLP in other sizes.
    """

    def forward(self, x_th: Tensor | PartialSum, positions_t: Tensor, meta: AttentionMeta) -> Tensor:
        """Hidden states after this layer."""
        residual_th = _added_up(x_th, self.input_norm)
        x_th = self.attention(residual_th, positions_t, meta, residual_th, last=self.last)
        residual_th, _ = self.input_norm(x_th)
        return self.post_norm(self.mlp(residual_th, residual_th))[0]


def _added_up(x_th: Tensor | PartialSum, norm: LayerNorm) -> Tensor:
    """A sum as a tensor of the model's type: norms are what adds sums up, and any of them returns the sum as well."""
    return x_th if isinstance(x_th, Tensor) else norm(x_th)[1]


class OPTForCausalLM(CausalLM):
    """OPT with its language model head."""

    def build_start(self, config: ModelConfig, groups: ParallelGroups) -> None:
        """The embedding, projected to the hidden size where it is narrower."""
        self.embedding = Embedding(
            config.vocab_size,
            config.embedding_size or config.hidden_size,
            hidden_size=config.hidden_size,
            positions=config.num_positions,
            position_offset=config.position_offset,
            group=groups.tensor,
        )

    def make_block(self, config: ModelConfig, layer: int, groups: ParallelGroups) -> nn.Module:
        """One layer, by its number."""
        block = SequentialBlock if config.norm_first else OPTPostNormBlock
        return block(config, layer, groups)

    def build_end(self, config: ModelConfig, groups: ParallelGroups) -> None:
        """The last norm, if there is one, and the head, behind a projection where the embeddings are narrower."""
        hidden, width = config.hidden_size, config.embedding_size or config.hidden_size
        self.final_norm = make_norm(config, groups) if config.final_norm else None
        self.project_out = None
        if width != hidden:
            self.project_out = ReplicatedLinear(hidden, width, bias=False, group=groups.tensor)
        self.head = Head(config.vocab_size, width, tied=self.tied_embedding(config), group=groups.tensor)

    def start(self, input_ids_t: Tensor, positions_t: Tensor) -> Tensor | PartialSum:
        """The embeddings."""
        return self.embedding(input_ids_t, positions_t)

    def end(self, x_th: Tensor | PartialSum) -> Tensor:
        """Hidden states after the last norm, as wide as the embeddings."""
        if self.final_norm is None:
            last = list(self.layers.values())[-1]
            assert isinstance(last, SequentialBlock)
            out_th = _added_up(x_th, last.post_norm)
        else:
            out_th, _ = self.final_norm(x_th)
        return out_th if self.project_out is None else self.project_out(out_th)

    hf_harmless: ClassVar[frozenset[str]] = frozenset(
        {"activation_dropout", "attention_dropout", "dropout", "init_std", "layerdrop"}
    )

    @staticmethod
    def config_from_hf(raw: Mapping[str, Any]) -> ModelConfig:
        """Read Hugging Face's config.json."""
        hidden, heads = hf_config.width_and_heads(raw, ("hidden_size",), ("num_attention_heads",))
        for name, supported in _SUPPORTED.items():
            if hf_config.flag(raw, name, supported) is not supported:
                raise UnsupportedError(f"{name} {raw[name]} is not supported; supported is {supported}")
        bias = hf_config.flag(raw, "enable_bias", True)
        norm_first = hf_config.flag(raw, "do_layer_norm_before", True)
        # checkpoints that were tuned with an early version of transformers have none
        removed = hf_config.flag(raw, "_remove_final_layer_norm", False)
        width = hf_config.count(raw, "word_embed_proj_dim", default=hidden)
        return ModelConfig(
            architecture="OPTForCausalLM",
            num_layers=hf_config.count(raw, "num_hidden_layers"),
            hidden_size=hidden,
            intermediate_size=hf_config.count(raw, "ffn_dim"),
            vocab_size=hf_config.count(raw, "vocab_size", default=50272),
            embedding_size=None if width == hidden else width,
            attention=AttentionConfig(
                num_heads=heads,
                num_kv_heads=heads,
                head_size=hidden // heads,
                position="learned",
                qkv_bias=bias,
                dense_bias=bias,
            ),
            norm_first=norm_first,
            final_norm=norm_first and not removed,
            activation=hf_config.activation(raw, "activation_function", "relu"),
            mlp_bias=bias,
            max_position_embeddings=hf_config.count(raw, "max_position_embeddings", default=2048),
            position_offset=2,
            **hf_config.usual(raw, tied=True, bos=2, eos=2, pad=1),
        )

    @staticmethod
    def weight_map(config: ModelConfig) -> WeightMap:
        """Names, layouts and splits of all weights."""
        width, whole = config.embedding_size, config.final_norm
        return decoder_weights(
            config,
            partial(_of_layer, config),
            prefix="model.",
            embedding="decoder.embed_tokens",
            first=(
                positions("embedding.positions", "decoder.embed_positions.weight"),
                *(_projection("embedding.projection", "decoder.project_in", "hidden", "embedding") if width else ()),
            ),
            last=(
                *(norm("final_norm", "decoder.final_layer_norm", bias=True) if whole else ()),
                *(_projection("project_out", "decoder.project_out", "embedding", "hidden") if width else ()),
            ),
            ignored=("decoder.version",),
        )


def _of_layer(config: ModelConfig, layer: int) -> Iterator[WeightSpec]:
    return plain_layer(
        layer,
        f"decoder.layers.{layer}",
        norms={"input_norm": "self_attn_layer_norm", "post_norm": "final_layer_norm"},
        qkv=separate_qkv("self_attn"),
        dense="self_attn.out_proj",
        up="fc1",
        down="fc2",
        qkv_bias=config.attention.qkv_bias,
        dense_bias=config.attention.dense_bias,
        mlp_bias=config.mlp_bias,
    )


def _projection(name: str, hf: str, out: Axis, into: Axis) -> tuple[WeightSpec, ...]:
    return linear(name, {hf: out}, out, into, Split.REPLICATE, bias=False)
