"""Shapes: t tokens of the flat batch, n heads, m key/value heads, d head size, q and k tokens of one sequence."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from hasten import ops
from hasten.layers.position import alibi_slopes
from hasten.ops import reference
from hasten.ops.cache_scales import octets, stored
from hasten.ops.cpu import query_groups

Close = Callable[[str, Tensor, Tensor], None]
Lengths = list[tuple[int, int]]
"""(new tokens, tokens that attention sees, these included) of each sequence."""

BATCHES: dict[str, Lengths] = {
    "one token": [(1, 1)],
    "one decode": [(1, 37)],
    "one prompt": [(23, 23)],
    "prompts around a block border": [(n, n) for n in (15, 16, 17, 31, 32, 33)],
    "decodes around a block border": [(1, n) for n in (1, 15, 16, 17, 32, 33)],
    "decodes of equal length": [(1, 48)] * 5,
    "prompts of equal length": [(20, 20)] * 3,
    "chunks that begin and end inside a block": [(5, 13), (16, 40), (3, 48), (2, 1025)],
    "prompt, chunk, decodes": [(40, 40), (64, 200), (1, 33), (1, 1), (17, 17), (1, 200)],
    "decodes before and between prompts": [(1, 90), (30, 30), (1, 12), (2, 60), (1, 13)],
    "very uneven": [(1, 1), (1, 1500), (200, 200), (2, 2), (1, 3), (3, 900), (100, 1000)],
    "very uneven decodes": [(1, n) for n in (1, 2000, 3, 700, 5, 1999, 2, 64)],
    "prompts that grow": [(n, n) for n in (1, 2, 4, 8, 16, 32, 64, 128)],
    "a decode at two thousand keys": [(1, 2048)],
    "a sequence with nothing to compute": [(3, 9), (0, 20), (1, 5)],
}
RUN = query_groups._QUERY_CHUNK
LONG_BATCHES: dict[str, Lengths] = {
    "around the length of a query run": [(n, n) for n in (RUN - 1, RUN, RUN + 1)],
    "two query runs and one more": [(2 * RUN + 1, 2 * RUN + 1), (1, 7)],
    "a chunk of two runs far into its sequence": [(RUN + 44, 1100), (9, 9)],
    "a prompt of two thousand tokens": [(2048, 2048)],
}


@dataclass(frozen=True)
class Heads:
    query: int = 12
    kv: int = 12
    size: int = 24
    block: int = 16

    def __str__(self) -> str:
        return f"{self.query} heads of {self.size} on {self.kv}, blocks of {self.block}"


SHAPES = [
    Heads(),
    Heads(query=6, kv=6, size=64),
    Heads(query=1, kv=1, size=128),
    Heads(query=1, kv=1, size=8, block=1),
    Heads(query=4, kv=4, size=64, block=5),
    Heads(query=8, kv=2, size=24),
    Heads(query=6, kv=3, size=8, block=5),
    Heads(query=12, kv=1, size=8, block=1),
]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
GARBAGE = {torch.float32: 1e30, torch.float16: 6e4, torch.bfloat16: 1e30}
"""What cache slots hold that belong to nobody: finite, and absurd enough to show in any result that it reaches."""


@dataclass(frozen=True)
class Limits:
    """Of what a token sees, and of scores."""

    window: int | None = None
    softcap: float | None = None
    sinks: float | None = None
    """Mean of the heads' sinks."""
    causal: bool = True
    farthest: int | None = None
    """Distance from which on all have the same bias; None: there are no biases by distance."""

    def sinks_n(self, heads: int) -> Tensor | None:
        return None if self.sinks is None else torch.linspace(self.sinks - 2, self.sinks + 2, heads)

    def bias_nr(self, heads: int) -> Tensor | None:
        if self.farthest is None:
            return None
        return torch.randn(heads, 2 * self.farthest + 1, generator=torch.Generator().manual_seed(5))


@dataclass
class Case:
    """A batch, the cache that it is in, and the attention that it should get."""

    query_tnd: Tensor
    key_cache: Tensor
    value_cache: Tensor
    meta: ops.AttentionMeta
    scale: float
    slopes_n: Tensor | None
    expected_tnd: Tensor
    """fp64."""
    limits: Limits
    scales: ops.CacheScales | None = None
    """Those of caches of 8 bits."""

    def run(self, op: Callable[..., Tensor] = ops.paged_attention) -> Tensor:
        self.meta.scratch.clear()
        inputs = (self.query_tnd, self.key_cache, self.value_cache, self.meta, self.scale, self.slopes_n)
        heads = self.query_tnd.shape[1]
        limits = {"window": self.limits.window, "softcap": self.limits.softcap, "causal": self.limits.causal}
        more = {"bias_nr": self.limits.bias_nr(heads), "sinks_n": self.limits.sinks_n(heads), "scales": self.scales}
        return op(*inputs, **limits, **more)

    @property
    def plan(self) -> list[tuple[tuple[int, int, int], Tensor | None]]:
        """Runs, queries and keys of each attention call of the last `run`, with the bias that it kept."""
        return [(group.size, bias) for group, bias in self.meta.scratch["attention"]]


def attend(
    query_qnd: Tensor,
    key_kmd: Tensor,
    value_kmd: Tensor,
    scale: float,
    slopes_n: Tensor | None,
    limits: Limits,
) -> Tensor:
    """Attention of one sequence head by head and query by query, in fp64."""
    queries, heads, _ = query_qnd.shape
    keys, kv_heads, _ = key_kmd.shape
    out_qnd, sinks_n = torch.zeros(query_qnd.shape, dtype=torch.float64), limits.sinks_n(heads)
    for head in range(heads):
        kv_head = head * kv_heads // heads
        key_kd, value_kd = key_kmd[:, kv_head].double(), value_kmd[:, kv_head].double()
        scores_qk = query_qnd[:, head].double() @ key_kd.T * scale
        bias_nr = limits.bias_nr(heads)
        for row in range(queries):
            position = keys - queries + row
            first = 0 if limits.window is None else max(0, position + 1 - limits.window)
            last = position if limits.causal else min(keys - 1, position + (limits.window or keys) - 1)
            scores_k = scores_qk[row, first : last + 1]
            distance_k = torch.arange(first, last + 1, dtype=torch.float64) - position
            if limits.softcap is not None:
                scores_k = limits.softcap * torch.tanh(scores_k / limits.softcap)
            if slopes_n is not None:
                scores_k = scores_k + float(slopes_n[head]) * distance_k
            if bias_nr is not None and limits.farthest is not None:
                indices = distance_k.clamp(-limits.farthest, limits.farthest).long() + limits.farthest
                scores_k = scores_k + bias_nr[head, indices].double()
            weights_k = scores_k.exp()
            total = weights_k.sum() if sinks_n is None else weights_k.sum() + sinks_n[head].double().exp()
            out_qnd[row, head] = weights_k / total @ value_kd[first : last + 1]
    return out_qnd


def make_meta(lengths: Lengths, block_size: int, block_tables: Tensor) -> ops.AttentionMeta:
    counts, kv_lens = [q for q, _ in lengths], [k for _, k in lengths]
    slots = [
        int(table[position // block_size]) * block_size + position % block_size
        for table, (count, kv_len) in zip(block_tables, lengths, strict=True)
        for position in range(kv_len - count, kv_len)
    ]
    return ops.AttentionMeta(
        num_tokens=sum(counts),
        block_tables=block_tables,
        slot_mapping=torch.tensor(slots, dtype=torch.int64),
        sequences=list(range(len(lengths))),
        query_lens=counts,
        kv_lens=kv_lens,
    )


def make_case(
    lengths: Lengths,
    heads: Heads,
    dtype: torch.dtype = torch.float32,
    *,
    alibi: bool = True,
    seed: int = 0,
    limits: Limits = Limits(),
    cache: torch.dtype | None = None,
) -> Case:
    """Sequences in blocks in random order, with garbage in every slot that no token of theirs is in.

    `cache`: a type of 8 bits of the caches; None: that of the queries.
    """
    generator = torch.Generator().manual_seed(seed)
    blocks_of = [math.ceil(k / heads.block) for _, k in lengths]
    total, width = sum(blocks_of) + 3, max(blocks_of) + 1
    order = torch.randperm(total, generator=generator).int()
    # behind a sequence's end its table names blocks of others, or of nobody
    tables = torch.randint(total, (len(lengths), width), generator=generator, dtype=torch.int32)
    caches = torch.full((2, total, heads.block, heads.kv, heads.size), GARBAGE[dtype], dtype=dtype)
    caches[..., ::2] *= -1
    scales = None
    if cache is not None:
        scales = ops.CacheScales.of(2.0 + torch.arange(2.0 * heads.kv).view(2, heads.kv), cache)
        caches = torch.full(caches.shape, 127, dtype=torch.int8).view(cache)  # NaN in fp8
    slopes_n = alibi_slopes(heads.query) if alibi else None
    scale = heads.size**-0.5
    queries, outputs = [], []
    for row, (count, kv_len) in enumerate(lengths):
        own, order = order[: blocks_of[row]], order[blocks_of[row] :]
        tables[row, : len(own)] = own
        new = torch.randn(2, kv_len, heads.kv, heads.size, generator=generator).to(dtype)
        slots = own.long().repeat_interleave(heads.block)[:kv_len] * heads.block + torch.arange(kv_len) % heads.block
        if scales is not None:
            parts = zip(new, scales.inverses_2m, strict=True)
            held = torch.stack([stored(part, inverses, caches.dtype) for part, inverses in parts])
            octets(caches).flatten(1, 2)[:, slots] = octets(held)
            new = held.double() * scales.scales_2m.view(2, 1, -1, 1)
        else:
            caches.flatten(1, 2)[:, slots] = new
        # as wide again as the queries, so that they are a view of something larger, as they are of the fused QKV
        query_qnd = torch.randn(count, 2 * heads.query, heads.size, generator=generator).to(dtype)
        queries.append(query_qnd)
        outputs.append(attend(query_qnd[:, : heads.query], new[0], new[1], scale, slopes_n, limits))
    return Case(
        query_tnd=torch.cat(queries)[:, : heads.query],
        key_cache=caches[0],
        value_cache=caches[1],
        meta=make_meta(lengths, heads.block, tables),
        scale=scale,
        slopes_n=slopes_n,
        expected_tnd=torch.cat(outputs),
        limits=limits,
        scales=scales,
    )


def check(case: Case, assert_close: Close) -> None:
    found = case.run()
    assert found.dtype == case.query_tnd.dtype
    assert_close("attention", found, case.expected_tnd)
    assert_close("attention", case.run(reference.paged_attention), case.expected_tnd)


@pytest.mark.parametrize("alibi", [True, False], ids=["alibi", "no slopes"])
@pytest.mark.parametrize("lengths", BATCHES.values(), ids=list(BATCHES))
def test_every_batch(lengths: Lengths, alibi: bool, assert_close: Close) -> None:
    check(make_case(lengths, Heads(query=3, kv=3), alibi=alibi), assert_close)


@pytest.mark.parametrize("lengths", LONG_BATCHES.values(), ids=list(LONG_BATCHES))
def test_prompts_longer_than_a_query_run(lengths: Lengths, assert_close: Close) -> None:
    check(make_case(lengths, Heads(query=2, kv=2, size=8)), assert_close)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("alibi", [True, False], ids=["alibi", "no slopes"])
@pytest.mark.parametrize("heads", SHAPES, ids=str)
def test_every_shape(heads: Heads, alibi: bool, dtype: torch.dtype, assert_close: Close) -> None:
    for name in ("one token", "prompt, chunk, decodes", "decodes around a block border"):
        check(make_case(BATCHES[name], heads, dtype, alibi=alibi), assert_close)


@pytest.mark.parametrize("alibi", [True, False], ids=["alibi", "no slopes"])
@pytest.mark.parametrize(
    "limits",
    [
        *(Limits(window=w) for w in (1, 2, 15, 16, 17, 33, 5000)),
        Limits(softcap=0.5),
        Limits(16, 2.0),
        Limits(sinks=0.0),
        Limits(sinks=60.0),
        Limits(16, 2.0, -3.0),
    ],
    ids=str,
)
def test_windows_capped_scores_and_sinks(limits: Limits, alibi: bool, assert_close: Close) -> None:
    for name in ("prompt, chunk, decodes", "decodes around a block border", "very uneven"):
        check(make_case(BATCHES[name], Heads(query=4, kv=2, size=8), alibi=alibi, limits=limits), assert_close)


@pytest.mark.parametrize(
    "limits",
    [
        Limits(causal=False),
        *(Limits(causal=False, window=w) for w in (1, 2, 16, 17, 33, 5000)),
        Limits(causal=False, farthest=7),
        Limits(causal=False, farthest=300, softcap=2.0),
        Limits(farthest=7),
    ],
    ids=str,
)
def test_keys_behind_the_query_and_biases_by_distance(limits: Limits, assert_close: Close) -> None:
    for name in ("prompts that grow", "prompts around a block border", "prompts of equal length", "very uneven"):
        check(make_case(BATCHES[name], Heads(query=4, kv=2, size=8), alibi=False, limits=limits), assert_close)
    check(make_case([(2 * RUN + 3, 2 * RUN + 3)], Heads(2, 2, 8), alibi=False, limits=limits), assert_close)


@pytest.mark.parametrize("cache", ops.CACHE_DTYPES.values(), ids=list(ops.CACHE_DTYPES))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("heads", [Heads(query=3, kv=3), Heads(query=6, kv=3, size=8, block=5)], ids=str)
@pytest.mark.parametrize("limits", [Limits(), Limits(16, 2.0, -3.0)], ids=str)
def test_caches_in_8_bits(
    limits: Limits, heads: Heads, dtype: torch.dtype, cache: torch.dtype, assert_close: Close
) -> None:
    for name in ("prompt, chunk, decodes", "decodes around a block border"):
        check(make_case(BATCHES[name], heads, dtype, limits=limits, cache=cache), assert_close)


def test_texts_of_equal_length_need_no_bias() -> None:
    for lengths, none in (([(20, 20)] * 3, True), ([(20, 20), (21, 21)], False)):
        case = make_case(lengths, Heads(3, 3), alibi=False, limits=Limits(causal=False))
        case.run()
        assert [bias is None for _, bias in case.plan] == [none]


def test_a_long_prompt_in_a_window_skips_what_lies_before_it(assert_close: Close) -> None:
    case = make_case([(2 * RUN, 900)], Heads(query=2, kv=1, size=8), limits=Limits(window=40))
    check(case, assert_close)
    case.run()
    plan = case.meta.scratch["attention, window 40"]
    assert max(group.size[2] for group, _ in plan) <= RUN + 40 + 2 * 16


def test_layers_with_different_windows_have_plans_of_their_own(assert_close: Close) -> None:
    heads, lengths = Heads(query=2, kv=2, size=8), BATCHES["prompt, chunk, decodes"]
    first = make_case(lengths, heads)
    for window in (None, 20, None, 3):
        case = make_case(lengths, heads, limits=Limits(window=window))
        found = ops.paged_attention(
            case.query_tnd, case.key_cache, case.value_cache, first.meta, case.scale, case.slopes_n, window=window
        )
        assert_close("attention", found, case.expected_tnd)


@pytest.mark.parametrize("alibi", [True, False], ids=["alibi", "no slopes"])
@pytest.mark.parametrize("name", ["prompt, chunk, decodes", "very uneven", "one prompt"])
def test_a_bias_too_large_to_keep_is_made_anew_with_the_same_result(
    name: str, alibi: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = make_case(BATCHES[name], Heads(query=3, kv=3), alibi=alibi)
    kept = case.run()
    monkeypatch.setattr(query_groups, "_KEPT_BIAS", 0)
    assert torch.equal(case.run(), kept)


def test_the_limit_of_kept_bias_counts_what_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    for alibi, planes in ((True, 3), (False, 1)):
        case = make_case([(16, 32)], Heads(query=3, kv=3), alibi=alibi)
        for limit, keeps in ((planes * 16 * 32, True), (planes * 16 * 32 - 1, False)):
            monkeypatch.setattr(query_groups, "_KEPT_BIAS", limit)
            case.run()
            assert [None if bias is None else bias.numel() for _, bias in case.plan] == [limit if keeps else None]


@pytest.mark.parametrize("elements", [0, 1 << 10, 1 << 60])
def test_however_much_one_call_may_gather(elements: int, monkeypatch: pytest.MonkeyPatch, assert_close: Close) -> None:
    monkeypatch.setattr(query_groups, "_CACHED_ELEMENTS", elements)
    for name in ("decodes around a block border", "decodes of equal length", "prompt, chunk, decodes"):
        check(make_case(BATCHES[name], Heads(query=3, kv=3)), assert_close)


@pytest.mark.parametrize("kept", [True, False], ids=["bias kept", "bias rebuilt"])
def test_later_layers_use_the_plan_of_the_first(
    kept: bool, monkeypatch: pytest.MonkeyPatch, assert_close: Close
) -> None:
    if not kept:
        monkeypatch.setattr(query_groups, "_KEPT_BIAS", 0)
    heads, lengths = Heads(query=3, kv=3), BATCHES["prompt, chunk, decodes"]
    layers = [make_case(lengths, heads, seed=0) for _ in range(3)]
    for number, layer in enumerate(layers):
        # other values in the same places: the blocks of a sequence have the same numbers in every layer
        layer.query_tnd = layer.query_tnd * (number + 1)
        layer.scale /= number + 1
        found = ops.paged_attention(
            layer.query_tnd, layer.key_cache, layer.value_cache, layers[0].meta, layer.scale, layer.slopes_n
        )
        assert_close("attention", found, layer.expected_tnd)
    assert list(layers[0].meta.scratch) == ["attention"]


@pytest.mark.parametrize("op", [ops.paged_attention, reference.paged_attention], ids=["cpu", "reference"])
@pytest.mark.parametrize(
    "needed",
    [[0, 0, 1, 1, 0, 1], [1, 1, 1, 1, 1, 1], [40, 0, 0, 0, 3, 0], [0, 64, 1, 0, 0, 0], [0] * 6],
    ids=["decodes alone", "last of each", "a prompt and a tail", "a chunk", "none"],
)
def test_a_part_of_a_batch_gets_what_it_gets_in_the_whole(
    needed: list[int], op: Callable[..., Tensor], assert_close: Close
) -> None:
    lengths = BATCHES["prompt, chunk, decodes"]
    case = make_case(lengths, Heads(query=3, kv=3))
    chosen = [index for index, count in enumerate(needed) if count]
    ends = torch.tensor(case.meta.query_lens).cumsum(0)
    rows = torch.cat([torch.arange(int(end) - count, int(end)) for end, count in zip(ends, needed, strict=True)])
    part = replace(
        case.meta,
        num_tokens=len(rows),
        sequences=chosen,
        query_lens=[needed[s] for s in chosen],
        kv_lens=[lengths[s][1] for s in chosen],
        output_indices=rows,
        scratch={},
    )
    found = op(case.query_tnd, case.key_cache, case.value_cache, part, case.scale, case.slopes_n)
    assert_close("attention", found, case.expected_tnd[rows])


@pytest.mark.parametrize("op", [ops.paged_attention, reference.paged_attention], ids=["cpu", "reference"])
@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize(
    "lengths", [[(3, 0)], [(1, 40), (1, 0)], [(20, 30), (1, 0), (7, 0), (1, 9)]], ids=["alone", "single", "between"]
)
def test_tokens_without_keys_get_zeros(
    lengths: Lengths, window: int | None, op: Callable[..., Tensor], assert_close: Close
) -> None:
    case = make_case([(q, k or q) for q, k in lengths], Heads(query=3, kv=3), limits=Limits(window=window))
    meta = replace(case.meta, kv_lens=[k for _, k in lengths], scratch={})
    found = op(case.query_tnd, case.key_cache, case.value_cache, meta, case.scale, case.slopes_n, window=window)
    none = torch.tensor([k == 0 for _, k in lengths]).repeat_interleave(torch.tensor([q for q, _ in lengths]))
    assert not found[none].any()
    assert_close("attention", found[~none], case.expected_tnd[~none])


@pytest.mark.parametrize("op", [ops.paged_attention, reference.paged_attention], ids=["cpu", "reference"])
def test_nothing_is_changed_but_the_output(op: Callable[..., Tensor]) -> None:
    case = make_case(BATCHES["prompt, chunk, decodes"], Heads(query=3, kv=3))
    inputs = [case.query_tnd, case.key_cache, case.value_cache, case.meta.block_tables, case.slopes_n]
    before = [tensor.clone() for tensor in inputs if tensor is not None]
    case.run(op)
    assert all(torch.equal(a, b) for a, b in zip(inputs, before, strict=True) if a is not None)


@pytest.mark.parametrize("lengths", BATCHES.values(), ids=list(BATCHES))
def test_padding_costs_at_most_half_as_much_again(lengths: Lengths) -> None:
    case = make_case(lengths, Heads(query=1, kv=1, size=8, block=1))
    case.run()
    work = sum(queries * keys for queries, keys in lengths)
    assert sum(math.prod(size) for size, _ in case.plan) <= 1.5 * work
