"""Checkpoints of mixtures of experts, and tokens that choose in unusual ways, beside Hugging Face's own, in fp32."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.conftest import MakeModel
from tests.models.cases_experts import GPT_OSS, MIXTRAL, QWEN2, with_experts
from tests.models.conftest import BOUND, Worst
from tests.rank_shards import rank_shards

from hasten.checkpoint.convert import Conversion, convert
from hasten.checkpoint.hugging_face import read_hf_config
from hasten.checkpoint.plan import open_checkpoint
from hasten.checkpoint.sources import open_source
from hasten.core.errors import CheckpointError, ConfigError, UnsupportedError
from hasten.core.parallel_config import ParallelConfig
from hasten.models.gpt_oss import GptOssForCausalLM
from hasten.models.llama import LlamaForCausalLM
from hasten.models.qwen2_moe import Qwen2MoeForCausalLM

SMALL = {
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 500,
}
FAMILIES = {"Mixtral": MIXTRAL, "Qwen2Moe": QWEN2}


def stacked(folder: Path, out: Path) -> Path:
    """The same model with all experts of a layer in one tensor, as transformers has them in memory."""
    from transformers import AutoModelForCausalLM

    shutil.copytree(folder, out)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    save_file(model.state_dict(), out / "model.safetensors", metadata={"format": "pt"})
    return out


def tensors(folder: Path, rank: int = 0, size: int = 1, **options: Any) -> dict[str, torch.Tensor]:
    return rank_shards(open_checkpoint(folder, size), rank, size, **options)


@pytest.mark.parametrize("whole", [False, True], ids=["experts divided", "whole experts"])
@pytest.mark.parametrize("family", FAMILIES)
def test_experts_in_one_tensor_each_or_in_one_for_all(
    family: str, whole: bool, make_model: MakeModel, tmp_path: Path
) -> None:
    folder = make_model(family, **FAMILIES[family])
    other = stacked(folder, tmp_path / "stacked")
    assert any(name.endswith("experts.gate_up_proj") for name in load_file(other / "model.safetensors"))
    for rank in range(2):
        expected = tensors(folder, rank, 2, expert_parallel=whole)
        found = tensors(other, rank, 2, expert_parallel=whole)
        assert found.keys() == expected.keys()
        for name, tensor in found.items():
            assert torch.equal(tensor, expected[name]), name


def test_ranks_put_together_are_the_whole(make_model: MakeModel) -> None:
    folder = make_model("Mixtral", **MIXTRAL)
    state = load_file(folder / "model.safetensors")
    prefix = "model.layers.2.block_sparse_moe.experts"
    whole = tensors(folder)
    for expert in range(6):
        gate, up, down = (state[f"{prefix}.{expert}.{name}.weight"] for name in ("w1", "w3", "w2"))
        assert torch.equal(whole["layers.2.experts.gate_up"][expert], torch.cat([gate, up]))
        assert torch.equal(whole["layers.2.experts.down"][expert], down)
        parts = [tensors(folder, rank, 2) for rank in range(2)]
        for rank, part in enumerate(parts):
            rows = slice(40 * rank, 40 * rank + 40)
            assert torch.equal(part["layers.2.experts.gate_up"][expert], torch.cat([gate[rows], up[rows]]))
            assert torch.equal(part["layers.2.experts.down"][expert], down[:, rows])
        held = tensors(folder, expert // 3, 2, expert_parallel=True)
        assert torch.equal(held["layers.2.experts.down"][expert % 3], down)
        assert torch.equal(held["layers.2.experts.router"], whole["layers.2.experts.router"])


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_a_converted_mixture_serves_any_ranks_either_way(ranks: int, make_model: MakeModel, tmp_path: Path) -> None:
    folder = make_model("Qwen2Moe", **QWEN2)
    convert(Conversion(str(folder), str(tmp_path / "out"), ranks=ranks, format="safetensors"))
    out = tmp_path / "out" / f"{ranks}-gpu"
    assert open_source(out).config == open_source(folder).config
    for whole, sizes in ((False, (1, 2, 4)), (True, (1, 2))):
        for size in sizes:
            rank = size - 1
            expected = tensors(folder, rank, size, expert_parallel=whole)
            found = tensors(out, rank, size, expert_parallel=whole)
            assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
            assert found.keys() == expected.keys()


def test_all_tokens_choose_the_same_experts(make_model: MakeModel, worst_logit: Worst, tmp_path: Path) -> None:
    """All experts tie. Which of equals transformers chooses is open, so all are alike too; here they are the first."""
    folder = Path(shutil.copytree(make_model("Mixtral", **MIXTRAL), tmp_path / "changed"))
    state = load_file(folder / "model.safetensors")
    for name in state:
        if "block_sparse_moe" in name:
            alike = re.sub(r"experts\.\d", "experts.0", name)
            state[name] = torch.zeros_like(state[name]) if name.endswith("gate.weight") else state[alike].clone()
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    assert worst_logit(folder, [1, 2, 9, 40]) <= BOUND
    assert worst_logit(folder, [1, 9], max_num_seqs=1) <= BOUND  # a token a step, which leaves experts without any


def test_a_checkpoint_without_an_expert_is_refused(make_model: MakeModel, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(make_model("Mixtral", **MIXTRAL), tmp_path / "changed"))
    state = load_file(folder / "model.safetensors")
    del state["model.layers.1.block_sparse_moe.experts.3.w2.weight"]
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"lacks tensor 'layers.1.block_sparse_moe.experts.3.w2.weight'"):
        open_source(folder)


def test_experts_are_divided_by_their_inner_size_or_dealt_whole() -> None:
    config = Qwen2MoeForCausalLM.config_from_hf(
        SMALL | {"moe_intermediate_size": 24, "num_experts": 6, "shared_expert_intermediate_size": 64}
    )
    assert not config.has_mlp  # so that no intermediate size counts
    two, four = (ParallelConfig(tensor_parallel_size=size) for size in (2, 4))
    two.validate(config)
    four.validate(replace(config, intermediate_size=1))
    with pytest.raises(ConfigError, match=r"4 does not divide the MLP's inner size \(1\); .*: 1$"):
        four.validate(with_experts(replace(config, intermediate_size=1), dense_layers=(0,)))
    with pytest.raises(ConfigError, match=r"4 does not divide the experts' inner size \(6\); .*: 1, 2$"):
        four.validate(with_experts(config, inner_size=6))
    with pytest.raises(ConfigError, match=r"4 does not divide the shared expert's inner size \(6\); .*: 1, 2$"):
        four.validate(with_experts(config, shared_size=6))
    replace(two, expert_parallel=True).validate(with_experts(config, inner_size=7))
    with pytest.raises(ConfigError, match=r"4 does not divide the experts \(6\); .*: 1, 2$"):
        replace(four, expert_parallel=True).validate(config)
    with pytest.raises(ConfigError, match=r"expert_parallel: LlamaForCausalLM has no experts; leave the option out"):
        replace(two, expert_parallel=True).validate(LlamaForCausalLM.config_from_hf(SMALL))


ROUTER = {"output_router_logits": False, "router_aux_loss_coef": 0.001, "num_experts_per_tok": 2}
OF_QWEN = {
    "decoder_sparse_step": 1,
    "max_window_layers": 21,
    "moe_intermediate_size": 24,
    "norm_topk_prob": True,
    "num_experts": 6,
    "sliding_window": 32_768,
    "use_sliding_window": False,
}


@pytest.mark.parametrize(
    ("architecture", "keys"),
    [
        ("MixtralForCausalLM", ROUTER | {"num_local_experts": 8, "sliding_window": None, "router_jitter_noise": 0.0}),
        ("Qwen2MoeForCausalLM", ROUTER | OF_QWEN | {"shared_expert_intermediate_size": 32}),
        ("Qwen3MoeForCausalLM", ROUTER | OF_QWEN | {"mlp_only_layers": [], "attention_bias": False, "head_dim": 16}),
        ("Qwen2ForCausalLM", {"sliding_window": 131_072, "max_window_layers": 28, "use_sliding_window": False}),
    ],
)
def test_the_keys_of_published_checkpoints_are_known(
    architecture: str, keys: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    common = {"attention_dropout": 0.0, "hidden_act": "silu", "initializer_range": 0.02, "rms_norm_eps": 1e-6}
    raw = SMALL | common | keys | {"architectures": [architecture], "rope_theta": 1e6, "torch_dtype": "bfloat16"}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    config = read_hf_config(tmp_path)
    assert config.attention.window is None
    assert config.layer_attention == ()
    assert caplog.messages == []


OF_GPT_OSS: dict[str, Any] = {
    "architectures": ["GptOssForCausalLM"],
    "attention_bias": True,
    "attention_dropout": 0.0,
    "eos_token_id": 200_002,
    "experts_per_token": 4,
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 2880,
    "initial_context_length": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 2880,
    "layer_types": ["sliding_attention", "full_attention"] * 12,
    "max_position_embeddings": 131_072,
    "model_type": "gpt_oss",
    "num_attention_heads": 64,
    "num_experts_per_tok": 4,
    "num_hidden_layers": 24,
    "num_key_value_heads": 8,
    "num_local_experts": 32,
    "output_router_logits": False,
    "pad_token_id": 199_999,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "factor": 32.0,
        "original_max_position_embeddings": 4096,
        "rope_type": "yarn",
        "truncate": False,
    },
    "rope_theta": 150_000,
    "router_aux_loss_coef": 0.9,
    "sliding_window": 128,
    "swiglu_limit": 7.0,
    "tie_word_embeddings": False,
    "use_cache": True,
    "vocab_size": 201_088,
}


def test_the_keys_of_a_published_gpt_oss_are_known(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "config.json").write_text(json.dumps(OF_GPT_OSS))
    config = read_hf_config(tmp_path)
    assert caplog.messages == []
    assert [layer.window for layer in config.layer_attention] == [128, None] * 12
    assert config.dtype == "bf16"
    assert config.experts is not None
    assert (config.experts.num_experts, config.experts.top_k, config.experts.limit) == (32, 4, 7.0)
    rope = config.attention.rope
    assert rope is not None
    assert (rope.kind, rope.theta, rope.truncate) == ("yarn", 150_000, False)
    # what a config.json that names none of it stands for
    silent = {name: value for name, value in OF_GPT_OSS.items() if not name.startswith(("rope", "layer", "sliding"))}
    assert GptOssForCausalLM.config_from_hf(silent) == config


def test_a_gpt_oss_of_another_gate_is_refused() -> None:
    with pytest.raises(UnsupportedError, match=r"swiglu_alpha 1\.5 is not supported; supported is 1\.702"):
        GptOssForCausalLM.config_from_hf(OF_GPT_OSS | {"swiglu_alpha": 1.5})


def test_biases_of_outputs_are_whole_on_every_rank_or_dealt(make_model: MakeModel) -> None:
    folder = make_model("GptOss", **GPT_OSS)
    whole = tensors(folder)["layers.1.experts.down_bias"]
    for rank in range(2):
        assert torch.equal(tensors(folder, rank, 2)["layers.1.experts.down_bias"], whole)
        held = tensors(folder, rank, 2, expert_parallel=True)["layers.1.experts.down_bias"]
        assert torch.equal(held, whole[4 * rank : 4 * rank + 4])
