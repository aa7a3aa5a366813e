"""Steps of single tokens on a CPU as recordings: one call instead of hundreds.

The first step of a number of tokens is computed op by op, and the kernels that it launches are recorded; later steps
of that number overwrite its inputs and run the recording. It is a CPU's counterpart of `graphs.py`, without padding: a
recording costs nothing but memory. Where torch computes a part of a model, its steps are computed op by op for ever.

A few tokens of a sequence behind others, those that a grammar forced or the rest of a prompt, are computed as single
ones, too: all keys of a layer are stored before any query reads them.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from hasten import ops
from hasten.engine.graphs import Prepare, StepOutput
from hasten.engine.inputs import Inputs, Tokens
from hasten.engine.step_message import StepMessage

if TYPE_CHECKING:
    from hasten.ops.native.record import Recording

_MOST_TOKENS = 256
"""Of a recorded step: those of more tokens take so long that launching them does not matter."""
_FEW_TOKENS = 16
"""Of a sequence, computed as single ones. More are left to attention that reads their keys once for all of them."""
_MOST_JOINED, _MOST_LOGITS = 64, 1 << 20
"""Tokens and logits of a recorded step in which a sequence has several: there are many such numbers of tokens, each
with memory of its own."""


@dataclass(frozen=True)
class _Recorded:
    """A recorded step, and the memory that it reads."""

    recording: "Recording"
    numbers: "np.ndarray[tuple[int, int], np.dtype[np.int64]]"
    """[5, t]: ids, positions, slots, rows of the block tables, lengths; [7, t] with the last two of encoded inputs."""
    output: StepOutput


class RecordedSteps:
    """Recordings of all numbers of tokens so far."""

    def __init__(self, compute: Callable[[Tokens], StepOutput], inputs: Inputs, vocabulary: int) -> None:
        """`vocabulary`: logits of a token; 0 where another stage computes them."""
        self._compute = compute
        self._inputs = inputs
        self._tables = torch.from_numpy(inputs.tables.array)
        self._recorded: dict[int, _Recorded] = {}
        self._can_record = ops.records()
        self._most_joined = min(_MOST_JOINED, _MOST_LOGITS // max(1, vocabulary))

    @property
    def has_recorded(self) -> bool:
        """Whether kernels alone compute the model's steps of single tokens."""
        return bool(self._recorded)

    def replay(self, message: StepMessage, prepare: Prepare) -> StepOutput | None:
        """Run a step of single tokens; None where it has to be computed in another way."""
        count, sequences = message.num_tokens, len(message.rows)
        most = _MOST_TOKENS if count == sequences else self._most_joined
        if not self._can_record or count > most or not _is_plain(message):
            return None
        inputs, recorded = self._inputs, self._recorded.get(count)
        inputs.tables.apply(message.edits)
        width = 7 if inputs.has_encoder else 5
        numbers = np.empty((width, count), dtype=np.int64) if recorded is None else recorded.numbers
        ids, positions, slots, rows, lengths, *given = numbers
        ids[:] = message.ids
        if count == sequences:
            positions[:], rows[:] = message.starts, message.rows
        else:
            counts = np.array(message.counts)
            first = np.array(message.starts) - np.cumsum(counts) + counts
            positions[:], rows[:] = np.arange(count) + np.repeat(first, counts), np.repeat(message.rows, counts)
        np.add(positions, 1, out=lengths)
        blocks, offsets = np.divmod(positions, inputs.block_size)
        slots[:] = inputs.tables.array[rows, blocks]
        slots *= inputs.block_size
        slots += offsets
        if given:
            given[0][:] = np.repeat(message.input_rows, message.counts)
            given[1][:] = np.repeat(message.input_lens, message.counts)
        if message.moves:
            # Full blocks have changed hands by the edits, so that only what is behind them is still to follow.
            prepare(message, torch.from_numpy(inputs.tables.array[rows, : int(blocks.max()) + 1]))
        if recorded is None:
            output = self._record(numbers)
        else:
            recorded.recording.run()
            output = recorded.output
        return output if count == sequences else self._of_last(output, message.counts)

    def _of_last(self, output: StepOutput, counts: list[int]) -> StepOutput:
        """What a step leaves of each sequence's last token; of all in a stage that makes no logits of them."""
        if output.local_logits is None or output.tokens is None:
            return output
        last = torch.from_numpy(np.cumsum(counts) - 1)
        # where a step of as many single tokens leaves them, the choice of tokens has been recorded
        single = self._recorded.get(len(counts))
        logits = None if single is None else single.output.local_logits
        logits = torch.index_select(output.local_logits, 0, last, out=logits)
        return StepOutput(output.hidden.index_select(0, last), logits, output.tokens.index_select(0, last))

    def _record(self, numbers: "np.ndarray[tuple[int, int], np.dtype[np.int64]]") -> StepOutput:
        """Compute the first step of its number of tokens."""
        ids, positions, slots, rows, lengths, *given = torch.from_numpy(numbers)
        cross = self._seen(slots, *given) if given else None
        meta = self._seen(slots, rows, lengths, cross)
        with ops.recorded() as recording:
            output = self._compute(Tokens(ids, positions, meta, any_pending=False))
        if recording.is_whole:
            self._recorded[len(ids)] = _Recorded(recording, numbers, output)
        else:
            self._can_record = False
        return output

    def _seen(
        self, slots: Tensor, rows: Tensor, lengths: Tensor, cross: ops.AttentionMeta | None = None
    ) -> ops.AttentionMeta:
        """What single tokens attend to: so many keys of each in blocks of these rows of the tables."""
        return ops.AttentionMeta(
            num_tokens=len(rows),
            block_tables=self._tables,
            slot_mapping=slots,
            sequences=rows.tolist(),
            query_lens=[1] * len(rows),
            kv_lens=lengths.tolist(),
            numbers=(rows, lengths),
            cross=cross,
        )


def _is_plain(message: StepMessage) -> bool:
    """Whether a step is one of single tokens that are all known, or of a few of a sequence, and nothing else."""
    return (
        len(message.rows) > 0
        and (len(message.rows) == message.num_tokens or _has_few(message))
        and min(message.needed) == 1
        and not (message.prompt_rows or len(message.positions) or message.encoder_counts)
        and min(message.ids) >= 0
    )


def _has_few(message: StepMessage) -> bool:
    """Whether each sequence has one token in a step, or a few behind others, of which the last one chooses the next."""
    pairs = zip(message.counts, message.starts, strict=True)
    are_few = all(count == 1 or (count <= _FEW_TOKENS and start > 0) for count, start in pairs)
    return are_few and max(message.needed) == 1 and not message.moves
