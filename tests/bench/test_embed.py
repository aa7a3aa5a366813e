"""`hasten bench embed`: vectors of all engines agree, and what is written has its form."""

import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, get_args

import pytest
import torch
from tests.bench.report_form import form_errors
from tests.encoders import save_encoder, save_pooling

from hasten.bench.embed import HastenEmbedder, measure, texts
from hasten.bench.embed_others import SentenceTransformersEmbedder, VllmEmbedder, pooled, vllm_embedder
from hasten.bench.peers import NotMeasured
from hasten.cli.main import main
from hasten.core.model_config import Pooling
from hasten.engine.llm import LLM
from hasten.engine.pooling import pool

BOUND = 1e-5


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_encoder(tmp_path_factory.mktemp("bert"), "Bert", num_hidden_layers=2)
    pooling = {"word_embedding_dimension": 48, "pooling_mode_mean_tokens": True}
    save_pooling(folder, [("Pooling", "1_Pooling", pooling), ("Normalize", "2_Normalize", {})])
    return folder


def test_transformers_and_hasten_give_the_same_vectors(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, plot = tmp_path / "results.json", tmp_path / "plot.svg"
    sizes = ("--num-texts", "7", "--min-tokens", "1", "--max-tokens", "50", "--hf-batch-size", "3")
    outputs = ("--output-path", str(file), "--plot", str(plot))
    options = ("--compare", "--repetitions", "1", "--device", "cpu")
    assert main(["bench", "embed", str(folder), *sizes, *outputs, *options]) == 0
    report = json.loads(file.read_text())
    assert form_errors(report) == []
    own, other = report["results"][-1], report["results"][0]
    assert (own["engine"], other["engine"]) == ("hasten", "transformers")
    assert own["tokens"] == other["tokens"] > 7
    assert own["texts_per_second"] == pytest.approx(7 / own["median_seconds"])
    for agreement in report["agreement"]:
        assert agreement["minimum"] > 1 - 1e-6
        assert agreement["largest_difference"] < BOUND
    assert report["speedups"]["transformers"] == pytest.approx(other["median_seconds"] / own["median_seconds"])
    assert "hasten is" in capsys.readouterr().out
    assert plot.read_text().count("<title>hasten: ") == 2


def test_sentence_transformers_gives_the_same_vectors(folder: Path) -> None:
    theirs = SentenceTransformersEmbedder(str(folder), device=torch.device("cpu"), dtype=torch.float32, batch_size=4)
    with LLM(folder, device="cpu") as llm:
        prompts = texts(9, 1, 60, llm.config.vocab_size)
        _, (agreement,) = measure([theirs, HastenEmbedder(llm)], prompts)
    assert agreement.largest_difference < BOUND


def test_vllm_gets_all_texts_as_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    built: dict[str, Any] = {}

    class Llm:
        def __init__(self, **options: Any) -> None:
            built.update(options)
            if options["model"] == "odd":
                raise ValueError("no such\nmodel")

        def embed(self, prompts: list[Any], use_tqdm: bool) -> list[Any]:
            result = [[float(prompt["prompt_token_ids"][0]), 0.0] for prompt in prompts]
            return [SimpleNamespace(outputs=SimpleNamespace(embedding=each)) for each in result]

    package = ModuleType("vllm")
    package.LLM = Llm  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm", package)
    options: dict[str, Any] = {"device": torch.device("cpu"), "dtype": torch.float16, "max_len": 9}
    monkeypatch.setattr("hasten.bench.embed_others.find_spec", lambda _: None)
    assert vllm_embedder("folder", load_format="auto", **options) == NotMeasured("vLLM", "it is not installed")
    monkeypatch.setattr("hasten.bench.embed_others.find_spec", lambda _: package)
    assert vllm_embedder("odd", load_format="auto", **options) == NotMeasured("vLLM", "no such")
    engine = vllm_embedder("folder", load_format="dummy", **options)
    assert isinstance(engine, VllmEmbedder)
    vectors, seconds = engine.embed([[3, 4], [5]])
    assert (vectors.tolist(), seconds > 0) == ([[1.0, 0.0], [1.0, 0.0]], True)
    assert (built["runner"], built["dtype"], built["load_format"]) == ("pooling", "float16", "dummy")
    assert built["skip_tokenizer_init"], "the texts are token ids, and the folder may have no tokenizer"


@pytest.mark.parametrize("mode", get_args(Pooling))
def test_padded_texts_are_pooled_as_flat_ones(mode: Pooling) -> None:
    torch.manual_seed(0)
    counts = [4, 1, 3]
    flat = [torch.randn(count, 6) for count in counts]
    hidden, mask = torch.full((3, 4, 6), 9.0), torch.zeros(3, 4, dtype=torch.int64)
    for row, part in enumerate(flat):
        hidden[row, : len(part)], mask[row, : len(part)] = part, 1
    torch.testing.assert_close(pooled(hidden, mask, mode), pool(torch.cat(flat), counts, mode))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--min-tokens", "9", "--max-tokens", "8"), "--min-tokens is 9, above --max-tokens, 8"),
        (("--max-tokens", "4000"), "--max-tokens is 4000; the model takes at most 320"),
    ],
)
def test_what_is_wrong_is_one_line(
    folder: Path, options: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "embed", str(folder), *options, "--device", "cpu"]) == 2
    assert message in capsys.readouterr().err
