"""Calibrated rounding: a decoder's layers run one after the other over samples, and are rounded for what they read.

A layer has its weights only while it is worked on; of all samples the hidden states between two layers are kept, and
within a layer those of one batch. The layers are the engine's own, whatever the family. Shapes: t tokens, h hidden.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
import torch.nn as nn
from torch import Tensor

from hasten import ops
from hasten.checkpoint.hugging_face import HuggingFaceSource
from hasten.checkpoint.quantize import Change, Errors
from hasten.core.errors import UnsupportedError
from hasten.engine.calibration.layer import Layer, Method
from hasten.engine.runner import Runner
from hasten.engine.step_message import StepMessage
from hasten.layers.linear import PackedModule, set_weight
from hasten.layers.position import RopeTables
from hasten.models.base import CausalLM
from hasten.models.registry import model_class
from hasten.models.weight_map import WeightSpec
from hasten.quantization.formats.written import WrittenScheme

_BLOCK_SIZE = 16
_BATCH_TOKENS = 4096
"""Of samples that go through a layer at once."""

Batch = list[Sequence[int]]
"""Token ids of some samples."""


class Calibrated:
    """Rounds the linear layers of a decoder for samples that run through it."""

    def __init__(
        self,
        source: HuggingFaceSource,
        scheme: WrittenScheme,
        method: Method,
        samples: Sequence[Sequence[int]],
        device: torch.device,
        dtype: torch.dtype,
        advance: Callable[[int], None] = lambda _: None,
    ) -> None:
        """`samples` are token ids; `advance` is called with 1 for each layer that is done."""
        self._source, self._scheme, self._method, self._advance = source, scheme, method, advance
        self._device, self._dtype, self._upload = device, dtype, ops.Upload(device)
        kind = model_class(source.config.architecture)
        if not issubclass(kind, CausalLM):
            raise UnsupportedError(
                f"{source.config.architecture} generates no text, and only models that do are calibrated; "
                "leave calibration out, which rounds to nearest"
            )
        with torch.device("meta"):
            self._model = kind(source.config)
        self._model.eval()
        self._batches = _batches(samples)
        self._runner = self._make_runner(max(map(len, samples)))
        self._hidden: list[Tensor] = []
        """Of each batch, what the next layer reads."""
        self.errors = Errors()
        """Of the linear layers' outputs."""

    def _make_runner(self, longest: int) -> Runner:
        sequences = max(map(len, self._batches))
        runner = Runner(self._model, self._dtype, self._device, _BLOCK_SIZE, sequences, keeps_cache=False)
        count = max(sum(_num_blocks(len(ids)) for ids in batch) for batch in self._batches)
        with torch.inference_mode():
            runner.allocate_cache(count, _num_blocks(longest), RopeTables(longest, self._device))
        return runner

    @property
    def error(self) -> str:
        """See `Rounding.error`."""
        return f"error of the linear layers' outputs {self.errors.relative:.2%} of their root mean square"

    @torch.inference_mode()
    def changes(self, specs: Sequence[WeightSpec]) -> Mapping[str, Change]:
        """See `Rounding.changes`."""
        number = next((each for each in self._model.layers if specs[0].name.startswith(f"layers.{each}.")), None)
        if number is None:
            if not self._hidden:
                self._start(specs)
            return {}
        self._load(specs)
        changes = self._changes_of(self._model.layers[number], specs)
        self._drop(specs)
        self._advance(1)
        return changes

    def _start(self, specs: Sequence[WeightSpec]) -> None:
        """Compute what the first layer reads."""
        self._load(specs)
        steps = (self._runner.tokens(_message(batch)) for batch in self._batches)
        self._hidden = [self._complete(self._model.start(tokens.ids, tokens.positions)) for tokens in steps]
        self._drop(specs)

    def _changes_of(self, block: nn.Module, specs: Sequence[WeightSpec]) -> dict[str, Change]:
        def read(spec: WeightSpec) -> Tensor:
            return self._source.shard(spec, 0, 1).to(self._device)

        layer = Layer(block, specs, read, partial(self._run, block), len(self._batches))
        changes: dict[str, Change] = {}
        if self._method.smooths:
            changes |= layer.smoothed(self._scheme, self._dtype)
        changes |= layer.rounded(self._scheme, self._method, self._dtype, self.errors)
        for batch in range(len(self._batches)):
            self._hidden[batch] = self._run(block, batch)
        return changes

    def _run(self, block: nn.Module, batch: int) -> Tensor:
        """What a layer gives for a batch, by its number."""
        tokens = self._runner.tokens(_message(self._batches[batch]))
        return self._complete(block(self._hidden[batch], tokens.positions, tokens.meta))

    def _complete(self, x_th: Tensor | ops.PartialSum) -> Tensor:
        return self._model.group.complete(x_th).to(self._dtype)

    def _load(self, specs: Sequence[WeightSpec]) -> None:
        for spec in specs:
            owner, attribute = self._parameter_of(spec)
            set_weight(owner, attribute, ops.moved(self._source.weight(spec, 0, 1, self._dtype), self._upload))
        for owner in {id(owner): owner for owner, _ in map(self._parameter_of, specs)}.values():
            if isinstance(owner, PackedModule):
                owner.pack()

    def _drop(self, specs: Sequence[WeightSpec]) -> None:
        for owner, _ in map(self._parameter_of, specs):
            owner.__dict__.pop("packed", None)
            for name, parameter in list(owner.named_parameters(recurse=False)):
                setattr(owner, name, nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=False))

    def _parameter_of(self, spec: WeightSpec) -> tuple[nn.Module, str]:
        owner, _, attribute = spec.name.rpartition(".")
        return self._model.get_submodule(owner), attribute


def _batches(samples: Sequence[Sequence[int]]) -> list[Batch]:
    batches: list[Batch] = []
    for ids in samples:
        if not batches or sum(map(len, batches[-1])) + len(ids) > _BATCH_TOKENS:
            batches.append([])
        batches[-1].append(ids)
    return batches


def _num_blocks(length: int) -> int:
    return -(-length // _BLOCK_SIZE)


def _message(batch: Batch) -> StepMessage:
    """A step in which all tokens of a batch are computed."""
    counts = [len(ids) for ids in batch]
    rows = list(range(len(batch)))
    firsts = [0]
    for count in counts:
        firsts.append(firsts[-1] + _num_blocks(count))
    return StepMessage(
        number=0,
        ids=[token for ids in batch for token in ids],
        rows=rows,
        starts=[0] * len(batch),
        counts=counts,
        needed=counts,
        sampled=[],
        prompt_rows=[],
        edits=[(row, 0, list(range(firsts[row], firsts[row + 1]))) for row in rows],
        copies=[],
        positions=[],
        greedy=True,
    )
