"""Steps as CUDA graphs: one launch instead of hundreds.

A graph is captured for each of a few numbers of tokens, and a smaller step is padded with tokens of no sequence. A
graph reads its numbers from one tensor, which a step overwrites first, and the last step's tokens from where that step
left them. There are two families:

- steps of single tokens, up to the choice of the most probable ones;
- steps with prompts, up to the hidden states of the tokens that need them. What work attention has in such a step is
  in its numbers, as in any other (`ops/plan.py`): a graph launches programs for the most items that it has room for,
  and those without an item end at once. So the whole step is one graph, and nothing is launched between its layers.
  Logits are not part of it: those of all rows that there is room for would take more memory and time than launching
  the head saves. Nor are there any where an encoder computes the prompts: those steps are launched kernel by kernel.

Padding stores nothing, sees no keys and gets zeros from attention. Numbers of tokens are so close that it is at most an
eighth of a step with prompts where products are bound by arithmetic, beyond 256 tokens (a seventh from 417 to 448), and
a quarter below, where a step is bound by reading weights. Larger steps keep the device busy for longer than launching
them takes.

A start waits for few graphs (`Sizes.first`), since a capture takes as long as launching a step kernel by kernel. The
others are captured when there is time (`deferred.py`); until then a step takes the next larger graph that there is.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from hasten.engine.inputs import Arrays, Inputs, Step, Tokens
from hasten.engine.step_message import StepMessage
from hasten.ops.transfer import Sections

_MOST_MIXED = 1536
"""Tokens of the largest step with prompts that is captured: about 32 ms for 14 GB of weights on an H200, a little more
than a server's steps with prompts are to take. To launch one kernel by kernel takes 20 to 40 ms of a host."""
_FIRST_APART = 8
"""How many times as large as the next smaller one each of the graphs is that a start waits for."""


@dataclass(frozen=True)
class StepOutput:
    """What a step leaves on the device, in memory that the next step may overwrite."""

    hidden: Tensor
    """[r, h]"""
    local_logits: Tensor | None = None
    """[r, v / ranks]: this rank's shard of the logits."""
    tokens: Tensor | None = None
    """[r]: the most probable tokens, int32, on every rank."""

    def first(self, count: int) -> "StepOutput":
        """Without padding."""
        logits, tokens = self.local_logits, self.tokens
        return StepOutput(
            self.hidden[:count], None if logits is None else logits[:count], None if tokens is None else tokens[:count]
        )


@dataclass(frozen=True)
class Size:
    """What steps of one graph are padded to."""

    tokens: int
    outputs: int | None
    """Tokens that need hidden states; None in a step of single tokens, where all do."""

    def __str__(self) -> str:
        return f"of {self.tokens} single tokens" if self.outputs is None else f"with prompts, of {self.tokens} tokens"

    def empty(self, inputs: Inputs) -> Step:
        """A step of this family that computes a token without effect, not padded."""
        return inputs.empty(np.array([1]), np.array([1 if self.outputs is None else 0]))

    def of_padding(self, inputs: Inputs) -> Step:
        """A step of this size without effect."""
        return self.empty(inputs).padded(self.tokens, self.outputs)

    def arrays(self, inputs: Inputs, step: Step) -> Arrays:
        """The numbers of a step, padded, with flat block tables."""
        arrays = inputs.arrays(step.padded(self.tokens, self.outputs))
        return {name: array.ravel() if name in ("tables", "cross.tables") else array for name, array in arrays.items()}


def decode_sizes(most: int) -> list[Size]:
    """Steps of single tokens, up to `most`: close together where a token more costs most."""
    wanted = [1, 2, 4, *range(8, 65, 8), *range(80, 257, 16), *range(288, most, 32), most]
    return [Size(tokens, None) for tokens in sorted(set(wanted)) if tokens <= most]


def mixed_sizes(most: int, max_sequences: int) -> list[Size]:
    """Steps with prompts, up to `most` tokens; none where that is 0."""
    most = min(most, _MOST_MIXED)
    wanted = [
        32,
        64,
        *range(80, 129, 16),
        *range(160, 257, 32),
        *range(288, 417, 32),
        480,  # and not 448: the library takes longer for 448 rows than for 512, by two thirds where these are measured
        512,
        *range(576, 1025, 64),
        *range(1152, 1537, 128),
        most,
    ]
    return [Size(tokens, min(tokens, max_sequences)) for tokens in sorted(set(wanted)) if 0 < tokens <= most]


@dataclass(frozen=True)
class Sizes:
    """All sizes of both families, in ascending order."""

    decode: list[Size]
    mixed: list[Size]

    @classmethod
    def up_to(cls, max_sequences: int, most_mixed_tokens: int) -> "Sizes":
        """For steps of as many single tokens, and of as many tokens with prompts."""
        return cls(decode_sizes(max_sequences), mixed_sizes(most_mixed_tokens, max_sequences))

    @property
    def first(self) -> list[Size]:
        """Those that a start waits for, the largest first: the memory that it takes holds the others as well."""
        return sorted([*_spread(self.mixed), *_spread(self.decode)], key=lambda size: size.tokens, reverse=True)

    @property
    def later(self) -> list[Size]:
        """The others, those of the fewest tokens first: most servers begin with few requests."""
        first = set(self.first)
        return [size for size in (*self.decode, *self.mixed) if size not in first]

    def with_room(self, message: StepMessage) -> list[Size]:
        """Those that a step can be padded to, in ascending order; of one family alone."""
        tokens, outputs = message.num_tokens, sum(message.needed)
        if max(message.needed) > 1 or message.encoder_counts:
            return []
        sizes = self.decode if outputs == tokens else self.mixed
        return [size for size in sizes if size.tokens >= tokens]

    def of(self, message: StepMessage) -> Size | None:
        """The least size that a step can be padded to; None where there is none."""
        return next(iter(self.with_room(message)), None)


def _spread(sizes: list[Size]) -> list[Size]:
    """The largest and the smallest of a family, and few between them."""
    chosen = sizes[-1:]
    for size in reversed(sizes):
        if size.tokens * _FIRST_APART <= chosen[-1].tokens or (size is sizes[0] and size is not chosen[-1]):
            chosen.append(size)
    return chosen


class Replayable(Protocol):
    """A captured step."""

    def replay(self) -> None:
        """Run it once more, over what its memory holds now."""


class Capture(Protocol):
    """What makes graphs of steps; all graphs of one capture share their memory."""

    def launch(self, compute: Callable[[], StepOutput]) -> None:
        """Run a step as it is: what it needs must be loaded before it is captured."""

    def capture(self, compute: Callable[[], StepOutput]) -> tuple[Replayable, StepOutput]:
        """A graph of a step, and where it leaves its output."""


class CudaCapture:
    """CUDA graphs, captured on a stream of their own."""

    def __init__(self, device: torch.device) -> None:
        self._stream, self._pool = torch.cuda.Stream(device), torch.cuda.graph_pool_handle()

    def launch(self, compute: Callable[[], StepOutput]) -> None:
        """See Capture."""
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            compute()
        torch.cuda.current_stream().wait_stream(self._stream)

    def capture(self, compute: Callable[[], StepOutput]) -> tuple[Replayable, StepOutput]:
        """See Capture."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            output = compute()
        return graph, output


Compute = Callable[[Tokens], StepOutput]
"""One step of a family."""
Prepare = Callable[[StepMessage, Tensor], None]
"""What is launched before a step, and may change its block tables."""


class StepGraphs:
    """Graphs of some sizes or all; which ones there are is the same on every rank."""

    def __init__(
        self,
        decode: Compute,
        mixed: Compute,
        inputs: Inputs,
        max_sequences: int,
        sizes: Sizes,
        capture: Capture,
        *,
        one_of_each: Callable[[], AbstractContextManager[None]],
        is_last: bool = True,
    ) -> None:
        """`one_of_each`: a context in which steps run through one layer of each kind, and so use every kernel.

        `is_last`: whether these are steps of the last pipeline stage; others leave hidden states of all tokens.
        """
        self._inputs = inputs
        self._is_last = is_last
        self._sizes = sizes
        self._capture, self._one_of_each = capture, one_of_each
        self._compute = dict.fromkeys(sizes.mixed, mixed) | dict.fromkeys(sizes.decode, decode)
        self._sections = {size: inputs.sections(size.tokens, size.outputs, max_sequences) for size in self._compute}
        largest = max(each.total for each in self._sections.values())
        self._numbers = torch.zeros(largest, dtype=torch.int32, device=inputs.device)
        self._graphs: dict[Size, tuple[Replayable, StepOutput]] = {}

    def capture(self, sizes: list[Size]) -> None:
        """Capture graphs of these sizes. Their kernels are launched before: a capture must not compile or load any."""
        steps = {size: size.empty(self._inputs) for size in sizes}
        with self._one_of_each():
            for size, step in steps.items():
                sections = self._sections[size]
                self._put(size.arrays(self._inputs, step), sections, self._numbers[: sections.total])
                self._capture.launch(partial(self._compute[size], self._seen(size, step)))
        for size, step in steps.items():
            self._graphs[size] = self._capture.capture(partial(self._compute[size], self._seen(size, step)))

    def lacking(self, message: StepMessage) -> Size | None:
        """The size of a step of which there is no graph yet; None where there is one, or will never be."""
        size = self._sizes.of(message)
        return None if size in self._graphs else size

    def _seen(self, size: Size, step: Step) -> Tokens:
        """A step that reads its numbers from where steps of this size have them."""
        views = self._sections[size].views(self._numbers[: self._sections[size].total])
        return self._inputs.seen(step.padded(size.tokens, size.outputs), views)

    def _put(self, arrays: Arrays, sections: Sections, numbers: Tensor) -> None:
        host = sections.packed(arrays, self._inputs.device)
        numbers[: len(host)].copy_(host, non_blocking=True)

    def replay(self, message: StepMessage, prepare: Prepare) -> StepOutput | None:
        """Run a step, with its block tables [s, b] prepared before; None where no graph has room for it."""
        size = next((size for size in self._sizes.with_room(message) if size in self._graphs), None)
        if size is None:
            return None
        step, (graph, output), sections = self._inputs.step(message), self._graphs[size], self._sections[size]
        arrays = size.arrays(self._inputs, step)
        if not sections.hold(arrays):
            return None
        numbers = self._numbers[: sections.total]
        self._put(arrays, sections, numbers)
        if message.moves:
            tables = sections.views(numbers)["tables"]
            prepare(message, tables[: step.tables.size].view(step.tables.shape))
        graph.replay()
        return output.first(sum(message.needed) if self._is_last else message.num_tokens)
