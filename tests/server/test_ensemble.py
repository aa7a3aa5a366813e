from collections.abc import AsyncGenerator, Callable
from contextlib import nullcontext
from itertools import pairwise
from typing import Any, cast

import numpy as np
import pytest
from tests.server.service_fixtures import DEMO, Outputs, Running, demo, streaming, tensor, token_request

from hasten.core.errors import ConfigError
from hasten.engine.text import Tokenizer
from hasten.server import tokenizing
from hasten.server.engine.queue import QueueLimits
from hasten.server.lifecycle import Registry
from hasten.server.models import text_processing
from hasten.server.models.config import completed, is_decoupled, parse_config
from hasten.server.models.ensemble import Ensemble, ordered_steps
from hasten.server.models.work import Work
from hasten.server.statistics import FailureReason
from hasten.server.types import ErrorKind, InferRequest, InferResponse, RequestedOutput, ServiceError, Tensor

pytestmark = pytest.mark.any_python

__all__ = ["demo", "streaming"]

TEXTS = ["Once upon a time", "The cat", "deepspeed is"]


def asked(texts: list[str], length: int = 12, **inputs: list[Any]) -> InferRequest:
    types = {"INPUT_2": "BYTES", "INPUT_3": "BYTES", "is_return_log_probs": "BOOL", "beam_width": "UINT32"}
    result = [
        tensor("INPUT_0", "BYTES", [[text] for text in texts]),
        tensor("INPUT_1", "UINT32", [[length]] * len(texts)),
        *(tensor(name, types[name], values) for name, values in inputs.items()),
    ]
    return InferRequest("ensemble", result)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_folder(DEMO)


def by_hand(demo: Running, tokenizer: Tokenizer, text: str, length: int = 12) -> list[int]:
    """Prompt and completion of a text, asked of the token model."""
    response = demo.infer(token_request([tokenizer.encode(text)], length), ["output_ids"])
    row: list[int] = response["output_ids"][0][0]
    return row


def test_text_to_text(demo: Running, tokenizer: Tokenizer) -> None:
    response = demo.infer(asked(TEXTS))
    tokens = [by_hand(demo, tokenizer, text) for text in TEXTS]
    assert response["OUTPUT_0"] == [[tokenizer.decode(ids)] for ids in tokens]
    assert response["sequence_length"] == [[len(ids)] for ids in tokens]
    assert set(response) == {"OUTPUT_0", "sequence_length"}
    for text, (output,) in zip(TEXTS, response["OUTPUT_0"], strict=True):
        assert output.startswith(text)


def test_optional_tensors_go_through_where_they_are_given(demo: Running) -> None:
    response = demo.infer(asked(TEXTS, is_return_log_probs=[[True]] * 3, beam_width=[[2]] * 3))
    assert np.shape(response["OUTPUT_0"]) == np.shape(response["cum_log_probs"]) == (3, 2)
    assert np.shape(response["output_log_probs"])[:2] == (3, 2)


def test_words_are_commas_apart(demo: Running) -> None:
    (free,) = demo.infer(asked(TEXTS[:1]))["OUTPUT_0"][0]
    words = free[len(TEXTS[0]) :].split()
    stopped = demo.infer(asked(TEXTS[:1], INPUT_3=[[f"nothing,{words[2]}"]]))["OUTPUT_0"][0][0]
    assert stopped == free[: free.index(words[2]) + len(words[2])]
    assert words[2] not in demo.infer(asked(TEXTS[:1], INPUT_2=[[f'"{words[2]}",x']]))["OUTPUT_0"][0][0]
    assert demo.infer(asked(TEXTS[:1], INPUT_2=[[""]], INPUT_3=[[""]]))["OUTPUT_0"] == [[free]]


def test_the_steps_alone(demo: Running, tokenizer: Tokenizer) -> None:
    request = InferRequest(
        "preprocessing",
        [
            tensor("QUERY", "BYTES", [["The cat"], ["a"]]),
            tensor("REQUEST_OUTPUT_LEN", "UINT32", [[5], [6]]),
            tensor("STOP_WORDS_DICT", "BYTES", [["house,dog"], [""]]),
        ],
    )
    response = demo.infer(request)
    ids = [tokenizer.encode("The cat"), tokenizer.encode("a")]
    assert response["REQUEST_INPUT_LEN"] == [[len(ids[0])], [len(ids[1])]]
    assert response["INPUT_ID"] == [ids[0], [*ids[1], *[0] * (len(ids[0]) - len(ids[1]))]]
    assert response["REQUEST_OUTPUT_LEN"] == [[5], [6]]
    assert response["BAD_WORDS_IDS"] == [[[0], [-1]]] * 2
    flat, ends = response["STOP_WORDS_IDS"][0]
    runs = [run for word in ("house", "dog") for run in tokenizer.words_ids(word)]
    assert flat[: ends[len(runs) - 1]] == [token for run in runs for token in run]
    assert response["STOP_WORDS_IDS"][1][1][0] == -1
    tokens = InferRequest("postprocessing", [tensor("TOKENS_BATCH", "UINT32", [[ids[0], ids[0]]])])
    assert demo.infer(tokens) == {"OUTPUT": [["The cat"] * 2]}
    tokens.inputs.append(tensor("SEQUENCE_LENGTH", "UINT32", [[1, 0]]))
    assert demo.infer(tokens) == {"OUTPUT": [[tokenizer.decode(ids[0][:1]), ""]]}


def preprocessing(*texts: str | bytes) -> InferRequest:
    inputs = [tensor("QUERY", "BYTES", [list(texts)]), tensor("REQUEST_OUTPUT_LEN", "UINT32", [[1]])]
    return InferRequest("preprocessing", inputs)


def postprocessing(lengths: list[list[int]]) -> InferRequest:
    inputs = [tensor("TOKENS_BATCH", "UINT32", [[[1]]]), tensor("SEQUENCE_LENGTH", "UINT32", lengths)]
    return InferRequest("postprocessing", inputs)


FIRST = "item 0 of the batch:"


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (asked(TEXTS[:1], 0), f"in ensemble 'ensemble', {FIRST} request_output_len must be at least 1, got 0"),
        (preprocessing(b"\xff"), f"{FIRST} input 'QUERY' is not UTF-8"),
        (preprocessing("a", "b"), f"{FIRST} input 'QUERY' has 2 texts, but an item has one"),
        (postprocessing([[1, 1]]), "input 'SEQUENCE_LENGTH' has shape [1, 2], not [1, 1]"),
        (asked(TEXTS[:1], INPUT_2=[["a\r\nb\rc"]]), f"{FIRST} input 'BAD_WORDS_DICT' is not CSV"),
        (
            asked(TEXTS[:1], INPUT_3=[["a," * 17_000]]),
            f"{FIRST} input 'STOP_WORDS_DICT' has 34000 characters",
        ),
        (asked(TEXTS[:1], INPUT_3=[["a," * 2000]]), f"{FIRST} input 'STOP_WORDS_DICT' has 2000 entries, the limit is"),
    ],
)
def test_what_is_wrong(demo: Running, request_: InferRequest, message: str) -> None:
    error = demo.refused(request_)
    assert error.kind is ErrorKind.INVALID
    assert message in str(error)


def test_the_distinct_words_of_a_batch_are_limited(demo: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_processing, "_MAX_DISTINCT_WORDS", 3)
    demo.infer(asked(TEXTS[:2], INPUT_2=[["a,b"], ["b,a"]], INPUT_3=[["a"], ["c"]]))
    error = demo.refused(asked(TEXTS[:2], INPUT_2=[["a,b"], ["b,a"]], INPUT_3=[["a"], ["c,d"]]))
    assert error.kind is ErrorKind.INVALID
    assert "more than 3 distinct words" in str(error)


def test_queries_have_the_limits_of_prompts(demo: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = demo.service.engines()["fastertransformer", "1"]
    monkeypatch.setattr(engine, "_limits", QueueLimits(max_prompt_tokens=3, max_text_bytes=20))
    error = demo.refused(preprocessing("a b c d"))
    assert "input 'QUERY': the prompt has 4 tokens, the limit is 3" in str(error)
    monkeypatch.setattr(engine.tokenizer, "most_bytes_per_token", None)
    error = demo.refused(preprocessing("a" * 21))
    assert "input 'QUERY': the text has more than 20 bytes, which is the limit (--max-text-bytes)" in str(error)


def test_a_refusal_to_tokenize_is_the_token_models(demo: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = demo.service.engines()["fastertransformer", "1"]
    monkeypatch.setattr(tokenizing, "_MAX_WAITING", 0)
    monkeypatch.setattr(engine, "estimated_wait", lambda priority: 6.5)
    before = engine.refused["queue_full"]
    error = demo.refused(preprocessing("a"))
    assert (error.kind, error.retry_after) == (ErrorKind.OVERLOADED, 6.5)
    assert "Exceeds maximum queue size: the texts of 0 requests wait" in str(error)
    assert engine.refused["queue_full"] == before + 1


def test_a_refusal_of_a_step_is_counted_as_one_of_the_ensemble(demo: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizing, "_MAX_WAITING", 0)
    failures = demo.service.counters["ensemble", "1"].failures
    before = failures[FailureReason.REJECTED]
    demo.refused(asked(TEXTS))
    assert failures[FailureReason.REJECTED] == before + 1


def test_an_ensemble_streams_as_its_steps_do(demo: Running, streaming: Running) -> None:
    assert streaming.service.is_decoupled("ensemble")
    assert not demo.service.is_decoupled("ensemble")
    responses = streaming.streamed(asked(TEXTS[:2]))
    texts = [result["OUTPUT_0"] for result, _ in responses]
    assert [final for _, final in responses] == [False] * (len(responses) - 1) + [True]
    assert texts[-1] == demo.infer(asked(TEXTS[:2]))["OUTPUT_0"]
    for before, after in pairwise(texts):
        assert all(len(first[0]) <= len(second[0]) for first, second in zip(before, after, strict=True))


def test_steps_are_counted_as_models_of_their_own(demo: Running) -> None:
    before = {stats.name: stats.inference_count for stats in demo.service.statistics()}
    demo.infer(asked(TEXTS))
    after = {stats.name: stats.inference_count for stats in demo.service.statistics()}
    grown = {name for name in after if after[name] == before[name] + 3}
    assert grown == {"ensemble", "preprocessing", "fastertransformer", "postprocessing"}


class Adder:
    """A step for tests: IN + 1, once for each response that it is to give."""

    engine = None
    language = None
    ready = True

    def __init__(self, responses: int = 1, error: bool = False) -> None:
        self.responses = responses
        self.error = error

    async def execute(self, work: Work) -> AsyncGenerator[InferResponse, None]:
        for count in range(self.responses):
            data = work.inputs["IN"].data + 1 + count
            if self.error:
                raise ServiceError(ErrorKind.INTERNAL, "this is the model's own error")
            yield work.response([Tensor("OUT", "FP32", data.shape, data)], count + 1 == self.responses)

    async def close(self, timeout: float) -> None:
        pass


class Shelf:
    """Models for tests, each with IN and OUT."""

    def __init__(self, **models: Adder) -> None:
        self.models = models
        self.batches: list[Any] = []

    def find(self, name: str, version: int = -1) -> Any:
        shelf = self

        class One(nullcontext[None]):
            number = 1

            def __init__(self) -> None:
                super().__init__()
                self.name = name
                self.model = shelf.models[name]
                self.config = parse_config(
                    'input { name: "IN" data_type: TYPE_FP32 dims: [ -1 ] } '
                    'output { name: "OUT" data_type: TYPE_FP32 dims: [ -1 ] }',
                    "x",
                )
                self.config.model_transaction_policy.decoupled = shelf.models[name].responses > 1

            def run(self, request: InferRequest) -> AsyncGenerator[InferResponse, None]:
                inputs = {tensor.name: tensor for tensor in request.inputs}
                return self.model.execute(Work("", self.name, inputs, 1, frozenset(), {}))

        return One()


def step(model: str, source: str, target: str) -> str:
    maps = f'input_map {{ key: "IN" value: "{source}" }} output_map {{ key: "OUT" value: "{target}" }}'
    return f'step {{ model_name: "{model}" model_version: -1 {maps} }}'


def config(*steps: str, output: str = "Y") -> Any:
    text = f"""platform: "ensemble" max_batch_size: 8 input {{ name: "X" data_type: TYPE_FP32 dims: [ -1 ] }}
    output {{ name: "{output}" data_type: TYPE_FP32 dims: [ -1 ] }} ensemble_scheduling {{ {" ".join(steps)} }}"""
    return completed(parse_config(text, "x"), "e")


def results(demo: Running, config: Any, shelf: Shelf) -> list[tuple[list[float], bool]]:
    async def collect() -> list[tuple[list[float], bool]]:
        ensemble = Ensemble(config, cast(Registry, shelf))
        work = Work("", "e", {"X": tensor("X", "FP32", [1.0, 2.0])}, 1, frozenset({"Y"}), {})
        return [(each.outputs[0].data.tolist(), each.final) async for each in ensemble.execute(work)]

    return demo.run(collect())


def test_steps_run_in_the_order_of_what_they_need(demo: Running) -> None:
    shuffled = config(step("c", "b", "Y"), step("a", "X", "a"), step("b", "a", "b"))
    assert [ordered_step.model_name for ordered_step in ordered_steps(shuffled)] == ["a", "b", "c"]
    assert results(demo, shuffled, Shelf(a=Adder(), b=Adder(), c=Adder())) == [([4.0, 5.0], True)]


def test_responses_multiply(demo: Running) -> None:
    result = config(step("a", "X", "a"), step("b", "a", "Y"))
    found = results(demo, result, Shelf(a=Adder(2), b=Adder(3)))
    assert [values[0] for values, _ in found] == [3, 4, 5, 4, 5, 6]
    assert [final for _, final in found] == [False] * 5 + [True]
    assert is_decoupled(result)


def test_a_step_that_fails_is_named(demo: Running) -> None:
    with pytest.raises(ServiceError, match="in ensemble 'e', this is the model's own error"):
        results(demo, config(step("a", "X", "Y")), Shelf(a=Adder(error=True)))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: config(), "model 'e': output 'Y' comes from no step"),
        (lambda: config(step("a", "Z", "Y")), "tensor 'Z' is needed by a step, but comes from no earlier one"),
        (
            lambda: config(step("a", "b", "a"), step("b", "a", "b")),
            "is needed by a step, but comes from no earlier one",
        ),
        (lambda: config(step("a", "X", "Y"), step("b", "X", "Y")), "tensor 'Y' comes from two places"),
        (lambda: config(step("a", "X", "X")), "tensor 'X' comes from two places"),
        (lambda: config(step("a", "X", "Y").replace('"IN"', '"NO"')), "model 'a' has no input 'NO'"),
        (lambda: config(step("a", "X", "Y").replace('"OUT"', '"NO"')), "model 'a' has no output 'NO'"),
    ],
)
def test_ensembles_that_cannot_be(demo: Running, make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Ensemble(make(), cast(Registry, Shelf(a=Adder(), b=Adder())))


def test_types_must_agree() -> None:
    result = config(step("a", "X", "Y"))
    result.input[0].data_type = 3
    with pytest.raises(ConfigError, match="tensor 'X' is UINT16, but input 'IN' of 'a' is FP32"):
        Ensemble(result, cast(Registry, Shelf(a=Adder())))


def test_requested_outputs(demo: Running) -> None:
    made: Outputs = demo.infer(asked(TEXTS[:1]), ["OUTPUT_0"])
    assert set(made) == {"OUTPUT_0"}
    request = asked(TEXTS[:1])
    request.outputs = [RequestedOutput("OUTPUT_1")]
    with pytest.raises(ServiceError, match="unexpected inference output 'OUTPUT_1' for model 'ensemble'"):
        demo.run(demo.service.infer(request))
