"""Text at both ends: the tokenizer, and text that grows token by token, with its stop words."""

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from tokenizers import Tokenizer as FastTokenizer

from hasten.core.text import require_utf8
from hasten.core.types import SamplingParams
from hasten.engine import tokenizer_files


class Tokenizer:
    """A Hugging Face tokenizer, read without transformers where the folder has a tokenizer.json."""

    def __init__(self, fast: FastTokenizer) -> None:
        self._fast = fast
        fast.no_padding()
        fast.no_truncation()

    @classmethod
    def from_folder(cls, path: str | Path) -> "Tokenizer":
        """Load from a folder, or from a tokenizer.json; CheckpointError names what is missing or wrong."""
        return cls(tokenizer_files.load(Path(path)))

    @property
    def vocab_size(self) -> int:
        """Tokens it knows, added ones included."""
        return int(self._fast.get_vocab_size(with_added_tokens=True))

    def to_json(self) -> str:
        """The text of its tokenizer.json."""
        return str(self._fast.to_str())

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text; InvalidRequestError where it is not UTF-8."""
        with _utf8(text):
            ids: list[int] = self._fast.encode(text, add_special_tokens=add_special_tokens).ids
        return ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, several at a time."""
        with _utf8(*texts):
            return [encoding.ids for encoding in self._fast.encode_batch(list(texts))]

    def encode_pair(self, first: str, second: str) -> tuple[list[int], list[int]]:
        """Token ids of two texts that belong together, told apart by the tokenizer's own type ids."""
        with _utf8(first, second):
            encoding = self._fast.encode(first, second)
        pairs = list(zip(encoding.ids, encoding.type_ids, strict=True))
        return [token for token, kind in pairs if kind == 0], [token for token, kind in pairs if kind == 1]

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Text of token ids."""
        text: str = self._fast.decode(list(ids), skip_special_tokens=skip_special_tokens)
        return text

    def stream(self, *, skip_special_tokens: bool = True) -> "TokenStream":
        """Text of tokens that come one by one."""
        return TokenStream(self, skip_special_tokens=skip_special_tokens)

    def words_ids(self, word: str) -> list[list[int]]:
        """The runs of tokens that `word` may appear as: at the start of a text and after a space."""
        runs = [self.encode(text, add_special_tokens=False) for text in (word, " " + word.lstrip())]
        return [run for place, run in enumerate(runs) if run and run not in runs[:place]]


@contextmanager
def _utf8(*texts: str) -> Iterator[None]:
    """Say what is wrong with texts that are no UTF-8: the tokenizers library raises a TypeError that does not."""
    try:
        yield
    except TypeError:
        for text in texts:
            require_utf8("the text", text)
        raise


_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"
_WINDOW = 8
"""Tokens decoded together at least before a stream lets the oldest go."""


class TokenStream:
    """Text that grows with its tokens; characters whose bytes are not complete wait.

    It decodes a window of the last tokens anew for each one: their text depends on their neighbours. What it gave
    never changes, bytes that are no text come as replacement characters once that is certain, and it never raises
    (the tokenizers library's own stream holds text back behind such bytes and takes quadratic time over them).
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special_tokens: bool) -> None:
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._ids: list[int] = []
        self._given = 0
        """Characters of the window's text that are given already."""

    def add(self, token_id: int) -> str:
        """The text that this token adds; empty while a character is incomplete."""
        self._ids.append(token_id)
        text = self._decode(self._ids)
        new = text[self._given :].rstrip(_INCOMPLETE)
        self._given += len(new)
        if len(self._ids) <= _WINDOW:
            return new
        if not new and not self._decode([token_id]):
            self._ids.pop()  # a special token that is skipped; a run of them would fill the window
        return new + self._shorten(text)

    def _shorten(self, text: str) -> str:
        """Let the oldest tokens go where that leaves the rest's text as it is; what they still owe is given."""
        for keep in range(1, _WINDOW):
            rest = self._decode(self._ids[-keep:])
            if text.endswith(_INCOMPLETE):
                # An undecided character across the border would count once in the whole, but once on each side.
                fits = rest and self._decode(self._ids[:-keep]) + rest == text
            else:
                fits = rest and text.endswith(rest)
            if fits:
                owed = text[self._given : len(text) - len(rest)]
                self._given = max(0, self._given - (len(text) - len(rest)))
                self._ids = self._ids[-keep:]
                return owed
        return ""

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=self._skip)


class TextState:
    """The text of one completion: looks for stop strings and holds back what may yet become one."""

    def __init__(self, tokenizer: Tokenizer, params: SamplingParams) -> None:
        self._stream = tokenizer.stream(skip_special_tokens=params.skip_special_tokens)
        self._stop = params.stop
        self._include_stop = params.include_stop_str_in_output
        self._longest = max((len(word) for word in self._stop), default=0)
        self._text = ""
        hidden = 0 if self._include_stop else max((len(word) for word in params.stop_words_ids), default=0)
        self._lengths = deque([0], maxlen=max(1, hidden))
        """Lengths of the text before the tokens that a run to come may take back."""

    def add(self, token_id: int, *, look_for_stop: bool) -> str | None:
        """Take one more token; the stop string that it completes, if any, ends the text there."""
        new = self._stream.add(token_id)
        self._lengths.append(len(self._text) + len(new))
        begin = max(0, len(self._text) - self._longest + 1)
        self._text += new
        if not (new and look_for_stop and self._stop):
            return None
        found = [(place, word) for word in self._stop if (place := self._text.find(word, begin)) >= 0]
        if not found:
            return None
        place, word = min(found, key=lambda entry: (entry[0], -len(entry[1])))
        self._text = self._text[: place + len(word) if self._include_stop else place]
        return word

    @property
    def text(self) -> str:
        """All of it."""
        return self._text

    @property
    def settled(self) -> str:
        """The part that nothing to come can take back: no stop string, and no run of stop tokens."""
        return self._text[: max(0, min(self._lengths[0], len(self._text) - max(0, self._longest - 1)))]
