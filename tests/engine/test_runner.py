"""What a rank's runner leaves of a step."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from hasten import ops
from hasten.checkpoint.plan import open_checkpoint
from hasten.engine.batch import Batch
from hasten.engine.model_loading import build_model
from hasten.engine.runner import Runner
from hasten.engine.sequence import Sequence
from hasten.engine.step_message import StepMessage, TableRows
from hasten.layers.position import RopeTables
from hasten.ops.packed import PackedLinear
from hasten.ops.partial_sum import PartialSum
from hasten.parallel.groups import ALL_ALONE, PipelineGroup

CPU = torch.device("cpu")


def in_two_parts(
    x_th: Tensor, weight: PackedLinear, bias_o: Tensor | None, residual_to: Tensor | None, rows_t: Tensor | None = None
) -> PartialSum:
    """A product in parts of fp32, as kernels for few rows give it."""
    whole_to = ops.linear(x_th.float(), weight)
    return PartialSum(torch.stack([whole_to / 2, whole_to / 2]), bias_o, residual_to, rows_t)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_stage_hands_hidden_states_on_in_their_type(
    dtype: torch.dtype,
    make_model: Callable[..., Path],
    make_sequence: Callable[..., Sequence],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    groups = replace(ALL_ALONE, pipeline=PipelineGroup(0, 2))
    model = build_model(open_checkpoint(str(make_model("Bloom"))), groups, dtype, CPU)
    runner = Runner(model, dtype, CPU, 16, 4)
    runner.allocate_cache(4, 2, RopeTables(32, CPU))
    monkeypatch.setattr(ops, "add_linear", in_two_parts)
    batch = Batch()
    batch.add(make_sequence(range(5, 10)), 5, [])
    with torch.inference_mode():
        hidden_th = runner.forward(StepMessage.of(batch, TableRows(4)))
    assert hidden_th.shape[0] == 5
    assert hidden_th.dtype == ops.hidden_dtype(dtype, "cpu")
