"""`clean_up_tokenization_spaces` of a tokenizer: decoded text without spaces before punctuation and contractions."""

from typing import Protocol

_REPLACEMENTS = (
    (" .", "."),
    (" ?", "?"),
    (" !", "!"),
    (" ,", ","),
    (" ' ", "'"),
    (" n't", "n't"),
    (" 'm", "'m"),
    (" 's", "'s"),
    (" 've", "'ve"),
    (" 're", "'re"),
)
"""In the order of transformers: what one leaves may match a later one. All begin with a space; one ends with one."""
_LONGEST = max(len(spaced) for spaced, _ in _REPLACEMENTS)
_OPEN = (" '", " n")
"""What may be part of a match that goes on behind the next space: of `" ' "`, and of the `" n't"` that it may leave."""


def cleaned(text: str) -> str:
    """A text after all replacements."""
    for spaced, joined in _REPLACEMENTS:
        text = text.replace(spaced, joined)
    return text


def _certain(text: str) -> int:
    """Characters at the beginning of a text that are cleaned alike whatever follows."""
    space = text.rfind(" ")
    if space < 0 or len(text) - space >= _LONGEST:
        return len(text)
    while space > 0 and (text[space - 1] == " " or text.endswith(_OPEN, 0, space)):
        space = text.rfind(" ", 0, space)
    return space


class Stream(Protocol):
    """Text that grows with its tokens."""

    def add(self, token_id: int) -> str:
        """The text that this token adds for certain."""

    @property
    def tentative(self) -> str:
        """What would follow if this token were the last one, where that is known before it is certain."""

    def flush(self) -> str:
        """What is held back, as it is decoded where no further token comes."""


class CleanedStream:
    """A stream whose text is that of another one, cleaned; it holds back what the next characters may change."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self._held = ""

    def add(self, token_id: int) -> str:
        """The text that this token adds for certain."""
        text = self._held + self._stream.add(token_id)
        certain = _certain(text)
        self._held = text[certain:]
        return cleaned(text[:certain])

    @property
    def tentative(self) -> str:
        """What follows if no further token comes."""
        return cleaned(self._held + self._stream.tentative)

    def flush(self) -> str:
        """What is held back, as it is decoded where no further token comes."""
        return cleaned(self._held + self._stream.flush())
