"""Attention over whole texts. Shapes: t tokens, n query heads, m key/value heads, d head size."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from hasten import ops
from hasten.ops import AttentionMeta, reference

pytestmark = pytest.mark.gpu
Close = Callable[[str, Tensor, Tensor], None]


def meta_of(lengths: list[int]) -> AttentionMeta:
    nothing = torch.empty(0, dtype=torch.int32)
    return AttentionMeta(
        num_tokens=sum(lengths),
        block_tables=nothing,
        slot_mapping=nothing,
        sequences=list(range(len(lengths))),
        query_lens=lengths,
        kv_lens=lengths,
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("lengths", [[1], [1, 2, 15, 16, 17, 1], [64, 300, 63, 65], [512, 3, 129]])
@pytest.mark.parametrize(("heads", "kv_heads", "size"), [(3, 3, 64), (4, 2, 32), (2, 1, 128)])
def test_attention_over_texts(
    heads: int, kv_heads: int, size: int, lengths: list[int], dtype: torch.dtype, assert_close: Close
) -> None:
    torch.manual_seed(0)
    width, meta = (heads + 2 * kv_heads) * size, meta_of(lengths)
    fused = torch.randn(meta.num_tokens, width, device="cuda", dtype=dtype).unflatten(1, (-1, size))
    query, key, value = fused.split((heads, kv_heads, kv_heads), dim=1)
    assert ops.has_text_attention(query)
    for scale in (size**-0.5, 0.3):
        expected = reference.text_attention(query.float(), key.float(), value.float(), meta, scale)
        assert_close("tile", ops.text_attention(query, key, value, meta, scale), expected)


def test_what_it_is_not_for() -> None:
    for dtype, size in ((torch.float32, 64), (torch.float16, 12), (torch.float16, 264)):
        assert not ops.has_text_attention(torch.empty(1, 1, size, device="cuda", dtype=dtype))
