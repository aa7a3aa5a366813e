"""The kernels of linear layers and of the embedding on int8 weights. Shapes: t tokens, h in, o out."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from hasten.ops import PackedLinear, QuantizedWeight, reference
from hasten.ops.gpu import matmul, norm

Close = Callable[[str, Tensor, Tensor], None]

HAS_GPU = torch.cuda.is_available()
# bf16 is not among numpy's types: the interpreter multiplies matrices of its bits instead.
HALF = [torch.float16, torch.bfloat16 if HAS_GPU else pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]
ROWS = [1, 2, 17, 64, 65, 128]
"""One, few, and more than one tile."""
REAL = {"qkv": (12_288, 4096), "dense": (4096, 4096), "up": (16_384, 4096), "down": (4096, 16_384)}
"""BLOOM-7B1's (o, h)."""


def draw(*shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, generator=generator).to(dtype).to(device)


def make_table(out: int, into: int, dtype: torch.dtype, device: torch.device) -> QuantizedWeight:
    generator = torch.Generator().manual_seed(out + into)
    values = torch.randint(-127, 128, (out, into), dtype=torch.int8, generator=generator)
    scales = (torch.rand(out, generator=generator) + 0.5) * into**-0.5 / 73
    return QuantizedWeight(values.to(device), scales.to(device), dtype)


def make_weight(out: int, into: int, dtype: torch.dtype, device: torch.device) -> PackedLinear:
    return matmul.pack_linear(make_table(out, into, dtype, device), shared=False)


def exact(x: Tensor, weight: PackedLinear, bias: Tensor | None = None, activation: str | None = None) -> Tensor:
    """The definition in fp64."""
    return reference.linear(x.double(), weight, None if bias is None else bias.double(), activation)


def kind_of(rows: int) -> str:
    """More rows are cuBLAS's, with a weight that is rounded once more."""
    return "linear" if rows <= matmul.MOST_QUANTIZED_ROWS else "stepwise"


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("rows", [*ROWS, 129])
@pytest.mark.parametrize(("out", "into"), [(40, 128), (130, 256), (20, 640)], ids=str)
def test_any_number_of_rows(
    out: int, into: int, rows: int, dtype: torch.dtype, device: torch.device, assert_close: Close
) -> None:
    weight = make_weight(out, into, dtype, device)
    assert weight.plain is not None
    assert weight.plain.dtype == torch.int8
    x, bias = draw(rows, into, dtype=dtype, device=device), draw(out, dtype=dtype, device=device)
    for bias_o, activation in ((bias, "gelu_tanh"), (bias, "silu"), (None, None)):
        found = matmul.linear(x, weight, bias_o, activation)
        assert found.dtype == dtype
        assert_close(kind_of(rows), found, exact(x, weight, bias_o, activation))


@pytest.mark.parametrize("into", [4096, 6200])
def test_one_row_of_several_blocks(into: int, device: torch.device, assert_close: Close) -> None:
    weight = make_weight(6, into, torch.float16, device)
    x = draw(1, into, dtype=torch.float16, device=device)
    assert_close("linear", matmul.linear(x, weight, None, None), exact(x, weight))


@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
@pytest.mark.parametrize("rows", [0, 1, 3, 70])
def test_sizes_that_no_block_divides_are_widened(
    rows: int, dtype: torch.dtype, device: torch.device, assert_close: Close
) -> None:
    weight = make_weight(7, 100, dtype, device)
    x, bias = draw(rows, 100, dtype=dtype, device=device), draw(7, dtype=dtype, device=device)
    found = matmul.linear(x, weight, bias, "relu")
    assert found.dtype == dtype
    assert_close("stepwise", found, exact(x, weight, bias, "relu"))


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize(("out", "into", "splits"), [(40, 128, 1), (130, 512, 4), (20, 1024, 8)], ids=str)
def test_parts_add_up_to_the_product(
    out: int, into: int, splits: int, rows: int, device: torch.device, assert_close: Close
) -> None:
    weight = make_weight(out, into, torch.float16, device)
    x = draw(rows, into, dtype=torch.float16, device=device)
    found = matmul.linear_parts(x, weight)
    if rows == 1 or splits == 1:
        assert_close("linear", found, exact(x, weight))
        return
    assert (found.dtype, found.shape) == (torch.float32, (splits, rows, out))
    assert_close("parts", found.sum(0), exact(x, weight))


@pytest.mark.parametrize("rows", [1, 5, 70, 129])
def test_queries_keys_and_values_go_where_they_belong(rows: int, device: torch.device, assert_close: Close) -> None:
    heads, kv_heads, size, dtype = 4, 1, 24, torch.float16
    weight = make_weight((heads + 2 * kv_heads) * size, 128, dtype, device)
    x, bias = draw(rows, 128, dtype=dtype, device=device), draw(weight.out_features, dtype=dtype, device=device)
    keys, values = torch.zeros((2, rows + 2, 4, kv_heads, size), dtype=dtype, device=device)
    wide = keys.double(), values.double()
    slots_t = torch.randperm(4 * (rows + 2), generator=torch.Generator().manual_seed(rows))[:rows].to(device)
    expected = reference.project(x.double(), weight, bias.double(), *wide, slots_t, heads, clip=0.7)
    found = matmul.project(x, weight, bias, keys, values, slots_t, heads, clip=0.7)
    for one, other in zip((found, keys, values), (expected, *wide), strict=True):
        assert_close(kind_of(rows), one, other)


def test_a_weight_that_would_take_gigabytes_is_never_widened(
    device: torch.device, assert_close: Close, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = make_weight(40, 128, torch.float16, device)
    monkeypatch.setattr(matmul, "_LARGE_WEIGHT", 40 * 128)
    monkeypatch.setattr(matmul, "_widen", None)
    x = draw(300, 128, dtype=torch.float16, device=device)
    assert_close("linear", matmul.linear(x, weight, None, None), exact(x, weight))


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("width", [64, 100])
def test_rows_of_a_table_are_normed(width: int, dtype: torch.dtype, device: torch.device, assert_close: Close) -> None:
    table = make_table(50, width, dtype, device)
    gain, shift = draw(width, dtype=dtype, device=device), draw(width, dtype=dtype, device=device)
    ids = torch.tensor([3, 49, 0, 3], device=device)
    found = norm.embedding_norm(ids, table, gain, shift, 1e-5)
    wide = replace(table, dtype=torch.float64)
    assert_close("layer_norm", found, reference.embedding_norm(ids, wide, gain.double(), shift.double(), 1e-5))


class _Recorded:
    """A kernel whose launches are noted instead of run."""

    def __init__(self) -> None:
        self.launches: list[tuple[tuple[int, ...], dict[str, Any]]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *_, **options: self.launches.append((grid, options))


@pytest.mark.parametrize(("rows", "tiles", "block_k"), [(64, 1, 128), (65, 2, 64), (128, 2, 64)])
def test_twice_as_many_features_are_read_at_a_time_where_all_programs_find_room(
    rows: int, tiles: int, block_k: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(matmul, "_skinny", recorded := _Recorded())
    cpu = torch.device("cpu")
    weight = make_weight(128 * 132, 256, torch.float16, cpu)
    matmul.linear(draw(rows, 256, dtype=torch.float16, device=cpu), weight, None, None)
    (((programs, splits), options),) = recorded.launches
    assert (programs, splits) == (132 * tiles, 1)
    assert (options["BLOCK_K"], options["TILED"], options["SCALED"]) == (block_k, tiles > 1, True)
    recorded.launches.clear()
    full = matmul.pack_linear(draw(128 * 132, 256, dtype=torch.float16, device=cpu), shared=False)
    matmul.linear(draw(64, 256, dtype=torch.float16, device=cpu), full, None, None)
    ((_, options),) = recorded.launches
    assert (options["BLOCK_K"], options["TILED"], options["SCALED"]) == (64, False, False)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("out", "into"), REAL.values(), ids=list(REAL))
def test_real_sizes(out: int, into: int, dtype: torch.dtype, assert_close: Close) -> None:
    gpu = torch.device("cuda", 0)
    weight = make_weight(out, into, dtype, gpu)
    for rows in (1, 2, 16, 33, 64, 65, 200, 256, 500):
        x = draw(rows, into, dtype=dtype, device=gpu)
        assert_close(kind_of(rows), matmul.linear(x, weight, None, None), exact(x, weight))
        parts = matmul.linear_parts(x, weight)
        kind, total = (kind_of(rows), parts) if parts.dim() == 2 else ("parts", parts.sum(0))
        assert_close(kind, total, exact(x, weight))
