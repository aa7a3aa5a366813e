import pytest
import torch
from torch import Tensor

from hasten.ops import CACHE_DTYPES, BlockCaches, CacheScales, HeadTransform, Weight, reference
from hasten.ops.cache_scales import octets, stored
from hasten.ops.gpu import cache, matmul
from hasten.quantization.scheme import SCHEMES

NAN = float("nan")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
BLOCKS, BLOCK_SIZE = 7, 5


def tokens(count: int, heads: int, size: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Keys and values as they come: views of the fused QKV."""
    qkv = torch.randn(count, 3 * heads, size, generator=torch.Generator().manual_seed(count)).to(dtype).to(device)
    _, key, value = qkv.split(heads, dim=1)
    return key, value


def write_both(slots: Tensor, heads: int, size: int, dtype: torch.dtype, blocks: int = BLOCKS) -> list[list[Tensor]]:
    """The caches after the kernel's writing, and after the reference's. What nobody wrote is NaN."""
    key, value = tokens(len(slots), heads, size, dtype, slots.device)
    written = []
    for write in (cache.write_cache, reference.write_cache):
        caches = [
            torch.full((blocks, BLOCK_SIZE, heads, size), NAN, dtype=dtype, device=slots.device) for _ in range(2)
        ]
        write(key, value, caches[0], caches[1], slots)
        written.append(caches)
    return written


def assert_same(found: list[Tensor], expected: list[Tensor]) -> None:
    for first, other in zip(found, expected, strict=True):
        assert torch.equal(first.isnan(), other.isnan())
        assert torch.equal(first.nan_to_num(0), other.nan_to_num(0))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("slots", [[], [0], [BLOCKS * BLOCK_SIZE - 1], [12, 13, 0, 30], [-1], [4, -1, 5, -1]], ids=str)
def test_each_token_is_written_to_its_slot_and_nowhere_else(
    slots: list[int], dtype: torch.dtype, device: torch.device
) -> None:
    assert_same(*write_both(torch.tensor(slots, dtype=torch.int64, device=device), 3, 8, dtype))


@pytest.mark.parametrize("numbers", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize(("heads", "size"), [(1, 1), (3, 24), (12, 64), (17, 128), (33, 128)], ids=str)
def test_tokens_of_every_width(heads: int, size: int, numbers: torch.dtype, device: torch.device) -> None:
    assert_same(*write_both(torch.tensor([33, -1, 2], dtype=numbers, device=device), heads, size, torch.float16))


@pytest.mark.gpu
def test_a_cache_of_more_numbers_than_32_bits_count() -> None:
    blocks = 120_000
    slots = torch.tensor([blocks * BLOCK_SIZE - 1, 3, -1, 550_000], device="cuda")
    assert_same(*write_both(slots, 32, 128, torch.float16, blocks))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_large_step(dtype: torch.dtype) -> None:
    slots = torch.randperm(10_000, generator=torch.Generator().manual_seed(0))[:8192]
    slots[::7] = -1
    assert_same(*write_both(slots.cuda(), 32, 128, dtype, blocks=2000))


def empty_caches(heads: int, size: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    keys, values = torch.zeros(2, BLOCKS, BLOCK_SIZE, heads, size, dtype=dtype, device=device)
    return keys, values


def in_8_bits(caches: tuple[Tensor, Tensor], scales: CacheScales, dtype: torch.dtype) -> list[Tensor]:
    """Bits of caches in which the values of others are rounded."""
    pairs = zip(caches, scales.inverses_2m, strict=True)
    return [octets(stored(heads.flatten(0, 1), inverses, dtype).view(heads.shape)) for heads, inverses in pairs]


@pytest.mark.parametrize("dtype", CACHE_DTYPES.values(), ids=list(CACHE_DTYPES))
@pytest.mark.parametrize("of", [torch.float32, torch.float16], ids=str)
def test_caches_of_8_bits_hold_rounded_values(of: torch.dtype, dtype: torch.dtype, device: torch.device) -> None:
    """Small ones, halves, and those beyond the range of their head."""
    slots, heads, size = torch.tensor([12, -1, 0, 30, 7], device=device), 3, 8
    key, value = (
        each * 3.0 ** torch.arange(-4, 4, device=device).to(of) for each in tokens(5, heads, size, of, device)
    )
    scales = CacheScales.of(torch.tensor([[1.0, 127.0, 0.0], [0.5, 40.0, 448.0]], device=device), dtype)
    found, expected = empty_caches(heads, size, dtype, device), empty_caches(heads, size, dtype, device)
    cache.write_cache(key, value, *found, slots, scales=scales)
    reference.write_cache(key, value, *expected, slots, scales=scales)
    assert all(map(torch.equal, map(octets, found), map(octets, expected)))


WAYS = [
    *((scheme, rows) for scheme in (None, "int8", "int4", "turned") for rows in (1, 5, 140)),
    *(("fp8", rows) for rows in (1, 5)),
    pytest.param("fp8", 140, marks=pytest.mark.gpu),  # by a library that a CPU does not have
]
"""Schemes of weights, or none, and numbers of rows; turned: with a rotation behind the projection."""


@pytest.mark.parametrize("dtype", CACHE_DTYPES.values(), ids=list(CACHE_DTYPES))
@pytest.mark.parametrize(("scheme", "rows"), WAYS)
def test_projections_round_what_they_give_to_caches_of_8_bits(
    scheme: str | None, rows: int, dtype: torch.dtype, device: torch.device
) -> None:
    """In every kernel, and behind libraries, as it would be in a cache of the model's type."""
    heads, kv_heads, size, blocks = 4, 2, 24, 30
    generator = torch.Generator().manual_seed(rows)
    x, dense = torch.randn(rows, 128, generator=generator), torch.randn((heads + 2 * kv_heads) * size, 128) / 8
    plain = scheme in (None, "turned")
    weight: Weight = dense.half().to(device)
    if scheme is not None and not plain:
        weight = SCHEMES[scheme].quantize(dense.half().to(device), "drawn")
    turn = None
    if scheme == "turned":
        positions = torch.arange(rows, device=device)
        turn = HeadTransform(positions_t=positions, table_pr=torch.rand(rows, size, device=device))
    slots = torch.randperm(blocks * BLOCK_SIZE, generator=generator)[:rows]
    slots[1::3] = -1
    packed, operand = matmul.pack_linear(weight, False), x.half().to(device)
    scales = CacheScales.of(torch.tensor([[1.0, 3.0], [2.0, 0.5]], device=device), dtype)

    def projected(held: torch.dtype, scales: CacheScales | None) -> tuple[Tensor, Tensor]:
        keys, values = torch.zeros(2, blocks, BLOCK_SIZE, kv_heads, size, dtype=held, device=device)
        matmul.project(operand, packed, None, keys, values, slots.to(device), heads, turn, scales=scales)
        return keys, values

    full, narrow = projected(torch.float16, None), projected(dtype, scales)
    assert all(map(torch.equal, map(octets, narrow), in_8_bits(full, scales, dtype)))
    assert octets(narrow[0]).any()


def layers(shapes: list[tuple[int, ...]], dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """A cache for each shape of a block, of random bits: NaN with all its bits, infinities and denormals as well."""
    generator = torch.Generator().manual_seed(0)
    bits = [
        torch.randint(0, 256, (BLOCKS, *shape, dtype.itemsize), generator=generator, dtype=torch.uint8)
        for shape in shapes
    ]
    return [each.view(dtype).squeeze(-1).to(device) for each in bits]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shapes",
    [[(16, 4, 8)] * 4, [(1, 1, 1)], [(5, 3, 1)] * 2, [(5, 3, 2)], [(16, 32, 33), (16, 8, 64), (16, 32, 33)]],
    ids=str,
)
@pytest.mark.parametrize("pairs", [[], [(1, 4)], [(1, 4), (1, 5), (6, 0), (2, 3)]], ids=str)
def test_blocks_are_copied_bit_by_bit(
    pairs: list[tuple[int, int]], shapes: list[tuple[int, ...]], dtype: torch.dtype, device: torch.device
) -> None:
    found, expected = layers(shapes, dtype, device), layers(shapes, dtype, device)
    sources, targets = torch.tensor(pairs, dtype=torch.int64, device=device).view(-1, 2).T.contiguous()
    cache.copy_blocks(BlockCaches.of(found), sources, targets)
    reference.copy_blocks(BlockCaches.of(expected), sources, targets)
    for first, other in zip(found, expected, strict=True):
        assert torch.equal(first.view(torch.uint8), other.view(torch.uint8))


@pytest.mark.gpu
def test_blocks_behind_32_bits_are_copied() -> None:
    blocks = 120_000
    caches = [torch.zeros(blocks, BLOCK_SIZE, 32, 128, dtype=torch.float16, device="cuda") for _ in range(2)]
    for number, each in enumerate(caches):
        each[blocks - 1], each[3] = 1 + number, 3 + number
    pairs = torch.tensor([[blocks - 1, 3], [110_000, blocks - 2]], device="cuda")
    cache.copy_blocks(BlockCaches.of(caches), *pairs)
    for number, each in enumerate(caches):
        assert bool((each[110_000] == 1 + number).all())
        assert bool((each[blocks - 2] == 3 + number).all())


@pytest.mark.parametrize("numbers", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("count", [0, 1, 255, 256, 257, 1000])
def test_ids_that_are_not_known_are_those_that_were_chosen(
    count: int, numbers: torch.dtype, device: torch.device
) -> None:
    generator = torch.Generator().manual_seed(count)
    ids = torch.randint(-40, 250_880, (count,), generator=generator)
    ids[::3] = -1 - torch.randint(40, ids[::3].shape, generator=generator)
    chosen = torch.randint(-1, 250_880, (40,), generator=generator, dtype=torch.int32)
    chosen[::5] = -1
    known = ids.to(numbers).to(device)
    found = cache.resolve_ids(known, chosen.to(device))
    assert found.dtype == numbers
    assert torch.equal(found.cpu(), reference.resolve_ids(ids.to(numbers), chosen))
    assert torch.equal(known.cpu(), ids.to(numbers))
