"""Attention over whole texts, by the flash attention that torch brings.

Texts lie in the batch end to end, so that nothing is padded, and keys and values are read where the projection left
them. Shapes: t tokens, n query heads, m key/value heads, d head size.
"""

from functools import cache
from itertools import accumulate

import torch
from torch import Tensor

from hasten.ops.meta import AttentionMeta
from hasten.ops.transfer import to_device

_LARGEST_HEAD, _HEAD_STEP = 256, 8
_LEAST_CAPABILITY = (8, 0)


def has_text_attention(like: Tensor) -> bool:
    """See `hasten.ops.has_text_attention`."""
    size = like.shape[-1]
    fits = size <= _LARGEST_HEAD and size % _HEAD_STEP == 0 and like.dtype in (torch.float16, torch.bfloat16)
    return fits and _has_flash_attention(like.device.index)


@cache
def _has_flash_attention(device: int) -> bool:
    capable = torch.cuda.get_device_capability(device) >= _LEAST_CAPABILITY
    return capable and torch.backends.cuda.is_flash_attention_available()


def text_attention(query_tnd: Tensor, key_tmd: Tensor, value_tmd: Tensor, meta: AttentionMeta, scale: float) -> Tensor:
    """See `hasten.ops.text_attention`."""
    ends = meta.scratch.get("texts")
    if ends is None:
        bounds = [0, *accumulate(meta.query_lens)]
        ends = meta.scratch["texts"] = to_device(bounds, torch.int32, query_tnd.device), max(meta.query_lens)
    bounds_s, longest = ends
    out_tnd: Tensor = torch.ops.aten._flash_attention_forward(
        query_tnd, key_tmd, value_tmd, bounds_s, bounds_s, longest, longest, 0.0, False, False, scale=scale
    )[0]
    return out_tnd
