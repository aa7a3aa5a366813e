import json
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.server.service_fixtures import DEMO, LONGEST, Outputs, Running, demo, tensor

from hasten.core.sampling import names_at
from hasten.core.sampling_rules import Entrance
from hasten.core.types import SamplingParams
from hasten.engine.llm import LLM
from hasten.server.models.sampling import sampling_options
from hasten.server.types import ErrorKind, InferRequest, ServiceError

pytestmark = pytest.mark.any_python

__all__ = ["demo"]

PROMPT = "Once upon a time"
TYPES = {
    **dict.fromkeys(("text_input", "sampling_parameters", "stop_words", "bad_words"), "BYTES"),
    **dict.fromkeys(("guided_decoding_guide_type", "guided_decoding_guide"), "BYTES"),
    **dict.fromkeys(("max_tokens", "end_id", "pad_id", "top_k", "min_length", "beam_width"), "INT32"),
    **dict.fromkeys(("top_p", "temperature", "length_penalty", "repetition_penalty"), "FP32"),
    **dict.fromkeys(("presence_penalty", "frequency_penalty"), "FP32"),
    **dict.fromkeys(("seed", "random_seed"), "UINT64"),
}


def asked(prompt: str | bytes = PROMPT, batch: bool = False, **inputs: Any) -> InferRequest:
    """A request; `sampling_parameters` may be given as a dictionary, and with `batch` inputs have a batch axis."""
    result = []
    for name, value in {"text_input": prompt, **inputs}.items():
        given = json.dumps(value) if isinstance(value, dict) else value
        each = given if isinstance(given, list) else [given]
        result.append(tensor(name, TYPES.get(name, "BOOL"), [each] if batch else each))
    return InferRequest("demo", result)


GREEDY = {"temperature": 0, "max_tokens": 20}


@pytest.fixture(scope="module")
def expected() -> dict[str, Any]:
    """What the engine gives offline: the greedy text, and three drawn ones with their log-probabilities."""
    with LLM(DEMO, max_model_len=LONGEST) as llm:
        greedy = llm.generate(PROMPT, SamplingParams(temperature=0, max_tokens=20))[0]
        drawn = llm.generate(PROMPT, SamplingParams(n=3, temperature=1.5, seed=7, max_tokens=12, logprobs=1))[0]
    return {"greedy": greedy.outputs[0].text, "prompt": greedy.prompt_token_ids, "drawn": drawn.outputs}


def test_vllms_names(demo: Running, expected: dict[str, Any]) -> None:
    response = demo.infer(asked(sampling_parameters=GREEDY))
    assert response == {"text_output": [PROMPT + expected["greedy"]]}
    assert demo.infer(asked(sampling_parameters=GREEDY, exclude_input_in_output=True)) == {
        "text_output": [expected["greedy"]]
    }
    request = asked(exclude_input_in_output=True)
    request.parameters = {**GREEDY, "priority": 1}
    assert demo.infer(request) == {"text_output": [expected["greedy"]]}


def test_numbers_may_be_text_as_in_vllms_samples(demo: Running, expected: dict[str, Any]) -> None:
    given = {"temperature": "0", "max_tokens": "20", "top_p": "0.95", "ignore_eos": "false", "seed": None}
    assert demo.infer(asked(sampling_parameters=given))["text_output"] == [PROMPT + expected["greedy"]]


def test_streams_give_what_is_new(demo: Running, expected: dict[str, Any]) -> None:
    names = ("return_finish_reason", "return_num_output_tokens", "return_num_input_tokens")
    extras: dict[str, Any] = dict.fromkeys(names, True)
    responses = demo.streamed(asked(stream=True, sampling_parameters=GREEDY, **extras))
    assert "".join(result["text_output"][0] for result, _ in responses) == expected["greedy"]
    assert [result["finish_reason"][0] for result, _ in responses] == ["None"] * (len(responses) - 1) + ["length"]
    assert sum(result["num_output_tokens"][0] for result, _ in responses) == 20
    assert all(result["num_input_tokens"] == [len(expected["prompt"])] for result, _ in responses)
    assert [final for _, final in responses] == [False] * (len(responses) - 1) + [True]


def test_several_completions_and_their_log_probabilities(demo: Running, expected: dict[str, Any]) -> None:
    given = {"n": 3, "temperature": 1.5, "seed": 7, "max_tokens": 12, "logprobs": 1}
    names = ("return_logprobs", "return_cumulative_logprob", "return_finish_reason")
    flags: dict[str, Any] = dict.fromkeys(names, True)
    response = demo.infer(asked(sampling_parameters=given, exclude_input_in_output=True, **flags))
    drawn = expected["drawn"]
    assert response["text_output"] == [completion.text for completion in drawn]
    assert response["finish_reason"] == [str(completion.finish_reason) for completion in drawn]
    sums = [completion.cumulative_logprob for completion in drawn]
    np.testing.assert_allclose(response["cumulative_logprob"], sums, atol=1e-3)
    for text, completion in zip(response["logprobs"], drawn, strict=True):
        positions = json.loads(text)
        assert [int(next(iter(position))) for position in positions] == completion.token_ids
        for position, entries in zip(positions, completion.logprobs, strict=True):
            for token, entry in entries.items():
                assert position[str(token)]["rank"] == entry.rank
                assert position[str(token)]["decoded_token"] == entry.decoded_token
                assert position[str(token)]["logprob"] == pytest.approx(entry.logprob, abs=1e-3)
    streamed = demo.stream(asked(sampling_parameters=given, stream=True))
    texts = ["".join(response["text_output"][index] for response, _ in streamed) for index in range(3)]
    assert texts == [completion.text for completion in drawn]


def test_log_probabilities_that_were_not_asked_for(demo: Running) -> None:
    response = demo.infer(asked(sampling_parameters=GREEDY, return_logprobs=True, return_cumulative_logprob=True))
    assert response["logprobs"] == ["null"]
    assert response["cumulative_logprob"][0] < 0


@pytest.mark.parametrize("batch", [False, True])
def test_tensorrt_llms_names(demo: Running, expected: dict[str, Any], batch: bool) -> None:
    response = demo.infer(asked(batch=batch, max_tokens=20, pad_id=3, end_id=2, stop_words=[""], return_log_probs=True))
    shape = (1, 1) if batch else (1,)
    assert np.shape(response["text_output"]) == np.shape(response["cum_log_probs"]) == shape
    assert np.ravel(response["text_output"]).tolist() == [PROMPT + expected["greedy"]]
    assert np.shape(response["output_log_probs"]) == (*shape, 20)
    np.testing.assert_allclose(np.sum(response["output_log_probs"], -1), response["cum_log_probs"], atol=1e-3)


def test_tensorrt_llms_options(demo: Running, expected: dict[str, Any]) -> None:
    def text(**inputs: Any) -> str:
        made: str = demo.infer(asked(max_tokens=20, exclude_input_in_output=True, **inputs))["text_output"][0]
        return made

    greedy: str = expected["greedy"]
    word = greedy.split()[3]
    assert text(temperature=9.0) == text(top_k=1) == greedy
    assert text(stop_words=["nothing", word]) == greedy[: greedy.index(word)]
    assert word not in text(bad_words=[word])
    assert text(top_k=40, temperature=2.0, seed=1) == text(top_k=40, temperature=2.0, random_seed=1) != greedy
    assert text(repetition_penalty=1.5, presence_penalty=1.0, frequency_penalty=1.0) != greedy
    assert text(end_id=-1, min_length=20)
    beams = demo.infer(asked(max_tokens=8, beam_width=3, length_penalty=0.5, return_log_probs=True))
    assert len(beams["text_output"]) == len(beams["cum_log_probs"]) == 3
    sums = [sum(each) for each in beams["output_log_probs"]]
    assert sums == pytest.approx(list(beams["cum_log_probs"]), abs=1e-4)


def test_what_constrains_and_biases_the_output(demo: Running) -> None:
    def text(inputs: dict[str, Any], **parameters: Any) -> str:
        request = asked(exclude_input_in_output=True, **inputs)
        request.parameters = parameters
        made: str = demo.infer(request)["text_output"][0]
        return made

    wanted = text({"sampling_parameters": {**GREEDY, "regex": "(ab)+"}})
    assert wanted.startswith("abab")
    assert text({"max_tokens": 20, "guided_decoding_guide_type": "regex", "guided_decoding_guide": "(ab)+"}) == wanted
    assert text({}, **GREEDY, structured_outputs='{"regex": "(ab)+"}') == wanted
    assert text({}, **GREEDY, choice='["maybe not", "perhaps"]') in ("maybe not", "perhaps")
    only = text({"sampling_parameters": {**GREEDY, "logit_bias": {"304": 100}}})
    assert only == text({}, **GREEDY, allowed_token_ids="[304]") == text({}, **GREEDY, logit_bias='{"304": 100}')


def refused(demo: Running, request: InferRequest, kind: ErrorKind = ErrorKind.INVALID) -> str:
    error = demo.refused(request)
    assert error.kind is kind
    return str(error)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"sampling_parameters": "{"}, "input 'sampling_parameters' is not JSON"),
        ({"sampling_parameters": "[]"}, "input 'sampling_parameters' must be a JSON object"),
        ({"sampling_parameters": "[" * 100_000}, "input 'sampling_parameters' is not JSON"),
        ({"sampling_parameters": b"\xff"}, "input 'sampling_parameters' is not UTF-8"),
        (
            {"sampling_parameters": {"max_token": 5}},
            "sampling parameter 'max_token' is not known; there are allowed",
        ),
        ({"sampling_parameters": {"detokenize": False}}, "sampling parameter 'detokenize' is not known"),
        ({"sampling_parameters": {"max_tokens": "five"}}, "'max_tokens' must be a whole number, got 'five'"),
        ({"sampling_parameters": {"max_tokens": 1.5}}, "max_tokens must be a whole number, got 1.5"),
        ({"sampling_parameters": {"temperature": []}}, "temperature must be a number, got []"),
        ({"sampling_parameters": {"top_p": 2}}, "top_p must be above 0 and at most 1, got 2"),
        ({"sampling_parameters": {"ignore_eos": 1}}, "ignore_eos must be True or False, got 1"),
        ({"sampling_parameters": {"stop": [1]}}, "stop holds something that is not a string: [1]"),
        (
            {"sampling_parameters": {"stop_token_ids": ["a"]}},
            "stop_token_ids holds something that is not a token id: ['a']",
        ),
        ({"sampling_parameters": {"n": 10**4}}, "n is 10000; more than 256 sequences at once"),
        ({"sampling_parameters": {"seed": 2**70}}, "seed must be from 0"),
        ({"sampling_parameters": {}, "max_tokens": 4}, "input 'sampling_parameters' and input 'max_tokens' both say"),
        ({"prompt": b"\xff\xfe"}, "input 'text_input' is not UTF-8"),
        ({"stream": True, "exclude_input_in_output": False}, "`exclude_input_in_output` = False is not allowed"),
        ({"max_tokens": 0}, "max_tokens must be at least 1, got 0"),
        ({"max_tokens": 4, "top_k": -3}, "inputs 'top_k' and 'temperature' must not be negative"),
        ({"max_tokens": 4, "top_p": float("nan")}, "'top_p' must be from 0 to 1"),
        ({"max_tokens": 4, "beam_width": 2, "top_k": 9}, "have no meaning with beam_width above 1"),
        ({"max_tokens": 4, "seed": 1, "random_seed": 1}, "inputs 'seed' and 'random_seed' say the same; give one"),
        ({"max_tokens": 4, "bad_words": [b"\xff"]}, "input 'bad_words' is not UTF-8"),
        ({"prompt": "word " * 300}, "tokens, the limit is 191"),
    ],
)
def test_what_is_wrong_is_named(demo: Running, inputs: dict[str, Any], message: str) -> None:
    assert message in refused(demo, asked(**inputs))


def test_parameters_and_inputs_that_say_the_same(demo: Running) -> None:
    request = asked(sampling_parameters=GREEDY)
    request.parameters = {"max_tokens": 3}
    assert "input 'sampling_parameters' and parameter 'max_tokens' both say how to sample" in refused(demo, request)
    request = asked()
    request.parameters = {"max_tokenz": 3}
    assert refused(demo, request) == "parameter 'max_tokenz' is not known to model 'demo'; did you mean 'max_tokens'?"


@pytest.mark.parametrize(
    "name", ["max_token", "Temperature", "top-k", "max_new_tokens", "do_sample", "logit_biases", "detokenize"]
)
def test_parameters_that_would_change_the_answer_are_not_ignored(demo: Running, name: str) -> None:
    request = asked()
    request.parameters = {name: 1}
    assert f"parameter '{name}' is not known to model 'demo'" in refused(demo, request)


@pytest.mark.parametrize("name", ["request_tag", "user", "trace_id", "tenant", "model", "x", "name", "step"])
def test_other_parameters_are_ignored_as_tritons_models_do(demo: Running, name: str) -> None:
    request, plain = asked(), asked()
    plain.parameters = {"max_tokens": 3, "temperature": 0.0}
    request.parameters = {**plain.parameters, name: "anything"}
    assert demo.infer(request) == demo.infer(plain)


def test_one_response_is_not_for_a_stream(demo: Running) -> None:
    message = refused(demo, asked(stream=True, sampling_parameters=GREEDY))
    assert message == "model 'demo' gives several responses to this request; use a stream"


def test_only_the_outputs_asked_for(demo: Running) -> None:
    response = demo.infer(asked(sampling_parameters=GREEDY, return_finish_reason=True), ["finish_reason"])
    assert response == {"finish_reason": ["length"]}


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda each: st.lists(each, max_size=2),
)
NAMES = st.sampled_from(
    ["n", "top_k", "stop", "stop_token_ids", "temperature", "ignore_eos", "logit_bias", "bad_words_ids", "choice", "x"]
)


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.dictionaries(NAMES, VALUES, max_size=4))
def test_any_json_is_read_or_refused(raw: dict[str, Any]) -> None:
    try:
        options = sampling_options(raw, names_at(Entrance.TEXT))
    except ServiceError as error:
        assert error.kind is ErrorKind.INVALID  # noqa: PT017 - either outcome is right
    else:
        assert options.keys() <= raw.keys()


def test_outputs_are_lists_of_texts(demo: Running) -> None:
    made: Outputs = demo.infer(asked(sampling_parameters={"max_tokens": 3, "seed": 1}))
    assert made["text_output"][0].startswith(PROMPT)
