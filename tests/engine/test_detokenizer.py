"""Streams and stop strings compared with what the tokenizers library decodes, for tokenizers of all kinds."""

from __future__ import annotations

import json
import random
import time
from functools import cache
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as FastTokenizer

from hasten.core.types import SamplingParams
from hasten.engine.cleanup import CleanedStream, cleaned
from hasten.engine.text import TextState, Tokenizer

if TYPE_CHECKING:
    from collections.abc import Callable

CORPUS = [
    "the lamp and the river are here. don't say no!",
    "abc ok abc, d'accord? a b",
    "Anna walked - to 12 rivers",
] * 3
SPECIAL = ["<unk>", "<s>", "</s>", "[PAD]"]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def byte_level() -> FastTokenizer:
    result = FastTokenizer(models.BPE())
    result.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    result.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    result.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(vocab_size=320, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False),
    )
    return result


def byte_level_in_sequence() -> FastTokenizer:
    result = byte_level()
    result.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Fuse()])
    return result


def with_bytes(made: FastTokenizer, decoder: decoders.Decoder) -> FastTokenizer:
    """Byte tokens are no special ones, though the trainer adds them like those."""
    made.decoder = decoder
    values = json.loads(made.to_str())
    values["added_tokens"] = [token for token in values["added_tokens"] if token["content"] in SPECIAL]
    return FastTokenizer.from_str(json.dumps(values))


def byte_fallback(*, strip: bool) -> FastTokenizer:
    """As Llama's, and without stripping as Gemma's."""
    result = FastTokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    prepend = [normalizers.Prepend("\u2581")] if strip else []
    result.normalizer = normalizers.Sequence([*prepend, normalizers.Replace(" ", "\u2581")])
    result.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=340, special_tokens=[*SPECIAL, *BYTES], show_progress=False)
    )
    parts = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    return with_bytes(result, decoders.Sequence([*parts, decoders.Strip(" ", 1, 0)] if strip else parts))


def metaspace() -> FastTokenizer:
    """As T5's."""
    result = FastTokenizer(models.Unigram())
    result.pre_tokenizer = pre_tokenizers.Metaspace()
    result.train_from_iterator(
        CORPUS, trainers.UnigramTrainer(vocab_size=60, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False)
    )
    result.decoder = decoders.Metaspace()
    return result


def word_piece() -> FastTokenizer:
    """As BERT's."""
    result = FastTokenizer(models.WordPiece(unk_token="<unk>"))
    result.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    result.train_from_iterator(
        CORPUS, trainers.WordPieceTrainer(vocab_size=90, special_tokens=SPECIAL, show_progress=False)
    )
    result.decoder = decoders.WordPiece(cleanup=True)
    return result


def suffixes() -> FastTokenizer:
    """As GPT-1's: the end of a word is marked, and the last word of a text has no space."""
    result = FastTokenizer(models.BPE(end_of_word_suffix="</w>", unk_token="<unk>"))
    result.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    result.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(vocab_size=90, special_tokens=SPECIAL, end_of_word_suffix="</w>", show_progress=False),
    )
    result.decoder = decoders.BPEDecoder(suffix="</w>")
    return result


def without_decoder() -> FastTokenizer:
    result = FastTokenizer(
        models.WordLevel({word: i for i, word in enumerate([*SPECIAL, "a", "b", "the", "lamp"])}, "<unk>")
    )
    result.pre_tokenizer = pre_tokenizers.Whitespace()
    return result


KINDS: dict[str, Callable[[], FastTokenizer]] = {
    "byte level": byte_level,
    "byte level in a sequence": byte_level_in_sequence,
    "byte fallback, stripped": lambda: byte_fallback(strip=True),
    "byte fallback": lambda: byte_fallback(strip=False),
    "metaspace": metaspace,
    "word piece": word_piece,
    "suffixes": suffixes,
    "no decoder": without_decoder,
}


@cache
def fast_of(kind: str) -> FastTokenizer:
    result = KINDS[kind]()
    result.add_tokens([AddedToken("<|added|>", normalized=False), AddedToken(" caf\u00e9", normalized=False)])
    return result


CLEANED = ["word piece, cleaned", "byte fallback, cleaned"]


@cache
def tokenizer_of(kind: str) -> Tokenizer:
    return Tokenizer(fast_of(kind.removesuffix(", cleaned")), cleans_up=kind in CLEANED)


@cache
def byte_tokens(kind: str) -> list[int]:
    """Tokens that are bytes of characters, and some text between them."""
    ids = tokenizer_of(kind).encode("\u6f22\u5b57 \U0001f525\u00fc a", add_special_tokens=False)
    return [token for token in ids if token not in range(len(SPECIAL))] or [len(SPECIAL)]


def any_ids(kind: str) -> st.SearchStrategy[list[int]]:
    """Any tokens, some that do not exist among them, and often bytes that make characters or do not."""
    any_token = st.integers(0, tokenizer_of(kind).vocab_size + 5)
    runs = st.lists(st.sampled_from(byte_tokens(kind)), max_size=6)
    text = st.text("a\u6f22 \u00fc\U0001f469\u200d\U0001f680.n't", max_size=6)
    encoded = text.map(lambda value: tokenizer_of(kind).encode(value, add_special_tokens=False))
    parts = st.one_of(st.lists(any_token, max_size=4), runs, encoded)
    return st.lists(parts, max_size=8).map(lambda found: [token for part in found for token in part])


@cache
def reference_of(kind: str) -> Any:
    """What decodes all tokens at once: the tokenizers library, or transformers where it cleans up behind that."""
    fast = fast_of(kind.removesuffix(", cleaned"))
    if kind not in CLEANED:
        return fast
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_object=fast,
        clean_up_tokenization_spaces=True,
        clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output=True,
    )


def decoded(kind: str, ids: list[int], *, skip: bool) -> str:
    return str(reference_of(kind).decode(ids, skip_special_tokens=skip))


@pytest.mark.any_python
@pytest.mark.parametrize("kind", [*KINDS, *CLEANED])
@given(data=st.data(), skip=st.booleans())
@settings(max_examples=100, deadline=None, derandomize=True)
def test_a_stream_is_the_beginning_of_the_text_and_in_the_end_all_of_it(
    kind: str, data: st.DataObject, skip: bool
) -> None:
    ids = data.draw(any_ids(kind))
    stream, text = tokenizer_of(kind).stream(skip_special_tokens=skip), ""
    for count, token in enumerate(ids, 1):
        text += stream.add(token)
        assert decoded(kind, ids[:count], skip=skip).startswith(text)
    assert text + stream.flush() == decoded(kind, ids, skip=skip)


@pytest.mark.any_python
@pytest.mark.parametrize("kind", [*KINDS, *CLEANED])
@given(data=st.data(), skip=st.booleans())
@settings(max_examples=60, deadline=None, derandomize=True)
def test_what_follows_a_prompt_is_the_rest_of_the_whole_text(kind: str, data: st.DataObject, skip: bool) -> None:
    tokenizer, ids = tokenizer_of(kind), data.draw(any_ids(kind))
    prompt = tokenizer.encode(data.draw(st.sampled_from(["the lamp", "a", "abc ok a"])))
    whole, before = decoded(kind, [*prompt, *ids], skip=skip), decoded(kind, prompt, skip=skip)
    continues = tokenizer.continues(prompt, skip_special_tokens=skip)
    text = tokenizer.decode(ids, skip_special_tokens=skip, continues=continues)
    assert before + text == whole
    stream = tokenizer.stream(skip_special_tokens=skip, continues=continues)
    assert "".join(map(stream.add, ids)) + stream.flush() == text


@pytest.mark.any_python
@pytest.mark.parametrize("kind", [*KINDS, *CLEANED])
@given(data=st.data(), include=st.booleans(), continues=st.booleans())
@settings(max_examples=100, deadline=None, derandomize=True)
def test_a_stop_string_is_found_as_soon_as_the_text_has_it(
    kind: str, data: st.DataObject, include: bool, continues: bool
) -> None:
    tokenizer, ids = tokenizer_of(kind), data.draw(any_ids(kind))
    letters = sorted(set(decoded(kind, ids, skip=True)) - {"\ufffd"}) or ["a"]
    stop = data.draw(st.lists(st.text(letters, min_size=1, max_size=3), min_size=1, max_size=3))
    params = SamplingParams(stop=stop, include_stop_str_in_output=include)
    state, found = TextState(tokenizer, params, continues=continues), None
    for count, token in enumerate(ids, 1):
        text = tokenizer.decode(ids[:count], continues=continues)
        found = state.add(token, look_for_stop=True)
        assert (found is not None) == any(word in text for word in stop)
        if found is not None:
            index = min(text.find(word) for word in stop if word in text)
            assert text.startswith(found, index)
            assert state.text == text[:index] + (found if include else "")
            return
        assert text.startswith(state.settled)


@given(tokens=st.lists(st.text(" .?!,'ntmsverab", min_size=1, max_size=4), max_size=8))
@settings(max_examples=1000, deadline=None, derandomize=True)
def test_a_text_is_cleaned_alike_however_it_comes(tokens: list[str]) -> None:
    given, whole = CleanedStream(_Texts(tokens)), "".join(tokens)
    text = "".join(map(given.add, range(len(tokens))))
    assert cleaned(whole).startswith(text)
    assert text + given.tentative == text + given.flush() == cleaned(whole)


class _Texts:
    """A stream whose tokens have these texts."""

    tentative = ""

    def __init__(self, texts: list[str]) -> None:
        self._texts = texts

    def add(self, token_id: int) -> str:
        return self._texts[token_id]

    def flush(self) -> str:
        return ""


@pytest.mark.parametrize("text", [" the lamp", " abcabc \u6f22\u5b57 ok", " a \U0001f469\U0001f3fd\u200d\U0001f680 ok"])
@pytest.mark.parametrize("kind", ["byte fallback, stripped", "byte fallback", "metaspace"])
def test_words_and_characters_after_a_prompt(kind: str, text: str) -> None:
    """As a Llama-like model would continue "Anna": the space belongs to the text."""
    tokenizer = tokenizer_of(kind)
    ids = tokenizer.encode(text if kind == "byte fallback" else text.removeprefix(" "))
    if kind == "metaspace":
        text = decoded(kind, [*tokenizer.encode("a"), *ids], skip=True).removeprefix("a")  # it has no such characters
    continues = tokenizer.continues(tokenizer.encode("Anna"), skip_special_tokens=True)
    assert text.startswith(" ")
    assert tokenizer.decode(ids, continues=continues) == text
    stream = tokenizer.stream(continues=continues)
    assert "".join(map(stream.add, ids)) + stream.flush() == text
    state = TextState(tokenizer, SamplingParams(stop=text[-2:]), continues=continues)
    assert [state.add(token, look_for_stop=True) for token in ids][-1] == text[-2:]
    assert state.text == text[:-2]


def test_a_prompt_without_text_is_followed_by_a_texts_beginning() -> None:
    tokenizer = tokenizer_of("byte fallback, stripped")
    assert not tokenizer.continues([1], skip_special_tokens=True)
    assert tokenizer.continues([1], skip_special_tokens=False)
    assert tokenizer.continues([*tokenizer.encode("a"), *[1] * 40], skip_special_tokens=True)


@pytest.mark.parametrize("kind", [*KINDS, *CLEANED])
def test_long_texts_take_linear_time(kind: str) -> None:
    rng = random.Random(0)
    tokenizer = tokenizer_of(kind)
    for ids in (
        [rng.randrange(tokenizer.vocab_size) for _ in range(4000)],
        rng.choices(byte_tokens(kind)[:2], k=4000),
        [2] * 4000,
    ):
        state = TextState(tokenizer, SamplingParams(stop="no such text"))
        start = time.process_time()
        for token in ids:
            state.add(token, look_for_stop=True)
        assert time.process_time() - start < 2  # 0.1 s here; decoding all of it for each token takes over 10 s
