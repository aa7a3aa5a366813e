"""Output that keeps to a grammar: which tokens may come next. Never imports torch.

A grammar is compiled once, by llguidance, for the model's tokenizer; each sequence then has a state of its own, which
names the tokens that may follow and moves on with each token chosen. The end token is among them only where the text
so far is whole. llguidance is imported when the first grammar comes.
"""

import json
import threading
from collections import OrderedDict
from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from hasten.core.errors import InvalidRequestError
from hasten.core.extras import require_extra
from hasten.core.types import SamplingParams

if TYPE_CHECKING:
    from llguidance import LLExecutor, LLMatcher, LLTokenizer

    from hasten.engine.text import Tokenizer

_MOST_CHARACTERS = 64 * 1024
"""Longest grammar: compiling takes time that grows with its length, and no other request moves on meanwhile."""
_COMPILER_STACK = 512 * 1024 * 1024
"""Bytes, of which only those used become memory: the compiler recurses as deep as rules refer to each other, and a
grammar of the greatest length has been seen to need more than the usual 8 MiB, whose end would end the process."""
_KEPT = 64
"""Grammars that stay compiled."""
_WHITESPACE = " "
"""At most this between JSON's marks: small models may never leave whitespace by themselves."""
_KINDS = ("json_schema", "regex", "grammar", "choice")


class Constraint:
    """How far one sequence has come in its grammar."""

    def __init__(self, matcher: "LLMatcher", words: int) -> None:
        self.matcher = matcher
        self.words = words
        """Of 32 tokens each, in a mask of the vocabulary."""

    def fork(self) -> "Constraint":
        """The same state for a sibling."""
        return Constraint(self.matcher.deep_copy(), self.words)

    def accept(self, token: int) -> bool:
        """Move on by a token; whether the text is then whole and nothing may follow it."""
        self.matcher.consume_token(token)
        return self.error is None and self.matcher.is_stopped()

    @property
    def error(self) -> str | None:
        """Why the grammar cannot be followed any further."""
        return _one_line(self.matcher.get_error()) if self.matcher.is_error() else None


def allowed_next(constraints: Sequence[Constraint]) -> NDArray[np.int32]:
    """Which tokens may come next, [sequences, words]: bit i of word w stands for token 32 * w + i."""
    from llguidance.numpy import fill_next_token_bitmask_par

    masks = np.zeros((len(constraints), constraints[0].words), np.int32)
    matchers = [(constraint.matcher, row) for row, constraint in enumerate(constraints)]
    fill_next_token_bitmask_par(_executor(), matchers, masks)
    return masks


@cache
def _executor() -> "LLExecutor":
    from llguidance import LLExecutor

    return LLExecutor()


class GrammarCompiler:
    """Grammars for one model and its tokenizer; the latest stay compiled."""

    def __init__(self, tokenizer: "Tokenizer | None", vocab_size: int, eos_token_ids: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._eos_token_ids = list(eos_token_ids)
        self._vocabulary: LLTokenizer | None = None
        self._compiled: OrderedDict[tuple[str, str], LLMatcher] = OrderedDict()

    def start(self, params: SamplingParams) -> Constraint | None:
        """The state of a sequence without output, None where nothing constrains it.

        InvalidRequestError where its grammar cannot be compiled or there is no tokenizer that it can be applied to.
        """
        kind = next((kind for kind in _KINDS if getattr(params, kind)), None)
        if kind is None:
            return None
        given = getattr(params, kind)
        key = (kind, given if isinstance(given, str) else json.dumps(given))
        vocabulary = self._load_vocabulary()
        if key not in self._compiled:
            self._compiled[key] = _compiled(*key, vocabulary)
            if len(self._compiled) > _KEPT:
                self._compiled.popitem(last=False)
        self._compiled.move_to_end(key)
        return Constraint(self._compiled[key].deep_copy(), -(-vocabulary.vocab_size // 32))

    def _load_vocabulary(self) -> "LLTokenizer":
        require_extra("grammar", "output constrained by a schema, expression or grammar")
        from llguidance import LLTokenizer

        if self._vocabulary is None:
            if self._tokenizer is None:
                raise InvalidRequestError("constrained output needs a tokenizer; give --tokenizer-path")
            if not self._eos_token_ids:
                raise InvalidRequestError("constrained output needs an end token, and the model's config has none")
            size = max(self._vocab_size, self._tokenizer.vocab_size)
            try:
                self._vocabulary = LLTokenizer(self._tokenizer.to_json(), size, self._eos_token_ids)
            except ValueError as error:
                raise InvalidRequestError(f"the tokenizer cannot be used for constrained output: {error}") from error
        return self._vocabulary


def _compiled(kind: str, text: str, vocabulary: "LLTokenizer") -> "LLMatcher":
    """A matcher at its start; on a thread of its own, for the sake of its stack."""
    from llguidance import LLMatcher, LLParserLimits

    if len(text) > _MOST_CHARACTERS:
        raise InvalidRequestError(f"{kind} has {len(text)} characters, more than {_MOST_CHARACTERS}")
    made: list[LLMatcher | ValueError] = []

    def compile_() -> None:
        try:
            limits = LLParserLimits(verbose_errors=False)
            made.append(LLMatcher(vocabulary, _grammar(kind, text), log_level=0, limits=limits))
        except ValueError as error:
            made.append(error)

    usual = threading.stack_size(_COMPILER_STACK)
    try:
        thread = threading.Thread(target=compile_, name="compile-grammar")
        thread.start()
    finally:
        threading.stack_size(usual)
    thread.join()
    return _checked(kind, made[0])


def _checked(kind: str, made: "LLMatcher | ValueError") -> "LLMatcher":
    if isinstance(made, ValueError):
        raise InvalidRequestError(f"{kind} cannot be compiled: {_one_line(str(made))}")
    if made.is_error():
        raise InvalidRequestError(f"{kind} cannot be compiled: {_one_line(made.get_error())}")
    begun = made.deep_copy()
    begun.compute_bitmask()
    if begun.is_error():  # a contradiction that shows only here
        raise InvalidRequestError(f"{kind} cannot be satisfied: {_one_line(begun.get_error())}")
    return made


def _grammar(kind: str, text: str) -> str:
    """What llguidance compiles."""
    from llguidance import LLMatcher

    if kind == "json_schema":
        schema = "{}" if text == "true" else text  # options can be set only on an object
        return LLMatcher.grammar_from_json_schema(schema, overrides={"whitespace_pattern": _WHITESPACE})
    if kind == "regex":
        return LLMatcher.grammar_from_regex(text)
    if kind == "choice":
        return "start: " + " | ".join(json.dumps(choice) for choice in json.loads(text))
    return LLMatcher.grammar_from_lark(text)


def _one_line(message: str) -> str:
    """The message without the parser's state, which follows it."""
    return " ".join(message.partition("\n<")[0].split())[:300]
