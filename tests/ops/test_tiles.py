"""Products of many rows with weights of 8 and 4 bits by tiles of AMX: the bits of the kernel that needs none."""

from collections.abc import Iterator

import pytest
import torch
from tests.ops.test_eight_bit import make_weight as eight_bits
from tests.ops.test_grouped import make_weight as grouped
from torch import Tensor

from hasten import ops
from hasten.ops import Weight, native, rounding

integers = native.integer_kernels()
pytestmark = pytest.mark.skipif(
    integers is None or integers.tiles() is None, reason="no numba, or this processor or system gives no AMX"
)

ROWS = (5, 9, 15, 16, 17, 31, 33, 127, 130, 300)
"""Around the borders of a tile, of two, and of what is multiplied together, with one digit and with two."""
EIGHT_BITS = [(1, 1), (3, 333), (40, 48), (48, 64), (100, 2500), (300, 1024)]
GROUPED = {
    "groups of 16": grouped(48, 128, 16, zeros=True),
    "groups of 96, with zeros": grouped(40, 192, 96, zeros=True, shuffled=True, scaled=True),
    "groups of 128": grouped(100, 512, 128),
    "groups of more than fits at a time": grouped(70, 2080, 1040, zeros=True),
    "one group": grouped(33, 192, 192),
    "8 bits in groups": grouped(48, 256, 64, bits=8, zeros=True),
}


@pytest.fixture(params=[1, 2], ids=["a thread", "two threads"], autouse=True)
def threads(request: pytest.FixtureRequest) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def check(weight: Weight, monkeypatch: pytest.MonkeyPatch) -> None:
    """That tiles give the same as rows by themselves, in all that follows a product, too."""
    assert integers is not None
    packed = ops.pack_linear(weight)
    outputs, inputs = weight.shape
    bias = draw(outputs)
    for rows in ROWS:
        x, residual = draw(rows, inputs), draw(rows + 3, outputs)
        x[rows // 2] = 0
        x[1, 0] = float("nan")
        picked = torch.arange(rows).flip(0) + 3

        def results(x: Tensor = x, residual: Tensor = residual, picked: Tensor = picked) -> list[Tensor]:
            added = ops.add_linear(x, packed, bias, residual, picked)
            assert isinstance(added, Tensor)
            return [ops.linear(x, packed), ops.linear(x, packed, bias, activation="gelu_tanh"), added]

        found = results()
        with monkeypatch.context() as patched:
            patched.setattr(integers, "tiles", lambda: None)
            expected = results()
        for each, other in zip(found, expected, strict=True):
            assert torch.equal(each.view(torch.int32), other.view(torch.int32))
            assert other[0].isfinite().all()


@pytest.mark.parametrize(("out", "into"), EIGHT_BITS, ids=str)
@pytest.mark.parametrize("kind", ["int8", "w8a8"])
def test_8_bits(kind: str, out: int, into: int, monkeypatch: pytest.MonkeyPatch) -> None:
    check(eight_bits(out, into, kind=kind), monkeypatch)


@pytest.mark.parametrize("name", GROUPED)
def test_groups(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    check(GROUPED[name], monkeypatch)


def test_sums_are_exact() -> None:
    weight = eight_bits(70, 2500, kind="w8a8")
    x = draw(40, 2500)
    numbers, units = rounding.numbers_of(x, torch.int8)
    sums = numbers.long() @ weight.values.long().T
    assert int(sums.abs().max()) < 1 << 24, "fp32 holds them"
    assert torch.equal(ops.linear(x, ops.pack_linear(weight)), sums.float() * weight.scales * units)


def test_tiles_multiply_many_rows_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    assert integers is not None
    calls: list[None] = []
    tiles = integers.tiles()

    def counted() -> object:
        calls.append(None)
        return tiles

    monkeypatch.setattr(integers, "tiles", counted)
    for kind, few in (("w8a8", 8), ("int8", 4)):
        packed = ops.pack_linear(eight_bits(48, 64, kind=kind))
        ops.linear(draw(few, 64), packed)
        assert calls == []
        ops.linear(draw(few + 1, 64), packed)
        assert calls == [None]
        calls.clear()
