"""What products do with their sums: bias, activation, and where the results go. Shapes: M rows, N output features.

An ending may need two output features at once: those of a head that turn together, or gate and up of a unit. A product
with PAIRS has them in neighbouring rows of its tile, whatever their places in the weight:

"gate": feature p with p + N / 2. "halves": within a head of D, of which the first R turn, i with i + R / 2.
"neighbours": 2i with 2i + 1, which the part of a head that does not turn has in any case.
"""

from dataclasses import dataclass
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from hasten.ops.cache_scales import CacheScales
from hasten.ops.gpu.activations import activated
from hasten.ops.gpu.eight_bits import in_cache


@dataclass(frozen=True)
class Projection:
    """Where the output features of a fused QKV product go: queries to the output, the rest to the caches."""

    queries: int
    key_cache: Tensor
    value_cache: Tensor
    slots_t: Tensor
    clip: float | None
    scales: CacheScales | None = None
    """Those of caches of 8 bits."""
    positions_t: Tensor | None = None
    table_pr: Tensor | None = None
    """Where queries and keys are rotated, see `HeadTransform`; both are given or none."""
    interleaved: bool = False

    @property
    def pairs(self) -> str | None:
        """Which features the kernel needs at once."""
        if self.table_pr is None:
            return None
        return "neighbours" if self.interleaved else "halves"


def targets(to: Projection | None, unused: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Caches, slots and the inverse scales of caches, as kernels take them; `unused` where they are not read."""
    if to is None:
        return unused, unused, unused, None
    return to.key_cache, to.value_cache, to.slots_t, None if to.scales is None else to.scales.inverses_2m


def widths(to: Projection | None) -> dict[str, Any]:
    """What kernels know of a projection when they are compiled: features of queries, of keys, and of a head."""
    if to is None:
        return {"CLIP": None, "Q": 0, "KV": 0, "D": 0}
    heads, size = to.key_cache.shape[2:]
    return {"CLIP": to.clip, "Q": to.queries, "KV": heads * size, "D": size}


@triton.jit
def store_projected(
    value, row, slot, n, valid, out, keys, values, inverses, Q: tl.constexpr, KV: tl.constexpr, D: tl.constexpr
):
    """Store output features n of a row: queries to `out`, keys and values to the row's slot of the caches.

    `inverses`: what the D features of each head are multiplied by before caches of 8 bits hold them.
    """
    kept = valid & (slot >= 0)
    tl.store(out + row.to(tl.int64) * Q + n, value, valid & (n < Q))
    if inverses is not None:
        inverse = tl.load(inverses + (n - Q) // D, (n >= Q) & (n < Q + 2 * KV), 0.0)
        value = in_cache(value, inverse, keys.dtype.element_ty)
    tl.store(keys + slot * KV + (n - Q), value, kept & (n >= Q) & (n < Q + KV))
    tl.store(values + slot * KV + (n - Q - KV), value, kept & (n >= Q + KV))


@triton.jit
def paired(i, N, PAIRS: tl.constexpr, D: tl.constexpr, R: tl.constexpr):
    """The output features of a tile's rows i: 2p and 2p + 1 are a pair."""
    pair, second = i // 2, i % 2
    if PAIRS == "gate":
        n = pair + second * (N // 2)
    elif PAIRS == "halves":
        dim = pair % (D // 2)
        n = i // D * D + tl.where(dim < R // 2, dim + second * (R // 2), 2 * dim + second)
    else:
        n = i
    return n


@triton.jit
def turns_of(table, position, pair, valid, Q: tl.constexpr, KV: tl.constexpr, D: tl.constexpr, R: tl.constexpr):
    """Cosines and sines of pairs at positions, and whether they turn: values and the rest of a head do not."""
    dim = pair % (D // 2)
    turn = valid & (dim < R // 2) & (2 * pair < Q + KV)
    start = table + position * R + dim
    return tl.load(start, turn, 1.0), tl.load(start + R // 2, turn, 0.0), turn


@triton.jit
def store_turned(
    even,
    odd,
    turns,
    pair,
    targets,
    out,
    keys,
    values,
    inverses,
    N,
    Q: tl.constexpr,
    KV: tl.constexpr,
    PAIRS: tl.constexpr,
    D: tl.constexpr,
    R: tl.constexpr,
):
    """Rotate both features of pairs in fp32, by `turns_of`, and store them as `store_projected` does.

    `targets`: their rows, slots, and which are there. What does not turn stays as it is, infinite or not.
    """
    cos, sin, turn = turns
    row, slot, valid = targets
    x, y = even.to(tl.float32), odd.to(tl.float32)
    even = tl.where(turn, (x * cos - y * sin).to(even.dtype), even)
    odd = tl.where(turn, (y * cos + x * sin).to(odd.dtype), odd)
    store_projected(even, row, slot, paired(2 * pair, N, PAIRS, D, R), valid, out, keys, values, inverses, Q, KV, D)
    store_projected(odd, row, slot, paired(2 * pair + 1, N, PAIRS, D, R), valid, out, keys, values, inverses, Q, KV, D)


@triton.jit
def store_sums(
    total,
    m,
    n,
    M,
    N,
    bias,
    out,
    keys,
    values,
    slots,
    inverses,
    SPLITS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    CLIP: tl.constexpr,
    Q: tl.constexpr,
    KV: tl.constexpr,
    D: tl.constexpr,
):
    """Store the sums [n, m] of a tile: those of a split as they are, others with all that comes behind a product."""
    valid = (m < M)[None, :] & (n < N)[:, None]
    if SPLITS > 1:
        base = out + tl.program_id(1).to(tl.int64) * M * N
        tl.store(base + m[None, :].to(tl.int64) * N + n[:, None], total, valid)
    else:
        if HAS_BIAS:
            total += tl.load(bias + n, n < N, 0.0).to(tl.float32)[:, None]
        if ACTIVATION is not None:
            total = activated(total, ACTIVATION)
        if CLIP is not None:
            total = tl.clamp(total, -CLIP, CLIP, propagate_nan=tl.PropagateNan.ALL)
        value = total.to(out.dtype.element_ty)
        if KV:
            slot = tl.load(slots + m, m < M, -1).to(tl.int64)
            store_projected(value, m[None, :], slot[None, :], n[:, None], valid, out, keys, values, inverses, Q, KV, D)
        else:
            tl.store(out + m[None, :].to(tl.int64) * N + n[:, None], value, valid)
