from pathlib import Path

import pytest
import torch
from torch import Tensor

from hasten.checkpoint.hugging_face import read_hf_config
from hasten.core.model_config import AttentionConfig, ModelConfig
from hasten.models.bloom import BloomForCausalLM
from hasten.models.registry import model_class
from hasten.models.weight_map import TRANSPOSED, WeightMap, WeightSpec, linear
from hasten.parallel.groups import ParallelGroups, TensorGroup
from hasten.parallel.shard import Split, shard_shape, split

MODELS = ["tiny_bloom", "tiny_bloom_12_heads", "tiny_bloom_untied", "tiny_bloom_post_norm", "tiny_bloom_odd_vocab"]


@pytest.fixture(params=MODELS)
def folder(request: pytest.FixtureRequest) -> Path:
    found: Path = request.getfixturevalue(request.param)
    return found


@pytest.mark.parametrize("size", [1, 2, 4])
def test_the_map_names_every_parameter_of_the_model_with_its_shape(folder: Path, size: int) -> None:
    config = read_hf_config(folder)
    with torch.device("meta"):
        model = model_class(config.architecture)(config, ParallelGroups(tensor=TensorGroup(size - 1, size)))
    mapped = {
        spec.name: shard_shape(spec.shape(config), spec.split, size, config.attention)
        for spec in BloomForCausalLM.weight_map(config).specs
    }
    assert mapped == {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def test_names_and_shapes_are_those_of_hugging_face(folder: Path) -> None:
    from transformers import BloomForCausalLM as Reference

    model = Reference.from_pretrained(folder)
    config = read_hf_config(folder)
    weight_map = BloomForCausalLM.weight_map(config)
    sources = [source for spec in weight_map.specs for source in spec.sources]
    mapped = {
        source.name if source.name in weight_map.hf_unprefixed else weight_map.hf_prefix + source.name: source.shape(
            config
        )
        for source in sources
    }
    assert mapped == {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def test_names_are_unique_and_in_the_order_of_the_model(tiny_bloom_untied: Path) -> None:
    config = read_hf_config(tiny_bloom_untied)
    specs = BloomForCausalLM.weight_map(config).specs
    for names in ([spec.stored_names for spec in specs], [spec.name for spec in specs]):
        assert len(set(names)) == len(names)
        assert not any("{" in name for name in names)
    layers = [int(spec.name.split(".")[1]) for spec in specs if spec.name.startswith("layers.")]
    assert layers == sorted(layers)
    assert specs[0].name == "embedding.weight"
    assert specs[-1].name == "head.weight"


def test_a_shard_from_a_file_is_that_of_the_whole_parameter(tiny_bloom_12_heads: Path) -> None:
    config = read_hf_config(tiny_bloom_12_heads)
    for spec in BloomForCausalLM.weight_map(config).specs:
        check_shards(spec, config, (1, 2, 3, 4))


def test_a_shard_without_a_change_of_layout_is_a_view(tiny_bloom: Path) -> None:
    config = read_hf_config(tiny_bloom)
    for spec in BloomForCausalLM.weight_map(config).specs:
        whole = torch.zeros(spec.shape(config))
        shard = spec.shard([whole], 0, 2, config.attention)
        is_view = shard.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr()
        assert is_view == (not spec.sources[0].layout.by_head)


CONFIG = ModelConfig(
    architecture="BloomForCausalLM",
    num_layers=1,
    hidden_size=24,
    intermediate_size=40,
    vocab_size=9,
    attention=AttentionConfig(num_heads=12, num_kv_heads=4, head_size=2),
)
QKV = linear("qkv", {"q": "query", "k": "kv", "v": "kv"}, "qkv", "hidden", Split.QKV, bias=True)
GATE_UP = linear("gate_up", {"gate": "inner", "up": "inner"}, "gate_up", "hidden", Split.GATE_UP, bias=True)
CONV = linear("up", {"c_fc": "inner"}, "inner", "hidden", Split.COLUMN, bias=True, layout=TRANSPOSED)
CONV_ROW = linear("down", {"c_proj": "hidden"}, "hidden", "inner", Split.ROW, bias=True, layout=TRANSPOSED)


def stored(spec: WeightSpec, config: ModelConfig) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(source.shape(config), generator=generator) for source in spec.sources]


def check_shards(spec: WeightSpec, config: ModelConfig, sizes: tuple[int, ...]) -> None:
    """Shards straight from the files are those of the whole parameter, of the shape that the model has."""
    tensors = stored(spec, config)
    whole = spec.shard(tensors, 0, 1, config.attention)
    assert tuple(whole.shape) == spec.shape(config)
    for size in sizes:
        for rank in range(size):
            found = spec.shard(tensors, rank, size, config.attention)
            assert tuple(found.shape) == shard_shape(spec.shape(config), spec.split, size, config.attention)
            assert torch.equal(found, split(whole, spec.split, rank, size, config.attention))


@pytest.mark.parametrize("spec", [*QKV, *GATE_UP, *CONV, *CONV_ROW], ids=lambda spec: str(spec.name))
def test_parameters_of_several_and_of_transposed_tensors(spec: WeightSpec) -> None:
    check_shards(spec, CONFIG, (1, 2, 4))
    tensors = stored(spec, CONFIG)
    whole = spec.shard(tensors, 0, 1, CONFIG.attention)
    if spec.sources[0].layout is TRANSPOSED and whole.dim() == 2:
        assert torch.equal(whole, tensors[0].t())
    else:
        assert torch.equal(whole, torch.cat(tensors))


def test_halves_of_a_gated_unit_are_divided_each_for_itself() -> None:
    gate, up = torch.arange(4.0), torch.arange(10.0, 14.0)
    attention = CONFIG.attention
    assert GATE_UP[1].shard([gate, up], 1, 2, attention).tolist() == [2, 3, 12, 13]


def test_known_leftovers_are_named_by_templates_of_a_layer() -> None:
    weight_map = WeightMap((), "model.", hf_ignored=("layers.{layer}.rotary_emb.inv_freq", "masked_bias"))
    for name in ("layers.0.rotary_emb.inv_freq", "layers.31.rotary_emb.inv_freq", "masked_bias"):
        assert weight_map.ignores(name)
    for name in ("layers.x.rotary_emb.inv_freq", "layers.0.rotary_emb-inv_freq", "a.masked_bias", "layers.1"):
        assert not weight_map.ignores(name)
    assert not WeightMap((), "model.").ignores("")
