"""Shapes: t tokens, n query heads, m key/value heads, d head size, r dimensions that turn."""

from collections.abc import Callable
from typing import Any, get_args

import pytest
import torch
from tests.ops.conftest import exactly_activated
from torch import Tensor

from hasten import ops
from hasten.core.model_config import QKNorm
from hasten.ops import reference
from hasten.ops.gpu import gated, heads, matmul

# tests/bench/test_kernels.py runs every kernel on every Python
Close = Callable[[str, Tensor, Tensor], None]

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
TOKENS = 5


def draw(*shape: int, device: torch.device, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype).to(device)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", [None, *get_args(QKNorm)])
@pytest.mark.parametrize(
    ("num_heads", "kv_heads", "size", "width", "interleaved"),
    [
        (4, 2, 16, 16, False),
        (3, 1, 24, 12, False),
        (3, 1, 24, 12, True),
        (2, 2, 80, 80, False),
        (1, 1, 128, 32, True),
        (4, 1, 64, 2, False),
        (2, 1, 256, 256, False),
        (2, 1, 16, 0, False),
    ],
)
def test_heads_are_those_of_the_definition(
    num_heads: int,
    kv_heads: int,
    size: int,
    width: int,
    interleaved: bool,
    kind: QKNorm | None,
    dtype: torch.dtype,
    device: torch.device,
    assert_close: Close,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if dtype is torch.bfloat16:
        monkeypatch.setattr(heads, "_DIMENSIONS", [])  # as in larger steps
    # a view of something wider, whose other part is nobody's
    qkv_to = draw(TOKENS, (num_heads + 2 * kv_heads + 1) * size, device=device, dtype=dtype)[:, size:]
    own = kind in ("rms_of_all_heads", "layer_by_head")
    query_norm, key_norm = (
        draw(size * (count if own else 1), device=device, seed=count, dtype=dtype) for count in (num_heads, kv_heads)
    )
    query_bias, key_bias = draw(2, size, device=device, seed=5, dtype=dtype)
    of_all = kind == "rms_of_all_heads"
    transform = ops.HeadTransform(
        positions_t=torch.tensor([3, 0, 19, 7, 7], device=device),
        table_pr=draw(20, width, device=device, seed=2) if width else None,
        interleaved=interleaved,
        query_norm_d=None if kind is None else query_norm,
        key_norm_d=None if kind is None else key_norm,
        query_bias_d=query_bias if kind == "layer" else None,
        key_bias_d=key_bias if kind == "layer" else None,
        mean_squares_t2=heads.mean_squares(qkv_to, num_heads, kv_heads, size, 1) if of_all else None,
        rms=kind is None or kind.startswith("rms"),
        eps=1e-3,
        unit_offset=width == 12,
    )
    slots_t = torch.tensor([4, -1, 0, 7, 2], device=device)
    found, expected = (
        torch.full((2, 4, 2, kv_heads, size), 7.0, dtype=kind, device=device) for kind in (dtype, torch.float64)
    )
    query = heads.store_heads(qkv_to, found[0], found[1], slots_t, num_heads, transform)
    exact = reference.store_heads(qkv_to.double(), expected[0], expected[1], slots_t, num_heads, transform)
    assert query.dtype == dtype
    assert_close("layer_norm", query, exact)
    assert_close("layer_norm", found, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("num_heads", "kv_heads", "size"), [(4, 2, 16), (3, 1, 24), (1, 1, 8), (20, 5, 80)])
def test_mean_squares_of_all_heads(
    num_heads: int, kv_heads: int, size: int, dtype: torch.dtype, device: torch.device, assert_close: Close
) -> None:
    qkv_to = draw(TOKENS, (num_heads + 2 * kv_heads + 1) * size, device=device, dtype=dtype)[:, size:]
    for ranks in (1, 4):
        found = heads.mean_squares(qkv_to, num_heads, kv_heads, size, ranks)
        assert_close("linear", found, reference.mean_squares(qkv_to, num_heads, kv_heads, size, ranks).double())


@pytest.mark.parametrize("normed", [False, True], ids=["by one product", "norms behind a product"])
@pytest.mark.parametrize("rows", [1, 3, 20])
@pytest.mark.parametrize(
    ("num_heads", "kv_heads", "size", "width", "interleaved"),
    [(4, 1, 16, 16, False), (3, 2, 24, 12, False), (3, 1, 24, 12, True), (2, 1, 64, 2, False)],
)
def test_a_projection_with_a_transform(
    num_heads: int,
    kv_heads: int,
    size: int,
    width: int,
    interleaved: bool,
    rows: int,
    normed: bool,
    device: torch.device,
    assert_close: Close,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    dtype, features = (torch.bfloat16 if rows == 20 else torch.float16), (num_heads + 2 * kv_heads) * size
    weight, bias = draw(features, 128, device=device, dtype=dtype) * 0.1, draw(features, device=device, dtype=dtype)
    x_th = draw(rows, 128, device=device, seed=1, dtype=dtype)
    transform = ops.HeadTransform(
        positions_t=torch.arange(rows, device=device).flip(0),
        table_pr=draw(rows, width, device=device, seed=2),
        interleaved=interleaved,
        query_norm_d=draw(size, device=device, dtype=dtype) if normed else None,
        key_norm_d=draw(size, device=device, dtype=dtype) if normed else None,
        eps=1e-3,
    )
    slots_t = torch.arange(rows, device=device) - 1
    found, expected = (
        torch.full((2, 2, 16, kv_heads, size), 7.0, dtype=kind, device=device) for kind in (dtype, torch.float64)
    )
    packed, called = matmul.pack_linear(weight, shared=False), list[int]()

    def store(*args: Any, **options: Any) -> Tensor:
        called.append(1)
        return heads.store_heads(*args, **options)

    monkeypatch.setattr(matmul, "store_heads", store)
    query = matmul.project(x_th, packed, bias, found[0], found[1], slots_t, num_heads, transform, clip=1.5)
    assert bool(called) == normed
    qkv_to = matmul.linear(x_th, packed, bias, None).double().clamp(-1.5, 1.5)
    exact = reference.store_heads(qkv_to, expected[0], expected[1], slots_t, num_heads, transform)
    assert_close("layer_norm", query, exact)
    assert_close("layer_norm", found, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("gate", get_args(ops.Activation))
@pytest.mark.parametrize(("rows", "inner"), [(1, 40), (3, 130), (3, 64)])
def test_gated_units(
    rows: int,
    inner: int,
    gate: ops.Activation,
    dtype: torch.dtype,
    device: torch.device,
    assert_close: Close,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(gated, "_BLOCK", 64)  # so that a row has several, and a rest
    weight, bias = draw(2 * inner, 128, device=device, dtype=dtype) * 0.1, draw(2 * inner, device=device, dtype=dtype)
    x_th = draw(rows, 128, device=device, seed=1, dtype=dtype)
    packed = matmul.pack_linear(weight, shared=False)
    found = gated.gated_linear(x_th, packed, bias, gate)
    # the halves of the product are rounded to the type before they meet
    gate_to, up_to = matmul.linear(x_th, packed, bias, None).double().chunk(2, dim=-1)
    assert found.dtype == dtype
    exact = exactly_activated(gate_to, gate) * up_to
    assert_close("linear", found, exact)
    scale = draw(1, 128, device=device, seed=2, dtype=dtype) * 0.1
    factor = (x_th.double() @ scale.double().T).sigmoid()
    assert_close("linear", gated.gated_linear(x_th, packed, bias, gate, scale), exact * factor)
