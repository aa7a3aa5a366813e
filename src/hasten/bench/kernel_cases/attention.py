"""Attention, and what happens to heads before it."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from hasten import ops
from hasten.bench.kernel_cases.case import (
    A_STEP,
    EPS,
    Call,
    Case,
    Outputs,
    call,
    rows_text,
)
from hasten.bench.kernel_cases.setting import BLOCK_SIZE, Setting, cache_text
from hasten.core.types import Request, SamplingParams
from hasten.engine.batch import Batch
from hasten.engine.inputs import BlockTables, Inputs
from hasten.engine.sequence import Sequence
from hasten.engine.step_message import StepMessage, TableRows
from hasten.layers.position import alibi_slopes
from hasten.ops import (
    AttentionMeta,
    HeadTransform,
    reference,
)
from hasten.ops.plan import Planner


def attention(
    setting: Setting,
    shape: str,
    lengths: list[tuple[int, int]],
    *,
    window: int | None = None,
    softcap: float | None = None,
    sinks: bool = False,
    causal: bool = True,
    farthest: int | None = None,
) -> Case:
    """Sequences by their numbers of new tokens and of all tokens; `farthest`: distance up to which biases differ."""
    heads, kv_heads, size = setting.heads
    widest = max(length for _, length in lengths) if window is None else window
    tokens, kept = sum(new for new, _ in lengths), sum(min(length, widest + new - 1) for new, length in lengths)
    pairs = sum(
        min(seen + 1, widest) if causal else length for new, length in lengths for seen in range(length - new, length)
    )

    def make() -> Call:
        blocks = sum(-(-length // BLOCK_SIZE) for _, length in lengths)
        slopes_n = alibi_slopes(heads).to(setting.device) if causal and farthest is None else None
        bias_nr = None if farthest is None else setting.draw(heads, 2 * farthest + 1).float()
        inputs = (setting.draw(tokens, heads, size), *setting.caches(blocks * BLOCK_SIZE))
        meta = _meta(setting, lengths, blocks, causal=causal)
        both = (ops.paged_attention, reference.paged_attention)
        sinks_n = setting.draw(heads) if sinks else None
        kernel, definition = (
            partial(
                op,
                window=window,
                softcap=softcap,
                sinks_n=sinks_n,
                causal=causal,
                bias_nr=bias_nr,
                scales=setting.scales(),
            )
            for op in both
        )
        return call(kernel, definition, *inputs, meta, size**-0.5, slopes_n)

    return Case(
        op="paged_attention",
        shape=shape + cache_text(setting),
        make=make,
        nbytes=2 * (tokens * heads * setting.itemsize + kept * kv_heads * setting.cache_itemsize) * size,
        flops=4 * pairs * heads * size,
    )


def _meta(setting: Setting, lengths: list[tuple[int, int]], blocks: int, *, causal: bool) -> AttentionMeta:
    """A batch as the engine makes it, its sequences scattered over the blocks."""
    free = torch.randperm(blocks).tolist()
    tables = BlockTables(len(lengths), max(-(-length // BLOCK_SIZE) for _, length in lengths))
    heads, kv_heads, _ = setting.heads
    # Triton's interpreter, which runs the kernels in tests, wants the work divided as well
    planner = Planner.of(setting.device, heads, kv_heads) or Planner(heads, kv_heads, multiprocessors=0)
    inputs = Inputs(tables, BLOCK_SIZE, planner, setting.device, causal=causal)
    batch = Batch()
    for key, (new, length) in enumerate(lengths):
        request = Request(request_id=str(key), prompt_token_ids=(0,) * length, params=SamplingParams())
        sequence = Sequence(request, seed=0)
        sequence.key, sequence.num_computed = key, length - new
        sequence.block_table = [free.pop() for _ in range(-(-length // BLOCK_SIZE))]
        batch.add(sequence, new, [])
    message = StepMessage.of(batch, TableRows(len(lengths)))
    return inputs.tokens(replace(message, needed=batch.counts)).meta


def store_heads(setting: Setting, rows: int, *, interleaved: bool = False) -> Case:
    """Queries and keys normed and turned behind their projection; interleaved ones with weights of each head's own."""
    heads, kv_heads, size = setting.heads

    def stored(store: Callable[..., Tensor], *inputs: Any) -> Outputs:
        return store(*inputs), inputs[1], inputs[2]

    def make() -> Call:
        # here, so that nothing but a GPU's own cases needs triton
        from hasten.ops.gpu.heads import store_heads

        transform = HeadTransform(
            positions_t=torch.arange(rows, device=setting.device),
            table_pr=torch.rand(rows, size, device=setting.device),
            interleaved=interleaved,
            query_norm_d=setting.draw(size * (heads if interleaved else 1)),
            key_norm_d=setting.draw(size * (kv_heads if interleaved else 1)),
            rms=not interleaved,
            eps=EPS,
        )
        qkv = setting.draw(rows, (heads + 2 * kv_heads) * size)
        inputs = (qkv, *setting.caches(rows), torch.randperm(rows, device=setting.device), heads, transform)
        both, scales = (store_heads, reference.store_heads), setting.scales()
        kernel, definition = (partial(stored, partial(op, scales=scales)) for op in both)
        return call(kernel, definition, *inputs)

    values = rows * (heads + 2 * kv_heads) * size
    nbytes = values * setting.itemsize + rows * size * (
        heads * setting.itemsize + 2 * kv_heads * setting.cache_itemsize
    )
    shape = (f"interleaved, {rows_text(rows)}" if interleaved else rows_text(rows)) + cache_text(setting)
    tolerance = A_STEP.get(setting.cache_dtype or "")
    return Case(op="store_heads", shape=shape, make=make, nbytes=nbytes, waits=True, tolerance=tolerance)


def mean_squares(setting: Setting, rows: int) -> Case:
    """Mean squares of queries and keys, for norms over all heads."""
    heads, kv_heads, size = setting.heads

    def make() -> Call:
        qkv = setting.draw(rows, (heads + 2 * kv_heads) * size)
        return call(ops.mean_squares, reference.mean_squares, qkv, heads, kv_heads, size, 1)

    nbytes = rows * (heads + kv_heads) * size * setting.itemsize
    return Case(op="mean_squares", shape=rows_text(rows), make=make, nbytes=nbytes)
