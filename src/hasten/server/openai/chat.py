"""From a chat's messages to the prompt that the model was trained on, by its tokenizer's template.

Imports no transformers: what templates find there is made here.
"""

import datetime
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import TemplateError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from hasten.core.errors import CheckpointError, InvalidRequestError
from hasten.server.openai.types import ChatMessage, ChatRequest

_ROLES = ("system", "developer", "user", "assistant", "tool")
_SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_LONGEST_MESSAGE = 500


class ChatTemplate:
    """A template, compiled, with the special tokens that it may use."""

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        self._special_tokens = dict(special_tokens)
        try:
            self._template = _environment().from_string(source)
        except TemplateError as error:
            raise CheckpointError(f"the tokenizer's chat template is not valid: {error}") from error

    @classmethod
    def from_folder(cls, path: str | Path) -> "ChatTemplate | None":
        """The template of a tokenizer's folder, or of the folder of a tokenizer.json; None where it has none."""
        path = Path(path)
        folder = path if path.is_dir() else path.parent
        config = _read_json(folder / "tokenizer_config.json")
        source = _source(folder, config)
        if source is None:
            return None
        named = _read_json(folder / "special_tokens_map.json") | config
        tokens = {name: _content(named[name]) for name in _SPECIAL_TOKENS if named.get(name)}
        return cls(source, tokens)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt for some messages; InvalidRequestError where the template refuses them.

        `variables` are what the template may know beside them.
        """
        values = self._special_tokens | dict(variables or {})
        values |= {"messages": messages, "tools": None, "add_generation_prompt": add_generation_prompt}
        try:
            return self._template.render(values)
        except SecurityError as error:
            raise CheckpointError(f"the tokenizer's chat template does what no template may do: {error}") from error
        except Exception as error:  # templates index, add and call whatever the messages are made of
            message = str(error)[:_LONGEST_MESSAGE]
            raise InvalidRequestError(f"the tokenizer's chat template refuses these messages: {message}") from error


class _Generation(Extension):
    """`{% generation %}` marks what the assistant says, for training; it changes nothing here."""

    tags = {"generation"}  # noqa: RUF012  # jinja2 declares it so

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """What is between the marks."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment() -> ImmutableSandboxedEnvironment:
    """What transformers gives a template."""
    made = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
    made.filters["tojson"] = _to_json
    made.globals["raise_exception"] = _raise
    made.globals["strftime_now"] = _now
    return made


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
        made = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{file} is not valid JSON: {error}") from error
    if not isinstance(made, dict):
        raise CheckpointError(f"{file} holds no JSON object")
    return made


def _source(folder: Path, config: Mapping[str, Any]) -> str | None:
    """The template's text: from its own file, or from the tokenizer's configuration, there perhaps one of several."""
    file = folder / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    given = config.get("chat_template")
    if isinstance(given, list):
        return next((entry["template"] for entry in given if entry.get("name") == "default"), None)
    return given if isinstance(given, str) else None


def _content(token: Any) -> str:
    """A special token is written as its text or as an object that has it."""
    return str(token["content"] if isinstance(token, dict) else token)


def chat_text(asked: ChatRequest, template: ChatTemplate) -> str:
    """The prompt for a chat's messages."""
    messages = [_message(number, message) for number, message in enumerate(asked.messages)]
    if not messages:
        raise InvalidRequestError("messages is empty")
    begins_answer = True if asked.add_generation_prompt is None else asked.add_generation_prompt
    if not asked.continue_final_message:
        return template.render(messages, add_generation_prompt=begins_answer, variables=asked.chat_template_kwargs)
    if asked.add_generation_prompt:
        raise InvalidRequestError("continue_final_message cannot go with add_generation_prompt")
    text = template.render(messages, add_generation_prompt=False, variables=asked.chat_template_kwargs)
    last = str(messages[-1]["content"]).strip()
    place = text.rfind(last)
    if not last or place < 0:
        raise InvalidRequestError("the last message has no text that could be continued")
    return text[: place + len(last)]


def _message(number: int, message: ChatMessage) -> dict[str, Any]:
    """A message as templates know it: its content is one text."""
    where = f"messages[{number}]"
    if message.role not in _ROLES:
        raise InvalidRequestError(f"{where}.role must be one of {', '.join(_ROLES)}, got {message.role!r:.80}")
    content = message.content
    if isinstance(content, list):
        for place, part in enumerate(content):
            if part.type != "text" or part.text is None:
                raise InvalidRequestError(
                    f"{where}.content[{place}] is of type {part.type!r:.80}: the model reads text alone"
                )
        content = "\n".join(part.text or "" for part in content)
    if content is None and not message.tool_calls:
        raise InvalidRequestError(f"{where}.content is missing")
    made = {"role": message.role, "content": content}
    extra = {name: getattr(message, name) for name in ("name", "tool_calls", "tool_call_id")}
    return made | {name: value for name, value in extra.items() if value is not None}
