"""OpenAI's API, asked by the stock openai package; where it does not go far enough, by httpx."""

from __future__ import annotations

import gzip
import json
import os
import re
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import openai
import pydantic
import pytest
from tests.server.engine_helpers import stopped
from tests.server.openai_site import DEMO, Site, models, with_template
from tests.server.transport_fixtures import workers
from tests.waiting import LIMIT_S, attempts, eventually

from hasten import LLM, SamplingParams
from hasten.core.types import Logprob
from hasten.server import by_size
from hasten.server.engine.queue import QueueLimits
from hasten.server.openai import answer, call
from hasten.server.openai.models import models_by_id

pytestmark = pytest.mark.any_python

PROMPT = "Anna opened the door and"
CHAT: Any = [{"role": "user", "content": "Anna opened the door."}]
RENDERED = "<s>user: Anna opened the door.\nassistant:"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """`story` has a chat template; `narrow` has none, runs two requests at once and lets one more wait."""
    story = with_template(tmp_path_factory.mktemp("models"))
    narrow = models(DEMO, "narrow", limits=QueueLimits(max_queue_size=1), max_num_seqs=2)
    result = Site([*models(story, "tokens", "story"), *narrow])
    yield result
    result.close()


@pytest.fixture(scope="module")
def client(site: Site) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{site.url}/v1", api_key="none", max_retries=0) as produced:
        yield produced


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM(DEMO) as engine:
        yield engine


@pytest.fixture(autouse=True)
def leaves_nothing(site: Site) -> Iterator[None]:
    yield
    for name in ("tokens", "narrow"):
        eventually(lambda name=name: site.engine(name).ready and site.idle(name))  # type: ignore[misc]


# --- models -----------------------------------------------------------------------------------------------------------


def test_models_are_listed(client: openai.OpenAI) -> None:
    listed = list(client.models.list())
    assert [(model.id, model.object, model.owned_by) for model in listed] == [
        ("story", "model", "hasten"),
        ("narrow", "model", "hasten"),
        ("tokens", "model", "hasten"),
    ]
    assert client.models.retrieve("story").model_dump() == listed[0].model_dump()
    assert listed[0].model_dump()["max_model_len"] == 2048
    with pytest.raises(openai.NotFoundError, match="'saga' does not exist; there are: story, narrow, tokens"):
        client.models.retrieve("saga")


def test_names_stand_for_the_newest_version_and_text_models_for_their_token_models() -> None:
    engines = [("b", "10"), ("a", "1"), ("b", "9")]
    assert list(models_by_id(engines, {"text": "b", "orphan": "c"}).items()) == [
        ("text", ("b", "10")),
        ("a", ("a", "1")),
        ("b", ("b", "10")),
        ("b:9", ("b", "9")),
        ("b:10", ("b", "10")),
    ]


# --- completions ------------------------------------------------------------------------------------------------------


def test_greedy_completions_are_the_engines(client: openai.OpenAI, llm: LLM) -> None:
    prompts = [PROMPT, "Ben", "The garden"]
    right = [output.outputs[0] for output in llm.generate(prompts, SamplingParams(temperature=0, max_tokens=20))]
    created = client.completions.create(model="story", prompt=prompts, max_tokens=20, temperature=0)
    assert [choice.text for choice in created.choices] == [item.text for item in right]
    assert [choice.finish_reason for choice in created.choices] == [item.finish_reason for item in right]
    assert [choice.index for choice in created.choices] == [0, 1, 2]
    assert created.usage is not None
    prompt_tokens = sum(len(llm.tokenizer.encode(prompt)) for prompt in prompts)
    completion_tokens = sum(len(item.token_ids) for item in right)
    assert (created.usage.prompt_tokens, created.usage.completion_tokens) == (prompt_tokens, completion_tokens)
    assert created.usage.total_tokens == prompt_tokens + completion_tokens
    assert (created.object, created.model) == ("text_completion", "story")


def test_without_max_tokens_there_are_16(client: openai.OpenAI) -> None:
    created = client.completions.create(model="story", prompt=PROMPT, extra_body={"ignore_eos": True})
    assert created.usage is not None
    assert created.usage.completion_tokens == 16


def test_token_ids_are_prompts_too(client: openai.OpenAI, llm: LLM) -> None:
    ids = [llm.tokenizer.encode(prompt) for prompt in (PROMPT, "Ben")]
    common: dict[str, Any] = {"model": "story", "max_tokens": 8, "temperature": 0}
    texts = [choice.text for choice in client.completions.create(prompt=[PROMPT, "Ben"], **common).choices]
    assert [choice.text for choice in client.completions.create(prompt=ids, **common).choices] == texts
    assert [choice.text for choice in client.completions.create(prompt=ids[0], **common).choices] == texts[:1]


def test_several_completions_of_several_prompts(client: openai.OpenAI) -> None:
    common: dict[str, Any] = {"model": "story", "max_tokens": 12, "seed": 3}
    both = client.completions.create(prompt=[PROMPT, "Ben"], n=2, **common)
    assert [choice.index for choice in both.choices] == [0, 1, 2, 3]
    alone = [client.completions.create(prompt=prompt, n=2, **common).choices for prompt in (PROMPT, "Ben")]
    assert [choice.text for choice in both.choices] == [choice.text for choices in alone for choice in choices]
    assert len({choice.text for choice in both.choices}) == 4


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("prompt", [PROMPT, [PROMPT, "Ben"]], ids=["one", "two"])
def test_a_stream_adds_up_to_the_whole(client: openai.OpenAI, n: int, prompt: Any) -> None:
    common: dict[str, Any] = {"model": "story", "prompt": prompt, "max_tokens": 20, "n": n, "seed": 5}
    whole = client.completions.create(**common)
    pieces = list(client.completions.create(**common, stream=True, stream_options={"include_usage": True}))
    assert pieces[-1].choices == []
    assert pieces[-1].usage == whole.usage
    assert all(piece.usage is None for piece in pieces[:-1])
    assert len({(piece.id, piece.model, piece.object, piece.created) for piece in pieces}) == 1
    for choice in whole.choices:
        own = [piece.choices[0] for piece in pieces[:-1] if piece.choices[0].index == choice.index]
        assert "".join(piece.text for piece in own) == choice.text
        reasons = [piece.finish_reason for piece in own]
        assert reasons == [None] * (len(own) - 1) + [choice.finish_reason]


@pytest.mark.parametrize("chat", [False, True])
def test_each_event_has_the_usage_so_far_where_that_is_wanted(client: openai.OpenAI, chat: bool) -> None:
    options: Any = {"include_usage": True, "continuous_usage_stats": True}
    common: dict[str, Any] = {"model": "story", "max_tokens": 12, "stream": True, "stream_options": options, "seed": 5}
    if chat:
        pieces: list[Any] = list(client.chat.completions.create(messages=CHAT, **common))
    else:
        pieces = list(client.completions.create(prompt=PROMPT, **common))
    counts = [piece.usage.completion_tokens for piece in pieces]
    assert counts == sorted(counts)
    assert counts[0] < counts[-1] == 12
    assert len({piece.usage.prompt_tokens for piece in pieces}) == 1
    assert all(
        piece.usage.total_tokens == piece.usage.prompt_tokens + count
        for piece, count in zip(pieces, counts, strict=True)
    )


def test_a_stream_is_events_in_openais_own_form(site: Site) -> None:
    body = {"model": "story", "prompt": PROMPT, "max_tokens": 3, "temperature": 0, "stream": True}
    response = httpx.post(f"{site.url}/v1/completions", json=body)
    assert response.headers["content-type"].startswith("text/event-stream")
    assert response.headers["cache-control"] == "no-cache"
    events = response.text.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    objects = [json.loads(event.removeprefix("data: ")) for event in events[:-2]]
    assert all(set(each) == {"id", "object", "created", "model", "choices"} for each in objects)
    assert [each["choices"][0]["finish_reason"] for each in objects] == [None] * (len(objects) - 1) + ["length"]


def choices_of(client: openai.OpenAI, *, stream: bool, **fields: Any) -> list[Any]:
    """The one choice of a completion, or its pieces."""
    made: Any = client.completions.create(stream=stream, **fields)
    return [piece.choices[0] for piece in made] if stream else made.choices


def values(steps: list[dict[int, Logprob] | None]) -> list[dict[str, Any] | None]:
    return [
        None
        if step is None
        else {entry.decoded_token or "": pytest.approx(entry.logprob, abs=1e-4) for entry in step.values()}
        for step in steps
    ]


@pytest.mark.parametrize("stream", [False, True])
def test_log_probabilities_are_the_engines(client: openai.OpenAI, llm: LLM, stream: bool) -> None:
    params = SamplingParams(temperature=0, max_tokens=8, logprobs=2, prompt_logprobs=2)
    (right,) = llm.generate(PROMPT, params)
    common: dict[str, Any] = {"model": "story", "prompt": PROMPT, "max_tokens": 8, "temperature": 0, "logprobs": 2}
    for echo in (False, True):
        choices = choices_of(client, stream=stream, echo=echo, **common)
        text = "".join(choice.text for choice in choices)
        parts = [choice.logprobs for choice in choices]
        tokens = [token for part in parts for token in part.tokens]
        offsets = [offset for part in parts for offset in part.text_offset]
        tops = [top for part in parts for top in part.top_logprobs]
        chosen = [value for part in parts for value in part.token_logprobs]
        prompt = right.prompt_logprobs if echo else []
        assert prompt is not None
        assert right.outputs[0].logprobs is not None
        assert tops == values([*prompt, *right.outputs[0].logprobs])
        assert text == (PROMPT if echo else "") + right.outputs[0].text
        assert "".join(tokens) == text
        assert all(text[offset:].startswith(token) for token, offset in zip(tokens, offsets, strict=True))
        assert chosen == [None if top is None else top[token] for top, token in zip(tops, tokens, strict=True)]


def test_a_prompt_alone_can_be_echoed_with_its_log_probabilities(client: openai.OpenAI, llm: LLM) -> None:
    ids = llm.tokenizer.encode(PROMPT)
    created = client.completions.create(model="story", prompt=ids, max_tokens=0, echo=True, logprobs=0)
    (choice,) = created.choices
    assert (choice.text, choice.finish_reason) == (PROMPT, "length")
    assert created.usage is not None
    assert (created.usage.prompt_tokens, created.usage.completion_tokens, created.usage.total_tokens) == (
        len(ids),
        0,
        len(ids),
    )
    assert choice.logprobs is not None
    assert choice.logprobs.tokens is not None
    assert len(choice.logprobs.tokens) == len(ids)
    *pieces, last = client.completions.create(
        model="story",
        prompt=PROMPT,
        max_tokens=0,
        echo=True,
        stream=True,
        stream_options={"include_usage": True},
    )
    assert "".join(piece.choices[0].text for piece in pieces) == PROMPT
    assert last.usage == created.usage


@pytest.mark.parametrize("stream", [False, True])
def test_stop_strings_end_a_completion(client: openai.OpenAI, stream: bool) -> None:
    common: dict[str, Any] = {"model": "story", "prompt": PROMPT, "max_tokens": 40, "temperature": 0}
    text = client.completions.create(**common).choices[0].text
    assert text.count(".") > 1
    for stop in (".", [".", "Zoltan", "Xerxes", "never ever", "not this"]):
        choices = choices_of(client, stream=stream, stop=stop, **common)
        assert "".join(choice.text for choice in choices) == text.partition(".")[0]
        assert choices[-1].finish_reason == "stop"
    kept = client.completions.create(**common, stop=".", extra_body={"include_stop_str_in_output": True})
    assert kept.choices[0].text == text.partition(".")[0] + "."


def test_a_seed_gives_the_same_text_again(client: openai.OpenAI) -> None:
    def text(seed: int) -> str:
        return client.completions.create(model="story", prompt=PROMPT, max_tokens=16, seed=seed).choices[0].text

    assert text(1) == text(1)
    assert text(-1) == text(-1)
    assert len({text(seed) for seed in range(6)}) > 3


def test_parameters_reach_the_engine(client: openai.OpenAI, llm: LLM) -> None:
    given: dict[str, Any] = {"temperature": 0.7, "top_p": 0.9, "presence_penalty": 0.5, "frequency_penalty": 0.3}
    extra: dict[str, Any] = {
        "top_k": 20,
        "min_p": 0.01,
        "repetition_penalty": 1.2,
        "min_tokens": 12,
        "bad_words": ["."],
    }
    both: dict[str, Any] = {"max_tokens": 30, "seed": 11, **given}
    created = client.completions.create(model="story", prompt=PROMPT, **both, extra_body=extra | {"priority": 2})
    right = llm.generate(PROMPT, SamplingParams(**both, **extra))
    assert created.choices[0].text == right[0].outputs[0].text
    plain = llm.generate(PROMPT, SamplingParams(max_tokens=30, seed=11))
    assert created.choices[0].text != plain[0].outputs[0].text


def test_a_bias_chooses_the_token(client: openai.OpenAI, llm: LLM) -> None:
    (token,) = llm.tokenizer.encode(" the", add_special_tokens=False)
    common: dict[str, Any] = {"model": "story", "prompt": PROMPT, "max_tokens": 3}
    assert client.completions.create(**common, logit_bias={str(token): 100}).choices[0].text == " the the the"
    created = client.completions.create(**common, logit_bias={str(token): -100}, temperature=0)
    assert " the" not in created.choices[0].text


@pytest.mark.parametrize("logprobs", [None, 1])
def test_best_of_shows_the_most_probable(client: openai.OpenAI, llm: LLM, logprobs: int | None) -> None:
    drawn = llm.generate(PROMPT, SamplingParams(n=5, max_tokens=12, seed=3, logprobs=0))[0].outputs
    means = {item.text: (item.cumulative_logprob or 0.0) / len(item.token_ids) for item in drawn}
    best = sorted(means, key=lambda text: -means[text])[:2]
    common: dict[str, Any] = {"model": "story", "prompt": [PROMPT, PROMPT], "max_tokens": 12, "seed": 3, "n": 2}
    created = client.completions.create(**common, best_of=5, logprobs=logprobs)
    assert [(choice.index, choice.text) for choice in created.choices] == list(enumerate(best * 2))
    assert all((choice.logprobs is None) == (logprobs is None) for choice in created.choices)
    assert created.usage is not None
    assert created.usage.completion_tokens == 2 * sum(len(item.token_ids) for item in drawn)
    with pytest.raises(openai.BadRequestError, match="cannot be streamed"):
        client.completions.create(**common, best_of=5, stream=True)


def test_beam_search_gives_the_engines_beams(client: openai.OpenAI, llm: LLM) -> None:
    params = SamplingParams(beam_width=4, n=2, max_tokens=12, length_penalty=0.5)
    right = [item.text for item in llm.generate(PROMPT, params)[0].outputs]
    extra = {"use_beam_search": True, "length_penalty": 0.5, "best_of": 4}
    common: dict[str, Any] = {"model": "story", "prompt": PROMPT, "max_tokens": 12, "n": 2, "extra_body": extra}
    assert [choice.text for choice in client.completions.create(**common).choices] == right
    assert [choice.text for choice in client.completions.create(**common, temperature=0).choices] == right
    pieces = [piece.choices[0] for piece in client.completions.create(**common, stream=True)]
    assert [(piece.index, piece.text) for piece in pieces] == list(enumerate(right))


# --- chats ------------------------------------------------------------------------------------------------------------


def test_a_chat_is_its_template_completed(client: openai.OpenAI, llm: LLM) -> None:
    ids = llm.tokenizer.encode(RENDERED, add_special_tokens=False)
    assert ids[0] == 1
    right = llm.generate([ids], SamplingParams(max_tokens=20, seed=2))[0].outputs[0]
    created = client.chat.completions.create(model="story", messages=CHAT, max_completion_tokens=20, seed=2)
    (choice,) = created.choices
    assert (choice.message.role, choice.message.content) == ("assistant", right.text)
    assert choice.finish_reason == right.finish_reason
    assert created.usage is not None
    assert (created.usage.prompt_tokens, created.usage.completion_tokens) == (len(ids), len(right.token_ids))
    assert created.object == "chat.completion"


def test_a_chat_goes_on_for_as_long_as_there_is_room(client: openai.OpenAI, llm: LLM) -> None:
    count = len(llm.tokenizer.encode(" Anna" * 100)) - len(llm.tokenizer.encode(" Anna" * 99))
    messages: Any = [{"role": "user", "content": " Anna" * (2020 // count)}]
    created = client.chat.completions.create(model="story", messages=messages, extra_body={"ignore_eos": True})
    assert created.usage is not None
    assert created.usage.total_tokens == 2048
    assert created.usage.completion_tokens > 0
    assert created.choices[0].finish_reason == "length"


@pytest.mark.parametrize("n", [1, 2])
def test_a_streamed_chat_adds_up_to_the_whole(client: openai.OpenAI, n: int) -> None:
    common: dict[str, Any] = {"model": "story", "messages": CHAT, "max_tokens": 12, "n": n, "seed": 4}
    common |= {"logprobs": True, "top_logprobs": 2}
    whole = client.chat.completions.create(**common)
    pieces = list(client.chat.completions.create(**common, stream=True, stream_options={"include_usage": True}))
    assert pieces[-1].usage == whole.usage
    assert {piece.object for piece in pieces} == {"chat.completion.chunk"}
    for choice in whole.choices:
        own = [piece.choices[0] for piece in pieces[:-1] if piece.choices[0].index == choice.index]
        assert [piece.delta.role for piece in own] == ["assistant"] + [None] * (len(own) - 1)
        assert "".join(piece.delta.content or "" for piece in own) == choice.message.content
        assert own[-1].finish_reason == choice.finish_reason
        assert choice.logprobs is not None
        tokens = choice.logprobs.content
        assert tokens is not None
        assert [token for piece in own for token in piece.logprobs.content] == tokens
        assert "".join(token.token for token in tokens) == choice.message.content
        assert all(len(token.top_logprobs) == 2 for token in tokens)
        assert all(bytes(token.bytes or ()).decode() == token.token for token in tokens)
        assert all(token.logprob <= token.top_logprobs[0].logprob for token in tokens)


def test_a_model_without_a_template_has_no_chats(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="has no chat template; use /v1/completions"):
        client.chat.completions.create(model="narrow", messages=CHAT)


# --- constrained output -----------------------------------------------------------------------------------------------


class Person(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid")
    age: int = pydantic.Field(ge=0, le=120)
    friends: list[bool] = pydantic.Field(max_length=2)


SCHEMA = Person.model_json_schema()


def test_a_chat_can_be_parsed_into_a_model(client: openai.OpenAI) -> None:
    for seed in range(3):
        parsed = client.chat.completions.parse(
            model="story",
            messages=CHAT,
            response_format=Person,
            max_tokens=60,
            seed=seed,
        )
        assert parsed.choices[0].finish_reason == "stop"
        assert isinstance(parsed.choices[0].message.parsed, Person)


FORMATS: list[tuple[dict[str, Any], Callable[[str], Any]]] = [
    (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA}}},
        Person.model_validate_json,
    ),
    ({"guided_json": SCHEMA}, Person.model_validate_json),
    ({"guided_json": json.dumps(SCHEMA)}, Person.model_validate_json),
    ({"structured_outputs": {"json": SCHEMA}}, Person.model_validate_json),
    ({"structured_outputs": {"choice": ["yes", "no"]}}, ["yes", "no"].index),
    ({"structured_outputs": {"regex": "[ab]{3}"}}, lambda text: re.fullmatch("[ab]{3}", text).start()),  # type: ignore[union-attr]
    ({"guided_choice": ["yes", "no"]}, ["yes", "no"].index),
    ({"guided_regex": "[ab]{3}"}, lambda text: re.fullmatch("[ab]{3}", text).start()),  # type: ignore[union-attr]
    ({"guided_grammar": 'start: "x" | "yy"'}, ["x", "yy"].index),
    ({"structured_outputs": {"grammar": 'start: "x" | "yy"'}}, ["x", "yy"].index),
]


@pytest.mark.parametrize(
    ("fields", "check"), FORMATS, ids=lambda value: next(iter(value)) if isinstance(value, dict) else ""
)
def test_output_keeps_to_what_constrains_it(
    client: openai.OpenAI, fields: dict[str, Any], check: Callable[[str], Any]
) -> None:
    created = client.completions.create(model="story", prompt=PROMPT, max_tokens=60, n=3, seed=1, extra_body=fields)
    assert [choice.finish_reason for choice in created.choices] == ["stop"] * 3
    for choice in created.choices:
        check(choice.text)
    stream = client.completions.create(
        model="story", prompt=PROMPT, max_tokens=60, seed=1, extra_body=fields, stream=True
    )
    assert "".join(piece.choices[0].text for piece in stream) == created.choices[0].text


def test_a_grammar_that_grows_too_large_is_the_clients_fault(client: openai.OpenAI) -> None:
    extra = {"guided_regex": r"[^a]{1,1517}{0,536}|\w{1,1437}[^a]{1,1216}{1,1158}", "seed": 1}
    with pytest.raises(openai.BadRequestError, match="grammar cannot be followed any further"):
        client.completions.create(model="story", prompt="hi", max_tokens=64, n=4, extra_body=extra)


@pytest.mark.parametrize(
    "fields", [{"response_format": {"type": "json_object"}}, {"structured_outputs": {"json_object": True}}]
)
def test_any_object_will_do(client: openai.OpenAI, fields: dict[str, Any]) -> None:
    created = client.completions.create(model="story", prompt=PROMPT, max_tokens=40, n=8, seed=1, extra_body=fields)
    assert all(choice.text.lstrip().startswith("{") for choice in created.choices)
    ended = [choice for choice in created.choices if choice.finish_reason == "stop"]
    assert ended
    assert all(isinstance(json.loads(choice.text), dict) for choice in ended)


# --- errors -----------------------------------------------------------------------------------------------------------

BAD: dict[str, tuple[dict[str, Any], str, str | None]] = {
    "unknown field": ({"colour": 1}, "unknown field `colour`", "colour"),
    "wrong type": ({"max_tokens": "8"}, "Expected `int | null`, got `str`", "max_tokens"),
    "wrong type inside": ({"stop": [1]}, "Expected `str`, got `int`", "stop"),
    "range": ({"temperature": -1}, "temperature must be finite and not negative", "temperature"),
    "too hot": ({"temperature": 2.5}, "temperature is limited to 2, got 2.5", "temperature"),
    "no tokens": ({"max_tokens": 0}, "max_tokens must be at least 1", "max_tokens"),
    "n": ({"n": 129}, "n is limited to 128", "n"),
    "n is 0": ({"n": 0}, "n must be at least 1", "n"),
    "logprobs": ({"logprobs": 21}, "logprobs is limited to 20", "logprobs"),
    "stop": ({"stop": ["a"] * 65}, "stop is limited to 64", "stop"),
    "empty stop": ({"stop": ""}, "stop holds an empty string", "stop"),
    "suffix": ({"suffix": "end"}, "suffix is not supported", "suffix"),
    "fewer than n": ({"best_of": 1, "n": 2}, "best_of must be at least n (2)", "best_of"),
    "many to choose from": ({"best_of": 129, "stream": False}, "best_of is limited to 128", "best_of"),
    "one beam": ({"use_beam_search": True}, "needs best_of, or n, above 1", "best_of"),
    "beams drawn": ({"use_beam_search": True, "n": 2, "temperature": 0.5}, "temperature must be left", "temperature"),
    "beam option": ({"length_penalty": 2.0}, "length_penalty needs beam_width above 1", "length_penalty"),
    "bias": ({"logit_bias": {"x": 1}}, "Expected `int`, got `str`", "logit_bias"),
    "bias of no token": ({"logit_bias": {"5000": 1}}, "logit_bias has token id 5000", "logit_bias"),
    "usage": (
        {"stream": False, "stream_options": {"include_usage": True}},
        "needs stream to be true",
        "stream_options",
    ),
    "no prompt": ({"prompt": []}, "prompt is empty", "prompt"),
    "empty prompt": ({"prompt": ""}, "the prompt has no tokens", "prompt"),
    "mixed prompt": ({"prompt": ["a", 1]}, "mixes texts, token ids", "prompt"),
    "no token": ({"prompt": [5000]}, "token id 5000; the vocabulary ends at 1023", "prompt"),
    "huge token": ({"prompt": [10**30]}, "the vocabulary ends at 1023", "prompt"),
    "many prompts": ({"prompt": ["a"] * 2049}, "prompt is limited to 2048", "prompt"),
    "long prompt": ({"prompt": "Anna " * 2100}, "longest sequence has 2048", "prompt"),
    "one bad of two": ({"prompt": [[5], [5000]]}, "token id 5000", "prompt"),
    "priority": ({"priority": -1}, "priority must be", "priority"),
    "format": ({"response_format": {"type": "xml"}}, "must be text, json_object or json_schema", "response_format"),
    "no schema": ({"response_format": {"type": "json_schema"}}, "schema is missing", "response_format"),
    "bad schema": ({"guided_json": {"type": "objct"}}, "json_schema cannot be compiled: Invalid type", None),
    "two ways": ({"guided_regex": "a", "guided_choice": ["b"]}, "in one way only", "guided_choice"),
    "with min_tokens": (
        {"guided_regex": "a", "min_tokens": 2},
        "min_tokens must be left at 0 with regex",
        "min_tokens",
    ),
}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("name", BAD)
def test_what_is_wrong_is_named(client: openai.OpenAI, name: str, stream: bool) -> None:
    fields, message, param = BAD[name]
    extra = {"stream": stream} | fields
    with pytest.raises(openai.BadRequestError, match=re.escape(message)) as caught:
        client.completions.create(model="story", prompt="a", extra_body=extra)
    assert (caught.value.param, caught.value.type) == (param, "invalid_request_error")


BAD_CHATS: dict[str, tuple[dict[str, Any], str, str | None]] = {
    "no messages": ({"messages": []}, "messages is empty", "messages"),
    "tools": ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "does not show in which form", "tools"),
    "store": ({"store": True}, "store=True is not supported", "store"),
    "audio": ({"modalities": ["text", "audio"]}, "modalities=", "modalities"),
    "top_logprobs": ({"top_logprobs": 2}, "top_logprobs needs logprobs", "top_logprobs"),
    "best_of": ({"best_of": 2}, "needs use_beam_search", "best_of"),
    "two limits": ({"max_tokens": 1, "max_completion_tokens": 1}, "not both", "max_tokens"),
    "long": ({"messages": [{"role": "user", "content": "Anna " * 2100}]}, "longest sequence has 2048", "messages"),
    "image": (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "u"}}]}]},
        "is of type 'image_url'",
        "messages",
    ),
    "unknown field": ({"messages": [{"role": "user", "content": "a", "mood": 1}]}, "unknown field `mood`", "mood"),
}


@pytest.mark.parametrize("name", BAD_CHATS)
def test_what_is_wrong_with_a_chat_is_named(client: openai.OpenAI, name: str) -> None:
    fields, message, param = BAD_CHATS[name]
    with pytest.raises(openai.BadRequestError, match=re.escape(message)) as caught:
        client.chat.completions.create(model="story", messages=CHAT, extra_body=fields)
    assert caught.value.param == param
    assert caught.value.code == ("context_length_exceeded" if name == "long" else None)


def test_fields_without_effect_and_nulls_are_accepted(client: openai.OpenAI) -> None:
    nothing = dict.fromkeys(("n", "stop", "seed", "logprobs", "temperature", "guided_json", "response_format"))
    created = client.completions.create(model="story", prompt="a", max_tokens=1, user="me", extra_body=nothing)
    assert len(created.choices) == 1
    extra = {
        "tools": [{"type": "function", "function": {"name": "f"}}],
        "tool_choice": "none",
        "metadata": {"a": "b"},
        "service_tier": "auto",
    }
    made_chat = client.chat.completions.create(
        model="story",
        messages=CHAT,
        max_tokens=1,
        extra_body=extra,
    )
    assert len(made_chat.choices) == 1


def test_an_unknown_model_is_not_found(client: openai.OpenAI) -> None:
    for ask in (client.completions.create, client.chat.completions.create):
        fields: dict[str, Any] = {"prompt": "a"} if ask == client.completions.create else {"messages": CHAT}
        with pytest.raises(openai.NotFoundError) as caught:
            ask(model="saga", **fields)
        assert (caught.value.code, caught.value.param) == ("model_not_found", "model")


BODIES = [b"", b"{", b"[1]", b"null", b'"a"', b"\xff\xfe", b'{"model":"story"}', b'{"model":1,"prompt":"a"}']
BODIES += [b'{"model":"story","prompt":"a","temperature":NaN}', b'{"model":"story","prompt":"\\ud800"}']
BODIES += [
    b'{"model":"story","prompt":' + b"[" * 100_000,
    b'{"model":"story","prompt":"a","guided_json":' + b"[" * 100_000,
]
BODIES += [b'{"model":"story","prompt":"a","temperature":1e999}', b'{"model":"story","prompt":{"a":1}}', b"a" * 100]


BODIES += [
    b'{"model":"story","prompt":"a","guided_json":"\\ud800"}',
    b'{"model":"story","prompt":"a","guided_json":"\xff"}',
]
BODIES += [b'{"model":"story","prompt":"a","guided_json":{"\xff":1}}', b'{"model":"story","prompt":"a","n\xff":1}']


@pytest.mark.parametrize("path", ["completions", "chat/completions"])
def test_bodies_that_are_none_are_the_clients_fault(site: Site, path: str) -> None:
    for body in BODIES:
        response = httpx.post(f"{site.url}/v1/{path}", content=body)
        assert response.status_code == 400, (body[:80], response.text)
        assert response.json()["error"]["type"] == "invalid_request_error"
        assert response.json()["error"]["message"]


def test_a_packed_body_is_refused_by_its_encoding(site: Site) -> None:
    body = gzip.compress(json.dumps({"model": "story", "prompt": "a"}).encode())
    response = httpx.post(f"{site.url}/v1/completions", content=body, headers={"content-encoding": "gzip"})
    assert response.status_code == 415
    assert response.json()["error"]["message"].startswith("bodies with content-encoding 'gzip' are not supported")


def test_unknown_routes_are_errors_in_openais_form(site: Site, client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as caught:  # which the client does not try again
        client.moderations.create(input="a")
    assert (caught.value.type, caught.value.code) == ("invalid_request_error", "unknown_url")
    for method, path in (
        ("GET", "completions"),
        ("POST", "models"),
        ("POST", "audio/speech"),
        ("DELETE", "models/story"),
    ):
        response = httpx.request(method, f"{site.url}/v1/{path}")
        assert response.status_code == 404
        assert response.json()["error"]["message"] == f"unknown request URL: {method} /v1/{path}"


# --- clients that leave, queues that are full, engines that die -------------------------------------------------------

ENDLESS: dict[str, Any] = {"prompt": PROMPT, "max_tokens": 1800, "extra_body": {"ignore_eos": True}}


@pytest.mark.parametrize("fields", [{}, {"n": 3}, {"prompt": [PROMPT, "Ben", "Clara"]}], ids=["one", "n", "prompts"])
def test_a_stream_that_is_closed_is_withdrawn(site: Site, client: openai.OpenAI, fields: dict[str, Any]) -> None:
    for _ in attempts("a stream that is not computed to its end"):
        before = site.generated("tokens")
        stream = client.completions.create(model="story", **ENDLESS | fields, stream=True)
        next(stream)
        begun = not site.idle("tokens")
        stream.close()
        eventually(lambda: site.idle("tokens"))
        if begun and site.generated("tokens") - before < ENDLESS["max_tokens"] * (3 if fields else 1):
            break


def test_a_client_that_does_not_wait_for_its_answer_is_forgotten(site: Site, client: openai.OpenAI) -> None:
    impatient = client.with_options(timeout=openai.Timeout(LIMIT_S, read=0.3))
    before = site.generated("tokens")
    with stopped(site.engine("tokens")), pytest.raises(openai.APITimeoutError):  # it might be done in time, else
        impatient.completions.create(model="story", **ENDLESS)
    client.completions.create(model="story", prompt="Ben", max_tokens=1)  # the engine has heard of all before that
    eventually(lambda: site.idle("tokens"))
    assert site.generated("tokens") - before < ENDLESS["max_tokens"]


def test_large_answers_are_made_beside_the_loop(client: openai.OpenAI, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: Any = {"model": "story", "prompt": [PROMPT, "Ben"], "max_tokens": 5, "temperature": 0, "logprobs": 2}
    expected = client.completions.create(**asked).choices
    used = [workers(monkeypatch, call.Call, "_used_up"), workers(monkeypatch, call.CallEvents, "_events")]
    used.append(workers(monkeypatch, answer.CompletionForm, "whole"))
    for module in (by_size, call):
        monkeypatch.setattr(module, "SMALL", -1)
    for choice, right in zip(client.completions.create(**asked).choices, expected, strict=True):
        assert choice.logprobs is not None
        assert right.logprobs is not None
        # one prompt may begin a step before the other, and sums of another batch are rounded otherwise
        values = pytest.approx(right.logprobs.token_logprobs, abs=1e-4)
        assert choice.logprobs.token_logprobs == values
        assert (choice.text, choice.logprobs.tokens) == (right.text, right.logprobs.tokens)
        assert choice.logprobs.text_offset == right.logprobs.text_offset
    texts = ["", ""]
    for event in client.completions.create(**asked, stream=True):
        for choice in event.choices:
            texts[choice.index] += choice.text
    assert texts == [choice.text for choice in expected]
    for names in used:
        assert {name.rpartition("_")[0] for name in names} == {"by-size"}


def test_a_queue_that_is_full_says_so(site: Site, client: openai.OpenAI) -> None:
    url, body = f"{site.url}/v1/completions", {"model": "narrow", "prompt": "a", "max_tokens": 1}
    engine = site.engine("narrow")
    with held_streams(site, client, 2) as streams:
        with httpx.Client(timeout=httpx.Timeout(LIMIT_S, read=0.3)) as waiting, pytest.raises(httpx.ReadTimeout):
            waiting.post(url, json=body)
        eventually(lambda: len(engine._queue.engines[0]._tickets) == 2)
        answer = _in_thread(lambda: httpx.post(url, json=body))
        eventually(lambda: len(engine._queue.engines[0]._tickets) == 3)
        with pytest.raises(openai.RateLimitError, match="max_queue_size is 1") as caught:
            client.completions.create(model="narrow", prompt="a")
        assert caught.value.code == "queue_full"
        assert int(caught.value.response.headers["retry-after"]) >= 1
        for stream in streams:
            stream.close()
    assert answer().status_code == 200


@contextmanager
def held_streams(site: Site, client: openai.OpenAI, count: int) -> Iterator[list[Any]]:
    """Streams of the model `narrow` that have begun and do not go on: its engine stands still meanwhile."""
    engine = site.engine("narrow")
    for _ in attempts("streams that are held before they have ended"):
        streams = [client.completions.create(model="narrow", **ENDLESS, stream=True) for _ in range(count)]
        for stream in streams:
            next(stream)
        with stopped(engine):
            site.read_pending()
            if len(engine._queue.engines[0]._tickets) == count:
                yield streams
                return
        for stream in streams:
            stream.close()


def _in_thread(work: Callable[[], httpx.Response]) -> Callable[[], httpx.Response]:
    from concurrent.futures import ThreadPoolExecutor

    pool = ThreadPoolExecutor(1)
    future = pool.submit(work)

    def result() -> httpx.Response:
        with pool:
            return future.result(LIMIT_S)

    return result


def test_an_engine_that_dies_is_an_error_in_the_stream_and_comes_back(site: Site, client: openai.OpenAI) -> None:
    pid = site.engine("narrow").replicas[0].pid
    assert pid is not None
    with held_streams(site, client, 1) as (stream,):
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(openai.APIError, match=r"engine narrow.* failed .*died"):
            list(stream)
    with pytest.raises(openai.InternalServerError, match="it starts again, try again soon") as caught:
        client.completions.create(model="narrow", prompt="a")
    assert (caught.value.status_code, caught.value.response.headers["retry-after"]) == (503, "1")
    eventually(lambda: site.engine("narrow").ready)
    assert client.completions.create(model="narrow", prompt="a", max_tokens=2).choices[0].text


def test_requests_are_counted(site: Site, client: openai.OpenAI) -> None:
    counters = site.service.counters["tokens", "1"].language
    assert counters is not None
    before = counters.total
    extra = {"ignore_eos": True}
    list(client.completions.create(model="story", prompt="Ben", max_tokens=5, stream=True, extra_body=extra))
    client.completions.create(model="story", prompt="Ben", max_tokens=5, extra_body=extra)
    after = counters.total
    assert after.generation_tokens - before.generation_tokens == 10
    assert after.prompt_tokens - before.prompt_tokens == 4
    assert after.time_to_first_token.count - before.time_to_first_token.count == 2
