"""Norms and rotations of heads, gated units. Shapes: t tokens, n heads, m key/value heads, d head size, r turned."""

from collections.abc import Callable
from dataclasses import replace
from typing import get_args

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention
from tests.ops.conftest import exactly_activated
from torch import Tensor

from hasten import ops
from hasten.core.model_config import QKNorm
from hasten.ops import reference

Close = Callable[[str, Tensor, Tensor], None]

TOKENS, HEADS, KV_HEADS, HIDDEN = 5, 4, 2, 24
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def turned_one_by_one(heads_tnd: Tensor, angles_tp: Tensor, interleaved: bool) -> Tensor:
    """Dimension i together with i + p, or 2i with 2i + 1, as one complex number, turned by its angle, in fp64."""
    out_tnd, pairs = heads_tnd.double().clone(), angles_tp.shape[1]
    for pair in range(pairs):
        first, second = (2 * pair, 2 * pair + 1) if interleaved else (pair, pair + pairs)
        number = torch.complex(heads_tnd[..., first].double(), heads_tnd[..., second].double())
        number = number * torch.polar(torch.ones(len(angles_tp), 1).double(), angles_tp[:, pair : pair + 1].double())
        out_tnd[..., first], out_tnd[..., second] = number.real, number.imag
    return out_tnd


def normed_one_by_one(heads_tnd: Tensor, kind: QKNorm, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """Head by head, in fp64."""
    out_tnd, size = heads_tnd.double().clone(), heads_tnd.shape[2]
    for head in range(heads_tnd.shape[1]):
        own = weight.double()[head * size :][:size] if len(weight) > size else weight.double()
        x_td = out_tnd[:, head].clone()
        if kind.startswith("layer"):
            x_td = x_td - x_td.mean(-1, keepdim=True)
        over = heads_tnd.double().flatten(1) if kind == "rms_of_all_heads" else x_td
        out_tnd[:, head] = x_td / (over.square().mean(-1, keepdim=True) + eps).sqrt() * own
    return out_tnd if bias is None else out_tnd + bias.double()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", [None, *get_args(QKNorm)])
@pytest.mark.parametrize(("size", "width"), [(8, 8), (8, 4), (6, 2), (8, None)])
def test_queries_and_keys_are_normed_then_turned_and_values_are_not(
    size: int, width: int | None, kind: QKNorm | None, dtype: torch.dtype, assert_close: Close
) -> None:
    if width is None and kind is None:
        return
    interleaved = width == 4 or kind == "layer"
    features = (HEADS + 2 * KV_HEADS) * size
    weight, bias, x_th = draw(features, HIDDEN, seed=1), draw(features, seed=2), draw(TOKENS, HIDDEN, dtype=dtype)
    weight, bias = weight.to(dtype) * 0.3, bias.to(dtype)
    angles_pq = draw(20, (width or 2) // 2, seed=3) * 3
    positions_t = torch.tensor([3, 0, 19, 7, 7])
    own = kind in ("rms_of_all_heads", "layer_by_head")
    query_norm, key_norm = (draw(size * (heads if own else 1), seed=heads).to(dtype) for heads in (HEADS, KV_HEADS))
    query_bias, key_bias = draw(2, size, seed=5).to(dtype) if kind == "layer" else (None, None)
    transform = ops.HeadTransform(
        positions_t=positions_t,
        table_pr=None if width is None else torch.cat((angles_pq.cos(), angles_pq.sin()), dim=1),
        interleaved=interleaved,
        query_norm_d=None if kind is None else query_norm,
        key_norm_d=None if kind is None else key_norm,
        query_bias_d=query_bias,
        key_bias_d=key_bias,
        rms=kind is None or kind.startswith("rms"),
        eps=1e-3,
    )
    slots_t = torch.tensor([4, -1, 0, 7, 2])
    projected = reference.linear(x_th, ops.PackedLinear(features, HIDDEN, plain=weight), bias, None).double()
    query, key, value = projected.unflatten(1, (-1, size)).split([HEADS, KV_HEADS, KV_HEADS], dim=1)
    if kind == "rms_of_all_heads":
        # two ranks that hold the same are as one
        halves = ops.mean_squares(projected.to(dtype), HEADS, KV_HEADS, size, 2)
        assert halves.dtype == torch.float32
        transform = replace(transform, mean_squares_t2=halves + halves)
    if kind is not None:
        query = normed_one_by_one(query, kind, query_norm, query_bias, 1e-3)
        key = normed_one_by_one(key, kind, key_norm, key_bias, 1e-3)
    if width is not None:
        query, key = (turned_one_by_one(part, angles_pq[positions_t], interleaved) for part in (query, key))
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
    packed = ops.PackedLinear(20, HIDDEN, plain=weight)
    assert_close("stepwise", reference.gated_linear(x_th, packed, bias_o, gate), active * both[:, 10:])
    scale = draw(1, HIDDEN, seed=3).to(dtype)
    scaled = active * both[:, 10:] * (x_th.double() @ scale.double().T).sigmoid()
    assert_close("linear", ops.gated_linear(x_th, ops.pack_linear(weight), bias_o, gate, scale), scaled)
    assert_close("stepwise", reference.gated_linear(x_th, packed, bias_o, gate, scale), scaled)
