"""Shapes: t tokens, h hidden, v vocabulary."""

from collections.abc import Callable
from dataclasses import replace
from itertools import product

import pytest
import torch
from torch import Tensor

from hasten.ops import PartialSum, reference
from hasten.ops.gpu import norm
from hasten.ops.packed import QuantizedWeight, Weight

Close = Callable[[str, Tensor, Tensor], None]

NAN = float("nan")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
WIDTHS = [1, 64, 100, 1024, 4096, 14_336]
EPS = 1e-5


def draw(*shape: int, dtype: torch.dtype, device: torch.device, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype).to(device)


def make_sum(
    rows: int,
    width: int,
    parts: int | None,
    dtype: torch.dtype,
    device: torch.device,
    *,
    bias: bool = False,
    residual: bool = False,
    chosen: bool = False,
) -> PartialSum:
    """A sum of these; without a number of parts, of one in the type itself. Rows of the residual not chosen are NaN."""
    first = draw(rows, width, dtype=dtype, device=device)
    if parts is not None:
        first = draw(parts, rows, width, dtype=torch.float32, device=device)
    made = PartialSum(first, draw(width, dtype=dtype, device=device, seed=1) if bias else None)
    if not residual:
        return made
    residual_th = draw(rows, width, dtype=dtype, device=device, seed=2)
    if not chosen:
        return replace(made, residual=residual_th)
    which = torch.randperm(3 * rows + 1, generator=torch.Generator().manual_seed(3))[:rows].to(device)
    more_th = torch.full((3 * rows + 1, width), NAN, dtype=dtype, device=device)
    more_th[which] = residual_th
    return replace(made, residual=more_th, residual_indices=which.int())


def wide(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.double()


def check(
    x: Tensor | PartialSum,
    dtype: torch.dtype,
    assert_close: Close,
    *,
    shift: bool = True,
    rms: bool = False,
    offset: bool = False,
) -> None:
    width, device = x.shape[1], (x.parts if isinstance(x, PartialSum) else x).device
    weight, drawn = draw(2, width, dtype=dtype, device=device, seed=4)
    bias = drawn if shift else None
    found, total = norm.norm(x, weight, bias, EPS, rms=rms, unit_offset=offset)
    assert found.dtype == total.dtype == dtype
    if isinstance(x, PartialSum):
        summed = PartialSum(x.parts.double(), wide(x.bias), wide(x.residual), x.residual_indices)
        summed = replace(summed, added=wide(x.added), added_bias=wide(x.added_bias))
        assert_close("layer_norm", total, reference.complete(summed))
    else:
        assert total is x
    # What is normed is the sum as it is stored.
    exact = reference.norm(total.double(), weight.double(), wide(bias), EPS, rms=rms, unit_offset=offset)[0]
    assert_close("layer_norm", found, exact)
    if not offset:
        # a sum that is not stored is not rounded either
        given = reference.complete(summed) if isinstance(x, PartialSum) else total.double()
        exact = reference.norm(given, weight.double(), wide(bias), EPS, rms=rms)[0]
        assert_close("layer_norm", norm.norm_alone(x, weight, bias, EPS, rms=rms), exact)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize(("shift", "rms"), [(False, False), (False, True), (True, True)])
def test_every_kind(
    shift: bool, rms: bool, width: int, dtype: torch.dtype, device: torch.device, assert_close: Close
) -> None:
    check(draw(3, width, dtype=dtype, device=device) * 3 + 1, dtype, assert_close, shift=shift, rms=rms)
    sum_ = make_sum(3, width, 2, dtype, device, bias=True, residual=True)
    check(sum_, dtype, assert_close, shift=shift, rms=rms, offset=rms)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("rows", [0, 1, 5])
def test_a_tensor(rows: int, width: int, dtype: torch.dtype, device: torch.device, assert_close: Close) -> None:
    check(draw(rows, width, dtype=dtype, device=device) * 3 + 1, dtype, assert_close)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("parts", [None, 1, 2, 8])
@pytest.mark.parametrize(
    ("bias", "residual", "chosen"),
    [flags for flags in product((False, True), repeat=3) if flags[1] or not flags[2]],
    ids=lambda flag: str(int(flag)),
)
def test_every_combination_of_a_sum(
    bias: bool,
    residual: bool,
    chosen: bool,
    parts: int | None,
    dtype: torch.dtype,
    device: torch.device,
    assert_close: Close,
) -> None:
    for rows, width in ((3, 64), (2, 100)):
        sum_ = make_sum(rows, width, parts, dtype, device, bias=bias, residual=residual, chosen=chosen)
        check(sum_, dtype, assert_close)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("parts", [None, 2])
@pytest.mark.parametrize("added", [None, 1, 3])
@pytest.mark.parametrize("bias", [False, True])
def test_a_second_product(
    bias: bool, added: int | None, parts: int | None, dtype: torch.dtype, device: torch.device, assert_close: Close
) -> None:
    for width in (64, 100):
        sum_ = make_sum(3, width, parts, dtype, device, bias=not bias, residual=True, chosen=True)
        more = make_sum(3, width, added, dtype, device)
        shift = draw(width, dtype=dtype, device=device, seed=5)
        check(sum_.plus(more.parts * 2, shift if bias else None), dtype, assert_close)


@pytest.mark.parametrize("parts", [None, 8])
@pytest.mark.parametrize("width", WIDTHS)
def test_sums_of_every_width(width: int, parts: int | None, device: torch.device, assert_close: Close) -> None:
    sum_ = make_sum(3, width, parts, torch.float16, device, bias=True, residual=True, chosen=True)
    check(sum_, torch.float16, assert_close)


def test_what_is_added_stays_as_it_is(device: torch.device) -> None:
    sum_ = make_sum(3, 64, 2, torch.float16, device, bias=True, residual=True)
    inputs = [tensor for tensor in (sum_.parts, sum_.bias, sum_.residual) if tensor is not None]
    before = [tensor.clone() for tensor in inputs]
    weight, bias = draw(2, 64, dtype=torch.float16, device=device)
    norm.norm(sum_, weight, bias, EPS)
    assert all(torch.equal(a, b) for a, b in zip(inputs, before, strict=True))


@pytest.mark.parametrize("width", [64, 100])
def test_a_row_without_variance_is_its_bias(width: int, device: torch.device) -> None:
    weight, bias = draw(2, width, dtype=torch.float32, device=device)
    found, _ = norm.norm(torch.full((2, width), 5.0, device=device), weight, bias, EPS)
    # the mean of equal numbers may be off by a rounding of theirs, which 1 / sqrt(variance + EPS) then magnifies
    rounding = 5.0 * torch.finfo(torch.float32).eps / EPS**0.5
    assert ((found - bias).abs() <= rounding * weight.abs() + 1e-6).all()


def test_a_mean_far_from_zero_costs_little_precision(device: torch.device) -> None:
    x = draw(3, 1024, dtype=torch.float32, device=device) + 1000
    one, zero = torch.ones(1024, device=device), torch.zeros(1024, device=device)
    exact = reference.norm(x.double(), one.double(), zero.double(), EPS)[0]
    assert (norm.norm(x, one, zero, EPS)[0] - exact).abs().max() <= 2e-4


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", WIDTHS)
def test_rows_of_a_table(width: int, dtype: torch.dtype, device: torch.device, assert_close: Close) -> None:
    ids = torch.tensor([0, 12, 5, 5, 1], device=device)
    table = torch.full((13, width), NAN, dtype=dtype, device=device)
    table[ids] = draw(5, width, dtype=dtype, device=device)[[0, 1, 2, 2, 3]]
    weight, bias = draw(2, width, dtype=dtype, device=device, seed=4)
    for numbers in (ids, ids.int(), ids[:1], ids[:0]):
        found = norm.embedding_norm(numbers, table, weight, bias, EPS)
        assert found.dtype == dtype
        exact = reference.embedding_norm(numbers, table.double(), weight.double(), bias.double(), EPS)
        assert_close("layer_norm", found, exact)


@pytest.mark.parametrize("in_bytes", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("first", [None, 0, 7])
def test_rows_of_a_shard_of_a_table(
    first: int | None, dtype: torch.dtype, in_bytes: bool, device: torch.device, assert_close: Close
) -> None:
    ids = torch.tensor([8, 12, 7, 0, 12, 20, 6] if first is None else [8, 12, 7, 0, 12, 40, 6], device=device)
    table: Weight = draw(21, 24, dtype=dtype, device=device)
    if in_bytes:
        values = torch.randint(-127, 128, (21, 24), dtype=torch.int8, device=device)
        table = QuantizedWeight(values, torch.rand(21, device=device), dtype)
    for numbers in (ids, ids.int(), ids[:0]):
        found = norm.embedding(numbers, table, first)
        expected = reference.embedding(numbers.long(), table, first)
        assert found.dtype == expected.dtype == dtype
        if in_bytes and dtype == torch.bfloat16:  # the interpreter does not round
            assert_close("cut off", found, expected)
        else:
            assert torch.equal(found, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("width", [1024, 4096, 14_336])
def test_real_sizes(width: int, dtype: torch.dtype, assert_close: Close) -> None:
    device = torch.device("cuda", 0)
    for rows, parts in ((1, None), (64, 8), (8192, None)):
        check(make_sum(rows, width, parts, dtype, device, bias=True, residual=True), dtype, assert_close)
    check(make_sum(256, width, 4, dtype, device, bias=True, residual=True, chosen=True), dtype, assert_close)


@pytest.mark.gpu
def test_a_table_of_more_numbers_than_32_bits_count(assert_close: Close) -> None:
    device = torch.device("cuda", 0)
    table = torch.empty(250_880, 14_336, dtype=torch.float16, device=device)
    ids = torch.tensor([250_879, 0, 200_000, 150_000], device=device)
    table[ids] = draw(4, 14_336, dtype=torch.float16, device=device)
    weight, bias = draw(2, 14_336, dtype=torch.float16, device=device, seed=4)
    found = norm.embedding_norm(ids, table, weight, bias, EPS)
    exact = reference.norm(table[ids].double(), weight.double(), bias.double(), EPS)[0]
    assert_close("layer_norm", found, exact)
