"""What products do with their sums: bias, activation, and where the results go. Shapes: M rows, N output features."""

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
