"""Weights with scales of groups: layout, definition, and products on a CPU. Shapes: t tokens, o out, h in."""

from typing import get_args

import pytest
import torch
from tests.ops.conftest import exactly_activated
from torch import Tensor

from hasten import ops
from hasten.ops import Columns, GroupedWeight, native, reference
from hasten.ops.cpu import grouped as cpu_grouped
from hasten.ops.grouped import pack_nibbles, packs, unpack_nibbles

EXACT, IN_15_BITS, IN_BF16 = 2e-5, 5e-4, 2e-2
"""Largest error, relative to values above 1: of weights widened to fp32, of the kernels, and of torch's product."""


def draw(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def make_weight(
    out: int,
    into: int,
    size: int,
    bits: int = 4,
    *,
    zeros: bool = False,
    shuffled: bool = False,
    scaled: bool = False,
    dtype: torch.dtype = torch.float32,
) -> GroupedWeight:
    generator = torch.Generator().manual_seed(out + into)
    middle, groups = 1 << (bits - 1), into // size
    values = torch.randint(2 * middle, (out, into), dtype=torch.uint8, generator=generator)
    scales = (torch.rand(groups, out, generator=generator) + 0.5) * into**-0.5 / middle
    drawn = torch.randint(2 * middle, (groups, out), dtype=torch.uint8, generator=generator)
    order = torch.randperm(into, generator=generator) if shuffled else None
    inputs = torch.rand(into, generator=generator) + 0.5 if scaled else None
    return GroupedWeight(
        pack_nibbles(values) if bits == 4 and packs(into) else values,
        scales.bfloat16(),
        drawn if zeros else None,
        middle,
        into,
        dtype,
        Columns(order, inputs),
    )


def exact(x: Tensor, weight: GroupedWeight) -> Tensor:
    """Element by element, from what each number stands for."""
    out, into = weight.shape
    values, order = weight.integers(), weight.columns.order
    total = torch.zeros(x.shape[0], out, dtype=torch.float64)
    for column in range(into):
        group = column // weight.group_size
        zero = weight.middle if weight.zeros is None else weight.zeros[group].double()
        feature = column if order is None else int(order[column])
        scale = 1.0 if weight.columns.scales is None else float(weight.columns.scales[feature])
        row = (values[:, column].double() - zero) * weight.scales[group].double()
        total += x[:, feature : feature + 1].double() * scale * row
    return total


def error(found: Tensor, expected: Tensor) -> float:
    assert found.shape == expected.shape
    return float(((found.double() - expected).abs() / expected.abs().clamp(min=1)).max()) if found.numel() else 0.0


def test_nibbles_are_packed_in_quarters_of_128() -> None:
    values = torch.arange(256).div(32, rounding_mode="floor").to(torch.uint8).view(1, 256)
    packed = pack_nibbles(values)
    assert (packed.dtype, packed.shape) == (torch.int16, (1, 64))
    assert [int(packed[0, 5]), int(packed[0, 34])] == [0x3210, 0x7654]
    drawn = torch.randint(16, (5, 384), dtype=torch.uint8)
    assert torch.equal(unpack_nibbles(pack_nibbles(drawn)), drawn)
    assert [packs(columns) for columns in (32, 64, 96, 128)] == [False, False, False, True]


CASES = {
    "groups of 32": make_weight(48, 128, 32),
    "groups of 128, with zeros": make_weight(80, 256, 128, zeros=True),
    "one group": make_weight(100, 192, 192),
    "in an order, with scales of inputs": make_weight(48, 128, 64, zeros=True, shuffled=True, scaled=True),
    "groups of 16": make_weight(48, 128, 16, zeros=True),
    "a width that is not packed": make_weight(7, 40, 40, shuffled=True),
    "bytes of 4 bits": make_weight(48, 96, 32, zeros=True),
    "8 bits": make_weight(48, 128, 32, bits=8, zeros=True, shuffled=True),
    "8 bits, no zeros": make_weight(600, 24, 24, bits=8),
}
BY_TORCH = {
    "groups of 32",
    "groups of 128, with zeros",
    "one group",
    "in an order, with scales of inputs",
    "bytes of 4 bits",
}


@pytest.fixture(params=["kernels", "torch"])
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether the kernels multiply, which take all cases; without them torch does, or weights are widened."""
    if request.param == "kernels":
        if native.integer_kernels() is None:
            pytest.skip("no numba, or no AVX-512 VNNI")
        return True
    monkeypatch.setattr(native, "integer_kernels", lambda: None)
    return False


def bound_of(name: str, kernels: bool) -> float:
    """Of the error in a case."""
    return IN_15_BITS if kernels else IN_BF16 if name in BY_TORCH else EXACT


@pytest.mark.parametrize("name", CASES)
def test_any_number_of_rows(name: str, kernels: bool) -> None:
    weight = CASES[name]
    packed = ops.pack_linear(weight)
    assert (packed.integers is not None) == kernels
    assert (packed.blocked_groups is not None) == (not kernels and name in BY_TORCH)
    bound = bound_of(name, kernels)
    definition = reference.pack_linear(weight, False)
    for rows in (0, 1, 2, 33):
        x = draw(rows, weight.shape[1])
        before = x.clone()
        assert error(ops.linear(x, packed), exact(x, weight)) <= bound
        assert error(reference.linear(x.double(), definition, None, None), exact(x, weight)) <= 1e-12
        assert torch.equal(x, before)


@pytest.mark.parametrize("name", ["groups of 32", "8 bits"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_every_ending(name: str, dtype: torch.dtype, kernels: bool) -> None:
    weight, bias = CASES[name], draw(48, dtype=dtype)
    packed, x, residual = ops.pack_linear(weight), draw(7, 128, dtype=dtype), draw(7, 48, dtype=dtype)
    bound = max(bound_of(name, kernels), 1e-2 if dtype == torch.bfloat16 else 2e-3)
    sums = exact(x, weight) + bias.double()
    for activation in get_args(ops.Activation):
        found = ops.linear(x, packed, bias, activation=activation)
        assert found.dtype == dtype
        assert error(found, exactly_activated(sums, activation)) <= bound
    added = ops.add_linear(x, packed, bias, residual)
    assert isinstance(added, Tensor)
    assert error(added, sums + residual.double()) <= bound


@pytest.mark.parametrize("name", CASES)
def test_the_result_of_a_token_does_not_depend_on_the_others(name: str, kernels: bool) -> None:
    packed, into = ops.pack_linear(CASES[name]), CASES[name].shape[1]
    x = draw(40, into)
    among = ops.linear(torch.cat((x, 1e4 * draw(3, into))), packed)[:40]
    alone = torch.cat([ops.linear(row, packed) for row in x.split(1)])
    if kernels or name in BY_TORCH:
        assert torch.equal(alone, among)
    torch.testing.assert_close(alone, among, rtol=1e-5, atol=1e-5)


def test_groups_larger_than_torch_takes_are_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "integer_kernels", lambda: None)
    blocked = ops.pack_linear(make_weight(64, 1024, 512)).blocked_groups
    assert blocked is not None
    assert (blocked.group_size, blocked.scales.shape) == (256, (4, 64, 2))
    assert cpu_grouped.pack_linear(make_weight(64, 128, 128, bits=8)).blocked_groups is None
