"""Requests and their results, with the names that vLLM's users know."""

import difflib
import functools
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from enum import StrEnum
from numbers import Integral, Real
from typing import Any, Generic, Literal, TypedDict, TypeVar, get_args

from hasten.core.errors import InvalidRequestError
from hasten.core.text import require_utf8


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


_WHOLE = ("n", "top_k", "min_tokens", "beam_width")
_WHOLE_OR_NONE = ("max_tokens", "seed", "logprobs", "prompt_logprobs")
_FLAGS = ("include_stop_str_in_output", "ignore_eos", "skip_special_tokens", "detokenize", "early_stopping")
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
    "allowed_token_ids": (),
    "json_schema": None,
    "regex": None,
    "grammar": None,
    "choice": (),
}
"""What beam search cannot take into account, and the values that ask for nothing."""
_ONLY_WITH_BEAMS = {"length_penalty": 1.0, "early_stopping": False, "beam_search_diversity_rate": 0.0}
"""What only beam search takes into account, and the values that ask for nothing."""
_CONSTRAINTS = ("json_schema", "regex", "grammar", "choice")
_NOT_WITH_CONSTRAINTS: dict[str, object] = {"min_tokens": 0, "ignore_eos": False}
_NOT_WITH_CONSTRAINTS |= {"bad_words": (), "bad_words_ids": (), "allowed_token_ids": ()}
"""What could leave no token that a grammar allows, or keep its end from being one."""
_INSTEAD = {
    "best_of": "draw n completions and compare their cumulative_logprob, or search with beam_width",
    "use_beam_search": "set beam_width",
    "guided_decoding": "use structured_outputs",
    "logits_processors": "use logit_bias, allowed_token_ids, bad_words or structured_outputs",
    "truncate_prompt_tokens": "give the last token ids of the prompt alone",
    "spaces_between_special_tokens": "leave it out: text is decoded as the tokenizer has it",
}
"""Parameters of vLLM that are not supported, and what to use in their stead."""
_MOST_LENGTH_PENALTY = 10
"""A length to this power is still a float, however long the sequence."""


def _is_whole(value: object) -> bool:
    return type(value) is int or (isinstance(value, Integral) and not isinstance(value, bool))


def _is_number(value: object) -> bool:
    return type(value) is float or _is_whole(value) or (isinstance(value, Real) and not isinstance(value, bool))


def _each(name: str, given: object, what: str) -> tuple[Any, ...]:
    """The items of a sequence; None stands for an empty one."""
    if given is None:
        return ()
    countable = isinstance(given, Iterable) and not isinstance(given, str | bytes | bytearray | Mapping)
    _require(countable, f"{name} must be {what}, got {given!r:.80}")
    return tuple(given)  # type: ignore[arg-type]  # checked just now


def _tokens(name: str, ids: object) -> tuple[int, ...]:
    made = _each(name, ids, "a list of token ids")
    _require(all(map(_is_whole, made)), f"{name} holds something that is not a token id: {ids!r:.80}")
    return tuple(map(int, made))


def _token_lists(name: str, lists: object) -> tuple[tuple[int, ...], ...]:
    made = tuple(_tokens(name, ids) for ids in _each(name, lists, "a list of lists of token ids"))
    _require(all(made), f"{name} holds an empty list")
    return made


def _strings(name: str, given: object) -> tuple[str, ...]:
    made = (given,) if isinstance(given, str) else _each(name, given, "a string or a list of strings")
    _require(all(isinstance(text, str) for text in made), f"{name} holds something that is not a string: {given!r:.80}")
    _require(all(made), f"{name} holds an empty string")
    for text in made:
        require_utf8(name, text)
    return made


def _biases(given: Mapping[int, float] | None) -> dict[int, float]:
    if given is None:
        return {}
    _require(isinstance(given, Mapping), f"logit_bias must map token ids to numbers, got {given!r}")
    for token, bias in given.items():
        _require(_is_whole(token), f"logit_bias has something that is not a token id: {token!r}")
        _require(_is_number(bias) and -100 <= bias <= 100, f"logit_bias must be from -100 to 100, got {bias!r}")
    return {int(token): float(bias) for token, bias in given.items()}


class StructuredOutputsParams(TypedDict, total=False):
    """What the output keeps to, under vLLM's names: one of these."""

    json: str | Mapping[str, Any]
    """A JSON schema, as JSON or as what it decodes to."""
    json_object: bool
    """True: any JSON object."""
    regex: str
    choice: Sequence[str]
    grammar: str


def _schema(given: object) -> str:
    if isinstance(given, str):
        return given
    _require(isinstance(given, Mapping), f"structured_outputs has a json that is no JSON schema: {given!r:.80}")
    try:
        return json.dumps(given)
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidRequestError(f"structured_outputs has a json that is not JSON: {error}") from None


def _structured(given: object) -> dict[str, Any]:
    """The fields of SamplingParams for `structured_outputs`."""
    _require(
        isinstance(given, Mapping),
        f"structured_outputs must be a dict or StructuredOutputsParams, got {given!r:.80}",
    )
    assert isinstance(given, Mapping)
    known = StructuredOutputsParams.__annotations__
    chosen = {name: value for name, value in given.items() if value is not None and value is not False}
    for name in chosen:
        _require(name in known, f"structured_outputs has {name!r:.80}, which is not one of {', '.join(known)}")
    _require(len(chosen) == 1, f"structured_outputs must have exactly one of {', '.join(known)}, got {list(chosen)}")
    ((name, value),) = chosen.items()
    if name == "json_object":
        return {"json_schema": '{"type":"object"}'}
    return {"json_schema": _schema(value)} if name == "json" else {name: value}


_Params = TypeVar("_Params", bound=type[Any])


def _with_known_names(kind: _Params) -> _Params:
    """Let a dataclass refuse unknown arguments by name, with what to use in their stead, rather than by a TypeError."""
    original, known = kind.__init__, [field.name for field in fields(kind)]

    @functools.wraps(original)
    def init(self: Any, *args: Any, **options: Any) -> None:
        _require(not args, f"{kind.__name__} takes its parameters by name, got {', '.join(map(repr, args)):.80}")
        for name in options:
            if name not in known:
                near = difflib.get_close_matches(name, known, 1)
                hint = _INSTEAD.get(name) or (f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}")
                raise InvalidRequestError(f"{name} is not a parameter of {kind.__name__}: {hint}")
        original(self, **options)

    kind.__init__ = init
    return kind


@_with_known_names
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
    max_tokens: int | None = 16
    """None: up to the model's maximum length."""
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
    allowed_token_ids: Sequence[int] = ()
    """The only token ids that may be produced, the model's end token included; none given: all."""
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
    structured_outputs: StructuredOutputsParams | None = None
    """One of the four above under vLLM's names; it becomes that field, and None itself."""
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
        if self.structured_outputs is not None:
            for name, value in _structured(self.structured_outputs).items():
                _require(not getattr(self, name), f"structured_outputs and {name} say the same; give one of them")
                set_(self, name, value)
            set_(self, "structured_outputs", None)
        set_(self, "stop", _strings("stop", self.stop))
        set_(self, "stop_token_ids", _tokens("stop_token_ids", self.stop_token_ids))
        set_(self, "stop_words_ids", _token_lists("stop_words_ids", self.stop_words_ids))
        set_(self, "bad_words", _strings("bad_words", self.bad_words))
        set_(self, "bad_words_ids", _token_lists("bad_words_ids", self.bad_words_ids))
        set_(self, "allowed_token_ids", _tokens("allowed_token_ids", self.allowed_token_ids))
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
        for name in _FLAGS:
            value = getattr(self, name)
            _require(isinstance(value, bool), f"{name} must be True or False, got {value!r}")
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
        most = self.max_tokens
        _require(most is None or most >= 1, f"max_tokens must be at least 1, got {most}")
        _require(self.min_tokens >= 0, f"min_tokens must not be negative, got {self.min_tokens}")
        _require(
            most is None or self.min_tokens <= most,
            f"min_tokens must be at most max_tokens ({most}), got {self.min_tokens}",
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
            _require(value is None or isinstance(value, str), f"{name} must be a string, got {value!r:.80}")
            _require(value != "", f"{name} is empty")
            require_utf8(name, value or "")
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
            and not self.allowed_token_ids
            and not self.is_constrained
        )


PoolingTask = Literal["embed", "classify", "score", "token_embed", "token_classify"]
"""What is made of a text: its vector, its scores by label, the score of a pair, or the first two for each token."""
POOLING_TASKS: tuple[PoolingTask, ...] = get_args(PoolingTask)


@_with_known_names
@dataclass(frozen=True, kw_only=True)
class PoolingParams:
    """What to make of the hidden states of one text, with vLLM's names."""

    task: PoolingTask = "embed"
    dimensions: int | None = None
    """Length of the vector, of a model whose vectors may be cut (Matryoshka); None: whole."""
    normalize: bool | None = None
    """Whether vectors have length 1; None: as the model's own pooling says."""
    activation: bool = True
    """Whether scores of labels are made of logits by the model's activation; else they are the logits."""
    truncate_prompt_tokens: int | None = None
    """Keep so many tokens of a longer text; -1: as many as the model takes; None: a longer text is an error."""

    def __post_init__(self) -> None:
        set_ = object.__setattr__
        _require(self.task in POOLING_TASKS, f"task must be one of {', '.join(POOLING_TASKS)}, got {self.task!r:.80}")
        for name in ("dimensions", "truncate_prompt_tokens"):
            value = getattr(self, name)
            if value is not None:
                _require(_is_whole(value), f"{name} must be a whole number, got {value!r:.80}")
                set_(self, name, int(value))
        _require(self.dimensions is None or self.dimensions >= 1, f"dimensions must be at least 1: {self.dimensions}")
        most = self.truncate_prompt_tokens
        _require(
            most is None or most == -1 or most >= 1, f"truncate_prompt_tokens must be -1 or at least 1, got {most}"
        )
        for name in ("normalize", "activation"):
            value = getattr(self, name)
            optional = name == "normalize" and value is None
            _require(optional or isinstance(value, bool), f"{name} must be True or False, got {value!r:.80}")
        for name in ("dimensions", "normalize"):
            value = getattr(self, name)
            _require(value is None or "embed" in self.task, f"{name} is for vectors, not for {self.task}")


@dataclass(frozen=True, kw_only=True)
class Request:
    """A prompt on its way through the engine."""

    request_id: str
    prompt_token_ids: tuple[int, ...]
    params: SamplingParams = SamplingParams()
    """Without effect on a request with `pooling`."""
    prompt: str | None = None
    pooling: PoolingParams | None = None
    """Given where a vector or scores are made of the prompt, and nothing is generated."""
    token_type_ids: tuple[int, ...] = ()
    """Type of each token, of models that have types; none given: 0 for all."""
    skipped_tokens: int = 0
    """Tokens at the beginning, those of an instruction, that a vector is not made of."""


@dataclass(slots=True)
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


@dataclass
class EmbeddingOutput:
    """The vector of a text."""

    embedding: list[float]

    @property
    def hidden_size(self) -> int:
        """Its length."""
        return len(self.embedding)


@dataclass
class ClassificationOutput:
    """The scores of a text."""

    probs: list[float]
    """By label, in the order of the model's `labels`; logits where no activation was asked for."""

    @property
    def num_classes(self) -> int:
        """How many labels there are."""
        return len(self.probs)


@dataclass
class ScoringOutput:
    """How well a document answers a query."""

    score: float


@dataclass
class PoolingOutput:
    """Vectors or scores of the tokens of a text, or what any other task makes of it."""

    data: Any
    """A torch tensor in fp32 on the host, [t, width] for tasks of tokens and [width] for others."""


@dataclass
class FailedOutput:
    """Nothing, of a text that could not be computed."""

    error: str
    """Why."""


PooledOutput = EmbeddingOutput | ClassificationOutput | ScoringOutput | PoolingOutput | FailedOutput
"""What became of a text, by task."""
PooledT = TypeVar("PooledT", bound=PooledOutput)


@dataclass
class PoolingRequestOutput(Generic[PooledT]):
    """A request with what was made of its text."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: PooledT
    finished: bool = True
