"""Logits of a model as the engine computes them."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hasten.core.config import EngineConfig
from hasten.engine.sequence import Sequence
from hasten.engine.worker import Message, NewSequence, Worker
from hasten.parallel.launch import Ranks

DECODED = 3
"""Tokens that follow each prompt, one a step."""


def engine_logits(
    folder: Path, prompts: list[list[int]], followed_by: list[list[int]], device: str, **options: Any
) -> list[Tensor]:
    """Logits [t, v] in fp32 of every token, from the engine's own steps: prompts, chunks and decodes together."""
    # steps that overlap would read their own tokens, not the ones that are to follow
    config = EngineConfig.create(str(folder), device=device, overlap_steps=False, **options)
    worker = Worker(config, Ranks(None, None, device))
    found: dict[str, list[Tensor]] = {str(number): [] for number in range(len(prompts))}

    def keep(positions: list[tuple[Sequence, int]], logits: Tensor) -> None:
        for (sequence, position), row in zip(positions, logits.split(1), strict=True):
            assert len(found[sequence.request_id]) == position
            # a copy: a graph's logits are overwritten by its next replay
            found[sequence.request_id].append(row.float().clone())

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
        message = Message(tokens=[], finished=[], moves=[], added=[], prompt_tokens=None, stop=False)
        with torch.inference_mode():
            hidden, rows = worker.compute(batch, keep)
            logits = worker.runner.logits(hidden, rows)
            greedy = worker.runner.greedy(hidden, rows)
        assert logits is not None
        assert torch.equal(logits.gather(1, greedy.long().unsqueeze(1)), logits.amax(1, keepdim=True))
        for row, place in enumerate(batch.sampled):
            sequence = batch.sequences[place]
            if sequence.output_len > 0:
                # a copy here, too
                found[sequence.request_id].append(logits[row : row + 1].float().clone())
            if sequence.output_len < DECODED:
                token = followed_by[int(sequence.request_id)][sequence.output_len]
                message["tokens"].append((sequence.key, token))
            else:
                message["finished"].append(sequence.key)
        worker.scheduler.advance(batch)
        worker.apply(message)
    return [torch.cat(found[str(number)]) for number in range(len(prompts))]
