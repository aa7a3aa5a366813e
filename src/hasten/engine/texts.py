"""Texts, token ids and pairs that callers of `LLM` give for vectors or scores, with their prompts."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from hasten.core.errors import InvalidRequestError
from hasten.core.model_config import TextConfig
from hasten.core.text import require_utf8
from hasten.core.types import PoolingParams, Request
from hasten.engine.fill_mask import masks_of
from hasten.engine.prompts import GivenPrompt, ParsedPrompt
from hasten.engine.text import Tokenizer, Tokens

_TOKENIZED_TOGETHER = 256
"""Texts: the tokenizer's threads share them out, and a GPU has them computed sooner than the next are ready."""


@dataclass(frozen=True)
class Instruction:
    """What stands before texts, as sentence-transformers' prompts do."""

    text: str = ""
    counts: bool = True
    """Whether a vector is made of it too."""


def instruction(config: TextConfig, prompt: str | None, prompt_name: str | None) -> Instruction:
    """The text given, or the model's own under a name, or its default; InvalidRequestError where there is none."""
    if prompt is not None:
        if prompt_name is not None:
            raise InvalidRequestError("prompt and prompt_name both say what stands before the texts; give one of them")
        if not isinstance(prompt, str):
            raise InvalidRequestError(f"prompt must be a text, got {prompt!r:.80}")
        require_utf8("prompt", prompt)
        return Instruction(prompt, config.include_prompt)
    name = config.default_prompt if prompt_name is None else prompt_name
    if name is None:
        return Instruction()
    if name not in config.prompts:
        known = ", ".join(config.prompts) or "none"
        raise InvalidRequestError(f"prompt_name {name!r:.80} is no prompt of the model; there are: {known}")
    return Instruction(config.prompts[name], config.include_prompt)


class TextRequests:
    """Makes requests of texts, for one model."""

    def __init__(self, config: TextConfig, tokenizer: Tokenizer | None, longest: int, first_id: int = 0) -> None:
        """`longest`: most tokens of a text. `first_id`: what the ids of requests count from."""
        self._first_id = first_id
        self._config = config
        self._tokenizer = tokenizer
        self._longest = longest

    def of_prompts(
        self, prompts: Sequence[GivenPrompt], params: PoolingParams, before: Instruction
    ) -> Iterator[tuple[str, Request]]:
        """A request of each text or list of token ids, with what messages call it, as they are wanted.

        InvalidRequestError names a prompt that is of no known form when its turn comes.
        """
        for start, stop in _groups(len(prompts)):
            parsed = [prompt.parsed() for prompt in prompts[start:stop]]
            plain = [prompt.text for prompt in parsed if prompt.token_ids is None and prompt.text is not None]
            encoded = iter(self._encoded([before.text + text for text in plain], params))
            skipped = self._length(before.text) if plain and before.text and not before.counts else 0
            for number, prompt in enumerate(parsed, start):
                tokens = next(encoded) if prompt.token_ids is None else Tokens(prompt.token_ids, ())
                yield prompt.where, self._of_prompt(number, prompt, tokens, params, skipped)

    def _of_prompt(
        self, number: int, prompt: ParsedPrompt, tokens: Tokens, params: PoolingParams, skipped: int
    ) -> Request:
        found = self._request(number, tokens, params, prompt.text, 0 if prompt.token_ids else skipped)
        if params.task != "fill_mask":
            return found
        return replace(found, masks=masks_of(self._tokenizer, found.prompt_token_ids))

    def of_pairs(self, pairs: Sequence[tuple[str, str]], params: PoolingParams) -> Iterator[tuple[str, Request]]:
        """A request of each pair of texts, which the tokenizer's own means distinguish, as they are wanted."""
        for start, stop in _groups(len(pairs)):
            for number, tokens in enumerate(self._encoded(pairs[start:stop], params), start):
                yield f"pair {number}", self._request(number, tokens, params, None, 0)

    def _request(self, number: int, tokens: Tokens, params: PoolingParams, text: str | None, skipped: int) -> Request:
        types = tuple(tokens.type_ids) if any(tokens.type_ids) else ()
        return Request(
            request_id=str(self._first_id + number),
            prompt_token_ids=tuple(tokens.ids),
            pooling=params,
            prompt=text,
            token_type_ids=types,
            skipped_tokens=skipped,
        )

    def _encoded(self, texts: Sequence[str | tuple[str, str]], params: PoolingParams) -> list[Tokens]:
        if not texts:
            return []
        if self._tokenizer is None:
            raise InvalidRequestError("the model's folder has no tokenizer; give token ids, or name one (tokenizer)")
        if self._config.lowercase:
            texts = [text.lower() if isinstance(text, str) else (text[0].lower(), text[1].lower()) for text in texts]
        most = params.truncate_prompt_tokens
        limit = None if most is None else self._longest if most == -1 else min(most, self._longest)
        return self._tokenizer.encode_texts(texts, most_tokens=limit)

    def _length(self, before: str) -> int:
        """Tokens at the beginning of a text that an instruction takes, with what begins every text."""
        assert self._tokenizer is not None
        text = before.lower() if self._config.lowercase else before
        (tokens,) = self._tokenizer.encode_texts([text])
        plain = self._tokenizer.encode(text, add_special_tokens=False)
        ending = len(tokens.ids) - len(plain) - _common(tokens.ids, plain)
        return len(tokens.ids) - max(0, ending)


def _groups(count: int) -> Iterator[tuple[int, int]]:
    """Where groups of texts that are tokenized together begin and end."""
    return ((start, min(start + _TOKENIZED_TOGETHER, count)) for start in range(0, count, _TOKENIZED_TOGETHER))


def _common(whole: Sequence[int], part: Sequence[int]) -> int:
    """Where `part` begins in `whole`."""
    count = len(part)
    return next((at for at in range(len(whole) - count + 1) if list(whole[at : at + count]) == list(part)), 0)


def text_pairs(queries: str | Sequence[str], documents: str | Sequence[str]) -> list[tuple[str, str]]:
    """A query with each document, or as many queries as documents, pair by pair; InvalidRequestError for others."""
    first, second = (_texts(name, given) for name, given in (("queries", queries), ("documents", documents)))
    if len(first) == 1:
        first *= len(second)
    if len(first) != len(second):
        raise InvalidRequestError(f"{len(first)} queries, but {len(second)} documents; give one query, or one for each")
    return list(zip(first, second, strict=True))


def _texts(name: str, given: str | Sequence[str]) -> list[str]:
    if isinstance(given, str):
        given = [given]
    if not isinstance(given, Sequence) or isinstance(given, Mapping | bytes):
        raise InvalidRequestError(f"{name} must be a text or a list of texts, got {given!r:.80}")
    for number, text in enumerate(given):
        if not isinstance(text, str):
            raise InvalidRequestError(f"{name}[{number}] must be a text, got {text!r:.80}")
        require_utf8(f"{name}[{number}]", text)
    return list(given)
