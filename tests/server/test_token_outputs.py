"""Output tensors that grow, against those made of lists at once."""

import numpy as np
import pytest

from hasten.core.types import FinishReason, SamplingParams
from hasten.server.engine.wire import CompletionDelta, Logprob
from hasten.server.models.token_inputs import Item, TokenRequest
from hasten.server.models.token_model import BatchOutput
from hasten.server.types import ServiceError, Tensor

ALL = frozenset({"output_ids", "sequence_length", "response_input_lengths", "cum_log_probs", "output_log_probs"})


def asked(prompts: list[list[int]], beam_width: int = 1, log_probs: bool = False) -> TokenRequest:
    items = [Item(prompt, SamplingParams(max_tokens=1), 100 + position) for position, prompt in enumerate(prompts)]
    return TokenRequest(items, beam_width, log_probs)


def delta(index: int, tokens: list[int], log_probs: list[float] | None = None) -> CompletionDelta:
    result = CompletionDelta(index, tokens, "")
    if log_probs is not None:
        pairs = zip(tokens, log_probs, strict=True)
        result.logprobs = [{token: Logprob(logprob=value, rank=1, decoded_token=None)} for token, value in pairs]
        result.cumulative_logprob = sum(log_probs)
    return result


def lists(tensors: list[Tensor]) -> dict[str, object]:
    for tensor in tensors:
        assert tensor.data.shape == tensor.shape
    return {tensor.name: tensor.data.tolist() for tensor in tensors}


def test_each_beam_is_filled_behind_its_own_end() -> None:
    output = BatchOutput(asked([[1, 2, 3], [4]], beam_width=2))
    output.take(0, delta(1, [5, 6]))
    output.take(1, delta(0, [7, 8, 9, 10]))
    output.take(0, delta(1, [11]))
    assert lists(output.tensors(ALL)()) == {
        "output_ids": [
            [[1, 2, 3, 100, 100, 100], [1, 2, 3, 5, 6, 11]],
            [[4, 7, 8, 9, 10, 101], [4, 101, 101, 101, 101, 101]],
        ],
        "sequence_length": [[3, 6], [5, 1]],
        "response_input_lengths": [[3, 3], [1, 1]],
    }


def test_any_number_of_tokens_finds_room() -> None:
    rng = np.random.default_rng(0)
    output, known = BatchOutput(asked([[1], [2, 3]], log_probs=True)), [[1], [2, 3]]
    for _ in range(60):
        position, count = int(rng.integers(2)), int(rng.integers(1, 9))
        tokens = rng.integers(1000, size=count).tolist()
        output.take(position, delta(0, tokens, [-0.5] * count))
        known[position] += tokens
    found = output.tensors(ALL)()
    values = {tensor.name: tensor.data for tensor in found}
    for position, tokens in enumerate(known):
        generated = len(tokens) - position - 1
        assert values["output_ids"][position, 0].tolist()[: len(tokens)] == tokens
        assert set(values["output_ids"][position, 0, len(tokens) :].tolist()) <= {100 + position}
        assert values["output_log_probs"][position, 0].tolist()[:generated] == [-0.5] * generated
        assert not values["output_log_probs"][position, 0, generated:].any()
    assert [tensor.datatype for tensor in found] == ["UINT32", "UINT32", "INT32", "FP32", "FP32"]
    assert [tensor.data.dtype for tensor in found] == [np.uint32, np.uint32, np.int32, np.float32, np.float32]


def test_a_snapshot_is_of_its_own_moment() -> None:
    """A thread may make tensors of it while more tokens come, whether or not they fit the memory that there is."""
    output = BatchOutput(asked([[1]], log_probs=True))
    output.take(0, delta(0, [2, 3], [-1.0, -2.0]))
    snapshot = output.tensors(ALL)
    for _ in range(40):
        output.take(0, delta(0, [4, 5, 6], [-1.0] * 3))
    found = lists(snapshot())
    assert found["output_ids"] == [[[1, 2, 3]]]
    assert found["output_log_probs"] == [[[-1.0, -2.0]]]
    assert found["cum_log_probs"] == [[-3.0]]


def test_beams_have_their_own_log_probabilities() -> None:
    for wanted in (True, False):
        output = BatchOutput(asked([[1]], beam_width=2, log_probs=wanted))
        for index in range(2):
            beam = delta(index, [2, 3])
            beam.cumulative_logprob, beam.token_logprobs = -3.5, [-1.0, -2.5]
            output.take(0, beam)
        found = lists(output.tensors(ALL)())
        assert found.get("output_log_probs") == ([[[-1.0, -2.5], [-1.0, -2.5]]] if wanted else None)


def test_what_cannot_be_continued_is_an_error() -> None:
    wrong = delta(0, [])
    wrong.finish_reason, wrong.stop_reason = FinishReason.ERROR, "why"
    with pytest.raises(ServiceError, match="could not be continued: why"):
        BatchOutput(asked([[1]])).take(0, wrong)
