"""The text model: text in, text out, under the names that vLLM's backend and TensorRT-LLM have.

It has no engine of its own; each request uses the token model's that serves at that time. Outputs have an entry for
each completion. When it streams, a response has what is new since the one before.

How to sample comes in one of two ways. vLLM's: the JSON of `sampling_parameters`, or the request's own parameters, with
SamplingParams' names and defaults; parameters hold lists and objects as JSON. TensorRT-LLM's: a tensor for each, and
the most probable token unless `top_k` or `top_p` ask for others. Both at once are an error. `sampling_parameters` has
no name that is not known; among the request's own parameters those are ignored that do not look like a way to sample.
"""

import json
from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
from numpy.typing import NDArray
from tritonclient.grpc import model_config_pb2

from hasten.core.errors import ConfigError, InvalidRequestError
from hasten.core.sampling import names_at
from hasten.core.sampling_rules import Entrance
from hasten.core.structured_outputs import ANY_OBJECT, CONSTRAINTS
from hasten.core.text import from_json
from hasten.core.types import FinishReason, SamplingParams
from hasten.server.by_size import by_size
from hasten.server.engine.ticket import Progress
from hasten.server.engine.wire import CompletionDelta, EngineInfo
from hasten.server.json_size import check_json_size
from hasten.server.models.config import is_decoupled
from hasten.server.models.interfaces import TENSORRT_LLM_INPUTS
from hasten.server.models.model import DependentModel
from hasten.server.models.sampling import sampling_options
from hasten.server.models.token_inputs import end_options, sampling
from hasten.server.models.work import Work, decoded
from hasten.server.types import ErrorKind, InferResponse, ServiceError, Tensor, Texts, invalid

if TYPE_CHECKING:
    from hasten.server.lifecycle import Registry

_TENSORRT_LLM = frozenset(rule.name for rule in TENSORRT_LLM_INPUTS)
_KNOWN = names_at(Entrance.TEXT)
_OTHER_VALUES = frozenset(
    {"temperature", "top_k", "top_p", "stop", "bad_words", "seed", "stop_token_ids", "ignore_eos", "logprobs"}
    | {*CONSTRAINTS}
)
_NAMES = {theirs: ours for ours, theirs in names_at(Entrance.TENSORRT_LLM).items() if ours not in _OTHER_VALUES}
"""TensorRT-LLM's inputs whose values are the engine's, and the engine's names of them."""
_GUIDE, _GUIDE_TYPE = "guided_decoding_guide", "guided_decoding_guide_type"


@dataclass(frozen=True)
class TextRequest:
    """One prompt."""

    prompt: str
    params: SamplingParams
    stream: bool
    prepend_input: bool
    """Whether the output begins with the prompt."""
    wanted: frozenset[str]
    """Outputs beside the text that are asked for."""
    logprobs: bool
    """Whether the tokens' log-probabilities were asked for with the parameters."""


def read_text(work: Work, info: EngineInfo) -> TextRequest:
    """The request; ServiceError that names the input or parameter where something is wrong."""
    stream = work.flag("stream")
    exclude = work.flag("exclude_input_in_output", stream)
    if stream and not exclude:
        raise invalid("When streaming, `exclude_input_in_output` = False is not allowed.")
    params = _params(work, info)
    if params.n > info.max_num_seqs:
        raise invalid(f"n is {params.n}; more than {info.max_num_seqs} sequences at once (max_num_seqs)")
    wanted = _wanted(work)
    logprobs = params.logprobs is not None
    if wanted & {"cumulative_logprob", "cum_log_probs"} and not logprobs and params.beam_width == 1:
        params = replace(params, logprobs=0)
    return TextRequest(_text(work.inputs["text_input"]), params, stream, not exclude, wanted, logprobs)


def _wanted(work: Work) -> frozenset[str]:
    flags = {
        "return_finish_reason": ("finish_reason",),
        "return_cumulative_logprob": ("cumulative_logprob",),
        "return_logprobs": ("logprobs",),
        "return_num_input_tokens": ("num_input_tokens",),
        "return_num_output_tokens": ("num_output_tokens",),
        "return_log_probs": ("cum_log_probs", "output_log_probs"),
    }
    return work.outputs & {name for flag, names in flags.items() if work.flag(flag) for name in names}


def _params(work: Work, info: EngineInfo) -> SamplingParams:
    tensors = sorted(_TENSORRT_LLM & work.inputs.keys() - {"return_log_probs"})
    ways = ["input 'sampling_parameters'"] if "sampling_parameters" in work.inputs else []
    parameters: Mapping[str, Any] = work.known_parameters(_KNOWN)
    ways += [f"parameter '{name}'" for name in list(parameters)[:1]]
    ways += [f"input '{name}'" for name in tensors[:1]]
    if len(ways) > 1:
        raise invalid(f"{ways[0]} and {ways[1]} both say how to sample; give one of them")
    if tensors:
        return SamplingParams(**_tensorrt_llm(work.inputs, info))
    if "sampling_parameters" in work.inputs:
        parameters = _json(_text(work.inputs["sampling_parameters"]))
    return SamplingParams(**_own_options(parameters))


def _json(text: str) -> Mapping[str, Any]:
    try:
        check_json_size(text.encode())
        raw = from_json(text) if text.strip() else {}
    except InvalidRequestError as error:
        raise invalid(f"input 'sampling_parameters' is not JSON that can be read: {error}") from None
    except ValueError as error:
        raise invalid(f"input 'sampling_parameters' is not JSON: {error}") from None
    if not isinstance(raw, dict):
        raise invalid("input 'sampling_parameters' must be a JSON object")
    return raw


def _own_options(raw: Mapping[str, Any]) -> dict[str, Any]:
    options = sampling_options(raw, _KNOWN)
    if options.get("beam_width", 1) != 1:
        options.setdefault("n", options["beam_width"])
    return options


def _tensorrt_llm(inputs: Mapping[str, Tensor], info: EngineInfo) -> dict[str, Any]:
    """SamplingParams' arguments from TensorRT-LLM's inputs."""
    given = {name: inputs[name].data.ravel().tolist() for name in _TENSORRT_LLM & inputs.keys()}
    values: dict[str, Any] = {ours: given[theirs][0] for theirs, ours in _NAMES.items() if theirs in given}
    if "seed" in given and "random_seed" in given:
        raise invalid("inputs 'seed' and 'random_seed' say the same; give one")
    for name in ("seed", "random_seed"):
        if name in given:
            values["seed"] = given[name][0]
    for name, option in (("stop_words", "stop"), ("bad_words", "bad_words")):
        words = [decoded(word, name) for word in given.get(name, ())]
        values[option] = [word for word in words if word]
    values |= end_options(given["end_id"][0] if "end_id" in given else None, info)
    values |= _guide(given)
    if "early_stopping" in values:
        values["early_stopping"] = bool(values["early_stopping"])
    top_k, top_p = given.get("top_k", [0])[0], given.get("top_p", [0.0])[0]
    temperature = given.get("temperature", [1.0])[0]
    if values.get("beam_width", 1) == 1:
        return {**values, **_choice(top_k, top_p, temperature)}
    if top_k > 1 or top_p not in (0.0, 1.0):
        raise invalid("inputs 'top_k' and 'top_p' have no meaning with beam_width above 1; leave them out")
    return {"n": max(1, values["beam_width"]), **values, "temperature": temperature}


def _guide(given: Mapping[str, Any]) -> dict[str, Any]:
    """What the output keeps to, by TensorRT-LLM's name of its kind."""
    if _GUIDE_TYPE not in given:
        if _GUIDE in given:
            raise invalid(f"input '{_GUIDE}' needs '{_GUIDE_TYPE}'")
        return {}
    kind = decoded(given[_GUIDE_TYPE][0], _GUIDE_TYPE)
    if kind == "json":
        return {"json_schema": ANY_OBJECT}
    if kind not in ("json_schema", "regex"):
        raise invalid(f"input '{_GUIDE_TYPE}' must be json, json_schema or regex, got {kind!r:.80}")
    if _GUIDE not in given:
        raise invalid(f"input '{_GUIDE_TYPE}' {kind} needs '{_GUIDE}'")
    return {kind: decoded(given[_GUIDE][0], _GUIDE)}


def _choice(top_k: int, top_p: float, temperature: float) -> dict[str, Any]:
    if top_k < 0 or not 0 <= top_p <= 1 or not temperature >= 0:
        raise invalid(
            f"inputs 'top_k' and 'temperature' must not be negative and 'top_p' must be from 0 to 1; got {top_k}, "
            f"{temperature} and {top_p}"
        )
    return sampling(top_k, top_p, temperature)


def _text(tensor: Tensor) -> str:
    return decoded(tensor.data.ravel()[0], tensor.name)


class TextModel(DependentModel):
    """One version of a text model."""

    def __init__(self, config: model_config_pb2.ModelConfig, models: "Registry") -> None:
        super().__init__(config, models)
        self._decoupled = is_decoupled(config)
        if (pooling := self.token_engine().info.pooling) is not None:
            raise ConfigError(
                f"model '{config.name}': {pooling.architecture} generates no text; set parameter 'kind' to embedding "
                "or classification"
            )
        self.token_model_tokenizer()

    async def execute(self, work: Work) -> AsyncGenerator[InferResponse, None]:
        """One response, or with `stream` one whenever there is more."""
        served = self.find()
        with served:
            engine = self.token_engine(served)
            request = read_text(work, engine.info)
            if request.stream and not self._decoupled:
                raise ServiceError(ErrorKind.UNSUPPORTED, f"model '{work.model}' is not decoupled and cannot stream")
            work.clock.prepare()
            reply, finished = _Reply(request, work), False
            ticket = await engine.submit(request.prompt, request.params, work.queueing, stream=request.stream)
            try:
                while not finished:
                    progress = await ticket.read()
                    finished = progress.finished
                    if progress.queue_seconds is not None:
                        work.clock.wait(progress.queue_seconds)
                    if finished:
                        work.clock.compute()
                    yield work.response(await by_size(progress.size, reply.tensors, progress), finished)
            finally:
                engine.withdraw(ticket)


class _Reply:
    """Responses to one request."""

    def __init__(self, request: TextRequest, work: Work) -> None:
        self._request = request
        self._work = work
        self._last = [CompletionDelta(index, [], "") for index in range(request.params.n)]
        """What came last of each completion, without what the responses so far have."""
        self._first = request.prompt if request.prepend_input else ""
        self._prompt_tokens = 0
        names = ("text_output", *sorted(request.wanted))
        self._names = [name for name in names if name in work.outputs]

    def tensors(self, progress: Progress) -> list[Tensor]:
        """The outputs that say what is new."""
        self._prompt_tokens = self._prompt_tokens or len(progress.prompt_token_ids)
        for delta in progress.completions:
            if delta.finish_reason is FinishReason.ERROR:
                raise ServiceError(ErrorKind.INTERNAL, f"the prompt could not be continued: {delta.stop_reason}")
            self._last[delta.index] = delta
        tensors = [self._output(name, self._last) for name in self._names]
        for delta in progress.completions if len(self._last) > 1 else ():
            self._last[delta.index] = msgspec.structs.replace(
                delta, token_ids=[], text="", logprobs=None, token_logprobs=None
            )
        return tensors

    def _output(self, name: str, deltas: list[CompletionDelta]) -> Tensor:
        if name == "text_output":
            return self._texts(name, [self._first + delta.text for delta in deltas])
        if name == "finish_reason":
            return self._texts(name, [str(delta.finish_reason) for delta in deltas])
        if name == "logprobs":
            texts = [_logprobs_json(delta) if self._request.logprobs else "null" for delta in deltas]
            return self._texts(name, texts)
        if name == "num_input_tokens":
            return self._work.tensor(name, "UINT32", np.array([self._prompt_tokens], np.uint32))
        if name == "num_output_tokens":
            return self._work.tensor(name, "UINT32", np.array([len(delta.token_ids) for delta in deltas], np.uint32))
        if name == "output_log_probs":
            return self._work.tensor(name, "FP32", _matrix([_chosen(delta) for delta in deltas]))
        sums = np.array([delta.cumulative_logprob or 0.0 for delta in deltas], np.float32)
        return self._work.tensor(name, "FP32", sums)

    def _texts(self, name: str, texts: list[str]) -> Tensor:
        """One for each completion."""
        shape = (1, len(texts)) if self._work.batch_size else (len(texts),)
        return Texts(name, shape, [text.encode() for text in texts])


def _matrix(rows: list[list[float]]) -> NDArray[np.float32]:
    matrix = np.zeros((len(rows), max(map(len, rows))), np.float32)
    for index, row in enumerate(rows):
        matrix[index, : len(row)] = row
    return matrix


def _chosen(delta: CompletionDelta) -> list[float]:
    if delta.token_logprobs is not None:
        return delta.token_logprobs
    return [entry[token].logprob for token, entry in zip(delta.token_ids, delta.logprobs or (), strict=False)]


def _logprobs_json(delta: CompletionDelta) -> str:
    """A list with an entry for each token; encoded one by one, so that other threads run between them."""
    positions = (
        json.dumps({token: msgspec.structs.asdict(entry) for token, entry in position.items()})
        for position in delta.logprobs or ()
    )
    return f"[{', '.join(positions)}]"
