"""A single row's product with weights in shared memory: its arithmetic where there is no GPU, and what it is used for.

On a GPU the tests of linear layers launch it. Shapes: o output features, h input features.
"""

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from tests.ops.gpu.gluon_in_numpy import Pointers, in_numpy
from torch import Tensor
from triton import knobs

from hasten.ops import GroupedWeight, PackedLinear, pack_nibbles
from hasten.ops.gpu import byte_dots, held_tiles, matmul
from hasten.ops.gpu.row_rounding import round_rows


def make_weight(out: int, into: int, group: int) -> PackedLinear:
    generator = torch.Generator().manual_seed(out + into)
    values = pack_nibbles(torch.randint(16, (out, into), dtype=torch.uint8, generator=generator))
    scales = torch.rand(into // group, out, generator=generator) + 0.5
    return matmul.pack_linear(GroupedWeight(values, scales, None, 8, into, torch.float16), shared=False)


def by_programs(
    x: Tensor, weight: PackedLinear, bias: Tensor, form: held_tiles.Form, monkeypatch: pytest.MonkeyPatch
) -> NDArray[np.float32]:
    """[o], as the kernel's programs leave it."""
    weights = byte_dots._weights(weight)
    numbers, units_t = round_rows(x, weight.inputs, nibbles=True)
    features, words = weights.words.shape
    out = np.full(features, np.nan, np.float32)
    arrays = numbers.view(torch.int32), units_t, weights.words, weights.scales, bias
    kernel = held_tiles.held_tile.fn
    names = kernel.__globals__
    for name in ("_words", "_add"):
        monkeypatch.setitem(names, name, names[name].fn)
    for name in ("_BASE", "_ROWS"):
        monkeypatch.setitem(names, name, names[name].value)
    for name in ("start_next", "wait_for_inputs"):
        monkeypatch.setitem(names, name, lambda _: None)
    for program in range(features // form.features):
        for name, value in in_numpy(program).items():
            monkeypatch.setitem(names, name, value)
        kernel(
            *(Pointers(each.numpy().reshape(-1)) for each in arrays), Pointers(out), None, None, None, None, features,
            WORDS=words, GROUP=weights.group, BY_ROWS=form.by_rows, BY_COLUMNS=form.by_columns, HAS_BIAS=True,
            ACTIVATION=None, CLIP=None, Q=0, KV=0, D=0, PDL=False,
        )  # fmt: skip
    return out


@pytest.mark.parametrize(
    ("shape", "form"),
    [((32, 1024, 128), (4, 1)), ((32, 4096, 256), (4, 1)), ((16, 4096, 4096), (2, 2)), ((8, 4096, 128), (1, 4))],
    ids=str,
)
def test_programs_compute_the_definition(
    shape: tuple[int, int, int], form: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = make_weight(*shape)
    assert weight.grouped is not None
    x, bias = (torch.randn(width, generator=torch.Generator().manual_seed(width)) for width in shape[1::-1])
    x = x.half().unsqueeze(0)
    found = by_programs(x, weight, bias, held_tiles.Form(*form), monkeypatch)
    expected = (x.double() @ weight.grouped.dequantized(torch.float64).T + bias)[0].numpy()
    assert np.linalg.norm(found - expected) <= 2e-4 * np.linalg.norm(expected)


@pytest.mark.parametrize(
    ("shape", "form"),
    [
        ((12_288, 512, 16), (4, 1)),
        ((4096, 2048, 16), (1, 4)),
        ((4096, 1024, 128), (2, 2)),
        ((4096, 1792, 16), None),
        ((4100, 512, 16), None),
        ((4100, 2048, 16), (1, 4)),
        ((4096, 512, 8), None),
        ((4096, 96, 16), None),
    ],
    ids=str,
)
def test_programs_are_whole_and_of_one_size(
    shape: tuple[int, int, int], form: tuple[int, int] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights of so many features, words and words of a group; others are read into registers."""
    assert held_tiles.form_of(*shape) is None, "the interpreter knows no Gluon"
    monkeypatch.setattr(knobs.runtime, "interpret", False)
    found = held_tiles.form_of(*shape)
    assert found == (None if form is None else held_tiles.Form(*form))
