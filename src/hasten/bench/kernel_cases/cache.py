"""The key/value cache: writes, copies of blocks, and beams that continue others."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from hasten import ops
from hasten.bench.kernel_cases.case import (
    Call,
    Case,
    Outputs,
    Run,
    call,
    rows_text,
)
from hasten.bench.kernel_cases.setting import BLOCK_SIZE, Setting, cache_text
from hasten.ops import (
    BeamChoice,
    BeamMoves,
    BeamSearches,
    BeamStates,
    BlockCaches,
    Search,
    beams,
    reference,
)


def write_cache(setting: Setting, rows: int) -> Case:
    """Keys and values of tokens stored in the cache."""
    heads, kv_heads, size = setting.heads

    def written(write: Callable[..., None], *inputs: Tensor) -> Outputs:
        write(*inputs)
        return inputs[2], inputs[3]

    def make() -> Call:
        fused = setting.draw(rows, heads + 2 * kv_heads, size)
        _, keys, values = fused.split([heads, kv_heads, kv_heads], dim=1)
        inputs = (keys, values, *setting.caches(rows), torch.randperm(rows, device=setting.device))
        scales = setting.scales()
        kernel, definition = (
            partial(written, partial(op, scales=scales)) for op in (ops.write_cache, reference.write_cache)
        )
        return call(kernel, definition, *inputs)

    nbytes = 2 * rows * kv_heads * size * (setting.itemsize + setting.cache_itemsize)
    return Case(
        op="write_cache", shape=rows_text(rows) + cache_text(setting), make=make, nbytes=nbytes, tolerance=0, waits=True
    )


COPIED_CACHES = 4
"""Caches in which blocks are copied together: a model's are twice as many as it has layers."""


def copy_blocks(setting: Setting, count: int) -> Case:
    """Whole blocks copied within caches."""
    _, kv_heads, size = setting.heads

    def make() -> Call:
        caches = [cache for _ in range(COPIED_CACHES // 2) for cache in setting.caches(2 * count * BLOCK_SIZE)]
        held = BlockCaches.of(caches)
        pairs = torch.randperm(2 * count, device=setting.device).view(2, count)

        def run(copy: Callable[[BlockCaches, Tensor, Tensor], None]) -> Outputs:
            copy(held, *pairs)
            return held.tensors

        kernel, definition = partial(run, ops.copy_blocks), partial(run, reference.copy_blocks)
        return Call(kernel, definition, lambda: tuple(cache.float() for cache in definition()))

    nbytes = 2 * COPIED_CACHES * count * BLOCK_SIZE * kv_heads * size * setting.itemsize
    shape = f"{count} blocks in {COPIED_CACHES} caches"
    return Case(op="copy_blocks", shape=shape, make=make, nbytes=nbytes, tolerance=0)


_WIDTH = 4
"""Beams of a search."""


def choose_beams(setting: Setting, count: int) -> Case:
    """The beams that live on, of `count` searches."""
    keep, beams_in_all = 2 * _WIDTH, count * _WIDTH
    of_all = [Search(s, s * _WIDTH, _WIDTH, _WIDTH, keep, s * _WIDTH, 0.0, (2,)) for s in range(count)]

    def make() -> Call:
        values_rk = -torch.rand(beams_in_all, keep).sort().values
        ids_rk = torch.randint(setting.model.vocab_size, (beams_in_all, keep), dtype=torch.int32)
        sums_sw = -torch.rand(count, _WIDTH, dtype=torch.float64)
        order_sw = torch.arange(_WIDTH, dtype=torch.int32).repeat(count, 1)

        def on(device: torch.device, choose: Callable[..., BeamChoice]) -> Run:
            searches = BeamSearches.of(of_all, device)
            values, ids, sums, order = (each.to(device) for each in (values_rk, ids_rk, sums_sw, order_sw))

            def run() -> Outputs:
                states = BeamStates(sums.clone(), order.clone())  # a choice changes them
                chosen_2b = torch.zeros(2, beams_in_all, dtype=torch.int32, device=device)
                choice = choose(states, searches, values, ids, chosen_2b, setting.model.vocab_size)
                return tuple(tensor.to(setting.device) for tensor in choice)

            return run

        definition = on(torch.device("cpu"), beams.choose_beams)
        return Call(on(setting.device, ops.choose_beams), definition, definition)

    shape, nbytes = f"{count} searches of {_WIDTH} beams", beams_in_all * keep * 8
    return Case(op="choose_beams", shape=shape, make=make, nbytes=nbytes, tolerance=0, waits=True)


def move_beams(setting: Setting, count: int) -> Case:
    """Beams that continue others, half of `count`."""
    _, kv_heads, size = setting.heads
    whole, tail = 2, BLOCK_SIZE // 2
    parents = [0, 0, 2, 2]
    rows = [(row, row - row % _WIDTH, parents[row % _WIDTH], whole, tail) for row in range(count)]

    def make() -> Call:
        blocks = count * (whole + 1)
        caches = [cache for _ in range(COPIED_CACHES // 2) for cache in setting.caches(blocks * BLOCK_SIZE)]
        held, moves = BlockCaches.of(caches), BeamMoves.of(rows, setting.device)
        tables_sn = torch.randperm(blocks, dtype=torch.int32, device=setting.device).view(count, -1)
        kept = torch.zeros(1, dtype=torch.int32, device=setting.device)

        def run(move: Callable[[BlockCaches, Tensor, BeamMoves, Tensor], None]) -> Outputs:
            move(held, tables_sn, moves, kept)
            return tables_sn, *(cache.view(-1, BLOCK_SIZE, kv_heads, size)[:, :tail] for cache in held.tensors)

        kernel, definition = partial(run, ops.move_beams), partial(run, beams.move_beams)
        return Call(kernel, definition, lambda: tuple(each.float() for each in definition()))

    nbytes = 2 * COPIED_CACHES * (count // 2) * tail * kv_heads * size * setting.itemsize
    shape = f"{count} beams, half of them moved, in {COPIED_CACHES} caches"
    return Case(op="move_beams", shape=shape, make=make, nbytes=nbytes, tolerance=0, waits=True)
