"""MPT: GPT-2's block with ALiBi, without a bias anywhere; queries, keys and values may be clipped.

Source: MosaicML, "Introducing MPT-7B: A New Standard for Open-Source, Commercially Usable LLMs", 2023.
"""

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

from hasten.core.errors import ConfigError, UnsupportedError
from hasten.core.model_config import AttentionConfig, ModelConfig
from hasten.models import hf_config
from hasten.models.decoder_weights import decoder_weights, plain_layer
from hasten.models.gpt2 import GPT2LMHeadModel
from hasten.models.weight_map import WeightMap, WeightSpec, norm

_SUPPORTED: Mapping[str, tuple[Any, ...]] = {
    "expansion_ratio": (4,),
    "logit_scale": (None,),
    "no_bias": (True,),
    "norm_type": ("low_precision_layernorm", "layernorm"),
}
"""Values of keys that change a model, beyond which transformers computes another model than the key says."""
_SUPPORTED_ATTENTION: Mapping[str, tuple[Any, ...]] = {
    "alibi": (True,),
    "attn_type": ("multihead_attention",),
    "attn_uses_sequence_id": (False,),
    "kv_n_heads": (None,),
    "prefix_lm": (False,),
    "qk_gn": (False,),
    "qk_ln": (False,),
    "rope": (False,),
    "sliding_window_size": (-1, None),
}
"""The same of keys within `attn_config`."""
_HARMLESS_IN_ATTENTION = frozenset(
    {"attn_impl", "attn_pdrop", "rope_dail_config", "rope_hf_config", "rope_impl", "rope_theta"}
)


class MptForCausalLM(GPT2LMHeadModel):
    """MPT with its language model head."""

    # `auto_map` names code of the hub that computes what transformers' own does
    hf_harmless: ClassVar[frozenset[str]] = frozenset(
        """
        auto_map emb_pdrop embedding_fraction init_config init_device initializer_range learned_pos_emb resid_pdrop
        tokenizer_name verbose
        """.split()
    )

    @staticmethod
    def config_from_hf(raw: Mapping[str, Any]) -> ModelConfig:
        """Read Hugging Face's config.json; a sequence may be longer than `max_seq_len`, as ALiBi allows."""
        hidden, heads = hf_config.width_and_heads(raw, ("d_model",), ("n_heads",))
        _refuse(raw, _SUPPORTED, "")
        return ModelConfig(
            architecture="MptForCausalLM",
            num_layers=hf_config.count(raw, "n_layers"),
            hidden_size=hidden,
            intermediate_size=4 * hidden,
            vocab_size=hf_config.count(raw, "vocab_size", default=50368),
            attention=_attention(raw, heads, hidden // heads),
            norm_eps=hf_config.fraction(raw, "layer_norm_epsilon", 1e-5),
            norm_bias=False,
            activation="gelu",
            mlp_bias=False,
            max_position_embeddings=hf_config.count(raw, "max_seq_len", default=2048),
            **hf_config.usual(raw, tied=True, bos=None, eos=None),
        )

    @staticmethod
    def weight_map(config: ModelConfig) -> WeightMap:
        """Names, layouts and splits of all weights."""
        return decoder_weights(
            config,
            _of_layer,
            prefix="transformer.",
            embedding="wte",
            last=norm("final_norm", "norm_f", bias=False),
        )


def _refuse(raw: Mapping[str, Any], supported: Mapping[str, tuple[Any, ...]], where: str) -> None:
    for name, values in supported.items():
        if name in raw and raw[name] not in values:
            raise UnsupportedError(f"{where}{name} {raw[name]!r} is not supported; supported is {values[0]!r}")


def _attention(raw: Mapping[str, Any], heads: int, head_size: int) -> AttentionConfig:
    given = {} if raw.get("attn_config") is None else raw["attn_config"]
    if not isinstance(given, Mapping):
        raise ConfigError(f"attn_config has a value of the wrong kind: {given!r} is not an object")
    own = hf_config.Fields(given)
    try:
        _refuse(own, _SUPPORTED_ATTENTION, "")
        attention = AttentionConfig(
            num_heads=heads,
            num_kv_heads=heads,
            head_size=head_size,
            alibi_bias_max=hf_config.number(own, "alibi_bias_max", 8.0),
            scale=None if own.get("softmax_scale") is None else hf_config.number(own, "softmax_scale", 1.0),
            # null and 0 stand for none
            qkv_clip=hf_config.number(own, "clip_qkv", 1.0) if own.get("clip_qkv") else None,
            qkv_bias=False,
            dense_bias=False,
        )
    except (ConfigError, UnsupportedError) as error:
        raise type(error)(f"attn_config: {error}") from error
    # what a version of the model does not know is off in it
    if unknown := [name for name in own.unknown(_HARMLESS_IN_ATTENTION) if own[name]]:
        raise UnsupportedError(f"attn_config: {unknown[0]} is not supported")
    return attention


def _of_layer(layer: int) -> Iterator[WeightSpec]:
    return plain_layer(
        layer,
        f"blocks.{layer}",
        norms={"input_norm": "norm_1", "post_norm": "norm_2"},
        qkv={"attn.Wqkv": "qkv"},
        dense="attn.out_proj",
        up="ffn.up_proj",
        down="ffn.down_proj",
        qkv_bias=False,
        dense_bias=False,
        mlp_bias=False,
        norm_bias=False,
    )
