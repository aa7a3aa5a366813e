"""Encoder-decoders on a GPU, in graphs and kernel by kernel, compared with transformers."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.encoder_decoders import KINDS, save_encoder_decoder, their_logprobs, their_tokens, without_padding

from hasten import LLM, SamplingParams

pytestmark = pytest.mark.gpu

PROMPTS = [[(7 * n + k * k) % 190 + 5 for k in range(n)] for n in (1, 2, 16, 17, 63, 64, 65, 150, 400)]
GREEDY = SamplingParams(temperature=0, max_tokens=40, min_tokens=40)


@pytest.mark.parametrize("eager", [False, True], ids=["graphs", "kernel by kernel"])
@pytest.mark.parametrize("kind", KINDS)
def test_tokens_and_beams(kind: str, eager: bool, tmp_path: Path) -> None:
    folder = save_encoder_decoder(tmp_path, kind)
    expected = their_tokens(folder, PROMPTS, min_new_tokens=40, max_new_tokens=40)
    beams = their_tokens(folder, PROMPTS, max_new_tokens=10, num_beams=3)
    with LLM(folder, device="cuda", dtype="fp32", enforce_eager=eager, kv_cache_memory=1 << 26) as llm:
        for _ in range(2):
            assert [[list(o.outputs[0].token_ids)] for o in llm.generate(PROMPTS, GREEDY, use_tqdm=False)] == expected
        found = llm.generate(PROMPTS, SamplingParams(max_tokens=10, beam_width=3), use_tqdm=False)
        assert [[without_padding(folder, list(output.outputs[0].token_ids))] for output in found] == beams


# UMT5's layers are mT5's, and transformers' versions differ in whether its logits are scaled.
@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "umt5"])
def test_log_probabilities_in_half_precision(kind: str, dtype: str, tmp_path: Path) -> None:
    # T5's scores are not scaled: with larger weights, gated units amplify what half types round, on any device
    factor = {"initializer_factor": 1.0} if "t5" in kind else {}
    folder = save_encoder_decoder(tmp_path, kind, **factor)
    params = SamplingParams(seed=3, logprobs=5, max_tokens=40, ignore_eos=True)
    with LLM(folder, device="cuda", dtype=dtype, kv_cache_memory=1 << 26) as llm:
        outputs = llm.generate(PROMPTS, params, use_tqdm=False)
    errors = []
    for prompt, output in zip(PROMPTS, outputs, strict=True):
        found = output.outputs[0]
        assert found.logprobs is not None
        right = their_logprobs(folder, prompt, found.token_ids)
        for index, top in enumerate(found.logprobs):
            errors += [abs(entry.logprob - float(right[index, token])) for token, entry in top.items()]
    assert torch.tensor(errors).mean() < {"fp16": 0.01, "bf16": 0.08}[dtype]


def test_a_small_cache(tmp_path: Path) -> None:
    folder, prompts = save_encoder_decoder(tmp_path, "t5"), PROMPTS[:-1]
    expected = their_tokens(folder, prompts, min_new_tokens=40, max_new_tokens=40)
    with LLM(folder, device="cuda", dtype="fp32", kv_cache_memory=1 << 20) as llm:
        block = llm.engine.worker.runner.block_bytes
    # 28 blocks for the prompts, and 3 for each of 8 outputs
    limits: dict[str, Any] = {"max_model_len": 200, "max_num_seqs": 8, "kv_cache_memory": 40 * block}
    with LLM(folder, device="cuda", dtype="fp32", **limits) as llm:
        assert [[list(o.outputs[0].token_ids)] for o in llm.generate(prompts, GREEDY, use_tqdm=False)] == expected
        assert llm.engine.scheduler.stats.preemptions > 0
