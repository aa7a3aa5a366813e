"""Grammars as they are written, and what llguidance compiles of them. Never imports torch or numpy."""

import hashlib
import json
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hasten.core.errors import InvalidRequestError
from hasten.core.types import SamplingParams

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

_STACK_BYTES = 512 << 20
"""Of the compiling thread, of which only those used become memory: the compiler recurses as deep as rules refer to each
other, and a grammar of the greatest length has been seen to need more than the usual 8 MiB, whose end would end the
process."""
_OUT_OF_FUEL = "lexer precomputation failed"
"""What the compiler says of expressions beyond its own limit, with advice for its callers."""
_OF_GBNF = "rules of Lark are written `name: ...`, not `name ::= ...`, and the first one is `start`"
_WHITESPACE = " "
"""At most this between JSON's marks: small models may never leave whitespace by themselves."""
_KINDS = ("json_schema", "regex", "grammar", "choice")


@dataclass(frozen=True)
class Vocabulary:
    """What llguidance must know of a tokenizer."""

    tokenizer_json: str
    size: int
    eos_token_ids: tuple[int, ...]

    def load(self) -> "LLTokenizer":
        """As llguidance's own object; InvalidRequestError where it cannot be used."""
        from llguidance import LLTokenizer

        try:
            return LLTokenizer(self.tokenizer_json, self.size, list(self.eos_token_ids))
        except ValueError as error:
            raise InvalidRequestError(f"the tokenizer cannot be used for constrained output: {error}") from error


@dataclass(frozen=True)
class GrammarText:
    """A grammar as it was written."""

    kind: str
    text: str

    @classmethod
    def of(cls, params: SamplingParams) -> "GrammarText | None":
        """What constrains the output; None where nothing does."""
        kind = next((kind for kind in _KINDS if getattr(params, kind)), None)
        if kind is None:
            return None
        given = getattr(params, kind)
        return cls(kind, given if isinstance(given, str) else json.dumps(given))

    @property
    def key(self) -> tuple[str, bytes]:
        """Equal grammars have equal ones."""
        return self.kind, hashlib.sha256(self.text.encode(errors="surrogatepass")).digest()

    def compile(self, vocabulary: "LLTokenizer") -> "LLMatcher":
        """A matcher at its start. InvalidRequestError where there is none. To be called where the stack is large."""
        from llguidance import LLMatcher, LLParserLimits

        limits = LLParserLimits(verbose_errors=False)
        try:
            matcher = LLMatcher(vocabulary, self._source(), log_level=0, limits=limits)
        except ValueError as error:
            raise InvalidRequestError(f"{self.kind} cannot be compiled: {one_line(str(error))}") from error
        if matcher.is_error():
            message = one_line(matcher.get_error())
            if _OUT_OF_FUEL in message:
                raise InvalidRequestError(f"{self.kind} is too expensive: its expressions have too many states")
            if self.kind == "grammar" and "::=" in self.text:
                message = f"{message}; {_OF_GBNF}"
            raise InvalidRequestError(f"{self.kind} cannot be compiled: {message}")
        begun = matcher.deep_copy()
        begun.compute_bitmask()
        if begun.is_error():  # a contradiction that shows only here
            raise InvalidRequestError(f"{self.kind} cannot be satisfied: {one_line(begun.get_error())}")
        return matcher

    def _source(self) -> str:
        """What llguidance compiles."""
        from llguidance import LLMatcher

        if self.kind == "json_schema":
            schema = "{}" if self.text == "true" else self.text  # options can be set only on an object
            return LLMatcher.grammar_from_json_schema(schema, overrides={"whitespace_pattern": _WHITESPACE})
        if self.kind == "regex":
            return LLMatcher.grammar_from_regex(self.text)
        if self.kind == "choice":  # one terminal: a rule may have 2000 alternatives, a terminal any number
            return "start: CHOICE\nCHOICE: " + " | ".join(json.dumps(choice) for choice in json.loads(self.text))
        return LLMatcher.grammar_from_lark(self.text)


def one_line(message: str) -> str:
    """The message without the parser's state, which follows it."""
    return " ".join(message.partition("\n<")[0].split())[:300]


def thread_with_large_stack(run: Callable[[], None]) -> threading.Thread:
    """A thread, started, on which any grammar can be compiled."""
    usual = threading.stack_size(_STACK_BYTES)
    try:
        thread = threading.Thread(target=run, name="compile-grammars", daemon=True)
        thread.start()
    finally:
        threading.stack_size(usual)
    return thread
