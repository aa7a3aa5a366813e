"""Masks in texts and words for them, as tokens and as text. Imports no torch, so that servers can."""

from collections.abc import Sequence

from hasten.core.errors import InvalidRequestError
from hasten.core.text import require_utf8
from hasten.core.types import FilledMask
from hasten.engine.text import Tokenizer

MOST_TARGETS = 4096
"""Words of one request that masks are limited to."""


def no_mask(tokenizer: Tokenizer | None) -> str:
    """What is wrong with a text that has no mask."""
    if tokenizer is None:
        return "the text has no mask: without a tokenizer, no token is known to be one; give --tokenizer-path"
    if tokenizer.mask_token_id is None:
        return 'the text has no mask: the tokenizer has no token for one ("mask_token" in tokenizer_config.json)'
    return f"the text has no mask; write {tokenizer.mask_token} where a word is missing"


def masks_of(tokenizer: Tokenizer | None, token_ids: Sequence[int]) -> tuple[int, ...]:
    """Places of the masks of a text."""
    mask = None if tokenizer is None else tokenizer.mask_token_id
    return tuple(index for index, token in enumerate(token_ids) if token == mask)


def target_ids(tokenizer: Tokenizer | None, targets: str | int | Sequence[str | int]) -> tuple[int, ...]:
    """Token ids of the words that masks are limited to: entries of the vocabulary, or texts of a single token.

    InvalidRequestError names a target that is several tokens.
    """
    given = [targets] if isinstance(targets, str | int) else list(targets)
    if len(given) > MOST_TARGETS:
        raise InvalidRequestError(f"targets has {len(given)} words, the limit is {MOST_TARGETS}")
    return tuple(_target_id(tokenizer, number, target) for number, target in enumerate(given))


def _target_id(tokenizer: Tokenizer | None, number: int, target: str | int) -> int:
    where = f"targets[{number}]"
    if isinstance(target, int) and not isinstance(target, bool):
        return target
    if not isinstance(target, str):
        raise InvalidRequestError(f"{where} must be a text or a token id, got {target!r:.80}")
    require_utf8(where, target)
    if tokenizer is None:
        raise InvalidRequestError(f"{where} is a text, and the model has no tokenizer; give token ids")
    entry = tokenizer.token_id(target)
    if entry is not None:
        return entry
    ids = tokenizer.encode(target, add_special_tokens=False)
    if len(ids) != 1:
        raise InvalidRequestError(f"{where} {target!r:.80} is {len(ids)} tokens; a mask gets one")
    return ids[0]


def with_texts(
    tokenizer: Tokenizer, token_ids: Sequence[int], candidates: Sequence[Sequence[FilledMask]]
) -> list[list[FilledMask]]:
    """Words for the masks of a text with their own text, and with the text that they make of it.

    Where there are several masks that text has its special tokens, since other masks are among them.
    """
    masks, ids = masks_of(tokenizer, token_ids), list(token_ids)
    alone = len(masks) == 1

    def filled(position: int, word: FilledMask) -> FilledMask:
        whole = [*ids[:position], word.token, *ids[position + 1 :]]
        sequence = tokenizer.decode(whole, skip_special_tokens=alone)
        return FilledMask(word.score, word.token, tokenizer.decode([word.token], skip_special_tokens=False), sequence)

    return [[filled(position, word) for word in words] for position, words in zip(masks, candidates, strict=True)]
