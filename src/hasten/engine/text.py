"""Text at both ends: the tokenizer, and text that grows token by token, with its stop words."""

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

from tokenizers import Tokenizer as FastTokenizer

from hasten.core.errors import InvalidRequestError
from hasten.core.text import require_utf8
from hasten.core.types import SamplingParams
from hasten.engine import tokenizer_files
from hasten.engine.cleanup import CleanedStream, Stream, cleaned
from hasten.engine.detokenizer import REPLACEMENT, CompletingTokens, Detokenizer, TokenBytes, TokenStream
from hasten.engine.token_bound import most_bytes_per_token

_PROMPT_END = 16
"""Tokens at the end of a prompt of which usually one has text."""

_MOST_COMPLETING = 16
"""Sets of stop strings of which it is kept which tokens may complete them."""
_MOST_BYTES = 4
"""Of a character."""
_ANCHORS, _FOLLOWER = ("\n", ".", "(", "-"), "a"
"""Texts that no token joins with what follows, and a text to see that with."""


class AddedToken(NamedTuple):
    """A token that a tokenizer's vocabulary got later than the others."""

    number: int
    special: bool
    """Whether it is left out of text where special tokens are."""


class Tokens(NamedTuple):
    """A text, or a pair of texts, as a model takes it."""

    ids: Sequence[int]
    type_ids: Sequence[int]


class _Files(NamedTuple):
    """What the files of a tokenizer say."""

    fast: FastTokenizer
    cleans_up: bool
    mask: str | None

    @classmethod
    def of(cls, folder: Path) -> "_Files":
        fast = tokenizer_files.load(folder)
        return cls(fast, tokenizer_files.cleans_up(folder, fast), tokenizer_files.mask_token(folder, fast))


class _Loaded(NamedTuple):
    """A tokenizer in memory."""

    files: _Files
    detokenizer: Detokenizer


def _parts(text: str | tuple[str, str]) -> tuple[str, ...]:
    return text if isinstance(text, tuple) else (text,)


class Tokenizer:
    """A Hugging Face tokenizer, read without transformers where the folder has a tokenizer.json.

    `cleans_up`: its text has no spaces before punctuation (`clean_up_tokenization_spaces`). `mask`: its token for a
    missing word.
    """

    def __init__(self, fast: FastTokenizer, *, cleans_up: bool = False, mask: str | None = None) -> None:
        self._begin(partial(_Files, fast, cleans_up, mask))
        self.load()

    @classmethod
    def from_folder(cls, path: str | Path) -> "Tokenizer":
        """Load from a folder, or from a tokenizer.json; CheckpointError names what is missing or wrong."""
        tokenizer = cls.deferred(path)
        tokenizer.load()
        return tokenizer

    @classmethod
    def deferred(cls, path: str | Path) -> "Tokenizer":
        """That of a folder, or of a tokenizer.json, read when it is first used: a large one takes a second.

        CheckpointError names what is missing; what is wrong with a file is found when it is read.
        """
        folder, tokenizer = Path(path), cls.__new__(cls)
        tokenizer_files.require(folder)
        tokenizer._begin(partial(_Files.of, folder))
        return tokenizer

    def _begin(self, read: "Callable[[], _Files]") -> None:
        self._read, self._lock = read, threading.Lock()

    def __getstate__(self) -> _Files:
        return self._all().files

    def __setstate__(self, files: _Files) -> None:
        self._begin(partial(_Files, *files))
        self.load()

    @property
    def is_loaded(self) -> bool:
        """Whether its files have been read."""
        return "_loaded" in vars(self)

    def load(self) -> None:
        """Read its files, unless that is done."""
        with self._lock:
            _ = self._loaded

    @cached_property
    def _loaded(self) -> "_Loaded":
        files = self._read()
        files.fast.no_padding()
        files.fast.no_truncation()
        return _Loaded(files, Detokenizer(files.fast))

    def _all(self) -> "_Loaded":
        if not self.is_loaded:
            self.load()
        return self._loaded

    @property
    def _fast(self) -> FastTokenizer:
        return self._all().files.fast

    @property
    def _detokenizer(self) -> Detokenizer:
        return self._all().detokenizer

    @property
    def _cleans_up(self) -> bool:
        return self._all().files.cleans_up

    @property
    def mask_token(self) -> str | None:
        """Its token for a missing word; None where it has none."""
        return self._all().files.mask

    @property
    def vocab_size(self) -> int:
        """Tokens it knows, added ones included."""
        return int(self._fast.get_vocab_size(with_added_tokens=True))

    @property
    def mask_token_id(self) -> int | None:
        """The id of its token for a missing word; None where it has none."""
        return None if self.mask_token is None else self.token_id(self.mask_token)

    def token_id(self, token: str) -> int | None:
        """The id of an entry of its vocabulary; None where there is no such entry."""
        found: int | None = self._fast.token_to_id(token)
        return found

    def to_json(self) -> str:
        """The text of its tokenizer.json."""
        return str(self._fast.to_str())

    @cached_property
    def added_tokens(self) -> dict[str, AddedToken]:
        """The tokens that were added to its vocabulary, by their text; special ones are among them."""
        return {token.content: AddedToken(number, token.special) for number, token in self._added()}

    def _added(self) -> Iterable[tuple[int, Any]]:
        return self._fast.get_added_tokens_decoder().items()

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text; InvalidRequestError where it is not UTF-8."""
        return self.encode_batch([text], add_special_tokens=add_special_tokens)[0]

    def encode_batch(
        self, texts: Sequence[str], *, add_special_tokens: bool = True, most_tokens: int | None = None
    ) -> list[list[int]]:
        """Token ids of each text; TextTooLongError where one has more than `most_tokens`.

        A text that cannot have so few is refused by its bytes. While it tokenizes, other threads go on.
        """
        if most_tokens is not None:
            for text in texts:
                self.check_length(len(text), most_tokens)
        with _utf8(*texts):
            # `encode` would hold Python's lock, and `encode_batch` find out where in the text each token is
            encodings = self._fast.encode_batch_fast(list(texts), add_special_tokens=add_special_tokens)
        for encoding in encodings:
            if most_tokens is not None and len(encoding) > most_tokens:
                raise TextTooLongError(len(encoding), most_tokens, exact=True)
        return [encoding.ids for encoding in encodings]

    @cached_property
    def most_bytes_per_token(self) -> int | None:
        """How many bytes of text a token may stand for; None where any number may."""
        return most_bytes_per_token(self._fast)

    def check_length(self, characters: int, most_tokens: int) -> None:
        """TextTooLongError where a text of this length in characters must have more tokens."""
        most = self.most_bytes_per_token
        least = 0 if most is None else -(-characters // most)
        if least > most_tokens:
            raise TextTooLongError(least, most_tokens, exact=False)

    def encode_pair(self, first: str, second: str) -> tuple[list[int], list[int]]:
        """Token ids of two texts that belong together, distinguished by the tokenizer's own type ids."""
        with _utf8(first, second):
            encoding = self._fast.encode(first, second)
        pairs = list(zip(encoding.ids, encoding.type_ids, strict=True))
        return [token for token, kind in pairs if kind == 0], [token for token, kind in pairs if kind == 1]

    def encode_texts(self, texts: Sequence[str | tuple[str, str]], *, most_tokens: int | None = None) -> list[Tokens]:
        """Token ids and types of each text or pair of texts, with what begins and ends them.

        With `most_tokens`, longer ones are cut: a pair at the end of its longer text. InvalidRequestError where a text
        is not UTF-8, or `most_tokens` leaves no room for the text itself.
        """
        with _utf8(*(part for text in texts for part in _parts(text))):
            encodings = self._fast.encode_batch_fast(list(texts))
        return [
            Tokens(encoding.ids, encoding.type_ids)
            if most_tokens is None or len(encoding) <= most_tokens
            else self._cut(_parts(text), most_tokens)
            for text, encoding in zip(texts, encodings, strict=True)
        ]

    def _cut(self, texts: tuple[str, ...], most_tokens: int) -> Tokens:
        parts = [self._fast.encode(text, add_special_tokens=False) for text in texts]
        room = most_tokens - self._fast.num_special_tokens_to_add(len(parts) == 2)
        if room < 1:
            raise InvalidRequestError(f"truncate_prompt_tokens is {most_tokens}, which leaves no token of the text")
        *shorter, longest = sorted(parts, key=len)
        for part in shorter:
            part.truncate(min(len(part), room // 2))
            room -= len(part)
        longest.truncate(room)
        encoding = self._fast.post_process(parts[0], parts[1] if len(parts) == 2 else None)
        return Tokens(encoding.ids, encoding.type_ids)

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True, continues: bool = False) -> str:
        """Text of token ids; with `continues`, of tokens that follow others, whose first one keeps its space."""
        text = self._detokenizer.decode(ids, skip_special_tokens=skip_special_tokens, continues=continues)
        return cleaned(text) if self._cleans_up else text

    def tokens(self, ids: Sequence[int]) -> list[str]:
        """What the vocabulary has for each id, empty where it has nothing: not yet text, `Ġhouse` or `<0x0A>`."""
        return [self._fast.id_to_token(token) or "" for token in ids]

    def continues(self, prompt: Sequence[int], *, skip_special_tokens: bool) -> bool:
        """Whether tokens that follow this prompt are decoded otherwise than at the beginning of a text."""
        if not self._detokenizer.anchor:
            return False
        end = self.decode(prompt[-_PROMPT_END:], skip_special_tokens=skip_special_tokens)
        return bool(end or self.decode(prompt, skip_special_tokens=skip_special_tokens))

    def stream(self, *, skip_special_tokens: bool = True, continues: bool = False) -> Stream:
        """Text of tokens that come one by one."""
        stream = TokenStream(self._detokenizer, skip_special_tokens=skip_special_tokens, continues=continues)
        return CleanedStream(stream) if self._cleans_up else stream

    def token_bytes(self, *, skip_special_tokens: bool) -> TokenBytes | None:
        """What each token adds to the bytes of a text; None where text is made otherwise."""
        return None if self._cleans_up else self._detokenizer.token_bytes(skip_special_tokens=skip_special_tokens)

    def completing_tokens(self, words: tuple[str, ...], *, skip_special_tokens: bool) -> CompletingTokens:
        """Which tokens may be the last ones of any of these words; for who has `token_bytes`."""
        return self._completing_tokens(words, skip_special_tokens)

    @cached_property
    def _completing_tokens(self) -> Callable[[tuple[str, ...], bool], CompletingTokens]:
        return lru_cache(_MOST_COMPLETING)(self._new_completing_tokens)

    def _new_completing_tokens(self, words: tuple[str, ...], skip_special_tokens: bool) -> CompletingTokens:
        token_bytes = self._detokenizer.token_bytes(skip_special_tokens=skip_special_tokens)
        assert token_bytes is not None
        return CompletingTokens([word.encode(errors="replace") for word in words], token_bytes)

    def words_ids(self, word: str) -> list[list[int]]:
        """The runs of tokens that `word` may appear as: as it is and after a space, in a text and at its start."""
        anchor, spaced = self._anchor, " " + word.lstrip()
        texts = [anchor + word, anchor + spaced]
        if anchor and not word.startswith(" "):
            texts.append(word)
        head = len(self.encode(anchor, add_special_tokens=False)) if anchor else 0
        encoded = self.encode_batch(texts, add_special_tokens=False)
        runs = [ids[head:] if text.startswith(anchor) else ids for text, ids in zip(texts, encoded, strict=True)]
        return [run for index, run in enumerate(runs) if run and run not in runs[:index]]

    @cached_property
    def _anchor(self) -> str:
        """A text after which others become the tokens that they are in the middle of a text; empty where they do so
        at its start as well. SentencePiece's tokenizers put a space before the first word.
        """
        for anchor in _ANCHORS:
            alone, followed, follower = self.encode_batch(
                (anchor, anchor + _FOLLOWER, _FOLLOWER), add_special_tokens=False
            )
            if followed[: len(alone)] == alone:
                return "" if followed[len(alone) :] == follower else anchor
        return ""


class TextTooLongError(InvalidRequestError):
    """A text that has more tokens than it may have."""

    def __init__(self, tokens: int, most_tokens: int, *, exact: bool) -> None:
        self.count = f"{'' if exact else 'at least '}{tokens}"
        """How many it has, in words."""
        super().__init__(f"the prompt has {self.count} tokens, the limit is {most_tokens}")


@contextmanager
def _utf8(*texts: str) -> Iterator[None]:
    """Say what is wrong with texts that are no UTF-8: the tokenizers library raises a TypeError that does not."""
    try:
        yield
    except TypeError:
        for text in texts:
            require_utf8("the text", text)
        raise


class _Constant(dict[int, bool]):
    """The same for all tokens."""

    def __init__(self, value: bool) -> None:
        super().__init__()
        self._value = value

    def __missing__(self, token: int) -> bool:
        return self._value


class TextState:
    """The text of one completion: looks for stop strings and holds back what may yet become one."""

    def __init__(self, tokenizer: Tokenizer, params: SamplingParams, *, continues: bool = False) -> None:
        self._stream = tokenizer.stream(skip_special_tokens=params.skip_special_tokens, continues=continues)
        self._stop = tuple(params.stop)
        self._bytes: TokenBytes | None = None
        self._completing: Mapping[int, bool] = _Constant(bool(self._stop))
        """Whether each token may be the last one of a stop string."""
        if self._stop and not any(REPLACEMENT in word for word in self._stop):
            self._bytes = tokenizer.token_bytes(skip_special_tokens=params.skip_special_tokens)
        if self._bytes is not None:
            self._completing = tokenizer.completing_tokens(self._stop, skip_special_tokens=params.skip_special_tokens)
        self._words = [word.encode(errors="replace") for word in self._stop]
        self._end = b""
        """At least those bytes at the end of the text that a stop string may begin in."""
        self._unread: list[int] = []
        """Tokens whose text nobody has needed yet; none of them ends it."""
        self._joined = 0
        """How many of them `_end` has."""
        self._include_stop = params.include_stop_str_in_output
        self._longest = max((len(word) for word in self._stop), default=0)
        self._most_bytes = _MOST_BYTES * self._longest
        self._text = ""
        hidden = 0 if self._include_stop else max((len(word) for word in params.stop_words_ids), default=0)
        self._lengths = deque([0], maxlen=max(1, hidden))
        """Lengths of the text before the tokens that a run to come may take back."""

    def add(self, token_id: int, *, look_for_stop: bool) -> str | None:
        """Take one more token; the stop string that it completes, if any, ends the text there."""
        self._unread.append(token_id)
        if not (self._completing[token_id] and look_for_stop and self._may_end()):
            return None
        self._unread.pop()
        self._read()
        new, before = self._stream.add(token_id), len(self._text)
        begin = max(0, before - self._longest + 1)
        self._take(new)
        tentative = self._stream.tentative  # the text would end with it if this were the last token
        if not (new or tentative):
            return None
        tail = self._text[begin:] + tentative
        firsts = ((word, max(0, before - begin - len(word) + 1)) for word in self._stop)
        found = [(start, word) for word, first in firsts if (start := tail.find(word, first)) >= 0]
        if not found:
            return None
        start, word = min(found, key=lambda entry: (entry[0], -len(entry[1])))
        self._text = self._text[:begin] + tail[: start + len(word) if self._include_stop else start]
        return word

    def _may_end(self) -> bool:
        """Whether a stop string may stand at the end of the text with the unread tokens."""
        if self._bytes is None:
            return True
        end = self._joined_end()
        return any(word in end for word in self._words)

    def _joined_end(self) -> bytes:
        """The bytes at the end of the text with all tokens so far."""
        assert self._bytes is not None
        more = b"".join([self._bytes[token] for token in self._unread[self._joined :]])
        end = self._end + more
        self._end, self._joined = end[-self._most_bytes :], len(self._unread)
        return end

    def _take(self, new: str) -> None:
        self._text += new
        self._lengths.append(len(self._text))

    def _read(self) -> None:
        if self._bytes is not None:
            self._joined_end()
        for token in self._unread:
            self._take(self._stream.add(token))
        self._unread.clear()
        self._joined = 0

    @property
    def text(self) -> str:
        """All of it."""
        self._read()
        return self._text

    @property
    def settled(self) -> str:
        """The part that nothing to come can take back: no stop string, and no run of stop tokens."""
        self._read()
        return self._text[: max(0, min(self._lengths[0], len(self._text) - max(0, self._longest - 1)))]
