"""From a chat's messages to the prompt that the model was trained on, by its tokenizer's template.

Imports no transformers: the functions and filters that templates expect of it are defined here.
"""

import datetime
import json
import re
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import TemplateError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser

from hasten.core.errors import CheckpointError, InvalidRequestError
from hasten.core.text import from_json, require_utf8
from hasten.engine.template_sandbox import BoundedEnvironment, TemplateLimitError, TemplateTimeError, limited_time

_ROLES = ("system", "developer", "user", "assistant", "tool")
_SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_LONGEST_MESSAGE = 500
_NOT_VARIABLES = frozenset(
    {
        *(
            "chat_template",
            "tokenize",
            "continue_final_message",
            "return_dict",
            "return_tensors",
            "padding",
            "truncation",
        ),
        *("conversation", "raise_exception", "strftime_now", "range", "namespace", "dict"),
    }
)
"""What transformers' `apply_chat_template` takes for its own, and what templates call: no variables of a client's."""


class _LimitError(Exception):
    """Rendering went beyond a limit."""


@dataclass(frozen=True)
class RenderLimits:
    """How much rendering may take: a template may loop over the messages of a client as often as it likes."""

    characters: int
    """Of the prompt."""
    seconds: float
    """Of CPU time."""

    def applied(self, pieces: Iterable[str]) -> Iterator[str]:
        """The pieces of a prompt, up to a limit."""
        characters, end = 0, time.thread_time() + self.seconds
        for piece in pieces:
            characters += len(piece)
            if characters > self.characters:
                raise _LimitError(f"the messages become a prompt of more than {self.characters} characters: too long")
            if time.thread_time() > end:
                raise TemplateTimeError
            yield piece


class ChatTemplate:
    """A template, compiled, with the special tokens that it may use.

    `tool_source` is the template of chats with tools, for tokenizers that have one of its own for them.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, str], tool_source: str | None = None) -> None:
        self._source, self._special_tokens = source, dict(special_tokens)
        self.tool_source = source if tool_source is None else tool_source
        """Text of the template that renders chats with tools."""
        try:
            self._template = _environment().from_string(source)
            self._tool_template = _environment().from_string(self.tool_source)
        except TemplateError as error:
            raise CheckpointError(f"the tokenizer's chat template is not valid: {error}") from error

    def __reduce__(self) -> tuple[type["ChatTemplate"], tuple[str, dict[str, str], str]]:
        return ChatTemplate, (self._source, self._special_tokens, self.tool_source)

    @property
    def takes_tools(self) -> bool:
        """Whether the prompt of a chat can describe tools."""
        return re.search(r"\btools\b", self.tool_source) is not None

    @classmethod
    def from_folder(cls, path: str | Path, source: str | None = None) -> "ChatTemplate | None":
        """The template of a tokenizer's folder, or of the folder of a tokenizer.json; None where it has none.

        `source` is a template in place of the folder's own, for its special tokens.
        """
        path = Path(path)
        folder = path if path.is_dir() else path.parent
        config = _read_json(folder / "tokenizer_config.json")
        tool_source = None if source else _source(folder, config, "tool_use")
        source = source or _source(folder, config, "default")
        if source is None:
            return None
        named = _read_json(folder / "special_tokens_map.json") | config
        tokens = {name: _content(named[name]) for name in _SPECIAL_TOKENS if named.get(name)}
        return cls(source, tokens, tool_source)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        variables: Mapping[str, Any] | None = None,
        limits: "RenderLimits | None" = None,
    ) -> str:
        """The prompt for some messages; InvalidRequestError where the template refuses them, or goes beyond limits.

        `variables` are what the template may know beside them.
        """
        values: dict[str, Any] = {"messages": messages, "tools": tools, "add_generation_prompt": add_generation_prompt}
        values |= self._special_tokens
        _check_variables(variables or {}, values)
        template = self._tool_template if tools else self._template
        seconds = float("inf") if limits is None else limits.seconds
        try:
            with limited_time(seconds):
                pieces = template.generate(values | dict(variables or {}))
                return "".join(pieces if limits is None else limits.applied(pieces))
        except _LimitError as error:
            raise InvalidRequestError(str(error)) from None
        except TemplateTimeError:
            raise InvalidRequestError(
                f"the messages take more than {seconds:g} s to become a prompt: too many"
            ) from None
        except TemplateLimitError as error:
            raise InvalidRequestError(f"the tokenizer's chat template cannot be rendered: {error}") from None
        except SecurityError as error:
            raise CheckpointError(f"the tokenizer's chat template does what no template may do: {error}") from error
        except Exception as error:  # templates index, add and call whatever the messages are made of
            message = str(error)[:_LONGEST_MESSAGE]
            raise InvalidRequestError(f"the tokenizer's chat template refuses these messages: {message}") from error


def _check_variables(given: Mapping[str, Any], reserved: Iterable[str]) -> None:
    """InvalidRequestError where a client's variables would replace what the template gets otherwise."""
    for name in given:
        if name in reserved or name in _NOT_VARIABLES:
            raise InvalidRequestError(f"chat_template_kwargs cannot set {name!r}; leave it out")


class _Generation(Extension):
    """`{% generation %}` marks what the assistant says, for training; it changes nothing here."""

    tags = {"generation"}  # noqa: RUF012  # jinja2 declares it so

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """What is between the marks."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment() -> BoundedEnvironment:
    """What transformers gives a template."""
    environment = BoundedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = _now
    return environment


def _to_json(value: Any, **options: Any) -> str:
    return json.dumps(value, **({"ensure_ascii": False} | options))


def _raise(message: str) -> None:
    raise TemplateError(message)


def _now(form: str) -> str:
    return datetime.datetime.now().strftime(form)


def _read_json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        values = from_json(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{file} is not valid JSON: {error}") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{file} holds no JSON object")
    return values


def _source(folder: Path, config: Mapping[str, Any], name: str) -> str | None:
    """A template's text: from its own file, or from the tokenizer's configuration, there perhaps one of several."""
    is_default = name == "default"
    file = folder / ("chat_template.jinja" if is_default else f"additional_chat_templates/{name}.jinja")
    if file.is_file():
        return file.read_text(encoding="utf-8")
    given = config.get("chat_template")
    if isinstance(given, list):
        return next((entry["template"] for entry in given if entry.get("name") == name), None)
    return given if isinstance(given, str) and is_default else None


def _content(token: Any) -> str:
    """A special token is written as its text or as an object that has it."""
    return str(token["content"] if isinstance(token, dict) else token)


def chat_prompt(
    messages: Sequence[Mapping[str, Any]],
    template: ChatTemplate,
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    add_generation_prompt: bool = True,
    continue_final_message: bool = False,
    variables: Mapping[str, Any] | None = None,
    limits: RenderLimits | None = None,
) -> str:
    """The prompt for a chat's messages, each with `role` and `content`; InvalidRequestError names what is wrong.

    A content is a text or a list of parts `{"type": "text", "text": ...}`. The arguments of `tool_calls` may be JSON:
    templates get the objects. `tools` are functions as OpenAI's API describes them. With `continue_final_message` the
    last message is left open, to be continued.
    """
    normalized = [_message(f"messages[{number}]", message) for number, message in enumerate(messages)]
    if not normalized:
        raise InvalidRequestError("messages is empty")
    _name_results(normalized)
    if continue_final_message and add_generation_prompt:
        raise InvalidRequestError("continue_final_message cannot go with add_generation_prompt")
    if tools and not template.takes_tools:
        raise InvalidRequestError("tools cannot be described to this model: its chat template has no room for them")
    text = template.render(
        normalized,
        tools=tools,
        add_generation_prompt=add_generation_prompt,
        variables=variables,
        limits=limits,
    )
    require_utf8("messages", text)
    return _open_end(text, normalized[-1]["content"]) if continue_final_message else text


def _name_results(messages: Sequence[dict[str, Any]]) -> None:
    """Give results of tools the names of their functions, which some templates want and OpenAI's clients leave out."""
    names: dict[Any, str] = {}
    for message in messages:
        for call in message.get("tool_calls", ()):
            if isinstance(call.get("id"), str):
                names[call["id"]] = call["function"]["name"]
        if message["role"] == "tool" and message.get("tool_call_id") in names:
            message.setdefault("name", names[message["tool_call_id"]])


def _open_end(text: str, content: str | None) -> str:
    last = (content or "").strip()
    start = text.rfind(last)
    if not last or start < 0:
        raise InvalidRequestError("the last message has no text that could be continued")
    return text[: start + len(last)]


def _message(where: str, message: Mapping[str, Any]) -> dict[str, Any]:
    """A message as templates know it: its content is one text."""
    if not isinstance(message, Mapping):
        raise InvalidRequestError(f"{where} must be a dict with role and content, got {message!r:.80}")
    role = message.get("role")
    if role not in _ROLES:
        raise InvalidRequestError(f"{where}.role must be one of {', '.join(_ROLES)}, got {role!r:.80}")
    content = _content_text(f"{where}.content", message.get("content"))
    if content is None and not message.get("tool_calls"):
        raise InvalidRequestError(f"{where}.content is missing")
    if content is not None:
        require_utf8(f"{where}.content", content)
    result = {name: value for name, value in message.items() if value is not None} | {"role": role, "content": content}
    if calls := message.get("tool_calls"):
        result["tool_calls"] = [_tool_call(f"{where}.tool_calls[{number}]", call) for number, call in enumerate(calls)]
    return result


def _tool_call(where: str, call: Any) -> dict[str, Any]:
    """A call of a message, with its arguments as an object."""
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise InvalidRequestError(f"{where} must have a function with a name and arguments, got {call!r:.80}")
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = from_json(arguments or "{}")
        except ValueError as error:
            raise InvalidRequestError(f"{where}.function.arguments is not valid JSON: {error}") from None
    arguments = {} if arguments is None else arguments
    if not isinstance(arguments, Mapping):
        raise InvalidRequestError(f"{where}.function.arguments is not a JSON object: {arguments!r:.80}")
    return {**call, "type": "function", "function": {**function, "arguments": arguments}}


def _content_text(where: str, content: Any) -> str | None:
    if content is None or isinstance(content, str):
        return content
    if not isinstance(content, list | tuple):
        raise InvalidRequestError(f"{where} must be a text or a list of parts, got {content!r:.80}")
    texts = []
    for index, part in enumerate(content):
        kind = part.get("type") if isinstance(part, Mapping) else part
        if kind != "text" or not isinstance(part.get("text"), str):
            raise InvalidRequestError(f"{where}[{index}] is of type {kind!r:.80}: the model reads text alone")
        texts.append(part["text"])
    return "\n".join(texts)
