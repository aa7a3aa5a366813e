"""Steps of single tokens that are recorded on a CPU, compared with those that are computed op by op."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.encoder_decoders import save_encoder_decoder

from hasten import LLM, SamplingParams
from hasten.core.dtypes import Quantization
from hasten.engine.graphs import Prepare, StepOutput
from hasten.engine.recorded import RecordedSteps
from hasten.engine.step_message import StepMessage
from hasten.ops import native

pytest.importorskip("numba", reason="there are no kernels without it")

from hasten.ops.native import launch

DEMO = Path(__file__).parents[2] / "examples" / "demo-model"
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "bloom": ("Bloom", {"n_head": 4}),
    "llama": ("Llama", {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}),
    "t5": ("T5", {"d_kv": 16, "num_heads": 4}),
    "experts, of which torch computes parts": ("Mixtral", {}),
}


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_recorded_steps_give_what_their_ops_give(
    family: str, dtype: str, make_model: Callable[..., Path], tmp_path: Path
) -> None:
    name, options = FAMILIES[family]
    folder = save_encoder_decoder(tmp_path, "t5", **options) if name == "T5" else make_model(name, **options)
    prompts = [[(7 * n + index) % 90 + 4 for index in range(n)] for n in (1, 2, 15, 16, 17, 40)]
    params = [SamplingParams(max_tokens=5 + 3 * n, temperature=0, ignore_eos=True, n=1 + n % 2) for n in range(6)]
    params[2] = SamplingParams(max_tokens=20, temperature=0.8, seed=3, ignore_eos=True, logprobs=1)
    params[4] = SamplingParams(max_tokens=20, beam_width=3, n=3, ignore_eos=True)
    limits: dict[str, Any] = {"max_num_seqs": 5, "max_num_batched_tokens": 48, "enable_prefix_caching": False}
    limits["dtype"] = dtype

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


def test_a_few_tokens_of_a_sequence_are_recorded_as_single_ones() -> None:
    choices = ["yes, of course it is", "no, not at all", "not yet"]
    params = [
        SamplingParams(choice=choices, temperature=0, max_tokens=30),
        SamplingParams(regex="Anna (and|or) Ben went to the (garden|house) again", temperature=0.9, seed=4),
        SamplingParams(temperature=0, max_tokens=30, repetition_penalty=1.2),
        SamplingParams(choice=choices, temperature=0.9, seed=3, max_tokens=30),
    ]
    prompts = ["Anna", "Once upon a time there was", "The", "In the garden by the house there was a tree, and a bird"]

    def generated(llm: LLM) -> tuple[list[list[int]], int]:
        before = llm.engine.stats.steps
        outputs = llm.generate(prompts, params)
        return [output.outputs[0].token_ids for output in outputs], llm.engine.stats.steps - before

    with LLM(DEMO, device="cpu", overlap_steps=False, enforce_eager=True, enable_prefix_caching=False) as llm:
        expected = generated(llm)
    with LLM(DEMO, device="cpu", overlap_steps=False, enable_prefix_caching=False) as llm:
        steps = llm.engine.worker.runner._graphs
        assert isinstance(steps, RecordedSteps)
        replayed, replay = list[tuple[int, bool]](), steps.replay

        def watched(message: StepMessage, prepare: Prepare) -> StepOutput | None:
            output = replay(message, prepare)
            replayed.append((message.num_tokens - len(message.rows), output is not None))
            return output

        steps.replay = watched  # type: ignore[method-assign]
        for _ in range(2):
            assert generated(llm) == expected
    assert all(was for more, was in replayed if not more)
    assert sum(was for more, was in replayed if more) > 2, "forced tokens"
