"""FasterTransformer's input tensors as requests for the engine, one for each item of the batch.

Inputs have the batch as their first axis, so each item has parameters of its own. What is left out, or has the value
that FasterTransformer takes when it is, asks for nothing:

    runtime_top_k 0 and runtime_top_p 0    the most probable token; with one of them, that one alone counts
    temperature 1, repetition_penalty 1, presence_penalty 0, min_length 0, random_seed 0
    beam_width 1, len_penalty 0, beam_search_diversity_rate 0
    start_id, end_id                       the model's own

What FasterTransformer has no input for comes in the parameters of the request, for all items, under SamplingParams'
names: a grammar, `logit_bias`, `min_p` and others, lists and objects as JSON.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from hasten.core.errors import InvalidRequestError
from hasten.core.sampling import RULES, names_at
from hasten.core.sampling_rules import Entrance
from hasten.core.types import SamplingParams
from hasten.server.engine.wire import EngineInfo
from hasten.server.models.sampling import sampling_options
from hasten.server.models.work import Work
from hasten.server.types import ErrorKind, ServiceError, Tensor, invalid

_USUAL: Mapping[str, str] = {}
_MAX_BEAMS_TOP_K = 1
_MOST_BEAMS = 16_384
"""Of all items of a batch."""
_MOST_WORDS_TOKENS = 1 << 16
"""Of the words of one item, all together."""
_NAMES = names_at(Entrance.TOKEN)
PARAMETERS = {name: name for name in _NAMES if Entrance.TOKEN not in RULES[name].names}
"""Sampling parameters that FasterTransformer has no input for: those of the request hold for its whole batch."""
_INPUT_NAMES = {ours: theirs for ours, theirs in _NAMES.items() if ours != theirs}
"""What the engine calls a parameter, and the input that it comes from."""
_AS_THEY_ARE = [(ours, _NAMES[ours]) for ours in ("max_tokens", "min_tokens", "repetition_penalty", "presence_penalty")]
"""Parameters that are the input's value, and the engine's own default without it."""
_PARAMETER = re.compile(rf"\b({'|'.join(_INPUT_NAMES)})\b")
_NOT_SUPPORTED: dict[str, tuple[Callable[[Any], bool], str]] = {
    "is_return_context_embeddings": (lambda value: bool(value), "context embeddings are not returned"),
    "prompt_learning_task_name_ids": (lambda value: bool(value), "the model has no prompt tables"),
    "request_prompt_lengths": (lambda value: bool(value), "prompts of embeddings are not taken"),
    "request_prompt_type": (lambda value: bool(value), "prompts of embeddings are not taken"),
    "ia3_tasks": (lambda value: bool(value), "the model has no adapters"),
    "top_p_decay": (lambda value: value not in (0.0, 1.0), "runtime_top_p does not change from token to token"),
}
"""Inputs that no value but those of nothing is taken for: which values those are not, and why."""


@dataclass(frozen=True)
class Item:
    """One item of a batch."""

    prompt: list[int]
    params: SamplingParams
    end_id: int
    """What its output is padded with."""


@dataclass(frozen=True)
class TokenRequest:
    """A whole batch."""

    items: list[Item]
    beam_width: int
    log_probs: bool
    """Whether log-probabilities are asked for."""


def read_items(work: Work, info: EngineInfo, names: Mapping[str, str] = _USUAL) -> TokenRequest:
    """The batch; ServiceError that names item and input where something is wrong or not supported.

    `names`: what inputs are called where not as in GPT's backend.
    """
    if not names:
        return _read_items(work, work.inputs, info)
    usual = {theirs: name for name, theirs in names.items()}
    try:
        return _read_items(work, {usual.get(name, name): tensor for name, tensor in work.inputs.items()}, info)
    except ServiceError as error:
        text = re.sub(rf"\b({'|'.join(names)})\b", lambda match: names[match[0]], str(error))
        raise ServiceError(error.kind, text) from None


def _read_items(work: Work, inputs: Mapping[str, Tensor], info: EngineInfo) -> TokenRequest:
    batch_size, columns = work.batch_size, _Columns(inputs, work.batch_size)
    common = _common(work)
    _refuse_unsupported(columns)
    beam_width = columns.same("beam_width", 1)
    if beam_width > info.max_num_seqs:
        most = f"more than {info.max_num_seqs} sequences at once (max_num_seqs)"
        raise _wrong(0, "beam_width", f"is {beam_width}; {most}")
    if beam_width * batch_size > _MOST_BEAMS:
        problem = f"is {beam_width} with a batch of {batch_size}; a request may have {_MOST_BEAMS} beams in all"
        raise _wrong(0, "beam_width", problem)
    log_probs = columns.same("is_return_log_probs", False)
    items = [_item(columns, index, beam_width, log_probs, common, info) for index in range(batch_size)]
    return TokenRequest(items, beam_width, log_probs)


def _common(work: Work) -> dict[str, Any]:
    """What the request's parameters say for all items."""
    given = work.known_parameters(PARAMETERS) if work.parameters else {}
    if not given:
        return {}
    options = sampling_options(given, PARAMETERS)
    if ends := [name for name in ("ignore_eos", "stop_token_ids") if name in options and "end_id" in work.inputs]:
        text = f"input 'end_id' and parameter '{ends[0]}' both say what ends the output; give one of them"
        raise invalid(text)
    return options


class _Columns:
    """The inputs by item."""

    def __init__(self, inputs: Mapping[str, Tensor], batch_size: int) -> None:
        self.inputs = inputs
        self.batch_size = batch_size
        self._lists: dict[str, list[Any]] = {}

    def get(self, name: str, index: int, default: Any = None) -> Any:
        """An item's value of an input with one value each; the default where the input is left out."""
        if name not in self.inputs:
            return default
        if name not in self._lists:
            self._lists[name] = self._values(name)
        return self._lists[name][index]

    def same(self, name: str, default: Any) -> Any:
        """The value of an input that must be the same for all items, since it decides the outputs' shapes."""
        first = self.get(name, 0, default)
        for index in range(1, self.batch_size):
            if self.get(name, index, default) != first:
                raise _wrong(index, name, f"is {self.get(name, index)}, but {first} for item 0; send two requests")
        return first

    def _values(self, name: str) -> list[Any]:
        data = self.inputs[name].data
        if data.size != self.batch_size:
            raise _wrong(0, name, f"has {data.size // self.batch_size} values, but an item has one")
        return list(data.ravel().tolist())


def _wrong(index: int, name: str, problem: str, kind: ErrorKind = ErrorKind.INVALID) -> ServiceError:
    return ServiceError(kind, f"item {index} of the batch: input '{name}' {problem}")


def _refuse_unsupported(columns: _Columns) -> None:
    given = [(name, *rule) for name, rule in _NOT_SUPPORTED.items() if name in columns.inputs]
    for index in range(columns.batch_size):
        for name, asks, reason in given:
            if asks(value := columns.get(name, index)):
                problem = f"is {value}, which is not supported: {reason}; leave it out"
                raise _wrong(index, name, problem, ErrorKind.UNSUPPORTED)
        least = columns.get("top_p_min", index, 0.0)
        if least > columns.get("runtime_top_p", index, 0.0) > 0:
            problem = f"is {least:g}, which is not supported above runtime_top_p; leave it out"
            raise _wrong(index, "top_p_min", problem, ErrorKind.UNSUPPORTED)
    embedding = columns.inputs.get("request_prompt_embedding")
    if embedding is not None and embedding.data.size:
        problem = "is not supported: prompts of embeddings are not taken; leave it out"
        raise _wrong(0, "request_prompt_embedding", problem, ErrorKind.UNSUPPORTED)


def _item(
    columns: _Columns, index: int, beam_width: int, log_probs: bool, common: Mapping[str, Any], info: EngineInfo
) -> Item:
    own_end = info.eos_token_ids[0] if info.eos_token_ids else None
    end_id = columns.get("end_id", index)
    options: dict[str, Any] = {
        **common,
        **{ours: columns.get(theirs, index) for ours, theirs in _AS_THEY_ARE if theirs in columns.inputs},
        "stop_words_ids": _words(columns, "stop_words_list", index, info),
        "bad_words_ids": _words(columns, "bad_words_list", index, info),
        "seed": columns.get("random_seed", index, 0),
        "detokenize": False,
        **end_options(end_id, info),
        **(_beams(columns, index, beam_width) if beam_width != 1 else _choice(columns, index, log_probs)),
    }
    try:
        params = SamplingParams(**options)
    except InvalidRequestError as error:
        text = _PARAMETER.sub(lambda match: _INPUT_NAMES[match[0]], str(error))
        raise invalid(f"item {index} of the batch: {text}") from None
    padding = own_end if end_id is None else end_id
    return Item(_prompt(columns, index, info), params, info.pad_token_id or 0 if padding is None else padding)


def end_options(end_id: int | None, info: EngineInfo) -> dict[str, Any]:
    """What ends a completion: FasterTransformer knows one token, and one outside the vocabulary never comes."""
    if end_id is None or info.eos_token_ids == (end_id,):
        return {}
    return {"ignore_eos": True, "stop_token_ids": (end_id,) if 0 <= end_id < info.vocab_size else ()}


def sampling(top_k: int, top_p: float, temperature: float) -> dict[str, Any]:
    """How to choose tokens by FasterTransformer's rules: top_k 0 and top_p 0 are as if not given, both: greedy."""
    if top_k == 1 or (top_k == 0 and top_p == 0):
        return {"temperature": 0.0}
    return {"temperature": temperature, "top_k": top_k, "top_p": top_p or 1.0}


def _choice(columns: _Columns, index: int, log_probs: bool) -> dict[str, Any]:
    top_k, top_p = columns.get("runtime_top_k", index, 0), columns.get("runtime_top_p", index, 0.0)
    if not 0 <= top_p <= 1:
        raise _wrong(index, "runtime_top_p", f"must be from 0 to 1, got {top_p}")
    temperature = columns.get("temperature", index, 1.0)
    if not temperature >= 0:
        raise _wrong(index, "temperature", f"must not be negative, got {temperature}")
    options = sampling(top_k, top_p, temperature) | {"logprobs": 0 if log_probs else None}
    # without beams there is nothing to compare: both values of nothing, FasterTransformer's and the engine's
    if (penalty := columns.get("len_penalty", index, 0.0)) != 0:
        options["length_penalty"] = penalty
    if "beam_search_diversity_rate" in columns.inputs:
        options["beam_search_diversity_rate"] = columns.get("beam_search_diversity_rate", index)
    return options


def _beams(columns: _Columns, index: int, beam_width: int) -> dict[str, Any]:
    """A beam search takes no account of top-k and top-p; values that would change something are refused."""
    top_k, top_p = columns.get("runtime_top_k", index, 0), columns.get("runtime_top_p", index, 0.0)
    if top_k > _MAX_BEAMS_TOP_K or top_p not in (0.0, 1.0):
        name, value = ("runtime_top_k", top_k) if top_k > _MAX_BEAMS_TOP_K else ("runtime_top_p", top_p)
        raise _wrong(index, name, f"is {value:g}, which is not supported with beam_width above 1; leave it out")
    return {
        "beam_width": beam_width,
        "n": max(1, beam_width),
        "temperature": columns.get("temperature", index, 1.0),
        "length_penalty": columns.get("len_penalty", index, 0.0),
        "beam_search_diversity_rate": columns.get("beam_search_diversity_rate", index, 0.0),
    }


def _prompt(columns: _Columns, index: int, info: EngineInfo) -> list[int]:
    """The item's tokens without their padding; none at all is the start token."""
    row = columns.inputs["input_ids"].data[index]
    length = columns.get("input_lengths", index)
    if length > len(row):
        raise _wrong(index, "input_lengths", f"is {length}, but 'input_ids' has {len(row)} tokens an item")
    if length >= info.max_model_len:
        most = f"with at least one to come, more than the longest sequence of {info.max_model_len} (max_model_len)"
        raise _wrong(index, "input_ids", f"has {length} tokens; {most}")
    prompt: list[int] = row[:length].tolist()
    begins, start = info.decoder_start_token_id, columns.get("start_id", index)
    if begins is not None and start not in (None, begins):
        problem = f"is {start}, which is not supported: outputs of the model begin with token {begins}; leave it out"
        raise _wrong(index, "start_id", problem, ErrorKind.UNSUPPORTED)
    if not prompt and begins is not None:
        raise _wrong(index, "input_lengths", "is 0, and the encoder needs a token")
    if not prompt:
        start = columns.get("start_id", index, info.bos_token_id)
        if start is None:
            raise _wrong(index, "input_lengths", "is 0, and the model has no start token; give 'start_id'")
        prompt = [start]
    name = "input_ids" if length else "start_id"
    if max(prompt) >= info.vocab_size:
        raise _wrong(index, name, f"has token id {max(prompt)}; the vocabulary ends at {info.vocab_size - 1}")
    return prompt


def _words(columns: _Columns, name: str, index: int, info: EngineInfo) -> Sequence[list[int]]:
    """Words as runs of tokens: row 0 has them end to end, row 1 where each ends, then -1."""
    tensor = columns.inputs.get(name)
    if tensor is None:
        return ()
    if tensor.data.shape[-1] > _MOST_WORDS_TOKENS:
        raise _wrong(index, name, f"has {tensor.data.shape[-1]} tokens; the limit is {_MOST_WORDS_TOKENS}")
    ids, ends = tensor.data[index].tolist()
    last = ends.index(-1) if -1 in ends else len(ends)
    if any(end != -1 for end in ends[last:]):
        raise _wrong(index, name, f"has offsets {ends}: after -1 there must be -1 alone")
    ends = ends[:last]
    starts = [0, *ends[:-1]]
    if any(not start < end <= len(ids) for start, end in zip(starts, ends, strict=False)):
        raise _wrong(index, name, f"has offsets {ends}: they must grow, and end at most at {len(ids)}")
    words = [ids[start:end] for start, end in zip(starts, ends, strict=False)]
    for word in words:
        if not 0 <= min(word) <= max(word) < info.vocab_size:
            raise _wrong(index, name, f"has the word {word}; token ids are from 0 to {info.vocab_size - 1}")
    return words


def pack_words(words: list[list[list[int]]]) -> np.ndarray[Any, np.dtype[np.int32]]:
    """The words of each item as `_words` reads them, int32 [items, 2, longest]; none are [[0], [-1]]."""
    longest = max([1, *(sum(map(len, runs)) for runs in words)])
    packed = np.zeros((len(words), 2, longest), np.int32)
    packed[:, 1] = -1
    for index, runs in enumerate(words):
        flat = [token for run in runs for token in run]
        packed[index, 0, : len(flat)] = flat
        packed[index, 1, : len(runs)] = np.cumsum([len(run) for run in runs])
    return packed
