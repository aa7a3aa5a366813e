"""From hidden states of texts to vectors or scores: on the device up to vectors and logits, on the host the rest.

Shapes: t tokens of the flat batch, s texts, h hidden, w width of a vector, or labels, m masks, k words of a mask.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate, chain, repeat
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention
from torch import Tensor

from hasten import ops
from hasten.checkpoint.pooling import DenseModule, PoolingConfig
from hasten.core.errors import InvalidRequestError
from hasten.core.model_config import ModelConfig, Pooling
from hasten.core.types import (
    ClassificationOutput,
    EmbeddingOutput,
    FailedOutput,
    FilledMask,
    FillMaskOutput,
    PooledOutput,
    PoolingOutput,
    PoolingParams,
    PoolingTask,
    Request,
    ScoringOutput,
)
from hasten.engine.pooling_info import PoolingInfo
from hasten.layers.classifier import Classifier, MaskedWords

_OF_TOKENS: tuple[PoolingTask, ...] = ("token_embed", "token_classify")
_LOGITS_ROWS = 256
"""Masks whose logits are there at a time: a vocabulary of 250,000 words takes 1 MB for each."""
_LEAST_LENGTH = np.float32(1e-12)
"""Shorter vectors are divided by this."""
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
        weights_t = torch.arange(1, len(hidden_th) + 1, device=device) - starts_t
        wide_th = wide_th * weights_t.unsqueeze(1)
        weights_s = lengths_s * (lengths_s + 1) // 2
    total_sh = torch.segment_reduce(wide_th, "sum", lengths=lengths_s, axis=0, unsafe=True)
    return total_sh / (weights_s.sqrt() if mode == "mean_sqrt_len" else weights_s).unsqueeze(1)


def normalized(vectors: Tensor) -> Tensor:
    """Vectors of length 1, those of zeros as they are: [..., w] in fp32 on the host.

    By numpy, in this thread: torch's threads wait for each other, which on busy CPUs may take as long as the next step
    takes a GPU.
    """
    numbers = vectors.numpy()
    lengths = np.sqrt(np.square(numbers).sum(-1, keepdims=True))
    return torch.from_numpy(numbers / np.maximum(lengths, _LEAST_LENGTH))


class Pooled:
    """What was made of the texts of a step, on its way to the host."""

    def __init__(
        self,
        vectors_sw: Tensor | None,
        rows_tw: Tensor | None,
        counts: Sequence[int],
        words: "Sequence[Words]" = (),
        masks: Sequence[int] = (),
    ) -> None:
        """`rows_tw`: of all tokens, where a text's are asked for; `counts`: tokens of each text; `masks`: its masks."""
        self._counts, self._masks = counts, masks
        self._has_vectors, self._has_rows = vectors_sw is not None, rows_tw is not None
        self._of_words = [masks_m for masks_m, _ in words]
        tensors = (vectors_sw, rows_tw, *(best for _, best in words))
        self._copy = ops.HostCopy([tensor for tensor in tensors if tensor is not None])

    def collect(self) -> "tuple[Tensor | None, Sequence[Tensor], Sequence[Sequence[Tensor]]]":
        """Vectors [s, w], rows [t, w] of each text, and [2, k] of each of its masks: ids of words and their scores.

        All are in fp32. Waits until the device has computed them.
        """
        tensors = self._copy.wait()
        words = tensors[len(tensors) - len(self._of_words) :]
        rows = tensors[int(self._has_vectors)].split(list(self._counts)) if self._has_rows else ()
        by_mask = {
            mask: best_2k
            for masks_m, best_m2k in zip(self._of_words, words, strict=True)
            for mask, best_2k in zip(masks_m, best_m2k, strict=True)
        }
        ends = list(accumulate(self._masks))
        of_texts = [[by_mask[mask] for mask in range(end - n, end)] for n, end in zip(self._masks, ends, strict=True)]
        return tensors[0] if self._has_vectors else None, [part.clone() for part in rows], of_texts


Words = tuple[Sequence[int], Tensor]
"""Some of the masks of a step, by their numbers, and ids of words with their scores, [m, 2, k]."""


@dataclass(frozen=True)
class Pooler:
    """Makes vectors or logits of hidden states, for one model."""

    config: ModelConfig
    pooling: PoolingConfig
    classifier: Classifier | None
    masked_words: MaskedWords | None
    device: torch.device

    @property
    def tasks(self) -> tuple[PoolingTask, ...]:
        """What may be asked of the model; the first is its own."""
        classifier = self.config.classifier
        if classifier is None:
            return ("embed", "token_embed") if self.masked_words is None else ("embed", "token_embed", "fill_mask")
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

    @cached_property
    def needs_first(self) -> bool:
        """Whether hidden states are needed of a text's first tokens, and not of its last.

        Where vectors are made of the first alone, and attention of the last layer looks at no positions: there the
        queries of a text would else have to be its last tokens.
        """
        attention = self.config.attention_of(self.config.num_layers - 1)
        looks = attention.causal or attention.window is not None or attention.position == "alibi"
        return self._modes == ("cls",) and self.masked_words is None and not (looks or attention.relative_buckets)

    def num_states(self, request: Request) -> int:
        """How many of a text's last tokens, or first, need hidden states."""
        assert request.pooling is not None
        count = len(request.prompt_token_ids)
        if request.pooling.task in _OF_TOKENS:
            return count
        if request.masks:
            return count - request.masks[0]
        if self._modes == ("last",) or self.needs_first:
            return 1
        return count if "cls" in self._modes else max(1, count - request.skipped_tokens)

    def __call__(
        self,
        hidden_th: Tensor,
        counts: Sequence[int],
        params: Sequence[PoolingParams],
        masks: Sequence[int],
        mask_rows: Sequence[int],
    ) -> Pooled:
        """What is asked for of each text, from the hidden states that it needs, `counts` of them.

        `masks`: how many masks of each text are to be filled, `mask_rows`: where all these are among the hidden states.
        """
        tasks = {each.task for each in params}
        vectors = self._vectors(hidden_th, counts) if tasks - {"fill_mask", *_OF_TOKENS} else None
        rows = None
        if not tasks.isdisjoint(_OF_TOKENS):
            rows = hidden_th.float() if self.classifier is None else self.classifier(hidden_th)
        of_masks = list(chain.from_iterable(repeat(each, n) for each, n in zip(params, masks, strict=True)))
        return Pooled(vectors, rows, counts, self._words(hidden_th, mask_rows, of_masks), masks)

    def mask_logits(self, hidden_th: Tensor, rows: Sequence[int]) -> Iterable[tuple[int, Tensor | None]]:
        """Logits of masks by their rows among the hidden states, piece by piece, behind the number of its first.

        They are [m, v] on rank 0, and None on the others, which must go through all of them too.
        """
        for start in range(0, len(rows), _LOGITS_ROWS):
            assert self.masked_words is not None, "masks of others are refused"
            piece = ops.to_device(rows[start : start + _LOGITS_ROWS], torch.int64, self.device)
            yield start, self.masked_words(hidden_th[piece])

    def _words(self, hidden_th: Tensor, rows: Sequence[int], params: Sequence[PoolingParams]) -> list[Words]:
        """The most probable words of each mask, those together that ask for the same."""
        found: list[Words] = []
        for start, logits_mv in self.mask_logits(hidden_th, rows):
            assert logits_mv is not None, "rank 0 alone fills masks"
            same: dict[PoolingParams, list[int]] = {}
            for mask in range(start, start + len(logits_mv)):
                same.setdefault(params[mask], []).append(mask)
            for each, masks in same.items():
                own = logits_mv if len(same) == 1 else logits_mv[[mask - start for mask in masks]]
                found.append((masks, self._best(own.float(), each)))
        return found

    def _best(self, logits_mv: Tensor, params: PoolingParams) -> Tensor:
        """Ids of words and their scores, [m, 2, k]. Ids are exact in fp32 up to 2^24."""
        scores_mv = logits_mv.softmax(-1) if params.activation else logits_mv
        if not params.targets:
            scores_mk, ids_mk = scores_mv.topk(params.top_k, dim=-1)
        else:
            targets_n = ops.to_device(list(params.targets), torch.int64, self.device)
            scores_mk, best_mk = scores_mv[:, targets_n].topk(min(params.top_k, len(targets_n)), dim=-1)
            ids_mk = targets_n[best_mk]
        return torch.stack((ids_mk.float(), scores_mk), dim=1)

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
        vectors_sw, rows, words = pooled.collect()
        found: dict[int, PooledOutput] = {}
        same: dict[PoolingParams, list[int]] = {}
        before, indices = None, list[int]()
        for index, each in params.items():
            if each is not before:  # texts of one call have their parameters in common, whose hash takes longest
                before, indices = each, same.setdefault(each, [])
            indices.append(index)
        for each, indices in same.items():
            if each.task in _OF_TOKENS:
                found |= {index: self._of_tokens(each, rows[index]) for index in indices}
            elif each.task == "fill_mask":
                found |= {index: _of_masks(words[index]) for index in indices}
            else:
                assert vectors_sw is not None
                own_sw = torch.from_numpy(vectors_sw.numpy()[indices])
                found |= zip(indices, self._of_texts(each, own_sw), strict=True)
        return found

    def _of_tokens(self, params: PoolingParams, rows_tw: Tensor) -> PooledOutput:
        finite = bool(rows_tw.isfinite().all())
        return PoolingOutput(self._results_of(params, rows_tw)) if finite else FailedOutput(_NOT_FINITE)

    def _of_texts(self, params: PoolingParams, vectors_sw: Tensor) -> Iterable[PooledOutput]:
        kinds: dict[PoolingTask, Callable[[Any], PooledOutput]] = {
            "embed": EmbeddingOutput,
            "classify": ClassificationOutput,
            "score": lambda scores: ScoringOutput(scores[0]),
        }
        make, finite = kinds[params.task], np.isfinite(vectors_sw.numpy()).all(-1).tolist()
        results_sw = self._results_of(params, vectors_sw)
        # who reads a vector's numbers as Python's pays for them, which takes longer than all else here
        values = results_sw.numpy() if params.task == "embed" else results_sw.tolist()
        return (make(each) if right else FailedOutput(_NOT_FINITE) for each, right in zip(values, finite, strict=True))

    def _results_of(self, params: PoolingParams, found: Tensor) -> Tensor:
        """Vectors or scores of rows."""
        if params.task in ("embed", "token_embed"):
            return self._finished(found, params)
        return self._activated(found) if params.activation else found

    def _finished(self, vector: Tensor, params: PoolingParams) -> Tensor:
        if params.dimensions is not None:
            vector = vector[..., : params.dimensions]
        by_default = self.pooling.normalize and params.task == "embed"
        normalize = by_default if params.normalize is None else params.normalize
        return normalized(vector) if normalize else vector

    def _activated(self, logits: Tensor) -> Tensor:
        assert self.config.classifier is not None
        kind = self.config.classifier.activation
        if kind == "none":
            return logits
        return logits.softmax(-1) if kind == "softmax" else logits.sigmoid()


def _of_masks(words: Sequence[Tensor]) -> PooledOutput:
    if not all(bool(best_2k.isfinite().all()) for best_2k in words):
        return FailedOutput(_NOT_FINITE)
    numbers = (best_2k.tolist() for best_2k in words)
    return FillMaskOutput(
        [[FilledMask(score, int(token)) for token, score in zip(ids, scores, strict=True)] for ids, scores in numbers]
    )


def _through(dense: DenseModule, x_sw: Tensor) -> Tensor:
    bias = None if dense.bias is None else dense.bias.to(x_sw.device)
    return _ACTIVATIONS[dense.activation](F.linear(x_sw, dense.weight.to(x_sw.device), bias))


def generates_text(what: str, architecture: str) -> InvalidRequestError:
    """The error of a call or a request that needs vectors, scores or labels, for a model that has none."""
    return InvalidRequestError(
        f"{what} needs a model that gives vectors, scores or labels of texts; {architecture} generates text"
    )


def truncated(request: Request, longest: int) -> Request:
    """The request with its text cut as its parameters say: the end is left out, but for what ends every text."""
    params = request.pooling
    most = None if params is None else params.truncate_prompt_tokens
    if most is None:
        return request
    count = longest if most == -1 else min(most, longest)
    return replace(
        request,
        prompt_token_ids=request.prompt_token_ids[:count],
        token_type_ids=request.token_type_ids[:count],
        masks=tuple(position for position in request.masks if position < count),
    )
