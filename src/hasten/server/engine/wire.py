"""What the server and an engine's process say to each other: msgpack, each message behind its length in bytes.

Imports no torch: the server's process has none.
"""

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from numbers import Real
from typing import Any

import msgspec

from hasten.core.config import EngineConfig
from hasten.core.errors import InvalidRequestError
from hasten.core.types import FinishReason, PoolingParams, SamplingParams
from hasten.engine.block_watch import BlockTimes
from hasten.engine.pooling_info import PoolingInfo
from hasten.engine.stats import EngineStats


@dataclass(frozen=True, kw_only=True)
class EngineInfo:
    """What an engine is, once its model is loaded."""

    vocab_size: int
    max_model_len: int
    eos_token_ids: tuple[int, ...]
    bos_token_id: int | None
    pad_token_id: int | None
    num_blocks: int
    """Blocks of the key/value cache."""
    block_size: int
    """Tokens in a block."""
    max_num_seqs: int
    """Most sequences in one step."""
    dtype: str
    """fp32, fp16 or bf16: the type that it computes in."""
    device: str
    """`cpu`, or the GPU's name."""
    ranks: int
    tokenizer_folder: str | None
    """Folder or file to load the tokenizer from; None where the model has none."""
    model_type: str
    """Family of the architecture, for example `bloom`."""
    load_seconds: float = 0.0
    """From the start of its process until it was ready."""
    quantization: str | None = None
    """Scheme of its weights; None: they are in `dtype`."""
    cache_dtype: str | None = None
    """Type of 8 bits of its key/value cache; None: it is in `dtype`."""
    pooling: PoolingInfo | None = None
    """What it makes of texts; None where it generates text."""
    decoder_start_token_id: int | None = None
    """What the outputs of an encoder-decoder begin with; None where there is no encoder."""

    def check_task(self, params: SamplingParams | PoolingParams) -> None:
        """InvalidRequestError where the model does not do what is asked for."""
        pooling = self.pooling
        if isinstance(params, PoolingParams):
            if pooling is None:
                raise InvalidRequestError(f"a model of type {self.model_type} generates text; it cannot {params.task}")
            pooling.check(params)
        elif pooling is not None:
            raise InvalidRequestError(f"{pooling.architecture} generates no text; it does {', '.join(pooling.tasks)}")

    @property
    def types(self) -> str:
        """What it computes in and what its weights and its cache are, for people."""
        held = {"weights": self.quantization, "key/value cache": self.cache_dtype}
        return ", ".join([self.dtype, *(f"{kind} {what}" for what, kind in held.items() if kind is not None)])

    @classmethod
    def of_all(cls, infos: "Sequence[EngineInfo]") -> "EngineInfo":
        """What engines of one model are together: what each of them takes, and the blocks of all."""
        return replace(
            infos[0],
            max_model_len=min(info.max_model_len for info in infos),
            max_num_seqs=min(info.max_num_seqs for info in infos),
            num_blocks=sum(info.num_blocks for info in infos),
            load_seconds=max(info.load_seconds for info in infos),
        )


class Logprob(msgspec.Struct, gc=False):
    """Log-probability of one token at one position, as core.types has it.

    An answer may have a million of them; to look at each, the garbage collector would hold up the server.
    """

    logprob: float
    rank: int
    decoded_token: str | None = None


class CompletionDelta(msgspec.Struct, array_like=True, gc=False):
    """What is new of one completion; the lists and the text go on where the last one ended.

    There is one for each token of each stream: without its fields' names a message is decoded in half the time, and
    the garbage collector need not look at it.
    """

    index: int
    token_ids: list[int]
    text: str
    logprobs: list[dict[int, Logprob]] | None = None
    cumulative_logprob: float | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    token_logprobs: list[float] | None = None


class Start(msgspec.Struct, tag=True):
    """The first message to an engine's process."""

    config: EngineConfig
    index: int = 0
    count: int = 1
    """Which of how many engines on this machine it is."""


class Add(msgspec.Struct, tag=True):
    """A request; `id` is the server's number for it."""

    id: int
    prompt_token_ids: tuple[int, ...]
    params: dict[str, Any] | None
    """Those of SamplingParams that are not at their defaults; None of a text that a vector or scores are made of."""
    stream: bool
    pooling: PoolingParams | None = None
    token_type_ids: tuple[int, ...] = ()
    skipped_tokens: int = 0
    masks: tuple[int, ...] = ()
    cache_salt: str = ""
    """These five as core.types' Request has them."""


class Abort(msgspec.Struct, tag=True):
    """Withdraw a request; nothing happens where it has ended already."""

    id: int


class Expire(msgspec.Struct, tag=True):
    """Withdraw a request if it was not begun; the next step says whether it was."""

    id: int


class Acknowledge(msgspec.Struct, tag=True):
    """Steps whose outputs the server has written to their streams, and the CPU time that it spent on that."""

    steps: int
    cpu_seconds: float


class Ready(msgspec.Struct, tag=True):
    """The model is loaded."""

    info: EngineInfo


class Failed(msgspec.Struct, tag=True):
    """Why the process is about to end: the error's class and text."""

    kind: str
    message: str


class PooledData(msgspec.Struct, array_like=True, gc=False):
    """What was made of a text: numbers in fp32, the machine's own order, or why there are none."""

    data: bytes
    rows: int | None = None
    """Tokens, of a task that gives numbers for each; masks, each with the ids of its words and then their scores; None:
    they are one vector."""
    error: str | None = None


class FirstToken(msgspec.Struct, array_like=True, gc=False):
    """What is known of a request once it has a token."""

    at: float
    """When that was, on the clock of `time.monotonic`, which all processes of a machine share."""
    cached_tokens: int
    """Tokens of the prompt that were in the prefix cache."""


class Output(msgspec.Struct, array_like=True, gc=False):
    """What is new of one request; see CompletionDelta."""

    id: int
    completions: list[CompletionDelta]
    finished: bool
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None
    partial: bool = False
    """Whether the rest of it comes with later messages: it is one output, but too large for one message."""
    pooled: PooledData | None = None
    """Of a text, of which there are no completions."""
    first: FirstToken | None = None
    """With its first output, where that has tokens."""


class Computed(msgspec.Struct, array_like=True, gc=False):
    """What one step computed."""

    tokens: int
    """Of prompts and outputs."""
    seconds: float
    """From the tokens before to those that it brought."""
    continued: int
    """Of these, those that were not the first ones of their completions."""


class Refusal(msgspec.Struct):
    """A request that the engine did not take: the error's class and text."""

    id: int
    kind: str
    message: str


class Step(msgspec.Struct, tag=True):
    """What one or more turns of the engine brought."""

    stats: EngineStats | None = None
    """Its state, where that is new: with every message but those that bring running requests further in short steps."""
    outputs: list[Output] = []
    started: dict[int, float] = {}
    """Requests that were begun since the last message, and when their steps began, on the clock of `FirstToken.at`."""
    refused: list[Refusal] = []
    expired: list[int] = []
    """Requests that are withdrawn because they were not begun in time."""
    compiling: list[int] = []
    """Requests that wait for their grammar to be compiled, from now on, and take no part in steps."""
    compiled: list[int] = []
    """Requests that wait for it no longer."""
    sent: float = 0.0
    """When it was sent, on the same clock."""
    computed: list[Computed] = []
    """The engine's steps since the last message."""
    blocks: BlockTimes | None = None
    """What became known of watched blocks of the cache since then."""


ToEngine = Start | Add | Abort | Expire | Acknowledge
FromEngine = Ready | Failed | Step

_LENGTH = struct.Struct("<Q")


def _plain(value: Any) -> float:
    """Numbers of other libraries, which parameters may be."""
    if isinstance(value, Real):
        return float(value)
    raise TypeError(f"{value!r} is neither a number nor a text")


_encoder = msgspec.msgpack.Encoder(enc_hook=_plain)


def framed(message: Any) -> bytearray:
    """A message as it goes through the socket.

    OverflowError for a whole number of more than 64 bits, ValueError for text that is no Unicode, TypeError for other
    kinds of values.
    """
    frame = bytearray(_LENGTH.size)
    _encoder.encode_into(message, frame, _LENGTH.size)
    _LENGTH.pack_into(frame, 0, len(frame) - _LENGTH.size)
    return frame


class Frames:
    """Cuts the bytes that a socket gives into messages' bodies."""

    def __init__(self) -> None:
        self._held = bytearray()

    def feed(self, data: bytes) -> Iterator[bytes]:
        """The bodies that are whole with this data."""
        self._held += data
        start = 0
        while len(self._held) >= start + _LENGTH.size:
            (length,) = _LENGTH.unpack_from(self._held, start)
            end = start + _LENGTH.size + length
            if len(self._held) < end:
                break
            yield bytes(self._held[start + _LENGTH.size : end])
            start = end
        del self._held[:start]
