"""Steps of single tokens as CUDA graphs: one launch instead of hundreds.

A graph is captured for each of a few batch sizes; a smaller batch is filled up with tokens of no sequence. It reads its
numbers from one tensor, which a step overwrites first, and the last step's tokens from where that step left them.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from hasten.core.errors import CapacityError
from hasten.engine.batch import Batch
from hasten.engine.inputs import DecodeLayout, Inputs, Tokens


@dataclass(frozen=True)
class StepOutput:
    """What a step leaves on the device."""

    hidden: Tensor
    """[r, h]"""
    local_logits: Tensor
    """[r, v / ranks]: this rank's shard of the logits."""
    tokens: Tensor
    """[r]: the most probable tokens, int32, on every rank."""

    def first(self, count: int) -> "StepOutput":
        """Without what fills the batch up."""
        return StepOutput(self.hidden[:count], self.local_logits[:count], self.tokens[:count])


@dataclass(frozen=True)
class _Graph:
    layout: DecodeLayout
    numbers: Tensor
    graph: torch.cuda.CUDAGraph
    output: StepOutput


def sizes(most: int) -> list[int]:
    """Batch sizes to capture, up to `most`: close together where a token more costs most."""
    wanted = [1, 2, 4, *range(8, 65, 8), *range(80, 257, 16), *range(288, most, 32), most]
    return sorted({size for size in wanted if size <= most})


class DecodeGraphs:
    """Graphs of all sizes, which share their memory."""

    def __init__(self, step: Callable[[Tokens], StepOutput], inputs: Inputs, max_sequences: int) -> None:
        self._inputs = inputs
        self._graphs: dict[int, _Graph] = {}
        largest = inputs.decode_layout(max_sequences).total
        self._numbers = torch.zeros(largest, dtype=torch.int32, device=inputs.device)
        stream, pool = torch.cuda.Stream(inputs.device), torch.cuda.graph_pool_handle()
        try:
            # The largest first: the others then fit into the memory that it took.
            for size in reversed(sizes(max_sequences)):
                self._graphs[size] = self._captured(step, inputs.decode_layout(size), stream, pool)
        except torch.OutOfMemoryError as error:
            raise CapacityError(
                "no memory is left for CUDA graphs; lower gpu_memory_utilization, kv_cache_memory or max_num_seqs, "
                f"or do without them (enforce_eager) ({str(error).partition(chr(10))[0]})"
            ) from error

    def _captured(
        self,
        step: Callable[[Tokens], StepOutput],
        layout: DecodeLayout,
        stream: torch.cuda.Stream,
        pool: "torch.cuda._POOL_HANDLE",
    ) -> _Graph:
        numbers = self._numbers[: layout.total]
        numbers.zero_()
        views = layout.views(numbers)
        views["slots"].fill_(-1)
        views["splits"][:, 0] = -1
        graph = torch.cuda.CUDAGraph()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            step(layout.tokens(numbers))  # compiles what is not compiled yet, which a capture must not do
            with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
                output = step(layout.tokens(numbers))
        torch.cuda.current_stream().wait_stream(stream)
        return _Graph(layout, numbers, graph, output)

    def replay(self, batch: Batch) -> StepOutput | None:
        """Run a batch of single tokens; None where it is larger than any graph."""
        count = len(batch.sequences)
        size = next((size for size in sorted(self._graphs) if size >= count), None)
        if size is None:
            return None
        chosen = self._graphs[size]
        chosen.numbers.copy_(self._inputs.decode_numbers(batch, chosen.layout), non_blocking=True)
        chosen.graph.replay()
        return chosen.output.first(count)
