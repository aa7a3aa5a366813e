"""Norms of sums and of rows of tables."""

from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from hasten import ops
from hasten.bench.kernel_cases.case import EPS, TOLERANCE, Call, Case, call, rows_text
from hasten.bench.kernel_cases.setting import Setting
from hasten.ops import (
    PartialSum,
    reference,
)
from hasten.ops.peers import Peers


def add_norm(setting: Setting, rows: int, *, rms: bool = False, products: int = 1) -> Case:
    """The norm of a sum that it adds up."""
    hidden = setting.model.hidden_size

    def make() -> Call:
        sum_ = sum_of(setting, rows, products)
        weight, bias = gain(setting)
        kernel, definition = (partial(op, rms=rms) for op in (ops.norm, reference.norm))
        return call(kernel, definition, sum_, weight, None if rms else bias, EPS)

    shape = f"rms, {rows_text(rows)}" if rms else f"{products_text(products)}{rows_text(rows)}"
    nbytes = (3 + products) * rows * hidden * setting.itemsize
    return Case(op="norm", shape=shape, make=make, nbytes=nbytes, tolerance=norm_of_sum(setting))


def norm_alone(setting: Setting, rows: int) -> Case:
    """The norm of a sum that nobody else reads."""

    def definition(*inputs: Any) -> Tensor:
        return reference.norm(*inputs)[0]

    def make() -> Call:
        return call(ops.norm_alone, definition, sum_of(setting, rows, 1), *gain(setting), EPS)

    nbytes = 3 * rows * setting.model.hidden_size * setting.itemsize
    return Case(op="norm_alone", shape=rows_text(rows), make=make, nbytes=nbytes, tolerance=norm_of_sum(setting))


def sum_of(setting: Setting, rows: int, products: int) -> PartialSum:
    """A product, its bias and a residual; with two products, those of a parallel residual."""
    hidden = setting.model.hidden_size
    sum_ = PartialSum(setting.draw(rows, hidden), setting.draw(hidden), setting.draw(rows, hidden))
    return sum_ if products == 1 else sum_.plus(setting.draw(rows, hidden), setting.draw(hidden))


def products_text(count: int) -> str:
    """A number of products, as it is shown."""
    return "" if count == 1 else f"{count} products, "


def norm_of_sum(setting: Setting) -> float:
    """The sum is rounded to the type as well, before its norm is."""
    return 2 * TOLERANCE[setting.dtype]


def gain(setting: Setting) -> tuple[Tensor, Tensor]:
    """Weight and bias of a norm."""
    weight, bias = setting.draw(2, setting.model.hidden_size)
    return weight, bias


def exchange_norm(setting: Setting, rows: int, products: int) -> Case:
    """What it costs beside the other ranks' part: this one has nobody to wait for."""
    hidden, device = setting.model.hidden_size, setting.device

    def make() -> Call:
        mailbox = torch.zeros(2, rows, 1, hidden // 2, dtype=torch.int64, device=device)
        peers = Peers(
            rank=0,
            size=1,
            max_rows=rows,
            width=hidden,
            mailbox=mailbox,
            addresses=torch.tensor([mailbox.data_ptr()], device=device),
            exchanges=torch.zeros(rows, dtype=torch.int32, device=device),
            abort_flag=torch.zeros(1, dtype=torch.int32, device=device),
        )
        sum_ = replace(sum_of(setting, rows, products), peers=peers)
        return call(ops.norm, reference.norm, sum_, *gain(setting), EPS)

    nbytes = (3 + products) * rows * hidden * setting.itemsize
    return Case(
        op="exchange_norm",
        shape=f"{products_text(products)}{rows_text(rows)}, one rank alone",
        make=make,
        nbytes=nbytes,
        tolerance=norm_of_sum(setting),
    )


def embedding(setting: Setting, rows: int) -> Case:
    """Rows of a shard of the embedding table, which holds half of the vocabulary."""
    held, hidden = setting.model.vocab_size // 2, setting.model.hidden_size

    def make() -> Call:
        inputs = (setting.draw_ids(rows), setting.draw(held, hidden), held)
        return call(ops.embedding, reference.embedding, *inputs)

    nbytes = rows * hidden * setting.itemsize * 3 // 2
    return Case(op="embedding", shape=rows_text(rows), make=make, nbytes=nbytes, tolerance=0)


def embedding_norms(setting: Setting, counts: Iterable[int]) -> Iterator[Case]:
    """Norms of rows of the embedding table."""
    hidden = setting.model.hidden_size
    table = cache(partial(setting.draw, setting.model.vocab_size, hidden))  # large: there is one for all

    def make(rows: int) -> Call:
        inputs = (setting.draw_ids(rows), table(), *gain(setting), EPS)
        return call(ops.embedding_norm, reference.embedding_norm, *inputs)

    for rows in counts:
        nbytes = 2 * rows * hidden * setting.itemsize
        yield Case(op="embedding_norm", shape=rows_text(rows), make=partial(make, rows), nbytes=nbytes)
