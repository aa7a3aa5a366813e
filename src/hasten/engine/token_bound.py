"""How few tokens a text can have, from its bytes alone: to refuse one that is too long without tokenizing it."""

import json
from collections.abc import Iterable, Mapping
from typing import Any

from tokenizers import Tokenizer as FastTokenizer

_NORMAL_FORMS = ("NFC", "NFD", "NFKC", "NFKD")
_NORMAL_FORM_FACTOR = 6
"""More bytes than these forms make one of: a bold letter of mathematics has 4 and its plain form 1."""
_KEEPING = ("ByteLevel", "Metaspace", "Digits", "Punctuation", "Split")
"""Pre-tokenizers that remove nothing, but for Split and Punctuation if so configured."""


def most_bytes_per_token(fast: FastTokenizer) -> int | None:
    """How many bytes of text one token may stand for; None where any number may.

    It is any number where something can be removed from the text (by a normalizer, a pre-tokenizer, or a token that
    takes the spaces around it), or one token can stand for a run of unknown characters.
    """
    described = json.loads(fast.to_str())
    factor = _shrinks_by(described["normalizer"])
    added = described["added_tokens"] or []
    if factor is None or any(token["lstrip"] or token["rstrip"] for token in added):
        return None
    pre_tokenizers = list(_parts(described["pre_tokenizer"], "pretokenizers"))
    if not all(map(_keeps_all, pre_tokenizers)):
        return None
    vocabulary = fast.get_vocab(with_added_tokens=False)
    parts = [*pre_tokenizers, *_parts(described["normalizer"], "normalizers")]
    if any(part["type"] == "ByteLevel" for part in parts):
        from tokenizers.pre_tokenizers import ByteLevel

        if described["model"]["type"] != "BPE" or not vocabulary.keys() >= set(ByteLevel.alphabet()):
            return None
        longest = max(map(len, vocabulary))  # one character for each byte
    else:
        every_byte = {f"<0x{byte:02X}>" for byte in range(256)}
        if not described["model"].get("byte_fallback") or not vocabulary.keys() >= every_byte:
            return None
        longest = max(len(token.encode()) for token in vocabulary)
    return factor * max([longest, *(len(token["content"].encode()) for token in added)])


def _parts(described: Mapping[str, Any] | None, member: str) -> Iterable[Mapping[str, Any]]:
    """What a sequence is made of, or the only one itself."""
    if described is None:
        return
    if described["type"] != "Sequence":
        yield described
        return
    for part in described[member]:
        yield from _parts(part, member)


def _shrinks_by(normalizer: Mapping[str, Any] | None) -> int | None:
    """Of how many bytes it makes one, at most; None where there is no limit."""
    factor = 1
    for part in _parts(normalizer, "normalizers"):
        kind = part["type"]
        if kind in _NORMAL_FORMS:
            factor *= _NORMAL_FORM_FACTOR
        elif kind == "Replace" and "String" in part["pattern"] and part["content"]:
            factor *= -(-len(part["pattern"]["String"].encode()) // len(part["content"].encode())) or 1
        elif kind not in ("Prepend", "ByteLevel"):
            return None
    return factor


def _keeps_all(pre_tokenizer: Mapping[str, Any]) -> bool:
    return pre_tokenizer["type"] in _KEEPING and pre_tokenizer.get("behavior") != "Removed"
