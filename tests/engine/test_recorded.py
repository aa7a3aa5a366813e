"""Steps of single tokens that are recorded on a CPU, compared with those that are computed op by op."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hasten import LLM, SamplingParams
from hasten.engine.recorded import RecordedSteps

pytest.importorskip("numba", reason="there are no kernels without it")

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "bloom": ("Bloom", {"n_head": 4}),
    "llama": ("Llama", {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}),
    "experts, of which torch computes parts": ("Mixtral", {}),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_recorded_steps_give_what_their_ops_give(family: str, make_model: Callable[..., Path]) -> None:
    name, options = FAMILIES[family]
    folder = make_model(name, **options)
    prompts = [[(7 * n + place) % 90 + 4 for place in range(n)] for n in (1, 2, 15, 16, 17, 40)]
    params = [SamplingParams(max_tokens=5 + 3 * n, temperature=0, ignore_eos=True, n=1 + n % 2) for n in range(6)]
    params[2] = SamplingParams(max_tokens=20, temperature=0.8, seed=3, ignore_eos=True, logprobs=1)
    params[4] = SamplingParams(max_tokens=20, beam_width=3, n=3, ignore_eos=True)
    limits: dict[str, Any] = {"max_num_seqs": 5, "max_num_batched_tokens": 48, "enable_prefix_caching": False}

    def generated(llm: LLM) -> list[list[int]]:
        return [one.token_ids for output in llm.generate(prompts, params) for one in output.outputs]

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
    assert len(known) > 2 if family in ("bloom", "llama") else not known
