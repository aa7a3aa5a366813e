from __future__ import annotations

import itertools
import pickle
import random
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import models, normalizers, pre_tokenizers

from hasten.core.errors import CheckpointError
from hasten.core.types import SamplingParams
from hasten.engine.text import TextState, Tokenizer

DEMO = Path(__file__).parents[2] / "examples" / "demo-model"

TEXTS = (
    "The garden, the river: café!",
    "emoji 👩🏽‍🚀 and 🇪🇺, two in a row 🙂🙃",
    "漢字かな交じり文と、한국어도",
    "e\u0301 a\u0308 n\u0303 \u1e69 combining",
    "\u0646\u0635 \u0639\u0631\u0628\u064a \U0001d518\U0001d52b\ttabs\n\nlines  spaces ",
    "a replacement character \ufffd of its own",
)


@pytest.fixture(scope="module")
def tokenizer(tiny_bloom: Path) -> Tokenizer:
    return Tokenizer.from_folder(tiny_bloom)


@pytest.fixture(scope="module")
def bytes_only(tokenizer: Tokenizer) -> list[int]:
    """Tokens of one byte each that is no character by itself, and one that is."""
    found = [token for token in range(tokenizer.vocab_size) if tokenizer.decode([token]) == "\ufffd"]
    assert len(found) >= 100
    return [*found, tokenizer.encode("a")[0]]


def streamed(tokenizer: Tokenizer, ids: list[int], *, skip: bool = True) -> str:
    """The whole stream; at each step it must be the beginning of the text so far, all but an open character."""
    stream, text = tokenizer.stream(skip_special_tokens=skip), ""
    for count, token in enumerate(ids, 1):
        text += stream.add(token)
        whole = tokenizer.decode(ids[:count], skip_special_tokens=skip)
        assert whole.startswith(text)
        assert set(whole[len(text) :]) <= {"\ufffd"}
    return text


@pytest.mark.parametrize("text", TEXTS)
def test_text_grows_to_what_was_encoded(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert len(ids) > len(text.split())
    assert tokenizer.decode(ids) == text
    assert streamed(tokenizer, ids) == text


@given(text=st.text(max_size=40))
@settings(max_examples=300, deadline=None, derandomize=True)
def test_any_text_grows_to_what_was_encoded(tokenizer: Tokenizer, text: str) -> None:
    result = streamed(tokenizer, tokenizer.encode(text))
    assert result == text.rstrip("\ufffd") or result == text


@given(data=st.data(), skip=st.booleans())
@settings(max_examples=300, deadline=None, derandomize=True)
def test_any_tokens_at_all_lose_no_text(
    tokenizer: Tokenizer, bytes_only: list[int], data: st.DataObject, skip: bool
) -> None:
    any_token = st.integers(0, tokenizer.vocab_size + 20)  # a model's vocabulary may be larger than its tokenizer's
    ids = data.draw(st.lists(st.one_of(st.sampled_from(bytes_only), any_token, st.integers(0, 3)), max_size=60))
    streamed(tokenizer, ids, skip=skip)


@pytest.mark.parametrize("kind", ["bytes that are no text", "special tokens", "a special token inside a character"])
def test_long_runs_without_text_take_linear_time(tokenizer: Tokenizer, bytes_only: list[int], kind: str) -> None:
    ids = {
        "bytes that are no text": bytes_only[:1] * 4000,
        "special tokens": [2] * 4000,
        "a special token inside a character": [tokenizer.encode("ü")[0]] + [2] * 4000,
    }[kind]
    stream = tokenizer.stream()
    start = time.process_time()
    text = "".join(stream.add(token) for token in ids)
    assert time.process_time() - start < 1  # 50 ms here; decoding the whole each time takes some 4 s
    whole = tokenizer.decode(ids)
    assert whole.startswith(text)
    assert len(whole) - len(text) <= 8


def test_a_character_broken_off_by_another_is_shown_as_broken(tokenizer: Tokenizer) -> None:
    first = tokenizer.encode("ü")[0]
    stream = tokenizer.stream()
    assert [stream.add(token) for token in (first, tokenizer.encode("a")[0])] == ["", "\ufffda"]


def grow(
    tokenizer: Tokenizer, ids: list[int], params: SamplingParams, min_tokens: int = 0
) -> tuple[str | None, str, list[str]]:
    """The stop string found, the text then, and what was shown before."""
    state = TextState(tokenizer, params)
    shown: list[str] = []
    for count, token in enumerate(ids, 1):
        found = state.add(token, look_for_stop=count >= min_tokens)
        if found is not None:
            return found, state.text, shown
        shown.append(state.settled)
    return None, state.text, shown


def unread(tokenizer: Tokenizer, ids: list[int], params: SamplingParams) -> tuple[str | None, str]:
    """The stop string found and the text then, where nobody reads the text before."""
    state = TextState(tokenizer, params)
    found = next((word for token in ids if (word := state.add(token, look_for_stop=True)) is not None), None)
    return found, state.text


@given(text=st.text("abc ü", min_size=1, max_size=30), min_tokens=st.integers(0, 8))
@settings(max_examples=200, deadline=None, derandomize=True)
def test_a_stop_string_that_is_complete_too_early_ends_nothing_later(
    tokenizer: Tokenizer, text: str, min_tokens: int
) -> None:
    ids, stop = tokenizer.encode(text), ["b", "a ü", "cc"]
    texts = [tokenizer.decode(ids[:count]).rstrip("\ufffd") for count in range(len(ids) + 1)]
    completed = [
        any(word in after[max(0, len(before) - len(word) + 1) :] for word in stop)
        for before, after in itertools.pairwise(texts)
    ]
    first = next((count for count, ends in enumerate(completed, 1) if ends and count >= min_tokens), None)
    state = TextState(tokenizer, SamplingParams(stop=stop))
    found = [state.add(token, look_for_stop=count >= min_tokens) for count, token in enumerate(ids[:first], 1)]
    assert [word is not None for word in found] == [count == first for count in range(1, len(found) + 1)]


@given(data=st.data(), stop=st.sampled_from(["\ufffd", "a\ufffd", "\ufffda", "\ufffd\ufffd"]))
@settings(max_examples=200, deadline=None, derandomize=True)
def test_stop_strings_of_broken_characters(
    tokenizer: Tokenizer, bytes_only: list[int], data: st.DataObject, stop: str
) -> None:
    ids = data.draw(st.lists(st.sampled_from([*bytes_only[:20], bytes_only[-1]]), max_size=12))
    params = SamplingParams(stop=stop)
    assert unread(tokenizer, ids, params) == grow(tokenizer, ids, params)[:2]


@given(
    text=st.text("abc ü漢🙂", min_size=1, max_size=30),
    stop=st.lists(st.text("abc ü漢🙂", min_size=1, max_size=5), min_size=1, max_size=4, unique=True),
    include=st.booleans(),
)
@settings(max_examples=500, deadline=None, derandomize=True)
def test_stop_strings_end_the_text_where_they_first_appear(
    tokenizer: Tokenizer, text: str, stop: list[str], include: bool
) -> None:
    ids = tokenizer.encode(text)
    params = SamplingParams(stop=stop, include_stop_str_in_output=include)
    found, result, shown = grow(tokenizer, ids, params)
    assert unread(tokenizer, ids, params) == (found, result)
    # by tokens: the first after which any stop string is complete; then the one that begins first
    texts = [tokenizer.decode(ids[:count]).rstrip("\ufffd") for count in range(1, len(ids) + 1)]
    ended = next((part for part in texts if any(word in part for word in stop)), None)
    if ended is None:
        assert (found, result) == (None, text)
    else:
        index = min(ended.find(word) for word in stop if word in ended)
        wanted = max((word for word in stop if ended.startswith(word, index)), key=len)
        assert found == wanted
        assert result == ended[:index] + (wanted if include else "")
    assert all(later.startswith(earlier) for earlier, later in zip(shown, [*shown[1:], result], strict=False))
    assert not any(word in part for word in stop for part in shown)
    if not include and ended is not None:
        assert all(len(part) <= index for part in shown)


@pytest.mark.parametrize("include", [False, True])
def test_a_stop_string_over_several_tokens(tokenizer: Tokenizer, include: bool) -> None:
    ids = tokenizer.encode("Anna saw zqxjk in the garden")
    pieces = [tokenizer.decode([token]) for token in ids]
    assert not any("zqx" in piece for piece in pieces)
    params = SamplingParams(stop=["zqx", "garden"], include_stop_str_in_output=include)
    found, text, shown = grow(tokenizer, ids, params)
    assert (found, text) == ("zqx", "Anna saw zqx" if include else "Anna saw ")
    assert not any("z" in part for part in shown)


def test_of_two_stop_strings_the_first_and_then_the_longest_ends_it(tokenizer: Tokenizer) -> None:
    token = next(t for t in range(tokenizer.vocab_size) if len(tokenizer.decode([t])) >= 5)
    word = tokenizer.decode([token])
    params = SamplingParams(stop=[word[2:4], word[1:3], word[1:4]])
    assert grow(tokenizer, [token], params)[:2] == (word[1:4], word[:1])


def test_a_stop_string_before_min_tokens_stays_in_the_text(tokenizer: Tokenizer) -> None:
    ids = [tokenizer.encode(letter)[0] for letter in "abcabcd"]
    params = SamplingParams(stop="ab")
    assert grow(tokenizer, ids, params, min_tokens=3)[:2] == ("ab", "abc")
    assert grow(tokenizer, ids, params, min_tokens=6)[:2] == (None, "abcabcd")
    # it counts where only its end lies behind
    assert grow(tokenizer, ids, SamplingParams(stop="bca"), min_tokens=4)[:2] == ("bca", "a")


def test_runs_of_stop_tokens_hold_back_what_they_may_take_away(tokenizer: Tokenizer) -> None:
    ids = [tokenizer.encode(letter)[0] for letter in "abcdef"]
    assert grow(tokenizer, ids, SamplingParams())[2] == ["a", "ab", "abc", "abcd", "abcde", "abcdef"]
    runs = SamplingParams(stop_words_ids=[[7], [7, 8, 9]])
    assert grow(tokenizer, ids, runs)[2] == ["", "", "a", "ab", "abc", "abcd"]
    both = SamplingParams(stop_words_ids=[[7, 8]], stop="xyz?")
    assert grow(tokenizer, ids, both)[2] == ["", "", "", "a", "ab", "abc"]
    kept = SamplingParams(stop_words_ids=[[7, 8, 9]], include_stop_str_in_output=True)
    assert grow(tokenizer, ids, kept)[2][-1] == "abcdef"


def test_special_tokens_are_skipped_or_shown(tokenizer: Tokenizer) -> None:
    ids = [*tokenizer.encode("the lamp"), 2, *tokenizer.encode(" and")]
    assert streamed(tokenizer, ids) == "the lamp and"
    assert streamed(tokenizer, ids, skip=False) == "the lamp</s> and"


def test_words_as_they_may_appear(tokenizer: Tokenizer) -> None:
    runs = tokenizer.words_ids("garden")
    assert [tokenizer.decode(run) for run in runs] == ["garden", " garden"]
    assert tokenizer.words_ids(" garden") == runs[1:]


def sentence_piece(normalizer: normalizers.Normalizer, metaspace: pre_tokenizers.PreTokenizer | None) -> Tokenizer:
    """With byte fallback, and "lamp" as one token with and without a space before it."""
    merges = [("l", "a"), ("m", "p"), ("la", "mp"), ("\u2581", "lamp"), ("\u2581", "\u2581")]
    tokens = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581", *"lamp", *map("".join, merges)]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    fast = FastTokenizer(models.BPE(vocabulary, merges, byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    fast.normalizer = normalizer
    if metaspace is not None:
        fast.pre_tokenizer = metaspace
    return Tokenizer(fast)


SPACES = normalizers.Replace(" ", "\u2581")
SENTENCE_PIECE = {
    "llama": lambda: sentence_piece(normalizers.Sequence([normalizers.Prepend("\u2581"), SPACES]), None),
    "metaspace": lambda: sentence_piece(SPACES, pre_tokenizers.Metaspace()),
    "first alone": lambda: sentence_piece(SPACES, pre_tokenizers.Metaspace(prepend_scheme="first")),
    "gemma": lambda: sentence_piece(SPACES, None),
}


@pytest.mark.parametrize("kind", SENTENCE_PIECE)
def test_words_of_tokenizers_that_put_a_space_before_a_text(kind: str) -> None:
    tokenizer = SENTENCE_PIECE[kind]()
    runs = tokenizer.words_ids("lamp")
    assert sorted(str(tokenizer._fast.id_to_token(token)) for (token,) in runs) == ["lamp", "\u2581lamp"]
    for text in ("lamp", "a lamp", "a lamp a", "\nlamp", "(lamp)", "a\n lamp"):
        assert [[token] for token in tokenizer.encode(text) if [token] in runs], text
    spaced = [run for run in runs if tokenizer._fast.id_to_token(run[0]) == "\u2581lamp"]
    assert tokenizer.words_ids(" lamp") == spaced
    assert tokenizer.words_ids(" \u00e9")[0][-2:] == [1 + 0xC3, 1 + 0xA9]


def test_encoding(tokenizer: Tokenizer) -> None:
    rng = random.Random(0)
    texts = [" ".join(rng.choices(("lamp", "café", "🙂", "zq"), k=rng.randint(0, 9))) for _ in range(20)]
    assert tokenizer.encode_batch(texts) == [tokenizer.encode(text) for text in texts]


def test_folders_without_a_tokenizer(tmp_path: Path, tiny_bloom: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has no tokenizer\.json.*--tokenizer-path"):
        Tokenizer.from_folder(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"model": 3}')
    with pytest.raises(CheckpointError, match="cannot be read as a tokenizer"):
        Tokenizer.from_folder(tmp_path)
    by_file = Tokenizer.from_folder(tiny_bloom / "tokenizer.json")
    assert by_file.encode("the lamp") == Tokenizer.from_folder(tiny_bloom).encode("the lamp")


def test_a_tokenizer_goes_to_another_process_whether_it_is_read_yet_or_not() -> None:
    for tokenizer in (Tokenizer.deferred(DEMO), Tokenizer.from_folder(DEMO)):
        copy = pickle.loads(pickle.dumps(tokenizer))
        assert copy.is_loaded
        assert copy.decode(copy.encode("Anna took the lamp")) == tokenizer.decode(
            tokenizer.encode("Anna took the lamp")
        )
        assert copy.mask_token == tokenizer.mask_token
