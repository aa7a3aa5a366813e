from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from hasten.bench.engines import Engine, HastenEngine, HuggingFaceEngine, load_hugging_face, text_model
from hasten.cli.main import main
from hasten.core.config import EngineConfig
from hasten.core.errors import ConfigError, HastenError, UnsupportedError
from hasten.core.types import SamplingParams
from hasten.engine.llm import LLM

PROMPTS = [[373, 336, 387], [408, 445, 120, 130, 140, 150], [77], [90, 91, 92, 93]]
LENGTHS = [3, 9, 1, 5]


def both(folder: Path, **options: int) -> tuple[list[list[int]], list[list[int]]]:
    with LLM(folder) as llm:
        hf: Engine = HuggingFaceEngine(str(folder), batch_size=options.get("hf"))
        ours: Engine = HastenEngine(llm, batch_size=options.get("ours"))
        return hf.generate(PROMPTS, LENGTHS).token_ids, ours.generate(PROMPTS, LENGTHS).token_ids


@pytest.mark.parametrize("options", [{}, {"hf": 2}, {"hf": 1, "ours": 3}])
def test_both_engines_make_the_same_tokens_of_the_lengths_asked_for(tiny_bloom: Path, options: dict[str, int]) -> None:
    hf, ours = both(tiny_bloom, **options)
    assert [len(ids) for ids in ours] == LENGTHS
    assert hf == ours


def test_the_end_token_ends_neither(make_bloom: Callable[..., Path]) -> None:
    # whatever comes first is made the end token, so that both would stop at once if they looked at it
    folder = make_bloom()
    first = both(folder)[1][1][0]
    hf, ours = both(make_bloom(eos_token_id=first))
    assert ours[1][0] == first
    assert [len(ids) for ids in hf] == LENGTHS
    assert hf == ours


def test_types_and_device_are_those_asked_for(tiny_bloom: Path) -> None:
    engine = HuggingFaceEngine(str(tiny_bloom), dtype="bf16", device="cpu")
    assert (engine.dtype, engine.device) == (torch.bfloat16, torch.device("cpu"))
    assert [len(ids) for ids in engine.generate(PROMPTS, LENGTHS).token_ids] == LENGTHS


def test_random_weights_from_a_config_alone(tiny_bloom: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((tiny_bloom / "config.json").read_bytes())
    with LLM(tmp_path, load_format="dummy") as llm:
        engines: list[Engine] = [HuggingFaceEngine(str(tmp_path), load_format="dummy"), HastenEngine(llm)]
        for engine in engines:
            assert [len(ids) for ids in engine.generate(PROMPTS, LENGTHS).token_ids] == LENGTHS


@pytest.mark.parametrize("dtype", ["fp16", "bf16", "fp32"])
def test_random_weights_are_finite_and_of_the_type_asked_for(tiny_bloom: Path, dtype: str) -> None:
    engine = HuggingFaceEngine(str(tiny_bloom), dtype=dtype, load_format="dummy")
    parameters = list(engine.model.parameters())
    assert {parameter.dtype for parameter in parameters} == {engine.dtype}
    assert all(parameter.isfinite().all() for parameter in parameters)
    assert any(parameter.std() > 0 for parameter in parameters)
    with torch.inference_mode():
        assert engine.model(torch.tensor([PROMPTS[1]])).logits.isfinite().all()


def test_random_weights_are_made_where_they_are_used(tiny_bloom: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **options: object) -> None:
        raise AssertionError("the model was made elsewhere and moved")

    monkeypatch.setattr(torch.nn.Module, "to", refuse)
    model = load_hugging_face(AutoModelForCausalLM, str(tiny_bloom), torch.float16, torch.device("meta"), "dummy")
    assert {(p.device.type, p.dtype) for p in model.parameters()} == {("meta", torch.float16)}


def test_sampling(tiny_bloom: Path) -> None:
    sampling = SamplingParams(temperature=0.8, top_k=5, top_p=0.9)
    with LLM(tiny_bloom) as llm:
        engines: list[Engine] = [HuggingFaceEngine(str(tiny_bloom), sampling=sampling), HastenEngine(llm, sampling)]
        for engine in engines:
            assert [len(ids) for ids in engine.generate(PROMPTS, LENGTHS).token_ids] == LENGTHS


def test_an_output_that_the_engine_must_cut_short_is_an_error(tiny_bloom: Path) -> None:
    with LLM(tiny_bloom, max_model_len=10) as llm, pytest.raises(ConfigError, match="raise --max-model-len"):
        HastenEngine(llm).generate([[5] * 8], [4])


@pytest.mark.parametrize("damage", ["none", "config", "weights"])
def test_folders_that_hugging_face_cannot_load(tiny_bloom: Path, tmp_path: Path, damage: str) -> None:
    if damage != "none":
        (tmp_path / "config.json").write_bytes((tiny_bloom / "config.json").read_bytes())
    if damage == "config":
        (tmp_path / "config.json").write_text("{")
    if damage == "weights":
        (tmp_path / "model.safetensors").write_bytes((tiny_bloom / "model.safetensors").read_bytes()[:1000])
    with pytest.raises(HastenError) as caught:
        HuggingFaceEngine(str(tmp_path))
    assert "\n" not in str(caught.value)


def test_hugging_face_has_the_threads_that_it_was_given(tiny_bloom: Path) -> None:
    before = torch.get_num_threads()
    engine = HuggingFaceEngine(str(tiny_bloom), threads=before + 1)
    seen: list[int] = []
    engine.model.register_forward_hook(lambda *_: seen.append(torch.get_num_threads()))
    engine.generate(PROMPTS, LENGTHS)
    assert set(seen) == {before + 1}
    assert torch.get_num_threads() == before


def test_a_quantized_checkpoint_is_a_text_model(tiny_bloom: Path, tmp_path: Path) -> None:
    assert main(["quantize", str(tiny_bloom), str(tmp_path / "int8"), "--scheme", "int8"]) == 0
    engine = EngineConfig(model=str(tmp_path / "int8"))
    assert text_model(engine, "this").architecture == "BloomForCausalLM"
    with pytest.raises(UnsupportedError, match="has quantized weights, but random ones are in full precision"):
        text_model(replace(engine, load_format="dummy"), "this")
    assert HuggingFaceEngine(engine.model).dtype == torch.float32
