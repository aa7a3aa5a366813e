"""Text of tokens that come one by one, equal to what the tokenizer decodes of all of them at once.

What a token adds depends on its neighbours in three ways, and no others that are in use: bytes of one character may be
spread over tokens (byte-level tokenizers), a run of byte tokens is text only as a whole (byte fallback), and the first
token of a text may lose its space (Metaspace, WordPiece, Strip).
"""

import codecs
import json
from collections.abc import Sequence
from functools import cached_property

from tokenizers import Tokenizer as FastTokenizer
from tokenizers.models import BPE

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
_LONGEST_WINDOW = 64
"""Tokens without text that are decoded together with the next one."""
_PROBE = "a a b"
_MOST_CANDIDATES = 4096


class Detokenizer:
    """What streams need to know of a tokenizer's decoder."""

    def __init__(self, fast: FastTokenizer) -> None:
        self._fast = fast
        self._contents: dict[int, str | None] = {}
        self._anchored: dict[tuple[int, ...], int] = {}

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool, continues: bool = False) -> str:
        """Text of token ids; with `continues`, of tokens that follow others, whose first one keeps its space."""
        lead = self.anchor if continues else []
        text: str = self._fast.decode([*lead, *ids], skip_special_tokens=skip_special_tokens)
        return text[self.anchored_length() :] if lead else text

    def content(self, token: int) -> str | None:
        """What the vocabulary has for a token, None where it has none."""
        if token not in self._contents:
            self._contents[token] = self._fast.id_to_token(token)
        return self._contents[token]

    @cached_property
    def special(self) -> frozenset[str]:
        """Contents of special tokens."""
        added = self._fast.get_added_tokens_decoder().values()
        return frozenset(token.content for token in added if token.special)

    @cached_property
    def _kinds(self) -> list[str]:
        """Types of the decoders that follow each other."""
        if self._fast.decoder is None:
            return []
        alone = FastTokenizer(BPE())  # with its vocabulary, the JSON of a large tokenizer takes half a second
        alone.decoder = self._fast.decoder
        return _types(json.loads(alone.to_str())["decoder"])

    def token_bytes(self, *, skip_special_tokens: bool) -> "TokenBytes | None":
        """What each token adds to the bytes of a text; None where text is not those, one after the other."""
        return self._token_bytes[skip_special_tokens]

    @cached_property
    def _token_bytes(self) -> "dict[bool, TokenBytes | None]":
        if self._kinds != ["ByteLevel"]:
            return dict.fromkeys((False, True))
        return {skip: TokenBytes(self, skip_special_tokens=skip) for skip in (False, True)}

    @property
    def has_open_characters(self) -> bool:
        """Whether text may end within a character although other decoders act on it too."""
        return "ByteLevel" in self._kinds

    def fallback_byte(self, token: int) -> int | None:
        """The byte that a byte token of a tokenizer with byte fallback stands for."""
        content = self.content(token) if "ByteFallback" in self._kinds else None
        if content is None or len(content) != 6 or not (content.startswith("<0x") and content.endswith(">")):
            return None
        try:
            return int(content[3:5], 16)
        except ValueError:
            return None

    @cached_property
    def anchor(self) -> list[int]:
        """A token of plain text that, put before others, lets them be decoded as in the middle of a text; empty where
        the first token is decoded as any other.
        """
        probe = [token for token in self._fast.encode(_PROBE, add_special_tokens=False).ids if self._is_plain(token)]
        if all(self._text([token, token]) == 2 * self._text([token]) for token in probe):
            return []
        candidates = [*probe, *range(min(self._fast.get_vocab_size(), _MOST_CANDIDATES))]
        return next(([token] for token in candidates if self._is_plain(token) and self._stays(token)), [])

    def anchored_length(self, *tokens: int) -> int:
        """Characters of the anchor and at most one more token, which is shown."""
        if tokens not in self._anchored:
            self._anchored[tokens] = len(self._fast.decode([*self.anchor, *tokens], skip_special_tokens=False))
        return self._anchored[tokens]

    def _is_plain(self, token: int) -> bool:
        content = self.content(token)
        return content is not None and content not in self.special and self.fallback_byte(token) is None

    def _stays(self, token: int) -> bool:
        text = self._text([token])
        return bool(text) and REPLACEMENT not in text and self._text([token, token]).startswith(text)

    def _text(self, ids: list[int]) -> str:
        text: str = self._fast.decode(ids, skip_special_tokens=True)
        return text


def _types(decoder: object) -> list[str]:
    if not isinstance(decoder, dict):
        return []
    if decoder.get("type") == "Sequence":
        return [kind for part in decoder.get("decoders", ()) for kind in _types(part)]
    return [str(decoder.get("type"))]


class TokenBytes(dict[int, bytes]):
    """What each token of a byte-level vocabulary adds to the bytes of a text."""

    def __init__(self, detokenizer: Detokenizer, *, skip_special_tokens: bool) -> None:
        super().__init__()
        self._detokenizer, self._skip = detokenizer, skip_special_tokens

    def __missing__(self, token: int) -> bytes:
        content = self._detokenizer.content(token)
        is_shown = content is not None and not (self._skip and content in self._detokenizer.special)
        found = self[token] = _raw_bytes(content) if content is not None and is_shown else b""
        return found


class CompletingTokens(dict[int, bool]):
    """Whether each token may be the last one of any of some words in a text of bytes."""

    def __init__(self, words: Sequence[bytes], token_bytes: TokenBytes) -> None:
        super().__init__()
        self._words, self._bytes = words, token_bytes

    def __missing__(self, token: int) -> bool:
        own = self._bytes[token]
        beginnings = [own[:end] for end in range(1, len(own) + 1)]
        found = self[token] = any(word in own or word.endswith(tuple(beginnings)) for word in self._words)
        return found


class TokenStream:
    """Text that grows with its tokens, each in time that does not depend on how many came before.

    Concatenated, with `flush` at the end, it is what `Detokenizer.decode` gives for all of them. What was given never
    changes: a character whose bytes are not complete waits, and so does a run of byte tokens until it ends, since one
    wrong byte turns all of it into replacement characters.
    """

    def __init__(self, detokenizer: Detokenizer, *, skip_special_tokens: bool, continues: bool = False) -> None:
        self._detokenizer = detokenizer
        self._skip = skip_special_tokens
        self._bytes = detokenizer.token_bytes(skip_special_tokens=skip_special_tokens)
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        """Of the bytes, where text is nothing else."""
        self._lead = detokenizer.anchor if continues else []
        self._window: list[int] = []
        """The last token with text, and those after it."""
        self._given = detokenizer.anchored_length() if self._lead else 0
        """Characters of the text of lead and window that are given already."""
        self._run: _ByteRun | None = None

    def add(self, token_id: int) -> str:
        """The text that this token adds for certain."""
        if self._bytes is not None:
            return self._decoder.decode(self._bytes[token_id])
        content = self._detokenizer.content(token_id)
        if content is None or (self._skip and content in self._detokenizer.special):
            return ""  # as if it were not there: bytes around it belong together
        self._window.append(token_id)
        byte = self._detokenizer.fallback_byte(token_id)
        if byte is not None:
            self._add_byte(byte)
            return ""
        self._run = None
        text = self._decode()
        short = len(self._window) <= _LONGEST_WINDOW
        if short and self._detokenizer.has_open_characters and text.endswith(REPLACEMENT):
            return ""
        new = text[self._given :]
        if new or not short:
            self._lead, self._window = self._detokenizer.anchor, [token_id]
            self._given = self._detokenizer.anchored_length(token_id)
        return new

    @property
    def tentative(self) -> str:
        """What a run of byte tokens says so far, where all its characters are complete; empty otherwise."""
        return "" if self._run is None else self._run.text

    def flush(self) -> str:
        """What is held back, as it is decoded where no further token comes."""
        if self._bytes is not None:
            return self._decoder.decode(b"", final=True)
        return self._decode()[self._given :]

    def _add_byte(self, byte: int) -> None:
        if self._run is None:
            self._run = _ByteRun()
        self._run.add(byte)
        if self._run.dropped is None and self._run.text:
            self._run.dropped = len(self._run.text) - len(self._decode()[self._given :])

    def _decode(self) -> str:
        ids = [*self._lead, *self._window]
        return self._detokenizer.decode(ids, skip_special_tokens=self._skip)


class _ByteRun:
    """Byte tokens that follow each other."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("strict")
        self._text = ""
        self._valid = True
        self._complete = False
        self.dropped: int | None = None
        """Characters that the decoder drops at the beginning, as of a text; None until a character is complete."""

    def add(self, byte: int) -> None:
        """Take one more byte."""
        if not self._valid:
            return
        try:
            self._text += self._decoder.decode(bytes([byte]))
        except UnicodeDecodeError:
            self._valid = False
        self._complete = not self._decoder.getstate()[0]

    @property
    def text(self) -> str:
        """Its characters where all are complete."""
        return self._text[self.dropped or 0 :] if self._valid and self._complete else ""


def _byte_alphabet() -> dict[str, int]:
    """The character that stands for each byte in byte-level vocabularies, as GPT-2 has them."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + index): byte for index, byte in enumerate(others)}


_ALPHABET = _byte_alphabet()


def _raw_bytes(content: str) -> bytes:
    """The bytes that a byte-level token stands for; of one with other characters, an added token, its own."""
    try:
        return bytes([_ALPHABET[character] for character in content])
    except KeyError:
        return content.encode()
