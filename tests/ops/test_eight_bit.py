"""Products with weights of 8 bits on a CPU, and rows of int8 tables. Shapes: t tokens, h in, o out, v vocabulary."""

from collections.abc import Callable
from dataclasses import replace
from typing import get_args

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention
from tests.ops.conftest import exactly_activated
from torch import Tensor

from hasten import ops
from hasten.ops import QuantizedWeight, native, reference, rounding
from hasten.ops.cpu import int8

Close = Callable[[str, Tensor, Tensor], None]

BOUND = {torch.float32: 5e-4, torch.float16: 1e-3, torch.bfloat16: 8e-3}
"""Largest error, as in `assert_close`, of outputs of about 1: activations of 15 bits, and the type's rounding."""
DTYPES = list(BOUND)
SIZES = [(1, 1), (1, 40), (40, 1), (48, 64), (509, 64), (3, 333), (300, 1024)]
COUNTS = (0, 1, 2, 33, 600)
FP8 = torch.float8_e4m3fn
KINDS: dict[str, tuple[torch.dtype, torch.dtype | None]] = {
    "int8": (torch.int8, None),
    "w8a8": (torch.int8, torch.int8),
    "fp8": (FP8, FP8),
}
"""Types of weights, and what inputs are rounded to."""


@pytest.fixture(params=["kernels", "exact", "saturating"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """All ways to multiply: by kernels, where the CPU has them; by oneDNN, where it adds int8 up exactly; in fp32."""
    if request.param == "kernels":
        if native.integer_kernels() is None:
            pytest.skip("no numba, or no AVX-512 VNNI")
        return "kernels"
    monkeypatch.setattr(native, "integer_kernels", lambda: None)
    if request.param == "exact" and not int8.exact_int8():
        pytest.skip("this CPU saturates sums of int8 products")
    monkeypatch.setattr(int8, "exact_int8", lambda: request.param == "exact")
    return str(request.param)


def draw(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def make_weight(out: int, into: int, dtype: torch.dtype = torch.float32, kind: str = "int8") -> QuantizedWeight:
    values_type, inputs = KINDS[kind]
    generator = torch.Generator().manual_seed(out + into)
    values = torch.randint(-127, 128, (out, into), generator=generator).float().to(values_type)
    return QuantizedWeight(values, (torch.rand(out, generator=generator) + 0.5) * into**-0.5 / 73, dtype, inputs)


def exact(x: Tensor, weight: QuantizedWeight) -> Tensor:
    inputs = x if weight.inputs is None else rounding.rounded(x, weight.inputs)
    return inputs.double() @ (weight.values.double() * weight.scales.double().unsqueeze(1)).T


def assert_near(found: Tensor, expected: Tensor) -> None:
    assert found.shape == expected.shape
    error = (found.double() - expected).abs() / expected.abs().clamp(min=1)
    assert error.numel() == 0 or error.max() <= BOUND[found.dtype]


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("shared", [False, True], ids=["own", "shared"])
@pytest.mark.parametrize(("out", "into"), SIZES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_any_number_of_rows(kind: str, out: int, into: int, shared: bool) -> None:
    weight = make_weight(out, into, kind=kind)
    packed = ops.pack_linear(weight, shared=shared)
    for rows in COUNTS:
        x = draw(rows, into)
        before = x.clone()
        assert_near(ops.linear(x, packed), exact(x, weight))
        assert torch.equal(x, before)


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", [None, *get_args(ops.Activation)])
@pytest.mark.parametrize("kind", KINDS)
def test_every_ending(kind: str, activation: ops.Activation | None, dtype: torch.dtype) -> None:
    weight, bias = make_weight(48, 64, dtype, kind), draw(48, dtype=dtype)
    packed, x, residual = ops.pack_linear(weight), draw(7, 64, dtype=dtype), draw(7, 48, dtype=dtype)
    sums = exact(x, weight) + bias.double()
    ended = sums if activation is None else exactly_activated(sums, activation)
    assert_near(ops.linear(x, packed, bias, activation=activation), ended)
    added = ops.add_linear(x, packed, bias, residual)
    assert isinstance(added, Tensor)
    assert_near(added, sums + residual.double())
    if activation is not None:
        gate, up = sums.chunk(2, 1)
        found = ops.gated_linear(x, packed, bias, activation)
        assert_near(found, exactly_activated(gate, activation) * up)
        assert found.dtype == dtype


@pytest.mark.parametrize("inputs", [torch.int8, FP8], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_inputs_become_the_nearest_multiples_of_a_unit_of_their_token(dtype: torch.dtype, inputs: torch.dtype) -> None:
    x = draw(9, 333, dtype=dtype) * torch.logspace(-4, 3, 9).to(dtype)[:, None]
    x[2] = 0
    numbers, units = rounding.numbers_of(x, inputs)
    largest = rounding.LARGEST[inputs]
    assert torch.equal(numbers.to(inputs).float(), numbers)
    assert numbers.abs().amax(1).tolist() == [largest if row != 2 else 0 for row in range(9)]
    error = (rounding.rounded(x, inputs).double() - x.double()).abs()
    step = units.double() if inputs == torch.int8 else (x.double().abs() / 8).maximum(units.double() * 2**-9)
    assert bool((error <= 0.5001 * step).all())


@pytest.mark.parametrize("kind", KINDS)
def test_the_definition_multiplies_by_the_widened_weight(kind: str) -> None:
    weight, x = make_weight(48, 64, kind=kind), draw(7, 64)
    packed = reference.pack_linear(weight, False)
    torch.testing.assert_close(reference.linear(x.double(), packed, None, None), exact(x, weight))
    torch.testing.assert_close(reference.linear(x, packed, None, None).double(), exact(x, weight), rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("kind", KINDS)
def test_the_result_of_a_token_does_not_depend_on_the_others(kind: str) -> None:
    packed = ops.pack_linear(make_weight(300, 1024, kind=kind))
    x = draw(40, 1024)
    among = ops.linear(torch.cat((x, 1e4 * draw(3, 1024))), packed)[:40]
    torch.testing.assert_close(ops.linear(x[:1], packed), among[:1], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ops.linear(x, packed), among, rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(not int8.exact_int8(), reason="this CPU saturates sums of int8 products")
@pytest.mark.parametrize("kind", ["int8", "w8a8"])
def test_sums_of_int8_are_the_same_bits_among_any_others(kind: str) -> None:
    packed = ops.pack_linear(make_weight(300, 1024, kind=kind))
    x = draw(40, 1024)
    among = ops.linear(torch.cat((x, 1e4 * draw(3, 1024))), packed)
    for row in (0, 7, 39):
        assert torch.equal(ops.linear(x[row : row + 1], packed)[0], among[row])


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_not_finite_stays_so_in_its_token_alone(kind: str, value: float) -> None:
    packed = ops.pack_linear(make_weight(48, 64, kind=kind))
    x = draw(3, 64)
    whole = ops.linear(x, packed)
    x[1, 5] = value
    found = ops.linear(x, packed)
    assert not found[1].isfinite().any()
    torch.testing.assert_close(found[::2], whole[::2])


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("kind", KINDS)
def test_zeros_and_the_smallest_and_largest_values(kind: str) -> None:
    weight = make_weight(48, 64, kind=kind)
    packed = ops.pack_linear(weight)
    for scale in (0.0, 1e-44, 1e-30, 1e30):
        x = draw(3, 64) * scale
        found, expected = ops.linear(x, packed), exact(x, weight)
        assert (found.double() - expected).abs().max() <= 1e-3 * max(float(expected.abs().max()), 1e-37)


def test_this_cpu_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert int8.exact_int8.__wrapped__() is False
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    monkeypatch.setattr(int8, "_products", lambda *_: torch.full((2, 64), 8160.0))  # as int16 saturates
    assert int8.exact_int8.__wrapped__() is False


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("first", [None, 0, 20])
def test_rows_of_a_table(first: int | None, dtype: torch.dtype) -> None:
    table = make_weight(40, 64, dtype)
    ids = torch.tensor([20, 59, 20, 33]) if first == 20 else torch.tensor([0, 39, 7, 7])
    found = ops.embedding(ids, table, first)
    wide = (table.values.double() * table.scales.double().unsqueeze(1))[ids - (first or 0)]
    hidden = ops.hidden_dtype(dtype, "cpu")
    assert found.dtype == hidden
    assert torch.equal(found, wide.float().to(hidden))
    if first is not None:
        assert not ops.embedding(torch.tensor([first - 1, first + 40]), table, first).any()
    weight, bias = draw(64, dtype=hidden), draw(64, dtype=hidden)
    normed = ops.embedding_norm(ids - (first or 0), table, weight, bias, 1e-5)
    expected = F.layer_norm(wide, (64,), weight.double(), bias.double(), 1e-5)
    assert_near(normed, expected)
    wider = replace(table, dtype=torch.float64)
    torch.testing.assert_close(reference.embedding(ids - (first or 0), wider, None), wide)
