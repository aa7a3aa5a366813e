"""Shapes: t tokens, h in, o out."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention
from torch import Tensor

from hasten import ops
from hasten.ops import cpu, reference

Close = Callable[[str, Tensor, Tensor], None]

ROWS = range(1, 71)
"""Decoding of one up to a batch beyond the size that weights are laid out for."""
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
LARGE = (1024, 1024)
SIZES = [(1, 1), (1, 40), (40, 1), (48, 64), (509, 64), (3, 333), LARGE]
"""(o, h)."""


def test_the_sizes_lie_on_both_sides_of_a_small_weight() -> None:
    assert {out * into < cpu._SMALL_WEIGHT for out, into in SIZES} == {True, False}
    assert LARGE[0] * LARGE[1] == cpu._SMALL_WEIGHT


def draw(*shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return (torch.randn(*shape, generator=generator) * scale).to(dtype)


def exact(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None, residual: Tensor | None) -> Tensor:
    """The definition in fp64."""
    out = x.double() @ weight.double().T
    if bias is not None:
        out = out + bias.double()
    if activation is not None:
        out = 0.5 * out * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (out + 0.044715 * out**3)))
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
        assert_close("linear", found, exact(x, weight, bias, None, None))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("activation", [None, "gelu_tanh"])
@pytest.mark.parametrize("residual", [False, True], ids=["no residual", "residual"])
@pytest.mark.parametrize(("out", "into"), [(48, 64), (509, 64), LARGE], ids=str)
def test_every_combination(
    out: int,
    into: int,
    bias: bool,
    activation: ops.Activation | None,
    residual: bool,
    dtype: torch.dtype,
    assert_close: Close,
) -> None:
    weight = draw(out, into, dtype=dtype, scale=into**-0.5)
    bias_o = draw(out, dtype=dtype) if bias else None
    packed, plain = ops.pack_linear(weight), reference.pack_linear(weight, False)
    for rows in (0, 1, 2, 63, 64, 65):
        x = draw(rows, into, dtype=dtype)
        residual_to = draw(rows, out, dtype=dtype) if residual else None
        inputs = [tensor for tensor in (x, weight, bias_o, residual_to) if tensor is not None]
        before = [tensor.clone() for tensor in inputs]
        found = ops.linear(x, packed, bias_o, activation=activation, residual_to=residual_to)
        assert found.dtype == dtype
        assert_close("linear", found, exact(x, weight, bias_o, activation, residual_to))
        assert_close("stepwise", found, reference.linear(x, plain, bias_o, activation, residual_to))
        assert all(torch.equal(a, b) for a, b in zip(inputs, before, strict=True))


@pytest.mark.parametrize(("out", "into"), [(48, 64), LARGE], ids=str)
def test_rows_that_do_not_stand_side_by_side(out: int, into: int, assert_close: Close) -> None:
    weight = draw(out, into, scale=into**-0.5)
    packed = ops.pack_linear(weight)
    views = [draw(20, into)[::2], draw(10, 3 * into)[:, into : 2 * into], draw(into, 10).T, draw(1, into).expand(6, -1)]
    for x in views:
        assert not x.is_contiguous()
        assert_close("linear", ops.linear(x, packed), exact(x, weight, None, None, None))


@pytest.mark.parametrize("weight", [draw(64, 48).T, draw(96, 64)[::2], draw(48, 128)[:, 64:]])
def test_weights_that_are_views(weight: Tensor, assert_close: Close) -> None:
    assert not weight.is_contiguous()
    x = draw(5, 64)
    for shared in (False, True):
        assert_close("stepwise", ops.linear(x, ops.pack_linear(weight, shared=shared)), F.linear(x, weight))


def test_gelu_is_the_tanh_form(assert_close: Close) -> None:
    values = torch.cat([torch.linspace(-12, 12, 4801), torch.tensor([0.0, -0.0, 1e-30, 1e10, -1e10, 1e25, -1e25])])
    for dtype in DTYPES:
        x = values.to(dtype).unsqueeze(1)
        x = x[x.isfinite()].unsqueeze(1)
        identity = ops.pack_linear(torch.ones(1, 1, dtype=dtype))
        found = ops.linear(x, identity, activation="gelu_tanh")
        assert_close("linear", found, F.gelu(x.double(), approximate="tanh"))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("out", "into"), [(48, 64), LARGE], ids=str)
def test_a_shared_weight_is_copied_only_where_it_must_be_widened(out: int, into: int, dtype: torch.dtype) -> None:
    weight = draw(out, into, dtype=dtype)
    packed = ops.pack_linear(weight, shared=True)
    held = [tensor for tensor in (packed.plain, packed.blocked) if tensor is not None]
    if dtype == torch.float32:
        assert [tensor.data_ptr() for tensor in held] == [weight.data_ptr()]
    else:
        assert all(tensor.dtype == torch.float32 for tensor in held)


def test_a_large_weight_is_held_once_and_a_small_one_in_both_layouts() -> None:
    large, small = ops.pack_linear(draw(*LARGE)), ops.pack_linear(draw(48, 64))
    assert large.plain is None
    assert large.blocked is not None
    assert small.plain is not None
    assert small.blocked is not None


def test_without_the_matrix_library(monkeypatch: pytest.MonkeyPatch, assert_close: Close) -> None:
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    for out, into in ((48, 64), LARGE):
        weight = draw(out, into, scale=into**-0.5)
        packed = ops.pack_linear(weight)
        assert packed.blocked is None
        for rows in (1, 7):
            x = draw(rows, into)
            assert_close("linear", ops.linear(x, packed), F.linear(x, weight))
