"""What encoders share: layers between an embedding and a classifier, and the usual layer, normed behind its sums.

Shapes: t tokens of the flat batch, h hidden, r rows, l labels.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any, ClassVar

import numpy as np
import torch.nn as nn
from numpy.typing import NDArray
from torch import Tensor

from hasten.core.errors import ConfigError, UnsupportedError
from hasten.core.model_config import (
    Activation,
    ClassifierConfig,
    LabelActivation,
    MaskedWordsConfig,
    ModelConfig,
    Pooling,
    Task,
)
from hasten.layers.attention import Attention
from hasten.layers.classifier import Classifier, MaskedWords
from hasten.layers.embedding import Embedding
from hasten.layers.mlp import MLP
from hasten.layers.position import RelativeBias
from hasten.models import hf_config
from hasten.models.base import Transformer
from hasten.models.decoder import make_norm
from hasten.models.weight_map import (
    Axis,
    Tie,
    WeightMap,
    WeightSpec,
    linear,
    norm,
    positions,
    table,
    vocabulary,
    vocabulary_bias,
)
from hasten.ops.meta import AttentionMeta
from hasten.parallel.groups import ALL_ALONE, ParallelGroups
from hasten.parallel.shard import Split

HARMLESS = frozenset(
    """
    attention_probs_dropout_prob classifier_dropout directionality gradient_checkpointing hidden_dropout_prob
    initializer_range layer_norm_eps pooler_fc_size pooler_num_attention_heads pooler_num_fc_layers
    pooler_size_per_head pooler_type output_past sentence_transformers sbert_ce_default_activation_function
    """.split()
)
"""Keys of config.json that change nothing an encoder computes."""

_HIDDEN: Axis = "hidden"


class EncoderBlock(nn.Module):
    """Attention, then the MLP, each added to its input and then normed."""

    def __init__(self, config: ModelConfig, layer: int, groups: ParallelGroups, bias: RelativeBias | None) -> None:
        super().__init__()
        hidden, group = config.hidden_size, groups.tensor
        self.last = layer == config.num_layers - 1
        self.attention = Attention(hidden, config.attention_of(layer), relative_bias=bias, group=group)
        self.attention_norm = make_norm(config, groups)
        self.mlp = MLP(hidden, config.intermediate_size, activation=config.activation, group=group)
        self.output_norm = make_norm(config, groups)

    def forward(self, x_th: Tensor, positions_t: Tensor, meta: AttentionMeta) -> Tensor:
        """Hidden states after this layer: [t, h]."""
        x_th = self.attention_norm.alone(self.attention(x_th, positions_t, meta, x_th, last=self.last))
        return self.output_norm.alone(self.mlp(x_th, x_th))


class Encoder(Transformer):
    """Embedding, layers whose tokens see all tokens of their text, and perhaps a classifier or a head for masks."""

    block: ClassVar[type[nn.Module]] = EncoderBlock
    hf_harmless: ClassVar[frozenset[str]] = HARMLESS

    def __init__(self, config: ModelConfig, groups: ParallelGroups = ALL_ALONE) -> None:
        super().__init__(config, groups)
        assert self.stage.size == 1, "ParallelConfig refuses stages of an encoder"
        self.embedding = Embedding(
            config.vocab_size,
            config.hidden_size,
            positions=config.num_positions,
            types=config.token_types,
            group=groups.tensor,
        )
        self.embedding_norm = make_norm(config, groups)
        biased = config.attention.relative_buckets > 0
        self.relative_bias = RelativeBias(config.attention, group=groups.tensor) if biased else None
        self.layers = nn.ModuleList(
            self.block(config, layer, groups, self.relative_bias) for layer in range(config.num_layers)
        )
        self.final_norm = make_norm(config, groups) if config.final_norm else None
        self.classifier = make_classifier(config)
        self.masked_words = self._make_masked_words(config)

    def _make_masked_words(self, config: ModelConfig) -> MaskedWords | None:
        if config.masked_words is None:
            return None
        return MaskedWords(
            config.vocab_size,
            config.hidden_size,
            config.masked_words,
            tied=self.embedding if config.tie_word_embeddings else None,
            norm_eps=config.norm_eps,
            norm_bias=config.norm_bias,
            group=self.group,
        )

    def forward(self, inputs: Tensor, positions_t: Tensor, meta: AttentionMeta) -> Tensor:
        """Hidden states after the last layer, of the tokens of `meta.output_part` where it names some: [t, h].

        `positions_t` are rows of the tables of positions and types, as `position_rows` gives them.
        """
        x_th = self.embedding.normed(inputs, positions_t, self.embedding_norm)
        for layer in self.layers:
            x_th = layer(x_th, positions_t, meta)
        return x_th if self.final_norm is None else self.final_norm.alone(x_th)


def make_classifier(config: ModelConfig) -> Classifier | None:
    """What makes logits of a model's hidden states, where it classifies."""
    if config.classifier is None:
        return None
    return Classifier(config.hidden_size, config.classifier, norm_eps=config.norm_eps, norm_bias=config.norm_bias)


def position_rows(config: ModelConfig, token_ids: Sequence[int], type_ids: Sequence[int]) -> NDArray[np.int32] | None:
    """The row that each token takes in the tables of positions and types, which follow each other by type: [t].

    None where these are the tokens' positions, where the model has no such tables, and in a decoder; without
    `type_ids`, all tokens are of type 0.
    """
    if not config.num_positions or config.attention.causal:
        return None
    if not (type_ids or config.position_offset or config.skips_padding):
        return None
    rows = np.arange(config.position_offset, config.position_offset + len(token_ids))
    if config.skips_padding and config.pad_token_id in token_ids:
        counts = np.asarray(token_ids) != config.pad_token_id
        rows = np.cumsum(counts) * counts + config.position_offset - 1
    if type_ids and config.token_types:
        rows = rows + np.asarray(type_ids) * config.num_positions
    return rows.astype(np.int32)


@dataclass(frozen=True)
class StoredWords:
    """What a checkpoint calls the parts of the head for masks."""

    dense: str
    norm: str
    decoder: str
    """Whose weight is usually the embedding's."""
    other_bias: str | None = None
    """Another name of the decoder's bias, under which files have it too, or instead."""

    @property
    def own_head(self) -> WeightSpec:
        """The weight of the decoder."""
        return vocabulary("masked_words.head.weight", f"{self.decoder}.weight")

    @property
    def aliases(self) -> dict[str, str]:
        """Other names of its tensors."""
        return {} if self.other_bias is None else {self.other_bias: f"{self.decoder}.bias"}

    @property
    def names(self) -> tuple[str, ...]:
        """All names that its tensors may have."""
        kinds = ("weight", "bias", "gamma", "beta")
        modules = (f"{module}.{kind}" for module in (self.dense, self.norm, self.decoder) for kind in kinds)
        return (*modules, *self.aliases)

    def specs(self, config: ModelConfig) -> Iterable[WeightSpec]:
        """Its weights but for the decoder's, where a model has it."""
        own = config.masked_words
        if own is None:
            return
        name, into = "masked_words", {self.dense: _HIDDEN}
        yield from linear(f"{name}.dense", into, "hidden", "hidden", Split.REPLICATE, bias=own.dense_bias)
        yield from norm(f"{name}.norm", self.norm, bias=config.norm_bias)
        if own.bias:
            yield vocabulary_bias(f"{name}.head.bias", f"{self.decoder}.bias")


def encoder_weights(
    config: ModelConfig,
    of_layer: Callable[[int], Iterable[WeightSpec]],
    *,
    prefix: str,
    first: Iterable[WeightSpec],
    last: Iterable[WeightSpec] = (),
    dense: str = "",
    classifier: str = "classifier",
    words: StoredWords,
    ignored: tuple[str, ...] = (),
) -> WeightMap:
    """That of an encoder's layers, what stands before and behind them, and its classifier or head for masks.

    `prefix` is that of the base model. `dense` and `classifier` are the stored modules of the classifier, `words` those
    of the head for masks, which other tasks ignore, and `ignored` what no task needs: their heads and old buffers.
    """
    first, has_words = tuple(first), config.masked_words is not None
    head = [*_classifier_weights(config, dense, classifier), *map(_with_old_name, words.specs(config))]
    tie = Tie(words.own_head, first[0]) if has_words and config.tie_word_embeddings else None
    head += [words.own_head] if has_words and tie is None else []
    unprefixed = frozenset(source.name for spec in head for source in (*spec.sources, *spec.other_sources))
    layers = chain.from_iterable(map(of_layer, range(config.num_layers)))
    return WeightMap(
        specs=(*map(_with_old_name, chain(first, layers, last)), *head),
        hf_prefix=prefix,
        hf_unprefixed=unprefixed,
        hf_ignored=(
            *("embeddings.position_ids", "embeddings.token_type_ids"),
            *ignored,
            *(() if has_words else (name for name in words.names if name not in unprefixed)),
        ),
        hf_aliases=words.aliases if has_words else {},
        head_tie=tie,
    )


def _with_old_name(spec: WeightSpec) -> WeightSpec:
    """The spec of a norm also under the names of very old checkpoints, gamma and beta."""
    names = [source.name for source in spec.sources]
    if len(names) != 1 or not names[0].endswith(("LayerNorm.weight", "LayerNorm.bias")):
        return spec
    module, _, kind = names[0].rpartition(".")
    old = f"{module}.{'gamma' if kind == 'weight' else 'beta'}"
    return replace(spec, other_sources=(replace(spec.sources[0], name=old),))


def _classifier_weights(config: ModelConfig, dense: str, classifier: str) -> Iterable[WeightSpec]:
    own = config.classifier
    if own is None:
        return
    if own.dense is not None:
        into: dict[str, Axis] = {dense: "hidden"}
        yield from linear("classifier.dense", into, "hidden", "hidden", Split.REPLICATE, bias=own.dense_bias)
    if own.norm:
        yield from norm("classifier.norm", f"{dense.rpartition('.')[0]}.norm", bias=config.norm_bias)
    yield from linear("classifier.out", {classifier: "labels"}, "labels", "hidden", Split.REPLICATE, bias=own.bias)


def embedding_weights(config: ModelConfig) -> Iterable[WeightSpec]:
    """Embeddings and their norm under BERT's names."""
    yield vocabulary("embedding.weight", "embeddings.word_embeddings.weight")
    yield positions("embedding.positions", "embeddings.position_embeddings.weight")
    if config.token_types:
        yield table("embedding.types", "embeddings.token_type_embeddings.weight", "types")
    yield from norm("embedding_norm", "embeddings.LayerNorm", bias=True)


_TASKS: tuple[tuple[str, Task], ...] = (
    ("ForSequenceClassification", "classify"),
    ("ForTokenClassification", "token_classify"),
)


def task_from_hf(raw: Mapping[str, Any]) -> tuple[str | None, Task]:
    """The architecture that a config.json names, and the task that it is for."""
    named = raw.get("architectures")
    name = str(named[0]) if isinstance(named, list) and named else None
    return name, next((task for suffix, task in _TASKS if name is not None and name.endswith(suffix)), "embed")


def has_masked_words(architecture: str | None) -> bool:
    """Whether an architecture has the head for masks."""
    return architecture is not None and architecture.endswith(("ForMaskedLM", "ForPreTraining"))


def masked_words_from_hf(architecture: str | None, activation: Activation, **fields: Any) -> MaskedWordsConfig | None:
    """The head for masks of an architecture that has it; `fields`: what else its configuration says of it."""
    return MaskedWordsConfig(activation=activation, **fields) if has_masked_words(architecture) else None


def refuse(raw: Mapping[str, Any], supported: Mapping[str, Any]) -> None:
    """UnsupportedError names a key whose value is another than the supported one."""
    for name, value in supported.items():
        if raw.get(name) not in (None, value):
            raise UnsupportedError(f"{name} {raw[name]!r} is not supported; supported is {value!r}")


def classifier_from_hf(
    raw: Mapping[str, Any], task: Task, *, pooling: Pooling = "cls", **dense: Any
) -> ClassifierConfig | None:
    """The classifier of a task, None where it needs none; `dense`: what comes before its last layer, by fields."""
    if task not in ("classify", "token_classify"):
        return None
    labels = _labels(raw)
    activation: LabelActivation = "softmax" if task == "token_classify" else _activation(raw, len(labels))
    return ClassifierConfig(labels=labels, activation=activation, pooling=pooling, **dense)


def _labels(raw: Mapping[str, Any]) -> tuple[str, ...]:
    names = raw.get("id2label")
    if names is None:
        return tuple(f"LABEL_{number}" for number in range(hf_config.count(raw, "num_labels", default=2)))
    if not isinstance(names, dict) or sorted(names) != sorted(map(str, range(len(names)))) or not names:
        raise ConfigError(f"id2label does not name labels 0 to {len(names) - 1}: {names!r:.80}")
    return tuple(str(names[str(number)]) for number in range(len(names)))


_TORCH_ACTIVATIONS: dict[str, LabelActivation] = {"Identity": "none", "Sigmoid": "sigmoid", "Softmax": "softmax"}
_PROBLEMS: dict[str, LabelActivation] = {
    "regression": "none",
    "single_label_classification": "softmax",
    "multi_label_classification": "sigmoid",
}


def _activation(raw: Mapping[str, Any], labels: int) -> LabelActivation:
    """What a cross-encoder of sentence-transformers names, else what the kind of problem asks for."""
    own = raw.get("sentence_transformers")
    named = own.get("activation_fn") if isinstance(own, dict) else None
    named = named or raw.get("sbert_ce_default_activation_function")
    if named is not None:
        name = str(named).rpartition(".")[2].removesuffix("()")
        if not str(named).startswith("torch.") or name not in _TORCH_ACTIVATIONS:
            raise UnsupportedError(
                f"the activation {named!r} of a cross-encoder is not supported; supported are torch's "
                f"{', '.join(sorted(_TORCH_ACTIVATIONS))}"
            )
        return _TORCH_ACTIVATIONS[name]
    problem = raw.get("problem_type")
    if problem is not None:
        if problem not in _PROBLEMS:
            raise UnsupportedError(f"problem_type {problem!r} is not supported; supported are {', '.join(_PROBLEMS)}")
        return _PROBLEMS[problem]
    return "softmax" if labels > 1 else "sigmoid"
