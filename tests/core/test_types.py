import inspect
import pickle
from copy import copy, deepcopy
from dataclasses import fields, replace
from typing import Any, cast

import numpy as np
import pytest

from hasten.core.errors import InvalidRequestError
from hasten.core.types import FinishReason, Logprob, LogprobList, LogprobRow, SamplingParams, StructuredOutputsParams

NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("n", [0, -1, 10**9]),
        ("temperature", [-0.1, -1, NAN, INF]),
        ("top_k", [-2]),
        ("top_p", [0, -0.5, 1.0001, NAN]),
        ("min_p", [-0.1, 1.1, NAN]),
        ("repetition_penalty", [0, -1, 5e-324, 1e300, NAN, INF]),
        ("presence_penalty", [-2.1, 2.1, NAN]),
        ("frequency_penalty", [-2.1, 2.1, NAN]),
        ("max_tokens", [0, -1]),
        ("min_tokens", [-1, 17]),
        ("stop", ["", [""], ["a", ""]]),
        ("stop_words_ids", [[[]], [[1], []]]),
        ("bad_words", ["", [""]]),
        ("bad_words_ids", [[[]], [[1], []]]),
        ("seed", [-1, 2**64]),
        ("logprobs", [-1]),
        ("prompt_logprobs", [-1]),
        ("beam_width", [0, -1]),
        ("length_penalty", [-11, 10.5, NAN, INF]),
        ("early_stopping", ["never", 1, None]),
        ("detokenize", [1, None, "yes"]),
        ("ignore_eos", [1, None, "yes"]),
        ("skip_special_tokens", [0, None]),
        ("include_stop_str_in_output", [0, None]),
        ("beam_search_diversity_rate", [-0.5, NAN, INF]),
        ("logit_bias", [[1], "1", {1.5: 1}, {"1": 1}, {1: "1"}, {1: 101}, {1: NAN}]),
        ("json_schema", ["", {}, 1]),
        ("regex", ["", 1]),
        ("grammar", ["", 1]),
        ("choice", ["", [""], [1]]),
    ],
)
def test_a_bad_value_is_named(name: str, values: list[Any]) -> None:
    for value in values:
        with pytest.raises(InvalidRequestError) as caught:
            SamplingParams(**{name: value})
        message = str(caught.value)
        assert message.startswith(f"{name} ")
        assert "\n" not in message
        if type(value) in (int, float):
            assert message.endswith(f", got {value}")


@pytest.mark.parametrize(
    ("names", "values"),
    [
        (("n", "top_k", "min_tokens", "beam_width"), [2.5, 2.0, "2", True, None, [2]]),
        (("max_tokens", "seed", "logprobs", "prompt_logprobs"), [2.5, 2.0, "2", True, [2]]),
        (
            ("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty"),
            ["0.5", None, True, [0.5], 1j],
        ),
        (("stop", "bad_words", "choice"), [[1], [None], ["a", 2], 7, b"a", {"a": 1}]),
        (("stop_token_ids", "allowed_token_ids"), [[1.7], ["1"], [None], "12", 7, [True], b"12"]),
        (("stop_words_ids", "bad_words_ids"), [[[1.7]], [["1"]], ["12"], 7, [5], [None, 5]]),
        (("stop", "bad_words", "choice", "json_schema", "regex", "grammar"), ["a\ud83d"]),
        (("structured_outputs",), [5, "a+", [], {}, {"regex": "a", "choice": ["b"]}, {"regexp": "a"}, {"json": 5}]),
    ],
)
def test_a_value_of_the_wrong_kind_is_named(names: tuple[str, ...], values: list[Any]) -> None:
    """Met in the middle of a step it would end the engine, and with it the requests of others."""
    for name in names:
        for value in values:
            with pytest.raises(InvalidRequestError) as caught:
                SamplingParams(**{name: value})
            assert str(caught.value).startswith(f"{name} ")


@pytest.mark.parametrize(
    "name",
    [
        *("stop", "stop_token_ids", "stop_words_ids", "bad_words", "bad_words_ids", "allowed_token_ids", "logit_bias"),
        *("choice", "seed", "logprobs", "prompt_logprobs", "json_schema", "regex", "grammar", "structured_outputs"),
    ],
)
def test_none_is_what_is_left_out(name: str) -> None:
    assert SamplingParams(**cast("dict[str, Any]", {name: None})) == SamplingParams()


def test_max_tokens_of_none_is_up_to_the_models_length() -> None:
    params = SamplingParams(max_tokens=None, min_tokens=500)
    assert params.max_length(10, 2048) == 2048
    assert SamplingParams(max_tokens=5).max_length(10, 2048) == 15
    assert SamplingParams(max_tokens=5).max_length(10, 12) == 12
    assert SamplingParams(max_tokens=5).max_length(10, None) == 15


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ({"json": '{"type": "integer"}'}, {"json_schema": '{"type": "integer"}'}),
        ({"json": {"type": "integer"}, "regex": None}, {"json_schema": '{"type": "integer"}'}),
        ({"json_object": True}, {"json_schema": '{"type":"object"}'}),
        ({"regex": "a+"}, {"regex": "a+"}),
        ({"choice": ["a", "b"]}, {"choice": ("a", "b")}),
        ({"grammar": 'start: "a"'}, {"grammar": 'start: "a"'}),
    ],
)
def test_structured_outputs_are_the_fields_that_they_name(given: dict[str, Any], wanted: dict[str, Any]) -> None:
    for form in (given, StructuredOutputsParams(**given)):  # type: ignore[typeddict-item]
        params = SamplingParams(structured_outputs=form)  # type: ignore[arg-type]
        assert params == SamplingParams(**wanted)
        assert replace(params, n=2) == SamplingParams(**wanted, n=2)
    with pytest.raises(InvalidRequestError, match=r"structured_outputs and \w+ say the same"):
        SamplingParams(structured_outputs=given, **wanted)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("best_of", "best_of is not a parameter of SamplingParams: draw n completions"),
        ("logits_processors", "logits_processors is not a parameter of SamplingParams: use logit_bias"),
        ("guided_decoding", "guided_decoding is not a parameter of SamplingParams: use structured_outputs"),
        ("truncate_prompt_tokens", "truncate_prompt_tokens is not a parameter of SamplingParams: give the last"),
        ("max_token", "max_token is not a parameter of SamplingParams: did you mean max_tokens?"),
        ("xyz", "xyz is not a parameter of SamplingParams: there are n, temperature, top_k"),
    ],
)
def test_an_unknown_parameter_is_named_with_what_to_use(name: str, message: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        SamplingParams(**cast("dict[str, Any]", {name: 1}))
    assert str(caught.value).startswith(message)
    if name in ("best_of", "logits_processors", "guided_decoding", "truncate_prompt_tokens"):
        assert SamplingParams(**cast("dict[str, Any]", {name: None})) == SamplingParams()
    with pytest.raises(InvalidRequestError, match="SamplingParams takes its parameters by name"):
        cast("Any", SamplingParams)(0.8)


def test_the_signature_names_all_parameters() -> None:
    assert list(inspect.signature(SamplingParams).parameters) == [f.name for f in fields(SamplingParams)]


def test_numbers_of_numpy_are_numbers() -> None:
    params = SamplingParams(max_tokens=np.int64(3), top_p=np.float32(0.5), stop_token_ids=np.arange(2))  # type: ignore[arg-type]
    assert (params.max_tokens, params.top_p, params.stop_token_ids) == (3, 0.5, (0, 1))


def test_stop_strings_need_text() -> None:
    with pytest.raises(InvalidRequestError, match="stop strings need detokenize=True"):
        SamplingParams(stop="end", detokenize=False)


@pytest.mark.parametrize(
    "values",
    [
        {"temperature": 0},
        {"top_k": 5},
        {"top_p": 0.5},
        {"min_p": 0.5},
        {"stop": "x"},
        {"stop_words_ids": [[1, 2]]},
        {"logprobs": 0},
        {"n": 3},
    ],
)
def test_what_beams_cannot_do_is_not_ignored(values: dict[str, Any]) -> None:
    (name,) = values
    with pytest.raises(InvalidRequestError, match=f"^{name} must be .* beam_width"):
        SamplingParams(beam_width=2, **values)
    SamplingParams(beam_width=3, n=3, seed=1, stop_token_ids=[1], prompt_logprobs=1, repetition_penalty=1.5)


@pytest.mark.parametrize(
    "values",
    [
        {"temperature": 0},
        {"temperature": 1e9},
        {"top_k": -1},
        {"top_k": 10**9},
        {"n": 2**14},
        {"repetition_penalty": 1e-20},
        {"repetition_penalty": 1e20},
        {"top_p": 1e-9, "min_p": 0},
        {"top_p": 1, "min_p": 1},
        {"presence_penalty": -2, "frequency_penalty": 2},
        {"max_tokens": 1, "min_tokens": 1},
        {"seed": 0},
        {"seed": 2**64 - 1},
        {"logprobs": 0, "prompt_logprobs": 0},
        {"detokenize": False, "stop_token_ids": [3]},
        {"beam_width": 4, "n": 4, "length_penalty": -10, "early_stopping": True, "beam_search_diversity_rate": 0},
    ],
)
def test_values_at_the_edge_are_good(values: dict[str, Any]) -> None:
    params = SamplingParams(**values)
    assert all(getattr(params, name) == value or isinstance(value, list) for name, value in values.items())


def test_lists_are_kept_as_tuples_and_a_single_string_as_one() -> None:
    params = SamplingParams(
        stop="end",
        stop_token_ids=[1, 2],
        stop_words_ids=[[3, 4], (5,)],
        bad_words="never",
        bad_words_ids=[[6]],
    )
    assert params.stop == ("end",)
    assert params.stop_token_ids == (1, 2)
    assert params.stop_words_ids == ((3, 4), (5,))
    assert params.bad_words == ("never",)
    assert params.bad_words_ids == ((6,),)
    assert SamplingParams(stop=["a", "b"]).stop == ("a", "b")
    assert hash(params) == hash(SamplingParams(**vars(params)))


@pytest.mark.parametrize(
    ("values", "greedy", "has_penalty", "is_plain"),
    [
        ({}, False, False, False),
        ({"temperature": 0}, True, False, True),
        ({"temperature": 9e-6}, True, False, True),
        ({"temperature": 1e-5}, False, False, False),
        ({"temperature": 0, "repetition_penalty": 1.1}, True, True, False),
        ({"temperature": 0, "presence_penalty": -0.1}, True, True, False),
        ({"temperature": 0, "frequency_penalty": 0.1}, True, True, False),
        ({"temperature": 0, "logprobs": 0}, True, False, False),
        ({"temperature": 0, "min_tokens": 1}, True, False, False),
        ({"temperature": 0, "bad_words": "x"}, True, False, False),
        ({"temperature": 0, "bad_words_ids": [[1]]}, True, False, False),
        ({"temperature": 0, "allowed_token_ids": [1]}, True, False, False),
        # what does not change which token is the most probable one
        ({"temperature": 0, "top_k": 5, "top_p": 0.5, "min_p": 0.5, "seed": 3}, True, False, True),
        ({"temperature": 0, "stop": "x", "stop_token_ids": [1], "ignore_eos": True}, True, False, True),
    ],
)
def test_what_a_request_needs(values: dict[str, Any], greedy: bool, has_penalty: bool, is_plain: bool) -> None:
    params = SamplingParams(**values)
    assert (params.greedy, params.has_penalty, params.is_plain) == (greedy, has_penalty, is_plain)


def test_reasons_are_the_words_that_users_compare_with() -> None:
    words: list[str] = ["stop", "length", "abort", "error"]
    assert list(FinishReason) == words
    assert [str(reason) for reason in FinishReason] == words


@pytest.mark.parametrize(
    ("name", "value"), [("length_penalty", 0.5), ("early_stopping", True), ("beam_search_diversity_rate", 0.5)]
)
def test_what_only_beams_take_into_account_is_refused_without_them(name: str, value: Any) -> None:
    with pytest.raises(InvalidRequestError, match=f"{name} needs beam_width above 1, got {value}"):
        SamplingParams(**{name: value})
    assert getattr(SamplingParams(**{name: value}, beam_width=2), name) == value


def test_at_most_one_constraint_is_given() -> None:
    with pytest.raises(InvalidRequestError, match="got json_schema and choice"):
        SamplingParams(json_schema="{}", choice=["a"])
    assert SamplingParams(choice="yes").choice == ("yes",)
    assert not SamplingParams(temperature=0, regex="a").is_plain
    assert not SamplingParams(temperature=0, logit_bias={3: 1}).is_plain


@pytest.mark.parametrize("row", [LogprobRow(7, -3.0, 4, [-1.0, -2.5], [5, 1 << 30]), LogprobRow(-1, 0.0, 1, [], [])])
def test_rows_of_log_probabilities_are_packed_and_unpacked(row: LogprobRow) -> None:
    assert LogprobRow.unpacked(row.packed()) == row


def test_log_probabilities_are_built_as_they_are_read() -> None:
    read: list[int] = []

    def text_of(token: int) -> str:
        read.append(token)
        return f"<{token}>"

    found: LogprobList[dict[int, Logprob] | None] = LogprobList(text_of, [None])
    found.append(LogprobRow(7, -3.0, 4, [-1.0, -2.0], [5, 6]).packed())
    found.append(LogprobRow(6, -2.0, 2, [-1.0, -2.0], [5, 6]).packed())
    grown = copy(found)
    assert grown.sum == found.sum == -5.0
    found.append(LogprobRow(9, -0.5, 1, [], []).packed())
    assert (len(grown), len(found), read) == (3, 4, [])
    assert (grown.sum, found.sum) == (-5.0, -5.5)
    first = {7: Logprob(-3.0, 4, "<7>"), 5: Logprob(-1.0, 1, "<5>"), 6: Logprob(-2.0, 2, "<6>")}
    second = {6: Logprob(-2.0, 2, "<6>"), 5: Logprob(-1.0, 1, "<5>")}
    assert found[1] == first
    assert read == [7, 5, 6]
    assert [list(each or ()) for each in found] == [[], [7, 5, 6], [6, 5], [9]]
    assert found[1:3] == [first, second]
    assert grown == [None, first, second] == list(grown)
    assert grown != found
    for copied in (deepcopy(grown), pickle.loads(pickle.dumps(LogprobList(None, grown._rows)))):
        assert type(copied) is list
        assert [list(each or ()) for each in copied] == [[], [7, 5, 6], [6, 5]]
    assert (
        repr(LogprobList(None, [LogprobRow(1, -1.0, 1, [], []).packed()]))
        == "[{1: Logprob(logprob=-1.0, rank=1, decoded_token=None)}]"
    )
