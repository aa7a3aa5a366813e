"""What has become of a batch as FasterTransformer's output tensors.

output_ids [batch, beam, longest]: prompt and generated tokens, then the item's end_id. sequence_length and
response_input_lengths [batch, beam]. cum_log_probs [batch, beam] and output_log_probs [batch, beam, most generated],
0 behind the end, where log-probabilities are asked for.
"""

from collections.abc import Set
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from hasten.core.types import FinishReason
from hasten.server.engine.client import CompletionDelta
from hasten.server.models.token_inputs import TokenRequest
from hasten.server.types import ErrorKind, ServiceError, Tensor


@dataclass
class Beam:
    """One beam of one item, as far as it is."""

    token_ids: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)
    cumulative: float = 0.0

    def take(self, delta: CompletionDelta) -> None:
        """Add what is new; ServiceError if it cannot be continued."""
        if delta.finish_reason is FinishReason.ERROR:
            raise ServiceError(ErrorKind.INTERNAL, f"the prompt could not be continued: {delta.stop_reason}")
        self.token_ids += delta.token_ids
        if delta.cumulative_logprob is not None:
            self.cumulative = delta.cumulative_logprob
        if delta.logprobs is not None:
            pairs = zip(delta.token_ids, delta.logprobs, strict=True)
            self.log_probs += [entry[token].logprob for token, entry in pairs]


def outputs(asked: TokenRequest, rows: list[list[Beam]], names: Set[str]) -> list[Tensor]:
    """The outputs with these names, of all that there is so far; `rows` has the beams of each item."""
    made = [
        Tensor("output_ids", "UINT32", *_shaped(_tokens(asked, rows))),
        Tensor("sequence_length", "UINT32", *_shaped(_lengths(asked, rows))),
        Tensor("response_input_lengths", "INT32", *_shaped(_prompt_lengths(asked))),
    ]
    if asked.log_probs:
        cumulative = np.array([[beam.cumulative for beam in row] for row in rows], np.float32)
        made += [
            Tensor("cum_log_probs", "FP32", *_shaped(cumulative)),
            Tensor("output_log_probs", "FP32", *_shaped(_log_probs(rows))),
        ]
    return [tensor for tensor in made if tensor.name in names]


def _shaped(data: NDArray[np.generic]) -> tuple[tuple[int, ...], NDArray[np.generic]]:
    return data.shape, data


def _lengths(asked: TokenRequest, rows: list[list[Beam]]) -> NDArray[np.uint32]:
    pairs = zip(asked.items, rows, strict=True)
    return np.array([[len(item.prompt) + len(beam.token_ids) for beam in row] for item, row in pairs], np.uint32)


def _prompt_lengths(asked: TokenRequest) -> NDArray[np.int32]:
    return np.array([[len(item.prompt)] * asked.beam_width for item in asked.items], np.int32)


def _tokens(asked: TokenRequest, rows: list[list[Beam]]) -> NDArray[np.uint32]:
    longest = int(_lengths(asked, rows).max())
    made = np.empty((len(rows), asked.beam_width, longest), np.uint32)
    for place, (item, row) in enumerate(zip(asked.items, rows, strict=True)):
        made[place, :, : len(item.prompt)] = item.prompt
        for index, beam in enumerate(row):
            end = len(item.prompt) + len(beam.token_ids)
            made[place, index, len(item.prompt) : end] = beam.token_ids
            made[place, index, end:] = item.end_id
    return made


def _log_probs(rows: list[list[Beam]]) -> NDArray[np.float32]:
    most = max(len(beam.token_ids) for row in rows for beam in row)
    made = np.zeros((len(rows), len(rows[0]), most), np.float32)
    for place, row in enumerate(rows):
        for index, beam in enumerate(row):
            made[place, index, : len(beam.log_probs)] = beam.log_probs
    return made
