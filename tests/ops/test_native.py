"""The kernels for a CPU compared with the definitions, on one thread and on two, and recordings of them."""

import random
import re
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention
from tests.ops.conftest import exactly_activated
from tests.terminal import on_a_terminal
from tests.waiting import LIMIT_S
from torch import Tensor

from hasten import ops
from hasten.ops import beams, cpu, native, reference
from hasten.ops.heads import HeadTransform
from hasten.ops.meta import AttentionMeta

pytest.importorskip("numba", reason="there are no kernels without it")

from hasten.ops.native import compiled

Close = Callable[[str, Tensor, Tensor], None]


@pytest.fixture(scope="module", params=[1, 2], ids=["one thread", "two threads"], autouse=True)
def threads(request: pytest.FixtureRequest) -> Iterator[None]:
    """As many threads of torch; on two, however little there is to do."""
    from hasten.ops.native import launch

    before, least = torch.get_num_threads(), launch.FEW_OPERATIONS
    torch.set_num_threads(request.param)
    launch.FEW_OPERATIONS = 0
    yield
    torch.set_num_threads(before)
    launch.FEW_OPERATIONS = least


@pytest.fixture
def kernels() -> native.Kernels:
    found = native.kernels()
    assert found is not None
    return found


def draw(*shape: int, scale: float = 1.0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))) * scale


@pytest.mark.parametrize("into", [1, 3, 31, 64, 256])
@pytest.mark.parametrize("out", [1, 32, 40, 96])
def test_products_of_any_size(out: int, into: int, assert_close: Close) -> None:
    weight, bias = draw(out, into, scale=into**-0.5), draw(out)
    packed = ops.pack_linear(weight)
    assert packed.panels is not None
    for rows in (*range(1, 19), 64, 261):
        x, residual = draw(rows, into), draw(rows + 3, out)
        numbers = torch.randperm(rows + 3)[:rows]
        expected = F.linear(x.double(), weight.double(), bias.double())
        found = ops.add_linear(x, packed, bias, residual, numbers)
        assert isinstance(found, Tensor)
        assert_close("linear", found, expected + residual[numbers].double())
        assert_close("linear", ops.linear(x, packed), F.linear(x.double(), weight.double()))


def _ways() -> dict[str, Callable[[], Any]]:
    """What multiplies rounded rows by weights in bf16, by name: as far as this processor has it."""
    from hasten.ops.native import bf16

    found: dict[str, Callable[[], Any]] = {"widened": lambda: None, "pairs": bf16._by_pairs, "tiles": bf16._by_tiles}
    return {name: kernel for name, kernel in found.items() if name == "widened" or kernel() is not None}


@pytest.mark.parametrize("into", [1, 3, 31, 64, 256])
@pytest.mark.parametrize("out", [1, 32, 40, 96])
def test_products_with_weights_in_bf16(
    out: int, into: int, assert_close: Close, kernels: native.Kernels, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight, bias = draw(out, into, scale=into**-0.5).bfloat16(), draw(out)
    packed = ops.pack_linear(weight)
    assert packed.is_table
    for name, kernel in _ways().items():
        monkeypatch.setattr(kernels.bf16, "rounded_kernel", kernel)
        for rows in (*range(1, 19), 33, 64, 261):
            x, residual = draw(rows, into), draw(rows + 3, out)
            numbers = torch.randperm(rows + 3)[:rows]
            is_rounded = rows > {"widened": rows, "pairs": 8, "tiles": 16}[name]
            exact = F.linear((x.bfloat16() if is_rounded else x).double(), weight.double())
            found = ops.add_linear(x, packed, bias, residual, numbers)
            assert isinstance(found, Tensor)
            for one, other in (
                (found, exact + bias + residual[numbers]),
                (ops.add_linear(x, packed, bias, residual[:rows]), exact + bias + residual[:rows]),
                (ops.linear(x, packed, bias, activation="gelu_tanh"), exactly_activated(exact + bias, "gelu_tanh")),
            ):
                assert isinstance(one, Tensor)
                # of a number in two of bf16 the last of 17 bits is lost
                assert (one - other).abs().max() <= (5e-5 if name == "tiles" and not is_rounded else 1e-5)


def test_a_row_has_the_same_bits_among_any_others(kernels: native.Kernels, monkeypatch: pytest.MonkeyPatch) -> None:
    packed, x = ops.pack_linear(draw(70, 96).bfloat16()), draw(80, 96)
    for kernel in _ways().values():
        monkeypatch.setattr(kernels.bf16, "rounded_kernel", kernel)
        many = ops.linear(x, packed)
        for rows in (17, 33, 50):
            assert torch.equal(ops.linear(x[:rows].clone(), packed), many[:rows])
        few = ops.linear(x[:8].clone(), packed)
        assert torch.equal(ops.linear(x[:5].clone(), packed), few[:5])


def test_not_a_number_stays_so_in_products_with_weights_in_bf16(
    kernels: native.Kernels, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed = ops.pack_linear(torch.ones(33, 64).bfloat16())
    for kernel in _ways().values():
        monkeypatch.setattr(kernels.bf16, "rounded_kernel", kernel)
        for rows in (1, 9, 40):
            for wrong in (torch.nan, torch.inf, torch.tensor(0x7FFFFFFF, dtype=torch.int32).view(torch.float32).item()):
                x = torch.ones(rows, 64)
                x[rows - 1, 5] = wrong
                found = ops.linear(x, packed)
                assert not found[rows - 1].isfinite().any()
                assert (found[: rows - 1] == 64).all()


@pytest.mark.parametrize("width", [1, 7, 32, 50, 256])
def test_rows_of_tables_in_bf16(width: int) -> None:
    table, ids = draw(70, width).bfloat16(), torch.tensor([3, 69, 0, 31, 32, 3])
    packed = ops.pack_linear(table, shared=True)
    for each in (table, packed):
        assert torch.equal(ops.embedding(ids, each), table.float()[ids])
    shard = ops.pack_linear(table[20:50].clone())
    held = (ids >= 20) & (ids < 50)
    assert torch.equal(ops.embedding(ids, shard, 20), table.float()[ids] * held.unsqueeze(1))


def test_large_results_use_memory_again() -> None:
    reused = native.pages._Reused()
    first = torch.from_numpy(reused.take(1 << 20))
    address = first.data_ptr()
    second = torch.from_numpy(reused.take(1 << 20))
    assert second.data_ptr() != address
    view = first[5:]
    del first
    third = torch.from_numpy(reused.take(1 << 20))
    assert third.data_ptr() not in (address, second.data_ptr())
    del view
    assert torch.from_numpy(reused.take(1 << 19)).data_ptr() == address
    assert torch.from_numpy(reused.take(1 << 18)).data_ptr() != address
    pieces = [reused.take(1 << 24) for _ in range(4)]
    del pieces
    held = reused.take(1 << 10)
    assert len(held) == 1 << 10
    assert sum(map(len, reused._free)) <= native.pages._MOST_FREE


@pytest.mark.parametrize(("out", "into"), [(1, 16), (7, 48), (96, 256)])
def test_products_with_shared_weights(
    out: int, into: int, assert_close: Close, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu.products, "_SMALL_WEIGHT", 0)
    weight, bias = draw(out, into, scale=into**-0.5), draw(out)
    packed = ops.pack_linear(weight, shared=True)
    assert packed.by_rows
    assert packed.plain is weight
    for rows in range(1, 10):
        x = draw(rows, into)
        found = ops.linear(x, packed, bias)
        assert_close("linear", found, F.linear(x.double(), weight.double(), bias.double()))
        assert torch.equal(ops.linear(x[-1:], packed, bias), found[-1:])


def test_weights_are_in_memory_of_their_own() -> None:
    sizes = [(1, 3), (5, 7, 32), (1 << 10, 1 << 10), (17,)]
    tensors = [native.pages.zeros(size) for size in sizes] + [native.pages.zeros((1 << 27,), torch.int8)]
    assert not any(tensor.data_ptr() % 64 or tensor.any() for tensor in tensors)
    for number, tensor in enumerate(tensors):
        tensor.fill_(number)
    assert all((tensor == number).all() for number, tensor in enumerate(tensors))
    source = draw(6, 5).t()
    assert torch.equal(native.pages.copied(source), source)


def test_memory_goes_back_with_the_last_tensor_in_it() -> None:
    regions = native.pages._Regions()
    first, second = (torch.from_numpy(regions.take(100)) for _ in range(2))
    region = weakref.ref(regions._region.base)
    regions.take(1 << 27)
    del first
    assert region() is not None
    second += 1
    del second
    assert region() is None


@pytest.mark.parametrize("activation", get_args(ops.Activation))
def test_activations_in_products(activation: ops.Activation, assert_close: Close) -> None:
    weight, bias, x = draw(64, 48, scale=48**-0.5), draw(64), draw(9, 48)
    packed, inner = ops.pack_linear(weight), F.linear(x.double(), weight.double(), bias.double())
    assert_close("linear", ops.linear(x, packed, bias, activation=activation), exactly_activated(inner, activation))
    gate, up = inner.chunk(2, dim=1)
    found = ops.gated_linear(x, packed, bias, activation)
    assert_close("linear", found, exactly_activated(gate, activation) * up)


@pytest.mark.parametrize("width", [1, 8, 16, 50, 256])
def test_norms_and_rows_of_tables(width: int, assert_close: Close) -> None:
    x, weight, bias, ids = draw(5, width), draw(width), draw(width), torch.tensor([4, 0, 4])
    choices: list[dict[str, Any]] = [{}, {"rms": True}, {"rms": True, "unit_offset": True}]
    for options in choices:
        found, kept = ops.norm(x, weight, None if options else bias, 1e-5, **options)
        expected, _ = reference.norm(x.double(), weight.double(), None if options else bias.double(), 1e-5, **options)
        assert_close("layer_norm", found, expected)
        assert kept is x
    assert_close("layer_norm", ops.embedding_norm(ids, x, weight, bias, 1e-5), ops.norm(x, weight, bias, 1e-5)[0][ids])
    assert torch.equal(ops.embedding(ids, x), x[ids])
    assert torch.equal(ops.scaled(x.clone(), 0.3), x * 0.3)


@pytest.mark.parametrize("block", [5, 16, 128])
@pytest.mark.parametrize(("heads", "key_heads", "size"), [(4, 4, 64), (6, 2, 16), (16, 1, 48), (40, 20, 32)])
def test_single_queries(heads: int, key_heads: int, size: int, block: int, assert_close: Close) -> None:
    lengths = [1, 2, 0, 127, 128, 129, 300]
    width = 300 // block + 1
    keys, values = (draw(len(lengths) * width, block, key_heads, size) for _ in range(2))
    tables = torch.randperm(len(lengths) * width, generator=torch.Generator().manual_seed(0)).int().view(-1, width)
    meta = AttentionMeta(
        num_tokens=len(lengths),
        block_tables=tables,
        slot_mapping=torch.zeros(len(lengths), dtype=torch.int64),
        sequences=list(range(len(lengths))),
        query_lens=[1] * len(lengths),
        kv_lens=lengths,
    )
    queries, slopes, sinks = draw(len(lengths), heads, size), draw(heads).abs() / 8, draw(heads)
    plain: dict[str, Any] = {"alibi_slopes_n": None}
    for options in (
        plain,
        {"alibi_slopes_n": slopes, "window": 40},
        plain | {"softcap": 2.0, "sinks_n": sinks},
        plain | {"causal": False},
        plain | {"bias_nr": draw(heads, 2 * 9 + 1)},
        plain | {"bias_nr": draw(heads, 2 * 140 + 1), "window": 200},
    ):
        found = ops.paged_attention(queries, keys, values, meta, size**-0.5, **options)
        expected = reference.paged_attention(queries, keys, values, meta, size**-0.5, **options)
        some = [place for place, length in enumerate(lengths) if length]
        assert_close("attention", found[some], expected[some])
        assert not found[2].any()


def test_single_queries_among_prompts(assert_close: Close) -> None:
    query_lens, kv_lens = [1, 5, 1, 300, 1], [70, 5, 1, 310, 129]
    keys, values = (draw(5 * 20, 16, 2, 32) for _ in range(2))
    meta = AttentionMeta(
        num_tokens=sum(query_lens),
        block_tables=torch.arange(5 * 20, dtype=torch.int32).view(5, 20),
        slot_mapping=torch.zeros(sum(query_lens), dtype=torch.int64),
        sequences=[4, 0, 2, 1, 3],
        query_lens=query_lens,
        kv_lens=kv_lens,
    )
    queries = draw(sum(query_lens), 4, 32)
    for window in (None, 40):
        found = ops.paged_attention(queries, keys, values, meta, 0.2, None, window=window)
        expected = reference.paged_attention(queries, keys, values, meta, 0.2, None, window=window)
        assert_close("attention", found, expected)
        alone = replace(meta, num_tokens=1, sequences=[2], query_lens=[1], kv_lens=[1], scratch={})
        assert torch.equal(ops.paged_attention(queries[6:7], keys, values, alone, 0.2, None, window=window), found[6:7])


@pytest.mark.parametrize("block", [5, 16, 128])
@pytest.mark.parametrize(
    ("heads", "key_heads", "size"), [(4, 4, 64), (6, 2, 16), (16, 1, 48), (4, 2, 80), (2, 1, 256), (1, 1, 512)]
)
def test_queries_of_prompts(heads: int, key_heads: int, size: int, block: int, assert_close: Close) -> None:
    query_lens, kv_lens = [2, 7, 33, 128, 3, 300, 9], [2, 40, 33, 129, 131, 300, 0]
    width = 300 // block + 1
    keys, values = (draw(len(kv_lens) * width, block, key_heads, size) for _ in range(2))
    tables = torch.randperm(len(kv_lens) * width, generator=torch.Generator().manual_seed(0)).int().view(-1, width)
    for table, length in zip(tables, kv_lens, strict=True):
        for cache in (keys, values):
            behind = torch.arange(length, width * block)
            cache[table[behind // block].long(), behind % block] = float("nan")
    meta = AttentionMeta(
        num_tokens=sum(query_lens),
        block_tables=tables,
        slot_mapping=torch.zeros(sum(query_lens), dtype=torch.int64),
        sequences=list(range(len(kv_lens))),
        query_lens=query_lens,
        kv_lens=kv_lens,
    )
    # as they stand in a fused projection
    queries = draw(sum(query_lens), heads + 2 * key_heads, size)[:, :heads]
    slopes, sinks, plain = draw(heads).abs() / 8, draw(heads), {"alibi_slopes_n": None}
    every: list[dict[str, Any]] = [
        plain,
        {"alibi_slopes_n": slopes, "window": 40},
        {"alibi_slopes_n": slopes, "sinks_n": sinks},
        plain | {"softcap": 2.0, "sinks_n": sinks, "window": 1},
        plain | {"causal": False},
        plain | {"causal": False, "window": 7},
        plain | {"causal": False, "bias_nr": draw(heads, 2 * 9 + 1)},
        plain | {"bias_nr": draw(heads, 2 * 140 + 1), "window": 200},
    ]
    for options in every:
        found = ops.paged_attention(queries, keys, values, meta, size**-0.5, **options)
        assert not found[-9:].any()
        start = 0
        for number, (count, length) in enumerate(zip(query_lens[:-1], kv_lens[:-1], strict=True)):
            # the definition weighs what stands behind the keys with 0, and knows one text at a time
            own = replace(meta, num_tokens=count, sequences=[0], query_lens=[count], kv_lens=[length], scratch={})
            own = replace(own, block_tables=torch.arange(width, dtype=torch.int32).unsqueeze(0))
            some = slice(start, start + count)
            own_keys, own_values = (cache[tables[number].long()].nan_to_num() for cache in (keys, values))
            expected = reference.paged_attention(queries[some], own_keys, own_values, own, size**-0.5, **options)
            assert_close("attention", found[some], expected)
            start += count


def test_a_query_of_a_prompt_has_the_same_bits_in_any_chunk() -> None:
    keys, values = (draw(20, 16, 2, 32) for _ in range(2))
    queries, slopes = draw(300, 4, 32), draw(4).abs() / 8
    whole = AttentionMeta(
        num_tokens=300,
        block_tables=torch.arange(20, dtype=torch.int32).view(1, 20),
        slot_mapping=torch.zeros(300, dtype=torch.int64),
        sequences=[0],
        query_lens=[300],
        kv_lens=[300],
    )
    for window in (None, 50):
        found = ops.paged_attention(queries, keys, values, whole, 0.2, slopes, window=window)
        for first, last in ((0, 2), (5, 130), (131, 300)):
            chunk = replace(whole, num_tokens=last - first, query_lens=[last - first], kv_lens=[last], scratch={})
            part = ops.paged_attention(queries[first:last], keys, values, chunk, 0.2, slopes, window=window)
            assert torch.equal(part, found[first:last])


@pytest.mark.parametrize(("heads", "key_heads", "size"), [(4, 4, 64), (6, 2, 16), (2, 1, 160)])
def test_caches_in_bf16_are_widened(heads: int, key_heads: int, size: int) -> None:
    lengths = [(1, 200), (1, 0), (30, 170), (1, 3), (20, 20)]
    tables = torch.randperm(100)[:70].view(5, 14).int()
    caches = [draw(100, 16, key_heads, size).bfloat16() for _ in range(2)]
    queries = draw(sum(count for count, _ in lengths), heads, size)
    meta = AttentionMeta(
        num_tokens=len(queries),
        block_tables=tables,
        slot_mapping=torch.zeros(len(queries), dtype=torch.int64),
        sequences=list(range(5)),
        query_lens=[count for count, _ in lengths],
        kv_lens=[length for _, length in lengths],
    )
    wide = [cache.float() for cache in caches]
    found, expected = (ops.paged_attention(queries, keys, values, meta, size**-0.5) for keys, values in (caches, wide))
    assert torch.equal(found, expected)
    qkv = draw(9, (heads + 2 * key_heads) * size)
    slots = torch.tensor([3, -1, 40, 41, 700, 5, 6, 7, 1599])
    for each in (caches, wide):
        cpu.heads.store_heads(qkv.clone(), each[0], each[1], slots, heads, None)
    assert all(torch.equal(cache, other.bfloat16()) for cache, other in zip(caches, wide, strict=True))


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("turned", [0, 8, 32])
def test_heads_are_turned_and_stored(turned: int, interleaved: bool, assert_close: Close) -> None:
    qkv, slots = draw(6, 8 * 32), torch.tensor([3, -1, 0, 19, 7, 4])
    transform = None
    if turned:
        positions = torch.tensor([0, 5, 2, 9, 1, 1])
        transform = HeadTransform(positions_t=positions, table_pr=draw(10, turned), interleaved=interleaved)
    keys, values, right_keys, right_values = (torch.zeros(5, 4, 2, 32) for _ in range(4))
    queries = cpu.heads.store_heads(qkv.clone(), keys, values, slots, 4, transform)
    right_queries = reference.store_heads(qkv.clone(), right_keys, right_values, slots, 4, transform)
    assert_close("attention", queries, right_queries)
    assert_close("attention", keys, right_keys)
    assert_close("attention", values, right_values)


def test_the_most_probable_token(kernels: native.Kernels) -> None:
    for width in (1, 16, 77, 1003):
        logits = draw(12, width)
        for row, value in enumerate((torch.nan, torch.inf, -torch.inf)):
            logits[row, -1] = value
            logits[row + 3, 0] = value
        logits[6] = -torch.inf
        logits[7, width // 3] = logits[7, width // 2] = 9
        assert torch.equal(kernels.choice.greedy(logits), reference.greedy(logits))
        assert torch.equal(
            kernels.choice.greedy(logits[:, : width // 2 + 1]), reference.greedy(logits[:, : width // 2 + 1])
        )


def _draws(rng: random.Random, rows: int, vocab: int) -> dict[str, list[Any]]:
    choices: dict[str, list[Any]] = {
        "temperature": [1e-5, 0.3, 0.8, 1.0, 1.6, 1e5, 1e300],
        "top_k": [0, 0, 1, 3, 50, max(1, vocab - 1), vocab, 2 * vocab],
        "top_p": [1.0, 1.0, 0.999, 0.9, 0.3, 1e-9],
        "min_p": [0.0, 0.0, 0.01, 0.3, 1.0],
    }
    drawn = {name: [rng.choice(values) for _ in range(rows)] for name, values in choices.items()}
    return {**drawn, "point": [rng.random() for _ in range(rows)]}


@pytest.mark.parametrize("vocab", [1, 5, 8, 64, 65, 1000, 1024, 5003])
def test_the_same_tokens_are_drawn(vocab: int, kernels: native.Kernels) -> None:
    rng = random.Random(vocab)
    for scale in (0.5, 3.0, 20.0):
        logits = draw(60, vocab, scale=scale)
        logits[15:30] = (2 * logits[15:30]).round() / 2  # many equals
        logits[20:45] = logits[20:45].where(draw(25, vocab) > 0, -torch.inf)
        logits[50] = logits[51, 1:] = -torch.inf
        logits[52, -1], logits[53, vocab // 2] = torch.nan, torch.inf
        for _ in range(4):
            draws = ops.Draws.of(**_draws(rng, len(logits), vocab), device=torch.device("cpu"))
            found = kernels.sampling.draw(logits, draws)
            assert torch.equal(found, reference.draw(logits, draws))
            assert torch.equal(ops.draw(logits, draws), found)
            alone = ops.Draws(draws.packed_r5[7:8], draws.filters)
            assert kernels.sampling.draw(logits[7:8], alone).tolist() == found[7:8].tolist()


def test_the_same_tokens_are_drawn_from_a_flat_distribution(kernels: native.Kernels) -> None:
    logits, count = draw(1, 50_000, scale=1e-3).expand(40, -1), 40
    options: list[dict[str, float]] = [{"top_p": 0.9}, {"top_k": 30_000}, {"top_k": 20_000, "top_p": 0.4}, {}]
    rows = [{"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, **options[n % 4]} for n in range(count)]
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    points = [(n + 0.5) / count for n in range(count)]
    draws = ops.Draws.of(**columns, point=points, device=torch.device("cpu"))  # type: ignore[arg-type]
    assert torch.equal(kernels.sampling.draw(logits, draws), reference.draw(logits, draws))


def test_points_at_the_ends_draw_tokens_that_have_a_probability(kernels: native.Kernels) -> None:
    logits, count = draw(90, 300, scale=4.0), 90
    logits[:, 250:] = -torch.inf
    columns: dict[str, Any] = {"temperature": [0.7] * count, "top_k": [0, 5, 0] * 30, "top_p": [1.0, 1.0, 0.8] * 30}
    for point in (0.0, 1 - 2.0**-53):
        draws = ops.Draws.of(**columns, min_p=[0.0] * count, point=[point] * count, device=torch.device("cpu"))
        tokens = kernels.sampling.draw(logits, draws).long()
        assert (reference.filtered(logits, draws).gather(1, tokens.unsqueeze(1)) > 0).all()


@pytest.mark.parametrize("count", [0, 1, 5, 20, 64])
def test_log_probabilities(count: int, kernels: native.Kernels) -> None:
    for vocab in (1, 8, 77, 1003):
        logits, tokens = draw(9, vocab), torch.arange(9, dtype=torch.int32) % vocab
        logits[3:6] = logits[3:6].round()
        logits[5, 1::2] = -torch.inf
        tokens[8] = -1
        found = kernels.sampling.top_logprobs(logits[:, : vocab - vocab // 3], tokens.clamp(max=vocab // 2), count)
        wanted = reference.top_logprobs(logits[:, : vocab - vocab // 3], tokens.clamp(max=vocab // 2), count)
        for part, expected in zip(found, wanted, strict=True):
            assert part.dtype == expected.dtype
            torch.testing.assert_close(part, expected, rtol=1e-6, atol=2e-6)
        assert torch.equal(found.ids_rk, wanted.ids_rk)
        packed = kernels.sampling.packed_logprobs(logits[:, : vocab - vocab // 3], tokens.clamp(max=vocab // 2), count)
        assert torch.equal(packed, found.packed(tokens.clamp(max=vocab // 2)))


@pytest.mark.parametrize("vocab", [1, 16, 33, 300])
@pytest.mark.parametrize("count", [1, 7, 40, 64])
def test_the_greatest_numbers_among_many_equals(vocab: int, count: int, kernels: native.Kernels) -> None:
    x = torch.randint(-3, 4, (5, vocab), generator=torch.Generator().manual_seed(vocab)).float()
    x[0] = torch.where(x[0] > 0, x[0] * 0, -torch.inf)
    x[1, ::2] *= -0.0
    for found, wanted in zip(kernels.sampling.largest(x, count), reference.largest(x, count), strict=True):
        assert found.dtype == wanted.dtype
        assert torch.equal(found, wanted)


def test_searches_go_on_alike(kernels: native.Kernels) -> None:
    rng = random.Random(0)
    for _ in range(60):
        searches, begun = [], rng.random() < 0.8
        rows = chosen = 0
        for slot in rng.sample(range(8), rng.randint(1, 5)):
            width, ends = rng.randint(1, 6), tuple(rng.sample(range(40), rng.randint(0, 3)))
            own = width if begun else 1
            keep = (1 + max(1, len(ends))) * width
            searches.append(ops.Search(slot, rows, own, width, keep, chosen, rng.choice([0.0, 0.7]), ends))
            rows, chosen = rows + own, chosen + width + rng.randint(0, 2)
        columns = max(search.keep for search in searches)
        values, ids = ops.largest((draw(rows, 40) + rng.random()).log_softmax(-1).round(decimals=1), columns)
        state = draw(8, 6).double()
        orders = torch.stack([torch.randperm(6) for _ in range(8)]).int()
        for search in searches:
            orders[search.slot, : search.width] = torch.randperm(search.width).int()
        found, wanted = (
            choose(
                ops.BeamStates(state.clone(), orders.clone()),
                ops.BeamSearches.of(searches, torch.device("cpu")),
                values,
                ids,
                vocab=38,
                chosen=chosen,
            )
            for choose in (_chosen_by(kernels.beams.choose_beams), _chosen_by(beams.choose_beams))
        )
        for search, place in zip(searches, range(len(searches)), strict=True):
            seats = slice(search.first_chosen, search.first_chosen + search.width)
            best = (place, slice(min(search.keep, search.rows * min(search.keep, columns))))
            own_state = (search.slot, slice(search.width))
            places: list[Any] = [(slice(None), seats), seats, best, best, best, own_state, own_state]
            for part, expected, at in zip(found, wanted, places, strict=True):
                assert torch.equal(part[at], expected[at])


@pytest.mark.parametrize("width", [2, 15, 16, 100, 1027])
def test_log_probabilities_of_all_tokens(width: int, kernels: native.Kernels) -> None:
    x = draw(5, width + 3, scale=9.0)[:, :width]
    x[1, 0] = float("-inf")
    expected = x.double().log_softmax(-1).float()
    torch.testing.assert_close(kernels.sampling.log_softmax(x), expected, rtol=1e-6, atol=1e-6)


def test_counts_follow_beams(kernels: native.Kernels) -> None:
    counts = ops.TokenCounts.empty(9, 40, torch.device("cpu"))
    for slot in range(9):
        counts.load([slot], [(np.arange(slot), np.arange(3 * slot) % 11 + 5)])
    # two searches of 3 and 2 beams, a sequence between them, and a search without penalties
    slots, firsts = np.array([4, 0, 7, 3, 8, 2, -1, -1]), [0, 0, 0, -1, 4, 4, 6, 6]
    followed = ops.FollowedCounts.of(slots, firsts, torch.device("cpu"))
    assert followed is not None
    parents = torch.tensor([2, 1, 2, 99, 0, 0, 1, 0], dtype=torch.int32)
    expected = ops.TokenCounts(counts.ids_sw.clone(), counts.counts_sw.clone(), counts.sizes_s.clone())
    expected.follow(followed, parents)
    kernels.edits.follow_counts(counts, followed, parents)
    assert counts.sizes_s.tolist() == expected.sizes_s.tolist()
    assert counts.sizes_s[4] == counts.sizes_s[7] != counts.sizes_s[0]
    for slot, size in enumerate(counts.sizes_s.tolist()):
        assert torch.equal(counts.ids_sw[slot, :size], expected.ids_sw[slot, :size])
        assert torch.equal(counts.counts_sw[slot, :size], expected.counts_sw[slot, :size])
    assert ops.FollowedCounts.of(slots[6:], firsts[:2], torch.device("cpu")) is None


def test_blocks_follow_beams(kernels: native.Kernels) -> None:
    rows, columns = 8, 5
    for tail in (0, 3):
        shapes = [(40, 4, 6), (40, 4, 6), (40, 4, 5), (40, 16)]
        caches = ops.BlockCaches.of([draw(*shape) for shape in shapes])
        others = ops.BlockCaches.of([each.clone() for each in caches.tensors])
        tables = torch.arange(40, dtype=torch.int32).view(rows, columns)
        expected, kept = tables.clone(), torch.tensor([0, 3, 3], dtype=torch.int32)
        pairs = [(1, 0, 0, 2), (2, 0, -2, 3), (3, 0, 3, 2), (5, 4, -1, 4), (7, 4, 2, 0)]
        moves = ops.BeamMoves.of(((*each, tail) for each in pairs), torch.device("cpu"))
        kernels.beams.move_beams(caches, tables, moves, kept)
        beams.move_beams(others, expected, moves, kept)
        assert torch.equal(tables, expected)
        assert tables[1, :3].tolist() == [0, 1, 7]
        for found, wanted in zip(caches.tensors, others.tensors, strict=True):
            assert torch.equal(found, wanted)


def _chosen_by(choose: Callable[..., ops.BeamChoice]) -> Callable[..., list[Tensor]]:
    """A function that gives what was chosen and the states afterwards."""

    def run(
        states: ops.BeamStates, searches: ops.BeamSearches, values: Tensor, ids: Tensor, *, vocab: int, chosen: int
    ) -> list[Tensor]:
        choice = choose(states, searches, values, ids, torch.zeros(2, chosen, dtype=torch.int32), vocab)
        return [*choice, states.logprobs_sw, states.order_sw]

    return run


def test_a_recording_computes_the_same_of_other_inputs() -> None:
    up, down = ops.pack_linear(draw(96, 32)), ops.pack_linear(draw(32, 96))
    weight, x = draw(32), draw(3, 32)

    def compute(x: Tensor) -> Tensor:
        for _ in range(3):
            normed, residual = ops.norm(x, weight, None, 1e-5, rms=True)
            x = ops.add_linear(ops.linear(normed, up, activation="silu"), down, None, residual)  # type: ignore[assignment]
        return x

    with ops.recorded() as recording:
        found = compute(x)
    assert recording.is_whole
    for seed in range(3):
        x.copy_(draw(3, 32) + seed)
        expected = compute(x)
        recording.run()
        assert torch.equal(found, expected)


def test_a_recorded_draw_runs_on_any_number_of_threads_and_in_memory_of_its_own() -> None:
    def draws(rows: int) -> ops.Draws:
        even, points = [1.0] * rows, torch.linspace(0.01, 0.99, rows).tolist()
        device = torch.device("cpu")
        return ops.Draws.of(
            temperature=even, top_k=[40] * rows, top_p=[0.9] * rows, min_p=[0.0] * rows, point=points, device=device
        )

    logits, own = draw(24, 300, scale=3.0), draws(24)
    before = torch.get_num_threads()
    expected = ops.draw(logits, own)
    try:
        torch.set_num_threads(1)
        with ops.recorded() as recording:
            found = ops.draw(logits, own)
        assert recording.is_whole
        ops.draw(draw(2, 70_000), draws(2))  # in more memory than there has been before
        for threads in (1, 2, 4, 32):
            torch.set_num_threads(threads)
            found.fill_(-1)
            recording.run()
            assert torch.equal(found, expected)
    finally:
        torch.set_num_threads(before)


def test_what_torch_computes_is_no_whole_recording() -> None:
    x = draw(3, 32)
    with ops.recorded() as recording:
        ops.norm(x.view(3, 32)[:2], draw(32), None, 1e-5)
    assert not recording.is_whole, "torch drew the weights"
    weight = draw(32)
    with ops.recorded() as recording:
        ops.norm(x.view(3, 32)[:2], weight, None, 1e-5)
    assert recording.is_whole
    with ops.recorded() as recording:
        ops.norm(x.mul_(2), weight, None, 1e-5)
    assert not recording.is_whole


WITHOUT_NUMBA = """
import sys, torch
from hasten import ops
with ops.recorded() as recording:
    torch.ones(1)
print(recording.is_whole, "numba" in sys.modules, "torch._dynamo" in sys.modules)
"""


@pytest.mark.any_python
def test_later_starts_import_no_compiler(kernels: native.Kernels) -> None:
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_NUMBA], capture_output=True, text=True, check=True, timeout=LIMIT_S
    )
    assert done.stdout.split() == ["False"] * 3


TWO_KERNELS = """
import importlib, logging, pkgutil
from hasten.ops.native import code, compiled
for module in pkgutil.iter_modules(code.__path__):
    importlib.import_module(f"{{code.__name__}}.{{module.name}}")
from hasten.ops.native.code.functions import KERNELS, TEAMS
for name in list(KERNELS["fp32"])[2:]:
    del KERNELS["fp32"][name]
TEAMS.clear()
logging.basicConfig(format="%(message)s", filename={log!r}, level="INFO")
for _ in range(2):
    compiled.prepare("fp32", show_progress={show})
print(*compiled._code["fp32"])
"""


@pytest.mark.any_python
def test_a_terminal_shows_that_kernels_are_compiled(tmp_path: Path) -> None:
    environment = {"XDG_CACHE_HOME": str(tmp_path)}
    log = tmp_path / "log"
    for again in (False, True):
        names, shown = on_a_terminal(TWO_KERNELS.format(log=str(log), show=True), **environment)
        assert len(names.split()) == 2
        assert ("Compiling kernels, once for this processor" in shown) == (not again)
        lines = log.read_text().splitlines()
        assert lines[0].startswith("compiling kernels for this processor")
        assert re.fullmatch(r"compiled kernels in \d+\.\d s", lines[1])
        assert len(lines) == 2, "the second start reads them"
    environment["XDG_CACHE_HOME"] = str(tmp_path / "other")
    assert on_a_terminal(TWO_KERNELS.format(log=str(log), show=False), **environment)[1] == ""


def test_of_processes_that_start_at_once_a_single_one_compiles(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = compiled.own_folder("fp32")
    assert folder is not None
    compiles, waits = threading.Event(), threading.Event()
    calls: list[None] = []

    def compile_slowly(kind: str, show_progress: bool) -> dict[str, bytes]:
        calls.append(None)
        compiles.set()
        assert waits.wait(LIMIT_S)
        return {"norm": b"code"}

    def wait(seconds: float) -> None:
        waits.set()
        threading.Event().wait(seconds)

    monkeypatch.setattr(compiled, "_compiled", compile_slowly)
    monkeypatch.setattr("hasten.ops.native.compiled.time.sleep", wait)
    with ThreadPoolExecutor(2) as pool:  # a lock of a file is of whoever opened it, thread or process
        first = pool.submit(compiled._kept, folder, "fp32", False)
        assert compiles.wait(LIMIT_S)
        second = pool.submit(compiled._kept, folder, "fp32", False)
        assert first.result() == second.result() == {"norm": b"code"}
    assert len(calls) == 1


def test_a_lock_that_another_process_keeps_is_waited_for_no_longer_than_compiling_takes(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(compiled, "_LONGEST_TURN_S", 0.0)
    monkeypatch.setattr(compiled, "_compiled", lambda kind, show_progress: {"norm": b"code"})
    with compiled._turn(tmp_path):
        assert compiled._kept(tmp_path / "kernels", "fp32", False) == {"norm": b"code"}
    assert compiled._read(tmp_path / "kernels") == {"norm": b"code"}
    assert compiled._kept(tmp_path / "not there" / "kernels", "fp32", False) == {"norm": b"code"}


def test_code_that_others_could_change_is_not_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = compiled.own_folder("fp32")
    assert folder is not None
    assert compiled._read(folder) is None
    compiled._write(folder, {"norm": b"first"})
    with pytest.raises(OSError):
        compiled._write(folder, {"norm": b"second"})
    assert compiled._read(folder) == {"norm": b"first"}
    assert [each.name for each in folder.parent.iterdir()] == [folder.name]
    folder.parent.chmod(0o777)
    assert compiled.own_folder("fp32") is None
