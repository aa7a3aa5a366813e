import pytest
import torch
from transformers.models.bloom.modeling_bloom import build_alibi_tensor

from hasten.layers.position import alibi_slopes


@pytest.mark.parametrize("heads", range(1, 41))
def test_slopes_are_those_of_hugging_face(heads: int) -> None:
    # its bias is slope times position, so that at position 1 it is the slope
    bias = build_alibi_tensor(torch.ones(1, 2), heads, torch.float32)
    slopes = alibi_slopes(heads)
    assert slopes.dtype == torch.float32
    torch.testing.assert_close(slopes, bias[:, 0, 1], rtol=1e-6, atol=0)
    assert slopes.unique().numel() == heads
