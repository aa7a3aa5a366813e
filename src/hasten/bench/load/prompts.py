"""Prompts of given lengths: random token ids, or texts of words that are one token each."""

import random
from collections.abc import Sequence
from functools import cached_property

from hasten.bench.workloads import random_prompt
from hasten.core.errors import ConfigError
from hasten.engine.text import Tokenizer

_SAMPLED_TOKENS, _MOST_WORDS = 20_000, 2000
_SHORTEST_WORD = 2
_FIRST = "a"
"""The first word of each text; without a space before it, other words may be several tokens."""


class PromptWriter:
    """A source of random prompts for one model, known by its tokenizer or by the size of its vocabulary alone."""

    def __init__(self, tokenizer: Tokenizer | None, vocab_size: int | None = None) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size or (tokenizer.vocab_size if tokenizer is not None else None)

    @property
    def has_tokenizer(self) -> bool:
        """Whether texts can be written and counted."""
        return self._tokenizer is not None

    def ids(self, length: int, rng: random.Random) -> list[int]:
        """Token ids; ConfigError where the vocabulary is not known."""
        if self._vocab_size is None:
            raise ConfigError("random prompts need --tokenizer, or --vocab-size for the API openai")
        return random_prompt(length, self._vocab_size, rng)

    def text(self, length: int, rng: random.Random) -> str:
        """A text of `length` tokens, or the nearest number that its words allow; ConfigError without a tokenizer.

        Equal states of `rng` give texts of which the shorter is the beginning of the longer.
        """
        words = [_FIRST, *(rng.choice(self._words) for _ in range(length - 1))]
        while len(words) > 1 and self.count(" ".join(words)) > length:
            words.pop()
        text = " ".join(words)
        missing = length - self.count(text)
        return text + f" {_FIRST}" * missing

    def count(self, text: str) -> int:
        """The tokens of a text, without special ones; ConfigError without a tokenizer."""
        return self.counts([text])[0]

    def counts(self, texts: Sequence[str]) -> list[int]:
        """The tokens of each text."""
        if self._tokenizer is None:
            raise ConfigError("prompts that are texts need --tokenizer: a folder, or a Hugging Face id")
        return [len(ids) for ids in self._tokenizer.encode_batch(texts, add_special_tokens=False)]

    @cached_property
    def _words(self) -> list[str]:
        """Words that add one token to a text that they are appended to with a space."""
        tokenizer = self._tokenizer
        base = self.count(_FIRST)
        assert tokenizer is not None
        size = tokenizer.vocab_size
        sample = random.Random(0).sample(range(size), min(size, _SAMPLED_TOKENS))
        words = {tokenizer.decode([token]).strip() for token in sample}
        candidates = sorted(word for word in words if word.isalpha() and len(word) >= _SHORTEST_WORD)
        counts = self.counts([f"{_FIRST} {word}" for word in candidates])
        single = [word for word, count in zip(candidates, counts, strict=True) if count == base + 1]
        return single[:_MOST_WORDS] or candidates or [_FIRST]
