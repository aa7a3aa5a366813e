"""The kernels of linear layers and of the embedding on weights of 8 bits. Shapes: t tokens, h in, o out."""

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from hasten.core.errors import UnsupportedError
from hasten.ops import PackedLinear, PartialSum, QuantizedWeight, RoundedRows, reference, rounding
from hasten.ops.gpu import gated, matmul, norm, rounded, row_rounding
from hasten.quantization.scheme import SCHEMES

Close = Callable[[str, Tensor, Tensor], None]

HAS_GPU = torch.cuda.is_available()
# bf16 is not among numpy's types: the interpreter multiplies matrices of its bits instead.
HALF = [torch.float16, torch.bfloat16 if HAS_GPU else pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]
FP8 = torch.float8_e4m3fn
KINDS: dict[str, tuple[torch.dtype, torch.dtype | None]] = {
    "int8": (torch.int8, None),
    "w8a8": (torch.int8, torch.int8),
    "fp8": (FP8, FP8),
}
"""Types of weights, and what inputs are rounded to."""
ROWS = [1, 17, 65]
"""One, few, and more than one tile."""
REAL = {"qkv": (12_288, 4096), "dense": (4096, 4096), "up": (16_384, 4096), "down": (4096, 16_384)}
"""BLOOM-7B1's (o, h)."""


def draw(*shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, generator=generator).to(dtype).to(device)


def make_table(out: int, into: int, dtype: torch.dtype, device: torch.device, kind: str = "int8") -> QuantizedWeight:
    values_type, inputs = KINDS[kind]
    generator = torch.Generator().manual_seed(out + into)
    values = torch.randint(-127, 128, (out, into), generator=generator).float().to(values_type)
    scales = (torch.rand(out, generator=generator) + 0.5) * into**-0.5 / 73
    return QuantizedWeight(values.to(device), scales.to(device), dtype, inputs)


def make_weight(out: int, into: int, dtype: torch.dtype, device: torch.device, kind: str) -> PackedLinear:
    return matmul.pack_linear(make_table(out, into, dtype, device, kind), shared=False)


def exact(x: Tensor, weight: PackedLinear, bias: Tensor | None = None, activation: str | None = None) -> Tensor:
    """The definition in fp64."""
    return reference.linear(x.double(), weight, None if bias is None else bias.double(), activation)


def check(kind: str, into: int, found: Tensor, expected: Tensor, assert_close: Close, stepwise: bool = False) -> None:
    """Sums of `into` products are as exact as what adds them up.

    The tensor cores of a Hopper keep 13 bits below the greatest of each 32 products of fp8 and the sum before them, and
    cut off the rest. Sums stay below 4 on their way here; errors of all steps rarely point in one direction.
    """
    if kind != "fp8" or not found.is_cuda:
        # inputs of 15 bits are exact to a unit of their token
        tolerance = "digits" if kind == "int8" else "parts" if found.dtype == torch.float32 else "linear"
        return assert_close("stepwise" if stepwise else tolerance, found, expected)
    assert found.shape == expected.shape
    error = (found.double() - expected).abs() / expected.abs().clamp(min=1)
    cut, unit = 4 * 2.0**-13 * math.ceil(into / 32), torch.finfo(found.dtype).eps
    assert error.max() <= cut + unit
    assert error.square().mean().sqrt() <= cut / 16 + unit / 4


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize(("out", "into"), [(40, 128), (130, 256), (7, 100), (9, 102)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_any_number_of_rows(
    kind: str, out: int, into: int, rows: int, dtype: torch.dtype, device: torch.device, assert_close: Close
) -> None:
    weight = make_weight(out, into, dtype, device, kind)
    x, bias = draw(rows, into, dtype=dtype, device=device), draw(out, dtype=dtype, device=device)
    for bias_o, activation in ((bias, "gelu_tanh"), (None, None)):
        found = matmul.linear(x, weight, bias_o, activation)
        assert found.dtype == dtype
        check(kind, into, found, exact(x, weight, bias_o, activation), assert_close)


@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
@pytest.mark.parametrize("rows", [0, 1, 300])
def test_weights_alone_in_int8_are_widened_for_many_rows_and_for_fp32(
    rows: int, dtype: torch.dtype, device: torch.device, assert_close: Close
) -> None:
    weight = make_weight(7, 100, dtype, device, "int8")
    x, bias = draw(rows, 100, dtype=dtype, device=device), draw(7, dtype=dtype, device=device)
    found = matmul.linear(x, weight, bias, "relu")
    assert found.dtype == dtype
    assert_close("stepwise", found, exact(x, weight, bias, "relu"))


@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
@pytest.mark.parametrize("bias", [False, True])
def test_many_rows_in_fp8_are_a_librarys(
    bias: bool, dtype: torch.dtype, device: torch.device, assert_close: Close, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rounded, "MOST_ROWS_IN_FP8", 3)
    monkeypatch.setattr(rounded, "MOST_ROWS_OF_PARTS_IN_FP8", 3)
    monkeypatch.setattr(rounded, "_eight_bit", None)
    weight = make_weight(48, 100, dtype, device, "fp8")
    bias_o = draw(48, dtype=dtype, device=device) if bias else None
    for rows in (0, 5, 70):
        x = draw(rows, 100, dtype=dtype, device=device)
        found = matmul.linear(x, weight, bias_o, "silu")
        assert found.shape == (rows, 48)
        if rows:
            check("fp8", 100, found, exact(x, weight, bias_o, "silu"), assert_close, stepwise=True)
    check("fp8", 100, matmul.linear_parts(x, weight), exact(x, weight), assert_close, stepwise=True)


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("rms", [False, True])
@pytest.mark.parametrize(("kind", "width", "rows"), [*((kind, 100, 5) for kind in KINDS), ("int4", 256, 1)])
def test_a_norm_is_rounded_for_the_weight_that_reads_it(
    kind: str, width: int, rows: int, rms: bool, dtype: torch.dtype, device: torch.device, assert_close: Close
) -> None:
    table = make_table(40, width, dtype, device, "int8")
    weight = SCHEMES["int4"].quantize(table.dequantized(dtype), "drawn") if kind == "int4" else None
    packed = make_weight(40, width, dtype, device, kind) if weight is None else matmul.pack_linear(weight, shared=False)
    x, gain = draw(rows, width, dtype=dtype, device=device), draw(width, dtype=dtype, device=device)
    x[-1] *= float("nan") if kind == "fp8" else 1000
    sum_, shift = PartialSum(x, residual=x), None if rms else gain
    whole, total = norm.norm(sum_, gain, shift, 1e-5, rms=rms)
    found, same = norm.norm(sum_, gain, shift, 1e-5, rms=rms, reader=packed)
    assert isinstance(found, RoundedRows)
    assert (found.shape, found.dtype) == ((rows, width), dtype)
    assert torch.equal(same, total) or kind == "fp8"
    numbers, units_t = row_rounding.round_rows(whole, packed.inputs)
    from_norm, from_rows = (matmul.linear(each, packed, None, None) for each in (found, whole))
    if kind == "int4":  # a row that is not rounded yet gets units of a thread each
        columns = torch.arange(width, device=device).unflatten(0, (-1, 2, 2, 16, 2)).permute(2, 0, 3, 4, 1).flatten()
        numbers = numbers.unflatten(1, (2, width))[:, :, columns].flatten(1)
        assert_close("digits", from_norm, from_rows)
    else:
        assert torch.equal(from_norm.nan_to_num(-1), from_rows.nan_to_num(-1))
    assert torch.equal(found.numbers.float(), numbers.float())
    assert torch.equal(found.units_t.nan_to_num(-1), units_t.nan_to_num(-1))


def test_a_norm_is_not_rounded_where_its_reader_takes_it_as_it_is(device: torch.device) -> None:
    weight = make_weight(16, 32, torch.float16, device, "int8")
    x, gain = draw(300, 32, dtype=torch.float16, device=device), draw(32, dtype=torch.float16, device=device)
    assert isinstance(norm.norm(x, gain, gain, 1e-5, reader=weight)[0], Tensor)
    assert isinstance(norm.norm(x[:256], gain, gain, 1e-5, reader=weight)[0], RoundedRows)
    assert isinstance(norm.norm(x[:1], gain, gain, 1e-5, reader=weight)[0], Tensor)


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("is_gated", [False, True], ids=["gelu", "gated"])
def test_many_activations_are_rounded_at_once_for_the_weight_that_reads_them(
    is_gated: bool, dtype: torch.dtype, device: torch.device, assert_close: Close, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rounded, "MOST_ROWS_IN_FP8", 3)
    monkeypatch.setattr(rounded, "MOST_ROWS_OF_PARTS_IN_FP8", 3)
    up, inner = make_weight(96, 100, dtype, device, "fp8"), 48 if is_gated else 96
    down = make_weight(32, inner, dtype, device, "fp8")
    x, bias = draw(70, 100, dtype=dtype, device=device), draw(96, dtype=dtype, device=device)
    if is_gated:
        whole, found = (gated.gated_linear(x, up, bias, "silu", reader=reader) for reader in (None, down))
    else:
        whole, found = (matmul.linear(x, up, bias, "gelu_tanh", reader) for reader in (None, down))
    assert isinstance(whole, Tensor)
    assert isinstance(found, RoundedRows)
    assert (found.shape, found.dtype) == ((70, inner), dtype)
    expected, units_t1 = (each.double() for each in rounding.numbers_of(whole, FP8))
    numbers, units_t = found.numbers[:, :inner].double(), found.units_t.double()
    # the last place of an activation decides which of two numbers is nearer, where it lies between them
    assert ((numbers - expected).abs() <= expected.abs().clamp(min=2.0**-6) / 8).all()
    assert (numbers != expected).double().mean() <= (0.01 if dtype == torch.float16 else 0.1)
    assert ((units_t / units_t1[:, 0] - 1).abs() <= 2 * torch.finfo(dtype).eps).all()
    assert down.plain is not None
    assert down.scales is not None
    weight = down.plain[:, :inner].double() * down.scales.double()[:, None]
    product = matmul.linear_parts(found, down)
    assert product.dtype == dtype
    check("fp8", inner, product, numbers * units_t[:, None] @ weight.T, assert_close)


@pytest.mark.parametrize("rows", [1, 17, 64])
@pytest.mark.parametrize(("out", "into", "splits"), [(40, 128, 1), (130, 512, 2), (20, 1024, 4)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_parts_add_up_to_the_product(
    kind: str, out: int, into: int, splits: int, rows: int, device: torch.device, assert_close: Close
) -> None:
    weight = make_weight(out, into, torch.float16, device, kind)
    x = draw(rows, into, dtype=torch.float16, device=device)
    found = matmul.linear_parts(x, weight)
    if splits == 1 or (rows == 1 and weight.inputs != FP8):
        check(kind, into, found, exact(x, weight), assert_close)
        return
    assert (found.dtype, found.shape) == (torch.float32, (splits * (2 if rows > 32 else 1), rows, out))
    whole = found.sum(0)
    check(kind, into, whole, exact(x, weight), assert_close)


def test_one_row_of_w8a8_has_the_exact_sums_of_several(device: torch.device) -> None:
    """More words than a program reads at once, the last of them a part of a block."""
    weight = make_weight(21, 2688, torch.float16, device, "w8a8")
    x = draw(3, 2688, dtype=torch.float16, device=device)
    assert torch.equal(
        matmul.linear(x[1:2], weight, None, "gelu_tanh"), matmul.linear(x, weight, None, "gelu_tanh")[1:2]
    )


def test_a_large_input_takes_nothing_from_those_of_other_threads(device: torch.device, assert_close: Close) -> None:
    table = make_table(21, 2688, torch.float16, device)
    table.values[:, 80] = 0
    weight = matmul.pack_linear(table, shared=False)
    x = draw(1, 2688, dtype=torch.float16, device=device) * 2.0**-10
    x[:, 80:96] = 0
    expected = exact(x, weight)
    x[:, 80] = 60_000  # a unit of the row would be 3.7, where all others are below 0.005
    assert_close("digits", matmul.linear(x, weight, None, None) * 2.0**10, expected * 2.0**10)


@pytest.mark.parametrize("rows", [1, 5, 70])
@pytest.mark.parametrize("kind", KINDS)
def test_queries_keys_and_values_go_where_they_belong(
    kind: str, rows: int, device: torch.device, assert_close: Close, monkeypatch: pytest.MonkeyPatch
) -> None:
    heads, kv_heads, size, dtype = 4, 1, 24, torch.float16
    weight = make_weight((heads + 2 * kv_heads) * size, 128, dtype, device, kind)
    x, bias = draw(rows, 128, dtype=dtype, device=device), draw(weight.out_features, dtype=dtype, device=device)
    keys, values = torch.zeros((2, rows + 2, 4, kv_heads, size), dtype=dtype, device=device)
    slots_t = torch.randperm(4 * (rows + 2), generator=torch.Generator().manual_seed(rows))[:rows].to(device)
    wide = keys.double(), values.double()
    expected = reference.project(x.double(), weight, bias.double(), *wide, slots_t, heads, clip=0.7)
    for most_rows in (256, 0):  # by the kernel, and where there is one for this kind by a library
        monkeypatch.setattr(rounded, "MOST_ROWS_IN_FP8", most_rows)
        monkeypatch.setattr(rounded, "MOST_ROWS_IN_DIGITS", most_rows)
        found = matmul.project(x, weight, bias, keys.zero_(), values.zero_(), slots_t, heads, clip=0.7)
        for one, other in zip((found, keys, values), (expected, *wide), strict=True):
            assert_close("stepwise", one, other)


def test_a_weight_that_would_take_gigabytes_is_never_widened(
    device: torch.device, assert_close: Close, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = make_weight(40, 128, torch.float16, device, "int8")
    monkeypatch.setattr(rounded, "_LARGE_WEIGHT", 40 * 128)
    monkeypatch.setattr(rounded, "_widen", None)
    x = draw(130, 128, dtype=torch.float16, device=device)
    assert_close("digits", matmul.linear(x, weight, None, None), exact(x, weight))


@pytest.mark.parametrize("width", [128, 100])
@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
def test_inputs_are_rounded_to_the_same_numbers_everywhere(
    dtype: torch.dtype, width: int, device: torch.device
) -> None:
    x = draw(9, width, dtype=dtype, device=device) * torch.logspace(-6, 3, 9, device=device).to(dtype)[:, None]
    x[2] = 0
    x[3, 0] *= 1000  # so that most others are subnormal in e4m3
    x[4] = torch.linspace(0, 254, width, device=device).floor().to(dtype)
    x[4, -1] = 254  # halves of a unit
    for inputs in (torch.int8, FP8):
        numbers, units_t = row_rounding.round_rows(x, inputs)
        expected, units = rounding.numbers_of(x.cpu(), inputs)
        assert numbers.dtype == inputs
        assert torch.equal(numbers[:, :width].cpu().float(), expected)
        assert not numbers[:, width:].float().any()
        assert torch.equal(units_t.cpu(), units[:, 0])
    numbers, units_t = row_rounding.round_rows(x, None)
    high, low, units = rounding.digits_of(x.cpu().float())
    found_high, found_low = numbers.cpu().float().chunk(2, 1)
    assert torch.equal(found_high[:, :width] * 128 + found_low[:, :width], high * 128 + low)
    assert torch.equal(units_t.cpu(), units[:, 0])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_not_finite_stays_so_in_its_token_alone(kind: str, value: float, device: torch.device) -> None:
    weight = make_weight(40, 128, torch.float16, device, kind)
    x = draw(3, 128, dtype=torch.float16, device=device)
    whole = matmul.linear(x, weight, None, None)
    x[1, 5] = value
    found = matmul.linear(x, weight, None, None)
    assert not found[1].isfinite().any()
    assert torch.equal(found[::2], whole[::2])


@pytest.mark.parametrize("kind", KINDS)
def test_the_result_of_a_row_does_not_depend_on_the_others(kind: str, device: torch.device) -> None:
    weight = make_weight(40, 128, torch.float16, device, kind)
    x = draw(5, 128, dtype=torch.float16, device=device)
    among = matmul.linear(torch.cat((x, 1000 * x)), weight, None, None)[:5]
    assert torch.equal(matmul.linear(x, weight, None, None), among)


def test_a_gpu_that_does_not_multiply_fp8_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rounded, "multiplies", lambda dtype, device: dtype != FP8)
    cpu = torch.device("cpu")
    make_weight(6, 128, torch.float16, cpu, "w8a8")
    with pytest.raises(UnsupportedError, match=r"^weights in fp8 need a GPU of compute capability 8\.9 or later; give"):
        make_weight(6, 128, torch.float16, cpu, "fp8")


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("width", [64, 100])
def test_rows_of_a_table_are_normed(width: int, dtype: torch.dtype, device: torch.device, assert_close: Close) -> None:
    table = make_table(50, width, dtype, device)
    gain, shift = draw(width, dtype=dtype, device=device), draw(width, dtype=dtype, device=device)
    ids = torch.tensor([3, 49, 0, 3], device=device)
    found = norm.embedding_norm(ids, table, gain, shift, 1e-5)
    wide = replace(table, dtype=torch.float64)
    assert_close("layer_norm", found, reference.embedding_norm(ids, wide, gain.double(), shift.double(), 1e-5))


@pytest.mark.parametrize("rows", [1, 16, 33, 64, 100, 128, 256, 512])
def test_cuts_fit_into_a_multiprocessor_and_leave_few_of_them_idle(rows: int) -> None:
    for digits in (1, 2):
        for out, into in REAL.values():
            cut, splits = rounded._cut(rows, out, into, digits, split=out == 4096, processors=132, shared=227 << 10)
            assert cut.stages * (cut.block_n + digits * cut.block_m) * cut.block_k <= 227 << 10
            assert into % (splits * cut.block_k) == 0
            programs = -(-rows // cut.block_m) * (out // cut.block_n) * splits
            assert programs >= 96


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [1, 16, 64, 128, 256, 700])
@pytest.mark.parametrize("layer", REAL)
@pytest.mark.parametrize("kind", KINDS)
def test_real_sizes(
    kind: str, layer: str, rows: int, dtype: torch.dtype, device: torch.device, assert_close: Close
) -> None:
    out, into = REAL[layer]
    weight = make_weight(out, into, dtype, device, kind)
    x = draw(rows, into, dtype=dtype, device=device)
    # many rows are multiplied by weights of int8 that are widened to the type of the rows
    check(kind, into, matmul.linear(x, weight, None, None), exact(x, weight), assert_close, stepwise=True)
    found = matmul.linear_parts(x, weight)
    found = found.sum(0).to(dtype) if found.dim() == 3 else found
    check(kind, into, found, exact(x, weight), assert_close, stepwise=True)
