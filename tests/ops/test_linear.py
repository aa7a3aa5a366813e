"""Shapes: t tokens, h in, o out."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import get_args

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention
from tests.ops.conftest import exactly_activated
from torch import Tensor

from hasten import ops
from hasten.ops import cpu, native, reference
from hasten.ops.cpu import bf16
from hasten.ops.cpu.compiled_rows import compiled_rows

Close = Callable[[str, Tensor, Tensor], None]

ROWS = range(1, 71)
"""Decoding of one up to a batch beyond the size that weights are laid out for."""
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
LARGE = (1024, 1024)
SIZES = [(1, 1), (1, 40), (40, 1), (48, 64), (509, 64), (3, 333), LARGE]
"""(o, h)."""


def test_the_sizes_lie_on_both_sides_of_a_small_weight() -> None:
    assert {out * into < cpu.products._SMALL_WEIGHT for out, into in SIZES} == {True, False}
    assert LARGE[0] * LARGE[1] == cpu.products._SMALL_WEIGHT


def test_few_numbers_of_rows_are_compiled_and_few_rows_are_added() -> None:
    result = {rows: compiled_rows(rows) for rows in range(1, 8193)}
    assert all(rows <= found <= rows * 9 / 8 for rows, found in result.items())
    assert all(result[rows] == rows for rows in (1, 7, 32, 64, 128, 2048))
    assert len(set(result.values())) < 100


COUNTS = (0, 1, 2, 63, 64, 65)
"""Of rows, where not all of `ROWS` are tried."""


@contextmanager
def unchanged(*tensors: Tensor | None) -> Iterator[None]:
    before = [None if tensor is None else tensor.clone() for tensor in tensors]
    yield
    for tensor, old in zip(tensors, before, strict=True):
        assert tensor is None or old is None or torch.equal(tensor, old)


def draw(*shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return (torch.randn(*shape, generator=generator) * scale).to(dtype)


def exact(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """The definition in fp64."""
    out = x.double() @ weight.double().T
    if bias is not None:
        out = out + bias.double()
    if activation is not None:
        out = exactly_activated(out, activation)
    return out if residual is None else out + residual.double()


@pytest.mark.parametrize(("out", "into"), SIZES, ids=str)
def test_any_number_of_rows(out: int, into: int, assert_close: Close) -> None:
    weight, bias = draw(out, into, scale=into**-0.5), draw(out)
    packed = ops.pack_linear(weight.clone())
    assert (packed.out_features, packed.in_features) == (out, into)
    for rows in ROWS:
        x = draw(rows, into)
        found = ops.linear(x, packed, bias)
        assert_close("linear", found, F.linear(x, weight, bias))
        assert_close("linear", found, exact(x, weight, bias))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("activation", [None, *get_args(ops.Activation)])
@pytest.mark.parametrize(("out", "into"), [(48, 64), (509, 64), LARGE], ids=str)
def test_every_combination(
    out: int, into: int, bias: bool, activation: ops.Activation | None, dtype: torch.dtype, assert_close: Close
) -> None:
    weight = draw(out, into, dtype=dtype, scale=into**-0.5)
    bias_o = draw(out, dtype=dtype) if bias else None
    packed, plain = ops.pack_linear(weight), reference.pack_linear(weight, False)
    for rows in COUNTS:
        x = draw(rows, into, dtype=dtype)
        with unchanged(x, weight, bias_o):
            found = ops.linear(x, packed, bias_o, activation=activation)
        assert found.dtype == dtype
        assert_close("linear", found, exact(x, weight, bias_o, activation))
        assert_close("stepwise", found, reference.linear(x, plain, bias_o, activation))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("picked", [False, True], ids=["all rows", "some rows"])
@pytest.mark.parametrize(("out", "into"), [(48, 64), (509, 64), LARGE], ids=str)
def test_a_residual_is_added(
    out: int, into: int, picked: bool, bias: bool, dtype: torch.dtype, assert_close: Close
) -> None:
    weight = draw(out, into, dtype=dtype, scale=into**-0.5)
    bias_o = draw(out, dtype=dtype) if bias else None
    packed, plain = ops.pack_linear(weight), reference.pack_linear(weight, False)
    for rows in COUNTS:
        x, residual_to = draw(rows, into, dtype=dtype), draw(rows + 9 * picked, out, dtype=dtype)
        generator = torch.Generator().manual_seed(rows)
        rows_t = torch.randperm(rows + 9, generator=generator)[:rows] if picked else None
        with unchanged(x, weight, bias_o, residual_to, rows_t):
            found = ops.add_linear(x, packed, bias_o, residual_to, rows_t)
        assert isinstance(found, Tensor)  # a CPU has no use for a sum that is still to be made
        assert found.dtype == dtype
        taken_to = residual_to[:rows].clone()
        for row, index in enumerate([] if rows_t is None else rows_t.tolist()):
            taken_to[row] = residual_to[index]
        assert_close("linear", found, exact(x, weight, bias_o, None, taken_to))
        assert_close("stepwise", found, reference.add_linear(x, plain, bias_o, residual_to, rows_t))
        of_sum = ops.PartialSum(taken_to, residual=residual_to, residual_indices=rows_t)
        twice_to = ops.add_linear(x, packed, bias_o, of_sum)
        assert isinstance(twice_to, Tensor)
        assert_close("stepwise", twice_to, exact(x, weight, bias_o, None, 2 * taken_to.double()))
        assert_close("stepwise", twice_to, reference.add_linear(x, plain, bias_o, of_sum, None).double())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("out", "into"), [(48, 64), (509, 64), LARGE], ids=str)
def test_parts_add_up_to_the_product(out: int, into: int, dtype: torch.dtype, assert_close: Close) -> None:
    weight = draw(out, into, dtype=dtype, scale=into**-0.5)
    packed = ops.pack_linear(weight)
    for rows in COUNTS:
        x = draw(rows, into, dtype=dtype)
        with unchanged(x, weight):
            parts = ops.linear_parts(x, packed)
        assert parts.dtype == (dtype if parts.dim() == 2 else torch.float32)
        whole = parts if parts.dim() == 2 else parts.sum(0)
        assert_close("linear", whole, exact(x, weight))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("bias", "clip"), [(False, None), (True, None), (True, 0.5)])
@pytest.mark.parametrize(("heads", "kv_heads", "head_size"), [(3, 3, 8), (8, 2, 5), (4, 1, 16), (16, 8, 32)], ids=str)
@pytest.mark.parametrize("op", ["cpu", "reference"])
def test_projected_keys_and_values_go_to_the_cache(
    op: str,
    clip: float | None,
    heads: int,
    kv_heads: int,
    head_size: int,
    bias: bool,
    dtype: torch.dtype,
    assert_close: Close,
) -> None:
    into, out, block_size = 1024 if heads == 16 else 40, (heads + 2 * kv_heads) * head_size, 3
    weight = draw(out, into, dtype=dtype, scale=into**-0.5)
    bias_o = draw(out, dtype=dtype) if bias else None
    packed = ops.pack_linear(weight) if op == "cpu" else reference.pack_linear(weight, False)
    project = ops.project if op == "cpu" else reference.project
    for rows in COUNTS:
        x = draw(rows, into, dtype=dtype)
        blocks = rows // block_size + 2
        key_cache, value_cache = torch.full((2, blocks, block_size, kv_heads, head_size), -7.0, dtype=dtype)
        slots_t = torch.randperm(blocks * block_size, generator=torch.Generator().manual_seed(rows))[:rows]
        slots_t[1::4] = -1
        with unchanged(x, weight, bias_o, slots_t):
            query_tnd = project(x, packed, bias_o, key_cache, value_cache, slots_t, heads, clip=clip)
        rows_to = exact(x, weight, bias_o)
        rows_to = rows_to if clip is None else rows_to.clamp(-clip, clip)
        queries, width = heads * head_size, kv_heads * head_size
        assert query_tnd.dtype == dtype
        assert_close("linear", query_tnd, rows_to[:, :queries].reshape(rows, heads, head_size))
        for cache, first in ((key_cache, queries), (value_cache, queries + width)):
            expected = torch.full((blocks * block_size, width), -7.0, dtype=torch.float64)
            for row, slot in enumerate(slots_t.tolist()):
                if slot >= 0:
                    expected[slot] = rows_to[row, first : first + width]
            found = cache.flatten(0, 1).flatten(1)
            assert_close("linear", found, expected)
            # no slot of another token is touched
            assert found[expected[:, 0] == -7].eq(-7).all()


@pytest.mark.parametrize(("out", "into"), [(48, 64), LARGE], ids=str)
def test_rows_that_do_not_stand_side_by_side(out: int, into: int, assert_close: Close) -> None:
    weight = draw(out, into, scale=into**-0.5)
    packed = ops.pack_linear(weight)
    views = [draw(20, into)[::2], draw(10, 3 * into)[:, into : 2 * into], draw(into, 10).T, draw(1, into).expand(6, -1)]
    for x in views:
        assert not x.is_contiguous()
        assert_close("linear", ops.linear(x, packed), exact(x, weight))


@pytest.mark.parametrize("weight", [draw(64, 48).T, draw(96, 64)[::2], draw(48, 128)[:, 64:]])
def test_weights_that_are_views(weight: Tensor, assert_close: Close) -> None:
    assert not weight.is_contiguous()
    x = draw(5, 64)
    for shared in (False, True):
        assert_close("stepwise", ops.linear(x, ops.pack_linear(weight, shared=shared)), F.linear(x, weight))


@pytest.mark.parametrize("activation", get_args(ops.Activation))
def test_activations_of_all_values(activation: ops.Activation, assert_close: Close) -> None:
    values = torch.cat([torch.linspace(-12, 12, 4801), torch.tensor([0.0, -0.0, 1e-30, 1e10, -1e10, 1e25, -1e25])])
    for dtype in DTYPES:
        x = values.to(dtype).unsqueeze(1)
        x = x[exactly_activated(x, activation).to(dtype).isfinite()].unsqueeze(1)
        identity = ops.pack_linear(torch.ones(1, 1, dtype=dtype))
        found = ops.linear(x, identity, activation=activation)
        assert_close("linear", found, exactly_activated(x, activation))
        assert ops.linear(x[:1] * torch.nan, identity, activation=activation).isnan().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("out", "into"), [(48, 64), LARGE], ids=str)
def test_a_shared_weight_is_copied_only_where_it_must_be_widened(out: int, into: int, dtype: torch.dtype) -> None:
    weight = draw(out, into, dtype=dtype)
    packed = ops.pack_linear(weight, shared=True)
    held = [tensor for tensor in (packed.plain, packed.blocked, packed.panels) if tensor is not None]
    if dtype == torch.float32 and (native.kernels() is None or (out, into) == LARGE):
        assert [tensor.data_ptr() for tensor in held] == [weight.data_ptr()]
    elif dtype == torch.bfloat16 and packed.is_table:
        assert native.kernels() is not None
        assert held == []
    elif dtype == torch.bfloat16 and bf16.is_supported():
        assert [tensor.dtype for tensor in held] == [torch.bfloat16]
    else:
        assert all(tensor.dtype == torch.float32 for tensor in held)


@pytest.mark.parametrize(("out", "into"), [(48, 64), LARGE], ids=str)
def test_a_weight_that_is_read_as_it_is_may_be_moved(out: int, into: int) -> None:
    weight = draw(out, into)
    moved = ops.relocated(weight)
    assert isinstance(moved, Tensor)
    assert torch.equal(moved, weight)
    assert (moved is weight) == (native.kernels() is None or (out, into) != LARGE)
    half = weight.half()
    assert ops.relocated(half) is half


def test_bf16_is_widened_where_nothing_multiplies_it(monkeypatch: pytest.MonkeyPatch, assert_close: Close) -> None:
    monkeypatch.setattr(bf16, "is_supported", lambda: False)
    monkeypatch.setattr(native, "kernels", lambda: None)
    weight, x = draw(48, 64, dtype=torch.bfloat16, scale=0.125), draw(5, 64, dtype=torch.bfloat16)
    packed = ops.pack_linear(weight)
    held = [tensor for tensor in (packed.plain, packed.blocked, packed.panels) if tensor is not None]
    assert {tensor.dtype for tensor in held} == {torch.float32}
    assert_close("linear", ops.linear(x, packed), exact(x, weight))


@pytest.fixture
def without_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "kernels", lambda: None)


@pytest.mark.usefixtures("without_kernels")
def test_a_large_weight_is_held_once_and_a_small_one_in_both_layouts() -> None:
    large, small = ops.pack_linear(draw(*LARGE)), ops.pack_linear(draw(48, 64))
    assert large.plain is None
    assert large.blocked is not None
    assert small.plain is not None
    assert small.blocked is not None


@pytest.mark.usefixtures("without_kernels")
def test_without_the_matrix_library(monkeypatch: pytest.MonkeyPatch, assert_close: Close) -> None:
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    for out, into in ((48, 64), LARGE):
        weight = draw(out, into, scale=into**-0.5)
        packed = ops.pack_linear(weight)
        assert packed.blocked is None
        for rows in (1, 7):
            x = draw(rows, into)
            assert_close("linear", ops.linear(x, packed), F.linear(x, weight))
