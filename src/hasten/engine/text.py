"""Text at both ends: the tokenizer, and text that grows token by token, with its stop words."""

from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer as FastTokenizer
from tokenizers.decoders import DecodeStream

from hasten.core.errors import CheckpointError
from hasten.core.types import SamplingParams


class Tokenizer:
    """A Hugging Face tokenizer, read without transformers where the folder has a tokenizer.json."""

    def __init__(self, fast: FastTokenizer) -> None:
        self._fast = fast
        fast.no_padding()
        fast.no_truncation()

    @classmethod
    def from_folder(cls, path: str | Path) -> "Tokenizer":
        """Load from a folder, or from a tokenizer.json; CheckpointError where there is none to read."""
        path = Path(path)
        file = path / "tokenizer.json" if path.is_dir() else path
        if file.is_file():
            try:
                return cls(FastTokenizer.from_file(str(file)))
            except Exception as error:  # the library raises bare Exception for a malformed file
                raise CheckpointError(f"{file} cannot be read as a tokenizer: {error}") from error
        if not (path / "tokenizer_config.json").is_file():
            raise CheckpointError(f"{path} has no tokenizer.json; name the tokenizer's folder with --tokenizer-path")
        from transformers import AutoTokenizer  # takes seconds to import, and few folders need it

        loaded = AutoTokenizer.from_pretrained(path, local_files_only=True)
        return cls(loaded.backend_tokenizer)

    @property
    def vocab_size(self) -> int:
        """Tokens it knows, added ones included."""
        return int(self._fast.get_vocab_size(with_added_tokens=True))

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text."""
        ids: list[int] = self._fast.encode(text, add_special_tokens=add_special_tokens).ids
        return ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, several at a time."""
        return [encoding.ids for encoding in self._fast.encode_batch(list(texts))]

    def encode_pair(self, first: str, second: str) -> tuple[list[int], list[int]]:
        """Token ids of two texts that belong together, told apart by the tokenizer's own type ids."""
        encoding = self._fast.encode(first, second)
        pairs = list(zip(encoding.ids, encoding.type_ids, strict=True))
        return [token for token, kind in pairs if kind == 0], [token for token, kind in pairs if kind == 1]

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Text of token ids."""
        text: str = self._fast.decode(list(ids), skip_special_tokens=skip_special_tokens)
        return text

    def stream(self, *, skip_special_tokens: bool = True) -> "TokenStream":
        """Text of tokens that come one by one."""
        return TokenStream(self._fast, DecodeStream(skip_special_tokens=skip_special_tokens))

    def words_ids(self, word: str) -> list[list[int]]:
        """The runs of tokens that `word` may appear as: at the start of a text and after a space."""
        runs = [self.encode(text, add_special_tokens=False) for text in (word, " " + word.lstrip())]
        return [run for place, run in enumerate(runs) if run and run not in runs[:place]]


class TokenStream:
    """Text that grows with its tokens; characters whose bytes are not complete wait."""

    def __init__(self, fast: FastTokenizer, stream: DecodeStream) -> None:
        self._fast = fast
        self._stream = stream

    def add(self, token_id: int) -> str:
        """The text that this token adds; empty while a character is incomplete."""
        return self._stream.step(self._fast, token_id) or ""


class TextState:
    """The text of one completion: looks for stop strings and holds back what may yet become one."""

    def __init__(self, tokenizer: Tokenizer, params: SamplingParams) -> None:
        self._stream = tokenizer.stream(skip_special_tokens=params.skip_special_tokens)
        self._stop = params.stop
        self._include_stop = params.include_stop_str_in_output
        self._longest = max((len(word) for word in self._stop), default=0)
        self._text = ""

    def add(self, token_id: int, *, look_for_stop: bool) -> str | None:
        """Take one more token; the stop string that it completes, if any, ends the text there."""
        new = self._stream.add(token_id)
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
        """The part that no stop string to come can take back."""
        return self._text[: len(self._text) - self._longest + 1] if self._longest > 1 else self._text
