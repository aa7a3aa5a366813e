"""Logits of a model as the engine computes them."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hasten.core.config import EngineConfig
from hasten.core.types import Request, SamplingParams
from hasten.engine.block_manager import BlockManager
from hasten.engine.scheduler import Scheduler
from hasten.engine.sequence import Sequence
from hasten.engine.step_message import StepMessage, TableRows
from hasten.engine.worker import Worker
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
    scheduler = Scheduler(worker.scheduler_config, BlockManager(worker.num_blocks, config.cache.block_size))
    tables = TableRows(worker.scheduler_config.max_num_seqs)
    found: dict[str, list[Tensor]] = {str(number): [] for number in range(len(prompts))}
    params = SamplingParams(max_tokens=DECODED + 1, prompt_logprobs=0)
    for number, ids in enumerate(prompts):
        scheduler.add(Sequence(Request(request_id=str(number), prompt_token_ids=tuple(ids), params=params), 0))
    while scheduler.has_work:
        batch = scheduler.schedule()
        message = StepMessage.of(batch, tables)
        runs = list(batch.prompt_runs())
        positions = [(run.sequence, position) for run in runs for position, _ in enumerate(run.rows, run.first)]

        def keep(piece: slice, logits: Tensor, positions: list[tuple[Sequence, int]] = positions) -> None:
            for (sequence, position), row in zip(positions[piece], logits.split(1), strict=True):
                assert len(found[sequence.request_id]) == position
                # a copy: a graph's logits are overwritten by its next replay
                found[sequence.request_id].append(row.float().clone())

        with torch.inference_mode():
            hidden = worker.compute(message, keep)
            logits = worker.runner.logits(hidden, message.sampled_rows)
            greedy = worker.runner.greedy(hidden, message.sampled_rows)
        assert logits is not None
        assert torch.equal(logits.gather(1, greedy.long().unsqueeze(1)), logits.amax(1, keepdim=True))
        chosen = [batch.sequences[index] for index in batch.sampled]
        for row, sequence in enumerate(chosen):
            if sequence.output_len > 0:
                # a copy here, too
                found[sequence.request_id].append(logits[row : row + 1].float().clone())
        scheduler.advance(batch)
        for sequence in chosen:
            known = len(sequence.token_ids) - sequence.prompt_len
            if known < DECODED:
                sequence.append(followed_by[int(sequence.request_id)][known])
            else:
                scheduler.finish(sequence.key)
    return [torch.cat(found[str(number)]) for number in range(len(prompts))]
