"""Every sampling parameter at every entrance: it arrives with its value, or the table says why there is none."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from tests.server.service_fixtures import tensor

from hasten.cli.main import build_parser
from hasten.cli.options import sampling_params
from hasten.core.errors import ConfigError, HastenError
from hasten.core.sampling import DEFAULTS, KINDS, RULES, names_at
from hasten.core.sampling_rules import Entrance
from hasten.core.structured_outputs import CONSTRAINTS, STRUCTURED, structured
from hasten.core.types import SamplingParams
from hasten.core.values import Kind
from hasten.server.engine.wire import EngineInfo
from hasten.server.models.interfaces import INTERFACES
from hasten.server.models.interfaces import Kind as ModelKind
from hasten.server.models.text_model import read_text
from hasten.server.models.token_inputs import read_items
from hasten.server.models.work import Work
from hasten.server.openai.params import OpenAIError, completion_params, decode
from hasten.server.openai.types import CompletionRequest

INFO = EngineInfo(
    vocab_size=1024,
    max_model_len=128,
    eos_token_ids=(2,),
    bos_token_id=1,
    pad_token_id=3,
    num_blocks=100,
    block_size=16,
    max_num_seqs=8,
    dtype="fp32",
    device="cpu",
    ranks=1,
    tokenizer_folder=None,
    model_type="test",
)
VALUES: Mapping[str, Any] = {
    **{"n": 2, "temperature": 0.5, "top_k": 3, "top_p": 0.75, "min_p": 0.25, "repetition_penalty": 1.5},
    **{"presence_penalty": 0.5, "frequency_penalty": -0.5, "max_tokens": 7, "min_tokens": 3, "stop": ("a", "b")},
    **{"stop_token_ids": (5, 6), "stop_words_ids": ((5, 6), (7,)), "include_stop_str_in_output": True},
    **{"bad_words": ("x",), "bad_words_ids": ((5,), (6, 7)), "allowed_token_ids": (5, 6), "logit_bias": {5: 2.5}},
    **{"json_schema": '{"type": "null"}', "regex": "a+", "grammar": 'start: "a"', "choice": ("a", "b")},
    **{STRUCTURED: {"regex": "b+"}, "ignore_eos": True, "seed": 11, "logprobs": 1, "prompt_logprobs": 1},
    **{"skip_special_tokens": False, "detokenize": False, "beam_width": 3, "length_penalty": 2.0},
    **{"early_stopping": True, "beam_search_diversity_rate": 0.5},
}
"""Of each parameter one that is not its default."""
NEEDS: Mapping[str, Mapping[str, Any]] = {
    **{name: {"beam_width": 3} for name in ("length_penalty", "early_stopping", "beam_search_diversity_rate")},
    "prompt_logprobs": {"logprobs": 1},
}
"""Without which a parameter has no effect, or is refused."""
IMPLIED = {"n", "temperature", "top_k", "max_tokens", "seed", "detokenize", "ignore_eos", "logprobs", "length_penalty"}
"""What an entrance may set besides: FasterTransformer's tokens are no text and have a seed, beams are all shown."""
ELSEWHERE: Mapping[str, tuple[dict[str, Any], Any]] = {
    "stop_token_ids": ({"end_id": 5}, (5,)),
    "ignore_eos": ({"end_id": -1}, True),
    "json_schema": ({"guided_decoding_guide_type": "json_schema", "guided_decoding_guide": '{"a": 1}'}, '{"a": 1}'),
    "regex": ({"guided_decoding_guide_type": "regex", "guided_decoding_guide": "a+"}, "a+"),
    "temperature": ({"top_k": 3, "temperature": 0.5}, 0.5),
    "early_stopping": ({"early_stopping": 1, "beam_width": 3}, True),
}
"""TensorRT-LLM's inputs whose values are not the engine's, and what becomes of them."""


def command(given: Mapping[str, Any]) -> SamplingParams:
    argv = ["generate", "m", "--prompt", "x"]
    for name, value in given.items():
        flag = "--" + name.replace("_", "-")
        if isinstance(value, bool):
            argv.append(flag if value else flag.replace("--", "--no-"))
        else:
            argv += [f"{flag}={item}" for item in _items(name, value)]
    return sampling_params(build_parser().parse_args(argv))


def _items(name: str, value: Any) -> list[Any]:
    if KINDS[name] is Kind.RUNS:
        return [",".join(map(str, run)) for run in value]
    if KINDS[name] is Kind.BIASES:
        return [f"{token}={bias}" for token, bias in value.items()]
    return list(value) if isinstance(value, tuple) else [value]


def openai(given: Mapping[str, Any]) -> SamplingParams:
    fields = structured(given)
    if "beam_width" in fields:
        fields |= {"best_of": fields.pop("beam_width"), "use_beam_search": True}
    if fields.pop("prompt_logprobs", None):
        fields["echo"] = True
    body = json.dumps({"model": "m", "prompt": "x", **fields}).encode()
    return completion_params(decode(body, msgspec.json.Decoder(CompletionRequest)), 1)


def text(given: Mapping[str, Any]) -> SamplingParams:
    return _text({"sampling_parameters": ("BYTES", json.dumps(given))})


def text_parameters(given: Mapping[str, Any]) -> SamplingParams:
    return _text({}, _parameters(given))


def _parameters(given: Mapping[str, Any]) -> dict[str, Any]:
    """As Triton's protocol has them: without lists and objects."""
    plain = (bool, int, float, str)
    first = {name: value[0] if name in ("stop", "bad_words") else value for name, value in given.items()}
    return {name: value if isinstance(value, plain) else json.dumps(value) for name, value in first.items()}


def _text(inputs: Mapping[str, tuple[str, Any]], parameters: Mapping[str, Any] | None = None) -> SamplingParams:
    tensors = {"text_input": ("BYTES", "x"), **inputs}
    found = {name: tensor(name, kind, np.atleast_1d(value).tolist()) for name, (kind, value) in tensors.items()}
    outputs = frozenset(rule.name for rule in INTERFACES[ModelKind.TEXT].outputs)
    return read_text(Work("", "m", found, 0, outputs, parameters or {}), INFO).params


def tensorrt_llm(given: Mapping[str, Any]) -> SamplingParams:
    kinds = {rule.name: rule.datatype for rule in INTERFACES[ModelKind.TEXT].inputs}
    known = names_at(Entrance.TENSORRT_LLM)
    inputs = {known.get(name, name): value for name, value in given.items()}
    return _text({name: (kinds[name], value) for name, value in inputs.items()})


def token(given: Mapping[str, Any]) -> SamplingParams:
    rules = {rule.name: rule.datatype for rule in INTERFACES[ModelKind.TOKEN].inputs}
    given = {**({"top_k": 3} if "temperature" in given else {}), **given}
    names = {name: RULES[name].names.get(Entrance.TOKEN) for name in given}
    parameters = _parameters({name: value for name, value in given.items() if names[name] is None})
    columns: dict[str, Any] = {"input_ids": [5], "input_lengths": 1, "request_output_len": 16}
    columns |= {known: given[name] for name in given if (known := names[name])}
    for name in ("stop_words_list", "bad_words_list"):
        if name in columns:
            runs = columns[name]
            flat = [each for run in runs for each in run]
            ends = np.cumsum([len(run) for run in runs]).tolist()
            columns[name] = [flat, ends + [-1] * (len(flat) - len(ends))]
    inputs = {
        name: tensor(name, rules[name], [value if name == "input_ids" or isinstance(value, list) else [value]])
        for name, value in columns.items()
    }
    return read_items(Work("", "m", inputs, 1, frozenset(), parameters), INFO).items[0].params


READ: Mapping[Entrance, Callable[[Mapping[str, Any]], SamplingParams]] = {
    Entrance.COMMAND: command,
    Entrance.OPENAI: openai,
    Entrance.TEXT: text,
    Entrance.TENSORRT_LLM: tensorrt_llm,
    Entrance.TOKEN: token,
}


def test_the_table_is_complete() -> None:
    assert set(VALUES) == set(RULES) == set(KINDS) == set(DEFAULTS)
    for name, rule in RULES.items():
        assert all(rule.absent.values()), name
        assert bool(rule.absent.get(Entrance.COMMAND)) == (
            not SamplingParams.__dataclass_fields__[name].metadata["help"]
        )


@pytest.mark.parametrize("entrance", Entrance)
@pytest.mark.parametrize("name", VALUES)
def test_a_parameter_arrives_wherever_it_may(name: str, entrance: Entrance) -> None:
    given, wanted = {name: VALUES[name], **NEEDS.get(name, {})}, VALUES[name]
    if entrance is Entrance.TENSORRT_LLM and name in ELSEWHERE:
        given, wanted = ELSEWHERE[name]
    if entrance not in (Entrance.COMMAND, Entrance.OPENAI, Entrance.TEXT) and name == "logprobs":
        given, wanted = {name: True}, 0
    if entrance in RULES[name].absent:
        with pytest.raises((HastenError, KeyError)):
            READ[entrance](given)
        return
    params = READ[entrance](given)
    name, wanted = ("regex", "b+") if name == STRUCTURED else (name, wanted)
    if name == "json_schema":
        assert json.loads(params.json_schema or "") == json.loads(wanted)
    else:
        assert getattr(params, name) == wanted
    others = {each for each in VALUES if getattr(params, each) != DEFAULTS[each]}
    assert others <= {name, *given, *IMPLIED}


@pytest.mark.parametrize("name", [name for name in VALUES if Entrance.TEXT not in RULES[name].absent])
def test_parameters_of_a_request_hold_lists_and_objects_as_json(name: str) -> None:
    params = text_parameters({name: VALUES[name], **NEEDS.get(name, {})})
    name, wanted = ("regex", "b+") if name == STRUCTURED else (name, VALUES[name])
    assert getattr(params, name) == (wanted[:1] if name in ("stop", "bad_words") else wanted)


def test_json_in_parameters_is_limited() -> None:
    with pytest.raises(HastenError, match="the JSON has too many values to be read at once"):
        text_parameters({"logit_bias": json.dumps([[]] * 60_000)})


def test_a_schema_may_be_an_object_over_a_network() -> None:
    schema = {"type": "null"}
    for given in ({"json_schema": schema}, {STRUCTURED: {"json": schema}}):
        assert json.loads(text(given).json_schema or "") == schema


def test_a_beam_search_over_openais_api_has_what_only_it_has() -> None:
    params = openai({"beam_width": 4, "n": 2, "beam_search_diversity_rate": 0.5, "early_stopping": True})
    assert (params.beam_width, params.n, params.beam_search_diversity_rate) == (4, 2, 0.5)


@pytest.mark.parametrize("name", ["allowed_token_ids", "logit_bias", "stop_token_ids", "bad_words_ids"])
def test_lists_are_limited_at_every_entrance_of_a_server(name: str) -> None:
    count = (RULES[name].most or 0) + 1
    value: Any = dict.fromkeys(range(count), 1.0) if name == "logit_bias" else [5] * count
    value = [[5]] * count if name == "bad_words_ids" else value
    for read in (openai, text, text_parameters, *((token,) if name != "bad_words_ids" else ())):
        with pytest.raises(HastenError, match=f"{name} has {count} entries, the limit is"):
            read({name: value})


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--logit-bias", "5"], "'5' is not TOKEN=BIAS, such as 5=-2.5"),
        (["--bad-words-ids", "5,x"], "'5,x' is not a run of token ids"),
        (["--json-schema", "@/no/such/file"], "cannot read /no/such/file"),
        (["--regex", "a", "--choice", "b"], "may be given, got regex and choice"),
        (["--regex", ""], "regex is empty"),
    ],
)
def test_what_is_wrong_on_the_command_line_is_named(argv: list[str], message: str) -> None:
    with pytest.raises((ConfigError, HastenError), match=message):
        sampling_params(build_parser().parse_args(["generate", "m", "--prompt", "x", *argv]))


def test_a_grammar_may_stand_in_a_file(tmp_path: Path) -> None:
    file = tmp_path / "grammar.lark"
    file.write_text('start: "a"\n', encoding="utf-8")
    assert command({"grammar": f"@{file}"}).grammar == 'start: "a"\n'


def test_what_says_the_same_twice_is_refused() -> None:
    with pytest.raises(HastenError, match="input 'end_id' and parameter 'ignore_eos' both say"):
        read_items(
            Work("", "m", {"end_id": tensor("end_id", "UINT32", [[5]])}, 1, frozenset(), {"ignore_eos": True}), INFO
        )
    with pytest.raises(OpenAIError, match="one way only"):
        openai({"regex": "a", "guided_regex": "b"})
    for inputs in ({"guided_decoding_guide": "a"}, {"guided_decoding_guide_type": "regex"}):
        with pytest.raises(HastenError, match="guided_decoding_guide"):
            tensorrt_llm(inputs)
    with pytest.raises(HastenError, match="must be json, json_schema or regex, got 'ebnf_grammar'"):
        tensorrt_llm({"guided_decoding_guide_type": "ebnf_grammar", "guided_decoding_guide": "a"})


def test_constraints_are_one_field_over_a_network() -> None:
    for name in CONSTRAINTS:
        key = "json" if name == "json_schema" else name
        assert structured({name: VALUES[name], "top_k": 3}) == {"top_k": 3, STRUCTURED: {key: VALUES[name]}}


def test_the_documentation_has_every_name() -> None:
    text = (Path(__file__).parents[2] / "docs" / "operations.md").read_text(encoding="utf-8")
    rows = text.split("| Python | OpenAI | text model | TensorRT-LLM | token model |\n|---|---|---|---|---|\n")[
        1
    ].split("\n\n")[0]
    columns = [
        names_at(entrance) for entrance in (Entrance.OPENAI, Entrance.TEXT, Entrance.TENSORRT_LLM, Entrance.TOKEN)
    ]
    cells = [[name, *(column.get(name, "") for column in columns)] for name in RULES]
    assert [[cell.strip(" `") for cell in row.split("|")[1:-1]] for row in rows.splitlines()] == cells
