"""Words for masks through `LLM`, compared with transformers' pipeline, and what cannot be filled."""

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from tests.encoders import save_encoder, their_output, theirs

from hasten import LLM, FilledMask, InvalidRequestError, PoolingParams
from hasten.checkpoint.convert import Conversion, convert
from hasten.core.errors import ConfigError
from hasten.core.types import Request

BOUND = 1e-5
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("Bert", {}),
    "bert, own head": ("Bert", {"hidden_act": "gelu_new", "tie_word_embeddings": False}),
    "roberta": ("Roberta", {}),
    "xlm-roberta": ("XLMRoberta", {"type_vocab_size": 1}),
    "distilbert": ("DistilBert", {}),
    "mpnet": ("MPNet", {}),
    "modernbert": ("ModernBert", {"num_hidden_layers": 4}),
    "modernbert, other": (
        "ModernBert",
        {"norm_bias": True, "classifier_bias": True, "decoder_bias": False, "classifier_activation": "relu"},
    ),
}
IDS = {"bos_token_id": 2, "eos_token_id": 3, "cls_token_id": 2, "sep_token_id": 3}


def texts_with(mask: str) -> list[str]:
    return [f"the {mask} of a garden.", f"{mask} letter, {mask} and{mask}", "a café " * 60 + mask]


def save(folder: Path, name: str) -> Path:
    family, own = FAMILIES[name]
    return save_encoder(folder, family, "ForMaskedLM", **(IDS if family == "ModernBert" else {}), **own)


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("bert"), "bert")


@pytest.fixture(scope="module")
def llm(bert: Path) -> Iterator[LLM]:
    with LLM(bert, device="cpu", progress_bars=False) as opened:
        yield opened


def words(llm: LLM, texts: Any, **options: Any) -> list[list[list[FilledMask]]]:
    return [output.outputs.candidates for output in llm.fill_mask(texts, **options)]


@pytest.mark.parametrize("name", FAMILIES)
def test_words_are_those_of_the_pipeline(name: str, tmp_path: Path) -> None:
    from transformers import pipeline

    pipe: Any = pipeline("fill-mask", model=str(save(tmp_path, name)))
    texts = texts_with(pipe.tokenizer.mask_token)
    with LLM(tmp_path, device="cpu", progress_bars=False) as llm:
        for options in ({}, {"top_k": 2, "targets": ["the", "garden", "letter"]}):
            found = words(llm, texts, **options)
            assert [len(masks) for masks in found] == [1, 3, 1]
            for text, masks in zip(texts, found, strict=True):
                expected = pipe(text, **options)
                for theirs_, ours in zip([expected] if len(masks) == 1 else expected, masks, strict=True):
                    for entry, word in zip(theirs_, ours, strict=True):
                        assert (word.token, word.token_str) == (entry["token"], entry["token_str"])
                        assert word.sequence == entry["sequence"]
                        assert abs(word.score - entry["score"]) < BOUND


def test_logits_token_ids_and_vectors_in_the_same_steps(llm: LLM, bert: Path) -> None:
    tokenizer, model = llm.tokenizer, theirs(bert, "ModelForMaskedLM")
    text = texts_with("[MASK]")[1]
    ids = tokenizer.encode(text)
    assert tokenizer.mask_token_id is not None
    logits = their_output(model, ids)[[index for index, token in enumerate(ids) if token == tokenizer.mask_token_id]]
    best = logits.topk(7)
    params = PoolingParams(task="fill_mask", activation=False)
    for prompt in (text, {"prompt_token_ids": ids}):
        (masks,) = words(llm, prompt, top_k=7, pooling_params=params)
        for mask, row_ids, row_scores in zip(masks, best.indices, best.values, strict=True):
            assert [word.token for word in mask] == row_ids.tolist()
            assert [word.score for word in mask] == pytest.approx(row_scores.tolist(), abs=BOUND)
    for options, count in (({"pooling_params": replace(params, top_k=2)}, 2), ({"pooling_params": params}, 5)):
        assert {len(mask) for mask in words(llm, text, **options)[0]} == {count}
    alone = llm.embed(text)[0].outputs.embedding
    engine = llm.engine
    indices = tuple(index for index, token in enumerate(ids) if token == tokenizer.mask_token_id)
    engine.add(Request(request_id="vector", prompt_token_ids=tuple(ids), pooling=PoolingParams()))
    engine.add(Request(request_id="words", prompt_token_ids=tuple(ids), pooling=params, masks=indices))
    found = {output.request_id: output.outputs for output in engine.step()}
    assert found["vector"].embedding == pytest.approx(alone, abs=BOUND)  # type: ignore[union-attr]
    assert [word.token for word in found["words"].candidates[0]] == best.indices[0, :5].tolist()  # type: ignore[union-attr]


def test_many_masks_in_pieces(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [*texts_with("[MASK]"), "[MASK]"]
    whole = words(llm, texts)
    monkeypatch.setattr("hasten.engine.pooling._LOGITS_ROWS", 2)
    for found, expected in zip(words(llm, texts), whole, strict=True):
        for ours, theirs_ in zip(found, expected, strict=True):
            assert [word.token for word in ours] == [word.token for word in theirs_]


def test_masks_that_are_cut_off(llm: LLM) -> None:
    text = "the [MASK] of a [MASK]"
    (masks,) = words(llm, text, truncate_prompt_tokens=5)
    assert len(masks) == 1
    with pytest.raises(InvalidRequestError, match=r"^the text has no mask; write \[MASK\] where a word is missing$"):
        llm.fill_mask(text, truncate_prompt_tokens=3)


@pytest.mark.parametrize(
    ("texts", "options", "expected"),
    [
        (["the [MASK]", "the garden"], {}, "prompts[1]: the text has no mask; write [MASK] where a word is missing"),
        ("the [MASK]", {"targets": ["the", "bluebottle"]}, "targets[1] 'bluebottle' is "),
        ("the [MASK]", {"targets": [99999]}, "targets has token id 99999; the vocabulary ends at "),
        ("the [MASK]", {"targets": [True]}, "targets[0] must be a text or a token id, got True"),
        ("the [MASK]", {"top_k": 99999}, "top_k is 99999; the vocabulary has "),
        ("the [MASK]", {"top_k": 0}, "top_k must be at least 1, got 0"),
    ],
)
def test_what_cannot_be_filled(texts: Any, options: dict[str, Any], expected: str, llm: LLM) -> None:
    with pytest.raises((InvalidRequestError, ConfigError)) as error:
        llm.fill_mask(texts, **options)
    assert str(error.value).startswith(expected)
    assert "\n" not in str(error.value)


def test_models_without_a_head_for_masks(bert: Path, tmp_path: Path) -> None:
    """Those that are named for it and lack it, as models of vectors do, and those that are for something else."""
    shutil.copytree(bert, tmp_path / "headless")
    file = tmp_path / "headless" / "model.safetensors"
    save_file({name: value for name, value in load_file(file).items() if not name.startswith("cls.")}, file)
    encoder = save_encoder(tmp_path / "encoder", "Bert")
    for folder, name in ((tmp_path / "headless", "BertForMaskedLM"), (encoder, "BertModel")):
        with LLM(folder, device="cpu", progress_bars=False) as llm:
            assert len(llm.embed("the garden")[0].outputs.embedding) == 48
            with pytest.raises(InvalidRequestError, match=f"^{name} is not a model to fill_mask; it does embed, token"):
                llm.fill_mask("the [MASK]")


@pytest.mark.usefixtures("forked_ranks")
@pytest.mark.parametrize("name", ["bert, own head", "roberta"])
def test_ranks_and_ranked_files(name: str, tmp_path: Path) -> None:
    path = save(tmp_path / "model", name)
    convert(Conversion(str(path), str(tmp_path / "out"), ranks=2, format="safetensors"))
    mask = "[MASK]" if name.startswith("bert") else "<mask>"
    with LLM(path, device="cpu", progress_bars=False) as llm:
        expected = words(llm, texts_with(mask))
    with LLM(tmp_path / "out" / "2-gpu", device="cpu", progress_bars=False, tensor_parallel_size=2) as llm:
        for found, alone in zip(words(llm, texts_with(mask)), expected, strict=True):
            for ours, theirs_ in zip(found, alone, strict=True):
                assert [word.token for word in ours] == [word.token for word in theirs_]
                assert [word.score for word in ours] == pytest.approx([word.score for word in theirs_], abs=BOUND)
