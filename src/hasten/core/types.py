"""Requests and their results. Field names follow vLLM's, so that its users can change the import alone."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from numbers import Integral, Real

from hasten.core.errors import InvalidRequestError


class FinishReason(StrEnum):
    """Why a completion ended."""

    STOP = "stop"
    """An end token, a stop token or a stop word."""
    LENGTH = "length"
    """`max_tokens` or the longest sequence of the model."""
    ABORT = "abort"
    """The caller withdrew it."""
    ERROR = "error"
    """It could not be continued; `stop_reason` says why."""


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise InvalidRequestError(message)


_WHOLE = ("n", "top_k", "max_tokens", "min_tokens", "beam_width")
_WHOLE_OR_NONE = ("seed", "logprobs", "prompt_logprobs")
_NUMBERS = (
    *("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty"),
    *("length_penalty", "beam_search_diversity_rate"),
)
_NOT_WITH_BEAMS = {
    "temperature": 1.0,
    "top_k": 0,
    "top_p": 1.0,
    "min_p": 0.0,
    "stop": (),
    "stop_words_ids": (),
    "logprobs": None,
    "logit_bias": {},
    "json_schema": None,
    "regex": None,
    "grammar": None,
    "choice": (),
}
"""What beam search cannot take into account, and the values that ask for nothing."""
_ONLY_WITH_BEAMS = {"length_penalty": 1.0, "early_stopping": False, "beam_search_diversity_rate": 0.0}
"""What only beam search takes into account, and the values that ask for nothing."""
_CONSTRAINTS = ("json_schema", "regex", "grammar", "choice")
_NOT_WITH_CONSTRAINTS = {"min_tokens": 0, "ignore_eos": False, "bad_words": (), "bad_words_ids": ()}
"""What could leave no token that a grammar allows, or keep its end from being one."""
_MOST_LENGTH_PENALTY = 10
"""A length to this power is still a float, however long the sequence."""


def _is_whole(value: object) -> bool:
    return type(value) is int or (isinstance(value, Integral) and not isinstance(value, bool))


def _is_number(value: object) -> bool:
    return type(value) is float or _is_whole(value) or (isinstance(value, Real) and not isinstance(value, bool))


def _tokens(name: str, ids: Sequence[int]) -> tuple[int, ...]:
    _require(all(map(_is_whole, ids)), f"{name} holds something that is not a token id: {ids!r}")
    return tuple(int(token) for token in ids)


def _token_lists(name: str, lists: Sequence[Sequence[int]]) -> tuple[tuple[int, ...], ...]:
    made = tuple(_tokens(name, ids) for ids in lists)
    _require(all(made), f"{name} holds an empty list")
    return made


def _strings(name: str, given: Sequence[str] | str) -> tuple[str, ...]:
    made = (given,) if isinstance(given, str) else tuple(given)
    _require(all(isinstance(text, str) for text in made), f"{name} holds something that is not a string: {given!r}")
    _require(all(made), f"{name} holds an empty string")
    return made


def _biases(given: Mapping[int, float]) -> dict[int, float]:
    _require(isinstance(given, Mapping), f"logit_bias must map token ids to numbers, got {given!r}")
    for token, bias in given.items():
        _require(_is_whole(token), f"logit_bias has something that is not a token id: {token!r}")
        _require(_is_number(bias) and -100 <= bias <= 100, f"logit_bias must be from -100 to 100, got {bias!r}")
    return {int(token): float(bias) for token, bias in given.items()}


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How to choose the tokens of one request. Lists may be given as any sequence; they are kept as tuples.

    Penalties, biases, banned tokens and `min_tokens` act first, then what constrains the output, then temperature, then
    min-p, top-k and top-p. Of `json_schema`, `regex`, `grammar` and `choice` at most one is given.
    """

    n: int = 1
    """Completions to make of the prompt."""
    temperature: float = 1.0
    """0 is greedy, and so is anything below 1e-5."""
    top_k: int = 0
    """0 or -1: all tokens."""
    top_p: float = 1.0
    min_p: float = 0.0
    """Least probability of a token, relative to the most probable one."""
    repetition_penalty: float = 1.0
    """Over prompt and output, as in CTRL and Hugging Face."""
    presence_penalty: float = 0.0
    """Over the output, as in OpenAI's API."""
    frequency_penalty: float = 0.0
    """Over the output, times the count."""
    max_tokens: int = 16
    min_tokens: int = 0
    """No end or stop token before so many; stop words are not looked for either."""
    stop: Sequence[str] | str = ()
    """Strings that end the completion wherever they appear in its text, also across token borders."""
    stop_token_ids: Sequence[int] = ()
    stop_words_ids: Sequence[Sequence[int]] = ()
    """Runs of token ids that end the completion."""
    include_stop_str_in_output: bool = False
    bad_words: Sequence[str] = ()
    """Words that must not be produced."""
    bad_words_ids: Sequence[Sequence[int]] = ()
    """Runs of token ids that must not be produced."""
    logit_bias: Mapping[int, float] = field(default_factory=dict, hash=False)
    """Token id -> what is added to its logit, from -100 to 100, as in OpenAI's API."""
    json_schema: str | None = None
    """A JSON schema, as JSON: the output is a value that it allows."""
    regex: str | None = None
    """A regular expression that the whole output matches."""
    grammar: str | None = None
    """A grammar in llguidance's Lark syntax that the output keeps to."""
    choice: Sequence[str] = ()
    """The output is one of these."""
    ignore_eos: bool = False
    seed: int | None = None
    """The same seed gives the same tokens, whatever else is in the batch."""
    logprobs: int | None = None
    """Log-probabilities of the chosen token and so many most probable ones, of the model's own distribution."""
    prompt_logprobs: int | None = None
    skip_special_tokens: bool = True
    detokenize: bool = True
    beam_width: int = 1
    """Above 1: search for the most probable completions with so many beams; the `n` best are returned, best first."""
    length_penalty: float = 1.0
    """Beams are compared by the sum of their log-probabilities, divided by their length to this power."""
    early_stopping: bool = False
    """End a beam search as soon as `beam_width` beams have ended, even if others might become better."""
    beam_search_diversity_rate: float = 0.0
    """Taken off the scores of a beam's continuations for the choice: once for its second best, twice for the next."""

    def __post_init__(self) -> None:
        set_ = object.__setattr__
        set_(self, "stop", _strings("stop", self.stop))
        set_(self, "stop_token_ids", _tokens("stop_token_ids", self.stop_token_ids))
        set_(self, "stop_words_ids", _token_lists("stop_words_ids", self.stop_words_ids))
        set_(self, "bad_words", _strings("bad_words", self.bad_words))
        set_(self, "bad_words_ids", _token_lists("bad_words_ids", self.bad_words_ids))
        set_(self, "choice", _strings("choice", self.choice))
        set_(self, "logit_bias", _biases(self.logit_bias))
        # A wrong kind is refused here: met in the middle of a step, it would end the engine for all requests.
        for name in (*_WHOLE, *_WHOLE_OR_NONE):
            value = getattr(self, name)
            if value is not None or name in _WHOLE:
                _require(_is_whole(value), f"{name} must be a whole number, got {value!r}")
                set_(self, name, int(value))
        for name in _NUMBERS:
            value = getattr(self, name)
            _require(_is_number(value), f"{name} must be a number, got {value!r}")
        _require(self.n >= 1, f"n must be at least 1, got {self.n}")
        _require(
            0 <= self.temperature < math.inf, f"temperature must be finite and not negative, got {self.temperature}"
        )
        _require(self.top_k >= -1, f"top_k must be -1, 0 (both: all) or positive, got {self.top_k}")
        _require(0 < self.top_p <= 1, f"top_p must be above 0 and at most 1, got {self.top_p}")
        _require(0 <= self.min_p <= 1, f"min_p must be from 0 to 1, got {self.min_p}")
        _require(
            0 < self.repetition_penalty < math.inf,
            f"repetition_penalty must be positive and finite, got {self.repetition_penalty}",
        )
        for name in ("presence_penalty", "frequency_penalty"):
            _require(-2 <= getattr(self, name) <= 2, f"{name} must be from -2 to 2, got {getattr(self, name)}")
        _require(self.max_tokens >= 1, f"max_tokens must be at least 1, got {self.max_tokens}")
        _require(
            0 <= self.min_tokens <= self.max_tokens,
            f"min_tokens must be from 0 to max_tokens ({self.max_tokens}), got {self.min_tokens}",
        )
        _require(self.seed is None or 0 <= self.seed < 2**64, f"seed must be from 0 to 2^64-1, got {self.seed}")
        for name in ("logprobs", "prompt_logprobs"):
            value = getattr(self, name)
            _require(value is None or value >= 0, f"{name} must not be negative, got {value}")
        _require(self.detokenize or not self.stop, "stop strings need detokenize=True")
        self._check_constraints()
        self._check_beams()

    def _check_constraints(self) -> None:
        given = [name for name in _CONSTRAINTS if getattr(self, name)]
        for name in _CONSTRAINTS[:3]:
            value = getattr(self, name)
            _require(value is None or isinstance(value, str), f"{name} must be a string, got {value!r}")
            _require(value != "", f"{name} is empty")
        _require(len(given) <= 1, f"at most one of {', '.join(_CONSTRAINTS)} may be given, got {' and '.join(given)}")
        if given:
            for name, nothing in _NOT_WITH_CONSTRAINTS.items():
                value = getattr(self, name)
                _require(value == nothing, f"{name} must be left at {nothing!r} with {given[0]}, got {value!r}")

    def _check_beams(self) -> None:
        rate = self.beam_search_diversity_rate
        _require(self.beam_width >= 1, f"beam_width must be at least 1, got {self.beam_width}")
        _require(
            -_MOST_LENGTH_PENALTY <= self.length_penalty <= _MOST_LENGTH_PENALTY,
            f"length_penalty must be from -{_MOST_LENGTH_PENALTY} to {_MOST_LENGTH_PENALTY}, got {self.length_penalty}",
        )
        _require(
            isinstance(self.early_stopping, bool), f"early_stopping must be True or False, got {self.early_stopping!r}"
        )
        _require(0 <= rate < math.inf, f"beam_search_diversity_rate must be finite and not negative, got {rate}")
        if self.beam_width == 1:
            for name, default in _ONLY_WITH_BEAMS.items():
                value = getattr(self, name)
                _require(bool(value == default), f"{name} needs beam_width above 1, got {value!r}")
            return
        _require(self.n <= self.beam_width, f"n must be at most beam_width ({self.beam_width}), got {self.n}")
        for name, nothing in _NOT_WITH_BEAMS.items():
            value = getattr(self, name)
            _require(value == nothing, f"{name} must be left at {nothing!r} with beam_width above 1, got {value!r}")

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
        return any(getattr(self, name) for name in _CONSTRAINTS)

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
            and not self.is_constrained
        )


@dataclass(frozen=True, kw_only=True)
class Request:
    """A prompt on its way through the engine."""

    request_id: str
    prompt_token_ids: tuple[int, ...]
    params: SamplingParams
    prompt: str | None = None


@dataclass(frozen=True)
class Logprob:
    """Log-probability of one token at one position."""

    logprob: float
    rank: int
    """1 for the most probable token."""
    decoded_token: str | None = None


@dataclass
class CompletionOutput:
    """One completion of a request."""

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None = None
    logprobs: list[dict[int, Logprob]] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    """The stop string or stop token that ended it, None for the model's end token; or what the error was."""


@dataclass
class RequestOutput:
    """A request with what came of it so far."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput] = field(default_factory=list)
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None
    """One entry a prompt token; the first is None, since nothing precedes it."""
    finished: bool = False
