"""Steps of single tokens that are recorded on a CPU, compared with those that are computed op by op."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.encoder_decoders import save_encoder_decoder

from hasten import LLM, SamplingParams
from hasten.core.dtypes import Quantization
from hasten.engine.recorded import RecordedSteps
from hasten.ops import native

pytest.importorskip("numba", reason="there are no kernels without it")

from hasten.ops.native import launch

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "bloom": ("Bloom", {"n_head": 4}),
    "llama": ("Llama", {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}),
    "t5": ("T5", {"d_kv": 16, "num_heads": 4}),
    "experts, of which torch computes parts": ("Mixtral", {}),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_recorded_steps_give_what_their_ops_give(family: str, make_model: Callable[..., Path], tmp_path: Path) -> None:
    name, options = FAMILIES[family]
    folder = save_encoder_decoder(tmp_path, "t5", **options) if name == "T5" else make_model(name, **options)
    prompts = [[(7 * n + index) % 90 + 4 for index in range(n)] for n in (1, 2, 15, 16, 17, 40)]
    params = [SamplingParams(max_tokens=5 + 3 * n, temperature=0, ignore_eos=True, n=1 + n % 2) for n in range(6)]
    params[2] = SamplingParams(max_tokens=20, temperature=0.8, seed=3, ignore_eos=True, logprobs=1)
    params[4] = SamplingParams(max_tokens=20, beam_width=3, n=3, ignore_eos=True)
    limits: dict[str, Any] = {"max_num_seqs": 5, "max_num_batched_tokens": 48, "enable_prefix_caching": False}

    def generated(llm: LLM) -> list[list[int]]:
        return [item.token_ids for output in llm.generate(prompts, params) for item in output.outputs]

    with LLM(folder, device="cpu", kv_cache_memory=1 << 20, enforce_eager=True, **limits) as llm:
        assert llm.engine.worker.runner._graphs is None
        expected = generated(llm)
    with LLM(folder, device="cpu", kv_cache_memory=1 << 20, **limits) as llm:
        steps = llm.engine.worker.runner._graphs
        assert isinstance(steps, RecordedSteps)
        assert generated(llm) == expected
        known = set(steps._recorded)
        assert generated(llm) == expected
        assert set(steps._recorded) == known
    assert len(known) > 2 if family in ("bloom", "llama", "t5") else not known


@pytest.mark.parametrize("quantization", [None, "w8a8", "int4"])
@pytest.mark.parametrize("family", ["bloom", "llama"])
def test_any_number_of_threads_gives_the_same_bits(
    family: str, quantization: Quantization | None, make_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "FEW_OPERATIONS", 0)
    name, options = FAMILIES[family]
    prompts = [[(7 * n + index) % 90 + 4 for index in range(n)] for n in (1, 2, 15, 60, 17, 40)]
    params = SamplingParams(max_tokens=9, temperature=0, ignore_eos=True, logprobs=2)
    limits: dict[str, Any] = {"max_num_seqs": 5, "max_num_batched_tokens": 48, "enable_prefix_caching": False}
    before, found = torch.get_num_threads(), []
    with LLM(
        make_model(name, **options), device="cpu", quantization=quantization, kv_cache_memory=1 << 20, **limits
    ) as llm:
        runner = llm.engine.worker.runner
        assert not runner.any_threads
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            each_logprobs = [output.outputs[0].logprobs for output in llm.generate(prompts, params)]
            found.append(
                [
                    [{token: each.logprob for token, each in step.items()} for step in steps or ()]
                    for steps in each_logprobs
                ]
            )
        torch.set_num_threads(before)
        if quantization is None or native.integer_kernels() is not None:
            assert runner.any_threads
            assert found[0] == found[1] == found[2]
