"""The kernels of linear layers whose weights have scales of groups. Shapes: t tokens, h in, o out."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from hasten.ops import Columns, GroupedWeight, PackedLinear, pack_nibbles, packs, reference
from hasten.ops.gpu import grouped, matmul

Close = Callable[[str, Tensor, Tensor], None]

HAS_GPU = torch.cuda.is_available()
# bf16 is not among numpy's types: the interpreter multiplies matrices of its bits instead.
HALF = [torch.float16, torch.bfloat16 if HAS_GPU else pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]
ROWS = [1, 17, 70]
"""One, few, and so many that weights are scaled before they are multiplied."""
REAL = {"qkv": (12_288, 4096), "dense": (4096, 4096), "up": (16_384, 4096), "down": (4096, 16_384)}
"""BLOOM-7B1's (o, h)."""


def draw(*shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, generator=generator).to(dtype).to(device)


def make_weight(
    out: int, into: int, size: int, device: torch.device, *, bits: int = 4, zeros: bool = False, shuffled: bool = False
) -> PackedLinear:
    generator = torch.Generator().manual_seed(out + into)
    middle, groups = 1 << (bits - 1), into // size
    values = torch.randint(2 * middle, (out, into), dtype=torch.uint8, generator=generator)
    scales = (torch.rand(groups, out, generator=generator) + 0.5) * into**-0.5 / (0.58 * middle)
    drawn = torch.randint(middle, middle + 3, (groups, out), dtype=torch.uint8, generator=generator)
    order = torch.randperm(into, generator=generator) if shuffled else None
    weight = GroupedWeight(
        pack_nibbles(values) if bits == 4 and packs(into) else values,
        scales.bfloat16(),
        drawn if zeros else None,
        middle,
        into,
        torch.float16,
        Columns(order),
    )
    return matmul.pack_linear(weight.to(device), shared=False)


def exact(x: Tensor, weight: PackedLinear, bias: Tensor | None = None, activation: str | None = None) -> Tensor:
    """The definition in fp64."""
    return reference.linear(x.double(), weight, None if bias is None else bias.double(), activation)


def kind_of(rows: int) -> str:
    """A single row's inputs are rounded to 15 bits; with more rows weights are rounded once more."""
    return "digits" if rows == 1 else "linear" if rows <= grouped._FEW_ROWS else "stepwise"


CASES: dict[str, tuple[tuple[int, int, int], dict[str, Any]]] = {
    "groups of 128": ((130, 256, 128), {}),
    "with zeros": ((40, 256, 128), {"zeros": True}),
    "groups of 64, with zeros": ((40, 128, 64), {"zeros": True}),
    "groups of 32": ((40, 128, 32), {}),
    "one group": ((20, 384, 384), {}),
    "in an order": ((40, 128, 128), {"shuffled": True}),
    "bytes of 4 bits": ((40, 96, 32), {"zeros": True}),
    "8 bits": ((40, 256, 128), {"bits": 8, "zeros": True}),
}


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_any_number_of_rows(name: str, dtype: torch.dtype, device: torch.device, assert_close: Close) -> None:
    shape, options = CASES[name]
    weight = make_weight(*shape, device, **options)
    out, into, _ = shape
    for rows in ROWS:
        x, bias = draw(rows, into, dtype=dtype, device=device), draw(out, dtype=dtype, device=device)
        for bias_o, activation in ((bias, "gelu_tanh"), (None, None)):
            found = matmul.linear(x, weight, bias_o, activation)
            assert found.dtype == dtype
            assert_close(kind_of(rows), found, exact(x, weight, bias_o, activation))


@pytest.mark.parametrize(("into", "bits"), [(9344, 4), (2688, 8)])
@pytest.mark.parametrize("zeros", [False, True])
def test_one_row_of_more_words_than_a_program_reads_at_once(
    zeros: bool, into: int, bits: int, device: torch.device, assert_close: Close
) -> None:
    weight = make_weight(21, into, 128, device, bits=bits, zeros=zeros)
    x = draw(1, into, dtype=torch.float16, device=device)
    assert_close("digits", matmul.linear(x, weight, None, None), exact(x, weight))


@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
@pytest.mark.parametrize(("shape", "rows"), [((7, 100, 20), 3), ((130, 256, 128), 257), ((9, 384, 128), 0)], ids=str)
def test_what_no_block_divides_and_many_rows_are_widened(
    shape: tuple[int, int, int], rows: int, dtype: torch.dtype, device: torch.device, assert_close: Close
) -> None:
    weight = make_weight(*shape, device, zeros=True, shuffled=True)
    x, bias = draw(rows, shape[1], dtype=dtype, device=device), draw(shape[0], dtype=dtype, device=device)
    for activation in ("relu", "silu"):
        found = matmul.linear(x, weight, bias, activation)
        assert found.dtype == dtype
        assert_close("stepwise", found, exact(x, weight, bias, activation))


@pytest.mark.parametrize("rows", [2, 33, 65])
def test_parts_add_up_to_the_product(rows: int, device: torch.device, assert_close: Close) -> None:
    weight = make_weight(130, 1024, 128, device, zeros=True)
    x = draw(rows, 1024, dtype=torch.float16, device=device)
    found = matmul.linear_parts(x, weight)
    assert (found.dtype, found.shape) == (torch.float32, (8, rows, 130))
    expected = exact(x, weight)
    if rows <= grouped._FEW_ROWS:
        assert_close("parts", found.sum(0), expected)
    else:
        assert_close("stepwise", found.sum(0).half(), expected)


@pytest.mark.parametrize("rows", [1, 70, 257])
def test_queries_keys_and_values_go_where_they_belong(rows: int, device: torch.device, assert_close: Close) -> None:
    heads, kv_heads, size, dtype = 4, 1, 24, torch.float16
    weight = make_weight((heads + 2 * kv_heads) * size, 128, 128, device)
    x, bias = draw(rows, 128, dtype=dtype, device=device), draw(weight.out_features, dtype=dtype, device=device)
    keys, values = torch.zeros((2, rows + 2, 4, kv_heads, size), dtype=dtype, device=device)
    wide = keys.double(), values.double()
    slots_t = torch.randperm(4 * (rows + 2), generator=torch.Generator().manual_seed(rows))[:rows].to(device)
    expected = reference.project(x.double(), weight, bias.double(), *wide, slots_t, heads, clip=0.7)
    found = matmul.project(x, weight, bias, keys, values, slots_t, heads, clip=0.7)
    for first, other in zip((found, keys, values), (expected, *wide), strict=True):
        assert_close(kind_of(rows), first, other)


def test_columns_that_are_scaled_are_scaled_once(device: torch.device, assert_close: Close) -> None:
    weight = make_weight(40, 128, 128, device)
    assert weight.grouped is not None
    scales = torch.linspace(0.5, 2, 128, device=device)
    scaled = replace(weight, grouped=replace(weight.grouped, columns=Columns(None, scales)))
    x = draw(3, 128, dtype=torch.float16, device=device)
    assert_close("stepwise", matmul.linear(x, scaled, None, None), exact(x, scaled))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("out", "into"), REAL.values(), ids=list(REAL))
def test_real_sizes(out: int, into: int, dtype: torch.dtype, assert_close: Close) -> None:
    gpu = torch.device("cuda", 0)
    for zeros in (False, True):
        weight = make_weight(out, into, 128, gpu, zeros=zeros)
        for rows in (1, 2, 16, 33, 64, 65, 200, 256, 500):
            x = draw(rows, into, dtype=dtype, device=gpu)
            assert_close(kind_of(rows), matmul.linear(x, weight, None, None), exact(x, weight))
            parts = matmul.linear_parts(x, weight)
            total = parts if parts.dim() == 2 else parts.sum(0)
            assert_close(kind_of(rows), total.to(dtype), exact(x, weight))
