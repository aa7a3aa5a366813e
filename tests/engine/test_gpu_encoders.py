"""Encoders on a GPU, in half precision, compared with transformers in fp32."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.encoders import TEXTS, save_encoder, their_output, theirs

from hasten import LLM

pytestmark = pytest.mark.gpu

LENGTHS = (1, 2, 16, 17, 63, 64, 65, 129, 300)
PROMPTS: list[Any] = [[5 + (7 * place + length) % 50 for place in range(length)] for length in LENGTHS]


@pytest.mark.parametrize("dtype", ["fp16", "bf16", "fp32"])
@pytest.mark.parametrize("family", ["Bert", "MPNet", "ModernBert"])
def test_vectors(family: str, dtype: str, tmp_path: Path) -> None:
    folder = save_encoder(tmp_path, family, hidden_size=64, intermediate_size=128, initializer_range=0.1)
    model = theirs(folder)
    with LLM(folder, device="cuda", dtype=dtype) as llm:
        for output in llm.embed([*PROMPTS, *TEXTS], use_tqdm=False):
            expected = their_output(model, output.prompt_token_ids).mean(0)
            cosine = torch.nn.functional.cosine_similarity(torch.tensor(output.outputs.embedding), expected, dim=0)
            assert cosine > {"fp16": 0.9999, "bf16": 0.999, "fp32": 0.99999}[dtype]


def test_overlapped_steps_change_nothing(tmp_path: Path) -> None:
    folder = save_encoder(tmp_path, "Bert")
    texts = TEXTS * 40
    found = []
    for overlap in (False, True):
        with LLM(folder, device="cuda", dtype="fp32", overlap_steps=overlap, max_num_batched_tokens=512) as llm:
            found.append([torch.tensor(output.outputs.embedding) for output in llm.embed(texts, use_tqdm=False)])
    assert all(torch.allclose(first, other, atol=1e-5) for first, other in zip(*found, strict=True))
