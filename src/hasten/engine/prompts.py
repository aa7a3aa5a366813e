"""Prompts in all forms that callers of `LLM` give, and sampling parameters for each."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from operator import index
from typing import Any, NamedTuple, TypedDict

from hasten.core.errors import InvalidRequestError
from hasten.core.text import require_utf8
from hasten.core.types import SamplingParams


class _Salted(TypedDict, total=False):
    cache_salt: str
    """The prefix cache's blocks of the prompt are shared with prompts of the same salt alone."""


class TextPrompt(_Salted):
    """A prompt as text, in vLLM's form."""

    prompt: str


class _TokensPrompt(TypedDict):
    prompt_token_ids: Sequence[int]


class TokensPrompt(_TokensPrompt, _Salted, total=False):
    """A prompt as token ids, in vLLM's form; the text that they stand for is passed on with the output."""

    prompt: str


Prompt = str | Sequence[int] | TextPrompt | TokensPrompt
_ACCEPTED = "a text, a list of token ids, or a dict with 'prompt' or 'prompt_token_ids'"


@dataclass(frozen=True)
class ParsedPrompt:
    """One prompt: its text, its token ids, or both."""

    where: str
    """What messages call it."""
    text: str | None
    token_ids: tuple[int, ...] | None
    cache_salt: str = ""


class GivenPrompt(NamedTuple):
    """One prompt as the caller gave it."""

    where: str
    """What messages call it."""
    given: Any

    def parsed(self) -> ParsedPrompt:
        """Its text or token ids; InvalidRequestError names one that is of no known form."""
        return _parsed(self.where, _listed(self.given))


def given_prompts(prompts: Prompt | Iterable[Prompt]) -> list[GivenPrompt]:
    """One prompt or several, as they were given; InvalidRequestError where they are neither."""
    given = _listed(prompts)
    if isinstance(given, str | Mapping):
        return [GivenPrompt("the prompt", given)]
    if not isinstance(given, Sequence) or isinstance(given, bytes | bytearray):
        raise InvalidRequestError(f"the prompt must be {_ACCEPTED}, or a list of those; got {_shown(given)}")
    # ids of one prompt, unless the first item is a prompt itself
    if given and not isinstance(_listed(given[0]), str | Mapping | Sequence | None):
        return [GivenPrompt("the prompt", given)]
    return [GivenPrompt(f"prompts[{number}]", prompt) for number, prompt in enumerate(given)]


def parse_prompts(prompts: Prompt | Iterable[Prompt]) -> list[ParsedPrompt]:
    """One prompt or several; InvalidRequestError names the position of one that is of no known form."""
    return [prompt.parsed() for prompt in given_prompts(prompts)]


def _listed(given: Any) -> Any:
    """Arrays of numpy and torch as lists, iterators as lists, all else as it is."""
    if hasattr(given, "tolist"):
        return given.tolist()
    return list(given) if isinstance(given, Iterable) and hasattr(given, "__next__") else given


def _parsed(where: str, given: Any) -> ParsedPrompt:
    if isinstance(given, str):
        require_utf8(where, given)
        return ParsedPrompt(where, given, None)
    if isinstance(given, Mapping):
        return _from_mapping(where, given)
    if not isinstance(given, Sequence) or isinstance(given, bytes | bytearray):
        raise InvalidRequestError(f"{where} must be {_ACCEPTED}; got {_shown(given)}")
    return ParsedPrompt(where, None, _token_ids(where, given))


def _from_mapping(where: str, given: Mapping[Any, Any]) -> ParsedPrompt:
    unknown = [key for key in given if key not in ("prompt", "prompt_token_ids", "cache_salt")]
    if unknown:
        raise InvalidRequestError(f"{where} has {unknown[0]!r:.80}, which is not supported; give {_ACCEPTED}")
    text, ids = given.get("prompt"), _listed(given.get("prompt_token_ids"))
    if text is None and ids is None:
        raise InvalidRequestError(f"{where} has neither 'prompt' nor 'prompt_token_ids'; give {_ACCEPTED}")
    if text is not None:
        if not isinstance(text, str):
            raise InvalidRequestError(f"{where}['prompt'] must be a text, got {_shown(text)}")
        require_utf8(f"{where}['prompt']", text)
    salt = given.get("cache_salt", "")
    if not isinstance(salt, str):
        raise InvalidRequestError(f"{where}['cache_salt'] must be a text, got {_shown(salt)}")
    require_utf8(f"{where}['cache_salt']", salt)
    if ids is None:
        return ParsedPrompt(where, text, None, salt)
    where_ids = f"{where}['prompt_token_ids']"
    if not isinstance(ids, Sequence) or isinstance(ids, str | bytes | bytearray):
        raise InvalidRequestError(f"{where_ids} must be a list of token ids, got {_shown(ids)}")
    return ParsedPrompt(where, text, _token_ids(where_ids, ids), salt)


def _token_ids(where: str, ids: Sequence[Any]) -> tuple[int, ...]:
    if set(map(type, ids)) <= {int}:  # much faster than one by one
        return tuple(ids)
    checked = []
    for position, token in enumerate(ids):
        number = token.tolist() if hasattr(token, "tolist") else token
        if isinstance(number, bool) or not isinstance(number, Integral):
            raise InvalidRequestError(f"{where} has {_shown(token)} at position {position}, which is not a token id")
        checked.append(index(number))
    return tuple(checked)


def _shown(value: object) -> str:
    """A value in a message: itself where it is short, else its kind."""
    text = repr(value)
    return text if len(text) <= 60 and "\n" not in text else f"a value of type {type(value).__name__}"


def params_for_each(
    count: int, params: SamplingParams | Sequence[SamplingParams | None] | None, default: SamplingParams
) -> list[SamplingParams]:
    """Sampling parameters for each of `count` prompts, from those for all or for each; None stands for `default`."""
    if params is None or isinstance(params, SamplingParams):
        return [params or default] * count
    if not isinstance(params, list | tuple):
        raise InvalidRequestError(f"sampling_params must be SamplingParams or a list of them, got {_shown(params)}")
    if len(params) != count:
        raise InvalidRequestError(f"{count} prompts, but {len(params)} sampling parameters; give one, or one for each")
    for number, each in enumerate(params):
        if each is not None and not isinstance(each, SamplingParams):
            raise InvalidRequestError(f"sampling_params[{number}] must be SamplingParams, got {_shown(each)}")
    return [each or default for each in params]
