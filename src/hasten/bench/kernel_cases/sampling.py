"""From logits to tokens."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hasten import ops
from hasten.bench.kernel_cases.case import (
    Call,
    Case,
    Outputs,
    call,
    rows_text,
)
from hasten.bench.kernel_cases.setting import Setting
from hasten.ops import (
    Bans,
    Draws,
    EditList,
    TokenCounts,
    TopLogprobs,
    reference,
)

_DIFFERING_DRAWS = 0.05
"""Share of rows whose point may lie so close to a border between two tokens that fp32 does not tell its side."""


def resolve_ids(setting: Setting, rows: int) -> Case:
    """Token ids of the previous step."""

    def make() -> Call:
        ids = torch.arange(rows, dtype=torch.int32, device=setting.device).sub_(rows)
        return call(ops.resolve_ids, reference.resolve_ids, ids, setting.draw_ids(rows))

    return Case(op="resolve_ids", shape=rows_text(rows), make=make, nbytes=12 * rows, tolerance=0)


def greedy(setting: Setting, rows: int) -> Case:
    """The most probable tokens."""
    vocab = setting.model.vocab_size

    def make() -> Call:
        return call(ops.greedy, reference.greedy, setting.draw(rows, vocab, scale=3))

    nbytes = rows * vocab * setting.itemsize
    return Case(op="greedy", shape=f"{rows_text(rows)} of {vocab}", make=make, nbytes=nbytes, tolerance=0)


def greedy_of_shards(setting: Setting, rows: int) -> Iterator[Case]:
    """What a shard of the vocabulary gives for the choice of all ranks, and that choice."""
    vocab = setting.model.vocab_size // 2

    def of_keys(keys: Callable[..., Tensor], logits_rv: Tensor) -> Tensor:
        return reference.tokens_of_keys(keys(logits_rv, vocab))

    def make_keys() -> Call:
        both = (partial(of_keys, op) for op in (ops.greedy_keys, reference.greedy_keys))
        return call(*both, setting.draw(rows, vocab, scale=3))

    def make_tokens() -> Call:
        keys_r = reference.greedy_keys(setting.draw(rows, vocab, scale=3), vocab)
        return call(ops.tokens_of_keys, reference.tokens_of_keys, keys_r)

    shape = f"{rows_text(rows)} of {vocab}"
    nbytes = rows * vocab * setting.itemsize
    yield Case(op="greedy_keys", shape=shape, make=make_keys, nbytes=nbytes, tolerance=0)
    yield Case(op="tokens_of_keys", shape=rows_text(rows), make=make_tokens, nbytes=12 * rows, tolerance=0)


def draw(setting: Setting, rows: int) -> Case:
    """Tokens drawn by top-p."""
    vocab = setting.model.vocab_size

    def make() -> Call:
        draws = Draws.of(
            temperature=[1.0] * rows,
            top_k=[0] * rows,
            top_p=[0.9] * rows,
            min_p=[0.0] * rows,
            point=torch.rand(rows).tolist(),
            device=setting.device,
        )
        return call(ops.draw, reference.draw, setting.draw(rows, vocab, scale=3), draws)

    return Case(
        op="draw",
        shape=f"{rows_text(rows)} of {vocab}, top-p 0.9",
        make=make,
        nbytes=rows * vocab * setting.itemsize,
        tolerance=_DIFFERING_DRAWS,
        waits=True,
    )


_SEQUENCE = 192
"""Tokens of a sequence with penalties, two thirds of them its prompt's."""


def _token_counts(setting: Setting, rows: int) -> TokenCounts:
    vocab = setting.model.vocab_size
    counts = TokenCounts.empty(rows, 2 * _SEQUENCE, setting.device)
    tokens = np.random.default_rng(0).integers(vocab, size=(rows, _SEQUENCE))
    counts.load(range(rows), [(row[: 2 * _SEQUENCE // 3], row[2 * _SEQUENCE // 3 :]) for row in tokens])
    return counts


def edit_logits(setting: Setting, rows: int) -> Case:
    """Penalties, biases and bans."""
    vocab = setting.model.vocab_size

    def make() -> Call:
        edits, rng = EditList(), np.random.default_rng(1)
        for row in range(rows):
            edits.add(
                row,
                slot=row,
                penalties=(1.1, 0.5, 0.5),
                bias_ids=rng.permutation(vocab)[:20].astype(np.int32),
                biases=np.ones(20, np.float32),
                bans=Bans(rng.integers(vocab, size=20, dtype=np.int32), np.full(20, -1, np.int32)),
                chosen=0,
            )
        logits_rv, chosen_r = setting.draw(rows, vocab, scale=3), setting.draw_ids(1)
        on_device, counts = edits.to(setting.device), _token_counts(setting, rows)
        return call(ops.edit_logits, reference.edit_logits, logits_rv, on_device, counts, chosen_r)

    return Case(
        op="edit_logits",
        shape=f"{rows_text(rows)} of {vocab}",
        make=make,
        nbytes=rows * vocab * (setting.itemsize + 4),
        waits=True,
    )


def count_tokens(setting: Setting, rows: int) -> Case:
    """Tokens counted for penalties."""

    def make() -> Call:
        slots_r = torch.arange(rows, dtype=torch.int32, device=setting.device)
        tokens_r = setting.draw_ids(rows)

        def run(count: Callable[[TokenCounts, Tensor, Tensor], None], counts: TokenCounts) -> Tensor:
            count(counts, slots_r, tokens_r)
            return counts.sizes_s  # a token that is there already leaves them as they are

        counts = [_token_counts(setting, rows) for _ in range(3)]
        return Call(
            partial(run, ops.count_tokens, counts[0]),
            partial(run, reference.count_tokens, counts[1]),
            partial(run, reference.count_tokens, counts[2]),
        )

    nbytes = rows * 4 * (_SEQUENCE + 3)
    return Case(op="count_tokens", shape=rows_text(rows), make=make, nbytes=nbytes, tolerance=0, waits=True)


def mask_logits(setting: Setting, rows: int) -> Case:
    """Tokens that a grammar allows."""
    vocab = setting.model.vocab_size
    words = -(-vocab // 32)

    def make() -> Call:
        masks_kw = torch.randint(-(2**31), 2**31, (rows, words), dtype=torch.int32, device=setting.device)
        index_r = torch.arange(rows, dtype=torch.int32, device=setting.device)
        return call(ops.mask_logits, reference.mask_logits, setting.draw(rows, vocab, scale=3), index_r, masks_kw)

    nbytes = rows * (2 * vocab * setting.itemsize + 4 * words)
    return Case(
        op="mask_logits", shape=f"{rows_text(rows)} of {vocab}", make=make, nbytes=nbytes, tolerance=0, waits=True
    )


def top_logprobs(setting: Setting, rows: int) -> Case:
    """Log-probabilities of the most probable tokens."""
    vocab = setting.model.vocab_size

    def without_ids(op: Callable[[Tensor, Tensor, int], TopLogprobs], *inputs: Any) -> Outputs:
        return op(*inputs)[:3]  # among equal logits the definition names any

    def make() -> Call:
        logits_rv, tokens_r = setting.draw(rows, vocab, scale=3), setting.draw_ids(rows)
        kernel, definition = partial(without_ids, ops.top_logprobs), partial(without_ids, reference.top_logprobs)
        return call(kernel, definition, logits_rv, tokens_r, 5)

    nbytes = rows * vocab * setting.itemsize
    return Case(op="top_logprobs", shape=f"{rows_text(rows)} of {vocab}, 5 best", make=make, nbytes=nbytes)


def largest(setting: Setting, rows: int) -> Case:
    """The greatest logits."""
    vocab, count = setting.model.vocab_size, 128

    def make() -> Call:
        return call(ops.largest, reference.largest, setting.draw(rows, vocab, scale=3), count)

    nbytes = rows * vocab * setting.itemsize
    return Case(op="largest", shape=f"{rows_text(rows)} of {vocab}, {count} best", make=make, nbytes=nbytes, waits=True)
