"""What `kernels.py` measures: each op at the sizes of a model, with the least that it has to move and compute.

Shapes: t tokens, h hidden, v vocabulary, q, m and d query heads, key/value heads and head size.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor

from hasten import ops
from hasten.core.dtypes import CacheDType, DTypeName
from hasten.core.errors import ConfigError
from hasten.core.model_config import AttentionConfig, ExpertsConfig, GatedUnit, ModelConfig
from hasten.core.types import Request, SamplingParams
from hasten.engine.batch import Batch
from hasten.engine.inputs import BlockTables, Inputs
from hasten.engine.sequence import Sequence
from hasten.engine.step_message import StepMessage, TableRows
from hasten.layers.position import alibi_slopes
from hasten.ops import (
    AttentionMeta,
    Bans,
    BeamChoice,
    BeamMoves,
    BeamSearches,
    BeamStates,
    BlockCaches,
    CacheScales,
    Draws,
    EditList,
    HeadTransform,
    PackedExperts,
    PackedLinear,
    PartialSum,
    Routing,
    Search,
    TokenCounts,
    TopLogprobs,
    beams,
    reference,
)
from hasten.ops.peers import Peers
from hasten.ops.plan import Planner
from hasten.quantization.scheme import SCHEMES

_BLOOM = {  # hidden size, heads, layers
    "bloom-560m": (1024, 16, 24),
    "bloom-1b1": (1536, 16, 24),
    "bloom-1b7": (2048, 16, 24),
    "bloom-3b": (2560, 32, 30),
    "bloom-7b1": (4096, 32, 30),
    "bloom": (14_336, 112, 70),
}
_SHAPES = {
    "llama-3-8b": ModelConfig(
        architecture="LlamaForCausalLM",
        num_layers=32,
        hidden_size=4096,
        intermediate_size=14_336,
        vocab_size=128_256,
        attention=AttentionConfig(num_heads=32, num_kv_heads=8, head_size=128),
    ),
    "qwen3-30b-a3b": ModelConfig(
        architecture="Qwen3MoeForCausalLM",
        num_layers=48,
        hidden_size=2048,
        intermediate_size=6144,
        vocab_size=151_936,
        attention=AttentionConfig(num_heads=32, num_kv_heads=4, head_size=128),
        experts=ExpertsConfig(num_experts=128, top_k=8, inner_size=768, normalized=True),
    ),
}

TOLERANCE = {torch.float16: 2.0**-9, torch.bfloat16: 2.0**-6}
"""Largest error, relative to values above 1 and absolute for those below: two units in the last place."""
_FP8_TOLERANCE = 0.02
"""The same of products in fp8, which matrix units add up in about 14 bits."""
_DIFFERING_DRAWS = 0.05
"""Share of rows whose point may lie so close to a border between two tokens that fp32 does not tell its side."""


_A_STEP = {"fp8": 0.13, "int8": 1.0}
"""The same of values in a cache of 8 bits, where a little may make them the next one."""
_BLOCK_SIZE = 16
_RANDOM_STEPS, _LARGEST_STEP = 32.0, 127.0
"""Of random numbers in a cache of 8 bits: what 1 is stored as, and the largest that is."""
_EPS = 1e-5

Outputs = Tensor | tuple[Tensor, ...]
Run = Callable[[], Outputs]


@dataclass(frozen=True)
class Call:
    """An op on inputs of its own."""

    kernel: Run
    reference: Run
    exact: Run
    """The reference on the same values in fp32."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """An op at one size."""

    op: str
    """What launches the kernel."""
    shape: str
    make: Callable[[], Call]
    nbytes: float
    """What has to be read and written at least."""
    flops: float = 0
    tolerance: float | None = None
    """None for what its type allows."""
    waits: bool = False
    """Whether the host has to wait within the reference, which no graph allows."""

    @property
    def name(self) -> str:
        """What `--only` looks at."""
        return f"{self.op} {self.shape}"


@dataclass(frozen=True)
class Setting:
    """What all cases share."""

    model: ModelConfig
    dtype: torch.dtype
    device: torch.device
    quantization: str | None = None
    """Scheme of the weights of linear layers."""
    cache_dtype: CacheDType | None = None
    """Type of 8 bits of the key/value cache; None: that of the rest."""

    def draw(self, *shape: int, scale: float = 1.0) -> Tensor:
        """Normal random numbers."""
        return torch.randn(shape, dtype=self.dtype, device=self.device).mul_(scale)

    def draw_ids(self, *shape: int) -> Tensor:
        """Random tokens."""
        return torch.randint(self.model.vocab_size, shape, dtype=torch.int32, device=self.device)

    @property
    def itemsize(self) -> int:
        """Bytes of a number."""
        return self.dtype.itemsize

    @property
    def heads(self) -> tuple[int, int, int]:
        """Query heads, key/value heads, head size."""
        attention = self.model.attention
        return attention.num_heads, attention.num_kv_heads, attention.head_size

    @property
    def cache_itemsize(self) -> int:
        """Bytes of a number of the cache."""
        return self.itemsize if self.cache_dtype is None else ops.CACHE_DTYPES[self.cache_dtype].itemsize

    def caches(self, slots: int) -> tuple[Tensor, Tensor]:
        """A layer's keys and values of random numbers, at least that number of slots."""
        _, kv_heads, size = self.heads
        keys, values = self.draw(2, -(-slots // _BLOCK_SIZE), _BLOCK_SIZE, kv_heads, size)
        if self.cache_dtype is not None:
            dtype = ops.CACHE_DTYPES[self.cache_dtype]
            keys, values = (
                cache.mul_(_RANDOM_STEPS).clamp_(-_LARGEST_STEP, _LARGEST_STEP).to(dtype) for cache in (keys, values)
            )
        return keys, values

    def scales(self) -> CacheScales | None:
        """Those of a cache of 8 bits."""
        if self.cache_dtype is None:
            return None
        ranges = torch.full((2, self.heads[1]), _LARGEST_STEP / _RANDOM_STEPS, device=self.device)
        return CacheScales(ranges / _LARGEST_STEP, _LARGEST_STEP / ranges)


def model_shape(name: str) -> ModelConfig:
    """A model by the name of its size, or that of a folder."""
    if name in _SHAPES:
        return _SHAPES[name]
    if name in _BLOOM:
        hidden, heads, layers = _BLOOM[name]
        return ModelConfig(
            architecture="BloomForCausalLM",
            num_layers=layers,
            hidden_size=hidden,
            intermediate_size=4 * hidden,
            vocab_size=250_880,
            attention=AttentionConfig(num_heads=heads, num_kv_heads=heads, head_size=hidden // heads),
        )
    if not Path(name).is_dir():
        raise ConfigError(f"{name} is no folder of a model, and none of {', '.join((*_BLOOM, *_SHAPES))}")
    from hasten.checkpoint.hugging_face import read_hf_config

    return read_hf_config(Path(name))


def gpu_setting(model: ModelConfig, dtype: DTypeName) -> Setting:
    """On the first GPU; ConfigError where there is none."""
    if not torch.cuda.is_available():
        raise ConfigError("kernels are measured on a GPU, and torch finds none here")
    return Setting(model, ops.TORCH_DTYPES[dtype], torch.device("cuda", 0))


def cases(setting: Setting) -> list[Case]:
    """All that is measured."""
    return [
        *(case for rows in (1, 8, 16, 64) for case in _linears(setting, rows)),
        *(case for rows in (1, 16, 64, 128, 512) for case in _linears(replace(setting, quantization="int8"), rows)),
        *(case for rows in (1, 16, 64, 256, 8192) for case in _layers(replace(setting, quantization="int4"), rows)),
        *(case for rows in (1, 16, 64, 256) for case in _linears(replace(setting, quantization="w8a8"), rows)),
        *_fp8(setting),
        *(_attention(setting, f"{size} x 192", [(1, 192)] * size) for size in (1, 16, 64, 256)),
        _attention(setting, "256 of 16 to 2056", [(1, 16 + 8 * n) for n in range(256)]),
        *(_attention(setting, f"prefill {n} x {k}", [(k, k)] * n) for n, k in ((94, 87), (14, 560), (4, 2048))),
        _attention(setting, "64 x 2048, window 512, capped", [(1, 2048)] * 64, window=512, softcap=50.0),
        _attention(setting, "prefill 14 x 560, window 256, capped", [(560, 560)] * 14, window=256, softcap=50.0),
        _attention(setting, "2 x 192, sinks", [(1, 192)] * 2, sinks=True),
        _attention(setting, "prefill 2 x 560, window 128, sinks", [(560, 560)] * 2, window=128, sinks=True),
        _attention(setting, "prefill 32 x 264, not causal", [(264, 264)] * 32, causal=False),
        _attention(setting, "prefill 32 x 264, not causal, by distance", [(264, 264)] * 32, causal=False, farthest=128),
        _attention(setting, "2 x 192, by distance", [(1, 192)] * 2, farthest=128),
        *(case for name in _cache_dtypes(setting) for case in _in_8_bits(replace(setting, cache_dtype=name))),
        *(_add_norm(setting, rows) for rows in (1, 64, 8192)),
        *(_add_norm(setting, rows, rms=True) for rows in (1, 64, 8192)),
        *(_add_norm(setting, rows, products=2) for rows in (1, 64)),
        *(_exchange_norm(setting, 64, products) for products in (1, 2)),
        *_embedding_norms(setting, (1, 64, 8192)),
        *(_write_cache(setting, rows) for rows in (64, 8192)),
        *(_copy_blocks(setting, count) for count in (32, 128)),
        *(_store_heads(setting, rows) for rows in (1, 64, 8192)),
        *(_store_heads(setting, rows, interleaved=True) for rows in (1, 64)),
        *(_mean_squares(setting, rows) for rows in (1, 64, 8192)),
        *(_gated(setting, rows) for rows in (1, 64, 128)),
        *_activations(setting),
        *(_route(setting, rows) for rows in (1, 64, 8192)),
        _norm_route(setting),
        *(_experts(setting, rows) for rows in (1, 16, 64, 192, 512, 8192)),
        _experts(setting, 64, ranks=2),
        *(_experts(setting, rows, biases=True) for rows in (1, 16)),
        *(_project(setting, rows, clip=1.0) for rows in (1, 8)),
        *(_project(setting, rows, rotated=True) for rows in (1, 16)),
        _resolve_ids(setting, 256),
        *(_greedy(setting, rows) for rows in (1, 64, 256)),
        *(_draw(setting, rows) for rows in (64, 256)),
        *(_edit_logits(setting, rows) for rows in (64, 256)),
        _count_tokens(setting, 256),
        _mask_logits(setting, 256),
        *(_top_logprobs(setting, rows) for rows in (64, 256)),
        _largest(setting, 64),
        *(_choose_beams(setting, searches) for searches in (16, 64)),
        *(_move_beams(setting, count) for count in (64, 256)),
    ]


def _of_cache(setting: Setting) -> str:
    return "" if setting.cache_dtype is None else f", {setting.cache_dtype} cache"


def _rows(count: int) -> str:
    return "1 row" if count == 1 else f"{count} rows"


def _call(kernel: Callable[..., Outputs], definition: Callable[..., Outputs], *inputs: Any) -> Call:
    return Call(
        partial(kernel, *inputs), partial(definition, *inputs), lambda: definition(*(_wide(value) for value in inputs))
    )


def _wide(value: Any) -> Any:
    """The same values in fp32, but for caches of 8 bits."""
    if isinstance(value, Tensor):
        return value.float() if value.is_floating_point() and value.itemsize > 1 else value
    if isinstance(value, HeadTransform):
        return replace(value, query_norm_d=_wide(value.query_norm_d), key_norm_d=_wide(value.key_norm_d))
    if isinstance(value, PackedLinear):
        return replace(value, plain=_wide(value.plain))
    if isinstance(value, PackedExperts):
        held = ("gate_up", "down", "gate_up_bias", "down_bias")
        return replace(value, **{name: _wide(getattr(value, name)) for name in held})
    if isinstance(value, PartialSum):
        terms = ("parts", "bias", "residual", "added", "added_bias")
        return replace(value, **{name: _wide(getattr(value, name)) for name in terms})
    return value


def _linears(setting: Setting, rows: int) -> Iterator[Case]:
    yield from _layers(setting, rows)
    yield _linear(setting, "head", rows, setting.model.hidden_size, setting.model.vocab_size)


def _layers(setting: Setting, rows: int) -> Iterator[Case]:
    """The products of a layer."""
    hidden, inner = setting.model.hidden_size, setting.model.intermediate_size
    yield _project(setting, rows)
    yield _linear(setting, "dense", rows, setting.heads[0] * setting.heads[2], hidden, parts=True)
    yield _linear(setting, "up", rows, hidden, inner, activation=setting.model.activation)
    yield _linear(setting, "down", rows, inner, hidden, parts=True)


def _fp8(setting: Setting) -> Iterator[Case]:
    if ops.multiplies(torch.float8_e4m3fn, setting.device):
        for rows in (1, 16, 64, 256, 8192):
            yield from _layers(replace(setting, quantization="fp8"), rows)


def _cache_dtypes(setting: Setting) -> Iterator[CacheDType]:
    """Types of 8 bits that the device's kernels read."""
    yield from (name for name, dtype in ops.CACHE_DTYPES.items() if ops.multiplies(dtype, setting.device))


def _in_8_bits(setting: Setting) -> Iterator[Case]:
    """What reads and writes a cache of 8 bits."""
    for size in (1, 16, 64, 256):
        yield _attention(setting, f"{size} x 192", [(1, 192)] * size)
    yield _attention(setting, "64 x 2048", [(1, 2048)] * 64)
    yield _attention(setting, "prefill 14 x 560", [(560, 560)] * 14)
    for rows in (64, 8192):
        yield _write_cache(setting, rows)
        yield _store_heads(setting, rows)
    yield _project(setting, 16)


def _activations(setting: Setting) -> Iterator[Case]:
    """Those of other models behind the same product."""
    hidden, inner = setting.model.hidden_size, setting.model.intermediate_size
    for activation in get_args(ops.Activation):
        if activation != setting.model.activation:
            yield _linear(setting, f"up by {activation}", 1, hidden, inner, activation=activation)


def _product(setting: Setting, op: str, name: str, rows: int, into: int, out: int, make: Callable[[], Call]) -> Case:
    scheme = setting.quantization
    weight_bytes = {"int8": into * out + 4 * out, "int4": into * out / 2 + 2 * out * -(-into // 128)}.get(
        scheme or "", into * out * setting.itemsize
    )
    return Case(
        op=op,
        shape=f"{name}{'' if scheme is None else f' {scheme}'}, {_rows(rows)}",
        make=make,
        nbytes=rows * (into + out) * setting.itemsize + weight_bytes,
        flops=2 * rows * into * out,
        tolerance=_FP8_TOLERANCE if scheme == "fp8" else None,
    )


def _packed(setting: Setting, into: int, out: int) -> PackedLinear:
    weight = setting.draw(out, into, scale=into**-0.5)
    if setting.quantization is None:
        return ops.pack_linear(weight, shared=True)
    return ops.pack_linear(SCHEMES[setting.quantization].quantize(weight, "drawn"), shared=True)


def _linear(
    setting: Setting,
    name: str,
    rows: int,
    into: int,
    out: int,
    *,
    parts: bool = False,
    activation: ops.Activation | None = None,
) -> Case:
    def make() -> Call:
        x, weight = setting.draw(rows, into), _packed(setting, into, out)
        if parts:
            return _call(ops.linear_parts, partial(reference.linear, bias_o=None, activation=None), x, weight)
        kernel, definition = (partial(op, activation=activation) for op in (ops.linear, reference.linear))
        return _call(kernel, definition, x, weight, setting.draw(out) if activation else None)

    return _product(setting, "linear_parts" if parts else "linear", name, rows, into, out, make)


def _project(setting: Setting, rows: int, *, clip: float | None = None, rotated: bool = False) -> Case:
    heads, kv_heads, size = setting.heads
    into, out = setting.model.hidden_size, (heads + 2 * kv_heads) * size

    def projected(project: Callable[..., Tensor], *inputs: Any) -> Outputs:
        return project(*inputs, heads), inputs[3], inputs[4]

    def make() -> Call:
        slots_t = torch.randperm(rows, device=setting.device)
        inputs = (setting.draw(rows, into), _packed(setting, into, out), setting.draw(out), *setting.caches(rows))
        transform = HeadTransform(
            positions_t=torch.arange(rows, device=setting.device),
            table_pr=torch.rand(rows, size, device=setting.device),
        )
        options = {"transform": transform if rotated else None, "scales": setting.scales()}
        kernel, definition = (
            partial(projected, partial(op, clip=clip, **options))  # type: ignore[arg-type]
            for op in (ops.project, reference.project)
        )
        return _call(kernel, definition, *inputs, slots_t)

    name = f"qkv{'' if clip is None else ', clipped'}{', rotated' if rotated else ''}{_of_cache(setting)}"
    case = _product(setting, "project", name, rows, into, out, make)
    return replace(case, waits=True, tolerance=case.tolerance or _A_STEP.get(setting.cache_dtype or ""))


def _attention(
    setting: Setting,
    shape: str,
    lengths: list[tuple[int, int]],
    *,
    window: int | None = None,
    softcap: float | None = None,
    sinks: bool = False,
    causal: bool = True,
    farthest: int | None = None,
) -> Case:
    """Sequences by their numbers of new tokens and of all tokens; `farthest`: distance up to which biases differ."""
    heads, kv_heads, size = setting.heads
    widest = max(length for _, length in lengths) if window is None else window
    tokens, kept = sum(new for new, _ in lengths), sum(min(length, widest + new - 1) for new, length in lengths)
    pairs = sum(
        min(seen + 1, widest) if causal else length for new, length in lengths for seen in range(length - new, length)
    )

    def make() -> Call:
        blocks = sum(-(-length // _BLOCK_SIZE) for _, length in lengths)
        slopes_n = alibi_slopes(heads).to(setting.device) if causal and farthest is None else None
        bias_nr = None if farthest is None else setting.draw(heads, 2 * farthest + 1).float()
        inputs = (setting.draw(tokens, heads, size), *setting.caches(blocks * _BLOCK_SIZE))
        meta = _meta(setting, lengths, blocks, causal=causal)
        both = (ops.paged_attention, reference.paged_attention)
        sinks_n = setting.draw(heads) if sinks else None
        kernel, definition = (
            partial(
                op,
                window=window,
                softcap=softcap,
                sinks_n=sinks_n,
                causal=causal,
                bias_nr=bias_nr,
                scales=setting.scales(),
            )
            for op in both
        )
        return _call(kernel, definition, *inputs, meta, size**-0.5, slopes_n)

    return Case(
        op="paged_attention",
        shape=shape + _of_cache(setting),
        make=make,
        nbytes=2 * (tokens * heads * setting.itemsize + kept * kv_heads * setting.cache_itemsize) * size,
        flops=4 * pairs * heads * size,
    )


def _meta(setting: Setting, lengths: list[tuple[int, int]], blocks: int, *, causal: bool) -> AttentionMeta:
    """A batch as the engine makes it, its sequences scattered over the blocks."""
    free = torch.randperm(blocks).tolist()
    tables = BlockTables(len(lengths), max(-(-length // _BLOCK_SIZE) for _, length in lengths))
    heads, kv_heads, _ = setting.heads
    # Triton's interpreter, which runs the kernels in tests, wants the work divided as well
    planner = Planner.of(setting.device, heads, kv_heads) or Planner(heads, kv_heads, multiprocessors=0)
    inputs = Inputs(tables, _BLOCK_SIZE, planner, setting.device, causal=causal)
    batch = Batch()
    for key, (new, length) in enumerate(lengths):
        request = Request(request_id=str(key), prompt_token_ids=(0,) * length, params=SamplingParams())
        made = Sequence(request, seed=0)
        made.key, made.num_computed = key, length - new
        made.block_table = [free.pop() for _ in range(-(-length // _BLOCK_SIZE))]
        batch.add(made, new, [])
    message = StepMessage.of(batch, TableRows(len(lengths)))
    return inputs.tokens(replace(message, needed=batch.counts)).meta


def _add_norm(setting: Setting, rows: int, *, rms: bool = False, products: int = 1) -> Case:
    hidden = setting.model.hidden_size

    def make() -> Call:
        sum_ = _sum_of(setting, rows, products)
        weight, bias = _gain(setting)
        kernel, definition = (partial(op, rms=rms) for op in (ops.norm, reference.norm))
        return _call(kernel, definition, sum_, weight, None if rms else bias, _EPS)

    shape = f"rms, {_rows(rows)}" if rms else f"{_products(products)}{_rows(rows)}"
    nbytes = (3 + products) * rows * hidden * setting.itemsize
    return Case(op="norm", shape=shape, make=make, nbytes=nbytes, tolerance=_norm_of_sum(setting))


def _sum_of(setting: Setting, rows: int, products: int) -> PartialSum:
    """A product, its bias and a residual; with two products, those of a parallel residual."""
    hidden = setting.model.hidden_size
    sum_ = PartialSum(setting.draw(rows, hidden), setting.draw(hidden), setting.draw(rows, hidden))
    return sum_ if products == 1 else sum_.plus(setting.draw(rows, hidden), setting.draw(hidden))


def _products(count: int) -> str:
    return "" if count == 1 else f"{count} products, "


def _norm_of_sum(setting: Setting) -> float:
    """The sum is rounded to the type as well, before its norm is."""
    return 2 * TOLERANCE[setting.dtype]


def _gain(setting: Setting) -> tuple[Tensor, Tensor]:
    weight, bias = setting.draw(2, setting.model.hidden_size)
    return weight, bias


def _exchange_norm(setting: Setting, rows: int, products: int) -> Case:
    """What it costs beside the other ranks' part: this one has nobody to wait for."""
    hidden, device = setting.model.hidden_size, setting.device

    def make() -> Call:
        mailbox = torch.zeros(2, rows, 1, hidden // 2, dtype=torch.int64, device=device)
        peers = Peers(
            rank=0,
            size=1,
            max_rows=rows,
            width=hidden,
            mailbox=mailbox,
            addresses=torch.tensor([mailbox.data_ptr()], device=device),
            exchanges=torch.zeros(rows, dtype=torch.int32, device=device),
            abort_flag=torch.zeros(1, dtype=torch.int32, device=device),
        )
        sum_ = replace(_sum_of(setting, rows, products), peers=peers)
        return _call(ops.norm, reference.norm, sum_, *_gain(setting), _EPS)

    nbytes = (3 + products) * rows * hidden * setting.itemsize
    return Case(
        op="exchange_norm",
        shape=f"{_products(products)}{_rows(rows)}, one rank alone",
        make=make,
        nbytes=nbytes,
        tolerance=_norm_of_sum(setting),
    )


def _embedding_norms(setting: Setting, counts: Iterable[int]) -> Iterator[Case]:
    hidden = setting.model.hidden_size
    table = cache(partial(setting.draw, setting.model.vocab_size, hidden))  # large: there is one for all

    def make(rows: int) -> Call:
        inputs = (setting.draw_ids(rows), table(), *_gain(setting), _EPS)
        return _call(ops.embedding_norm, reference.embedding_norm, *inputs)

    for rows in counts:
        nbytes = 2 * rows * hidden * setting.itemsize
        yield Case(op="embedding_norm", shape=_rows(rows), make=partial(make, rows), nbytes=nbytes)


def _write_cache(setting: Setting, rows: int) -> Case:
    heads, kv_heads, size = setting.heads

    def written(write: Callable[..., None], *inputs: Tensor) -> Outputs:
        write(*inputs)
        return inputs[2], inputs[3]

    def make() -> Call:
        fused = setting.draw(rows, heads + 2 * kv_heads, size)
        _, keys, values = fused.split([heads, kv_heads, kv_heads], dim=1)
        inputs = (keys, values, *setting.caches(rows), torch.randperm(rows, device=setting.device))
        scales = setting.scales()
        kernel, definition = (
            partial(written, partial(op, scales=scales)) for op in (ops.write_cache, reference.write_cache)
        )
        return _call(kernel, definition, *inputs)

    nbytes = 2 * rows * kv_heads * size * (setting.itemsize + setting.cache_itemsize)
    return Case(
        op="write_cache", shape=_rows(rows) + _of_cache(setting), make=make, nbytes=nbytes, tolerance=0, waits=True
    )


_COPIED_CACHES = 4
"""Caches in which blocks are copied together: a model's are twice as many as it has layers."""


def _copy_blocks(setting: Setting, count: int) -> Case:
    _, kv_heads, size = setting.heads

    def make() -> Call:
        caches = [cache for _ in range(_COPIED_CACHES // 2) for cache in setting.caches(2 * count * _BLOCK_SIZE)]
        held = BlockCaches.of(caches)
        pairs = torch.randperm(2 * count, device=setting.device).view(2, count)

        def run(copy: Callable[[BlockCaches, Tensor, Tensor], None]) -> Outputs:
            copy(held, *pairs)
            return held.tensors

        kernel, definition = partial(run, ops.copy_blocks), partial(run, reference.copy_blocks)
        return Call(kernel, definition, lambda: tuple(cache.float() for cache in definition()))

    nbytes = 2 * _COPIED_CACHES * count * _BLOCK_SIZE * kv_heads * size * setting.itemsize
    shape = f"{count} blocks in {_COPIED_CACHES} caches"
    return Case(op="copy_blocks", shape=shape, make=make, nbytes=nbytes, tolerance=0)


def _store_heads(setting: Setting, rows: int, *, interleaved: bool = False) -> Case:
    """Queries and keys normed and turned behind their projection; interleaved ones with weights of each head's own."""
    heads, kv_heads, size = setting.heads

    def stored(store: Callable[..., Tensor], *inputs: Any) -> Outputs:
        return store(*inputs), inputs[1], inputs[2]

    def make() -> Call:
        # here, so that nothing but a GPU's own cases needs triton
        from hasten.ops.gpu.heads import store_heads

        transform = HeadTransform(
            positions_t=torch.arange(rows, device=setting.device),
            table_pr=torch.rand(rows, size, device=setting.device),
            interleaved=interleaved,
            query_norm_d=setting.draw(size * (heads if interleaved else 1)),
            key_norm_d=setting.draw(size * (kv_heads if interleaved else 1)),
            rms=not interleaved,
            eps=_EPS,
        )
        qkv = setting.draw(rows, (heads + 2 * kv_heads) * size)
        inputs = (qkv, *setting.caches(rows), torch.randperm(rows, device=setting.device), heads, transform)
        both, scales = (store_heads, reference.store_heads), setting.scales()
        kernel, definition = (partial(stored, partial(op, scales=scales)) for op in both)
        return _call(kernel, definition, *inputs)

    values = rows * (heads + 2 * kv_heads) * size
    nbytes = values * setting.itemsize + rows * size * (
        heads * setting.itemsize + 2 * kv_heads * setting.cache_itemsize
    )
    shape = (f"interleaved, {_rows(rows)}" if interleaved else _rows(rows)) + _of_cache(setting)
    tolerance = _A_STEP.get(setting.cache_dtype or "")
    return Case(op="store_heads", shape=shape, make=make, nbytes=nbytes, waits=True, tolerance=tolerance)


def _mean_squares(setting: Setting, rows: int) -> Case:
    heads, kv_heads, size = setting.heads

    def make() -> Call:
        qkv = setting.draw(rows, (heads + 2 * kv_heads) * size)
        return _call(ops.mean_squares, reference.mean_squares, qkv, heads, kv_heads, size, 1)

    nbytes = rows * (heads + kv_heads) * size * setting.itemsize
    return Case(op="mean_squares", shape=_rows(rows), make=make, nbytes=nbytes)


def _gated(setting: Setting, rows: int) -> Case:
    into, out = setting.model.hidden_size, 2 * setting.model.intermediate_size

    def make() -> Call:
        kernel, definition = (
            partial(op, bias_o=None, gate="silu") for op in (ops.gated_linear, reference.gated_linear)
        )
        return _call(kernel, definition, setting.draw(rows, into), _packed(setting, into, out))

    # the halves of the product are rounded before they meet
    case = _product(setting, "gated_linear", "gate and up", rows, into, out, make)
    return replace(case, tolerance=4 * TOLERANCE[setting.dtype])


def _mixture(setting: Setting) -> ExpertsConfig:
    """The model's experts, or some of about its MLP's size."""
    inner = max(1, setting.model.intermediate_size // 4)
    return setting.model.experts or ExpertsConfig(num_experts=8, top_k=2, inner_size=inner, normalized=True)


def _route(setting: Setting, rows: int) -> Case:
    mixture, hidden = _mixture(setting), setting.model.hidden_size

    def weights(route: Callable[..., Routing], *inputs: Tensor) -> Outputs:
        return route(*inputs, mixture.top_k, mixture.normalized).weights_tk  # of almost equal experts either is right

    def make() -> Call:
        inputs = (setting.draw(rows, hidden), setting.draw(mixture.num_experts, hidden, scale=hidden**-0.5))
        return _call(partial(weights, ops.route), partial(weights, reference.route), *inputs)

    size = mixture.num_experts
    return Case(
        op="route",
        shape=f"{_rows(rows)} to {mixture.top_k} of {size}",
        make=make,
        nbytes=(rows + size) * hidden * setting.itemsize + 8 * rows * mixture.top_k,
        flops=2 * rows * hidden * size,
    )


def _norm_route(setting: Setting) -> Case:
    """The norm of a single token and the choice of its experts."""
    mixture, hidden = _mixture(setting), setting.model.hidden_size

    def kernel(sum_: PartialSum, weight_h: Tensor, router_eh: Tensor) -> Outputs:
        *normed, routing = ops.norm_route(sum_, weight_h, _EPS, router_eh, mixture.top_k, mixture.normalized)
        return *normed, routing.weights_tk  # of almost equal experts either is right

    def definition(sum_: PartialSum, weight_h: Tensor, router_eh: Tensor) -> Outputs:
        normed_th, total_th = reference.norm(sum_, weight_h, None, _EPS, rms=True)
        return normed_th, total_th, reference.route(normed_th, router_eh, mixture.top_k, mixture.normalized).weights_tk

    def make() -> Call:
        router_eh = setting.draw(mixture.num_experts, hidden, scale=hidden**-0.5)
        return _call(kernel, definition, _sum_of(setting, 1, 1), _gain(setting)[0], router_eh)

    return Case(
        op="norm_route",
        shape=f"1 row to {mixture.top_k} of {mixture.num_experts}",
        make=make,
        nbytes=(4 + mixture.num_experts) * hidden * setting.itemsize,
        tolerance=_norm_of_sum(setting),
    )


def _experts(setting: Setting, rows: int, *, ranks: int = 1, biases: bool = False) -> Case:
    """What the experts of the first of `ranks` ranks make of tokens that choose among all at random.

    With `biases`, the linear layers have some, and the gated unit is clamped.
    """
    mixture, hidden = _mixture(setting), setting.model.hidden_size
    size, top_k, inner = mixture.num_experts, mixture.top_k, mixture.inner_size

    def make() -> Call:
        x_th, router_eh = setting.draw(rows, hidden), setting.draw(size, hidden, scale=hidden**-0.5)
        gate_up = setting.draw(size // ranks, 2 * inner, hidden, scale=hidden**-0.5)
        down = setting.draw(size // ranks, hidden, inner, scale=inner**-0.5)
        widths = (2 * inner, hidden) if biases else ()
        drawn = (setting.draw(size // ranks, width) for width in widths)
        weights = PackedExperts(size // ranks, 0, gate_up, down, (), *drawn)
        bias_e = setting.draw(size) if biases else None
        routing = ops.route(x_th, router_eh, top_k, mixture.normalized, bias_e=bias_e)
        unit = GatedUnit("quick_gelu", 7.0, 1.0) if biases else GatedUnit("silu")
        return _call(ops.experts, reference.experts, x_th, weights, routing, unit)

    chosen = size / ranks * (1 - (1 - top_k / size) ** rows)
    pairs = rows * top_k / ranks
    return Case(
        op="experts" if ranks > 1 else "each_pair" if rows == 1 else "grouped",
        shape=f"{_rows(rows)}, {top_k} of {size} experts"
        + (f", {ranks} ranks" if ranks > 1 else "")
        + (", biases" if biases else ""),
        make=make,
        nbytes=(3 * chosen * inner + pairs + rows) * hidden * setting.itemsize,
        flops=6 * pairs * hidden * inner,
        # what lies between the products is rounded
        tolerance=4 * TOLERANCE[setting.dtype],
        waits=True,
    )


def _resolve_ids(setting: Setting, rows: int) -> Case:
    def make() -> Call:
        ids = torch.arange(rows, dtype=torch.int32, device=setting.device).sub_(rows)
        return _call(ops.resolve_ids, reference.resolve_ids, ids, setting.draw_ids(rows))

    return Case(op="resolve_ids", shape=_rows(rows), make=make, nbytes=12 * rows, tolerance=0)


def _greedy(setting: Setting, rows: int) -> Case:
    vocab = setting.model.vocab_size

    def make() -> Call:
        return _call(ops.greedy, reference.greedy, setting.draw(rows, vocab, scale=3))

    nbytes = rows * vocab * setting.itemsize
    return Case(op="greedy", shape=f"{_rows(rows)} of {vocab}", make=make, nbytes=nbytes, tolerance=0)


def _draw(setting: Setting, rows: int) -> Case:
    vocab = setting.model.vocab_size

    def make() -> Call:
        draws = Draws.of(
            temperature=[1.0] * rows,
            top_k=[0] * rows,
            top_p=[0.9] * rows,
            min_p=[0.0] * rows,
            point=torch.rand(rows).tolist(),
            device=setting.device,
        )
        return _call(ops.draw, reference.draw, setting.draw(rows, vocab, scale=3), draws)

    return Case(
        op="draw",
        shape=f"{_rows(rows)} of {vocab}, top-p 0.9",
        make=make,
        nbytes=rows * vocab * setting.itemsize,
        tolerance=_DIFFERING_DRAWS,
        waits=True,
    )


_SEQUENCE = 192
"""Tokens of a sequence with penalties, two thirds of them its prompt's."""


def _token_counts(setting: Setting, rows: int) -> TokenCounts:
    vocab = setting.model.vocab_size
    counts = TokenCounts.empty(rows, 2 * _SEQUENCE, setting.device)
    tokens = np.random.default_rng(0).integers(vocab, size=(rows, _SEQUENCE))
    counts.load(range(rows), [(row[: 2 * _SEQUENCE // 3], row[2 * _SEQUENCE // 3 :]) for row in tokens])
    return counts


def _edit_logits(setting: Setting, rows: int) -> Case:
    vocab = setting.model.vocab_size

    def make() -> Call:
        edits, rng = EditList(), np.random.default_rng(1)
        for row in range(rows):
            edits.add(
                row,
                slot=row,
                penalties=(1.1, 0.5, 0.5),
                bias_ids=rng.permutation(vocab)[:20].astype(np.int32),
                biases=np.ones(20, np.float32),
                bans=Bans(rng.integers(vocab, size=20, dtype=np.int32), np.full(20, -1, np.int32)),
                chosen=0,
            )
        logits_rv, chosen_r = setting.draw(rows, vocab, scale=3), setting.draw_ids(1)
        on_device, counts = edits.to(setting.device), _token_counts(setting, rows)
        return _call(ops.edit_logits, reference.edit_logits, logits_rv, on_device, counts, chosen_r)

    return Case(
        op="edit_logits",
        shape=f"{_rows(rows)} of {vocab}",
        make=make,
        nbytes=rows * vocab * (setting.itemsize + 4),
        waits=True,
    )


def _count_tokens(setting: Setting, rows: int) -> Case:
    def make() -> Call:
        slots_r = torch.arange(rows, dtype=torch.int32, device=setting.device)
        tokens_r = setting.draw_ids(rows)

        def run(count: Callable[[TokenCounts, Tensor, Tensor], None], counts: TokenCounts) -> Tensor:
            count(counts, slots_r, tokens_r)
            return counts.sizes_s  # a token that is there already leaves them as they are

        counts = [_token_counts(setting, rows) for _ in range(3)]
        return Call(
            partial(run, ops.count_tokens, counts[0]),
            partial(run, reference.count_tokens, counts[1]),
            partial(run, reference.count_tokens, counts[2]),
        )

    nbytes = rows * 4 * (_SEQUENCE + 3)
    return Case(op="count_tokens", shape=_rows(rows), make=make, nbytes=nbytes, tolerance=0, waits=True)


def _mask_logits(setting: Setting, rows: int) -> Case:
    vocab = setting.model.vocab_size
    words = -(-vocab // 32)

    def make() -> Call:
        masks_kw = torch.randint(-(2**31), 2**31, (rows, words), dtype=torch.int32, device=setting.device)
        index_r = torch.arange(rows, dtype=torch.int32, device=setting.device)
        return _call(ops.mask_logits, reference.mask_logits, setting.draw(rows, vocab, scale=3), index_r, masks_kw)

    nbytes = rows * (2 * vocab * setting.itemsize + 4 * words)
    return Case(op="mask_logits", shape=f"{_rows(rows)} of {vocab}", make=make, nbytes=nbytes, tolerance=0, waits=True)


def _top_logprobs(setting: Setting, rows: int) -> Case:
    vocab = setting.model.vocab_size

    def without_ids(op: Callable[[Tensor, Tensor, int], TopLogprobs], *inputs: Any) -> Outputs:
        return op(*inputs)[:3]  # among equal logits the definition names any

    def make() -> Call:
        logits_rv, tokens_r = setting.draw(rows, vocab, scale=3), setting.draw_ids(rows)
        kernel, definition = partial(without_ids, ops.top_logprobs), partial(without_ids, reference.top_logprobs)
        return _call(kernel, definition, logits_rv, tokens_r, 5)

    nbytes = rows * vocab * setting.itemsize
    return Case(op="top_logprobs", shape=f"{_rows(rows)} of {vocab}, 5 best", make=make, nbytes=nbytes)


def _largest(setting: Setting, rows: int) -> Case:
    vocab, count = setting.model.vocab_size, 128

    def make() -> Call:
        return _call(ops.largest, reference.largest, setting.draw(rows, vocab, scale=3), count)

    nbytes = rows * vocab * setting.itemsize
    return Case(op="largest", shape=f"{_rows(rows)} of {vocab}, {count} best", make=make, nbytes=nbytes, waits=True)


_WIDTH = 4
"""Beams of a search."""


def _choose_beams(setting: Setting, count: int) -> Case:
    keep, beams_in_all = 2 * _WIDTH, count * _WIDTH
    of_all = [Search(s, s * _WIDTH, _WIDTH, _WIDTH, keep, s * _WIDTH, 0.0, (2,)) for s in range(count)]

    def make() -> Call:
        values_rk = -torch.rand(beams_in_all, keep).sort().values
        ids_rk = torch.randint(setting.model.vocab_size, (beams_in_all, keep), dtype=torch.int32)
        sums_sw = -torch.rand(count, _WIDTH, dtype=torch.float64)
        order_sw = torch.arange(_WIDTH, dtype=torch.int32).repeat(count, 1)

        def on(device: torch.device, choose: Callable[..., BeamChoice]) -> Run:
            searches = BeamSearches.of(of_all, device)
            values, ids, sums, order = (each.to(device) for each in (values_rk, ids_rk, sums_sw, order_sw))

            def run() -> Outputs:
                states = BeamStates(sums.clone(), order.clone())  # a choice changes them
                chosen_2b = torch.zeros(2, beams_in_all, dtype=torch.int32, device=device)
                choice = choose(states, searches, values, ids, chosen_2b, setting.model.vocab_size)
                return tuple(tensor.to(setting.device) for tensor in choice)

            return run

        definition = on(torch.device("cpu"), beams.choose_beams)
        return Call(on(setting.device, ops.choose_beams), definition, definition)

    shape, nbytes = f"{count} searches of {_WIDTH} beams", beams_in_all * keep * 8
    return Case(op="choose_beams", shape=shape, make=make, nbytes=nbytes, tolerance=0, waits=True)


def _move_beams(setting: Setting, count: int) -> Case:
    _, kv_heads, size = setting.heads
    whole, tail = 2, _BLOCK_SIZE // 2
    parents = [0, 0, 2, 2]
    places = [(row, row - row % _WIDTH, parents[row % _WIDTH], whole, tail) for row in range(count)]

    def make() -> Call:
        blocks = count * (whole + 1)
        caches = [cache for _ in range(_COPIED_CACHES // 2) for cache in setting.caches(blocks * _BLOCK_SIZE)]
        held, moves = BlockCaches.of(caches), BeamMoves.of(places, setting.device)
        tables_sn = torch.randperm(blocks, dtype=torch.int32, device=setting.device).view(count, -1)
        kept = torch.zeros(1, dtype=torch.int32, device=setting.device)

        def run(move: Callable[[BlockCaches, Tensor, BeamMoves, Tensor], None]) -> Outputs:
            move(held, tables_sn, moves, kept)
            return tables_sn, *(cache.view(-1, _BLOCK_SIZE, kv_heads, size)[:, :tail] for cache in held.tensors)

        kernel, definition = partial(run, ops.move_beams), partial(run, beams.move_beams)
        return Call(kernel, definition, lambda: tuple(each.float() for each in definition()))

    nbytes = 2 * _COPIED_CACHES * (count // 2) * tail * kv_heads * size * setting.itemsize
    shape = f"{count} beams, half of them moved, in {_COPIED_CACHES} caches"
    return Case(op="move_beams", shape=shape, make=make, nbytes=nbytes, tolerance=0, waits=True)
