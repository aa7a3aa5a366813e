"""From hidden states of texts to vectors or scores: on the device up to vectors and logits, on the host the rest.

Shapes: t tokens of the flat batch, s texts, h hidden, w width of a vector, or labels.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention
from torch import Tensor

from hasten import ops
from hasten.checkpoint.pooling import DenseModule, PoolingConfig
from hasten.core.model_config import ModelConfig, Pooling
from hasten.core.types import (
    ClassificationOutput,
    EmbeddingOutput,
    FailedOutput,
    PooledOutput,
    PoolingOutput,
    PoolingParams,
    PoolingTask,
    Request,
    ScoringOutput,
)
from hasten.engine.pooling_info import PoolingInfo
from hasten.layers.classifier import Classifier

_OF_TOKENS: tuple[PoolingTask, ...] = ("token_embed", "token_classify")
_NOT_FINITE = "the hidden states are not finite; compute in fp32 or bf16 (dtype)"
_ACTIVATIONS: dict[str | None, Callable[[Tensor], Tensor]] = {
    None: lambda x: x,
    "tanh": torch.tanh,
    "relu": F.relu,
    "gelu": F.gelu,
}


def pool(hidden_th: Tensor, counts: Sequence[int], mode: Pooling) -> Tensor:
    """One vector of each text, in fp32: [s, h]; `counts` are the texts' tokens, end to end."""
    device = hidden_th.device
    lengths_s = ops.to_device(list(counts), torch.int64, device)
    if mode in ("cls", "last"):
        ends_s = lengths_s.cumsum(0)
        return hidden_th[ends_s - (lengths_s if mode == "cls" else 1)].float()
    wide_th = hidden_th.float()
    if mode == "max":
        return torch.segment_reduce(wide_th, "max", lengths=lengths_s, axis=0, unsafe=True)
    weights_s = lengths_s
    if mode == "weightedmean":
        starts_t = torch.repeat_interleave(lengths_s.cumsum(0) - lengths_s, lengths_s, output_size=len(hidden_th))
        places_t = torch.arange(1, len(hidden_th) + 1, device=device) - starts_t
        wide_th = wide_th * places_t.unsqueeze(1)
        weights_s = lengths_s * (lengths_s + 1) // 2
    total_sh = torch.segment_reduce(wide_th, "sum", lengths=lengths_s, axis=0, unsafe=True)
    return total_sh / (weights_s.sqrt() if mode == "mean_sqrt_len" else weights_s).unsqueeze(1)


class Pooled:
    """What was made of the texts of a step, on its way to the host."""

    def __init__(self, vectors_sw: Tensor | None, rows_tw: Tensor | None, counts: Sequence[int]) -> None:
        """`rows_tw`: of all tokens, where a text's are asked for; `counts`: the tokens of each text."""
        self._counts = counts
        self._has_vectors, self._has_rows = vectors_sw is not None, rows_tw is not None
        self._copy = ops.HostCopy([tensor for tensor in (vectors_sw, rows_tw) if tensor is not None])

    def collect(self) -> tuple[Tensor | None, Sequence[Tensor]]:
        """Vectors [s, w], and rows [t, w] of each text, in fp32. Waits until the device has computed them."""
        tensors = self._copy.wait()
        rows = [part.clone() for part in tensors[-1].split(list(self._counts))] if self._has_rows else []
        return tensors[0] if self._has_vectors else None, rows


@dataclass(frozen=True)
class Pooler:
    """Makes vectors or logits of hidden states, for one model."""

    config: ModelConfig
    pooling: PoolingConfig
    classifier: Classifier | None
    device: torch.device

    @property
    def tasks(self) -> tuple[PoolingTask, ...]:
        """What may be asked of the model; the first is its own."""
        classifier = self.config.classifier
        if classifier is None:
            return ("embed", "token_embed")
        if self.config.task == "token_classify":
            return ("token_classify",)
        return ("classify", "score") if len(classifier.labels) == 1 else ("classify",)

    @property
    def _modes(self) -> tuple[Pooling, ...]:
        classifier = self.config.classifier
        return self.pooling.modes if classifier is None else (classifier.pooling,)

    @property
    def _width(self) -> int:
        """Length of a vector."""
        dense = self.pooling.dense
        return dense[-1].weight.shape[0] if dense else self.config.hidden_size * len(self.pooling.modes)

    @cached_property
    def info(self) -> PoolingInfo:
        """What requests are checked against."""
        classifier = self.config.classifier
        return PoolingInfo(
            architecture=self.config.architecture,
            tasks=self.tasks,
            width=self._width if classifier is None else len(classifier.labels),
            labels=() if classifier is None else classifier.labels,
            dimensions=self.pooling.dimensions,
            texts=self.pooling.texts,
        )

    def check(self, params: PoolingParams) -> None:
        """InvalidRequestError where the model cannot do what is asked for."""
        self.info.check(params)

    def num_states(self, request: Request) -> int:
        """How many of a text's last tokens need hidden states."""
        assert request.pooling is not None
        count = len(request.prompt_token_ids)
        if request.pooling.task in _OF_TOKENS:
            return count
        if self._modes == ("last",):
            return 1
        return count if "cls" in self._modes else max(1, count - request.skipped_tokens)

    def __call__(self, hidden_th: Tensor, counts: Sequence[int], tasks: Sequence[PoolingTask]) -> Pooled:
        """What is asked for of each text, from the hidden states that it needs."""
        of_tokens = [task in _OF_TOKENS for task in tasks]
        vectors = None if all(of_tokens) else self._vectors(hidden_th, counts)
        rows = None
        if any(of_tokens):
            rows = hidden_th.float() if self.classifier is None else self.classifier(hidden_th)
        return Pooled(vectors, rows, counts)

    def _vectors(self, hidden_th: Tensor, counts: Sequence[int]) -> Tensor:
        pooled_sw = torch.cat([pool(hidden_th, counts, mode) for mode in self._modes], dim=1)
        if self.classifier is not None:
            logits_sw: Tensor = self.classifier(pooled_sw)
            return logits_sw
        for dense in self.pooling.dense:
            pooled_sw = _through(dense, pooled_sw)
        return pooled_sw

    def outputs(self, params: Mapping[int, PoolingParams], pooled: Pooled) -> dict[int, PooledOutput]:
        """What the requests of a step get, by their places in it; those that ask for the same are finished together."""
        vectors_sw, rows = pooled.collect()
        found: dict[int, PooledOutput] = {}
        same: dict[PoolingParams, list[int]] = {}
        for place, each in params.items():
            same.setdefault(each, []).append(place)
        for each, places in same.items():
            if each.task in _OF_TOKENS:
                found |= {place: self._of_tokens(each, rows[place]) for place in places}
            else:
                assert vectors_sw is not None
                found |= zip(places, self._of_texts(each, vectors_sw[places]), strict=True)
        return found

    def _of_tokens(self, params: PoolingParams, rows_tw: Tensor) -> PooledOutput:
        finite = bool(rows_tw.isfinite().all())
        return PoolingOutput(self._made(params, rows_tw)) if finite else FailedOutput(_NOT_FINITE)

    def _of_texts(self, params: PoolingParams, vectors_sw: Tensor) -> Iterable[PooledOutput]:
        kinds: dict[PoolingTask, Callable[[list[float]], PooledOutput]] = {
            "embed": EmbeddingOutput,
            "classify": ClassificationOutput,
            "score": lambda scores: ScoringOutput(scores[0]),
        }
        make, finite = kinds[params.task], vectors_sw.isfinite().all(-1).tolist()
        made = self._made(params, vectors_sw).tolist()
        return (make(each) if right else FailedOutput(_NOT_FINITE) for each, right in zip(made, finite, strict=True))

    def _made(self, params: PoolingParams, found: Tensor) -> Tensor:
        """Vectors or scores of rows."""
        if params.task in ("embed", "token_embed"):
            return self._finished(found, params)
        return self._activated(found) if params.activation else found

    def _finished(self, vector: Tensor, params: PoolingParams) -> Tensor:
        if params.dimensions is not None:
            vector = vector[..., : params.dimensions]
        by_default = self.pooling.normalize and params.task == "embed"
        normalize = by_default if params.normalize is None else params.normalize
        return F.normalize(vector, dim=-1) if normalize else vector

    def _activated(self, logits: Tensor) -> Tensor:
        assert self.config.classifier is not None
        kind = self.config.classifier.activation
        if kind == "none":
            return logits
        return logits.softmax(-1) if kind == "softmax" else logits.sigmoid()


def _through(dense: DenseModule, x_sw: Tensor) -> Tensor:
    bias = None if dense.bias is None else dense.bias.to(x_sw.device)
    return _ACTIVATIONS[dense.activation](F.linear(x_sw, dense.weight.to(x_sw.device), bias))


def truncated(request: Request, longest: int) -> Request:
    """The request with its text cut as its parameters say: the end is left out, but for what ends every text."""
    params = request.pooling
    most = None if params is None else params.truncate_prompt_tokens
    if most is None:
        return request
    count = longest if most == -1 else min(most, longest)
    return replace(
        request, prompt_token_ids=request.prompt_token_ids[:count], token_type_ids=request.token_type_ids[:count]
    )
