import asyncio
import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.server.engine_helpers import until
from tests.server.service_fixtures import DEMO, LONGEST, Outputs, Running, demo, streaming, token_request
from tests.server.transport_fixtures import workers

from hasten.core.config import EngineConfig
from hasten.core.types import SamplingParams
from hasten.engine.llm import LLM
from hasten.engine.text import Tokenizer
from hasten.server import by_size
from hasten.server.engine.client import EngineClient
from hasten.server.models import token_model
from hasten.server.models.interfaces import INTERFACES, Kind
from hasten.server.protocol.tensors import NUMPY
from hasten.server.service import Service
from hasten.server.types import ErrorKind, InferRequest, InferResponse, ServiceError, Tensor

pytestmark = pytest.mark.any_python

__all__ = ["demo", "streaming"]

PROMPTS = [[9, 10, 304, 262], [5], [260, 971, 317, 322, 70, 430, 12], [700, 701]]
END = 2
TOKENS = ("output_ids", "sequence_length")


def engine(running: Running) -> EngineClient:
    return running.service.engines()["fastertransformer", "1"]


def alone(running: Running, prompt: list[int], length: int, **inputs: Any) -> list[int]:
    """Prompt and completion of a request with one item."""
    response = running.infer(token_request([prompt], length, **inputs), TOKENS)
    row: list[int] = response["output_ids"][0][0]
    return row[: response["sequence_length"][0][0]]


def without_padding(made: Outputs) -> list[list[int]]:
    pairs = zip(made["output_ids"], made["sequence_length"], strict=True)
    return [row[0][: lengths[0]] for row, lengths in pairs]


def test_the_tokens_are_those_of_the_offline_engine(demo: Running) -> None:
    params = SamplingParams(temperature=0, max_tokens=12, logprobs=0)
    with LLM(DEMO, max_model_len=LONGEST) as llm:
        expected = llm.generate(PROMPTS, params)
    response = demo.infer(token_request(PROMPTS, 12, is_return_log_probs=True))
    assert set(response) == {*TOKENS, "response_input_lengths", "cum_log_probs", "output_log_probs"}
    assert without_padding(response) == [
        [*prompt, *output.outputs[0].token_ids] for prompt, output in zip(PROMPTS, expected, strict=True)
    ]
    assert response["response_input_lengths"] == [[len(prompt)] for prompt in PROMPTS]
    np.testing.assert_allclose(
        np.array(response["cum_log_probs"])[:, 0], [o.outputs[0].cumulative_logprob or 0 for o in expected], atol=1e-3
    )
    for row, output in zip(response["output_log_probs"], expected, strict=True):
        each = [entry[token].logprob for token, entry in zip(output.outputs[0].token_ids, output.outputs[0].logprobs or (), strict=True)]  # fmt: skip  # noqa: E501
        np.testing.assert_allclose(row[0], each, atol=1e-4)


def test_ragged_batches_give_what_single_requests_give(demo: Running) -> None:
    lengths = [7, 1, 15, 4]
    response = demo.infer(token_request(PROMPTS, lengths))
    single = [alone(demo, prompt, length) for prompt, length in zip(PROMPTS, lengths, strict=True)]
    assert without_padding(response) == single
    longest = max(map(len, single))
    assert np.shape(response["output_ids"]) == (4, 1, longest)
    for row, known in zip(response["output_ids"], single, strict=True):
        assert row[0][len(known) :] == [END] * (longest - len(known))
    assert "cum_log_probs" not in response


def test_each_item_has_its_own_parameters(demo: Running) -> None:
    each: dict[str, Any] = {
        "runtime_top_k": [[0], [20], [0], [20]],
        "runtime_top_p": [[0.0], [0.0], [0.9], [0.8]],
        "temperature": [[1.0], [1.5], [0.7], [1.2]],
        "random_seed": [[1], [2], [3], [2**64 - 1]],
        "repetition_penalty": [[1.0], [1.3], [1.0], [1.1]],
        "presence_penalty": [[0.0], [0.0], [1.5], [-1.0]],
        "min_length": [[0], [8], [1], [12]],
        "end_id": [[2], [2], [304], [5000]],
    }
    response = demo.infer(token_request(PROMPTS, [12, 9, 10, 12], **each))
    for index, tokens in enumerate(without_padding(response)):
        own: dict[str, Any] = {name: [values[index]] for name, values in each.items()}
        assert tokens == alone(demo, PROMPTS[index], [12, 9, 10, 12][index], **own)
    assert len(without_padding(response)[1]) == len(PROMPTS[1]) + 9
    assert response["output_ids"][3][0][-1] != END or len(without_padding(response)[3]) == len(
        response["output_ids"][3][0]
    )


def test_a_seed_is_0_unless_given_and_always_gives_the_same(demo: Running) -> None:
    def drawn(**inputs: Any) -> list[int]:
        return alone(demo, PROMPTS[0], 12, runtime_top_k=50, temperature=2.0, **inputs)

    assert drawn() == drawn() == drawn(random_seed=0)
    assert drawn() != drawn(random_seed=1)
    same = demo.infer(token_request([PROMPTS[0]] * 3, 12, runtime_top_k=50, temperature=2.0))
    assert without_padding(same) == [drawn()] * 3


def test_top_k_1_or_nothing_is_greedy_whatever_the_temperature(demo: Running) -> None:
    greedy = alone(demo, PROMPTS[0], 10)
    assert greedy == alone(demo, PROMPTS[0], 10, runtime_top_k=1, temperature=9.0)
    assert greedy == alone(demo, PROMPTS[0], 10, runtime_top_k=0, runtime_top_p=0.0, temperature=9.0)
    assert greedy == alone(demo, PROMPTS[0], 10, runtime_top_k=1, runtime_top_p=0.9, len_penalty=1.0, beam_width=1)


def test_stop_words_and_bad_words(demo: Running) -> None:
    free = alone(demo, PROMPTS[0], 12)[len(PROMPTS[0]) :]
    words = [[[free[4], free[5], 999], [2, 3, -1]], [[0, 0, 0], [-1, -1, -1]]]
    response = demo.infer(token_request([PROMPTS[0]] * 2, 12, stop_words_list=words))
    stopped, other = without_padding(response)
    assert stopped == [*PROMPTS[0], *free[:6]]
    assert other == [*PROMPTS[0], *free]
    banned = alone(demo, PROMPTS[0], 12, bad_words_list=[[[free[2], free[4], free[5]], [1, 3, -1]]])
    assert free[2] not in banned[len(PROMPTS[0]) :]
    assert (free[4], free[5]) not in itertools.pairwise(banned)


def test_what_fastertransformer_has_no_input_for_comes_in_the_parameters(demo: Running) -> None:
    def drawn(length: int = 6, **parameters: Any) -> list[list[int]]:
        request = token_request(PROMPTS[:2], length)
        request.parameters = parameters
        result = without_padding(demo.infer(request, TOKENS))
        return [row[len(prompt) :] for row, prompt in zip(result, PROMPTS, strict=False)]

    assert drawn(logit_bias='{"304": 100}') == drawn(allowed_token_ids="[304]") == [[304] * 6] * 2
    tokenizer = Tokenizer.from_folder(DEMO)
    texts = [tokenizer.decode([token for token in row if token != END]) for row in drawn(30, regex="ab|cd")]
    assert set(texts) <= {"ab", "cd"}
    assert drawn(30, frequency_penalty=2.0) != drawn(30)
    request = token_request(PROMPTS, 4)
    request.parameters = {"logit_bias": '{"5000": 1}'}
    assert "logit_bias" in str(demo.refused(request))
    request.parameters = {"top_k": 3}
    assert str(demo.refused(request)).startswith("parameter 'top_k' is not known to model 'fastertransformer'")


def test_an_end_token(demo: Running) -> None:
    free = alone(demo, PROMPTS[0], 12)[len(PROMPTS[0]) :]
    response = demo.infer(token_request([PROMPTS[0], PROMPTS[1]], 12, end_id=[[free[3]], [END]]))
    assert without_padding(response)[0] == [*PROMPTS[0], *free[: free.index(free[3]) + 1]]
    row = response["output_ids"][0][0]
    assert set(row[response["sequence_length"][0][0] :]) <= {free[3]}


def test_beams(demo: Running) -> None:
    options: dict[str, Any] = {"beam_width": 3, "is_return_log_probs": True}
    params = SamplingParams(beam_width=3, n=3, max_tokens=8, length_penalty=0)
    with LLM(DEMO, max_model_len=LONGEST) as llm:
        expected = llm.generate(PROMPTS[:2], params)
    response = demo.infer(token_request(PROMPTS[:2], 8, runtime_top_k=1, runtime_top_p=0.0, temperature=1.0, **options))
    assert np.shape(response["output_ids"])[:2] == (2, 3)
    assert np.shape(response["sequence_length"]) == np.shape(response["cum_log_probs"]) == (2, 3)
    assert response["response_input_lengths"] == [[4] * 3, [1] * 3]
    for item, output in enumerate(expected):
        for beam, completion in enumerate(output.outputs):
            end = response["sequence_length"][item][beam]
            assert response["output_ids"][item][beam][:end] == [*PROMPTS[item], *completion.token_ids]
            assert set(response["output_ids"][item][beam][end:]) <= {END}
            assert response["cum_log_probs"][item][beam] == pytest.approx(completion.cumulative_logprob, abs=1e-3)
            each = response["output_log_probs"][item][beam]
            assert sum(each) == pytest.approx(response["cum_log_probs"][item][beam], abs=2e-3)
            assert each[len(completion.token_ids) :] == [0] * (len(each) - len(completion.token_ids))


def test_beams_of_a_sequence_as_long_as_can_be(demo: Running) -> None:
    prompt = [int(token) for token in np.random.default_rng(0).integers(5, 1000, LONGEST - 4)]
    response = demo.infer(token_request([prompt], 50, beam_width=2, is_return_log_probs=True, end_id=5000))
    assert response["sequence_length"] == [[LONGEST] * 2]
    np.testing.assert_allclose(np.sum(response["output_log_probs"], axis=2), response["cum_log_probs"], atol=2e-3)


def test_beams_options(demo: Running) -> None:
    def beams(**inputs: Any) -> Any:
        return demo.infer(token_request([PROMPTS[0]], 10, beam_width=3, end_id=17, **inputs))["output_ids"]

    plain = beams()
    assert plain == beams(len_penalty=0.0)  # FasterTransformer's default: short beams are not at a disadvantage
    assert plain != beams(len_penalty=1.0)
    assert plain != beams(beam_search_diversity_rate=5.0)


def test_no_tokens_begin_with_the_start_token(demo: Running) -> None:
    response = demo.infer(token_request([[], PROMPTS[0]], 5))
    assert without_padding(response)[0] == alone(demo, [1], 5)
    assert response["response_input_lengths"] == [[1], [4]]
    assert alone(demo, [], 5, start_id=304) == alone(demo, [304], 5)


def test_values_that_ask_for_nothing_are_taken(demo: Running) -> None:
    nothing: dict[str, Any] = {
        "prompt_learning_task_name_ids": 0,
        "request_prompt_lengths": 0,
        "request_prompt_type": 0,
        "request_prompt_embedding": np.zeros((1, 0, 8)),
        "is_return_context_embeddings": False,
        "top_p_decay": 1.0,
        "top_p_min": 1e-6,
        "top_p_reset_ids": 7,
    }
    assert alone(demo, PROMPTS[0], 6, runtime_top_p=0.5, random_seed=3, **nothing) == alone(
        demo, PROMPTS[0], 6, runtime_top_p=0.5, random_seed=3
    )


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (
            {"is_return_context_embeddings": [[False], [True]]},
            "item 1 of the batch: input 'is_return_context_embeddings'",
        ),
        ({"prompt_learning_task_name_ids": 3}, "'prompt_learning_task_name_ids' is 3, which is not supported"),
        ({"request_prompt_lengths": 3}, "'request_prompt_lengths' is 3, which is not supported"),
        ({"request_prompt_type": 1}, "'request_prompt_type' is 1, which is not supported"),
        ({"request_prompt_embedding": np.zeros((2, 1, 4))}, "'request_prompt_embedding' is not supported"),
        ({"top_p_decay": 0.5}, "'top_p_decay' is 0.5, which is not supported"),
        ({"runtime_top_p": 0.5, "top_p_min": 0.75}, "'top_p_min' is 0.75, which is not supported above runtime_top_p"),
    ],
)
def test_what_is_not_supported(demo: Running, inputs: dict[str, Any], message: str) -> None:
    error = demo.refused(token_request(PROMPTS[:2], 4, **inputs))
    assert error.kind is ErrorKind.UNSUPPORTED
    assert message in str(error)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (
            {"beam_width": [[1], [2]]},
            "item 1 of the batch: input 'beam_width' is 2, but 1 for item 0; send two requests",
        ),
        ({"beam_width": 0}, "item 0 of the batch: beam_width must be at least 1, got 0"),
        ({"beam_width": 2**32 - 1}, "'beam_width' is 4294967295; more than 256 sequences at once"),
        ({"beam_width": 2, "runtime_top_k": 5}, "'runtime_top_k' is 5, which is not supported with beam_width above 1"),
        ({"beam_width": 2, "temperature": 0.5}, "temperature must be left at 1.0 with beam_width above 1, got 0.5"),
        ({"len_penalty": 0.5}, "item 0 of the batch: len_penalty needs beam_width above 1, got 0.5"),
        ({"runtime_top_p": [[0.5], [1.5]]}, "item 1 of the batch: input 'runtime_top_p' must be from 0 to 1, got 1.5"),
        ({"runtime_top_p": float("nan")}, "input 'runtime_top_p' must be from 0 to 1, got nan"),
        ({"temperature": -1.0}, "item 0 of the batch: input 'temperature' must not be negative, got -1.0"),
        ({"temperature": float("inf"), "runtime_top_k": 4}, "temperature must be finite"),
        ({"repetition_penalty": 0.0}, "repetition_penalty must be from 1e-20 to 1e20, got 0.0"),
        ({"presence_penalty": 3.0}, "presence_penalty must be from -2 to 2, got 3.0"),
        ({"min_length": [[1], [9]]}, "item 1 of the batch: min_length must be at most request_output_len (4), got 9"),
        ({"stop_words_list": [[[1], [2]]] * 2}, "input 'stop_words_list' has offsets [2]: they must grow, and end at"),
        ({"stop_words_list": [[[1, 2], [-1, 1]]] * 2}, "has offsets [-1, 1]: after -1 there must be -1 alone"),
        ({"bad_words_list": [[[1, 2], [1, 1]]] * 2}, "'bad_words_list' has offsets [1, 1]: they must grow"),
        ({"bad_words_list": [[[1, 1024], [1, 2]]] * 2}, "has the word [1024]; token ids are from 0 to 1023"),
        ({"bad_words_list": [[[-5], [1]]] * 2}, "has the word [-5]; token ids are from 0 to 1023"),
    ],
)
def test_values_that_are_wrong(demo: Running, inputs: dict[str, Any], message: str) -> None:
    error = demo.refused(token_request(PROMPTS[:2], 4, **inputs))
    assert error.kind in (ErrorKind.INVALID, ErrorKind.UNSUPPORTED)
    assert message in str(error)


def test_prompts_that_are_wrong(demo: Running) -> None:
    def refused(request: InferRequest) -> str:
        error = demo.refused(request)
        assert error.kind is ErrorKind.INVALID
        return str(error)

    assert refused(token_request([[5], [1024]], 4)) == (
        "item 1 of the batch: input 'input_ids' has token id 1024; the vocabulary ends at 1023"
    )
    assert "item 1 of the batch: input 'input_ids' has 192 tokens; with at least one to come" in refused(
        token_request([[5], [5] * LONGEST], 4)
    )
    assert "input 'start_id' has token id 5000" in refused(token_request([[]], 4, start_id=5000))
    assert "request_output_len must be at least 1, got 0" in refused(token_request([[5]], 0))
    request = token_request([[5, 6]], 4)
    request.inputs[1].data[0, 0] = 3
    assert "'input_lengths' is 3, but 'input_ids' has 2 tokens an item" in refused(request)
    request = token_request([[5, 6]], 4)
    request.inputs[2] = Tensor("request_output_len", "UINT32", (1, 2), np.full((1, 2), 4, np.uint32))
    assert "item 0 of the batch: input 'request_output_len' has 2 values, but an item has one" in refused(request)
    request = token_request([[5, 6]], 4)
    request.parameters["max_tokens"] = 3
    assert refused(request) == "parameter 'max_tokens' is not known to model 'fastertransformer'"


def test_parameters_that_do_not_concern_sampling_are_ignored(demo: Running) -> None:
    request = token_request([[5, 6]], 4)
    request.parameters["client_version"] = "3"
    assert demo.infer(request)["sequence_length"] == [[6]]


def test_streams_grow(streaming: Running) -> None:
    lengths = [12, 3, 6, 1]
    responses = streaming.streamed(token_request(PROMPTS, lengths, is_return_log_probs=True))
    assert [final for _, final in responses] == [False] * (len(responses) - 1) + [True]
    last = responses[-1][0]
    for result, _ in responses:
        for index, prompt in enumerate(PROMPTS):
            end = result["sequence_length"][index][0]
            known = result["output_ids"][index][0][:end]
            assert len(prompt) <= end
            assert known == last["output_ids"][index][0][:end]
            assert len(result["output_log_probs"][index][0]) >= end - len(prompt)
    assert without_padding(last) == [
        streaming.stream(token_request([prompt], length))[-1][0]["output_ids"][0][0]
        for prompt, length in zip(PROMPTS, lengths, strict=True)
    ]


def test_outputs_are_made_beside_the_loop(streaming: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """As those of a large batch are, each time that there is more of it."""
    monkeypatch.setattr(by_size, "SMALL", -1)
    used = workers(monkeypatch, token_model, "_behind")
    request = token_request(PROMPTS, 30)
    found = streaming.stream(request)
    assert found[-1][0]["sequence_length"] == [[len(prompt) + 30] for prompt in PROMPTS]
    assert len(used) == len(found)
    assert {name.rpartition("_")[0] for name in used} == {"by-size"}


def test_beams_stream_when_they_are_done(streaming: Running) -> None:
    responses = streaming.stream(token_request(PROMPTS[:1], 5, beam_width=2))
    assert [final for _, final in responses][-1]
    assert np.shape(responses[-1][0]["output_ids"])[:2] == (1, 2)


def test_a_stream_that_fails_says_so_and_the_next_one_works(streaming: Running) -> None:
    error = streaming.refused(token_request([[5], [5000]], 4))
    assert error.kind is ErrorKind.INVALID
    assert streaming.stream(token_request([[5]], 4))[-1][1]


def test_the_configuration_of_the_engine_is_the_services(demo: Running) -> None:
    assert engine(demo).info.max_model_len == LONGEST
    assert EngineConfig.create(str(DEMO), max_model_len=LONGEST).scheduler.max_model_len == LONGEST


INTERFACE = INTERFACES[Kind.TOKEN].inputs
SHAPES = st.lists(st.sampled_from([0, 1, 1, 1, 2, 2, 3, 5]), max_size=4).map(tuple)
NUMBERS = st.sampled_from([0, 0, 1, 1, 2, 3, 5, 7, 100, 1023, 1024, 2**31 - 1, -1, -2, 0.5, float("nan"), float("inf"), 2**32 - 1, 2**63])  # fmt: skip  # noqa: E501


@st.composite
def malformed(draw: st.DrawFn) -> InferRequest:
    """Inputs that mostly have the right names, and often the right types and shapes."""
    inputs = []
    batch = draw(st.sampled_from([1, 1, 2, 3]))
    for rule in INTERFACE:
        if rule.optional and draw(st.integers(0, 3)):
            continue
        shape = (batch, *(draw(st.sampled_from([1, 1, 2, 4])) if dim == -1 else dim for dim in rule.dims))
        datatype = rule.datatype
        if not draw(st.integers(0, 19)):
            shape = draw(SHAPES)
        if not draw(st.integers(0, 29)):
            datatype = draw(st.sampled_from([*NUMPY, "", "FLOAT"]))
        dtype = NUMPY.get(datatype, np.dtype("<f4"))
        size = int(np.prod(shape)) if draw(st.integers(0, 19)) else draw(st.integers(0, 6))
        if dtype.hasobject:
            data = np.array([draw(st.one_of(st.binary(max_size=3), st.text(max_size=2))) for _ in range(size)], object)
        else:
            with np.errstate(all="ignore"):
                raw = np.array([draw(NUMBERS) for _ in range(size)], np.float64)
                data = np.nan_to_num(raw, nan=3).astype(dtype) if dtype.kind in "iub" else raw.astype(dtype)
        inputs.append(Tensor(rule.name, datatype, shape, data.reshape(shape) if data.size == np.prod(shape) else data))
    return InferRequest(
        "fastertransformer", inputs, parameters=draw(st.sampled_from([{}, {}, {"priority": 2}, {"x": 1}]))
    )


async def attempt(service: Service, request: InferRequest) -> InferResponse | BaseException:
    return (await asyncio.gather(service.infer(request), return_exceptions=True))[0]


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(malformed())
def test_malformed_requests_are_the_clients_fault(demo: Running, request_: InferRequest) -> None:
    for first in request_.inputs:
        if first.name == "request_output_len" and first.data.dtype.kind == "u":
            first.data[...] = np.minimum(first.data, 3)
    outcome = demo.run(attempt(demo.service, request_))
    if isinstance(outcome, BaseException):
        assert isinstance(outcome, ServiceError)
        assert outcome.kind in (ErrorKind.INVALID, ErrorKind.UNSUPPORTED), outcome


def test_nothing_is_left_in_the_engine(demo: Running) -> None:
    stats = engine(demo).stats
    demo.run(until(lambda: (stats().running, stats().waiting) == (0, 0)))  # what was refused is withdrawn in parts
    assert demo.service.counters["fastertransformer", "1"].pending == 0
