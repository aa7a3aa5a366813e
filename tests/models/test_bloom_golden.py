"""Greedy tokens and log-probabilities of small BLOOMs, as they were when they were written down.

A change of the layers, the ops or the loading that changes what a BLOOM computes shows here, also where transformers
changes with it. The weights come from numpy's frozen generator, so that they are the same everywhere.
"""

import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hasten import LLM, SamplingParams

GOLDEN = Path(__file__).with_name("bloom_golden.json")
BOUND = 2e-4
"""Largest difference between two log-probabilities: fp32 sums in another order, three layers deep."""
COUNT = 10

MODELS: dict[str, dict[str, Any]] = {
    "8 heads": {},
    "12 heads": {"n_head": 12, "hidden_size": 96},
    "untied, residual after the norm": {
        "tie_word_embeddings": False,
        "apply_residual_connection_post_layernorm": True,
        "vocab_size": 211,
    },
}
PROMPTS = [[5, 9, 30], [7] * 16, list(range(40, 73)), [200, 4, 100, 150, 8, 8, 1]]


def fill(model: torch.nn.Module) -> None:
    """Values that depend on names alone: norms near 1 and 0, all else wide enough that logits differ clearly."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            drawn = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(tuple(parameter.shape))
            values = torch.from_numpy(drawn.astype(np.float32))
            is_norm = "layernorm" in name or "ln_f" in name
            parameter.copy_(values * (0.1 if is_norm else 0.2) + float(is_norm and name.endswith("weight")))


@pytest.fixture(scope="module", params=list(MODELS))
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    from transformers import BloomConfig, BloomForCausalLM

    sizes: dict[str, Any] = {"vocab_size": 208, "hidden_size": 64, "n_layer": 3, "n_head": 8, "seq_length": 128}
    model = BloomForCausalLM(BloomConfig(**(sizes | MODELS[request.param])))
    fill(model)
    folder = tmp_path_factory.mktemp("golden")
    model.save_pretrained(folder)
    return request.param, folder


def by_hasten(folder: Path) -> list[dict[str, Any]]:
    params = SamplingParams(temperature=0, max_tokens=COUNT, ignore_eos=True, logprobs=0)
    with LLM(folder, device="cpu", dtype="fp32", kv_cache_memory=1 << 22) as llm:
        outputs = [output.outputs[0] for output in llm.generate(PROMPTS, params)]
    found = []
    for output in outputs:
        assert output.logprobs is not None
        tokens = list(output.token_ids)
        rows = zip(tokens, output.logprobs, strict=True)
        found.append({"tokens": tokens, "logprobs": [row[token].logprob for token, row in rows]})
    return found


def by_transformers(folder: Path) -> list[dict[str, Any]]:
    from transformers import BloomForCausalLM

    model = BloomForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    found = []
    for prompt in PROMPTS:
        ids, logprobs = list(prompt), []
        for _ in range(COUNT):
            with torch.inference_mode():
                row = model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
            ids.append(int(row.argmax()))
            logprobs.append(float(row.max()))
        found.append({"tokens": ids[len(prompt) :], "logprobs": logprobs})
    return found


def test_tokens_and_logprobs_are_those_that_were_written_down(saved: tuple[str, Path]) -> None:
    name, folder = saved
    expected = json.loads(GOLDEN.read_text(encoding="utf-8"))[name]
    for found in (by_hasten(folder), by_transformers(folder)):
        assert [row["tokens"] for row in found] == [row["tokens"] for row in expected]
        for row, golden in zip(found, expected, strict=True):
            assert row["logprobs"] == pytest.approx(golden["logprobs"], abs=BOUND)
