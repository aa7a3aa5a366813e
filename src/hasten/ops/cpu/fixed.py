"""Products, activations and attention of the CPU in a fixed order: a row's result has the same bits in any batch.

What a library does to a row depends on the shape of the whole operand, so it is given few shapes: products of rows in
pieces of a few sizes, attention of 16 queries at a time against runs of keys of one length. Element by element, only
functions are used whose values do not depend on where an element stands: torch computes sigmoid, silu and gelu in two
ways, in whole vectors and behind them. Shapes: t tokens, h input features, o output features, b runs of queries, n
heads, m key/value heads, q queries, k keys, d head size.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention
from torch import Tensor

from hasten.ops.packed import PackedLinear

QUERIES = 16
"""Queries of one sequence in one attention call, with padding."""
RUN = 64
"""Keys that are multiplied at a time."""
_PIECES = (256, 64, 16)
"""Rows of one product."""

_agreed: dict[tuple[int, int, bool, bool, int], bool] = {}


def product(x_th: Tensor, weight: PackedLinear) -> Tensor:
    """`x @ weight.T` of fp32: [t, o]."""
    rows = x_th.shape[0]
    if rows == 0:
        return x_th.new_empty(0, weight.out_features)
    padded_th = F.pad(x_th, (0, 0, 0, -rows % _PIECES[-1]))
    out_to = _in_pieces(padded_th, weight, _PIECES if _agree(weight) else _PIECES[-1:])
    return out_to[:rows]


def _in_pieces(x_th: Tensor, weight: PackedLinear, sizes: tuple[int, ...]) -> Tensor:
    pieces, start = [], 0
    for size in sizes:
        while start + size <= x_th.shape[0]:
            pieces.append(_multiplied(x_th[start : start + size], weight))
            start += size
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


def _multiplied(x_th: Tensor, weight: PackedLinear) -> Tensor:
    if weight.blocked is None:
        assert weight.plain is not None
        return F.linear(x_th, weight.plain)
    product: Tensor = torch.ops.mkldnn._linear_pointwise(x_th, weight.blocked, None, "none", [], "")
    return product


def _agree(weight: PackedLinear) -> bool:
    """Whether pieces of all sizes give the same bits for weights of this shape, here and with this number of threads.

    The library adds up in the same order for all of them on every CPU that was tried; where it does not, all rows go
    in pieces of the smallest size.
    """
    by_row = weight.plain is not None and weight.plain.is_contiguous()
    key = (weight.out_features, weight.in_features, weight.blocked is None, by_row, torch.get_num_threads())
    if key not in _agreed:
        generator = torch.Generator().manual_seed(0)
        x_th = torch.randn(_PIECES[0], weight.in_features, generator=generator)
        products = [_in_pieces(x_th, weight, (size,)) for size in _PIECES]
        _agreed[key] = all(torch.equal(products[0], other) for other in products[1:])
    return _agreed[key]


def activated(x: Tensor, name: str) -> Tensor:
    """An activation by its name: see `hasten.ops.reference.activated`."""
    return _ACTIVATIONS[name](x)


def sigmoid(x: Tensor) -> Tensor:
    """The logistic function."""
    return torch.neg(x).exp_().add_(1).reciprocal_()


def _gelu_tanh(x: Tensor) -> Tensor:
    inner = x.square().mul_(x).mul_(0.044715).add_(x)
    return x * sigmoid(inner.mul_(1.5957691216057308))


_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": lambda x: x * sigmoid(x),
    "gelu": lambda x: torch.erf(x * 0.7071067811865476).add_(1).mul_(x).mul_(0.5),
    "gelu_tanh": _gelu_tanh,
    "quick_gelu": lambda x: x * sigmoid(x * 1.702),
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
}


def attend(
    query_bqnd: Tensor,
    key_bkmd: Tensor,
    value_bkmd: Tensor,
    bias: Tensor,
    scale: float,
    softcap: float | None,
    sinks_n: Tensor | None,
    run: int,
) -> Tensor:
    """Attention of `QUERIES` queries per run over a multiple of `run` keys: [b, q, n, d]; `bias` is [b, n or 1, q, k].

    Keys that a query does not see have a weight of exactly 0, and what is 0 changes no sum, so it makes no difference
    how many of them there are.
    """
    (runs, queries, heads, size), kv_heads = query_bqnd.shape, key_bkmd.shape[2]
    rows = heads // kv_heads * queries
    query_xrd = query_bqnd.transpose(1, 2).reshape(runs * kv_heads, rows, size)
    keys, values = ([_by_head(part) for part in cache.split(run, dim=1)] for cache in (key_bkmd, value_bkmd))
    scores = torch.cat([query_xrd.bmm(key_xkd.transpose(1, 2)) for key_xkd in keys], dim=2)
    scores = scores.mul_(scale) if softcap is None else scores.mul_(scale / softcap).tanh_().mul_(softcap)
    weights = _weights(scores.view(runs, heads, queries, -1).add_(bias), sinks_n).view(runs * kv_heads, rows, -1)
    out_xrd = torch.zeros_like(query_xrd)
    for weights_xrk, value_xkd in zip(weights.split(run, dim=2), values, strict=True):
        out_xrd += weights_xrk.contiguous().bmm(value_xkd)
    return out_xrd.view(runs, heads, queries, size).transpose(1, 2)


def _weights(scores_bnqk: Tensor, sinks_n: Tensor | None) -> Tensor:
    """The softmax of scores, and of a head's sink in the place of a whole run before them, which is dropped."""
    if sinks_n is None:
        return scores_bnqk.softmax(-1)
    before_bnqr = scores_bnqk.new_full((*scores_bnqk.shape[:3], RUN), float("-inf"))
    before_bnqr[..., 0] = sinks_n.float().view(-1, 1)
    return torch.cat((before_bnqr, scores_bnqk), dim=-1).softmax(-1)[..., RUN:].contiguous()


def _by_head(part_bkmd: Tensor) -> Tensor:
    """Keys or values of a run, one matrix per key/value head: [b * m, k, d]."""
    return part_bkmd.transpose(1, 2).flatten(0, 1).contiguous()
