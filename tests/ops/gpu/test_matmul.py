"""Shapes: t tokens, h in, o out, n query heads, m key/value heads, d head size."""

from collections.abc import Callable
from dataclasses import replace
from typing import get_args

import numpy as np
import pytest
import torch
from torch import Tensor

from hasten import ops
from hasten.ops import PackedLinear, reference
from hasten.ops.gpu import gelu_product, library, matmul
from hasten.ops.heads import HeadTransform

# tests/bench/test_kernels.py runs every kernel on every Python
Close = Callable[[str, Tensor, Tensor], None]

HAS_GPU = torch.cuda.is_available()
NAN = float("nan")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# bf16 is not among numpy's types: the interpreter multiplies matrices of its bits instead.
HALF = [torch.float16, torch.bfloat16 if HAS_GPU else pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]
ROWS = [2, 15, 16, 17, 33, 64]
"""Of the kernel for few rows: at both ends, and around each number of rows that it is compiled for."""
BLOOM_7B1 = {"qkv": (12_288, 4096), "dense": (4096, 4096), "up": (16_384, 4096), "down": (4096, 16_384)}
REAL = {**BLOOM_7B1, "narrow head": (250_880, 1024), "560m up": (4096, 1024), "176b dense of 8": (14_336, 1792)}
"""(o, h)."""


def draw(*shape: int, dtype: torch.dtype, device: torch.device, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return (torch.randn(*shape, generator=generator) * scale).to(dtype).to(device)


def make_weight(out: int, into: int, dtype: torch.dtype, device: torch.device) -> PackedLinear:
    return matmul.pack_linear(draw(out, into, dtype=dtype, device=device, scale=into**-0.5), shared=False)


def wide(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.double()


def exact(x: Tensor, weight: PackedLinear, bias: Tensor | None = None, activation: str | None = None) -> Tensor:
    """The reference in fp64."""
    return reference.linear(x.double(), replace(weight, plain=wide(weight.plain)), wide(bias), activation)


def check_linear(
    rows: int, weight: PackedLinear, bias: bool, activation: str | None, dtype: torch.dtype, assert_close: Close
) -> None:
    assert weight.plain is not None
    device = weight.plain.device
    x = draw(rows, weight.in_features, dtype=dtype, device=device)
    bias_o = draw(weight.out_features, dtype=dtype, device=device) if bias else None
    found = matmul.linear(x, weight, bias_o, activation)
    assert found.dtype == dtype
    # More rows are cuBLAS's, with its own GELU.
    kind = "linear" if rows <= matmul.MOST_ROWS else "stepwise"
    assert_close(kind, found, exact(x, weight, bias_o, activation))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", [None, *get_args(ops.Activation)])
@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize(("out", "into"), [(5, 128), (40, 384), (7, 100), (1, 2049), (4, 4096)], ids=str)
def test_one_row(
    out: int,
    into: int,
    bias: bool,
    activation: str | None,
    dtype: torch.dtype,
    device: torch.device,
    assert_close: Close,
) -> None:
    check_linear(1, make_weight(out, into, dtype, device), bias, activation, dtype, assert_close)


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize(("out", "into"), [(40, 128), (130, 384), (64, 1024)], ids=str)
def test_few_rows(
    out: int, into: int, rows: int, dtype: torch.dtype, device: torch.device, assert_close: Close
) -> None:
    weight = make_weight(out, into, dtype, device)
    activations = get_args(ops.Activation)
    for bias, activation in ((True, activations[(rows + out) % len(activations)]), (False, None)):
        check_linear(rows, weight, bias, activation, dtype, assert_close)


@pytest.mark.parametrize("rows", [2, 17, 64])
@pytest.mark.parametrize("activation", [None, "gelu_tanh", "gelu"])
@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
def test_every_cut_does_every_combination(
    bias: bool,
    activation: str | None,
    rows: int,
    device: torch.device,
    assert_close: Close,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    weight = make_weight(130, 256, torch.float16, device)
    for multiprocessors in (1, 132):
        monkeypatch.setattr(matmul, "multiprocessors", lambda index, count=multiprocessors: count)
        check_linear(rows, weight, bias, activation, torch.float16, assert_close)


@pytest.mark.parametrize("rows", [1, 5])
def test_gelu_of_large_values(rows: int, device: torch.device, assert_close: Close) -> None:
    weight = make_weight(40, 128, torch.float16, device)
    bias = torch.linspace(-200, 200, 40).half().to(device)
    x = draw(rows, 128, dtype=torch.float16, device=device)
    with np.errstate(over="ignore"):  # the exponential's infinity is meant: something divided by it is 0
        found = matmul.linear(x, weight, bias, "gelu_tanh")
    assert_close("linear", found, exact(x, weight, bias, "gelu_tanh"))


@pytest.mark.parametrize("rows", [1, 2, 17, 64])
@pytest.mark.parametrize(("out", "into", "splits"), [(40, 128, 1), (40, 384, 1), (130, 512, 4), (20, 2048, 8)], ids=str)
def test_parts_add_up_to_the_product(
    out: int, into: int, splits: int, rows: int, device: torch.device, assert_close: Close
) -> None:
    weight = make_weight(out, into, torch.float16, device)
    x = draw(rows, into, dtype=torch.float16, device=device)
    found = matmul.linear_parts(x, weight)
    if rows == 1 or splits == 1:
        assert found.dtype == torch.float16
        assert_close("linear", found, exact(x, weight))
        return
    assert found.dtype == torch.float32
    assert found.shape == (splits, rows, out)
    assert_close("parts", found.sum(0), exact(x, weight))
    for part, x_part, weight_part in zip(found, x.double().chunk(splits, 1), columns(weight, splits), strict=True):
        assert_close("parts", part, x_part @ weight_part.T)


def columns(weight: PackedLinear, parts: int) -> tuple[Tensor, ...]:
    assert weight.plain is not None
    return weight.plain.double().chunk(parts, 1)


def check_project(
    rows: int,
    heads: tuple[int, int, int],
    dtype: torch.dtype,
    slots: list[int],
    into: int,
    device: torch.device,
    clip: float | None = None,
) -> tuple[list[Tensor], list[Tensor]]:
    """Queries and both caches, by the kernel and by the reference in fp64."""
    n, m, d = heads
    weight = make_weight((n + 2 * m) * d, into, dtype, device)
    x, bias = draw(rows, into, dtype=dtype, device=device), draw(weight.out_features, dtype=dtype, device=device)
    keys, values = torch.full((2, rows + 2, 4, m, d), NAN, dtype=dtype, device=device)
    exact_keys, exact_values = keys.double(), values.double()
    slots_t = torch.tensor(slots, dtype=torch.int64, device=device)
    double = replace(weight, plain=wide(weight.plain))
    expected = reference.project(x.double(), double, bias.double(), exact_keys, exact_values, slots_t, n, clip=clip)
    found = matmul.project(x, weight, bias, keys, values, slots_t, n, clip=clip)
    return [found, keys, values], [expected, exact_keys, exact_values]


def assert_projected(found: list[Tensor], expected: list[Tensor], assert_close: Close) -> None:
    assert_close("linear", found[0], expected[0])
    for cache, wanted in zip(found[1:], expected[1:], strict=True):
        assert torch.equal(cache.isnan(), wanted.isnan()), "written where nothing belongs, or not where it does"
        assert_close("linear", cache.nan_to_num(0), wanted.nan_to_num(0))


def test_gelu_by_odds_is_near_the_exact_one(device: torch.device) -> None:
    most = torch.finfo(torch.bfloat16).max
    far = torch.tensor([0.0, 13.0, 100.0, 6e4, 1e10, most], device=device)
    x = torch.cat((torch.linspace(-12, 12, 6000, device=device), far, -far))
    expected = reference.activated(x.double(), "gelu")
    with np.errstate(over="ignore"):  # odds of 1 to infinity are right far from 0
        found = matmul._activated(x.clone(), "gelu_by_odds")
    assert ((found.double() - expected).abs() <= 3.1e-6 + 3e-7 * expected.abs()).all()
    assert matmul._activated(torch.full((4,), NAN, device=device), "gelu_by_odds").isnan().all()


@pytest.mark.parametrize("rows", [65, 130])
def test_gelu_of_what_the_library_multiplies(rows: int, device: torch.device, assert_close: Close) -> None:
    weight = make_weight(40, 72, torch.float16, device)
    x, bias = draw(rows, 72, dtype=torch.float16, device=device), draw(40, dtype=torch.float16, device=device)
    product = matmul.linear(x, weight, bias, None)  # rounded once already
    expected = reference.activated(product.double(), "gelu")
    assert_close("linear", matmul.linear(x, weight, bias, "gelu"), expected)


@pytest.mark.parametrize("rows", [1, 128, 300])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(("out", "into"), [(256, 64), (768, 192)])
def test_gelu_of_many_rows_ends_the_product(
    out: int,
    into: int,
    biased: bool,
    rows: int,
    device: torch.device,
    assert_close: Close,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    weight = make_weight(out, into, torch.float16, device)
    x, drawn = (draw(*shape, dtype=torch.float16, device=device) for shape in ((rows, into), (out,)))
    bias = drawn if biased else None
    assert not gelu_product.serves(x, weight), "it has too few rows"
    monkeypatch.setattr(gelu_product, "_LEAST_ROWS", 1)
    monkeypatch.setattr(gelu_product, "_EVEN", 0.0)
    if not gelu_product.serves(x, weight):
        pytest.skip("the device has no copy engine for tiles")
    product = reference.linear(x.double(), replace(weight, plain=wide(weight.plain)), wide(bias), None)
    expected = reference.activated(product, "gelu")
    assert_close("linear", gelu_product.gelu_product(x, weight, bias), expected)
    for other in (replace(weight, fixed_order=True), make_weight(out + 8, into, torch.float16, device)):
        assert not gelu_product.serves(x, other)
    assert not gelu_product.serves(x.float(), weight)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("rows", [16_384, 32_679])
def test_real_sizes_with_gelu(rows: int, dtype: torch.dtype, assert_close: Close) -> None:
    device = torch.device("cuda", 0)
    weight = make_weight(4096, 1024, dtype, device)
    x, bias = draw(rows, 1024, dtype=dtype, device=device), draw(4096, dtype=dtype, device=device)
    product = reference.linear(x[-300:].double(), replace(weight, plain=wide(weight.plain)), wide(bias), None)
    found = matmul.linear(x, weight, bias, "gelu")
    assert_close("linear", found[-300:], reference.activated(product, "gelu"))
    by_pieces = torch.cat([matmul.linear(piece, weight, bias, "gelu") for piece in x.split(4096)])
    assert_close("stepwise", found, by_pieces.double())  # which are rounded before the activation, too


@pytest.mark.parametrize("turns", [False, True], ids=["", "turned"])
@pytest.mark.parametrize("rows", [1, 33, 65])
def test_what_no_later_step_reads_stays_where_the_product_leaves_it(
    rows: int, turns: bool, device: torch.device
) -> None:
    """Few rows go to the caches, as turned heads do; of many others these stay as they are."""
    n, m, d = 4, 2, 32
    weight = make_weight((n + 2 * m) * d, 128, torch.float16, device)
    x, bias = draw(rows, 128, dtype=torch.float16, device=device), draw(256, dtype=torch.float16, device=device)
    caches, expected = torch.full((2, 2, rows + 3, 1, m, d), NAN, dtype=torch.float16, device=device)
    slots_t = torch.arange(rows, device=device)
    transform = None
    if turns:
        angles = draw(rows, d // 2, dtype=torch.float32, device=device)
        transform = HeadTransform(positions_t=slots_t, table_pr=torch.cat((angles.cos(), angles.sin()), dim=1))
    query = matmul.project(x, weight, bias, expected[0], expected[1], slots_t, n, transform)
    found = matmul.project_consecutive(x, weight, bias, caches[0], caches[1], slots_t, n, transform)
    assert torch.equal(found[0], query)
    for cache, wanted in zip(found[1:], expected, strict=True):
        assert torch.equal(cache[:rows], wanted[:rows])
    assert bool(caches.isnan().all()) == (rows == 65 and not turns)


def make_slots(rows: int) -> list[int]:
    """Slots in no order, every third token without one."""
    order = torch.randperm(4 * (rows + 2), generator=torch.Generator().manual_seed(rows)).tolist()
    return [-1 if row % 3 == 1 else slot for row, slot in enumerate(order[:rows])]


@pytest.mark.parametrize("rows", [2, 16, 33])
@pytest.mark.parametrize("heads", [(2, 2, 16), (4, 1, 24), (1, 1, 80)], ids=str)
def test_few_rows_project_to_queries_and_slots(
    heads: tuple[int, int, int], rows: int, device: torch.device, assert_close: Close
) -> None:
    found, expected = check_project(rows, heads, torch.float16, make_slots(rows), 128, device)
    assert_projected(found, expected, assert_close)


@pytest.mark.parametrize("rows", [1, 5, 65])
def test_queries_keys_and_values_are_clipped(rows: int, device: torch.device, assert_close: Close) -> None:
    found, expected = check_project(rows, (4, 1, 24), torch.float16, make_slots(rows), 128, device, clip=0.5)
    assert_projected(found, expected, assert_close)
    assert found[0].abs().max() == 0.5


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("slot", [-1, 0, 11])
def test_one_row_projects_to_queries_and_a_slot(
    slot: int, dtype: torch.dtype, device: torch.device, assert_close: Close
) -> None:
    found, expected = check_project(1, (4, 1, 24), dtype, [slot], 100, device)
    assert_projected(found, expected, assert_close)


@pytest.mark.parametrize("rows", [0, 2, 65, 70])
def test_what_the_kernels_do_not_serve_is_projected_all_the_same(
    rows: int, device: torch.device, assert_close: Close
) -> None:
    found, expected = check_project(rows, (4, 1, 24), torch.float32, make_slots(rows), 40, device)
    assert_projected(found, expected, assert_close)


def test_a_shared_weight_is_not_copied_and_a_view_of_another_order_is(device: torch.device) -> None:
    weight = draw(6, 8, dtype=torch.float16, device=device)
    for shared in (False, True):
        packed = matmul.pack_linear(weight, shared)
        assert packed.plain is not None
        assert packed.plain.data_ptr() == weight.data_ptr()
    turned = matmul.pack_linear(weight.T, shared=False)
    assert turned.plain is not None
    assert turned.plain.is_contiguous()
    assert (turned.out_features, turned.in_features) == (8, 6)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("out", "into"), REAL.values(), ids=list(REAL))
def test_real_sizes(out: int, into: int, dtype: torch.dtype, assert_close: Close) -> None:
    weight = make_weight(out, into, dtype, torch.device("cuda", 0))
    for rows in (1, *ROWS, 65, 500):
        check_linear(rows, weight, True, "gelu_tanh", dtype, assert_close)
        x = draw(rows, into, dtype=dtype, device=torch.device("cuda", 0))
        parts = matmul.linear_parts(x, weight)
        kind, total = ("linear", parts) if parts.dim() == 2 else ("parts", parts.sum(0))
        assert_close(kind, total, exact(x, weight))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [1, 2, 16, 64, 65, 8192])
def test_real_sizes_project(rows: int, dtype: torch.dtype, assert_close: Close) -> None:
    found, expected = check_project(rows, (32, 32, 128), dtype, make_slots(rows), 4096, torch.device("cuda", 0))
    assert_projected(found, expected, assert_close)


@pytest.mark.parametrize("block_m", [16, 32, 64])
@pytest.mark.parametrize("cut", [matmul._WIDE, matmul._NARROW, matmul._MIDDLE, matmul._TALL], ids=str)
def test_stages_are_as_many_as_fit(cut: matmul.Cut, block_m: int) -> None:
    assert matmul._stages(cut, block_m, 227 << 10) == cut.stages
    for shared in (99 << 10, 64 << 10):
        stages = matmul._stages(cut, block_m, shared)
        assert 1 <= stages <= cut.stages
        assert stages * (cut.block_n + block_m) * cut.block_k * 2 <= shared


def fixed(out: int, into: int, dtype: torch.dtype, device: torch.device) -> PackedLinear:
    with ops.fixed_order():
        return make_weight(out, into, dtype, device)


def assert_same(found: Tensor, expected: Tensor, rows: int, assert_close: Close) -> None:
    """Bit by bit on a GPU; the interpreter leaves the order of a matrix product to numpy."""
    if found.is_cuda:
        assert torch.equal(found, expected), f"among {rows} rows"
    else:
        assert_close("parts" if found.dtype == torch.float32 else "stepwise", found, expected)


FIXED_ROWS = [1, 2, 16, 17, 64, 65, 130]
FIXED_DTYPES = [torch.float32, *HALF]


@pytest.mark.parametrize("dtype", FIXED_DTYPES, ids=str)
@pytest.mark.parametrize(("out", "into"), [(40, 128), (130, 200)], ids=str)
def test_in_a_fixed_order_a_row_is_the_same_among_any_number(
    out: int, into: int, dtype: torch.dtype, device: torch.device, assert_close: Close
) -> None:
    weight = fixed(out, into, dtype, device)
    bias = draw(out, dtype=dtype, device=device)
    x = draw(max(FIXED_ROWS), into, dtype=dtype, device=device)
    whole = matmul.linear(x, weight, bias, "gelu_tanh")
    assert_close("stepwise", whole, exact(x, weight, bias, "gelu_tanh"))
    for rows in FIXED_ROWS:
        for first in (0, max(FIXED_ROWS) - rows):
            found = matmul.linear(x[first : first + rows].clone(), weight, bias, "gelu_tanh")
            assert_same(found, whole[first : first + rows], rows, assert_close)


@pytest.mark.parametrize("dtype", FIXED_DTYPES, ids=str)
def test_parts_in_a_fixed_order_come_to_the_same(
    dtype: torch.dtype, device: torch.device, assert_close: Close, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(matmul, "_MAX_SPLIT_ROWS", 70)
    weight = fixed(40, 1024, dtype, device)
    x = draw(100, 1024, dtype=dtype, device=device)
    rows = {}
    for count in (1, 20, 70, 100):
        parts = matmul.linear_parts(x[:count].clone(), weight)
        total = parts if parts.dim() == 2 else parts[0]
        for part in parts[1:] if parts.dim() == 3 else ():
            total = total + part
        rows[count] = total
        assert (parts.shape[0] > 1) == (dtype != torch.float32 and count <= 70) or parts.dim() == 2
    assert_close("parts" if dtype != torch.float32 else "linear", rows[100].float(), exact(x, weight).float())
    for count, total in rows.items():
        assert_same(total, rows[100][:count], count, assert_close)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_the_library_and_tiles_of_many_rows_change_no_bit(dtype: torch.dtype, device: torch.device) -> None:
    weight = fixed(2048, 8192, dtype, device)
    bias = draw(2048, dtype=dtype, device=device)
    x = draw(1100, 8192, dtype=dtype, device=device)
    few = [matmul.linear(x[first : first + 64], weight, bias, "gelu_tanh") for first in (0, 1036)]
    parts = matmul.linear_parts(x[:5], weight)
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    assert len(parts) > 1
    for rows in (65, 80, 256, 513, 1000, 1100):
        found = matmul.linear(x[:rows].contiguous(), weight, bias, "gelu_tanh")
        assert torch.equal(found[:64], few[0]), rows
        sums = matmul.linear_parts(x[:rows].contiguous(), weight)
        whole = sums[0]
        for part in sums[1:]:
            whole = whole + part
        assert torch.equal(whole[:5], total), rows
    assert torch.equal(found[1036:], few[1])


@pytest.mark.parametrize(
    ("rows", "padded"), [(1, 16), (65, 80), (256, 256), (257, 288), (1000, 1024), (5000, 5120), (8191, 8192)]
)
def test_the_library_is_given_few_numbers_of_rows(rows: int, padded: int) -> None:
    assert library.padded_rows(rows) == padded


@pytest.mark.parametrize("most", [1, 40, 100, 8192, 20_000])
def test_all_numbers_of_rows_that_the_library_is_given_can_be_compared_ahead(most: int) -> None:
    counts = library.row_counts(most)
    assert max(counts) <= most
    given = sorted({library.padded_rows(rows) for rows in range(1, min(most, 8192) + 1)})
    assert [library.padded_rows(count) for count in counts] == given


def test_rows_are_extended_by_the_memory_behind_them_or_copied() -> None:
    roomy = library.with_room(torch.empty(0), 100, 2, 4)
    assert roomy.shape == (100, 2, 4)
    rows = roomy.flatten(1).normal_()
    extended = library.extended(rows, 104)
    assert extended.shape == (104, 8)
    assert extended.data_ptr() == roomy.data_ptr()
    for tight in (torch.randn(100, 8), torch.randn(110, 8)[10:], torch.randn(200, 16)[:100, :8]):
        extended = library.extended(tight, 104)
        assert extended.shape == (104, 8)
        assert torch.equal(extended[:100], tight)
    assert library.extended(rows, 100).data_ptr() == roomy.data_ptr()


def test_the_library_is_given_more_rows_where_that_takes_no_copy() -> None:
    roomy = library.with_room(torch.empty(0), 1500, 8)
    given = library.given(roomy)
    assert (given.shape, given.data_ptr()) == ((1536, 8), roomy.data_ptr())
    for whole in (given, torch.randn(1500, 8), library.with_room(torch.empty(0), 9000, 8), torch.empty(0, 8)):
        assert library.given(whole) is whole


def test_one_bit_is_enough_to_leave_the_library_out() -> None:
    calls = []

    def own(x_th: Tensor) -> Tensor:
        return x_th @ torch.ones(8, 4)

    def other(x_th: Tensor) -> Tensor:
        calls.append(x_th.shape)
        out_to = own(x_th)
        if len(calls) == 3:
            out_to[0, 0] = out_to[0, 0].nextafter(torch.tensor(9.0))
        return out_to

    assert library._agree(torch.empty(1 << 16, 8), 4, own, own)
    assert not library._agree(torch.empty(1 << 16, 8), 4, other, own)
    assert len(calls) == 3


def test_parts_are_added_up_in_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU without products of half types in fp32: their operands are widened first."""

    def mm(a: Tensor, b: Tensor, out_dtype: torch.dtype) -> Tensor:
        return a.to(out_dtype) @ b.to(out_dtype)

    def addmm(total: Tensor, a: Tensor, b: Tensor, out_dtype: torch.dtype, out: Tensor) -> Tensor:
        assert total.dtype == out_dtype
        assert out is total
        return out.add_(mm(a, b, out_dtype))

    monkeypatch.setattr(torch, "mm", mm)
    monkeypatch.setattr(torch, "addmm", addmm)
    x, weight = torch.randn(6, 64).half(), torch.randn(5, 64).half()
    found = library._by_parts(x, weight, 4)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, (x.float() @ weight.float().T).unsqueeze(0))
