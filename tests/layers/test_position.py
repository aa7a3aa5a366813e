from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.bloom.modeling_bloom import build_alibi_tensor
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.models.mpt.modeling_mpt import build_mpt_alibi_tensor

from hasten.core.model_config import RopeConfig
from hasten.layers.position import RopeTables, alibi_slopes, rope_table
from hasten.models.rope import rope_from_hf

MAX_POSITION, HEAD_SIZE = 64, 24
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
ROPES: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "llama3": {"rope_type": "llama3", **LLAMA3},
    "yarn": YARN,
    "yarn with betas": {**YARN, "beta_fast": 8.0, "beta_slow": 2.0, "truncate": False},
    "yarn with mscale": {**YARN, "mscale": 0.7, "mscale_all_dim": 0.3},
    "yarn with a factor of its own": {**YARN, "attention_factor": 0.9},
}


@pytest.mark.parametrize("heads", range(1, 41))
def test_slopes_are_those_of_hugging_face(heads: int) -> None:
    # its bias is slope times position, so that at position 1 it is the slope
    bias = build_alibi_tensor(torch.ones(1, 2), heads, torch.float32)
    slopes = alibi_slopes(heads)
    assert slopes.dtype == torch.float32
    torch.testing.assert_close(slopes, bias[:, 0, 1], rtol=1e-6, atol=0)
    assert slopes.unique().numel() == heads


@pytest.mark.parametrize("bias_max", [8, 16])
@pytest.mark.parametrize("heads", [1, 4, 6, 12, 32, 56])
def test_slopes_of_mpt(heads: int, bias_max: int) -> None:
    bias = build_mpt_alibi_tensor(heads, 2, bias_max)
    torch.testing.assert_close(alibi_slopes(heads, bias_max), -bias[:, 0, 0], rtol=1e-6, atol=0)


def theirs(values: dict[str, Any], length: int) -> torch.Tensor:
    """Cosines and sines of a sequence of this length, [length, width]."""
    config = LlamaConfig(
        hidden_size=2 * HEAD_SIZE,
        num_attention_heads=2,
        max_position_embeddings=MAX_POSITION,
        rope_parameters={"rope_theta": 500.0, **values},
    )
    rotary = LlamaRotaryEmbedding(config)
    cos, sin = rotary(torch.zeros(1, length, HEAD_SIZE), torch.arange(length).unsqueeze(0))
    return torch.cat((cos[0, :, : HEAD_SIZE // 2], sin[0, :, : HEAD_SIZE // 2]), dim=1)


@pytest.mark.parametrize("length", [1, 31, MAX_POSITION - 1, MAX_POSITION, MAX_POSITION + 1, 3 * MAX_POSITION])
@pytest.mark.parametrize("values", ROPES.values(), ids=list(ROPES))
def test_ropes_are_those_of_hugging_face(values: dict[str, Any], length: int) -> None:
    config = rope_from_hf({"rope_parameters": {"rope_theta": 500.0, **values}}, HEAD_SIZE, MAX_POSITION)
    # theirs are worked out in fp32: an angle of 192 radians is off by 1e-5 there
    torch.testing.assert_close(rope_table(config, length), theirs(values, length), rtol=0, atol=5e-5)


@pytest.mark.parametrize("name", [name for name in ROPES if name != "default"])
def test_every_kind_of_rope_differs_from_the_plain_one(name: str) -> None:
    length = MAX_POSITION + 1  # dynamic is plain for any shorter one
    config = rope_from_hf({"rope_parameters": {"rope_theta": 500.0, **ROPES[name]}}, HEAD_SIZE, MAX_POSITION)
    assert (rope_table(config, length) - theirs(ROPES["default"], length)).abs().max() > 0.01


def test_a_dynamic_rope_is_that_of_the_longest_sequence_for_all() -> None:
    """In transformers it changes while a sequence grows, and leaves the keys in the cache as they were."""
    config = rope_from_hf({"rope_parameters": {"rope_theta": 500.0, **ROPES["dynamic"]}}, HEAD_SIZE, MAX_POSITION)
    longest = 2 * MAX_POSITION
    whole = theirs(ROPES["dynamic"], longest)
    torch.testing.assert_close(rope_table(config, longest)[:7], whole[:7], rtol=0, atol=5e-5)
    assert (whole[:7] - theirs(ROPES["dynamic"], 7)).abs().max() > 0.01


def test_layers_with_one_rope_have_one_table() -> None:
    tables = RopeTables(9, torch.device("cpu"))
    first, other = RopeConfig(width=4), RopeConfig(width=4, theta=5.0)
    assert tables.of(first) is tables.of(RopeConfig(width=4))
    assert tables.of(first).shape == (9, 4)
    assert not torch.equal(tables.of(first), tables.of(other))


def test_angles_of_far_positions_are_exact() -> None:
    table = rope_table(RopeConfig(width=2), 100_001)
    expected = torch.tensor([100_000.0], dtype=torch.float64)
    torch.testing.assert_close(table[-1].double(), torch.cat((expected.cos(), expected.sin())), rtol=0, atol=1e-7)
