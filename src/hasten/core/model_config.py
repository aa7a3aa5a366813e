"""What a transformer looks like: the configuration of its layers, whatever format it came in."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from hasten.core.dtypes import DTypeName
from hasten.core.option_fields import require

_MOST_LAYERS = 10_000
"""More layers than any model has: a nonsensical number would otherwise fill the memory with names of weights."""
_MOST_WIDTH = 1 << 31
"""Beyond the width of any model: larger sizes do not fit into torch's shapes."""
Activation = Literal["silu", "gelu", "gelu_tanh", "quick_gelu", "relu", "relu2"]
"""Activations of an MLP, or of the gate of a gated unit; `gelu` is the exact one, by the error function."""
RopeKind = Literal["default", "linear", "dynamic", "llama3", "yarn", "longrope"]


@dataclass(frozen=True)
class GatedUnit:
    """`gate(a) * (b + offset)` of two halves a and b, both limited first."""

    gate: Activation
    limit: float | None = None
    """Upper bound of a, and of the absolute value of b."""
    offset: float = 0.0


QKNorm = Literal["rms", "rms_of_all_heads", "layer", "layer_by_head"]
"""Norms of queries and keys before their rotation, by what they are over and whose their weights are.

`rms`: of each head, with one weight for all; `rms_of_all_heads`: of all heads together; `layer`: a layer norm of each
head, with one weight and bias for all; `layer_by_head`: one of each head, with a weight of its own and no bias.
"""


Task = Literal["generate", "embed", "classify", "token_classify"]
"""What models give: text, a vector of each text, or a score of each label for each text or for each token."""
LabelActivation = Literal["softmax", "sigmoid", "none"]
Pooling = Literal["cls", "max", "mean", "mean_sqrt_len", "weightedmean", "last"]
"""How hidden states become a vector: that of the first or last token, or a maximum or mean over all of them.

`mean_sqrt_len` is the sum divided by the root of the number of tokens; `weightedmean` weighs the i-th token by i.
"""


@dataclass(frozen=True, kw_only=True)
class ClassifierConfig:
    """From hidden states to scores of labels: a linear layer, and perhaps a dense layer and a norm before it."""

    labels: tuple[str, ...]
    activation: LabelActivation
    """What makes scores of logits."""
    pooling: Pooling = "cls"
    """Whose hidden state it reads; that of every token where tokens are classified."""
    dense: Literal["tanh", "gelu", "relu"] | None = None
    """Activation of the dense layer; None: there is none."""
    dense_bias: bool = True
    norm: bool = False
    """Whether there is a norm behind the dense layer."""
    bias: bool = True

    def __post_init__(self) -> None:
        require(bool(self.labels), "a classifier has at least one label")


@dataclass(frozen=True, kw_only=True)
class MaskedWordsConfig:
    """From the hidden states of masks to logits of words: a dense layer, a norm, and the embedding or a head."""

    activation: Activation
    """That of the dense layer."""
    dense_bias: bool = True
    bias: bool = True
    """Whether the logits have one."""


@dataclass(frozen=True, kw_only=True)
class TextConfig:
    """How the texts of a model that makes vectors or scores of them become tokens."""

    max_length: int | None = None
    """Most tokens of a text."""
    lowercase: bool = False
    """Whether texts are tokenized in lower case."""
    prompts: Mapping[str, str] = field(default_factory=dict)
    """What stands before texts, by the name of its purpose."""
    default_prompt: str | None = None
    """Name of the prompt that stands before texts for which none is named."""
    include_prompt: bool = True
    """Whether a vector is made of the prompt too."""


@dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """Rotary position embedding: which dimensions of a head turn, and how fast."""

    width: int
    """Dimensions of each head that turn, the first ones; even."""
    interleaved: bool = False
    """Whether dimensions 2i and 2i + 1 turn together, and not i and i + width / 2."""
    theta: float = 10_000.0
    kind: RopeKind = "default"
    """How the frequencies are changed for sequences longer than the model was first trained for."""
    factor: float = 1.0
    original_max_position: int | None = None
    """Longest sequence of the first training; every kind but `default` and `linear` needs it."""
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    """Both of `llama3`."""
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    """All three of `yarn`."""
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()
    """Both of `longrope`: what each pair is slowed down by, up to the original length and beyond."""
    attention_factor: float = 1.0
    """What cosines and sines are multiplied by."""

    def __post_init__(self) -> None:
        require(self.width > 0 and self.width % 2 == 0, f"{self.width} dimensions of a head cannot turn in pairs")
        for name in ("theta", "factor", "high_freq_factor", "beta_fast", "beta_slow", "attention_factor"):
            require(getattr(self, name) > 0, f"{name} of the rope must be positive, got {getattr(self, name)}")
        needs = self.kind not in ("default", "linear")
        require(not needs or self.original_max_position is not None, f"rope {self.kind} needs its original length")
        for name in ("short_factor", "long_factor") if self.kind == "longrope" else ():
            count = len(getattr(self, name))
            require(count == self.width // 2, f"{name} has {count} numbers for {self.width // 2} pairs of dimensions")


@dataclass(frozen=True, kw_only=True)
class AttentionConfig:
    """Heads and positions of one attention layer, before any split over ranks."""

    num_heads: int
    num_kv_heads: int
    head_size: int
    position: Literal["alibi", "rope", "learned", "none"] = "alibi"
    """What attention does about positions; `learned` ones are added to the embeddings, and it does nothing."""
    relative_buckets: int = 0
    """Learned biases of each head, for how far a key is from the query: distances share them, more of them the longer
    they are. 0: scores have no such bias."""
    relative_farthest: int = 128
    """Distance from which on all have the same bias."""
    causal: bool = True
    """Whether a token sees only those before it, and itself."""
    rope: RopeConfig | None = None
    """Given where `position` is `rope`."""
    alibi_bias_max: float = 8.0
    """ALiBi's slopes go from 2^-(this / heads) to 2^-this, for a number of heads that is a power of two."""
    scale: float | None = None
    """What scores are multiplied by; None: 1 / sqrt(head size)."""
    window: int | None = None
    """Tokens that a token sees, itself included; None: all before it. Where attention is not causal, it sees as many
    behind it."""
    softcap: float | None = None
    """Scores become c * tanh(score / c)."""
    alibi_scaled: bool = False
    """Whether ALiBi's biases are scaled as scores are."""
    qk_norm: QKNorm | None = None
    qkv_bias: bool = True
    qkv_clip: float | None = None
    """Queries, keys and values are limited to between minus this and this, before their norms and rotations."""
    dense_bias: bool = True
    sinks: bool = False
    """Whether each query head has a learned logit that takes part in its softmax and has no value."""

    def __post_init__(self) -> None:
        for name in ("num_heads", "num_kv_heads", "head_size"):
            require(getattr(self, name) > 0, f"{name} must be positive, got {getattr(self, name)}")
        require(
            self.num_heads * self.head_size < _MOST_WIDTH,
            f"{self.num_heads} heads of size {self.head_size} cannot be right",
        )
        for name in ("scale", "window", "softcap", "alibi_bias_max", "qkv_clip"):
            value = getattr(self, name)
            require(value is None or value > 0, f"{name} of attention must be positive, got {value}")
        require((self.position == "rope") == (self.rope is not None), "attention has a rope where position is rope")
        require(
            self.relative_buckets >= 0 and self.relative_buckets % 4 == 0,
            f"biases by distance have a number of buckets that 4 divides, got {self.relative_buckets}",
        )
        exact = self.relative_buckets // (2 if self.causal else 4)
        require(
            self.relative_buckets == 0 or self.relative_farthest > exact,
            f"biases by distance have {exact} buckets of one distance, and end at {self.relative_farthest} already",
        )
        require(
            self.rope is None or self.rope.width <= self.head_size,
            f"{self.rope and self.rope.width} dimensions cannot turn in a head of {self.head_size}",
        )
        require(
            self.num_heads % self.num_kv_heads == 0,
            f"num_heads {self.num_heads} is not a multiple of num_kv_heads {self.num_kv_heads}",
        )


@dataclass(frozen=True, kw_only=True)
class ExpertsConfig:
    """A mixture of experts in place of a layer's MLP, before any split over ranks."""

    num_experts: int
    top_k: int
    """Experts that compute each token."""
    inner_size: int
    """Of each expert, which is a gated unit."""
    normalized: bool
    """Whether the weights of a token's experts add up to 1; else each keeps its share of all experts' softmax."""
    bias: bool = False
    """Whether the router and both linear layers of each expert have biases."""
    limit: float | None = None
    offset: float = 0.0
    """Both of the experts' gated units, see `GatedUnit`."""
    shared_size: int | None = None
    """Inner size of an expert that computes every token, scaled by a gate of its own."""
    dense_layers: tuple[int, ...] = ()
    """Layers with a plain MLP instead, of the model's `intermediate_size`."""

    def __post_init__(self) -> None:
        for name in ("num_experts", "top_k", "inner_size"):
            require(getattr(self, name) > 0, f"{name} of experts must be positive, got {getattr(self, name)}")
        require(self.shared_size is None or self.shared_size > 0, f"a shared expert of size {self.shared_size}")
        require(self.limit is None or self.limit > 0, f"limit of experts must be positive, got {self.limit}")
        require(
            self.top_k <= self.num_experts, f"{self.top_k} experts compute each token, but there are {self.num_experts}"
        )


@dataclass(frozen=True, kw_only=True)
class EncoderConfig:
    """The encoder of an encoder-decoder, where it differs from the decoder."""

    num_layers: int
    intermediate_size: int
    attention: AttentionConfig

    def __post_init__(self) -> None:
        for name in ("num_layers", "intermediate_size"):
            require(getattr(self, name) > 0, f"{name} of the encoder must be positive, got {getattr(self, name)}")
        require(self.num_layers < _MOST_LAYERS, f"num_layers {self.num_layers} of the encoder cannot be right")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """What a transformer looks like, whatever format its weights came in."""

    architecture: str
    """Hugging Face's class name, for example `BloomForCausalLM`."""
    num_layers: int
    hidden_size: int
    intermediate_size: int
    vocab_size: int
    attention: AttentionConfig
    """That of every layer, unless `layer_attention` says more; its heads are those of all layers."""
    layer_attention: tuple[AttentionConfig, ...] = ()
    """Where layers differ: that of each."""
    embedding_size: int | None = None
    """Width of the embeddings, and of what the head reads, where it is not the hidden size."""
    experts: ExpertsConfig | None = None
    """Where layers have a mixture of experts."""
    norm_eps: float = 1e-5
    norm_first: bool = True
    """Whether the norms of a layer stand before attention and MLP, or behind the sums that these are added to."""
    final_norm: bool = True
    """Whether there is a norm behind the last layer."""
    activation: Activation = "gelu_tanh"
    gated_mlp: bool = False
    """Whether the MLP is a gated unit, where a family has both."""
    mlp_bias: bool = True
    norm_bias: bool = True
    """Whether layer norms have a bias."""
    norm_offset: bool = False
    """Whether the weights of norms are stored less one."""
    embedding_scale: float | None = None
    """What embeddings are multiplied by."""
    logit_softcap: float | None = None
    """Logits become c * tanh(logit / c)."""
    logit_scale: float | None = None
    """What logits are multiplied by, before they are capped."""
    head_bias: bool = False
    """Whether the language model head has a bias."""
    parallel_residual: bool = False
    """Whether attention and MLP of a layer stand side by side: both read the hidden states before the layer."""
    mlp_norm: bool = True
    """Whether a parallel MLP has a norm of its own."""
    residual_after_norm: bool = False
    """BLOOM's `apply_residual_connection_post_layernorm`: the residual is the norm's output, not its input."""
    tie_word_embeddings: bool = True
    dtype: DTypeName = "fp32"
    """Type of the weights in the checkpoint."""
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    pad_token_id: int | None = None
    max_position_embeddings: int | None = None
    """Longest sequence that the model was trained for, where its configuration says so."""
    position_offset: int = 0
    """Rows of a table of learned positions before that of a sequence's first token."""
    token_types: int = 0
    """Types of tokens, such as those of the first and second text of a pair, whose embeddings are added; 0: none."""
    skips_padding: bool = False
    """Whether a padding token within a text takes no learned position: it has the row before the first one's."""
    task: Task = "generate"
    """What the model is for."""
    classifier: ClassifierConfig | None = None
    """What makes scores of labels of its hidden states."""
    masked_words: MaskedWordsConfig | None = None
    """What makes logits of words of the hidden states of masks, in an encoder that kept the head of its training."""
    encoder: EncoderConfig | None = None
    """That of an encoder-decoder, whose decoder everything else here describes; None: prompts are the decoder's own."""
    decoder_start_token_id: int | None = None
    """What an encoder-decoder's output begins behind."""
    forced_bos_token_id: int | None = None
    """What its outputs begin with, whatever the probabilities, such as the language of a translation."""
    forced_eos_token_ids: tuple[int, ...] = ()
    """The most probable of these is what its outputs of the maximum length end with."""

    def __post_init__(self) -> None:
        for name in ("num_layers", "hidden_size", "intermediate_size", "vocab_size"):
            require(getattr(self, name) > 0, f"{name} must be positive, got {getattr(self, name)}")
        require(self.num_layers < _MOST_LAYERS, f"num_layers {self.num_layers} cannot be right")
        require(
            len(self.layer_attention) in (0, self.num_layers),
            f"attention of {len(self.layer_attention)} layers is given, but there are {self.num_layers}",
        )
        for attention in self.layer_attention:
            require(_heads(attention) == _heads(self.attention), "layers with different heads are not supported")
        require(
            not self._has_learned_positions or self.max_position_embeddings is not None,
            "learned positions have a longest sequence",
        )
        require(
            (self.encoder is None) == (self.decoder_start_token_id is None),
            "an encoder-decoder has a decoder_start_token_id, and only it",
        )
        start = self.decoder_start_token_id
        require(
            start is None or 0 <= start < self.vocab_size,
            f"decoder_start_token_id {start} is not in the vocabulary of {self.vocab_size} tokens",
        )
        require(
            self.encoder is None or _width(self.encoder.attention) == _width(self.attention),
            "heads of encoder and decoder that differ in their width together are not supported",
        )
        classifies = self.task in ("classify", "token_classify")
        require(classifies == (self.classifier is not None), f"a model to {self.task} has a classifier, or has none")

    def attention_of(self, layer: int) -> AttentionConfig:
        """The attention of one layer."""
        return self.layer_attention[layer] if self.layer_attention else self.attention

    @property
    def num_positions(self) -> int:
        """Rows of the table of learned positions; 0 where the model has none."""
        return self.position_offset + (self.max_position_embeddings or 0) if self._has_learned_positions else 0

    @property
    def learned_positions(self) -> int | None:
        """The longest sequence of a model that has learned its positions; None where they are computed."""
        return self.max_position_embeddings if self._has_learned_positions else None

    @property
    def _has_learned_positions(self) -> bool:
        return self.attention.position == "learned"

    @property
    def widest_window(self) -> int | None:
        """The widest window of all layers, in tokens; None where a layer has none."""
        windows = [self.attention_of(layer).window for layer in range(self.num_layers)]
        return None if None in windows else max(window for window in windows if window is not None)

    @property
    def has_mlp(self) -> bool:
        """Whether any layer has a plain MLP."""
        return self.experts is None or bool(self.experts.dense_layers)


def _width(attention: AttentionConfig) -> int:
    return attention.num_kv_heads * attention.head_size


def _heads(attention: AttentionConfig) -> tuple[int, int, int]:
    return attention.num_heads, attention.num_kv_heads, attention.head_size
