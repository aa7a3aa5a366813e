"""Logits of a model as the engine computes them, and as Hugging Face does."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hasten.core.config import EngineConfig
from hasten.engine.sequence import Sequence
from hasten.engine.worker import Message, NewSequence, Worker
from hasten.parallel.launch import Ranks

DECODED = 3
"""Tokens that follow each prompt, one a step."""
BLOCK_SIZE = 16
BOUND = 1e-4
"""Largest difference between two logits."""

_TOKENS = 200
"""Prompts are of the first so many, which every vocabulary has."""

Worst = Callable[..., float]


def _random_ids(lengths: list[int], vocab_size: int = _TOKENS) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(vocab_size, (length,), generator=generator).tolist() for length in lengths]


def _our_logits(folder: Path, prompts: list[list[int]], followed_by: list[list[int]], **options: Any) -> list[Tensor]:
    """Logits [t, v] of every token, from the steps that the engine makes: prompts, chunks and decodes together."""
    config = EngineConfig.create(
        str(folder), dtype="fp32", device="cpu", block_size=BLOCK_SIZE, kv_cache_memory=16 << 20, **options
    )
    worker = Worker(config, Ranks(None, None, "cpu"))
    found: dict[str, list[Tensor]] = {str(number): [] for number in range(len(prompts))}

    def keep(positions: list[tuple[Sequence, int]], logits: Tensor) -> None:
        for (sequence, position), row in zip(positions, logits.split(1), strict=True):
            assert len(found[sequence.request_id]) == position
            found[sequence.request_id].append(row)

    added = [
        NewSequence(
            request_id=str(number),
            token_ids=ids,
            n=1,
            beam_width=1,
            max_tokens=DECODED + 1,
            plain=False,
            prompt_logprobs=True,
            due=0,
        )
        for number, ids in enumerate(prompts)
    ]
    worker.apply(Message(tokens=[], finished=[], moves=[], added=added, prompt_tokens=None, stop=False))
    while worker.scheduler.has_work:
        batch = worker.scheduler.schedule()
        with torch.inference_mode():
            logits = worker.runner.logits(*worker.compute(batch, keep))
        assert logits is not None
        message = Message(tokens=[], finished=[], moves=[], added=[], prompt_tokens=None, stop=False)
        for row, place in enumerate(batch.sampled):
            sequence = batch.sequences[place]
            if sequence.output_len > 0:
                found[sequence.request_id].append(logits[row : row + 1])
            if sequence.output_len < DECODED:
                token = followed_by[int(sequence.request_id)][sequence.output_len]
                message["tokens"].append((sequence.key, token))
            else:
                message["finished"].append(sequence.key)
        worker.scheduler.advance(batch)
        worker.apply(message)
    return [torch.cat(found[str(number)]) for number in range(len(prompts))]


def _their_logits(folder: Path, texts: list[list[int]]) -> list[Tensor]:
    """Logits [t, v] of each text alone: no padding, no cache."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
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
        found = _our_logits(folder, _random_ids(lengths), _random_ids([DECODED] * len(lengths)), **options)
        assert [logits.shape for logits in found] == [logits.shape for logits in expected]
        return max(float((ours - theirs).abs().max()) for ours, theirs in zip(found, expected, strict=True))

    return worst
