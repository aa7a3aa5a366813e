from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from hasten import ops
from hasten.ops import reference

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
BLOCKS, BLOCK_SIZE, HEADS, HEAD_SIZE = 7, 5, 3, 8


def caches(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    key, value = torch.full((2, BLOCKS, BLOCK_SIZE, HEADS, HEAD_SIZE), -7.0, dtype=dtype)
    return key, value


def tokens(count: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Keys and values as they come: views of the fused QKV."""
    qkv = torch.randn(count, 3 * HEADS, HEAD_SIZE, generator=torch.Generator().manual_seed(count)).to(dtype)
    _, key, value = qkv.split(HEADS, dim=1)
    return key, value


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "slots",
    [
        [],
        [0],
        [BLOCKS * BLOCK_SIZE - 1],
        [12, 13, 14, 0, 1, 30],
        [-1],
        [-1, -1, -1],
        [4, -1, 5, -1],
        [-1, 33, 2],
        [-1, 0],
    ],
    ids=str,
)
def test_each_token_is_written_to_its_slot_and_nowhere_else(slots: list[int], dtype: torch.dtype) -> None:
    key_cache, value_cache = caches(dtype)
    key, value = tokens(len(slots), dtype)
    ops.write_cache(key, value, key_cache, value_cache, torch.tensor(slots, dtype=torch.int64))
    for cache, new in ((key_cache, key), (value_cache, value)):
        by_slot = {slot: row for row, slot in enumerate(slots) if slot >= 0}
        for slot in range(BLOCKS * BLOCK_SIZE):
            found = cache[slot // BLOCK_SIZE, slot % BLOCK_SIZE]
            expected = new[by_slot[slot]] if slot in by_slot else torch.full_like(found, -7)
            assert torch.equal(found, expected)


def test_what_goes_to_no_slot_may_be_anything() -> None:
    key_cache, value_cache = caches()
    key, value = (tensor.clone() for tensor in tokens(3))
    key[1] = value[1] = float("nan")
    ops.write_cache(key, value, key_cache, value_cache, torch.tensor([3, -1, 9]))
    assert not key_cache.isnan().any()
    assert not value_cache.isnan().any()


def numbered(width: int = 3) -> Tensor:
    return torch.arange(BLOCKS, dtype=torch.float32).view(-1, 1, 1).repeat(1, BLOCK_SIZE, width)


@pytest.mark.parametrize(
    ("pairs", "expected"),
    [
        ([], [0, 1, 2, 3, 4, 5, 6]),
        ([(1, 4)], [0, 1, 2, 3, 1, 5, 6]),
        ([(1, 4), (1, 5), (1, 6)], [0, 1, 2, 3, 1, 1, 1]),
        ([(6, 0), (3, 1)], [6, 3, 2, 3, 4, 5, 6]),
    ],
    ids=str,
)
def test_blocks_are_copied_in_every_layer(pairs: list[tuple[int, int]], expected: list[int]) -> None:
    layers = [numbered(), numbered(width=1), numbered()]
    sources, targets = torch.tensor(pairs, dtype=torch.int64).view(-1, 2).unbind(1)
    ops.copy_blocks(ops.BlockCaches.of(layers), sources, targets)
    for layer in layers:
        assert torch.equal(layer, numbered(layer.shape[2])[expected])


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("op", [ops.resolve_ids, reference.resolve_ids], ids=["cpu", "reference"])
def test_ids_below_zero_stand_for_tokens_that_were_chosen(op: Callable[..., Tensor], dtype: torch.dtype) -> None:
    chosen_r = torch.tensor([70, 0, -1, 250_679], dtype=torch.int32)  # no token for the third
    for ids, expected in (
        ([], []),
        ([5, 0, 250_680], [5, 0, 250_680]),
        ([-1, -2, -3, -4], [70, 0, 0, 250_679]),
        ([9, -4, 9, -1, -1, 0], [9, 250_679, 9, 70, 70, 0]),
    ):
        ids_t = torch.tensor(ids, dtype=dtype)
        before = ids_t.clone(), chosen_r.clone()
        found = op(ids_t, chosen_r)
        assert found.dtype == dtype
        assert found.tolist() == expected
        assert torch.equal(ids_t, before[0])
        assert torch.equal(chosen_r, before[1])


def test_ops_without_a_faster_path_are_the_reference() -> None:
    """What the other tests show of the op they then show of its definition as well."""
    written: list[tuple[Tensor, Tensor]] = []
    for write in (ops.write_cache, reference.write_cache):
        written.append(caches())
        write(*tokens(2), *written[-1], torch.tensor([8, 2]))
    assert all(torch.equal(a, b) for a, b in zip(*written, strict=True))
    copied = [[numbered()], [numbered()]]
    for copy, layers in zip((ops.copy_blocks, reference.copy_blocks), copied, strict=True):
        copy(ops.BlockCaches.of(layers), torch.tensor([1]), torch.tensor([2]))
    assert torch.equal(copied[0][0], copied[1][0])
