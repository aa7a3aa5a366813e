"""Sampling parameters: one table with their rules, and their names in each API.

A field of SamplingParams carries all that is to be known of it: its help text, the values that it takes, what it cannot
be combined with, and its names. The command line, OpenAI's API, Triton's models and batches derive theirs.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, fields
from typing import Any, get_args

from hasten.core.errors import InvalidRequestError
from hasten.core.sampling_rules import IDS_ALONE, Entrance, Rule, parameter
from hasten.core.structured_outputs import CONSTRAINTS, STRUCTURED, StructuredOutputsParams, constraint
from hasten.core.values import KEPT, Kind, require, with_known_names

_AT_LEAST_1 = (lambda value: value >= 1, "be at least 1")
_MOST_COMPLETIONS = 1 << 14
"""Of a prompt, which all have memory from then on when it is computed."""
_COMPLETIONS = (lambda value: 1 <= value <= _MOST_COMPLETIONS, f"be at least 1 and at most {_MOST_COMPLETIONS}")
_REPETITION = (lambda value: 1e-20 <= value <= 1e20, "be from 1e-20 to 1e20")
"""Logits times this, or divided by it, and then divided by a temperature, are numbers of fp32."""
_NOT_NEGATIVE = (lambda value: value >= 0, "not be negative")
_FINITE = (lambda value: 0 <= value < math.inf, "be finite and not negative")
_PENALTY = (lambda value: -2 <= value <= 2, "be from -2 to 2")
_MOST_LENGTH_PENALTY = 10
"""A length to this power is still a float, however long the sequence."""
_WORDS_ALONE = {Entrance.TOKEN: f"{IDS_ALONE}; the lists of words take token ids"}
_NO_TEXT = {Entrance.TOKEN: IDS_ALONE}
_NO_OUTPUT = "no output holds them"
_NO_OUTPUTS = {Entrance.TEXT: _NO_OUTPUT, Entrance.TENSORRT_LLM: _NO_OUTPUT, Entrance.TOKEN: _NO_OUTPUT}
_SAME = {Entrance.COMMAND: "it becomes one of four other parameters, each an option"}
_NO_CHOICE = {
    **{Entrance.COMMAND: "the command prints texts", Entrance.OPENAI: "answers are texts"},
    **{Entrance.TEXT: "the output is a text", Entrance.TENSORRT_LLM: "the output is a text"},
    Entrance.TOKEN: IDS_ALONE,
}
_INSTEAD = {
    "best_of": "draw n completions and compare their cumulative_logprob, or search with beam_width",
    "use_beam_search": "set beam_width",
    "guided_decoding": "use structured_outputs",
    "extra_args": "there are no plug-ins that would read them",
    "flat_logprobs": "leave it out: log-probabilities are built as they are read",
    "output_kind": "leave it out: generate gives finished outputs, stream those that grow",
    "logits_processors": "use logit_bias, allowed_token_ids, bad_words or structured_outputs",
    "truncate_prompt_tokens": "give the last token ids of the prompt alone",
    "spaces_between_special_tokens": "leave it out: text is decoded as the tokenizer has it",
}
"""Parameters of vLLM that are not supported, and what to use in their stead."""


@with_known_names(_INSTEAD)
@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How to choose the tokens of one request. Lists may be given as any sequence, None for an empty one; they are kept
    as tuples.

    Penalties, biases, banned tokens and `min_tokens` act first, then what constrains the output, then temperature, then
    min-p, top-k and top-p. Of `json_schema`, `regex`, `grammar`, `choice` and `structured_outputs` at most one is
    given.

    Stop strings, stop runs and banned runs are looked for in the output alone, as in vLLM: one that begins in the
    prompt is neither found nor banned. (transformers and FasterTransformer compare with prompt and output.)
    """

    n: int = parameter(
        1,
        "completions per prompt",
        _COMPLETIONS,
        trt="num_return_sequences",
        absent={Entrance.TOKEN: "an item has one completion, or those of its beams"},
    )
    temperature: float = parameter(
        1.0,
        "0 takes the most probable token; higher values sample more randomly",
        _FINITE,
        trt="temperature",
        ft="temperature",
        beams="never",
    )
    """0 is greedy, and so is anything below 1e-5."""
    top_k: int = parameter(
        0,
        "sample from the k most probable tokens; 0: from all",
        (lambda value: value >= -1, "be -1, 0 (both: all) or positive"),
        trt="top_k",
        ft="runtime_top_k",
        beams="never",
    )
    """0 or -1: all tokens."""
    top_p: float = parameter(
        1.0,
        "sample from the most probable tokens whose probabilities add up to this",
        (lambda value: 0 < value <= 1, "be above 0 and at most 1"),
        trt="top_p",
        ft="runtime_top_p",
        beams="never",
    )
    min_p: float = parameter(
        0.0,
        "minimum probability of a token, relative to the most probable one",
        (lambda value: 0 <= value <= 1, "be from 0 to 1"),
        beams="never",
    )
    repetition_penalty: float = parameter(
        1.0,
        "divides the logits of tokens already seen, prompt included; 1: none",
        _REPETITION,
        trt="repetition_penalty",
        ft="repetition_penalty",
    )
    """Over prompt and output, as in CTRL and Hugging Face."""
    presence_penalty: float = parameter(
        0.0,
        "subtracted from the logits of tokens already generated",
        _PENALTY,
        trt="presence_penalty",
        ft="presence_penalty",
    )
    """Over the output, as in OpenAI's API."""
    frequency_penalty: float = parameter(
        0.0,
        "subtracted from the logits of tokens already generated, times their count",
        _PENALTY,
        trt="frequency_penalty",
    )
    max_tokens: int | None = parameter(
        16, "maximum new tokens", _AT_LEAST_1, flag="--max-new-tokens", trt="max_tokens", ft="request_output_len"
    )
    """None: up to the model's maximum length."""
    min_tokens: int = parameter(
        0,
        "minimum new tokens, before which the output does not end",
        _NOT_NEGATIVE,
        flag="--min-new-tokens",
        trt="min_length",
        ft="min_length",
        grammar=False,
    )
    """Least number of tokens: no end or stop token before, and no stop words are looked for."""
    stop: Sequence[str] | str = parameter(
        (),
        "text that ends the output; may be given more than once",
        trt="stop_words",
        most=1024,
        beams="never",
        absent=_WORDS_ALONE,
    )
    """Strings that end the completion wherever they appear in its text, also across token borders."""
    stop_token_ids: Sequence[int] = parameter(
        (), "token id that ends the output; may be given more than once", trt="end_id", most=1024
    )
    stop_words_ids: Sequence[Sequence[int]] = parameter(
        (),
        "run of token ids, separated by commas, that ends the output; may be given more than once",
        ft="stop_words_list",
        most=1024,
        beams="never",
    )
    include_stop_str_in_output: bool = parameter(False, "keep the stop text in the output", absent=_NO_TEXT)
    bad_words: Sequence[str] = parameter(
        (),
        "text that must not be generated; may be given more than once",
        trt="bad_words",
        most=1024,
        grammar=False,
        absent=_WORDS_ALONE,
    )
    bad_words_ids: Sequence[Sequence[int]] = parameter(
        (),
        "run of token ids, separated by commas, that must not be generated; may be given more than once",
        ft="bad_words_list",
        most=2048,
        grammar=False,
    )
    allowed_token_ids: Sequence[int] = parameter(
        (),
        "token id that may be generated, and no other; may be given more than once",
        most=1 << 16,
        grammar=False,
    )
    """The only token ids that may be produced, the model's end token included; none given: all."""
    logit_bias: Mapping[int, float] = parameter(
        {},
        "TOKEN=BIAS, from -100 to 100, added to a token's logit; may be given more than once",
        most=4096,
    )
    json_schema: str | None = parameter(
        None,
        "JSON schema of the output, or @FILE that has it",
        openai=STRUCTURED,
        trt="guided_decoding_guide",
        kind="content",
        beams="never",
    )
    """A JSON schema, as JSON: the output is a value that it allows."""
    regex: str | None = parameter(
        None,
        "regular expression that the whole output matches",
        openai=STRUCTURED,
        trt="guided_decoding_guide",
        beams="never",
    )
    grammar: str | None = parameter(
        None,
        "grammar of the output in llguidance's Lark syntax, or @FILE that has it",
        openai=STRUCTURED,
        kind="content",
        beams="never",
    )
    """A grammar in llguidance's Lark syntax that the output keeps to."""
    choice: Sequence[str] = parameter(
        (), "text that the output may be; may be given more than once", openai=STRUCTURED, beams="never"
    )
    structured_outputs: StructuredOutputsParams | None = parameter(None, absent=_SAME)  # noqa: RUF009 - a field
    """One of the four above under vLLM's names; it becomes that field, and None itself."""
    ignore_eos: bool = parameter(False, "go on after the model's end token", trt="end_id", grammar=False)
    seed: int | None = parameter(
        None,
        "the same seed gives the same tokens, whatever else is in the batch",
        (lambda value: 0 <= value < 2**64, "be from 0 to 2^64-1"),
        trt="random_seed",
        ft="random_seed",
    )
    logprobs: int | None = parameter(
        None,
        "report log-probabilities of the chosen token and of the k most probable ones",
        _NOT_NEGATIVE,
        trt="return_log_probs",
        ft="is_return_log_probs",
        beams="never",
    )
    """Number of most probable tokens with log-probabilities beside the chosen one, of the model's own distribution."""
    prompt_logprobs: int | None = parameter(
        None,
        "log-probabilities of the prompt tokens, and of the k most probable ones",
        _NOT_NEGATIVE,
        openai="echo",
        absent=_NO_OUTPUTS,
    )
    skip_special_tokens: bool = parameter(True, "leave special tokens out of the text", absent=_NO_TEXT)
    detokenize: bool = parameter(True, absent=_NO_CHOICE)
    beam_width: int = parameter(
        1,
        "beam search with this many beams; --n of them are printed, best first",
        _AT_LEAST_1,
        openai="best_of",
        trt="beam_width",
        ft="beam_width",
    )
    """Above 1: number of beams of a search for the most probable completions; the `n` best are returned, best first."""
    length_penalty: float = parameter(
        1.0,
        "beams are compared by their log-probability divided by their length to this power",
        (
            lambda value: -_MOST_LENGTH_PENALTY <= value <= _MOST_LENGTH_PENALTY,
            f"be from -{_MOST_LENGTH_PENALTY} to {_MOST_LENGTH_PENALTY}",
        ),
        trt="length_penalty",
        ft="len_penalty",
        beams="only",
    )
    """Beams are compared by the sum of their log-probabilities, divided by their length to this power."""
    early_stopping: bool = parameter(
        False, "end a beam search as soon as enough beams have ended", trt="early_stopping", beams="only"
    )
    """End a beam search as soon as `beam_width` beams have ended, even if others might become better."""
    beam_search_diversity_rate: float = parameter(
        0.0,
        "subtracted from a beam's continuation, for each better one of that beam; 0: none",
        _FINITE,
        trt="beam_search_diversity_rate",
        ft="beam_search_diversity_rate",
        beams="only",
    )
    """Taken off the scores of a beam's continuations for the choice: once for its second best, twice for the next."""

    def __post_init__(self) -> None:
        set_ = object.__setattr__
        if self.structured_outputs is not None:
            for name, value in constraint(self.structured_outputs).items():
                require(not getattr(self, name), f"structured_outputs and {name} say the same; give one of them")
                set_(self, name, value)
            set_(self, "structured_outputs", None)
        # A wrong type is refused here: met in the middle of a step, it would end the engine for all requests.
        values, given = vars(self), self.given()
        for name, value in given.items():
            if value is not None or name not in _OPTIONAL:
                set_(self, name, KEPT[KINDS[name]](name, value))
        for name in given:
            value, rule = values[name], RULES[name]
            if value is not None and rule.holds is not None and not rule.holds(value):
                raise InvalidRequestError(f"{name} must {rule.wanted}, got {value}")
        most = self.max_tokens
        if most is not None and self.min_tokens > most:
            raise InvalidRequestError(f"min_tokens must be at most max_tokens ({most}), got {self.min_tokens}")
        require(self.detokenize or not self.stop, "stop strings need detokenize=True")
        self._check_constraints()
        self._check_beams()

    def given(self) -> dict[str, Any]:
        """The parameters that are not left at their defaults, by name."""
        values = vars(self)
        return {name: values[name] for name, default in DEFAULTS.items() if values[name] is not default}

    def _check_constraints(self) -> None:
        values = vars(self)
        given = [name for name in CONSTRAINTS if values[name]]
        if len(given) > 1:
            names = ", ".join(CONSTRAINTS)
            raise InvalidRequestError(f"at most one of {names} may be given, got {' and '.join(given)}")
        if given:
            self._check_left(_NOT_WITH_GRAMMAR, f"with {given[0]}")

    def _check_beams(self) -> None:
        if self.beam_width == 1:
            for name, default in _ONLY_WITH_BEAMS:
                if (value := getattr(self, name)) != default:
                    raise InvalidRequestError(f"{name} needs beam_width above 1, got {value!r}")
            return
        if self.n > self.beam_width:
            raise InvalidRequestError(f"n must be at most beam_width ({self.beam_width}), got {self.n}")
        self._check_left(_NOT_WITH_BEAMS, "with beam_width above 1")

    def _check_left(self, defaults: Sequence[tuple[str, Any]], where: str) -> None:
        """InvalidRequestError where one of these parameters does not have its default."""
        for name, default in defaults:
            if (value := getattr(self, name)) != default:
                raise InvalidRequestError(f"{name} must be left at {default!r} {where}, got {value!r}")

    def max_length(self, prompt_len: int, max_model_len: int | None) -> int:
        """Most tokens of prompt and output together, for a prompt of this length."""
        limits = [] if self.max_tokens is None else [prompt_len + self.max_tokens]
        return min(limits if max_model_len is None else [*limits, max_model_len])

    @property
    def greedy(self) -> bool:
        """Whether the most probable token is taken."""
        return self.temperature < 1e-5

    @property
    def has_penalty(self) -> bool:
        """Whether tokens seen before are made less probable, or more."""
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0

    @property
    def is_constrained(self) -> bool:
        """Whether the output keeps to a grammar."""
        return any(getattr(self, name) for name in CONSTRAINTS)

    @property
    def is_plain(self) -> bool:
        """Whether the model's most probable token is all that is asked for."""
        return (
            self.greedy
            and self.logprobs is None
            and self.min_tokens == 0
            and not (self.bad_words or self.bad_words_ids)
            and not self.has_penalty
            and not self.logit_bias
            and not self.allowed_token_ids
            and not self.is_constrained
        )


def _kind(option: Field[Any]) -> Kind:
    """The kind of a field's values, by its type; None may stand for a parameter that is not given."""
    hint = option.type
    return next(kind for known, kind in _KINDS if hint == known or hint == known | None)


_KINDS: tuple[tuple[Any, Kind], ...] = (
    (int, Kind.WHOLE),
    (float, Kind.NUMBER),
    (bool, Kind.FLAG),
    (str, Kind.TEXT),
    (Sequence[str], Kind.TEXTS),
    (Sequence[str] | str, Kind.TEXTS),
    (Sequence[int], Kind.TOKENS),
    (Sequence[Sequence[int]], Kind.RUNS),
    (Mapping[int, float], Kind.BIASES),
    (StructuredOutputsParams, Kind.STRUCTURED),
)
KINDS: Mapping[str, Kind] = {option.name: _kind(option) for option in fields(SamplingParams)}
"""Of each parameter."""
RULES: Mapping[str, Rule] = {option.name: option.metadata["rule"] for option in fields(SamplingParams)}
"""Of each parameter."""
DEFAULTS: Mapping[str, Any] = {
    option.name: {} if option.default is MISSING else option.default for option in fields(SamplingParams)
}


def names_at(entrance: Entrance) -> dict[str, str]:
    """What an entrance calls each parameter that it has."""
    return {name: rule.names.get(entrance, name) for name, rule in RULES.items() if entrance not in rule.absent}


_OPTIONAL = frozenset(option.name for option in fields(SamplingParams) if type(None) in get_args(option.type))
"""Those that may be None."""
_ONLY_WITH_BEAMS = [(name, DEFAULTS[name]) for name, rule in RULES.items() if rule.beams == "only"]
_NOT_WITH_BEAMS = [(name, DEFAULTS[name]) for name, rule in RULES.items() if rule.beams == "never"]
_NOT_WITH_GRAMMAR = [(name, DEFAULTS[name]) for name, rule in RULES.items() if not rule.grammar]
