"""Constrained output: what is not cut off is a value of its grammar, whatever the model would rather say."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from hasten import LLM, FinishReason, InvalidRequestError, RequestOutput, SamplingParams
from hasten.engine import constraint
from hasten.engine.constraint import Constraint, fill_allowed
from hasten.engine.grammar import GrammarCompiler
from hasten.engine.text import Tokenizer

DEMO = Path(__file__).parents[2] / "examples" / "demo-model"
EOS = 2

SCHEMAS: dict[str, dict[str, Any]] = {
    "person": {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 12},
            "age": {"type": "integer", "minimum": 0, "maximum": 150},
            "tags": {"type": "array", "items": {"enum": ["cat", "dog", None]}, "minItems": 1, "maxItems": 3},
        },
        "required": ["name", "age", "tags"],
        "additionalProperties": False,
    },
    "either": {"anyOf": [{"type": "boolean"}, {"type": "array", "items": {"type": "integer"}, "maxItems": 2}]},
    "nested": {
        "$defs": {
            "node": {
                "type": "object",
                "properties": {"ok": {"type": "boolean"}},
                "required": ["ok"],
                "additionalProperties": False,
            }
        },
        "type": "array",
        "items": {"$ref": "#/$defs/node"},
        "minItems": 2,
        "maxItems": 2,
    },
}
TYPES: dict[str, Any] = {"object": dict, "array": list, "string": str, "boolean": bool, "null": type(None)}


def fits(value: Any, schema: dict[str, Any], root: dict[str, Any]) -> bool:
    """Whether a value is what a schema of the kinds above allows."""
    if "$ref" in schema:
        return fits(value, root["$defs"][schema["$ref"].rpartition("/")[2]], root)
    if "anyOf" in schema:
        return any(fits(value, option, root) for option in schema["anyOf"])
    if "enum" in schema:
        return value in schema["enum"]
    if schema["type"] == "integer":
        return type(value) is int and schema.get("minimum", value) <= value <= schema.get("maximum", value)
    if not isinstance(value, TYPES[schema["type"]]):
        return False
    if isinstance(value, str):
        return len(value) <= schema["maxLength"]
    if isinstance(value, list):
        sized = schema.get("minItems", 0) <= len(value) <= schema["maxItems"]
        return sized and all(fits(item, schema["items"], root) for item in value)
    if isinstance(value, dict):
        known = schema["properties"]
        closed = schema.get("additionalProperties", True) or set(value) <= set(known)
        present = all(name in value for name in schema["required"])
        return closed and present and all(fits(value[name], known[name], root) for name in set(value) & set(known))
    return True


def check(outputs: list[RequestOutput], schema: dict[str, Any], least: int = 1) -> None:
    """What ended by itself is a value of the schema, and so many did; the rest was cut off."""
    completions = [completion for output in outputs for completion in output.outputs]
    ended = [completion for completion in completions if completion.finish_reason is FinishReason.STOP]
    assert len(ended) >= least
    assert all(completion.finish_reason in ("stop", "length") for completion in completions)
    for completion in ended:
        assert fits(json.loads(completion.text), schema, schema), completion.text


def constrained(schema: dict[str, Any], **params: Any) -> SamplingParams:
    return SamplingParams(json_schema=json.dumps(schema), **({"max_tokens": 80} | params))


@pytest.fixture(scope="module", params=[False, True], ids=["steps", "overlapped"])
def llm(request: pytest.FixtureRequest) -> Iterator[LLM]:
    with LLM(DEMO, overlap_steps=request.param) as engine:
        yield engine
        assert engine.engine.scheduler.blocks.num_used == 0


@pytest.fixture(scope="module")
def compiler() -> Iterator[GrammarCompiler]:
    result = GrammarCompiler(Tokenizer.from_folder(DEMO), 1024, (EOS,))
    yield result
    result.close()


@pytest.mark.parametrize("name", SCHEMAS)
@pytest.mark.parametrize("temperature", [0, 1.0])
def test_outputs_are_values_of_their_schema(llm: LLM, name: str, temperature: float) -> None:
    schema = SCHEMAS[name]
    params = [constrained(schema, temperature=temperature, seed=seed) for seed in range(4)]
    check(llm.generate(["Anna walked to the harbour"] * 4, params), schema, least=3)


def test_completions_of_one_prompt_go_their_own_ways(llm: LLM) -> None:
    schema = SCHEMAS["person"]
    outputs = llm.generate("Anna", constrained(schema, n=4, seed=7))
    check(outputs, schema, least=3)
    assert len({completion.text for completion in outputs[0].outputs}) == 4


def test_plain_requests_beside_constrained_ones_are_what_they_are_alone(llm: LLM) -> None:
    plain = SamplingParams(temperature=0, max_tokens=20)
    drawn = SamplingParams(seed=5, max_tokens=20)
    alone = [llm.generate("Ben opened", params)[0].outputs[0].token_ids for params in (plain, drawn)]
    schema = SCHEMAS["person"]
    outputs = llm.generate(["Ben opened"] * 4, [plain, constrained(schema, seed=1), drawn, constrained(schema, seed=2)])
    assert [outputs[0].outputs[0].token_ids, outputs[2].outputs[0].token_ids] == alone
    check([outputs[1], outputs[3]], schema, least=2)


@pytest.mark.any_python
def test_chunked_and_preempted_requests_make_the_same_output(llm: LLM) -> None:
    schema, prompts = SCHEMAS["person"], ["Anna looked at the garden and " * 4, "Ben", "Clara opened the window"] * 2
    params = [constrained(schema, seed=seed) for seed in range(6)]
    right = [output.outputs[0].text for output in llm.generate(prompts, params)]
    memory = 12 * llm.engine.worker.runner.block_bytes
    small: dict[str, Any] = {
        "kv_cache_memory": memory,
        "max_num_batched_tokens": 12,
        "max_num_seqs": 6,
        "max_model_len": 160,
    }
    with LLM(DEMO, overlap_steps=llm.engine.worker.overlap, **small) as own:
        outputs = own.generate(prompts, params)
        assert own.engine.scheduler.stats.preemptions > 0
    assert [output.outputs[0].text for output in outputs] == right
    check(outputs, schema, least=4)


@pytest.mark.parametrize(
    ("params", "pattern"),
    [
        ({"regex": r"[0-9]{3}-[a-f]{1,4}x"}, r"[0-9]{3}-[a-f]{1,4}x"),
        ({"choice": ["yes", "yes, please", 'no\n"', "☃"]}, r'yes|yes, please|no\n"|☃'),
        ({"grammar": 'start: "a"{2,4} b\nb: /[xy]/ | "é"'}, "a{2,4}[xyé]"),
        ({"json_schema": "true"}, r"[^ ](.|\n)*"),
    ],
)
def test_other_kinds_of_grammars(llm: LLM, params: dict[str, Any], pattern: str) -> None:
    outputs = llm.generate(["Anna"] * 6, [SamplingParams(seed=seed, max_tokens=60, **params) for seed in range(6)])
    ended = [each.outputs[0].text for each in outputs if each.outputs[0].finish_reason is FinishReason.STOP]
    assert len(ended) >= 3
    assert all(re.fullmatch(pattern, text) for text in ended), ended


def test_streams_end_with_the_value_and_not_after_it(llm: LLM) -> None:
    outputs = list(llm.stream("Anna", constrained(SCHEMAS["either"], temperature=0)))
    last = outputs[-1].outputs[0]
    assert last.finish_reason is FinishReason.STOP
    assert fits(json.loads(last.text), SCHEMAS["either"], SCHEMAS["either"])
    assert [output.outputs[0].finish_reason for output in outputs[:-1]] == [None] * (len(outputs) - 1)


def test_log_probabilities_are_still_the_models_own(llm: LLM) -> None:
    output = llm.generate("Anna", SamplingParams(choice=["☃"], temperature=0, logprobs=1))[0].outputs[0]
    assert output.text == "☃"
    assert output.logprobs is not None
    assert all(max(entry.rank for entry in step.values()) > 1 for step in output.logprobs[:1])


FORCED: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0},
    "drawn": {"seed": 3},
    "siblings": {"seed": 4, "n": 3},
    "penalties": {"seed": 5, "repetition_penalty": 1.2, "frequency_penalty": 0.3},
    "stop": {"seed": 6, "stop": ['ge"', "ag"]},
    "stop token": {"seed": 6, "stop_token_ids": [21]},
    "cut off": {"seed": 7, "max_tokens": 11},
    "cut off within": {"seed": 7, "max_tokens": 13},
    "log-probabilities": {"seed": 8, "logprobs": 1},
}


@pytest.mark.any_python
@pytest.mark.usefixtures("forked_ranks")
@pytest.mark.parametrize("ranks", [1, 2])
def test_tokens_that_a_grammar_forces_are_taken_without_a_step(ranks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    schema = SCHEMAS["person"] | {"properties": SCHEMAS["person"]["properties"] | {"population": {"type": "boolean"}}}
    schema |= {"required": list(schema["properties"])}
    params = [constrained(schema, **options) for options in FORCED.values()]
    with LLM(DEMO, device="cpu", overlap_steps=False, tensor_parallel_size=ranks) as llm:

        def run() -> tuple[list[RequestOutput], int]:
            before = llm.engine.stats.steps
            return llm.generate(["Anna"] * len(params), params), llm.engine.stats.steps - before

        found, steps = run()
        assert llm.engine.scheduler.blocks.num_used == 0
        assert not llm.engine.scheduler.running
        alone = llm.generate("Anna", params[1])
        monkeypatch.setattr(Constraint, "forced", lambda _self: [])
        one_by_one, more_steps = run()
    for name, output, expected in zip(FORCED, found, one_by_one, strict=True):
        # the last bits of log-probabilities depend on what else is in the batch
        same = [
            [replace(each, logprobs=None, cumulative_logprob=None) for each in o.outputs] for o in (output, expected)
        ]
        assert same[0] == same[1], name
    assert [completion.token_ids for completion in alone[0].outputs] == [found[1].outputs[0].token_ids]
    assert len(found[-1].outputs[0].logprobs or ()) == len(found[-1].outputs[0].token_ids)
    assert more_steps == max(len(c.token_ids) for output in one_by_one for c in output.outputs)
    assert steps == len(found[-1].outputs[0].token_ids)  # log-probabilities need each step


def test_fewer_steps_where_much_is_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    params = SamplingParams(regex="yes, of course|no, not at all, never", max_tokens=60, temperature=0)
    with LLM(DEMO, device="cpu", overlap_steps=False) as llm:
        (quick,) = llm.generate("Anna", params)
        steps = llm.engine.stats.steps
        monkeypatch.setattr(Constraint, "forced", lambda _self: [])
        (slow,) = llm.generate("Anna", params)
        assert quick.outputs == slow.outputs
        assert llm.engine.stats.steps - steps == len(slow.outputs[0].token_ids)
        assert steps <= 3


def test_max_tokens_cuts_off(llm: LLM) -> None:
    output = llm.generate("Anna", constrained(SCHEMAS["person"], max_tokens=3))[0].outputs[0]
    assert (output.finish_reason, len(output.token_ids)) == (FinishReason.LENGTH, 3)


def test_a_value_that_ends_with_max_tokens_has_stopped(llm: LLM) -> None:
    output = llm.generate("Anna", SamplingParams(regex="a", max_tokens=1))[0].outputs[0]
    assert (output.text, output.finish_reason) == ("a", FinishReason.STOP)


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "GBNF": (
        {"grammar": 'root ::= "a"'},
        "; rules of Lark are written `name: ...`, not `name ::= ...`, and the first one is `start`",
    ),
    "no JSON": ({"json_schema": "{"}, "json_schema cannot be compiled"),
    "no schema": ({"json_schema": "[1]"}, "json_schema cannot be compiled"),
    "unknown type": ({"json_schema": '{"type": "objct"}'}, "Invalid type: objct"),
    "unknown keyword": ({"json_schema": '{"not": {"type": "string"}}'}, "Unimplemented keys"),
    "far reference": ({"json_schema": '{"$ref": "http://localhost/schema"}'}, "not present in a registry"),
    "circle": ({"json_schema": '{"$ref": "#"}'}, "json_schema cannot be satisfied"),
    "no value": ({"json_schema": '{"allOf": [{"type": "string"}, {"type": "null"}]}'}, "Unsatisfiable"),
    "no regex": ({"regex": "(a"}, "unclosed group"),
    "no grammar": ({"grammar": "start: missing"}, "grammar cannot be compiled"),
    "too long": ({"grammar": "a" * 70_000}, "70000 characters, more than 65536"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_cannot_be_compiled_is_refused_when_it_comes(llm: LLM, name: str) -> None:
    params, message = WRONG[name]
    with pytest.raises(InvalidRequestError, match=re.escape(message)):
        llm.generate("Anna", SamplingParams(**params))
    assert not llm.engine.has_unfinished


@pytest.mark.parametrize("name", ["rules", "references"])
def test_rules_that_refer_to_each_other_in_a_long_chain_do_not_end_the_process(name: str, llm: LLM) -> None:
    if name == "rules":
        rules = [f"r{index}: r{index + 1}" for index in range(4500)]
        params = SamplingParams(grammar="\n".join(["start: r0", *rules, 'r4500: "a"']))
    else:
        chain: dict[str, Any] = {
            f"d{index}": {"properties": {"a": {"$ref": f"#/$defs/d{index + 1}"}}} for index in range(1100)
        }
        params = constrained({"$defs": chain | {"d1100": {"type": "string"}}, "$ref": "#/$defs/d0"}, max_tokens=8)
    assert llm.generate("Anna", params)[0].outputs[0].finish_reason is not None


@pytest.mark.parametrize(
    "other",
    [{"regex": "a"}, {"min_tokens": 1}, {"ignore_eos": True}, {"bad_words": ["a"]}, {"beam_width": 2}],
    ids=lambda other: next(iter(other)),
)
def test_what_cannot_go_with_a_grammar_is_refused(other: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequestError, match="json_schema"):
        SamplingParams(json_schema="{}", **other)


def test_without_a_tokenizer_or_an_end_token_there_is_no_grammar() -> None:
    params = SamplingParams(regex="a")
    for tokenizer, ends, message in (
        (None, (EOS,), "needs a tokenizer"),
        (Tokenizer.from_folder(DEMO), (), "needs an end token"),
    ):
        with pytest.raises(InvalidRequestError, match=message):
            GrammarCompiler(tokenizer, 1024, ends).compiled(params)
    assert GrammarCompiler(None, 1024, ()).compiled(SamplingParams()) is None


def begin(compiler: GrammarCompiler, **params: Any) -> Constraint:
    grammar = compiler.compiled(SamplingParams(**params))
    assert grammar is not None
    return Constraint.begin(grammar)


def masks_of(states: list[Constraint]) -> NDArray[np.int32]:
    """In memory that held something else."""
    masks = np.full((len(states), states[0].words), -1, np.int32)
    fill_allowed(states, masks)
    return masks


def tokens(state: Constraint) -> set[int]:
    return tokens_of(masks_of([state])[0])


def tokens_of(words: NDArray[np.int32]) -> set[int]:
    return {token for token in range(1024) if words[token // 32] >> (token % 32) & 1}


def test_the_end_token_is_allowed_only_where_the_text_is_whole(compiler: GrammarCompiler) -> None:
    first, second = (Tokenizer.from_folder(DEMO).encode(text, add_special_tokens=False) for text in ("a", "b"))
    assert (len(first), len(second)) == (1, 1)
    state = begin(compiler, regex="a(b)?")
    assert tokens(state) == {first[0]} | (tokens(state) - {EOS})
    assert EOS not in tokens(state)
    assert not state.accept(first[0])
    assert tokens(state) == {second[0], EOS}
    other = state.fork()
    assert other.accept(second[0])
    assert tokens(state) == {second[0], EOS}
    assert state.error is None
    state.accept(first[0])
    assert state.error is not None


@pytest.mark.parametrize("count", [2001, 20_000])
def test_any_number_of_choices(llm: LLM, compiler: GrammarCompiler, count: int) -> None:
    choices = [f"choice {index:05}" for index in range(count)]
    output = llm.generate("Anna", SamplingParams(choice=choices, temperature=0, max_tokens=20))[0].outputs[0]
    assert (output.finish_reason, output.text in choices) == (FinishReason.STOP, True)


def test_an_ambiguous_grammar_ends_its_request_once_a_token_takes_too_long(
    compiler: GrammarCompiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constraint, "_USUAL_SECONDS", 0.0)
    monkeypatch.setattr(constraint, "_MOST_SECONDS", 0.002)
    state = begin(compiler, grammar='start: e\ne: e e | "a" | "b" | e "c" e')
    other = begin(compiler, regex="a*")
    (letter,) = Tokenizer.from_folder(DEMO).encode("a", add_special_tokens=False)
    for _ in range(1000):  # the time for a token grows with the square of their number
        masks = masks_of([state, other])
        assert letter in tokens_of(masks[0]) or state.error is not None
        if state.error is not None:
            break
        assert not state.accept(letter)
    assert state.error is not None
    assert "make the grammar less ambiguous" in state.error
    assert other.error is None


def test_a_vocabulary_that_is_larger_than_the_tokenizers(tiny_bloom_odd_vocab: Path) -> None:
    with LLM(tiny_bloom_odd_vocab) as llm:
        outputs = llm.generate([[5, 6]] * 3, [constrained(SCHEMAS["either"], seed=seed) for seed in range(3)])
        check(outputs, SCHEMAS["either"], least=2)


@pytest.mark.gpu
def test_a_gpus_tokens_keep_to_a_grammar_too() -> None:
    with LLM(DEMO, device="cuda") as llm:
        schema = SCHEMAS["person"]
        plain = SamplingParams(temperature=0, max_tokens=40)
        alone = llm.generate("Ben", plain)[0].outputs[0].token_ids
        outputs = llm.generate(["Ben"] * 5, [plain, *(constrained(schema, seed=seed) for seed in range(4))])
        check(outputs[1:], schema, least=3)
        assert outputs[0].outputs[0].token_ids == alone
