"""A bound on the bytes of a token: no text has fewer tokens than it says, and where there is none it says so."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as FastTokenizer

from hasten.engine.text import TextTooLongError, Tokenizer
from hasten.engine.token_bound import most_bytes_per_token

DEMO = Path(__file__).parents[2] / "examples" / "demo-model"
BYTES = {f"<0x{byte:02X}>": byte for byte in range(256)}


def byte_level(**changes: Any) -> FastTokenizer:
    """A BPE of bytes with one long token, and whatever else is asked for."""
    vocabulary = {letter: index for index, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    vocabulary |= {"ab": 256, "abab": 257}
    result = FastTokenizer(models.BPE(vocabulary, [("a", "b"), ("ab", "ab")]))
    result.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    result.decoder = decoders.ByteLevel()
    for name, value in changes.items():
        setattr(result, name, value)
    return result


def byte_fallback(vocabulary: dict[str, int] | None = None) -> FastTokenizer:
    return FastTokenizer(models.BPE(vocabulary or BYTES | {"▁": 256}, [], byte_fallback=True, unk_token=None))


def with_token(token: AddedToken) -> FastTokenizer:
    result = byte_level()
    result.add_tokens([token])
    return result


SEQUENCE = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
BOUNDS = {
    "bytes": (byte_level(), 4),
    "added token": (with_token(AddedToken("<|long token|>")), 14),
    "fallback": (byte_fallback(), 6),
    "normal form": (byte_level(normalizer=normalizers.NFKC()), 24),
    "replaced": (byte_level(normalizer=normalizers.Replace("ab  ", "c")), 16),
    "sequence": (byte_level(normalizer=SEQUENCE), 4),
    "token that takes spaces": (with_token(AddedToken("<mask>", lstrip=True)), None),
    "stripped": (byte_level(normalizer=normalizers.Strip()), None),
    "removed": (byte_level(normalizer=normalizers.Replace("x", "")), None),
    "removed by an expression": (byte_level(normalizer=normalizers.Replace(Regex("x+"), "x")), None),
    "accents": (byte_level(normalizer=normalizers.Sequence([normalizers.NFD(), normalizers.StripAccents()])), None),
    "split": (byte_level(pre_tokenizer=pre_tokenizers.Split(" ", "removed")), None),
    "words": (byte_level(pre_tokenizer=pre_tokenizers.Whitespace()), None),
    "unknown bytes": (byte_fallback({"<0x41>": 0}), None),
    "unknown words": (FastTokenizer(models.WordLevel({"a": 0, "?": 1}, unk_token="?")), None),
}


@pytest.mark.parametrize("name", BOUNDS)
def test_the_bound(name: str) -> None:
    fast, bound = BOUNDS[name]
    assert most_bytes_per_token(fast) == bound


PIECES = (
    "ab",
    "abab",
    " ",
    "  ",
    "<mask>",
    "<|long token|>",
    "é",
    "e\u0301",
    "\uff21",
    "\U0001d42e\u0308\u0304",
    "漢",
    "한",
    "ab  ",
    "x",
)


@pytest.mark.parametrize("name", [name for name, (_, bound) in BOUNDS.items() if bound is not None])
def test_no_text_has_fewer_tokens(name: str) -> None:
    fast, bound = BOUNDS[name]
    assert bound is not None
    draw = random.Random(name)
    for _ in range(300):
        text = "".join(draw.choices(PIECES, k=draw.randint(1, 40)))
        assert len(fast.encode(text).ids) * bound >= len(text.encode()), text


def test_what_must_be_too_long_is_not_tokenized(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = Tokenizer.from_folder(DEMO)
    most = tokenizer.most_bytes_per_token
    assert most is not None
    assert tokenizer.encode_batch(["a" * 50], most_tokens=50) == [tokenizer.encode("a" * 50)]
    with pytest.raises(TextTooLongError, match="the prompt has 10 tokens, the limit is 9"):
        tokenizer.encode_batch(["Q" * 10], most_tokens=9)
    monkeypatch.setattr(Tokenizer, "_fast", None)
    with pytest.raises(TextTooLongError, match="the prompt has at least 101 tokens, the limit is 100"):
        tokenizer.encode_batch(["a", "a" * (100 * most + 1)], most_tokens=100)


def test_ids_are_those_of_the_library() -> None:
    fast = FastTokenizer.from_file(str(DEMO / "tokenizer.json"))
    tokenizer = Tokenizer.from_folder(DEMO)
    for text in ("", "Anna", " a  b\n", json.dumps({"é": "漢"})):
        assert tokenizer.encode(text) == fast.encode(text).ids
