from typing import Any

import numpy as np
import pytest
import torch

from hasten.core.errors import InvalidRequestError
from hasten.core.types import SamplingParams
from hasten.engine.prompts import params_for_each, parse_prompts

Parsed = tuple[str | None, tuple[int, ...] | None]


def parsed(prompts: Any) -> list[Parsed]:
    return [(prompt.text, prompt.token_ids) for prompt in parse_prompts(prompts)]


@pytest.mark.parametrize(
    ("prompts", "wanted"),
    [
        ("text", [("text", None)]),
        ([5, 6], [(None, (5, 6))]),
        ((5, 6), [(None, (5, 6))]),
        (range(3), [(None, (0, 1, 2))]),
        ({"prompt": "text"}, [("text", None)]),
        ({"prompt_token_ids": [5, 6]}, [(None, (5, 6))]),
        ({"prompt_token_ids": [5], "prompt": "text"}, [("text", (5,))]),
        ({"prompt_token_ids": None, "prompt": "text"}, [("text", None)]),
        (np.array([5, 6]), [(None, (5, 6))]),
        (torch.tensor([5, 6]), [(None, (5, 6))]),
        (np.array([[5], [6]]), [(None, (5,)), (None, (6,))]),
        ([np.int64(5), torch.tensor(6)], [(None, (5, 6))]),
        ([torch.tensor([5]), np.array([6])], [(None, (5,)), (None, (6,))]),
        (["a", [5], {"prompt": "b"}, (6,)], [("a", None), (None, (5,)), ("b", None), (None, (6,))]),
        pytest.param((text for text in "ab"), [("a", None), ("b", None)], id="a generator"),
        ([], []),
        ([[], "a"], [(None, ()), ("a", None)]),
    ],
    ids=repr,
)
def test_all_forms_of_prompts(prompts: Any, wanted: list[Parsed]) -> None:
    assert parsed(prompts) == wanted


@pytest.mark.parametrize(
    ("prompts", "begin", "end"),
    [
        (None, "the prompt must be a text, a list of token ids, or a dict", "got None"),
        (5, "the prompt must be", "got 5"),
        (b"Anna", "the prompt must be", "got b'Anna'"),
        ({5, 6}, "the prompt must be", "got {5, 6}"),
        (["a", None], "prompts[1] must be", "got None"),
        ([None, "a"], "prompts[0] must be", "got None"),
        (["a", b"b"], "prompts[1] must be", "got b'b'"),
        (["a", 5], "prompts[1] must be", "got 5"),
        ([True, False], "the prompt has True at position 0", "is not a token id"),
        ([5, "six"], "the prompt has 'six' at position 1", "is not a token id"),
        ([5, 6.0], "the prompt has 6.0 at position 1", "is not a token id"),
        ([[5], [5, True]], "prompts[1] has True at position 1", "is not a token id"),
        (np.array([0.5]), "the prompt has 0.5 at position 0", "is not a token id"),
        ({}, "the prompt has neither 'prompt' nor 'prompt_token_ids'", "'prompt_token_ids'"),
        ({"prompt": "a", "cache_salt": 5}, "the prompt['cache_salt'] must be a text", "got 5"),
        ({"prompt": "a", "cache_salt": "\ud800"}, "the prompt['cache_salt']", ""),
        ({"text": "a"}, "the prompt has 'text', which is not supported", "'prompt_token_ids'"),
        (
            ["a", {"prompt": "b", "multi_modal_data": {}}],
            "prompts[1] has 'multi_modal_data', which",
            "'prompt_token_ids'",
        ),
        ({"prompt": ["a"]}, "the prompt['prompt'] must be a text", "got ['a']"),
        ([{"prompt_token_ids": "ab"}], "prompts[0]['prompt_token_ids'] must be a list of token ids", "got 'ab'"),
        ({"prompt_token_ids": [5, None]}, "the prompt['prompt_token_ids'] has None at position 1", "is not a token id"),
        ("a\ud83d", "the prompt is not valid UTF-8", "at position 1"),
        (["a", {"prompt": "\udcff"}], "prompts[1]['prompt'] is not valid UTF-8", "at position 0"),
    ],
    ids=repr,
)
def test_other_forms_are_refused_by_their_position(prompts: Any, begin: str, end: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        parse_prompts(prompts)
    message = str(caught.value)
    assert message.startswith(begin)
    assert message.endswith(end)
    assert "\n" not in message


def test_parameters_for_all_or_for_each() -> None:
    each, default = SamplingParams(n=2), SamplingParams(n=3)
    assert params_for_each(2, None, default) == [default, default]
    assert params_for_each(2, each, default) == [each, each]
    assert params_for_each(2, [each, None], default) == [each, default]
    assert params_for_each(0, [], default) == []


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"n": 2}, "sampling_params must be SamplingParams or a list of them, got {'n': 2}"),
        (5, "sampling_params must be SamplingParams or a list of them, got 5"),
        ([SamplingParams(), 5], "sampling_params[1] must be SamplingParams, got 5"),
        ([SamplingParams()], "2 prompts, but 1 sampling parameters; give one, or one for each"),
    ],
)
def test_parameters_of_another_kind(params: Any, message: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        params_for_each(2, params, SamplingParams())
    assert str(caught.value) == message
