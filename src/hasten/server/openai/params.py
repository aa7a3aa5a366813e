"""From a request of OpenAI's API to sampling parameters, for servers and for batches of requests in files."""

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec
from msgspec import Raw

from hasten.core.errors import HastenError
from hasten.core.sampling import RULES
from hasten.core.structured_outputs import ANY_OBJECT
from hasten.core.types import SamplingParams
from hasten.server.json_size import check_json_size
from hasten.server.openai.types import ChatRequest, CompletionRequest, ContentPart, GenerationRequest
from hasten.server.tokenizing import check_entries

if TYPE_CHECKING:
    from hasten.server.openai.reading import AnswerReading

_MOST_COMPLETIONS, _MOST_PROMPTS, _MOST_LOGPROBS, _MOST_STOPS = 128, 2048, 20, 64
"""Each as OpenAI's own limit or above it: without one, a short request could ask for any amount of work."""
_MOST_MESSAGES = 4096
_MOST_IN_ALL = 16_384
"""Completions of all prompts of a request."""
_HOTTEST = 2
"""Above it, OpenAI's own API refuses a temperature."""
_DEFAULT_MAX_TOKENS = 16
_OWN_FORM = ("n", "max_tokens", "seed", "structured_outputs")
_PASSED_ON = tuple(name for name in RULES if name in GenerationRequest.__struct_fields__ and name not in _OWN_FORM)
"""Fields that are SamplingParams' own."""
CONSTRAINING = {"response_format", "guided_json", "guided_regex", "guided_choice", "guided_grammar"}
CONSTRAINING |= {"structured_outputs"}
"""Fields that constrain the output, of which a request has one."""
_NOT_JSON = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)
"""What msgspec raises for a text that is none, or is nested too deeply."""
QUEUE_TIMEOUT = "x-queue-timeout-ms"
_MOST_DIGITS = 15
_FIELD = re.compile(r"`\$\.(\w+)|(?:key|unknown|required) field `(\w+)`|in `\$\.(\w+)")

Decoded = TypeVar("Decoded", bound=msgspec.Struct)


class OpenAIError(HastenError):
    """A refusal with all that OpenAI's error object says."""

    def __init__(self, message: str, *, status: int = 400, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.param = param
        self.code = code


def decode(body: bytes, decoder: msgspec.json.Decoder[Decoded]) -> Decoded:
    """The request in a body; OpenAIError naming the field that is wrong or unknown.

    The decoder exists beforehand: msgspec learns a type's fields when it first needs them, and two threads that
    do so at once end the process.
    """
    check_json_size(body)
    try:
        return decoder.decode(body)
    except msgspec.ValidationError as error:
        found = _FIELD.search(str(error))
        param = next(filter(None, found.groups()), None) if found else None
        raise OpenAIError(f"the request is not valid: {error}", param=param) from error
    except _NOT_JSON as error:
        raise OpenAIError(f"the body is not valid JSON: {error}") from error


def text_part(where: str, part: ContentPart, kinds: Collection[str] = ("text",)) -> ContentPart:
    """A part of a message, as chats have it; OpenAIError unless it is text, of a type of these kinds."""
    if part.type not in kinds or part.text is None:
        param = where.partition("[")[0].partition(".")[0]
        raise OpenAIError(f"{where} is of type {part.type!r:.80}: the model reads text alone", param=param)
    return ContentPart(type="text", text=part.text)


def text_parts(
    where: str, content: str | Sequence[ContentPart], kinds: Collection[str] = ("text",)
) -> str | list[ContentPart]:
    """A message's content; errors are those of `text_part`."""
    if isinstance(content, str):
        return content
    return [text_part(f"{where}[{number}]", part, kinds) for number, part in enumerate(content)]


def queue_timeout(headers: Mapping[str, str]) -> float | None:
    """Seconds that a request may wait before it is begun, from its headers; None where they do not say."""
    text = headers.get(QUEUE_TIMEOUT)
    if text is None:
        return None
    if not (text.isascii() and text.isdigit() and 0 < len(text) <= _MOST_DIGITS and int(text) > 0):
        raise OpenAIError(f"the header {QUEUE_TIMEOUT} must be a whole number of milliseconds from 1 on")
    return int(text) / 1e3


def completion_params(request: CompletionRequest, prompts: int) -> SamplingParams:
    """For POST /v1/completions with so many prompts. A `max_tokens` of 0 with `echo` makes a token, not shown."""
    if request.suffix:
        raise OpenAIError("suffix is not supported: the model continues texts", param="suffix")
    tokens = _DEFAULT_MAX_TOKENS if request.max_tokens is None else request.max_tokens
    if tokens == 0 and request.echo:
        tokens = 1
    _limit("prompt", prompts, _MOST_PROMPTS)
    _limit("logprobs", request.logprobs, _MOST_LOGPROBS)
    prompt_logprobs = request.logprobs if request.echo else None
    best = _best_of(request)
    logprobs = request.logprobs if request.logprobs is not None or not best else 0
    params = _params(request, max_tokens=tokens, logprobs=logprobs, prompt_logprobs=prompt_logprobs, **best)
    each = max(params.n, params.beam_width)
    if prompts * each > _MOST_IN_ALL:
        message = f"{prompts} prompts with {each} completions each are more than {_MOST_IN_ALL}, the limit of a request"
        raise OpenAIError(message, param="prompt")
    return params


def _best_of(request: CompletionRequest) -> dict[str, Any]:
    """How many completions are to be drawn, where only the best of them are wanted."""
    shown, drawn = request.n or 1, request.best_of
    if drawn is None or drawn == shown or request.use_beam_search:
        return {}
    if drawn < shown:
        raise OpenAIError(f"best_of must be at least n ({shown}), got {drawn}", param="best_of")
    if request.stream:
        raise OpenAIError("best_of above n cannot be streamed: which is the best shows at the end", param="best_of")
    _limit("best_of", drawn, _MOST_COMPLETIONS)
    return {"n": drawn}


def check_chat(request: ChatRequest) -> None:
    """OpenAIError for what a chat asks for and cannot have."""
    _limit("messages", len(request.messages), _MOST_MESSAGES)
    unsupported = {
        "modalities": request.modalities not in (None, ["text"]),
        "store": bool(request.store),
        "service_tier": request.service_tier not in (None, "auto", "default"),
    }
    for name, is_requested in unsupported.items():
        if is_requested:
            raise OpenAIError(f"{name}={getattr(request, name)!r:.80} is not supported; leave it out", param=name)
    if request.top_logprobs is not None and not request.logprobs:
        raise OpenAIError("top_logprobs needs logprobs to be true", param="top_logprobs")
    if None not in (request.max_tokens, request.max_completion_tokens):
        raise OpenAIError("give max_completion_tokens or max_tokens, not both", param="max_tokens")


def chat_params(request: ChatRequest, room: int, reading: "AnswerReading | None" = None) -> SamplingParams:
    """For POST /v1/chat/completions; `room` is how many tokens fit behind the prompt."""
    _limit("top_logprobs", request.top_logprobs, _MOST_LOGPROBS)
    limits = [given for given in (request.max_completion_tokens, request.max_tokens) if given is not None]
    return _params(
        request,
        reading,
        max_tokens=limits[0] if limits else max(1, room),
        logprobs=(request.top_logprobs or 0) if request.logprobs else None,
    )


def _params(request: GenerationRequest, reading: "AnswerReading | None" = None, **values: Any) -> SamplingParams:
    _limit("n", request.n, _MOST_COMPLETIONS)
    _limit("temperature", request.temperature, _HOTTEST)
    if isinstance(request.stop, list):
        _limit("stop", len(request.stop), _MOST_STOPS)
    if request.stream_options is not None and request.stream_options.include_obfuscation:
        raise OpenAIError("include_obfuscation is not supported", param="stream_options")
    if request.stream_options is not None and not request.stream:
        raise OpenAIError("stream_options needs stream to be true", param="stream_options")
    fields = msgspec.structs.asdict(request)
    values |= {name: value for name in _PASSED_ON if (value := fields[name]) is not None}
    check_entries(values)
    if request.seed is not None:
        values["seed"] = request.seed % 2**64  # OpenAI's are signed
    values = {"n": 1 if request.n is None else request.n} | values
    constraint = _constraint(request) if any(fields[name] for name in CONSTRAINING) else {}
    values |= constraint if reading is None else reading.sampling(constraint)
    return SamplingParams(**(values | _beams(request)))


def _limit(name: str, value: float | None, most: int) -> None:
    if value is not None and value > most:
        raise OpenAIError(f"{name} is limited to {most}, got {value}", param=name)


def _beams(request: GenerationRequest) -> dict[str, Any]:
    """The parameters of a beam search, if one is asked for: the best `n` of `best_of` beams."""
    count = 1 if request.n is None else request.n
    width = count if request.best_of is None else request.best_of
    if not request.use_beam_search:
        if width != count and isinstance(request, ChatRequest):
            raise OpenAIError("best_of other than n needs use_beam_search", param="best_of")
        return {}
    if width < 2:
        raise OpenAIError("use_beam_search needs best_of, or n, above 1: the number of beams", param="best_of")
    _limit("best_of", width, _MOST_COMPLETIONS)
    # A search draws nothing: of the values that say so, SamplingParams takes its default.
    drawn = {} if request.temperature else {"temperature": 1.0}
    return {"beam_width": width, **drawn}


def _constraint(request: GenerationRequest) -> dict[str, Any]:
    """What the output is to keep to, by SamplingParams' name; OpenAIError where several things are asked for."""
    found = [entry for entry in _constraints(request) if entry[2]]
    if len(found) > 1:
        names = " and ".join(entry[0] for entry in found)
        raise OpenAIError(f"the output can be constrained in one way only, got {names}", param=found[1][0])
    return {kind: value for _, kind, value in found}


def _constraints(request: GenerationRequest) -> Iterator[tuple[str, str, Any]]:
    """(field, kind, value) of each way to constrain the output; an empty value asks for nothing."""
    yield "response_format", "json_schema", _format_schema(request)
    yield "guided_json", "json_schema", _schema_text(request.guided_json)
    yield "guided_regex", "regex", request.guided_regex
    yield "guided_choice", "choice", request.guided_choice
    yield "guided_grammar", "grammar", request.guided_grammar
    given = request.structured_outputs
    if given is not None:
        yield "structured_outputs", "json_schema", _schema_text(given.json)
        yield "structured_outputs", "json_schema", ANY_OBJECT if given.json_object else None
        yield "structured_outputs", "regex", given.regex
        yield "structured_outputs", "choice", given.choice
        yield "structured_outputs", "grammar", given.grammar


def _format_schema(request: GenerationRequest) -> str | None:
    given = request.response_format
    if given is None or given.type == "text":
        return None
    if given.type == "json_object":
        return ANY_OBJECT
    if given.type != "json_schema":
        message = f"response_format.type must be text, json_object or json_schema, got {given.type!r:.80}"
        raise OpenAIError(message, param="response_format")
    schema = None if given.json_schema is None else _schema_text(given.json_schema.schema)
    if schema is None:
        raise OpenAIError("response_format.json_schema.schema is missing", param="response_format")
    return schema


def _schema_text(raw: Raw) -> str | None:
    """A schema's JSON, which may also come as a string that holds it."""
    try:
        text = bytes(raw).decode().strip()
        if text.startswith('"'):
            text = msgspec.json.decode(text, type=str)
    except _NOT_JSON as error:
        raise OpenAIError(f"a JSON schema is not valid JSON: {error}") from error
    return None if text in ("", "null") else text
