"""Shapes: t tokens of the flat batch, n query heads, m key/value heads, d head size.

Batches are made as the engine makes them, by `Inputs`, with the work divided as for a GPU.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from hasten.core.types import Request, SamplingParams
from hasten.engine.batch import Batch
from hasten.engine.graphs import Size
from hasten.engine.inputs import BlockTables, Inputs
from hasten.engine.sequence import Sequence
from hasten.engine.step_message import StepMessage, TableRows
from hasten.engine.text_scheduler import TextSequence
from hasten.layers.position import alibi_slopes
from hasten.ops import CACHE_DTYPES, AttentionMeta, CacheScales, reference
from hasten.ops.gpu import attention, long_attention, pair_attention
from hasten.ops.gpu.splits import one_query, query_group
from hasten.ops.plan import MIN_SPLIT_LEN, AttentionPlan, Planner

# tests/bench/test_kernels.py runs every kernel on every Python
Close = Callable[[str, Tensor, Tensor], None]
Lengths = list[tuple[int, int]]
"""(new tokens, tokens that attention sees, these included) of each sequence."""

HAS_GPU = torch.cuda.is_available()
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
NAN = float("nan")
WHOLE, CUT = 0, 1000
"""Most splits beside one a sequence: none is cut, or all are cut as small as they may be."""

DECODES: dict[str, Lengths] = {
    "one token": [(1, 1)],
    "around one block": [(1, n) for n in (15, 16, 17)],
    "around two blocks": [(1, n) for n in (31, 32, 33)],
    "around a run": [(1, n) for n in (64, 65, 97)],
    "very uneven": [(1, n) for n in (1, 300, 3, 129, 2)],
}
PROMPTS: dict[str, Lengths] = {
    "two tokens": [(2, 2)],
    "around one block": [(n, n) for n in (15, 16, 17)],
    "around a tile": [(63, 63), (64, 64), (65, 65)],
    "several tiles": [(200, 200)],
    "chunks and what is before them": [(5, 13), (16, 40), (2, 201), (70, 133)],
}
MIXTURES: dict[str, Lengths] = {
    "prompt, chunk, decodes": [(20, 20), (70, 150), (1, 33), (1, 1), (17, 17), (1, 140)],
    "decodes before and between prompts": [(1, 90), (30, 30), (1, 12), (2, 60), (1, 13)],
}


@dataclass(frozen=True)
class Heads:
    query: int = 2
    kv: int = 2
    size: int = 16
    block: int = 16

    def __str__(self) -> str:
        return f"{self.query} heads of {self.size} on {self.kv}, blocks of {self.block}"


SHAPES = [
    Heads(query=8, kv=2),
    Heads(query=3, kv=1, size=24, block=8),
    Heads(query=1, kv=1, size=80, block=12),
    Heads(query=1, kv=1, size=96, block=32),
    Heads(query=2, kv=1, size=64, block=1),
    Heads(query=1, kv=1, size=128, block=48),
]
GROUPS = [
    Heads(query=5, kv=1, block=5),
    Heads(query=24, kv=2, size=24, block=32),
    Heads(query=17, kv=1, size=40),
    Heads(query=71, kv=1, block=64),
]
"""Groups of heads with the same keys, in one program or two."""
IN_8_BITS: list[tuple[Heads, dict[str, Any]]] = [
    (Heads(), {}),
    (Heads(query=4, kv=2, size=24, block=8), {"window": 20}),
    (Heads(query=2, kv=1, size=80), {"softcap": 0.7, "alibi": False}),
    (Heads(query=6, kv=2), {"alibi": False, "sinks": 1.0, "window": 33}),
    (Heads(query=2, kv=1), {"fixed_run": 32}),
]
"""Heads and other options of caches in 8 bits."""
REAL: dict[str, tuple[Heads, Lengths]] = {
    "a step of 256": (Heads(32, 32, 128), [(1, 20 + 2 * n) for n in range(256)]),
    "one at 32k": (Heads(32, 32, 128), [(1, 32_768)]),
    "a chunk at 32k and decodes": (Heads(12, 12, 64), [(512, 32_768), *[(1, 1000 * n + 1) for n in range(32)]]),
    "94 prompts of 87": (Heads(32, 32, 128), [(87, 87)] * 94),
    "4 prompts of 2048": (Heads(12, 12, 64), [(2048, 2048)] * 4),
    "grouped heads": (Heads(32, 8, 128), [(1, 900), (500, 1500), (1, 3), (64, 64)]),
    "a step of 256 of grouped heads": (Heads(32, 8, 128), [(1, 20 + 8 * n) for n in range(256)]),
    "one at 32k of grouped heads": (Heads(32, 4, 128), [(1, 32_768)]),
    "a group of 71 heads": (Heads(71, 1, 64), [(1, 90 * n + 1) for n in range(40)]),
    "groups of 12 heads of 80": (Heads(24, 2, 80, block=5), [(1, 90 * n + 1) for n in range(40)]),
    "groups of 4 heads of 256": (Heads(16, 4, 256), [(1, 90 * n + 1) for n in range(40)]),
    "112 heads of 128": (Heads(112, 112, 128), [(1, 300), (90, 90), (1, 2000)]),
    "heads of 80": (Heads(32, 32, 80), [(1, 900), (500, 1500), (1, 3)]),
    "heads of 96": (Heads(16, 16, 96, block=8), [(1, 900), (500, 1500), (1, 3)]),
    "heads of 256": (Heads(8, 8, 256, block=32), [(1, 900), (500, 1500), (1, 3)]),
}


@dataclass(frozen=True)
class FewSplits(Planner):
    """Cuts a step into so many splits more than it has sequences, however few keys a group of heads has."""

    extra: int = 0

    def min_split_len(self, queries: int) -> int:
        return MIN_SPLIT_LEN

    def max_num_splits(self, sequences: int) -> int:
        return sequences + self.extra


@dataclass(frozen=True)
class GathersAll(Planner):
    """Gathers the keys of every sequence with several queries."""

    def is_long(self, query_lens: np.ndarray[Any, Any], kv_lens: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        return np.full(len(query_lens), True)


@dataclass
class Case:
    """A batch in its cache. Whatever belongs to no token of it is NaN."""

    heads: Heads
    dtype: torch.dtype
    device: torch.device
    alibi: bool = True
    seed: int = 0
    window: int | None = None
    softcap: float | None = None
    sinks: float | None = None
    """Mean of the heads' sinks."""
    fixed_run: int | None = None
    causal: bool = True
    farthest: int | None = None
    """Distance from which on all have the same bias; None: there are no biases by distance."""
    gathers: bool = False
    """Whether keys of all prompts are gathered, however short."""
    cache: torch.dtype | None = None
    """Type of 8 bits of the caches; None: that of the queries."""
    scales: CacheScales | None = field(init=False, default=None)
    inputs: Inputs = field(init=False)
    batch: Batch = field(init=False)
    query_tnd: Tensor = field(init=False)
    caches: tuple[Tensor, Tensor] = field(init=False)

    def fill(self, lengths: Lengths, extra_splits: int | None = None) -> "Case":
        """Take sequences of these lengths, in blocks in random order; at most so many splits more than sequences."""
        rng = np.random.default_rng(self.seed)
        block = self.heads.block
        needs = [-(-kv_len // block) for _, kv_len in lengths]
        order = rng.permutation(sum(needs) + 1).tolist()
        tables = BlockTables(len(lengths) + 1, max(needs) + 2)
        tables.array[:] = order.pop()  # behind its end a table names a block of nobody
        heads = (self.heads.query, self.heads.kv)
        planner = Planner.of(self.device, *heads) or Planner(*heads, multiprocessors=0)
        planner = replace(planner, run=self.fixed_run, max_kv_len=max(kv_len for _, kv_len in lengths))
        if self.gathers:
            planner = GathersAll(**vars(planner))
        if extra_splits is not None:
            planner = FewSplits(*heads, planner.multiprocessors, planner.run, planner.max_kv_len, extra=extra_splits)
        self.inputs = Inputs(tables, block, planner, self.device, self.fixed_run, causal=self.causal)
        self.batch = Batch()
        for key, ((count, kv_len), need) in enumerate(zip(lengths, needs, strict=True)):
            self.batch.add(make_sequence(key, kv_len, count, [order.pop() for _ in range(need)]), count, [])
        self._draw(sum(needs) + 1)
        return self

    def _draw(self, blocks: int) -> None:
        heads, device = self.heads, self.device
        random = partial(torch.randn, generator=torch.Generator(device).manual_seed(self.seed), device=device)
        tokens = self.batch.num_tokens
        # A view of something wider, as the queries of a fused projection are.
        wide = torch.full((tokens, heads.query + 1, heads.size), NAN, dtype=self.dtype, device=device)
        wide[:, : heads.query] = random(tokens, heads.query, heads.size)
        self.query_tnd = wide[:, : heads.query]
        caches = torch.full((2, blocks, heads.block, heads.kv, heads.size), NAN, dtype=self.dtype, device=device)
        slots = [
            sequence.block_table[position // heads.block] * heads.block + position % heads.block
            for sequence in self.batch.sequences
            for position in range(sequence.length)
        ]
        indices = torch.tensor(slots, device=device)
        for cache in caches:
            cache.flatten(0, 1).index_copy_(0, indices, random(len(slots), heads.kv, heads.size).to(self.dtype))
        self.caches = caches[0], caches[1]
        if self.cache is not None:
            self.scales = CacheScales.of(1.5 + random(2, heads.kv).abs(), self.cache)
            self.caches = self._in_8_bits(*caches)

    def _in_8_bits(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Whole caches as `scales` say; what belongs to nobody is NaN, or the largest number where there is none."""
        assert self.scales is not None
        assert self.cache is not None
        result = [keys.new_empty(keys.shape, dtype=self.cache) for _ in range(2)]
        slots = torch.arange(keys.shape[0] * keys.shape[1], device=self.device)
        heads = [
            cache.flatten(0, 1).nan_to_num(NAN if self.cache.is_floating_point else 1e4) for cache in (keys, values)
        ]
        reference.write_cache(heads[0], heads[1], result[0], result[1], slots, scales=self.scales)
        return result[0], result[1]

    @property
    def slopes_n(self) -> Tensor | None:
        return alibi_slopes(self.heads.query).to(self.device) if self.alibi else None

    @property
    def options(self) -> dict[str, Any]:
        bias = None
        if self.farthest is not None:
            bias = torch.randn(self.heads.query, 2 * self.farthest + 1, generator=torch.Generator().manual_seed(5))
            bias = bias.to(self.device)
        sinks_n = None
        if self.sinks is not None:
            sinks_n = torch.linspace(self.sinks - 2, self.sinks + 2, self.heads.query, device=self.device)
            sinks_n = sinks_n.to(self.dtype)
        limits = {"window": self.window, "softcap": self.softcap, "causal": self.causal}
        return {**limits, "bias_nr": bias, "sinks_n": sinks_n, "scales": self.scales}

    def run(self, meta: AttentionMeta) -> Tensor:
        inputs = (self.query_tnd, *self.caches, meta, self.heads.size**-0.5, self.slopes_n)
        return attention.paged_attention(*inputs, **self.options)

    def expected(self, meta: AttentionMeta) -> Tensor:
        """The reference on the same values in fp32."""
        query_tnd, keys, values = (tensor.float() for tensor in (self.query_tnd, *self.caches))
        inputs = (query_tnd, keys, values, meta, self.heads.size**-0.5, self.slopes_n)
        return reference.paged_attention(*inputs, **self.options)

    def kind(self, meta: AttentionMeta) -> str:
        """How exact the kernels are: matrix units multiply values by weights in the type of both."""
        assert meta.plan is not None
        several = meta.plan.tiles is not None or meta.plan.long_tiles is not None
        narrow = self.dtype != torch.float32 and self.cache is None and self.heads.size <= 128
        alone = meta.num_tokens == 1 and narrow
        single = not several and self.heads.query == self.heads.kv and self.fixed_run is None and not alone
        return "attention" if single else "tile"

    def check(self, meta: AttentionMeta, assert_close: Close) -> None:
        found = self.run(meta)
        assert found.dtype == self.dtype
        assert_close(self.kind(meta), found, self.expected(meta))
        if "parts" in meta.scratch:
            assert not meta.scratch["parts"][2].any(), "the next layer would not know who finishes last"


def make_sequence(key: int, kv_len: int, count: int, blocks: list[int]) -> Sequence:
    result = Sequence(Request(request_id="r", prompt_token_ids=(0,) * kv_len, params=SamplingParams()), 0)
    result.key, result.block_table, result.num_computed = key, blocks, kv_len - count
    return result


def message(case: Case, needed: list[int]) -> StepMessage:
    """The batch as ranks get it, with hidden states of as many tokens of each sequence asked for."""
    return replace(StepMessage.of(case.batch, TableRows(len(case.inputs.tables.array))), needed=needed)


def whole(case: Case) -> AttentionMeta:
    """The batch with hidden states of all its tokens asked for."""
    return case.inputs.tokens(message(case, case.batch.counts)).meta


def interpreted(dtypes: list[torch.dtype]) -> list[object]:
    """Types of kernels with matrix products: the interpreter's are of the bits in bf16, which numpy does not know."""
    return [pytest.param(d, marks=pytest.mark.gpu) if d == torch.bfloat16 and not HAS_GPU else d for d in dtypes]


def decoded(shapes: list[Heads]) -> list[object]:
    """Shapes with each type that their kernel for single queries can be run in."""
    return [
        pytest.param(heads, *getattr(dtype, "values", [dtype]), marks=getattr(dtype, "marks", ()), id=f"{heads}, {d}")
        for heads in shapes
        for d, dtype in zip(DTYPES, DTYPES if heads.query == heads.kv else interpreted(DTYPES), strict=True)
    ]


@pytest.mark.parametrize("extra_splits", [WHOLE, 3, CUT])
@pytest.mark.parametrize("lengths", DECODES.values(), ids=list(DECODES))
def test_decodes(lengths: Lengths, extra_splits: int, device: torch.device, assert_close: Close) -> None:
    case = Case(Heads(), torch.float16, device).fill(lengths, extra_splits)
    meta = whole(case)
    assert meta.plan is not None
    assert meta.plan.tiles is None
    case.check(meta, assert_close)


@pytest.mark.parametrize("extra_splits", [WHOLE, CUT])
def test_a_decode_at_a_thousand_keys(extra_splits: int, device: torch.device, assert_close: Close) -> None:
    case = Case(Heads(query=1, kv=1), torch.float16, device).fill([(1, 1000)], extra_splits)
    case.check(whole(case), assert_close)


@pytest.mark.parametrize("extra_splits", [WHOLE, CUT])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"alibi": False, "window": 33},
        {"softcap": 0.7},
        {"alibi": False, "sinks": 1.0},
        {"alibi": False, "farthest": 9},
    ],
    ids=str,
)
@pytest.mark.parametrize("heads", [Heads(), Heads(query=1, kv=1, size=80, block=12), Heads(query=2, kv=2, size=128)])
def test_a_single_query_whose_heads_have_keys_of_their_own(
    heads: Heads, options: dict[str, Any], extra_splits: int, device: torch.device, assert_close: Close
) -> None:
    for length in (1, 161):
        case = Case(heads, torch.float16, device, **options).fill([(1, length)], extra_splits)
        case.check(whole(case), assert_close)


def test_heads_of_a_single_query_are_groups_of_one() -> None:
    def kernel(queries: int = 1, width: int = 128, wide: bool = False, narrow: bool = False) -> object:
        return attention._single(1, queries, width, 16, wide, narrow, None)[0]

    assert kernel() is query_group
    others = kernel(queries=2), kernel(width=256), kernel(wide=True), kernel(narrow=True)
    assert all(other is one_query for other in others)


@pytest.mark.parametrize("lengths", PROMPTS.values(), ids=list(PROMPTS))
def test_prompts(lengths: Lengths, device: torch.device, assert_close: Close) -> None:
    case = Case(Heads(query=1, kv=1), torch.float16, device).fill(lengths)
    meta = whole(case)
    assert meta.plan is not None
    assert meta.plan.splits is None
    case.check(meta, assert_close)


TEXTS: dict[str, list[int]] = {
    "one of one token": [1],
    "around a tile": [63, 64, 65, 1, 129],
    "short ones": [3, 1, 2, 7, 16],
    "one of several tiles": [200],
}


@pytest.mark.parametrize("in_cache", [False, True], ids=["in the projection", "in blocks of 4"])
@pytest.mark.parametrize(
    ("heads", "options"),
    [
        (Heads(query=2, kv=2, size=64), {"causal": False}),
        (Heads(query=4, kv=2, size=24), {"causal": False, "window": 20}),
        (Heads(query=2, kv=1), {"causal": False, "farthest": 9}),
        (Heads(query=2, kv=2, size=80), {"causal": True}),
        (Heads(query=4, kv=2), {"causal": True, "window": 33, "softcap": 3.0}),
    ],
    ids=str,
)
@pytest.mark.parametrize("lengths", TEXTS.values(), ids=list(TEXTS))
def test_texts_whose_blocks_follow_each_other(
    lengths: list[int],
    heads: Heads,
    options: dict[str, Any],
    in_cache: bool,
    device: torch.device,
    assert_close: Close,
) -> None:
    """What lies behind a text, another one's or nobody's, is NaN."""
    case = Case(heads, torch.float16, device, alibi=False, **options)
    sizes, block, tokens = (heads.query, heads.kv, heads.kv), 4 if in_cache else 1, sum(lengths)
    wide = torch.full((tokens + 100, sum(sizes), heads.size), NAN, dtype=torch.float16, device=device)
    planner = Planner.of(device, *sizes[:2]) or Planner(*sizes[:2], multiprocessors=0)
    inputs = Inputs(BlockTables(1, 1), block, planner, device, causal=case.causal, consecutive=True)
    ids = [np.zeros(length, dtype=np.int32) for length in lengths]
    texts = [TextSequence(Request(request_id="", prompt_token_ids=(0,)), each, len(each), None) for each in ids]
    batch = Batch(0, list(texts), lengths, lengths, list(range(len(lengths))))
    meta = inputs.tokens(StepMessage.of_texts(batch)).meta
    assert meta.plan is not None
    assert meta.plan.splits is None
    assert meta.block_tables.shape == (len(lengths), 1)
    blocks = [-(-length // block) for length in lengths]
    tables = meta.block_tables + torch.arange(max(blocks), device=device)
    wide[:tokens] = torch.randn(
        tokens, *wide.shape[1:], generator=torch.Generator(device).manual_seed(1), device=device
    )
    case.query_tnd, keys_tmd, values_tmd = wide.split(sizes, dim=1)
    case.caches = keys_tmd.unsqueeze(1), values_tmd.unsqueeze(1)
    if in_cache:
        caches = torch.full((2, sum(blocks) + 25, block, heads.kv, heads.size), NAN, dtype=torch.float16, device=device)
        for cache, given in zip(caches, (keys_tmd, values_tmd), strict=True):
            reference.write_cache(given[:tokens], given[:tokens], cache, cache, meta.slot_mapping)
        case.caches = caches[0], caches[1]
    expected = case.expected(replace(meta, block_tables=tables.clamp(max=case.caches[0].shape[0] - 1)))
    case.query_tnd = case.query_tnd[:tokens]
    found = case.run(meta)
    assert_close("tile", found, expected[:tokens])
    if len(lengths) > 1:  # what of one text is not finite is seen by no other
        for cache in case.caches:
            cache.flatten(0, 1)[int(meta.slot_mapping[lengths[0] - 1])] = NAN
        assert_close("tile", case.run(meta)[lengths[0] :], expected[lengths[0] : tokens])


def test_long_texts_are_gathered_by_whole_tables(device: torch.device) -> None:
    """Texts that see those behind them are not."""
    for causal, width in ((True, 2048), (False, 1)):
        planner = Planner(2, 2, multiprocessors=132)
        inputs = Inputs(BlockTables(1, 1), 1, planner, device, causal=causal, consecutive=True)
        ids = [np.zeros(length, dtype=np.int32) for length in (2048, 30)]
        texts = [TextSequence(Request(request_id="", prompt_token_ids=(0,)), each, len(each), None) for each in ids]
        batch = Batch(0, list(texts), [2048, 30], [2048, 30], [0, 1])
        meta = inputs.tokens(StepMessage.of_texts(batch)).meta
        assert meta.plan is not None
        assert (meta.plan.gathers is not None) == causal
        assert meta.block_tables.shape == (2, width)
        assert meta.block_tables[:, 0].tolist() == [0, 2048]


@pytest.mark.parametrize(
    ("heads", "options"),
    [
        (Heads(query=1, kv=1), {"causal": False}),
        (Heads(query=2, kv=1, size=24, block=8), {"causal": False, "window": 20}),
        (Heads(query=2, kv=2), {"causal": False, "farthest": 9}),
        (Heads(query=1, kv=1), {"causal": False, "window": 70, "softcap": 3.0}),
        (Heads(query=2, kv=2), {"farthest": 9}),
        (Heads(query=4, kv=2), {"farthest": 3, "softcap": 3.0}),
    ],
    ids=str,
)
def test_keys_behind_the_query_and_biases_by_distance(
    heads: Heads, options: dict[str, Any], device: torch.device, assert_close: Close
) -> None:
    for lengths in ([(n, n) for n in (15, 16, 17, 1, 65)], [(150, 150)], [(5, 13), (1, 33)]):
        case = Case(heads, torch.float16, device, alibi=False, **options).fill(lengths)
        meta = whole(case)
        assert meta.plan is not None
        assert (meta.plan.splits is None) == all(count > 1 for count, _ in lengths)
        case.check(meta, assert_close)


GATHERED: list[tuple[Heads, dict[str, Any]]] = [
    (Heads(), {}),
    (Heads(query=4, kv=2, size=24, block=5), {"alibi": False}),
    (Heads(query=2, kv=2, size=80), {"window": 1}),
    (Heads(query=2, kv=1, size=64, block=1), {"window": 70, "softcap": 0.7}),
    (Heads(query=2, kv=1), {"window": 150, "alibi": False}),
    (Heads(query=2, kv=1, size=128, block=64), {"alibi": False, "sinks": 1.0}),
    (Heads(query=2, kv=2), {"alibi": False, "farthest": 9, "softcap": 3.0}),
    (Heads(query=2, kv=1), {"cache": torch.float8_e4m3fn}),
    (Heads(query=2, kv=2, size=24), {"cache": torch.int8, "window": 33}),
    pytest.param(Heads(query=2, kv=1, size=256), {"window": 150}, marks=pytest.mark.gpu),  # type: ignore[list-item]
]


@pytest.mark.parametrize("dtype", interpreted(DTYPES), ids=str)
@pytest.mark.parametrize(("heads", "options"), GATHERED, ids=str)
def test_gathered_keys(
    heads: Heads, options: dict[str, Any], dtype: torch.dtype, device: torch.device, assert_close: Close
) -> None:
    case = Case(heads, dtype, device, gathers=True, **options).fill([(2, 2), (63, 63), (1, 33), (66, 200)])
    meta = whole(case)
    assert meta.plan is not None
    assert meta.plan.tiles is None
    assert meta.plan.long_tiles is not None
    case.check(meta, assert_close)


@pytest.mark.parametrize("heads_at_once", [1, 2])
def test_heads_are_gathered_as_many_at_once_as_there_is_room_for(
    heads_at_once: int, device: torch.device, monkeypatch: pytest.MonkeyPatch, assert_close: Close
) -> None:
    case = Case(Heads(query=6, kv=3, size=24), torch.float16, device, gathers=True).fill([(70, 150), (20, 20)])
    room = heads_at_once * (192 + 64) * 32 * 2 * 2
    monkeypatch.setattr(long_attention, "_GATHERED_BYTES", room)
    case.check(whole(case), assert_close)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "heads", [Heads(32, 8, 128), Heads(16, 16, 64), Heads(8, 8, 96), Heads(8, 4, 256, block=32)], ids=str
)
@pytest.mark.parametrize(
    "options", [{}, {"alibi": False, "window": 1000}, {"alibi": False, "sinks": 0.0, "cache": torch.float8_e4m3fn}]
)
def test_long_prompts(
    options: dict[str, Any], heads: Heads, dtype: torch.dtype, device: torch.device, assert_close: Close
) -> None:
    case = Case(heads, dtype, device, **options).fill([(2050, 2050), (1, 700), (600, 5000), (40, 90)])
    meta = whole(case)
    assert meta.plan is not None
    assert meta.plan.tiles is not None
    assert meta.plan.gathers is not None
    assert len(meta.plan.gathers) == 34 + 80
    case.check(meta, assert_close)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("heads", [Heads(32, 8, 128), Heads(8, 4, 64), Heads(12, 2, 128, block=5)], ids=str)
@pytest.mark.parametrize("options", [{}, {"cache": torch.float8_e4m3fn}], ids=str)
def test_long_prompts_by_pairs_of_heads(
    options: dict[str, Any],
    heads: Heads,
    dtype: torch.dtype,
    device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
    assert_close: Close,
) -> None:
    lengths = [(2, 2), (63, 63), (64, 64), (1, 33), (65, 65), (129, 129), (66, 200), (700, 1500)]
    case = Case(heads, dtype, device, alibi=False, gathers=True, **options).fill(lengths)
    launched = []

    def attend_pairs(*tensors: Any, **options: Any) -> None:
        launched.append(options["heads"])
        attend(*tensors, **options)

    attend = pair_attention.attend_pairs
    monkeypatch.setattr(pair_attention, "attend_pairs", attend_pairs)
    case.check(whole(case), assert_close)
    assert launched == [heads.query]


@pytest.mark.gpu
def test_a_dry_run_of_more_queries_than_keys_ends(device: torch.device) -> None:
    first, queries, keys = np.array([0]), np.array([8192]), np.array([5000])
    arrays = Planner(2, 1, 132).plan(first, first, queries, keys)
    plan = AttentionPlan(None, None, **{name: torch.from_numpy(array).to(device) for name, array in arrays.items()})
    assert plan.long_tiles is not None
    blocks = torch.arange(313, dtype=torch.int32, device=device)
    query_tnd = torch.randn(8192, 2, 64, dtype=torch.float16, device=device)
    key_cache, value_cache = torch.randn(2, 313, 16, 1, 64, dtype=torch.float16, device=device)
    meta = AttentionMeta(
        num_tokens=8192,
        block_tables=blocks,
        slot_mapping=blocks,
        sequences=[0],
        query_lens=[8192],
        kv_lens=[5000],
        plan=plan,
    )
    found = attention.paged_attention(query_tnd, key_cache, value_cache, meta, 0.125, None)
    keys_nkd, values_nkd = (cache.view(-1, 64)[None, :5000] for cache in (key_cache, value_cache))
    behind = query_tnd[-5000:].transpose(0, 1).float()
    expected = torch.nn.functional.scaled_dot_product_attention(
        behind, keys_nkd.float().expand(2, -1, -1), values_nkd.float().expand(2, -1, -1), is_causal=True
    )
    torch.testing.assert_close(found[-5000:].float(), expected.transpose(0, 1), atol=2e-3, rtol=2e-2)


def test_long_prompts_need_no_language_that_triton_calls_experimental(monkeypatch: pytest.MonkeyPatch) -> None:
    find = getattr(long_attention._pairs, "__wrapped__")  # noqa: B009 - mypy does not know it
    assert find() is pair_attention
    monkeypatch.setitem(sys.modules, "triton.experimental.gluon", None)
    monkeypatch.delitem(sys.modules, "hasten.ops.gpu.pair_attention")
    assert find() is None


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", [{}, {"window": 65}, {"farthest": 128}], ids=str)
def test_texts_of_many_lengths(
    options: dict[str, Any], dtype: torch.dtype, device: torch.device, assert_close: Close
) -> None:
    lengths = [(n, n) for n in range(1, 1200, 37)]
    case = Case(Heads(16, 16, 64), dtype, device, alibi=False, causal=False, **options).fill(lengths)
    case.check(whole(case), assert_close)


@pytest.mark.parametrize("dtype", interpreted(DTYPES), ids=str)
@pytest.mark.parametrize("lengths", MIXTURES.values(), ids=list(MIXTURES))
def test_mixtures(lengths: Lengths, dtype: torch.dtype, device: torch.device, assert_close: Close) -> None:
    case = Case(Heads(), dtype, device).fill(lengths, CUT)
    case.check(whole(case), assert_close)


@pytest.mark.parametrize("alibi", [True, False], ids=["alibi", "no slopes"])
@pytest.mark.parametrize(("heads", "dtype"), decoded(SHAPES + GROUPS))
def test_decodes_of_every_shape(
    heads: Heads, dtype: torch.dtype, alibi: bool, device: torch.device, assert_close: Close
) -> None:
    case = Case(heads, dtype, device, alibi).fill([(1, 13), (1, 70)], CUT)
    case.check(whole(case), assert_close)


@pytest.mark.parametrize("window", [None, 20])
@pytest.mark.parametrize("block", [5, 16, 64])
@pytest.mark.parametrize("keys", [16, 32, 64])
def test_keys_at_a_time_of_a_group(
    keys: int,
    block: int,
    window: int | None,
    device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
    assert_close: Close,
) -> None:
    monkeypatch.setattr(attention, "_group_cut", lambda *_: (keys, 3, 2))
    case = Case(Heads(query=6, kv=2, block=block), torch.float16, device, window=window)
    case.fill([(1, 15), (1, 97), (1, 161)], CUT)
    case.check(whole(case), assert_close)


def test_many_queries_of_groups(device: torch.device, assert_close: Close) -> None:
    case = Case(Heads(query=2, kv=1), torch.float16, device).fill([(1, 3 * n + 1) for n in range(18)])
    case.check(whole(case), assert_close)


@pytest.mark.parametrize("dtype", interpreted(DTYPES), ids=str)
@pytest.mark.parametrize("alibi", [True, False], ids=["alibi", "no slopes"])
@pytest.mark.parametrize("heads", SHAPES, ids=str)
def test_prompts_of_every_shape(
    heads: Heads, alibi: bool, dtype: torch.dtype, device: torch.device, assert_close: Close
) -> None:
    case = Case(heads, dtype, device, alibi).fill([(13, 13), (70, 83)])
    case.check(whole(case), assert_close)


@pytest.mark.parametrize("extra_splits", [WHOLE, CUT])
@pytest.mark.parametrize("window", [1, 16, 65, 500])
def test_windows(window: int, extra_splits: int, device: torch.device, assert_close: Close) -> None:
    case = Case(Heads(query=2, kv=1), torch.float16, device, alibi=window == 65, window=window)
    case.fill([(20, 20), (70, 150), (1, 33), (1, 1), (1, 140)], extra_splits)
    case.check(whole(case), assert_close)


@pytest.mark.parametrize("window", [None, 20])
def test_capped_scores(window: int | None, device: torch.device, assert_close: Close) -> None:
    case = Case(Heads(query=2, kv=1), torch.float16, device, softcap=0.7, window=window)
    case.fill([(20, 20), (70, 150), (1, 33), (1, 140)], CUT)
    case.check(whole(case), assert_close)


@pytest.mark.parametrize(("sinks", "window"), [(0.0, None), (-3.0, 20), (50.0, 20)], ids=str)
@pytest.mark.parametrize("heads", [Heads(), Heads(query=6), Heads(query=71, kv=1)], ids=str)
def test_sinks(heads: Heads, sinks: float, window: int | None, device: torch.device, assert_close: Close) -> None:
    case = Case(heads, torch.float16, device, alibi=False, sinks=sinks, window=window)
    case.fill([(20, 20), (70, 90), (1, 33), (1, 1), (1, 140)] if heads.query < 10 else [(1, 1), (1, 140)], CUT)
    case.check(whole(case), assert_close)


@pytest.mark.parametrize("heads", [Heads(), Heads(query=4)], ids=str)
def test_sinks_of_padded_steps(heads: Heads, device: torch.device, assert_close: Close) -> None:
    case = Case(heads, torch.float16, device, alibi=False, sinks=1.0).fill([(1, 70), (1, 1), (1, 33)])
    case.inputs.planner = FewSplits(case.heads.query, case.heads.kv, 0, extra=8)
    expected = case.expected(whole(case))
    found = case.run(padded(case, [1, 1, 1], 5, None))
    assert_close("tile", found[:3], expected)
    assert not found[3:].any()


@pytest.mark.parametrize(
    "needed",
    [[0, 0, 1, 1, 0, 1], [1, 1, 1, 1, 1, 1], [40, 0, 0, 0, 3, 0], [0, 66, 1, 0, 0, 0]],
    ids=["decodes alone", "last of each", "a prompt and a tail", "a chunk"],
)
def test_a_part_of_a_batch_gets_what_it_gets_in_the_whole(
    needed: list[int], device: torch.device, assert_close: Close
) -> None:
    case = Case(Heads(query=1, kv=1), torch.float16, device).fill(
        [(40, 40), (70, 90), (1, 33), (1, 1), (17, 17), (1, 140)], CUT
    )
    part = case.inputs.tokens(message(case, needed)).meta.output_part
    assert part is not None
    assert part.num_tokens == sum(needed)
    case.check(part, assert_close)
    rows = part.output_indices
    assert rows is not None
    assert_close("tile", case.run(part), case.expected(whole(case))[rows.long()])


def padded(case: Case, needed: list[int], tokens: int, outputs: int | None) -> AttentionMeta:
    """The step as in a graph: padded, in sections with room for more, and memory behind it that is no number."""
    size = Size(tokens, outputs)
    step = case.inputs.step(message(case, needed))
    sections = case.inputs.sections(tokens, outputs, tokens)
    arrays = size.arrays(case.inputs, step)
    assert sections.hold(arrays)
    whole = torch.full((sections.total,), 1 << 30, dtype=torch.int32, device=case.device)
    host = sections.packed(arrays, case.device)
    whole[: len(host)] = host.to(case.device)
    case.query_tnd = torch.cat((case.query_tnd, case.query_tnd[:1].expand(tokens - len(case.query_tnd), -1, -1)))
    return case.inputs.seen(step.padded(tokens, outputs), sections.views(whole)).meta


@pytest.mark.parametrize("heads", [Heads(), Heads(query=4)], ids=str)
@pytest.mark.parametrize("size", [3, 5])
def test_padded_steps_of_single_tokens(size: int, heads: Heads, device: torch.device, assert_close: Close) -> None:
    case = Case(heads, torch.float16, device).fill([(1, 70), (1, 1), (1, 33)])
    case.inputs.planner = FewSplits(case.heads.query, case.heads.kv, 0, extra=size + 3)
    expected = case.expected(whole(case))
    meta = padded(case, [1, 1, 1], size, None)
    for _ in range(2):  # as two layers do
        found = case.run(meta)
        assert_close(case.kind(meta), found[:3], expected)
        assert not found[3:].any()


@pytest.mark.parametrize("window", [None, 20])
@pytest.mark.parametrize("tokens", [131, 200])
def test_padded_steps_with_prompts(tokens: int, window: int | None, device: torch.device, assert_close: Close) -> None:
    lengths = [(40, 40), (70, 90), (1, 33), (1, 1), (18, 18), (1, 140)]
    case = Case(Heads(query=2, kv=1), torch.float16, device, window=window).fill(lengths, CUT)
    needed = [1, 0, 1, 1, 1, 1]
    whole_step = case.inputs.tokens(message(case, needed)).meta
    part = whole_step.output_part
    assert part is not None
    expected, expected_part = case.expected(whole_step), case.expected(part)
    meta = padded(case, needed, tokens, 8)
    for _ in range(2):  # as two layers do
        found = case.run(meta)
        assert_close("tile", found[:131], expected)
        assert not found[131:].any()
    assert meta.output_part is not None
    found = case.run(meta.output_part)
    assert_close("tile", found[:5], expected_part)
    assert not found[5:].any()


@pytest.mark.parametrize("seed", range(3))
def test_later_layers_use_the_memory_of_the_first(seed: int, device: torch.device, assert_close: Close) -> None:
    first = Case(Heads(query=1, kv=1), torch.float16, device).fill([(1, 130), (1, 70)], CUT)
    meta = whole(first)
    first.check(meta, assert_close)
    held = meta.scratch["parts"]
    second = replace(first, seed=0).fill([(1, 130), (1, 70)], CUT)
    second.query_tnd = second.query_tnd * (seed + 2)
    second.check(meta, assert_close)
    assert meta.scratch["parts"] is held


@pytest.mark.parametrize("extra_splits", [None, CUT])
def test_nothing_is_changed_but_the_output(extra_splits: int | None, device: torch.device) -> None:
    case = Case(Heads(query=1, kv=1), torch.float16, device).fill([(20, 33), (1, 70)], extra_splits)
    before = [tensor.clone() for tensor in (case.query_tnd, *case.caches)]
    case.run(whole(case))
    after = (case.query_tnd, *case.caches)
    assert all(torch.equal(a.nan_to_num(7), b.nan_to_num(7)) for a, b in zip(after, before, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("heads", "lengths"), REAL.values(), ids=list(REAL))
def test_real_sizes(heads: Heads, lengths: Lengths, dtype: torch.dtype, assert_close: Close) -> None:
    case = Case(heads, dtype, torch.device("cuda", 0)).fill(lengths)
    meta = whole(case)
    case.check(meta, assert_close)
    found = case.run(meta)
    for _ in range(10):  # splits of one query finish in any order, and are added up in one
        assert torch.equal(case.run(meta), found)


@pytest.mark.parametrize("cache", CACHE_DTYPES.values(), ids=list(CACHE_DTYPES))
@pytest.mark.parametrize(("heads", "options"), IN_8_BITS, ids=str)
def test_caches_in_8_bits(
    heads: Heads, options: dict[str, Any], cache: torch.dtype, device: torch.device, assert_close: Close
) -> None:
    case = Case(heads, torch.float16, device, cache=cache, **options).fill([(20, 20), (70, 90), (1, 33), (1, 140)], CUT)
    case.check(whole(case), assert_close)
    decodes = Case(heads, torch.float16, device, cache=cache, **options).fill([(1, 1), (1, 70), (1, 17)], CUT)
    decodes.check(whole(decodes), assert_close)


@pytest.mark.parametrize("cache", CACHE_DTYPES.values(), ids=list(CACHE_DTYPES))
def test_caches_in_8_bits_with_queries_in_fp32(cache: torch.dtype, device: torch.device, assert_close: Close) -> None:
    for heads in (Heads(), Heads(query=4)):
        case = Case(heads, torch.float32, device, cache=cache).fill([(20, 33), (1, 33), (1, 90)], CUT)
        case.check(whole(case), assert_close)


@pytest.mark.gpu
@pytest.mark.parametrize("cache", CACHE_DTYPES.values(), ids=list(CACHE_DTYPES))
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("heads", "lengths"), REAL.values(), ids=list(REAL))
def test_real_sizes_in_8_bits(
    heads: Heads, lengths: Lengths, dtype: torch.dtype, cache: torch.dtype, assert_close: Close
) -> None:
    case = Case(heads, dtype, torch.device("cuda", 0), cache=cache).fill(lengths)
    case.check(whole(case), assert_close)


@pytest.mark.gpu
@pytest.mark.parametrize("window", [None, 128])
def test_sinks_at_real_sizes(window: int | None, assert_close: Close) -> None:
    for heads in (Heads(64, 8, 64), Heads(12, 12, 64)):
        case = Case(heads, torch.bfloat16, torch.device("cuda", 0), alibi=False, sinks=1.0, window=window)
        case.fill([(1, 900), (500, 1500), (1, 3), *[(1, 90 * n + 1) for n in range(40)], (1, 32_768)])
        case.check(whole(case), assert_close)


@pytest.mark.gpu
@pytest.mark.parametrize("size", [64, 80, 96, 128, 256])
def test_real_head_sizes_in_fp32(size: int, assert_close: Close) -> None:
    for kv_heads in (12, 3):
        case = Case(Heads(12, kv_heads, size), torch.float32, torch.device("cuda", 0))
        case.fill([(1, 900), (300, 700), (1, 3)])
        case.check(whole(case), assert_close)


FIXED: list[tuple[Heads, dict[str, object]]] = [
    (Heads(), {}),
    (Heads(query=6, kv=2, size=24, block=8), {"window": 20}),
    (Heads(query=17, kv=1, block=5), {"alibi": False, "softcap": 0.7}),
    (Heads(query=4, kv=2, size=128), {}),
]


def check_fixed(case: Case, lengths: Lengths, assert_close: Close) -> None:
    """Whole prompts, short chunks and single queries, by runs or not cut: the same bits, if products are a GPU's."""
    prompts = whole(case.fill(lengths))
    case.check(prompts, assert_close)
    found = case.run(prompts)
    for last, extra_splits in ((1, 1000), (1, 0), (2, 1000), (7, 0)):
        case.fill(lengths, extra_splits)
        part = case.inputs.tokens(message(case, [min(last, count) for count, _ in lengths])).meta.output_part
        assert part is not None
        assert part.output_indices is not None
        if last == 1:
            assert part.plan is not None
            assert part.plan.splits is not None
            assert (int(part.plan.splits[:, 7].max()) == 1) == (extra_splits == 0)
        expected = found[part.output_indices.long()]
        if expected.is_cuda:
            assert torch.equal(case.run(part), expected)
        else:
            assert_close("tile", case.run(part), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("cache", [None, *CACHE_DTYPES.values()], ids=str)
@pytest.mark.parametrize(("heads", "options"), FIXED, ids=str)
def test_in_a_fixed_order_a_query_is_the_same_alone_and_in_a_prompt(
    heads: Heads,
    options: dict[str, object],
    cache: torch.dtype | None,
    dtype: torch.dtype,
    device: torch.device,
    assert_close: Close,
) -> None:
    case = Case(heads, dtype, device, fixed_run=64, cache=cache, **options)  # type: ignore[arg-type]  # fields by name
    check_fixed(case, [(1, 150), (3, 64), (16, 16), (50, 200), (70, 129), (33, 33), (1, 640)], assert_close)


def test_attention_in_a_fixed_order(device: torch.device, assert_close: Close) -> None:
    case = Case(Heads(query=2, kv=1), torch.float16, device, window=40, fixed_run=32)
    check_fixed(case, [(2, 70), (19, 36)], assert_close)
