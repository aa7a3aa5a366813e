"""Engines that hasten is compared with; vLLM, which needs a GPU, is stood in for by its interface."""

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from hasten.bench.against import Against, VllmEngine
from hasten.core.errors import ConfigError


def test_names_and_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    found = Against.parse("hf, openai=http://host:1/v1,openai=other")
    assert found == Against(("hf",), ("http://host:1/v1", "other"))
    assert Against.parse("none") == Against()
    assert str(Against.parse(str(found))) == "hf,openai=http://host:1/v1,openai=other"
    monkeypatch.setattr("hasten.bench.against.find_spec", lambda name: object())
    assert Against.parse("ctranslate2,vllm").engines == ("ctranslate2", "vllm")


@pytest.mark.parametrize("text", ["tgi", "hf,hf", "openai", "openai=", "", "vllm=http://host"])
def test_unknown_names(text: str) -> None:
    with pytest.raises(
        ConfigError, match=r"is no engine to compare with; give hf, vllm, ctranslate2, openai=URL or none"
    ):
        Against.parse(text)


@pytest.mark.parametrize("name", ["vllm", "ctranslate2"])
def test_a_missing_package_is_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hasten.bench.against.find_spec", lambda _: None)
    with pytest.raises(ConfigError, match=f"{name} is not installed; run: pip install {name}"):
        Against.parse(f"hf,{name}")


def test_vllm_gets_tokens_and_exact_lengths(monkeypatch: pytest.MonkeyPatch) -> None:
    built: dict[str, Any] = {}

    class Llm:
        def __init__(self, **options: Any) -> None:
            built.update(options)

        def generate(self, prompts: list[Any], params: list[Any], use_tqdm: bool) -> list[Any]:
            assert all(each.ignore_eos and each.temperature == 0 for each in params)
            ids = [
                prompt["prompt_token_ids"][:1] * each.max_tokens for prompt, each in zip(prompts, params, strict=True)
            ]
            return [SimpleNamespace(outputs=[SimpleNamespace(token_ids=tuple(each))]) for each in ids]

    package = ModuleType("vllm")
    package.LLM, package.SamplingParams = Llm, SimpleNamespace  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm", package)
    engine = VllmEngine("folder", dtype=torch.float16, device=torch.device("cpu"), max_len=99, memory=0.3, ranks=2)
    assert engine.generate([[7, 8], [9]], [2, 1]).token_ids == [[7, 7], [9]]
    engine.close()
    assert built["model"] == "folder"
    assert built["dtype"] == "float16"
    assert (built["max_model_len"], built["tensor_parallel_size"], built["gpu_memory_utilization"]) == (99, 2, 0.3)
    assert built["enable_prefix_caching"] is False
