"""What products do with their sums: bias, activation, and where the results go. Shapes: M rows, N output features."""

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from hasten.ops.gpu.activations import activated


@dataclass(frozen=True)
class Projection:
    """Where the output features of a fused QKV product go: queries to the output, the rest to the caches."""

    queries: int
    key_cache: Tensor
    value_cache: Tensor
    slots_t: Tensor
    clip: float | None

    @property
    def width(self) -> int:
        """Features of the keys, and of the values."""
        return self.key_cache.shape[2] * self.key_cache.shape[3]


@triton.jit
def store_projected(value, row, slot, n, valid, out, keys, values, Q: tl.constexpr, KV: tl.constexpr):
    """Store output features n of a row: queries to `out`, keys and values to the row's slot of the caches."""
    kept = valid & (slot >= 0)
    tl.store(out + row.to(tl.int64) * Q + n, value, valid & (n < Q))
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
    SPLITS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    CLIP: tl.constexpr,
    Q: tl.constexpr,
    KV: tl.constexpr,
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
            store_projected(value, m[None, :], slot[None, :], n[:, None], valid, out, keys, values, Q, KV)
        else:
            tl.store(out + m[None, :].to(tl.int64) * N + n[:, None], value, valid)
