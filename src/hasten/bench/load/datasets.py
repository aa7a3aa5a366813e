"""Data sets of a load: conversations in ShareGPT's form, prompts as JSON lines, traces with timestamps."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hasten.core.errors import ConfigError, InvalidRequestError
from hasten.core.files import reading
from hasten.core.text import from_json, require_utf8, utf8_lines

_USER, _ASSISTANT = ("human", "user"), ("gpt", "assistant", "chatgpt", "model", "bing", "bard")
_LENGTH_NAMES = ("output_length", "output_tokens", "output_len", "max_tokens")
_PROMPT_NAMES = ("prompt", "text", "text_input")


@dataclass(frozen=True)
class Exchange:
    """What a user says, and the answer that the data set has for it."""

    prompt: str | list[int]
    answer: str | None = None
    output_length: int | None = None
    """Tokens of the answer, where the data set says them."""


@dataclass(frozen=True)
class TraceEntry:
    """One request of a trace: its prompt, or the length and the blocks of one."""

    at: float
    """Seconds after the first request."""
    output_length: int
    prompt: str | list[int] | None = None
    input_length: int = 0
    hash_ids: tuple[int, ...] = ()
    """Equal numbers stand for equal blocks of the prompt, in order."""


def read_conversations(path: str) -> list[list[Exchange]]:
    """Conversations in ShareGPT's form, without those in which no user says anything.

    The file is a JSON array, or JSON lines, of objects with `conversations` (`from`, `value`) or `messages` (`role`,
    `content`). ConfigError names the entry or the line that is something else.
    """
    with reading(f"the dataset {path}"):
        lines = utf8_lines(Path(path).read_bytes())
    text = "\n".join(lines)
    if text.lstrip().startswith("["):
        listed = enumerate(_json(text, path), start=1)
        entries: Iterator[tuple[str, Any]] = ((f"{path}, entry {number}", entry) for number, entry in listed)
    else:
        entries = _json_lines(path, lines)
    conversations = [exchanges for where, entry in entries if (exchanges := list(_exchanges(entry, where)))]
    if not conversations:
        raise ConfigError(f"{path} has no conversation in which a user says something")
    return conversations


def read_prompts(path: str) -> list[list[Exchange]]:
    """Prompts as JSON lines: objects with `prompt` (text or token ids), and `output_length` where it is known."""
    found = [[_prompt(entry, where)] for where, entry in _entries(path)]
    if not found:
        raise ConfigError(f"{path} has no prompts")
    return found


def read_trace(path: str) -> list[TraceEntry]:
    """Requests with timestamps as JSON lines, in the order of time.

    Objects with `timestamp` (milliseconds), `output_length`, and `prompt` or `input_length` with `hash_ids` if any.
    """
    entries = sorted((_trace_entry(entry, where) for where, entry in _entries(path)), key=lambda entry: entry.at)
    if not entries:
        raise ConfigError(f"{path} has no requests")
    return entries


def _entries(path: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    with reading(f"the dataset {path}"):
        lines = utf8_lines(Path(path).read_bytes())
    return _json_lines(path, lines)


def _json_lines(path: str, lines: list[str]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Each line's location and object; ConfigError for a line that is no JSON object."""
    for number, line in enumerate(lines, start=1):
        if line.strip():
            where = f"{path}, line {number}"
            entry = _json(line, where)
            if not isinstance(entry, dict):
                raise ConfigError(f"{where}: not a JSON object")
            yield where, entry


def _json(text: str, where: str) -> Any:
    try:
        return from_json(text)
    except ValueError as error:
        raise ConfigError(f"{where}: not JSON: {error}") from error


def _exchanges(entry: Any, where: str) -> Iterator[Exchange]:
    """A conversation's exchanges: each turn of a user, with the answer right behind it."""
    if not isinstance(entry, dict):
        raise ConfigError(f"{where}: not a JSON object")
    messages = entry.get("conversations", entry.get("messages"))
    if not isinstance(messages, list):
        raise ConfigError(f'{where}: no list "conversations" or "messages"')
    parts = [_message(message, where) for message in messages]
    for index, (role, text) in enumerate(parts):
        if role in _USER and text:
            answer = next((said for who, said in parts[index + 1 : index + 2] if who in _ASSISTANT), None)
            yield Exchange(text, answer or None)


def _message(message: Any, where: str) -> tuple[str, str]:
    if isinstance(message, dict):
        role = message.get("from", message.get("role"))
        text = message.get("value", message.get("content"))
        if isinstance(role, str) and isinstance(text, str):
            return role, _utf8(text, where)
    raise ConfigError(f'{where}: a message is not an object with strings "from" and "value", or "role" and "content"')


def _prompt(entry: Mapping[str, Any], where: str) -> Exchange:
    length = next((entry[name] for name in _LENGTH_NAMES if entry.get(name) is not None), None)
    if length is not None:
        _require_count(length, "output_length", where)
    return Exchange(_prompt_text(entry, where), output_length=length)


def _prompt_text(entry: Mapping[str, Any], where: str) -> str | list[int]:
    prompt = next((entry[name] for name in _PROMPT_NAMES if name in entry), None)
    if isinstance(prompt, str) and prompt:
        return _utf8(prompt, where)
    if isinstance(prompt, list) and prompt and all(type(token) is int and token >= 0 for token in prompt):
        return prompt
    raise ConfigError(f'{where}: "prompt" is neither a text nor a list of token ids')


def _trace_entry(entry: Mapping[str, Any], where: str) -> TraceEntry:
    at = entry.get("timestamp")
    if not isinstance(at, int | float) or isinstance(at, bool) or not 0 <= at < float("inf"):
        raise ConfigError(f'{where}: "timestamp" is not a number of milliseconds of at least 0')
    length = next((entry[name] for name in _LENGTH_NAMES if entry.get(name) is not None), None)
    output_length = _require_count(length, "output_length", where)
    if any(name in entry for name in _PROMPT_NAMES):
        return TraceEntry(at / 1000, output_length, _prompt_text(entry, where))
    input_length = _require_count(entry.get("input_length"), "input_length", where)
    hash_ids = entry.get("hash_ids") or []
    if not isinstance(hash_ids, list) or not all(type(number) is int for number in hash_ids):
        raise ConfigError(f'{where}: "hash_ids" is not a list of whole numbers')
    return TraceEntry(at / 1000, output_length, None, input_length, tuple(hash_ids))


def _require_count(value: Any, name: str, where: str) -> int:
    if type(value) is not int or value < 1:
        raise ConfigError(f'{where}: "{name}" is not a whole number of at least 1')
    return value


def _utf8(text: str, where: str) -> str:
    try:
        require_utf8("the text", text)
    except InvalidRequestError as error:
        raise ConfigError(f"{where}: {error}") from None
    return text
