import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.waiting import LIMIT_S

from hasten.core.errors import CheckpointError
from hasten.engine.text import Tokenizer

Make = Callable[..., Path]
TEXT = "<|user|>hi<s>  <|user|> there"
TOKEN = {"content": "<|user|>", "lstrip": False, "normalized": False, "rstrip": False, "single_word": False}


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """A folder as transformers 4 left it: tokenizer.json, and files beside it that may add to it."""

    def make(config: dict[str, Any] | None = None, **files: Any) -> Path:
        from tokenizers import Tokenizer as FastTokenizer
        from tokenizers import decoders, models, pre_tokenizers, trainers

        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        folder.mkdir()
        fast = FastTokenizer(models.BPE())
        fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        fast.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=300,
            special_tokens=["<unk>", "<s>", "</s>", "<pad>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        fast.train_from_iterator(["some text"], trainer)
        fast.save(str(folder / "tokenizer.json"))
        base = {"bos_token": "<s>", "eos_token": "</s>", "tokenizer_class": "BloomTokenizerFast"}
        contents = {"tokenizer_config": base | (config or {}), "config": {"model_type": "bloom"}} | files
        for name, content in contents.items():
            (folder / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
        return folder

    return make


NEW = 267
"""The first id that tokenizer.json has not given away."""
ADDITIONS: dict[str, dict[str, Any]] = {
    "added_tokens.json": {"added_tokens": {"<|user|>": NEW}},
    "special_tokens_map.json": {"special_tokens_map": {"additional_special_tokens": ["<|user|>"]}},
    "a named token": {"special_tokens_map": {"user_token": TOKEN, "bos_token": "<s>"}},
    "added_tokens_decoder": {"config": {"added_tokens_decoder": {str(NEW): TOKEN | {"special": True}}}},
    "additional_special_tokens": {"config": {"additional_special_tokens": ["<|user|>"]}},
    "extra_special_tokens": {"config": {"extra_special_tokens": {"user_token": "<|user|>"}}},
    "no special token": {"config": {"added_tokens_decoder": {str(NEW): TOKEN | {"special": False}}}},
    "another way of stripping": {
        "config": {"added_tokens_decoder": {"1": TOKEN | {"content": "<s>", "rstrip": True, "special": True}}}
    },
    "tokens at the ends": {"config": {"add_bos_token": True, "add_eos_token": True}},
}


@pytest.mark.parametrize("files", ADDITIONS.values(), ids=list(ADDITIONS))
def test_tokens_beside_tokenizer_json_count_as_in_transformers(files: dict[str, Any], make: Make) -> None:
    from transformers import AutoTokenizer

    folder = make(**files)
    found, reference = Tokenizer.from_folder(folder), AutoTokenizer.from_pretrained(folder)
    expected = reference(TEXT).input_ids
    assert found.encode(TEXT) == expected
    assert found.vocab_size == len(reference)
    for skip in (True, False):
        assert found.decode(expected, skip_special_tokens=skip) == reference.decode(expected, skip_special_tokens=skip)


SPACED = "Anna , Ben ' s and they do n't , or ' m ? 've ! a ."
INSIST = "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output"


def _plain_words(model: Any) -> Any:
    """A tokenizer whose text is its words with spaces between them."""
    from tokenizers import Tokenizer as FastTokenizer
    from tokenizers import pre_tokenizers

    fast = FastTokenizer(model)
    fast.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return fast


def _word_piece(words: list[str]) -> Any:
    """BERT's model."""
    from tokenizers import decoders, models

    fast = _plain_words(
        models.WordPiece({word: index for index, word in enumerate(["<unk>", *words])}, unk_token="<unk>")
    )
    fast.decoder = decoders.WordPiece(cleanup=False)
    return fast


def _unigram(words: list[str]) -> Any:
    """T5's model."""
    from tokenizers import decoders, models, pre_tokenizers

    fast = _plain_words(models.Unigram([(word, -1.0) for word in ("<unk>", *("\u2581" + word for word in words))], 0))
    fast.pre_tokenizer, fast.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    return fast


def _bpe(words: list[str]) -> Any:
    """The model of GPT-2, BLOOM and LLaMA."""
    from tokenizers import models, trainers

    fast = _plain_words(models.BPE())
    fast.train_from_iterator(words, trainers.BpeTrainer(vocab_size=1000, show_progress=False))
    return fast


@pytest.mark.parametrize("says", [{}, {"clean_up_tokenization_spaces": True}, {"clean_up_tokenization_spaces": False}])
@pytest.mark.parametrize("insists", [{}, {INSIST: True}])
@pytest.mark.parametrize("kind", [_word_piece, _unigram, _bpe])
def test_spaces_are_cleaned_up_as_in_transformers(
    kind: Callable[[list[str]], Any], insists: dict[str, bool], says: dict[str, bool], tmp_path: Path
) -> None:
    """BPE keeps its spaces unless its files insist: they are part of its tokens."""
    from transformers import AutoTokenizer

    fast = kind(sorted(set(SPACED.split())))
    fast.save(str(tmp_path / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "<unk>"} | says | insists
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    found, reference = Tokenizer.from_folder(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    ids = reference(SPACED).input_ids
    expected = reference.decode(ids)
    cleans = says == {"clean_up_tokenization_spaces": True} and (kind != _bpe or bool(insists))
    assert ("Anna, Ben's" in expected) == cleans
    assert found.decode(ids) == expected
    stream = found.stream()
    assert "".join(map(stream.add, ids)) + stream.flush() == expected


@pytest.mark.parametrize("space", [True, False])
@pytest.mark.parametrize("kind", ["GPT2Tokenizer", "GPT2TokenizerFast"])
def test_a_space_before_a_text_is_that_of_transformers(kind: str, space: bool, make: Make) -> None:
    """tokenizer.json says that there is none."""
    from transformers import AutoTokenizer

    folder = make({"add_prefix_space": space, "tokenizer_class": kind})
    (folder / "config.json").write_text('{"model_type": "gpt2"}')
    found, reference = Tokenizer.from_folder(folder), AutoTokenizer.from_pretrained(folder)
    assert found.encode("some text") == reference("some text").input_ids
    assert (found.encode("some text")[0] == found.encode(" some text")[0]) == space


@pytest.mark.parametrize("lower", [True, False])
@pytest.mark.parametrize("says", [{"do_lower_case": True}, {"do_lower_case": False}, {"strip_accents": False}], ids=str)
def test_letters_are_those_of_transformers(says: dict[str, bool], lower: bool, tmp_path: Path) -> None:
    from tokenizers import normalizers, processors
    from transformers import AutoTokenizer

    special = ["[CLS]", "[SEP]", "[UNK]", "[PAD]", "[MASK]"]
    fast = _word_piece([*special, "Some", "some", "Café", "café", "Cafe", "cafe"])
    fast.add_special_tokens(special)
    fast.normalizer = normalizers.BertNormalizer(lowercase=lower)
    fast.post_processor = processors.BertProcessing(("[SEP]", 2), ("[CLS]", 1))
    fast.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "BertTokenizer"} | says))
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    found, reference = Tokenizer.from_folder(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    assert found.encode("Some Café") == reference("Some Café").input_ids


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"added_tokens": {"<|user|>": 400}}, r"added_tokens\.json: token '<\|user\|>' has id 400, .* gives it id 267"),
        ({"added_tokens": {"<s>": 7}}, r"added_tokens\.json: token '<s>' has id 7, but the tokenizer gives it id 1"),
        (
            {"config": {"added_tokens_decoder": {"2": TOKEN | {"special": True}}}},
            r"tokenizer_config\.json: token '<\|user\|>' has id 2, but the tokenizer gives it id 267",
        ),
        ({"added_tokens": {"<|user|>": "267"}}, r"added_tokens\.json: '<\|user\|>' has no token id, but '267'"),
        ({"config": {"added_tokens_decoder": {"267": "x"}}}, "added_tokens_decoder has no token in '267'"),
        ({"special_tokens_map": ["<|user|>"]}, r"special_tokens_map\.json is not a JSON object"),
    ],
)
def test_files_that_contradict_each_other_are_named(files: dict[str, Any], message: str, make: Make) -> None:
    folder = make(**files)
    with pytest.raises(CheckpointError, match=message) as caught:
        Tokenizer.from_folder(folder)
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_tokenizer_that_transformers_cannot_read_is_one_line(make: Make) -> None:
    folder = make()
    (folder / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match="its tokenizer cannot be read") as caught:
        Tokenizer.from_folder(folder)
    assert "\n" not in str(caught.value)
    for path in (folder.parent, folder / "tokenizer.json"):
        with pytest.raises(CheckpointError, match=r"has no tokenizer\.json; name the tokenizer's folder"):
            Tokenizer.from_folder(path)


def test_a_complete_tokenizer_json_is_read_without_transformers(tiny_bloom: Path, make: Make) -> None:
    same = make(added_tokens={"<s>": 1}, special_tokens_map={"bos_token": "<s>"}, config={"add_bos_token": False})
    for folder in (tiny_bloom, same):
        script = f"""
import sys
from hasten.engine.text import Tokenizer
Tokenizer.from_folder({str(folder)!r})
assert "transformers" not in sys.modules
"""
        subprocess.run([sys.executable, "-c", script], check=True, timeout=LIMIT_S)
