"""Logits of a model as the engine computes them, and as Hugging Face does."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.engine_logits import DECODED, engine_logits
from torch import Tensor

BOUND = 1e-4
"""Largest difference between two logits."""

_TOKENS = 200
"""Prompts are of the first so many, which every vocabulary has."""

Worst = Callable[..., float]


def _random_ids(lengths: list[int], vocab_size: int = _TOKENS) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(vocab_size, (length,), generator=generator).tolist() for length in lengths]


def load_theirs(folder: Path) -> Any:
    """Hugging Face's model in fp32."""
    from transformers import AutoConfig, AutoModelForCausalLM

    # Gemma's scores are capped in eager attention alone, and Falcon's biases by ALiBi added twice there
    attention = "sdpa" if AutoConfig.from_pretrained(folder).model_type == "falcon" else "eager"
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation=attention).eval()


def _their_logits(folder: Path, texts: list[list[int]]) -> list[Tensor]:
    """Logits [t, v] of each text alone: no padding, no cache."""
    model = load_theirs(folder)
    with torch.inference_mode():
        return [model(torch.tensor([ids])).logits[0] for ids in texts]


@pytest.fixture(scope="session")
def their_logits() -> Callable[[Path, list[int]], list[Tensor]]:
    """Logits [t, v] of random prompts of these lengths, each followed by a few tokens."""
    known: dict[tuple[Path, tuple[int, ...]], list[Tensor]] = {}

    def logits(folder: Path, lengths: list[int]) -> list[Tensor]:
        key = folder, tuple(lengths)
        if key not in known:
            prompts, followed_by = _random_ids(lengths), _random_ids([DECODED] * len(lengths))
            known[key] = _their_logits(folder, [a + b for a, b in zip(prompts, followed_by, strict=True)])
        return known[key]

    return logits


@pytest.fixture(scope="session")
def worst_logit(their_logits: Callable[[Path, list[int]], list[Tensor]]) -> Worst:
    """The largest difference between the engine's logits and Hugging Face's, over prompts of these lengths."""

    def worst(folder: Path, lengths: list[int], **options: Any) -> float:
        expected = their_logits(folder, lengths)
        assert all(logits.std() > 0.1 for logits in expected), "a bound means something only if logits differ by more"
        prompts, followed_by = _random_ids(lengths), _random_ids([DECODED] * len(lengths))
        limits: dict[str, Any] = {"dtype": "fp32", "kv_cache_memory": 16 << 20}
        found = engine_logits(folder, prompts, followed_by, "cpu", **limits, **options)
        assert [logits.shape for logits in found] == [logits.shape for logits in expected]
        return max(float((ours - theirs).abs().max()) for ours, theirs in zip(found, expected, strict=True))

    return worst
