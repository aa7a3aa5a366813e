"""Attention of long prompts for two query heads with the same keys, by warp groups with tasks of their own.

One warp brings gathered keys and values; each of two groups of four warps multiplies the queries of a head with them.
While weights of one block of keys are multiplied with its values, exponents of the next block's scores are computed,
and what one group does not use of the matrix units the other one does. Needs a device whose warp groups multiply from
shared memory (compute capability 9.0). Source of the division of work: Shah et al., "FlashAttention-3", 2024.
Shapes: m queries of a tile, n keys of a block, d head size.
"""

from torch import Tensor
from triton import knobs
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from hasten.ops.gpu.launch import has_warp_groups
from hasten.ops.plan import GATHERED_KEYS, TILE, TILE_COLUMNS

_FAR = gl.constexpr(-(2.0**100))
"""Below every score, finite, and a power of two: scaled it is exact, so that a multiplication and subtraction in one
instruction of two of them is 0 and its exponent 1, not infinite."""
_TILE = gl.constexpr(TILE)
_BLOCK_N, _STAGES = GATHERED_KEYS, 2
"""Keys of a block, and blocks of keys and of values in shared memory: measured, docs/performance-log.md."""
_REGISTERS, _FEW_REGISTERS = 240, 24
"""Of a thread that multiplies, and of one that brings."""
_sync = gl.thread_barrier if hasattr(gl, "thread_barrier") else gl.barrier  # the name before triton 3.7, and since


@gluon.jit
def _bring(
    keys,
    values,
    shared,
    row,
    blocks,
    BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
):
    """Blocks of keys and values from the last to the first, each into memory that both groups have left."""
    held_keys, held_values, keys_came, keys_left, values_came, values_left = shared
    for block in range(blocks):
        stage = block % STAGES
        left = (block // STAGES & 1) ^ 1
        start = row + (blocks - 1 - block) * BLOCK_N
        mbarrier.wait(keys_left.index(stage), left)
        mbarrier.expect(keys_came.index(stage), keys.block_type.nbytes)
        tma.async_copy_global_to_shared(keys, [start, 0], keys_came.index(stage), held_keys.index(stage))
        mbarrier.wait(values_left.index(stage), left)
        mbarrier.expect(values_came.index(stage), values.block_type.nbytes)
        tma.async_copy_global_to_shared(values, [start, 0], values_came.index(stage), held_values.index(stage))


@gluon.jit
def _causal(score_mn, start, position, BLOCK_N: gl.constexpr, SCORES: gl.constexpr):
    """Scores of keys from `start` on, far below all others where queries from `position` on do not see them."""
    n = start + gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, SCORES))
    m = position + gl.arange(0, _TILE, layout=gl.SliceLayout(1, SCORES))
    return gl.where(gl.expand_dims(n, 0) <= gl.expand_dims(m, 1), score_mn, _FAR)


@gluon.jit
def _before_waiting(x):
    """`x`, which is not negative, as something that is computed before what follows.

    The compiler would wait for a product before it computes exponents beneath it, unless memory might depend on them.
    """
    return gl.inline_asm_elementwise(
        "{.reg .pred p; .reg .b32 a; mov.b32 a, 0; setp.lt.f32 p, $1, 0f00000000;"
        "@p st.volatile.shared.f32 [a], $1; mov.f32 $0, $1;}",
        "=f,f",
        [x],
        dtype=gl.float32,
        is_pure=False,
        pack=1,
    )


@gluon.jit
def _absorbed(
    query_md,
    shared,
    block,
    blocks,
    sum_md,
    p_mn,
    weight_m,
    top_m,
    position,
    scale,
    BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
    MASKED: gl.constexpr,
    SCORES: gl.constexpr,
    SUMS: gl.constexpr,
):
    """The softmax so far: sums with the block before added, weights and tops with this one, and its p [m, n]."""
    held_keys, held_values, keys_came, keys_left, values_came, values_left = shared
    stage, before = block % STAGES, (block - 1) % STAGES
    mbarrier.wait(keys_came.index(stage), block // STAGES & 1)
    nothing = gl.zeros([_TILE, BLOCK_N], gl.float32, SCORES)
    keys_dn = held_keys.index(stage).permute((1, 0))
    score_mn = warpgroup_mma(query_md, keys_dn, nothing, use_acc=False, is_async=True)
    mbarrier.wait(values_came.index(before), (block - 1) // STAGES & 1)
    sum_md = warpgroup_mma(p_mn, held_values.index(before), sum_md, is_async=True)
    score_mn = warpgroup_mma_wait(1, deps=[score_mn])
    mbarrier.arrive(keys_left.index(stage), count=1)
    if MASKED:
        score_mn = _causal(score_mn, (blocks - 1 - block) * BLOCK_N, position, BLOCK_N, SCORES)
    new_m = gl.maximum(top_m, gl.max(score_mn, 1) * scale)
    decay_m = gl.exp2(top_m - new_m)
    exponential_mn = gl.exp2(score_mn * scale - gl.expand_dims(new_m, 1))
    weight_m = _before_waiting(weight_m * decay_m + gl.sum(exponential_mn, 1))
    sum_md = warpgroup_mma_wait(0, deps=[sum_md])
    mbarrier.arrive(values_left.index(before), count=1)
    sum_md = sum_md * gl.expand_dims(gl.convert_layout(decay_m, gl.SliceLayout(1, SUMS)), 1)
    p_mn = gl.convert_layout(exponential_mn.to(held_values.dtype), p_mn.type.layout)
    return sum_md, p_mn, weight_m, new_m


@gluon.jit
def _multiply(
    query,
    out,
    held_query,
    shared,
    numbers,
    OUT_STRIDE: gl.constexpr,
    D: gl.constexpr,
    BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
):
    """A tile of queries of one head: `query` and `out` are where its first ones begin.

    Every query sees all keys of the first `whole` of `blocks`.
    """
    held_keys, held_values, keys_came, keys_left, values_came, _ = shared
    query_stride, count, position, blocks, whole, scale, value_scale = numbers
    scores: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    sums: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    left: gl.constexpr = gl.DotOperandLayout(0, sums, 2)
    rows: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    m = gl.expand_dims(gl.arange(0, _TILE, layout=gl.SliceLayout(1, rows)), 1)
    d = gl.expand_dims(gl.arange(0, D, layout=gl.SliceLayout(0, rows)), 0)
    held_query.store(gl.load(query + m.to(gl.int64) * query_stride + d, m < count, 0.0))
    fence_async_shared()
    _sync()
    mbarrier.wait(keys_came.index(0), 0)
    nothing = gl.zeros([_TILE, BLOCK_N], gl.float32, scores)
    score_mn = warpgroup_mma(held_query, held_keys.index(0).permute((1, 0)), nothing, use_acc=False, is_async=True)
    score_mn = warpgroup_mma_wait(0, deps=[score_mn])
    mbarrier.arrive(keys_left.index(0), count=1)
    score_mn = _causal(score_mn, (blocks - 1) * BLOCK_N, position, BLOCK_N, scores)
    top_m = gl.max(score_mn, 1) * scale
    exponential_mn = gl.exp2(score_mn * scale - gl.expand_dims(top_m, 1))
    weight_m = gl.sum(exponential_mn, 1)
    p_mn = gl.convert_layout(exponential_mn.to(held_values.dtype), left)
    sum_md = gl.zeros([_TILE, D], gl.float32, sums)
    for block in range(1, blocks - whole):
        sum_md, p_mn, weight_m, top_m = _absorbed(
            held_query, shared, block, blocks, sum_md, p_mn, weight_m, top_m, position, scale, BLOCK_N, STAGES, True,
            scores, sums,
        )  # fmt: skip
    for block in range(gl.maximum(1, blocks - whole), blocks):
        sum_md, p_mn, weight_m, top_m = _absorbed(
            held_query, shared, block, blocks, sum_md, p_mn, weight_m, top_m, position, scale, BLOCK_N, STAGES, False,
            scores, sums,
        )  # fmt: skip
    last = blocks - 1
    mbarrier.wait(values_came.index(last % STAGES), last // STAGES & 1)
    sum_md = warpgroup_mma(p_mn, held_values.index(last % STAGES), sum_md, is_async=True)
    sum_md = warpgroup_mma_wait(0, deps=[sum_md])
    # a weight is at least 1, that of the greatest score
    factor_m = gl.convert_layout(value_scale / weight_m, gl.SliceLayout(1, sums))
    m = gl.expand_dims(gl.arange(0, _TILE, layout=gl.SliceLayout(1, sums)), 1)
    d = gl.expand_dims(gl.arange(0, D, layout=gl.SliceLayout(0, sums)), 0)
    value_md = (sum_md * gl.expand_dims(factor_m, 1)).to(out.dtype.element_ty)
    gl.store(out + m.to(gl.int64) * OUT_STRIDE + d, value_md, m < count)


@gluon.jit(do_not_specialize=["first_head"])
def _pair(
    query,
    keys,
    values,
    scales,
    items,
    out,
    query_stride,
    gathered,
    first_head,
    scale,
    HEADS: gl.constexpr,
    GROUP: gl.constexpr,
    D: gl.constexpr,
    BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
    COLUMNS: gl.constexpr,
    REGISTERS: gl.constexpr,
    FEW_REGISTERS: gl.constexpr,
):
    """A tile of a sequence's queries, of two heads, against all gathered keys that they see: see `_long_tile`."""
    own_head = gl.program_id(0) * 2
    head = first_head + own_head
    item = items + gl.program_id(1) * COLUMNS
    row = own_head // GROUP * gathered + gl.load(item)
    query_row = gl.load(item + 1).to(gl.int64)
    out_row = gl.load(item + 2).to(gl.int64)
    count = gl.load(item + 3)
    position = gl.load(item + 4)
    # Queries of a dry run may come before all keys, and positions are negative. Of no block, nobody would bring any.
    blocks = gl.maximum(position + count + BLOCK_N - 1, BLOCK_N) // BLOCK_N
    whole = gl.maximum(position + 1, 0) // BLOCK_N
    value_scale = 1.0
    if scales is not None:
        scale *= gl.load(scales + head // GROUP)
        value_scale = gl.load(scales + (HEADS + head) // GROUP)
    dtype: gl.constexpr = keys.dtype
    layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([_TILE, D], dtype)
    held_query = gl.allocate_shared_memory(dtype, [2, _TILE, D], layout)
    held_keys = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_N, D], keys.layout)
    held_values = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_N, D], values.layout)
    keys_came = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    keys_left = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    values_came = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    values_left = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(keys_came.index(stage), count=1)
        mbarrier.init(values_came.index(stage), count=1)
        mbarrier.init(keys_left.index(stage), count=2)
        mbarrier.init(values_left.index(stage), count=2)
    fence_async_shared()
    first = query + query_row * query_stride + head * D
    target = out + (out_row * HEADS + head) * D
    shared = held_keys, held_values, keys_came, keys_left, values_came, values_left
    numbers = query_stride, count, position, blocks, whole, scale, value_scale
    gl.warp_specialize(
        [
            (_multiply, (first, target, held_query.index(0), shared, numbers, HEADS * D, D, BLOCK_N, STAGES)),
            (_multiply, (first + D, target + D, held_query.index(1), shared, numbers, HEADS * D, D, BLOCK_N, STAGES)),
            (_bring, (keys, values, shared, row, blocks, BLOCK_N, STAGES)),
        ],
        [4, 1],
        [REGISTERS, FEW_REGISTERS],
    )


def serves(query_tnd: Tensor, group: int, width: int) -> bool:
    """Whether `attend_pairs` may be used for queries in groups of heads of a padded size."""
    fits = group % 2 == 0 and width == query_tnd.shape[2] and width in (64, 128) and query_tnd.itemsize == 2
    return fits and not knobs.runtime.interpret and has_warp_groups(query_tnd.device.index)


def attend_pairs(
    query_tnd: Tensor,
    gathered_kvd: Tensor,
    scales_2m: Tensor | None,
    long_tiles: Tensor,
    out_tnd: Tensor,
    *,
    gathered: int,
    first_head: int,
    heads: int,
    group: int,
    scale: float,
) -> None:
    """Attention of long tiles for `heads` query heads from `first_head` on, into their rows of `out_tnd` [t, n, d].

    `gathered_kvd`: their keys and values [2, heads / group * gathered, d]; `scale` is that of powers of two.
    """
    width = query_tnd.shape[2]
    layout = gl.NVMMASharedLayout.get_default_for([_BLOCK_N, width], gl.float16)  # that of all types of 16 bits
    keys, values = (TensorDescriptor.from_tensor(each, [_BLOCK_N, width], layout) for each in gathered_kvd)
    _pair[(heads // 2, len(long_tiles))](
        query_tnd, keys, values, scales_2m, long_tiles, out_tnd, query_tnd.stride(0), gathered, first_head, scale,
        HEADS=query_tnd.shape[1], GROUP=group, D=width, BLOCK_N=_BLOCK_N, STAGES=_STAGES, COLUMNS=TILE_COLUMNS,
        REGISTERS=_REGISTERS, FEW_REGISTERS=_FEW_REGISTERS, num_warps=4,
    )  # fmt: skip
