"""Frozen configuration, composed and validated once.

`EngineConfig` and its parts also define the command line: every field with `metadata["help"]` is an option.
"""

import dataclasses
import difflib
import math
import os
import re
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypedDict

from hasten.core.errors import ConfigError

DTypeName = Literal["fp32", "fp16", "bf16"]
"""Names of the data types, as FasterTransformer writes them in config.ini."""

DTYPES: tuple[DTypeName, ...] = ("fp32", "fp16", "bf16")
_DTYPE_ALIASES: dict[str, DTypeName] = {
    "fp32": "fp32",
    "float32": "fp32",
    "float": "fp32",
    "fp16": "fp16",
    "float16": "fp16",
    "half": "fp16",
    "bf16": "bf16",
    "bfloat16": "bf16",
}


Quantization = Literal["int8", "w8a8", "fp8", "int4"]
"""Schemes of quantization that weights may be loaded with."""
TOOL_CALL_PARSERS = ("auto", "hermes", "llama3_json", "mistral")
QUANTIZATIONS: tuple[Quantization, ...] = typing.get_args(Quantization)


KVCacheDType = Literal["auto", "fp8", "fp8_e4m3", "int8"]
"""Types of the key/value cache: `auto` is the type that the model computes in, `fp8` is e4m3."""
KV_CACHE_DTYPES: tuple[KVCacheDType, ...] = typing.get_args(KVCacheDType)
CacheDType = Literal["fp8", "int8"]
"""Those of 8 bits."""


def dtype_name(text: str) -> DTypeName:
    """Short name of a data type given as `fp16`, `float16`, `torch.float16` or `half`; ConfigError for others."""
    name = _DTYPE_ALIASES.get(text.removeprefix("torch."))
    if name is None:
        raise ConfigError(f"data type {text!r} is not known; use one of {', '.join(DTYPES)}")
    return name


_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kmgt]?)(i?b?)", re.IGNORECASE)


def parse_size(text: str) -> int:
    """Bytes of a size such as `1073741824`, `512MiB`, `1G` or `1.5GB`; ConfigError for anything else.

    As in GNU's tools, a letter alone and `iB` count in powers of 1024, `B` in powers of 1000.
    """
    found = _SIZE.fullmatch(text.strip())
    if found is None or found[3].lower() == "i" or (found[3].lower() == "ib" and not found[2]):
        raise ConfigError(f"{text!r} is not a number of bytes; write it as 1073741824, 512MiB, 1G or 1.5GB")
    base = 1000 if found[3].lower() == "b" else 1024
    return round(float(found[1]) * base ** " kmgt".index(found[2].lower() or " "))


def option(default: Any, help: str, **metadata: Any) -> Any:  # noqa: A002 - `help` is argparse's own word
    """A dataclass field that the command line offers, with its help text.

    Further metadata: `flag` and `short` are the option's names where they are not the field's, `aliases` are other
    names of the field, as identifiers; `choices` are the values that it takes; `kind` is `size` for a number of bytes
    and `path` for a file or folder, whose `~` is expanded.
    """
    return field(default=default, metadata={"help": help, **metadata})


_MOST_LAYERS = 10_000
"""More layers than any model has: a nonsensical number would otherwise fill the memory with names of weights."""


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


_KINDS: dict[type, tuple[Callable[[object], bool], str]] = {
    int: (lambda value: isinstance(value, int) and not isinstance(value, bool), "a whole number"),
    float: (lambda value: isinstance(value, int | float) and not isinstance(value, bool), "a number"),
    bool: (lambda value: isinstance(value, bool), "True or False"),
    str: (lambda value: isinstance(value, str), "a text"),
}


def _check_kinds(config: Any) -> None:
    """Raise ConfigError that names a field of a plain type whose value is of another."""
    for name, hint in typing.get_type_hints(type(config)).items():
        value, parts = getattr(config, name), typing.get_args(hint) or (hint,)
        if value is None and type(None) in parts:
            continue
        for part in parts:
            if part in _KINDS:
                fits, kind = _KINDS[part]
                or_none = " or None" if type(None) in parts else ""
                _require(fits(value), f"{name} must be {kind}{or_none}, got {value!r:.80}")


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
        _require(bool(self.labels), "a classifier has at least one label")


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
        _require(self.width > 0 and self.width % 2 == 0, f"{self.width} dimensions of a head cannot turn in pairs")
        for name in ("theta", "factor", "high_freq_factor", "beta_fast", "beta_slow", "attention_factor"):
            _require(getattr(self, name) > 0, f"{name} of the rope must be positive, got {getattr(self, name)}")
        needs = self.kind not in ("default", "linear")
        _require(not needs or self.original_max_position is not None, f"rope {self.kind} needs its original length")
        for name in ("short_factor", "long_factor") if self.kind == "longrope" else ():
            count = len(getattr(self, name))
            _require(count == self.width // 2, f"{name} has {count} numbers for {self.width // 2} pairs of dimensions")


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
            _require(getattr(self, name) > 0, f"{name} must be positive, got {getattr(self, name)}")
        for name in ("scale", "window", "softcap", "alibi_bias_max", "qkv_clip"):
            value = getattr(self, name)
            _require(value is None or value > 0, f"{name} of attention must be positive, got {value}")
        _require((self.position == "rope") == (self.rope is not None), "attention has a rope where position is rope")
        _require(
            self.relative_buckets >= 0 and self.relative_buckets % 4 == 0,
            f"biases by distance have a number of buckets that 4 divides, got {self.relative_buckets}",
        )
        exact = self.relative_buckets // (2 if self.causal else 4)
        _require(
            self.relative_buckets == 0 or self.relative_farthest > exact,
            f"biases by distance have {exact} buckets of one distance, and end at {self.relative_farthest} already",
        )
        _require(
            self.rope is None or self.rope.width <= self.head_size,
            f"{self.rope and self.rope.width} dimensions cannot turn in a head of {self.head_size}",
        )
        _require(
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
            _require(getattr(self, name) > 0, f"{name} of experts must be positive, got {getattr(self, name)}")
        _require(self.shared_size is None or self.shared_size > 0, f"a shared expert of size {self.shared_size}")
        _require(self.limit is None or self.limit > 0, f"limit of experts must be positive, got {self.limit}")
        _require(
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
            _require(getattr(self, name) > 0, f"{name} of the encoder must be positive, got {getattr(self, name)}")
        _require(self.num_layers < _MOST_LAYERS, f"num_layers {self.num_layers} of the encoder cannot be right")


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
            _require(getattr(self, name) > 0, f"{name} must be positive, got {getattr(self, name)}")
        _require(self.num_layers < _MOST_LAYERS, f"num_layers {self.num_layers} cannot be right")
        _require(
            len(self.layer_attention) in (0, self.num_layers),
            f"attention of {len(self.layer_attention)} layers is given, but there are {self.num_layers}",
        )
        for attention in self.layer_attention:
            _require(_heads(attention) == _heads(self.attention), "layers with different heads are not supported")
        _require(
            not self._has_learned_positions or self.max_position_embeddings is not None,
            "learned positions have a longest sequence",
        )
        _require(
            (self.encoder is None) == (self.decoder_start_token_id is None),
            "an encoder-decoder has a decoder_start_token_id, and only it",
        )
        _require(
            self.encoder is None or _width(self.encoder.attention) == _width(self.attention),
            "heads of encoder and decoder that differ in their width together are not supported",
        )
        classifies = self.task in ("classify", "token_classify")
        _require(classifies == (self.classifier is not None), f"a model to {self.task} has a classifier, or has none")

    def attention_of(self, layer: int) -> AttentionConfig:
        """The attention of one layer."""
        return self.layer_attention[layer] if self.layer_attention else self.attention

    @property
    def num_positions(self) -> int:
        """Rows of the table of learned positions; 0 where the model has none."""
        return self.position_offset + (self.max_position_embeddings or 0) if self._has_learned_positions else 0

    @property
    def _has_learned_positions(self) -> bool:
        return self.attention.position == "learned"

    @property
    def has_mlp(self) -> bool:
        """Whether any layer has a plain MLP."""
        return self.experts is None or bool(self.experts.dense_layers)


def _width(attention: AttentionConfig) -> int:
    return attention.num_kv_heads * attention.head_size


def _heads(attention: AttentionConfig) -> tuple[int, int, int]:
    return attention.num_heads, attention.num_kv_heads, attention.head_size


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How many ranks share the model."""

    tensor_parallel_size: int = option(
        1, "number of ranks that share every layer (tensor parallel)", short="-tp", flag="--tensor-para-size"
    )
    pipeline_parallel_size: int = option(
        1,
        "number of pipeline stages that the layers are dealt to, each with tensor-para-size ranks",
        short="-pp",
        flag="--pipeline-para-size",
    )
    pipeline_layers: str | None = option(
        None, "number of layers in each pipeline stage, such as 10,11,11 (default: as equal as can be)"
    )
    expert_parallel: bool = option(
        False,
        "give each rank whole experts of a mixture, instead of a part of every expert",
        aliases=("enable_expert_parallel",),
    )
    nnodes: int | None = option(
        None,
        "number of hosts with equally many ranks, each of which runs this command (default: what a cluster says)",
    )
    node_rank: int | None = option(None, "number of this host, from 0, which is the one that answers")
    master_addr: str | None = option(None, "name or address of host 0")
    master_port: int | None = option(None, "port of host 0 at which the ranks meet (default: 29500)")

    def __post_init__(self) -> None:
        _check_kinds(self)
        _require(
            self.tensor_parallel_size >= 1, f"tensor_parallel_size must be at least 1, got {self.tensor_parallel_size}"
        )
        stages = self.pipeline_parallel_size
        _require(stages >= 1, f"pipeline_parallel_size must be at least 1, got {stages}")
        _require(self.nnodes is None or self.nnodes >= 1, f"nnodes must be at least 1, got {self.nnodes}")
        port = self.master_port
        _require(port is None or 1 <= port <= 65535, f"master_port must be from 1 to 65535, got {port}")
        counts = self.dealt_layers
        _require(
            not counts or len(counts) == stages,
            f"pipeline_layers {self.pipeline_layers} is for {len(counts)} stages, pipeline_parallel_size is {stages}",
        )

    @property
    def ranks(self) -> int:
        """Ranks of one engine."""
        return self.tensor_parallel_size * self.pipeline_parallel_size

    @property
    def dealt_layers(self) -> tuple[int, ...]:
        """The layers of each pipeline stage, where they are given."""
        if self.pipeline_layers is None:
            return ()
        counts = self.pipeline_layers.split(",")
        _require(
            all(count.strip().isdecimal() and int(count) > 0 for count in counts),
            f"pipeline_layers must be positive numbers separated by commas, as 10,11,11; got {self.pipeline_layers!r}",
        )
        return tuple(map(int, counts))

    def validate(self, model: ModelConfig) -> None:
        """Raise ConfigError unless `model` can be split over these ranks."""
        _require(
            not self.expert_parallel or model.experts is not None,
            f"expert_parallel: {model.architecture} has no experts; leave the option out",
        )
        _require(
            self.pipeline_parallel_size == 1 or model.task == "generate",
            f"pipeline_parallel_size: {model.architecture} generates no text, and has no stages; leave the option out",
        )
        _require(
            self.pipeline_parallel_size == 1 or model.encoder is None,
            f"pipeline_parallel_size: {model.architecture} has an encoder, and no stages; leave the option out",
        )
        layers, counts = model.num_layers, self.dealt_layers
        _require(
            self.pipeline_parallel_size <= layers,
            f"pipeline_parallel_size {self.pipeline_parallel_size} is more than the {layers} layers of the model",
        )
        _require(
            not counts or sum(counts) == layers,
            f"pipeline_layers {self.pipeline_layers} deals {sum(counts)} layers, but the model has {layers}",
        )
        size = self.tensor_parallel_size
        if unfit := self._unfit(size, model):
            sizes = range(1, model.attention.num_heads + 1)
            fitting = (str(size) for size in sizes if self._unfit(size, model) is None)
            raise ConfigError(
                f"tensor parallel size {size} does not divide {unfit}; choose a size that does: {', '.join(fitting)}"
            )

    def _unfit(self, size: int, model: ModelConfig) -> str | None:
        """What of a model cannot be split over `size` ranks, None if all can."""
        heads, kv_heads = model.attention.num_heads, model.attention.num_kv_heads
        # with more ranks than key/value heads, as many ranks hold each
        fits = {
            ("attention heads", heads): heads % size,
            ("key/value heads", kv_heads): min(kv_heads % size, size % kv_heads),
        }
        fits |= {(name, count): count % size for name, count in self._divided(model)}
        return next((f"{name} ({count})" for (name, count), rest in fits.items() if rest), None)

    def _divided(self, model: ModelConfig) -> Iterator[tuple[str, int]]:
        """Counts, with their names, that the ranks must divide evenly."""
        if model.has_mlp:
            yield "the MLP's inner size", model.intermediate_size
        if model.encoder is not None:
            yield "the encoder's attention heads", model.encoder.attention.num_heads
            yield "the inner size of the encoder's MLP", model.encoder.intermediate_size
        if model.experts is None:
            return
        if self.expert_parallel:
            yield "the experts", model.experts.num_experts
        else:
            yield "the experts' inner size", model.experts.inner_size
        if model.experts.shared_size is not None:
            yield "the shared expert's inner size", model.experts.shared_size


@dataclass(frozen=True, kw_only=True)
class CacheConfig:
    """The paged key/value cache."""

    block_size: int = option(16, "tokens per block of the key/value cache")
    kv_cache_memory: int | None = option(
        None,
        "bytes of key/value cache per rank, such as 1G or 512MiB (default: from the free memory)",
        kind="size",
        aliases=("kv_cache_memory_bytes",),
    )
    gpu_memory_utilization: float = option(0.9, "fraction of a GPU's memory that the engine may use, weights included")
    enable_prefix_caching: bool = option(True, "share cache blocks between requests whose prompts have a common prefix")
    kv_cache_dtype: str = option(
        "auto",
        "type of the key/value cache: auto (the type that the model computes in), or int8 or fp8 (e4m3), which hold "
        "twice the tokens of fp16 in the same memory, with a scale for each head: that of a checkpoint that has scales "
        "of its cache, else measured at the start",
        choices=KV_CACHE_DTYPES,
    )

    def __post_init__(self) -> None:
        _check_kinds(self)
        _require(self.block_size >= 1, f"block_size must be at least 1, got {self.block_size}")
        _require(
            0 < self.gpu_memory_utilization <= 1,
            f"gpu_memory_utilization must be above 0 and at most 1, got {self.gpu_memory_utilization}",
        )
        _require(
            self.kv_cache_memory is None or self.kv_cache_memory > 0,
            f"kv_cache_memory must be positive, got {self.kv_cache_memory}",
        )
        _require(
            self.kv_cache_dtype in KV_CACHE_DTYPES,
            f"kv_cache_dtype {self.kv_cache_dtype!r} is not supported; there is {', '.join(KV_CACHE_DTYPES)}",
        )

    @property
    def eight_bits(self) -> CacheDType | None:
        """The type of a cache of 8 bits; None where it has the type that the model computes in."""
        return None if self.kv_cache_dtype == "auto" else "int8" if self.kv_cache_dtype == "int8" else "fp8"


@dataclass(frozen=True, kw_only=True)
class SchedulerConfig:
    """How much one step may take on."""

    max_num_seqs: int = option(256, "maximum sequences per step")
    max_num_batched_tokens: int | None = option(
        None,
        "maximum tokens per step, with pipeline stages of as many steps together; longer prompts are computed in "
        "chunks of this size (default: 8192 on a GPU, else 2048)",
        type=int,
    )
    max_model_len: int | None = option(
        None, "maximum length of a sequence, prompt and output together (default: the model's own, or 2048)", type=int
    )
    itl_target: float | None = option(
        None,
        "target in milliseconds for the time between tokens: longer prompts join the steps of others in parts that "
        "keep to it, and short prompts overtake their rest; 0: no target (default: 30 in a server, else 0)",
        type=float,
    )
    overlap_steps: bool | None = option(
        None,
        "asynchronous scheduling: launch a step before the previous one's tokens reach the host (default: on a GPU)",
        aliases=("async_scheduling",),
    )
    max_grammar_seconds: int = option(5, "maximum seconds of CPU time to compile a grammar; larger ones are refused")
    max_grammar_memory: int = option(
        1 << 30, "maximum bytes of memory to compile a grammar, such as 512MiB; larger ones are refused", kind="size"
    )

    def __post_init__(self) -> None:
        _check_kinds(self)
        names = ("max_num_seqs", "max_num_batched_tokens", "max_model_len", "max_grammar_seconds", "max_grammar_memory")
        for name in names:
            value = getattr(self, name)
            _require(value is None or value >= 1, f"{name} must be at least 1, got {value}")
        _require(
            self.itl_target is None or 0 <= self.itl_target < math.inf,
            f"itl_target must be a number of milliseconds, 0 for no target, got {self.itl_target}",
        )
        _require(
            self.max_num_batched_tokens is None or self.max_num_batched_tokens >= self.max_num_seqs,
            f"max_num_batched_tokens {self.max_num_batched_tokens} is below max_num_seqs {self.max_num_seqs}: "
            "a step could not even decode one token of each; raise the first or lower the second",
        )

    def validate(self, model: ModelConfig) -> None:
        """Raise ConfigError if sequences may grow longer than `model` has positions."""
        learned = model.max_position_embeddings if model.num_positions else None
        _require(
            self.max_model_len is None or learned is None or self.max_model_len <= learned,
            f"max_model_len {self.max_model_len} is more than the {learned} positions that the model has learned; "
            f"use at most {learned}",
        )


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Everything that one engine needs to know to start."""

    model: str
    """Folder of the checkpoint (Hugging Face, FasterTransformer or ranked safetensors) or a Hugging Face id."""
    tokenizer: str | None = option(
        None, "folder or file of the tokenizer (default: the model's)", flag="--tokenizer-path", kind="path"
    )
    tool_call_parser: str = option(
        "auto",
        "form in which the model writes calls of tools in chats: hermes (Qwen's too), llama3_json, mistral, or auto, "
        "as its chat template shows",
        choices=TOOL_CALL_PARSERS,
    )
    dtype: str = option(
        "auto",
        "type to compute in: fp32, fp16, bf16, or auto (the checkpoint's on a GPU, fp32 on a CPU)",
        short="-dt",
        flag="--data-type",
    )
    device: str = option("auto", "cpu, cuda, or auto (a GPU where there is one)")
    quantization: str | None = option(
        None,
        "weights of linear layers and of the head in 8 bits, with a scale for each output column: int8; w8a8, which "
        "rounds each token's activations to int8 too; fp8, weights and activations in e4m3 and the head in int8. int4: "
        "linear layers in 4 bits, with a scale for each group of 128 inputs, and the head in int8, for memory and few "
        "requests at a time. Made from a full-precision checkpoint while it is loaded (default: as the checkpoint is)",
        choices=QUANTIZATIONS,
    )
    load_format: str = option(
        "auto", "auto, or dummy: random weights from a config.json alone", choices=("auto", "dummy")
    )
    verify_checksums: bool = option(True, "compare the checkpoint's files with its manifest while loading")
    revision: str | None = option(None, "branch, tag or commit of a model that is given by its Hugging Face id")
    download_dir: str | None = option(
        None, "cache folder for models that are given by their Hugging Face id (default: Hugging Face's own)"
    )
    progress_bars: bool = option(
        True, "show progress bars where standard error is a terminal", aliases=("use_tqdm_on_load",)
    )
    seed: int = option(0, "seed of requests that bring none")
    enforce_eager: bool = option(False, "launch every step kernel by kernel on a GPU, without CUDA graphs")
    deterministic: bool = option(
        False,
        "a request's tokens and log-probabilities have the same bits in any batch: alone or among others, in chunks or "
        "whole, after a preemption, with prompts from the prefix cache, in every run",
    )
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    cache: CacheConfig = field(default_factory=CacheConfig)
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)

    def __post_init__(self) -> None:
        _check_kinds(self)
        if self.dtype != "auto":
            dtype_name(self.dtype)
        _require(
            re.fullmatch(r"auto|cpu|cuda(:\d+)?", self.device) is not None,
            f"device {self.device!r} is not known; use cpu, cuda, cuda:NUMBER or auto",
        )
        _require(self.load_format in ("auto", "dummy"), f"load_format {self.load_format!r} is not auto or dummy")
        _require(
            self.quantization is None or self.quantization in QUANTIZATIONS,
            f"quantization {self.quantization!r} is not supported; there is {', '.join(QUANTIZATIONS)}",
        )
        _require(
            self.tool_call_parser in TOOL_CALL_PARSERS,
            f"tool_call_parser {self.tool_call_parser!r} is not known; there is {', '.join(TOOL_CALL_PARSERS)}",
        )
        self.check_deterministic(self.parallel.tensor_parallel_size, self.quantization)

    def check_deterministic(self, ranks: int, quantization: str | None) -> None:
        """Raise ConfigError if so many ranks, or weights quantized so, cannot be `deterministic` as is asked for."""
        _require(
            not self.deterministic or ranks == 1,
            f"deterministic: sums over {ranks} ranks have no fixed order; use tensor_parallel_size 1",
        )
        _require(
            not self.deterministic or quantization is None,
            f"deterministic: products with {quantization} weights have no fixed order; use full precision",
        )

    @classmethod
    def create(cls, model: str, **options: Any) -> "EngineConfig":
        """Build from flat option names (`tensor_parallel_size=2`, `block_size=32`), aliases of fields included.

        ConfigError for an unknown one; options of vLLM that ask for nothing that hasten does otherwise have no effect.
        """
        given: dict[str, Any] = {}
        for name, value in options.items():
            if name in WITHOUT_EFFECT:
                _check_without_effect(name, value)
                continue
            _require(name in _NAMES, _unknown_option(name))
            field_name = _NAMES.get(name, name)
            _require(field_name not in given, f"{name} and {field_name} are one option; give it once")
            given[field_name] = _plain(field_name, value)
        taken = {
            part: kind(**{f.name: given.pop(f.name) for f in dataclasses.fields(kind) if f.name in given})
            for part, kind in _PARTS.items()
        }
        return cls(model=model, **given, **taken)


_PARTS: dict[str, type[Any]] = {"parallel": ParallelConfig, "cache": CacheConfig, "scheduler": SchedulerConfig}


def engine_fields() -> "list[dataclasses.Field[Any]]":
    """The fields of EngineConfig and of its parts: every option of an engine but the model."""
    own = [f for f in dataclasses.fields(EngineConfig) if f.name not in (*_PARTS, "model")]
    return own + [f for kind in _PARTS.values() for f in dataclasses.fields(kind)]


_NAMES = {name: f.name for f in engine_fields() for name in (f.name, *f.metadata.get("aliases", ()))}
"""Every name of an option -> the field's."""

_SIZES = frozenset(f.name for f in engine_fields() if f.metadata.get("kind") == "size")

WITHOUT_EFFECT: Mapping[str, tuple[tuple[object, ...] | None, str]] = {
    "enable_chunked_prefill": ((True, None), "long prompts are computed in chunks; see max_num_batched_tokens"),
    "disable_log_stats": (None, ""),
    "disable_custom_all_reduce": (None, ""),
    "trust_remote_code": (None, ""),
    "swap_space": (None, ""),
    "max_seq_len_to_capture": (None, ""),
    "cpu_offload_gb": ((0,), "all weights stay on the device"),
    "data_parallel_size": ((1,), "this is one engine; hasten serve --data-parallel-size runs several"),
    "enable_lora": ((False, None), "adapters are not supported; merge them into the checkpoint"),
    "skip_tokenizer_init": ((False,), "a folder without a tokenizer does without one"),
    "enable_auto_tool_choice": (None, ""),
    "tokenizer_mode": (("auto", "fast"), "the tokenizer is the checkpoint's tokenizer.json"),
    "scheduling_policy": (("fcfs",), "requests begin in the order in which they come; only itl_target changes that"),
    "speculative_config": ((None,), "there is no speculative decoding"),
}
"""Options of vLLM that choose nothing here: the values that ask for what hasten does anyway (None: any value), and why
others are refused."""


def _check_without_effect(name: str, value: object) -> None:
    values, reason = WITHOUT_EFFECT[name]
    if values is not None and value not in values:
        raise ConfigError(f"{name}={value!r:.80} is not supported: {reason}")


def _unknown_option(name: str) -> str:
    near = difflib.get_close_matches(name, [*_NAMES, *WITHOUT_EFFECT], 1)
    hint = f"; did you mean {near[0]}?" if near else ";"
    return f"unknown engine option {name}{hint} there are {', '.join(sorted(f.name for f in engine_fields()))}"


def _plain(name: str, value: Any) -> Any:
    """Data types and devices of torch, paths and lists of layers as the text that stands for them; sizes as numbers."""
    if name in _SIZES and isinstance(value, str):
        return parse_size(value)
    if name == "pipeline_layers" and isinstance(value, list | tuple):
        return ",".join(map(str, value))
    if name in ("dtype", "device"):
        return str(value)
    return os.fspath(value) if isinstance(value, os.PathLike) else value


class EngineOptions(TypedDict, total=False):
    """The options of an engine by the names of their fields, for type checkers and editors."""

    tokenizer: str | os.PathLike[str] | None
    tool_call_parser: str
    dtype: Any
    device: Any
    quantization: Quantization | None
    load_format: str
    verify_checksums: bool
    revision: str | None
    download_dir: str | os.PathLike[str] | None
    progress_bars: bool
    use_tqdm_on_load: bool
    seed: int
    enforce_eager: bool
    deterministic: bool
    tensor_parallel_size: int
    pipeline_parallel_size: int
    pipeline_layers: str | Sequence[int] | None
    expert_parallel: bool
    nnodes: int | None
    node_rank: int | None
    master_addr: str | None
    master_port: int | None
    block_size: int
    kv_cache_memory: int | str | None
    gpu_memory_utilization: float
    enable_prefix_caching: bool
    kv_cache_dtype: KVCacheDType
    max_num_seqs: int
    max_num_batched_tokens: int | None
    max_model_len: int | None
    itl_target: float | None
    overlap_steps: bool | None
    max_grammar_seconds: int
    max_grammar_memory: int | str
    kv_cache_memory_bytes: int | str | None
    async_scheduling: bool | None
    enable_expert_parallel: bool
    enable_chunked_prefill: bool | None
    disable_log_stats: bool
    disable_custom_all_reduce: bool
    trust_remote_code: bool
    swap_space: float
    max_seq_len_to_capture: int
    cpu_offload_gb: float
    data_parallel_size: int
    enable_lora: bool | None
    skip_tokenizer_init: bool
    enable_auto_tool_choice: bool
    tokenizer_mode: str
    scheduling_policy: str
    speculative_config: Any
