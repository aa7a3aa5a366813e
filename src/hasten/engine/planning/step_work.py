"""Estimated operations and bytes of steps on one rank, from a model's configuration: what its metrics expose.

Products, attention, weights and the key/value cache are counted; activations are not. Tokens of one prompt read the
keys and values before them together.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from hasten.core.dtypes import CacheDType, DTypeName
from hasten.core.model_config import ModelConfig
from hasten.engine.batch import Batch
from hasten.engine.planning.footprint import Footprint, footprint
from hasten.quantization.scheme import SCHEMES


@dataclass
class EstimatedWork:
    """Totals since the start, of one rank."""

    flops: float = 0.0
    read_bytes: float = 0.0
    write_bytes: float = 0.0


class WorkEstimator:
    """Adds up the work of steps. `stages` of a pipeline have equal parts of the layers."""

    def __init__(self, model: ModelConfig, rank: Footprint, *, ranks: int = 1, stages: int = 1) -> None:
        layers = Counter(model.attention_of(layer).window for layer in range(model.num_layers))
        self._windows = sorted(layers.items(), key=lambda item: item[0] or 0)
        """Each window (None: all tokens) with its number of layers."""
        self._rank, self._stages = rank, stages
        self._experts = model.experts
        self._layer_kv_bytes = rank.kv_bytes_per_token / model.num_layers
        self._attention_flops = 4 * model.attention.num_heads * model.attention.head_size / ranks
        """For a token and a key of one layer: a product of each key and of each value."""
        self.total = EstimatedWork()

    @classmethod
    def of(
        cls,
        model: ModelConfig,
        dtype: DTypeName,
        *,
        ranks: int = 1,
        stages: int = 1,
        quantization: str | None = None,
        cache_dtype: CacheDType | None = None,
        whole_experts: bool = False,
    ) -> "WorkEstimator | None":
        """That of a model as it was loaded; None for an encoder, and for weights in a checkpoint's own format.

        The arguments are those of `footprint`.
        """
        if model.task != "generate" or model.encoder is not None or quantization not in (None, *SCHEMES):
            return None
        rank = footprint(
            model, dtype, ranks=ranks, quantization=quantization, cache_dtype=cache_dtype, whole_experts=whole_experts
        )
        return cls(model, rank, ranks=ranks, stages=stages)

    def add(self, batch: Batch) -> None:
        """Count a step that is not launched yet, so that its sequences have not advanced."""
        self.add_spans([sequence.num_computed for sequence in batch.sequences], batch.counts, sum(batch.needed))

    def add_spans(self, begins: Sequence[int], counts: Sequence[int], logits: int) -> None:
        """Count a step that computes, for each sequence, this number of tokens behind `begins` others.

        `logits`: rows of logits.
        """
        tokens = sum(counts)
        if not tokens:
            return
        seen = keys = 0.0
        for window, layers in self._windows:
            of_tokens, of_sequences = _attended(begins, counts, window)
            seen += layers * of_tokens
            keys += layers * of_sequences
        rank, total = self._rank, self.total
        products: float = tokens * rank.layer_products + logits * rank.head_products
        read = rank.read_bytes + keys * self._layer_kv_bytes
        if (experts := self._experts) is not None:
            products += tokens * experts.top_k * rank.experts / experts.num_experts * rank.expert_products
            chosen = 1 - (1 - experts.top_k / experts.num_experts) ** tokens
            read += rank.experts * chosen * rank.expert_bytes
        total.flops += (2 * products + seen * self._attention_flops) / self._stages
        total.read_bytes += read / self._stages
        total.write_bytes += tokens * rank.kv_bytes_per_token / self._stages


def _attended(begins: Sequence[int], counts: Sequence[int], window: int | None) -> tuple[float, float]:
    """Keys of a layer that tokens see, each token's for itself, and each sequence's once: a token sees itself."""
    contexts = begins if window is None else [min(begin, window - 1) for begin in begins]
    seen = read = float(sum(contexts) + len(contexts))  # of decodes, which most sequences are
    if len(counts) < sum(counts):
        for begin, context, count in zip(begins, contexts, counts, strict=True):
            if count > 1:
                seen += _seen(begin, count, window) - context - 1
                read += count - 1
    return seen, read


def _seen(begin: int, count: int, window: int | None) -> float:
    """Keys that `count` tokens behind `begin` others see, together: a token sees itself."""
    if window is None or begin + count <= window:
        return count * begin + count * (count + 1) / 2
    whole = max(0, window - begin)  # tokens that see all before them
    return whole * begin + whole * (whole + 1) / 2 + (count - whole) * window
