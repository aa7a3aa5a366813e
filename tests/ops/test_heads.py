"""Norms and rotations of heads, gated units. Shapes: t tokens, n heads, m key/value heads, d head size, r turned."""

from collections.abc import Callable
from typing import get_args

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention
from tests.ops.conftest import exactly_activated
from torch import Tensor

from hasten import ops
from hasten.ops import reference

Close = Callable[[str, Tensor, Tensor], None]

TOKENS, HEADS, KV_HEADS, HIDDEN = 5, 4, 2, 24
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def turned_one_by_one(heads_tnd: Tensor, angles_tp: Tensor) -> Tensor:
    """Dimension i together with i + p as one complex number, turned by its angle, in fp64."""
    out_tnd, pairs = heads_tnd.double().clone(), angles_tp.shape[1]
    for pair in range(pairs):
        number = torch.complex(heads_tnd[..., pair].double(), heads_tnd[..., pair + pairs].double())
        number = number * torch.polar(torch.ones(len(angles_tp), 1).double(), angles_tp[:, pair : pair + 1].double())
        out_tnd[..., pair], out_tnd[..., pair + pairs] = number.real, number.imag
    return out_tnd


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("normed", [False, True], ids=["no norm", "norm"])
@pytest.mark.parametrize(("size", "width"), [(8, 8), (8, 4), (6, 2), (8, None)])
def test_queries_and_keys_are_normed_then_turned_and_values_are_not(
    size: int, width: int | None, normed: bool, dtype: torch.dtype, assert_close: Close
) -> None:
    if width is None and not normed:
        return
    features = (HEADS + 2 * KV_HEADS) * size
    weight, bias, x_th = draw(features, HIDDEN, seed=1), draw(features, seed=2), draw(TOKENS, HIDDEN, dtype=dtype)
    weight, bias = weight.to(dtype) * 0.3, bias.to(dtype)
    angles_pq = draw(20, (width or 2) // 2, seed=3) * 3
    positions_t = torch.tensor([3, 0, 19, 7, 7])
    query_norm_d, key_norm_d = draw(2, size, seed=4).to(dtype)
    transform = ops.HeadTransform(
        positions_t=positions_t,
        table_pr=None if width is None else torch.cat((angles_pq.cos(), angles_pq.sin()), dim=1),
        query_norm_d=query_norm_d if normed else None,
        key_norm_d=key_norm_d if normed else None,
        eps=1e-3,
    )
    slots_t = torch.tensor([4, -1, 0, 7, 2])
    projected = reference.linear(x_th, ops.PackedLinear(features, HIDDEN, plain=weight), bias, None).double()
    query, key, value = projected.unflatten(1, (-1, size)).split([HEADS, KV_HEADS, KV_HEADS], dim=1)
    if normed:
        query, key = (
            part / (part.square().mean(-1, keepdim=True) + 1e-3).sqrt() * each.double()
            for part, each in ((query, query_norm_d), (key, key_norm_d))
        )
    if width is not None:
        query, key = (turned_one_by_one(part, angles_pq[positions_t]) for part in (query, key))
    for op in (ops.project, reference.project):
        packed = ops.pack_linear(weight) if op is ops.project else ops.PackedLinear(features, HIDDEN, plain=weight)
        keys, values = torch.full((2, 4, 2, KV_HEADS, size), 7.0, dtype=dtype)
        found = op(x_th, packed, bias, keys, values, slots_t, HEADS, transform)
        assert found.dtype == dtype
        assert_close("stepwise", found, query)
        for cache, part in ((keys, key), (values, value)):
            expected = torch.full((8, KV_HEADS, size), 7.0).double()
            expected[slots_t[slots_t >= 0]] = part[slots_t >= 0]
            assert_close("stepwise", cache.flatten(0, 1), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("gate", get_args(ops.Activation))
@pytest.mark.parametrize("rows", [0, 1, 7])
def test_gated_units(rows: int, gate: ops.Activation, bias: bool, dtype: torch.dtype, assert_close: Close) -> None:
    weight, bias_o = draw(20, HIDDEN, seed=1).to(dtype) * 0.3, draw(20, seed=2).to(dtype) if bias else None
    x_th = draw(rows, HIDDEN, dtype=dtype)
    both = F.linear(x_th.double(), weight.double(), None if bias_o is None else bias_o.double())
    active = exactly_activated(both[:, :10], gate)
    found = ops.gated_linear(x_th, ops.pack_linear(weight), bias_o, gate)
    assert found.dtype == dtype
    assert_close("linear", found, active * both[:, 10:])
    plain = reference.gated_linear(x_th, ops.PackedLinear(20, HIDDEN, plain=weight), bias_o, gate)
    assert_close("stepwise", plain, active * both[:, 10:])
