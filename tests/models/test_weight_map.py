from pathlib import Path

import pytest
import torch

from hasten.checkpoint.plan import open_checkpoint
from hasten.checkpoint.sources import read_hf_config
from hasten.models.bloom import BloomForCausalLM
from hasten.models.registry import model_class
from hasten.parallel.groups import TensorGroup, use_group
from hasten.parallel.shard import shard_shape, split

MODELS = ["tiny_bloom", "tiny_bloom_12_heads", "tiny_bloom_untied", "tiny_bloom_post_norm", "tiny_bloom_odd_vocab"]


@pytest.fixture(params=MODELS)
def folder(request: pytest.FixtureRequest) -> Path:
    found: Path = request.getfixturevalue(request.param)
    return found


@pytest.mark.parametrize("size", [1, 2, 4])
def test_the_map_names_every_parameter_of_the_model_with_its_shape(folder: Path, size: int) -> None:
    config = read_hf_config(folder)
    with use_group(TensorGroup(rank=size - 1, size=size)), torch.device("meta"):
        model = model_class(config.architecture)(config)
    rows = BloomForCausalLM.weight_map(config).expand(config.num_layers)
    mapped = {row.ours: shard_shape(row.shape(config), row.split, size) for row in rows}
    assert mapped == {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def test_names_and_shapes_are_those_of_hugging_face(folder: Path) -> None:
    from transformers import BloomForCausalLM as Reference

    model = Reference.from_pretrained(folder)
    config = read_hf_config(folder)
    weight_map = BloomForCausalLM.weight_map(config)
    mapped = {
        row.hf if row.hf in weight_map.hf_unprefixed else weight_map.hf_prefix + row.hf: row.shape(config)
        for row in weight_map.expand(config.num_layers)
    }
    assert mapped == {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def test_names_are_unique_and_in_the_order_of_the_model(tiny_bloom_untied: Path) -> None:
    config = read_hf_config(tiny_bloom_untied)
    rows = list(BloomForCausalLM.weight_map(config).expand(config.num_layers))
    for names in ([row.hf for row in rows], [row.ours for row in rows], [row.ft for row in rows]):
        assert len(set(names)) == len(names)
        assert not any("{" in name for name in names)
    layers = [int(row.ours.split(".")[1]) for row in rows if row.ours.startswith("layers.")]
    assert layers == sorted(layers)
    assert rows[0].ours == "embedding.weight"
    assert rows[-1].ours == "head.weight"


def test_layouts_are_inverse_and_shares_of_heads_need_only_their_run(tiny_bloom_12_heads: Path) -> None:
    config = open_checkpoint(tiny_bloom_12_heads).config
    attention = config.attention
    for row in BloomForCausalLM.weight_map(config).expand(1):
        whole = torch.randn(row.shape(config), generator=torch.Generator().manual_seed(0))
        ours = row.from_hf(whole, attention)
        assert torch.equal(row.to_hf(ours, attention), whole)
        for size in (1, 2, 3, 4):
            for rank in range(size):
                expected = split(ours, row.split, rank, size, attention)
                assert torch.equal(row.shard_from_hf(whole, rank, size, attention), expected)


def test_a_share_without_a_change_of_layout_is_a_view(tiny_bloom: Path) -> None:
    config = read_hf_config(tiny_bloom)
    for row in BloomForCausalLM.weight_map(config).expand(1):
        whole = torch.zeros(row.shape(config))
        share = row.shard_from_hf(whole, 0, 2, config.attention)
        is_view = share.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr()
        assert is_view == (not row.hf_by_head)
