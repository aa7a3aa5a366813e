"""Requests and their results, with the names that vLLM's users know."""

import struct
from array import array
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cache
from itertools import count
from typing import Any, Generic, Literal, NamedTuple, Protocol, TypeVar, cast, get_args, overload

from hasten.core.option_fields import option
from hasten.core.sampling import SamplingParams as SamplingParams
from hasten.core.structured_outputs import StructuredOutputsParams as StructuredOutputsParams
from hasten.core.values import is_whole, require, with_known_names

_DEFAULT_PARAMS = SamplingParams()


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


PoolingTask = Literal["embed", "classify", "score", "token_embed", "token_classify", "fill_mask"]
"""What is made of a text: its vector, its scores by label, the score of a pair, the first two for each token, or the
most probable words of its masks."""
POOLING_TASKS: tuple[PoolingTask, ...] = get_args(PoolingTask)


@with_known_names({})
@dataclass(frozen=True, kw_only=True)
class PoolingParams:
    """What to make of the hidden states of one text, with vLLM's names."""

    task: PoolingTask = "embed"
    dimensions: int | None = option(None, "length of the vectors, of a model whose vectors may be cut")
    """Of one that was trained for it (Matryoshka); None: whole."""
    normalize: bool | None = option(None, "give vectors of length 1 (default: as the model's own pooling says)")
    activation: bool = True
    """Whether scores of labels and words are made of logits by the model's activation; else they are the logits."""
    top_k: int = 5
    """How many words a mask gets; with `targets`, at most as many as there are."""
    targets: tuple[int, ...] = ()
    """Token ids of the only words that a mask may get; empty: any."""
    truncate_prompt_tokens: int | None = option(
        None,
        "tokens to keep of a longer text; -1: as many as the model takes (default: a longer text is an error)",
    )

    def __post_init__(self) -> None:
        set_ = object.__setattr__
        require(self.task in POOLING_TASKS, f"task must be one of {', '.join(POOLING_TASKS)}, got {self.task!r:.80}")
        for name in ("dimensions", "truncate_prompt_tokens", "top_k"):
            value = getattr(self, name)
            if value is not None:
                require(is_whole(value), f"{name} must be a whole number, got {value!r:.80}")
                set_(self, name, int(value))
        require(self.dimensions is None or self.dimensions >= 1, f"dimensions must be at least 1: {self.dimensions}")
        most = self.truncate_prompt_tokens
        require(most is None or most == -1 or most >= 1, f"truncate_prompt_tokens must be -1 or at least 1, got {most}")
        for name in ("normalize", "activation"):
            value = getattr(self, name)
            optional = name == "normalize" and value is None
            require(optional or isinstance(value, bool), f"{name} must be True or False, got {value!r:.80}")
        for name in ("dimensions", "normalize"):
            value = getattr(self, name)
            require(value is None or "embed" in self.task, f"{name} is for vectors, not for {self.task}")
        require(self.top_k >= 1, f"top_k must be at least 1, got {self.top_k}")
        require(
            isinstance(self.targets, tuple | list) and all(map(is_whole, self.targets)),
            f"targets must be a list of token ids, got {self.targets!r:.80}",
        )
        set_(self, "targets", tuple(dict.fromkeys(map(int, self.targets))))
        require(not self.targets or self.task == "fill_mask", f"targets are for masks, not for {self.task}")


@dataclass(frozen=True, kw_only=True)
class Request:
    """A prompt on its way through the engine."""

    request_id: str
    prompt_token_ids: tuple[int, ...]
    params: SamplingParams = _DEFAULT_PARAMS
    """Without effect on a request with `pooling`."""
    prompt: str | None = None
    pooling: PoolingParams | None = None
    """Given where a vector or scores are made of the prompt, and nothing is generated."""
    token_type_ids: tuple[int, ...] = ()
    """Type of each token, of models that have types; none given: 0 for all."""
    skipped_tokens: int = 0
    """Tokens at the beginning, those of an instruction, that a vector is not made of."""
    masks: tuple[int, ...] = ()
    """Places of the masks whose words are asked for."""
    cache_salt: str = ""
    """Blocks of the prefix cache are shared with requests of the same salt alone; "": with all that have none."""


@dataclass(slots=True)
class Logprob:
    """Log-probability of one token at one position."""

    logprob: float
    rank: int
    """1 for the most probable token."""
    decoded_token: str | None = None


class LogprobRow(NamedTuple):
    """Log-probabilities at one position, as numbers: those that were computed."""

    token: int
    logprob: float
    rank: int
    top_logprobs: list[float]
    """Of the most probable tokens, in descending order."""
    top_ids: list[int]

    def packed(self) -> bytes:
        """The same as 3 + 2k numbers of 4 bytes: the token and its rank in int32, then in fp32 its log-probability and
        those of the k most probable tokens, then their ids in int32.
        """
        numbers = (self.token, self.rank, self.logprob, *self.top_logprobs, *self.top_ids)
        return _packing(len(self.top_ids)).pack(*numbers)

    @classmethod
    def unpacked(cls, packed: bytes) -> "LogprobRow":
        """The numbers that `packed` gave."""
        count = (len(packed) // 4 - 3) // 2
        token, rank, logprob, *numbers = _packing(count).unpack(packed)
        return cls(token, logprob, rank, numbers[:count], numbers[count:])

    def entries(self, text_of: Callable[[int], str] | None = None) -> dict[int, Logprob]:
        """An entry per token, the position's own first; with their texts where `text_of` gives them."""
        texts: Iterable[str | None] = [None] * len(self.top_ids) if text_of is None else map(text_of, self.top_ids)
        own = Logprob(self.logprob, self.rank, None if text_of is None else text_of(self.token))
        others = map(Logprob, self.top_logprobs, count(1), texts)
        top = {self.token: own, **dict(zip(self.top_ids, others, strict=True))}
        top[self.token] = own  # the first one still
        return top


_LOGPROB, _LOGPROB_AT = struct.Struct("=f"), 8
"""The log-probability of a packed row's own token, and where it stands."""


@cache
def _packing(count: int) -> struct.Struct:
    return struct.Struct(f"=iif{count}f{count}i")


EntryT = TypeVar("EntryT", bound=dict[int, Logprob] | None, covariant=True)


class LogprobList(Sequence[EntryT]):
    """Log-probabilities by position, each as `{token id: Logprob}`, None where there are none.

    An entry is built when it is read: most are never read, and they take as long as the choice of the tokens. Slices,
    and what pickle keeps, are lists. Rows are those of `LogprobRow.packed`.
    """

    __slots__ = ("_rows", "_sum", "_summed", "_text_of")

    def __init__(self, text_of: Callable[[int], str] | None, rows: Iterable[bytes | None] = ()) -> None:
        self._rows, self._text_of = list(rows), text_of
        self._sum, self._summed = 0.0, 0

    def append(self, row: bytes) -> None:
        """Take the numbers of one more position."""
        self._rows.append(row)

    def extend(self, rows: Iterable[bytes]) -> None:
        """Take the numbers of more positions."""
        self._rows += rows

    @property
    def sum(self) -> float:
        """Of the log-probabilities of the positions' own tokens, added up in their order."""
        for row in self._rows[self._summed :]:
            self._sum += 0.0 if row is None else _LOGPROB.unpack_from(row, _LOGPROB_AT)[0]
        self._summed = len(self._rows)
        return self._sum

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> EntryT: ...
    @overload
    def __getitem__(self, index: slice) -> list[EntryT]: ...
    def __getitem__(self, index: int | slice) -> EntryT | list[EntryT]:
        if isinstance(index, slice):
            return [self._entry(row) for row in self._rows[index]]
        return self._entry(self._rows[index])

    def _entry(self, row: bytes | None) -> EntryT:
        return cast("EntryT", None if row is None else LogprobRow.unpacked(row).entries(self._text_of))

    def __copy__(self) -> "LogprobList[EntryT]":
        """The entries so far."""
        return LogprobList(self._text_of, self._rows)

    def __eq__(self, other: object) -> bool:
        return self[:] == other[:] if isinstance(other, list | LogprobList) else NotImplemented

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return repr(self[:])

    def __reduce__(self) -> tuple[type[list[EntryT]], tuple[list[EntryT]]]:
        return list, (self[:],)


@dataclass
class CompletionOutput:
    """One completion of a request."""

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None = None
    logprobs: Sequence[dict[int, Logprob]] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    """The stop string or stop token that ended it, None for the model's end token; or what the error was."""
    token_logprobs: list[float] | None = None
    """Of a beam: the log-probability of each of its tokens, as the search added them up."""


@dataclass(slots=True)
class RequestMetrics:
    """When a request's parts began, in seconds on the clock of `time.monotonic`; 0 before they have."""

    queued_ts: float = 0.0
    """The engine got it."""
    scheduled_ts: float = 0.0
    """The first step that computed it was scheduled."""
    first_token_ts: float = 0.0
    """Its first token was known."""
    last_token_ts: float = 0.0
    """It ended."""

    @property
    def first_token_latency(self) -> float:
        """Seconds from its arrival to its first token."""
        return self.first_token_ts - self.queued_ts


@dataclass
class RequestOutput:
    """A request with what came of it so far."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput] = field(default_factory=list)
    prompt_logprobs: Sequence[dict[int, Logprob] | None] | None = None
    """One entry a prompt token; the first is None, since nothing precedes it."""
    finished: bool = False
    metrics: RequestMetrics = field(default_factory=RequestMetrics)
    num_cached_tokens: int = 0
    """Tokens of its prompt that were in the prefix cache."""


class _Numbers(Protocol):
    """A row of an array."""

    def __len__(self) -> int: ...

    def tolist(self) -> list[float]: ...

    def tobytes(self) -> bytes: ...


class EmbeddingOutput:
    """The vector of a text."""

    __slots__ = ("_numbers",)

    def __init__(self, embedding: list[float] | _Numbers) -> None:
        """A list, or a row of an array of fp32, which becomes one when it is asked for."""
        self._numbers = embedding

    @property
    def embedding(self) -> list[float]:
        """The vector."""
        if not isinstance(self._numbers, list):
            self._numbers = self._numbers.tolist()
        return self._numbers

    @property
    def hidden_size(self) -> int:
        """Its length."""
        return len(self._numbers)

    def tobytes(self) -> bytes:
        """The vector in fp32, in the byte order of this host."""
        numbers = self._numbers
        return array("f", numbers).tobytes() if isinstance(numbers, list) else numbers.tobytes()

    def __eq__(self, other: object) -> bool:
        return self.embedding == other.embedding if isinstance(other, EmbeddingOutput) else NotImplemented

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"EmbeddingOutput(embedding={self.embedding!r})"


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


@dataclass(slots=True)
class FilledMask:
    """A word for a mask, with the names of transformers' pipeline."""

    score: float
    """Its probability; its logit where no activation was asked for."""
    token: int
    token_str: str | None = None
    sequence: str | None = None
    """The text with this word, other masks as they were. Where there are several, with what begins and ends it."""


@dataclass
class FillMaskOutput:
    """Words for the masks of a text."""

    candidates: list[list[FilledMask]]
    """Those of each mask, the most probable first."""


@dataclass
class FailedOutput:
    """Nothing, of a text that could not be computed."""

    error: str
    """Why."""


PooledOutput = EmbeddingOutput | ClassificationOutput | ScoringOutput | PoolingOutput | FillMaskOutput | FailedOutput
"""What became of a text, by task."""
PooledT = TypeVar("PooledT", bound=PooledOutput)


class _Ids(Protocol):
    """An array of token ids."""

    def tolist(self) -> list[int]: ...


class PoolingRequestOutput(Generic[PooledT]):
    """A request with what was made of its text."""

    __slots__ = ("_ids", "finished", "outputs", "prompt", "request_id")

    def __init__(
        self,
        request_id: str,
        prompt: str | None,
        prompt_token_ids: list[int] | _Ids,
        outputs: PooledT,
        finished: bool = True,
    ) -> None:
        """`prompt_token_ids`: a list, or an array, which becomes one when it is asked for.

        Python's collector looks at each item of each list, which takes as long for many texts as a GPU for some steps.
        """
        self.request_id = request_id
        self.prompt = prompt
        self._ids = prompt_token_ids
        self.outputs = outputs
        self.finished = finished

    @property
    def prompt_token_ids(self) -> list[int]:
        """Token ids of the text."""
        if not isinstance(self._ids, list):
            self._ids = self._ids.tolist()
        return self._ids

    def __repr__(self) -> str:
        return (
            f"PoolingRequestOutput(request_id={self.request_id!r}, prompt={self.prompt!r}, "
            f"prompt_token_ids={self.prompt_token_ids!r}, outputs={self.outputs!r}, finished={self.finished!r})"
        )
