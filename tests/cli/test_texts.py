"""`hasten embed` and `hasten classify`."""

import io
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from tests.encoders import save_encoder, their_output, theirs

from hasten.engine.text import Tokenizer

if TYPE_CHECKING:
    from tests.cli.conftest import Hasten


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    heads = ("Model", "ForSequenceClassification", "ForTokenClassification", "ForMaskedLM")
    return {head: save_encoder(tmp_path_factory.mktemp(head), "DistilBert", head, is_matryoshka=True) for head in heads}


def objects(out: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in out.splitlines()]


def expected(folder: Path, head: str, text: str) -> torch.Tensor:
    return their_output(theirs(folder, head), Tokenizer.from_folder(folder).encode(text))


def test_vectors(models: dict[str, Path], hasten_here: "Hasten", monkeypatch: pytest.MonkeyPatch) -> None:
    lines = b'"the letter"\n\n{"text": "a caf\xc3\xa9", "id": 7}\n'
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(lines)))
    done = hasten_here("embed", models["Model"], "--text", "the garden", "--input", "-")
    assert done.status == 0, done.err
    first, second, third = objects(done.out)
    assert [first["text"], second["text"], third["text"], third["id"]] == ["the garden", "the letter", "a café", 7]
    mean = expected(models["Model"], "Model", "the garden").mean(0)
    assert torch.allclose(torch.tensor(first["embedding"]), mean, atol=1e-5)
    assert first["tokens"] == 4
    done = hasten_here("embed", models["Model"], "--text", "the garden", "--dimensions", "5", "--normalize")
    (short,) = objects(done.out)
    assert torch.allclose(torch.tensor(short["embedding"]), mean[:5] / mean[:5].norm(), atol=1e-5)


def test_labels(models: dict[str, Path], hasten_here: "Hasten") -> None:
    folder, text = models["ForSequenceClassification"], "the garden"
    logits = expected(folder, "ModelForSequenceClassification", text)
    (found,) = objects(hasten_here("classify", folder, "--text", text).out)
    assert found["scores"] == pytest.approx(
        dict(zip(("LABEL_0", "LABEL_1"), logits.softmax(-1).tolist(), strict=True)), abs=1e-5
    )
    assert found["label"] == f"LABEL_{int(logits.argmax())}"
    (found,) = objects(hasten_here("classify", folder, "--text", text, "--logits").out)
    assert list(found["scores"].values()) == pytest.approx(logits.tolist(), abs=1e-5)


def test_labels_of_tokens(models: dict[str, Path], hasten_here: "Hasten") -> None:
    folder, text = models["ForTokenClassification"], "the garden"
    best = expected(folder, "ModelForTokenClassification", text).softmax(-1).max(-1)
    (found,) = objects(hasten_here("classify", folder, "--text", text).out)
    assert [entry["token"] for entry in found["tokens"]] == ["[CLS]", "the", "garden", "[SEP]"]
    assert [entry["label"] for entry in found["tokens"]] == [f"LABEL_{index}" for index in best.indices.tolist()]
    assert [entry["score"] for entry in found["tokens"]] == pytest.approx(best.values.tolist(), abs=1e-5)


def test_words_for_masks(models: dict[str, Path], hasten_here: "Hasten") -> None:
    folder, text = models["ForMaskedLM"], "the [MASK]"
    logits = expected(folder, "ModelForMaskedLM", text)[2]
    options = ("--text", text, "--top-k", "2", "--target", "garden", "--target", "letter", "--target", "of")
    (found,) = objects(hasten_here("fill-mask", folder, *options).out)
    (words,) = found["masks"]
    assert {word["token_str"] for word in words} < {"garden", "letter", "of"}
    assert [word["sequence"] for word in words] == [f"the {word['token_str']}" for word in words]
    ids = [word["token"] for word in words]
    assert [word["score"] for word in words] == pytest.approx(logits.softmax(-1)[ids].tolist(), abs=1e-5)
    (found,) = objects(hasten_here("fill-mask", folder, "--text", text, "--logits").out)
    assert [word["score"] for word in found["masks"][0]] == pytest.approx(logits.topk(5).values.tolist(), abs=1e-5)


@pytest.mark.parametrize(
    ("command", "head", "options", "message"),
    [
        ("embed", "Model", [], "there is no text; give --text or --input"),
        ("embed", "Model", ["--input", "FILE"], "line 2 is neither a text nor an object with"),
        ("embed", "Model", ["--text", "a", "--prompt-name", "query"], "--prompt-name 'query' is no prompt"),
        ("embed", "Model", ["--text", "the " * 400], "more than the longest of 320"),
        ("embed", "ForSequenceClassification", ["--text", "a"], "is not a model to embed; it does classify"),
        ("classify", "Model", ["--text", "a"], "is not a model to classify; it does embed"),
        ("fill-mask", "ForMaskedLM", ["--text", "a"], "the text has no mask; write [MASK] where a word is missing"),
        ("fill-mask", "ForMaskedLM", ["--text", "[MASK]", "--target", "a b"], "targets[0] 'a b' is 2 tokens"),
        ("fill-mask", "Model", ["--text", "[MASK]"], "is not a model to fill_mask; it does embed, token_embed"),
        ("generate", "Model", ["--prompt", "a"], "DistilBertModel generates no text; it does embed"),
    ],
)  # fmt: skip
def test_errors(
    command: str,
    head: str,
    options: list[str],
    message: str,
    models: dict[str, Path],
    hasten_here: "Hasten",
    tmp_path: Path,
) -> None:
    (tmp_path / "texts").write_text('"a"\n{"prompt": "b"}\n')
    done = hasten_here(command, models[head], *[tmp_path / "texts" if each == "FILE" else each for each in options])
    assert done.status == 2
    assert message in done.err
    assert done.err.count("\n") == 1


def test_a_model_that_generates(tiny_bloom: Path, hasten_here: "Hasten") -> None:
    done = hasten_here("embed", tiny_bloom, "--text", "a")
    assert done.status == 2
    assert "needs a model that gives vectors, scores or labels of texts; BloomForCausalLM generates text" in done.err
