"""LLaMA and the families of its build beside Hugging Face's own, in fp32."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.conftest import MakeModel
from tests.models.conftest import BOUND, Worst

from hasten import LLM, SamplingParams
from hasten.checkpoint import sources
from hasten.checkpoint.convert import Conversion, convert
from hasten.checkpoint.sources import read_hf_config
from hasten.core.config import AttentionConfig, ModelConfig, ParallelConfig, RopeConfig
from hasten.core.errors import CheckpointError, ConfigError, UnsupportedError
from hasten.models.gemma import Gemma2ForCausalLM, Gemma3ForCausalLM, GemmaForCausalLM
from hasten.models.llama import LlamaForCausalLM
from hasten.models.mistral import MistralForCausalLM
from hasten.models.phi3 import Phi3ForCausalLM
from hasten.models.qwen2 import Qwen2ForCausalLM
from hasten.models.qwen3 import Qwen3ForCausalLM
from hasten.models.registry import model_class
from hasten.parallel.groups import TensorGroup, use_group
from hasten.parallel.shard import shard_shape

Model = tuple[str, dict[str, Any]]

LENGTHS = [1, 2, 6, 7, 8, 9, 15, 16, 17, 31, 33, 48, 70]
"""On both sides of a block, of the windows and of the ropes' original lengths."""
COUNT = 12

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN = {"rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0, "original_max_position_embeddings": 16}
GEMMA2: dict[str, Any] = {
    "head_dim": 20,
    "sliding_window": 7,
    "query_pre_attn_scalar": 30,
    "attn_logit_softcapping": 3.0,
    "final_logit_softcapping": 4.0,
}
GEMMA3: dict[str, Any] = {
    "head_dim": 20,
    "sliding_window": 7,
    "query_pre_attn_scalar": 30,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    "rope_parameters": {
        "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
        "full_attention": {"rope_type": "linear", "rope_theta": 1000.0, "factor": 2.0},
    },
}
MODELS: dict[str, Model] = {
    "gemma": ("Gemma", {"head_dim": 20}),
    "gemma2": ("Gemma2", GEMMA2),
    "gemma2, no caps": ("Gemma2", GEMMA2 | {"attn_logit_softcapping": None, "final_logit_softcapping": None}),
    "gemma3": ("Gemma3", GEMMA3),
    "llama": ("Llama", {}),
    "llama, every head its own key": ("Llama", {"num_key_value_heads": 4}),
    "llama, one key head": ("Llama", {"num_key_value_heads": 1, "rope_parameters": LLAMA3}),
    "llama, linear rope": ("Llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 500.0, "factor": 4.0}}),
    "llama, yarn rope": ("Llama", {"rope_parameters": YARN}),
    "llama, biases, tied, head size, gelu": (
        "Llama",
        {
            "attention_bias": True,
            "mlp_bias": True,
            "tie_word_embeddings": True,
            "head_dim": 16,
            "hidden_act": "gelu",
            "rms_norm_eps": 1e-3,
        },
    ),
    "mistral": ("Mistral", {"sliding_window": 7, "head_dim": 20}),
    "mistral, no window": ("Mistral", {"sliding_window": None}),
    "phi3": (
        "Phi3",
        {
            "sliding_window": 9,
            "rope_parameters": {"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 0.5},
        },
    ),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen2, windows": ("Qwen2", {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1}),
    "qwen3": ("Qwen3", {"head_dim": 20}),
    "qwen3, all of it": (
        "Qwen3",
        {
            "head_dim": 8,
            "num_key_value_heads": 1,
            "attention_bias": True,
            "tie_word_embeddings": True,
            "use_sliding_window": True,
            "sliding_window": 9,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "rope_parameters": YARN,
        },
    ),
}


@pytest.mark.parametrize("model", MODELS.values(), ids=list(MODELS))
def test_logits_are_those_of_hugging_face(model: Model, make_model: MakeModel, worst_logit: Worst) -> None:
    family, options = model
    folder = make_model(family, **options)
    # all prompts in one step, and in steps so small that prompts are cut and stand beside decodes
    for budget in (2048, 21):
        assert worst_logit(folder, LENGTHS, max_num_batched_tokens=budget, max_num_seqs=16) <= BOUND


def test_a_dynamic_rope_is_that_of_the_longest_sequence(make_model: MakeModel, worst_logit: Worst) -> None:
    rope = {"rope_type": "dynamic", "rope_theta": 500.0, "factor": 2.0}
    folder = make_model("Llama", rope_parameters=rope, max_position_embeddings=64)
    assert worst_logit(folder, [5, 40, 61]) <= BOUND  # none is longer than 64
    assert worst_logit(folder, [97], max_model_len=100) <= BOUND  # in transformers, of the 100 tokens at hand
    assert worst_logit(folder, [5], max_model_len=100) > 100 * BOUND


LONGROPE: dict[str, Any] = {
    "rope_type": "longrope",
    "rope_theta": 500.0,
    "short_factor": [1.0, 1.5, 1.0, 2.0, 1.0, 1.0],
    "long_factor": [2.0, 3.0, 4.0, 5.0, 6.0, 7.0],
}


@pytest.mark.parametrize("family", ["Phi3", "Llama"])
def test_a_longrope_is_that_of_the_longest_sequence(
    family: str, make_model: MakeModel, worst_logit: Worst, monkeypatch: pytest.MonkeyPatch
) -> None:
    outer = {"original_max_position_embeddings": 16} if family == "Phi3" else {}
    rope = LONGROPE if outer else LONGROPE | {"original_max_position_embeddings": 16, "factor": 8.0}
    folder = make_model(family, rope_parameters=rope, **outer)
    assert worst_logit(folder, [14, 40, 70]) <= BOUND  # all grow longer than 16, and transformers looks at that
    assert worst_logit(folder, [5, 13], max_model_len=16) <= BOUND
    assert worst_logit(folder, [5, 13]) > 100 * BOUND
    for control in ({"attention_factor": 1.0}, {"long_factor": (2.0,) * 6}):
        changed = _rope(read_hf_config(folder), **control)
        monkeypatch.setattr(sources, "read_hf_config", lambda _, changed=changed: changed)
        assert worst_logit(folder, [14, 40, 70]) > 2 * BOUND


def _attention(config: ModelConfig, **changes: Any) -> ModelConfig:
    layers = tuple(replace(layer, **changes) for layer in config.layer_attention)
    return replace(config, attention=replace(config.attention, **changes), layer_attention=layers)


def _rope(config: ModelConfig, **changes: Any) -> ModelConfig:
    assert config.attention.rope is not None
    return _attention(config, rope=replace(config.attention.rope, **changes))


def _window(config: ModelConfig, more: int) -> ModelConfig:
    def moved(attention: AttentionConfig) -> AttentionConfig:
        return attention if attention.window is None else replace(attention, window=attention.window + more)

    layers = tuple(map(moved, config.layer_attention))
    return replace(config, attention=moved(config.attention), layer_attention=layers)


CONTROLS: dict[str, tuple[str, Callable[[ModelConfig], ModelConfig]]] = {
    "one more than the weights of norms": ("gemma", lambda config: replace(config, norm_offset=False)),
    "the embedding's scale": ("gemma", lambda config: replace(config, embedding_scale=None)),
    "Gemma's gate": ("gemma", lambda config: replace(config, activation="gelu")),
    "Gemma 2's scale": ("gemma2", lambda config: _attention(config, scale=None)),
    "capped scores": ("gemma2", lambda config: _attention(config, softcap=None)),
    "capped logits": ("gemma2", lambda config: replace(config, logit_softcap=None)),
    "a token more in Gemma's window": ("gemma2", lambda config: _window(config, 1)),
    "Gemma 2's layers": ("gemma2", lambda config: replace(config, layer_attention=(config.attention,) * 3)),
    "Gemma 3's ropes": ("gemma3", lambda config: _rope(config, kind="default")),
    "positions": ("llama", lambda config: _attention(config, position="none", rope=None)),
    "theta": ("llama", lambda config: _rope(config, theta=9_000.0)),
    "scale": ("llama", lambda config: _attention(config, scale=0.3)),
    "half of a head turns": ("llama", lambda config: _rope(config, width=6)),
    "linear": ("llama, linear rope", lambda config: _rope(config, kind="default")),
    "llama3": ("llama, one key head", lambda config: _rope(config, kind="default")),
    "llama3's borders": ("llama, one key head", lambda config: _rope(config, high_freq_factor=2.0)),
    "yarn": ("llama, yarn rope", lambda config: _rope(config, kind="default")),
    "yarn's factor": ("llama, yarn rope", lambda config: _rope(config, attention_factor=1.0)),
    "gate": ("llama", lambda config: replace(config, activation="gelu")),
    "gelu by tanh": ("llama, biases, tied, head size, gelu", lambda config: replace(config, activation="gelu_tanh")),
    "epsilon": ("llama, biases, tied, head size, gelu", lambda config: replace(config, norm_eps=1e-6)),
    "a token less in the window": ("mistral", lambda config: _window(config, -1)),
    "a token more in the window": ("mistral", lambda config: _window(config, 1)),
    "half of a Phi's head turns": ("phi3", lambda config: _rope(config, width=12)),
    "a token more in a Phi's window": ("phi3", lambda config: _window(config, 1)),
    "windows in some layers": ("qwen2, windows", lambda config: replace(config, layer_attention=())),
    "a window in the first layer": (
        "qwen2, windows",
        lambda config: replace(config, layer_attention=(config.layer_attention[1],) * 3),
    ),
    "a token more in some windows": ("qwen3, all of it", lambda config: _window(config, 1)),
}


@pytest.mark.parametrize(("name", "change"), CONTROLS.values(), ids=list(CONTROLS))
def test_what_is_left_out_shows(
    name: str,
    change: Callable[[ModelConfig], ModelConfig],
    make_model: MakeModel,
    worst_logit: Worst,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    family, options = MODELS[name]
    folder = make_model(family, **options)
    monkeypatch.setattr(sources, "read_hf_config", lambda folder: change(read_hf_config(folder)))
    assert worst_logit(folder, LENGTHS) > 2 * BOUND


WEIGHTS = {
    "norms of what attention adds": ("gemma2", "post_attention_layernorm.weight"),
    "norms of what the MLP adds": ("gemma2", "post_feedforward_layernorm.weight"),
    "norms of queries in Gemma": ("gemma3", "self_attn.q_norm.weight"),
    "norms of queries": ("qwen3", "self_attn.q_norm.weight"),
    "norms of keys": ("qwen3", "self_attn.k_norm.weight"),
    "biases of queries": ("qwen2", "self_attn.q_proj.bias"),
    "biases of values": ("qwen2", "self_attn.v_proj.bias"),
    "biases of the output": ("llama, biases, tied, head size, gelu", "self_attn.o_proj.bias"),
    "biases of the gate": ("llama, biases, tied, head size, gelu", "mlp.gate_proj.bias"),
    "biases of the MLP's output": ("llama, biases, tied, head size, gelu", "mlp.down_proj.bias"),
}


@pytest.mark.parametrize(("name", "weight"), WEIGHTS.values(), ids=list(WEIGHTS))
def test_every_weight_counts(
    name: str, weight: str, make_model: MakeModel, worst_logit: Worst, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    family, options = MODELS[name]
    folder = make_model(family, **options)
    without = changed(folder, tmp_path, lambda state: state[f"model.layers.1.{weight}"].fill_(0.3))
    opened = sources.open_source
    monkeypatch.setattr("hasten.checkpoint.plan.open_source", lambda _, ranks: opened(without, ranks))
    assert worst_logit(folder, [5, 20]) > 10 * BOUND


def changed(folder: Path, tmp_path: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> Path:
    """A copy with other tensors."""
    made = Path(shutil.copytree(folder, tmp_path / "changed"))
    state = load_file(made / "model.safetensors")
    change(state)
    save_file(state, made / "model.safetensors", metadata={"format": "pt"})
    return made


# --- the engine -------------------------------------------------------------------------------------------------------

GREEDY = SamplingParams(temperature=0, max_tokens=COUNT, ignore_eos=True)
PROMPTS = [[(7 * n + k) % 400 + 4 for k in range(n)] for n in (1, 2, 9, 16, 17, 33, 70)]
SERVED = ["llama, one key head", "gemma2", "mistral", "qwen2, windows", "qwen3, all of it"]


@pytest.fixture(scope="module")
def right_tokens(make_model: MakeModel) -> Callable[[str], list[list[int]]]:
    """The tokens that Hugging Face's model chooses, without a cache."""
    known: dict[str, list[list[int]]] = {}

    def make(name: str) -> list[list[int]]:
        if name not in known:
            from transformers import AutoModelForCausalLM

            family, options = MODELS[name]
            folder = make_model(family, **options)
            # Gemma's scores are capped in eager attention alone
            model = AutoModelForCausalLM.from_pretrained(folder, dtype="float32", attn_implementation="eager")
            known[name] = [continued(model.eval(), prompt) for prompt in PROMPTS]
        return known[name]

    return make


def continued(model: Any, prompt: list[int]) -> list[int]:
    ids = list(prompt)
    for _ in range(COUNT):
        with torch.inference_mode():
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt) :]


def generated(llm: LLM) -> list[list[int]]:
    return [list(output.outputs[0].token_ids) for output in llm.generate(PROMPTS, GREEDY)]


@pytest.mark.parametrize("name", SERVED)
def test_greedy_tokens_are_those_of_hugging_face(
    name: str, make_model: MakeModel, right_tokens: Callable[[str], list[list[int]]]
) -> None:
    family, options = MODELS[name]
    folder = make_model(family, **options)
    with LLM(folder, kv_cache_memory=1 << 22, overlap_steps=True) as llm:
        block = llm.engine.worker.runner.block_bytes
        for _ in range(2):  # the second time out of the prefix cache
            assert generated(llm) == right_tokens(name)
        assert llm.engine.scheduler.blocks.prefix_hits > 0
    with LLM(folder, kv_cache_memory=8 * block, max_num_batched_tokens=12, max_num_seqs=6) as llm:
        assert generated(llm) == right_tokens(name)
        assert llm.engine.scheduler.stats.preemptions > 0


@pytest.mark.parametrize(
    ("name", "ranks"), [("phi3", 4), ("gemma2", 2), ("qwen3, all of it", 4), ("llama, one key head", 2)]
)
def test_ranks_with_fewer_key_heads_than_ranks(
    name: str, ranks: int, make_model: MakeModel, right_tokens: Callable[[str], list[list[int]]]
) -> None:
    family, options = MODELS[name]
    with LLM(make_model(family, **options), tensor_parallel_size=ranks, device="cpu", kv_cache_memory=1 << 22) as llm:
        assert generated(llm) == right_tokens(name)


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_a_converted_checkpoint_gives_the_same_tokens(
    ranks: int, make_model: MakeModel, right_tokens: Callable[[str], list[list[int]]], tmp_path: Path
) -> None:
    family, options = MODELS["qwen3, all of it"]
    convert(Conversion(str(make_model(family, **options)), str(tmp_path / "out"), ranks=ranks, format="safetensors"))
    with LLM(tmp_path / "out", kv_cache_memory=1 << 22) as llm:
        assert generated(llm) == right_tokens("qwen3, all of it")


def test_a_family_that_faster_transformer_did_not_have_becomes_safetensors(
    make_model: MakeModel, tmp_path: Path
) -> None:
    folder, out = str(make_model("Llama")), tmp_path / "out"
    with pytest.raises(
        UnsupportedError, match=r"FasterTransformer had no LlamaForCausalLM \(it had Bloom.* --format saf"
    ):
        convert(Conversion(folder, str(out), format="fastertransformer"))
    assert not out.exists()
    convert(Conversion(folder, str(out)))
    assert (out / "1-gpu" / "rank-00000-of-00001.safetensors").is_file()


# --- the weights ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("name", list(MODELS))
def test_the_map_is_that_of_the_module_and_of_hugging_face(name: str, size: int, make_model: MakeModel) -> None:
    family, options = MODELS[name]
    folder = make_model(family, **options)
    config = read_hf_config(folder)
    cls = model_class(config.architecture)
    with use_group(TensorGroup(rank=size - 1, size=size)), torch.device("meta"):
        model = cls(config)
    weight_map = cls.weight_map(config)
    mapped = {
        spec.name: shard_shape(spec.shape(config), spec.split, size, config.attention) for spec in weight_map.specs
    }
    assert mapped == {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    stored = {
        source.name if source.name in weight_map.hf_unprefixed else weight_map.hf_prefix + source.name: source.shape(
            config
        )
        for spec in weight_map.specs
        for source in spec.sources
    }
    assert stored == {name: tuple(tensor.shape) for name, tensor in load_file(folder / "model.safetensors").items()}


def test_sharded_files_legacy_leftovers_and_base_names(
    make_model: MakeModel, worst_logit: Worst, tmp_path: Path
) -> None:
    from transformers import LlamaForCausalLM as Reference

    folder = make_model("Llama")
    sharded = Path(shutil.copytree(folder, tmp_path / "sharded"))
    (sharded / "model.safetensors").unlink()
    Reference.from_pretrained(folder).save_pretrained(sharded, max_shard_size=20_000)
    # the tensors of one parameter lie in several files
    assert len(list(sharded.glob("model-*.safetensors"))) > 4
    assert worst_logit(sharded, [5, 20]) <= BOUND

    def leftovers(state: dict[str, torch.Tensor]) -> None:
        for layer in range(3):
            state[f"model.layers.{layer}.self_attn.rotary_emb.inv_freq"] = torch.arange(6)
        for name in [name for name in state if name.startswith("model.")]:
            state[name.removeprefix("model.")] = state.pop(name)

    old = changed(folder, tmp_path, leftovers)
    opened = sources.open_source(old)
    assert {spec.name: opened.shard(spec, 0, 1).sum() for spec in opened.specs} == {
        spec.name: tensor.sum() for spec in opened.specs for tensor in [sources.open_source(folder).shard(spec, 0, 1)]
    }
    strange = changed_again(old, "layers.0.self_attn.rotary.inv_freq")
    with pytest.raises(CheckpointError, match=r"holds unknown tensor 'layers\.0\.self_attn\.rotary\.inv_freq'"):
        sources.open_source(strange)


def changed_again(folder: Path, name: str) -> Path:
    state = load_file(folder / "model.safetensors")
    save_file(state | {name: torch.zeros(1)}, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


# --- config.json ------------------------------------------------------------------------------------------------------

RAW: dict[str, Any] = {
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "vocab_size": 500,
}
CLASSES = {
    "Gemma": GemmaForCausalLM,
    "Gemma2": Gemma2ForCausalLM,
    "Gemma3": Gemma3ForCausalLM,
    "Llama": LlamaForCausalLM,
    "Mistral": MistralForCausalLM,
    "Phi3": Phi3ForCausalLM,
    "Qwen2": Qwen2ForCausalLM,
    "Qwen3": Qwen3ForCausalLM,
}


GEMMAS = {"Gemma": "GemmaConfig", "Gemma2": "Gemma2Config", "Gemma3": "Gemma3TextConfig"}


@pytest.mark.parametrize("family", [family for family in CLASSES if not family.startswith("Gemma")])
def test_what_a_config_leaves_out_is_as_in_hugging_face(family: str) -> None:
    import transformers

    raw = RAW | {"num_attention_heads": 32, "hidden_size": 256, "num_hidden_layers": 40}
    reference = getattr(transformers, f"{family}Config")(**raw)
    found = CLASSES[family].config_from_hf(raw)
    assert found.architecture == f"{family}ForCausalLM"
    assert found.attention.num_kv_heads == reference.num_key_value_heads
    assert found.attention.head_size == getattr(reference, "head_dim", 8)
    assert found.norm_eps == reference.rms_norm_eps
    assert found.activation == reference.hidden_act
    assert found.tie_word_embeddings == reference.tie_word_embeddings
    assert found.max_position_embeddings == reference.max_position_embeddings
    assert found.bos_token_id == reference.bos_token_id
    assert found.eos_token_ids == (() if reference.eos_token_id is None else (reference.eos_token_id,))
    assert found.attention.window == (4096 if family == "Mistral" else None)
    assert found.layer_attention == ()
    assert found.attention.rope is not None
    assert found.attention.rope.theta == reference.rope_parameters["rope_theta"]
    # what a configuration that was saved says, and an old one without it
    assert CLASSES[family].config_from_hf(json.loads(reference.to_json_string(use_diff=False))) == found


@pytest.mark.parametrize(("family", "config_class"), GEMMAS.items())
def test_what_a_config_of_gemma_leaves_out_is_as_in_hugging_face(family: str, config_class: str) -> None:
    import transformers

    raw = RAW | {"num_attention_heads": 16, "num_hidden_layers": 13}
    reference = getattr(transformers, config_class)(**raw)
    found = CLASSES[family].config_from_hf(raw)
    names = ("bos_token_id", "pad_token_id", "tie_word_embeddings", "max_position_embeddings")
    assert [getattr(found, name) for name in names] == [getattr(reference, name) for name in names]
    assert found.eos_token_ids == (reference.eos_token_id,)
    assert found.attention.num_kv_heads == reference.num_key_value_heads
    assert found.attention.head_size == reference.head_dim
    assert (found.norm_eps, found.activation) == (reference.rms_norm_eps, "gelu_tanh")
    assert found.logit_softcap == getattr(reference, "final_logit_softcapping", None)
    assert found.attention.softcap == getattr(reference, "attn_logit_softcapping", None)
    kinds = getattr(reference, "layer_types", ["full_attention"] * 13)
    for layer, kind in enumerate(kinds):
        attention, slides = found.attention_of(layer), kind == "sliding_attention"
        assert attention.window == (reference.sliding_window if slides else None)
        assert attention.rope is not None
        assert attention.rope.theta == reference.rope_parameters.get(kind, reference.rope_parameters)["rope_theta"]
    assert CLASSES[family].config_from_hf(json.loads(reference.to_json_string(use_diff=False))) == found


def test_old_keys_of_gemma() -> None:
    raw = RAW | {"num_key_value_heads": 2}
    assert GemmaForCausalLM.config_from_hf(raw | {"hidden_act": "gelu"}).activation == "gelu_tanh"
    nested = {
        "sliding_attention": {"rope_type": "default", "rope_theta": 5.0},
        "full_attention": {"rope_type": "linear", "rope_theta": 7.0, "factor": 8.0},
    }
    old = {"rope_local_base_freq": 5.0, "rope_theta": 7.0, "rope_scaling": {"rope_type": "linear", "factor": 8.0}}
    new = Gemma3ForCausalLM.config_from_hf(raw | {"rope_parameters": nested})
    assert Gemma3ForCausalLM.config_from_hf(raw | old) == new
    without = {kind: {name: rope[name] for name in rope if name != "rope_theta"} for kind, rope in nested.items()}
    thetas = {"rope_local_base_freq": 5.0, "rope_theta": 7.0, "rope_parameters": without}
    assert Gemma3ForCausalLM.config_from_hf(raw | thetas) == new
    default = Gemma3ForCausalLM.config_from_hf(raw | {"rope_parameters": without}).attention.rope
    assert default is not None
    assert default.theta == 1_000_000
    every = Gemma3ForCausalLM.config_from_hf(raw | {"sliding_window_pattern": 2})
    assert [layer.window for layer in every.layer_attention] == [4096, None, 4096]


def test_the_keys_of_old_and_new_versions_mean_the_same() -> None:
    scaling = {name: value for name, value in LLAMA3.items() if name not in ("rope_theta", "rope_type")}
    new = LlamaForCausalLM.config_from_hf(RAW | {"rope_parameters": LLAMA3})
    for key in ("rope_type", "type"):
        old = RAW | {"rope_theta": 500.0, "rope_scaling": {**scaling, key: "llama3"}}
        assert LlamaForCausalLM.config_from_hf(old) == new
    assert new.attention.rope == RopeConfig(
        width=12, theta=500.0, kind="llama3", factor=8.0, original_max_position=16, high_freq_factor=4.0
    )
    plain = LlamaForCausalLM.config_from_hf(RAW | {"rope_scaling": None, "rope_theta": 500.0})
    assert plain.attention.rope == RopeConfig(width=12, theta=500.0)


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("Llama", {"hidden_size": None}, "lacks 'hidden_size'"),
        ("Llama", {"num_attention_heads": 5}, "hidden_size 48 is not a multiple of num_attention_heads 5"),
        ("Llama", {"num_key_value_heads": 3}, "num_heads 4 is not a multiple of num_kv_heads 3"),
        ("Llama", {"hidden_act": "tanh"}, "hidden_act 'tanh' is not supported; supported are gelu, "),
        ("Llama", {"hidden_act": 3}, "hidden_act 3 is not supported"),
        ("Llama", {"rope_scaling": {"type": "longrope"}}, "rope_scaling: longrope lacks 'short_factor'"),
        ("Llama", {"rope_parameters": {"rope_type": "ntk"}}, "rope_parameters.rope_type 'ntk' is not supported"),
        ("Llama", {"rope_scaling": {"type": "linear"}}, "rope_scaling: linear lacks 'factor'"),
        ("Llama", {"rope_scaling": {"type": "linear", "factor": -1}}, "rope_scaling: factor has a value"),
        (
            "Phi3",
            {"rope_scaling": {"type": "su", "short_factor": [1.0] * 6, "long_factor": [1.0] * 5}},
            "rope_scaling: long_factor has 5 numbers for 6 pairs of dimensions",
        ),
        ("Phi3", {"rope_scaling": {"type": "su", "short_factor": ["a"]}}, "rope_scaling: short_factor has a value"),
        ("Llama", {"rope_scaling": {"mrope_section": [1]}}, "rope_scaling.mrope_section is not supported"),
        ("Llama", {"rope_scaling": "linear"}, "rope_scaling 'linear' is not an object"),
        ("Llama", {"rope_theta": "big"}, "rope_theta has a value of the wrong kind: 'big' is not a number above 0"),
        ("Llama", {"head_dim": 7}, "7 dimensions of a head cannot turn in pairs"),
        ("Llama", {"attention_bias": "no"}, "attention_bias has a value of the wrong kind"),
        ("Gemma3", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping is not supported in Gemma 3"),
        ("Gemma3", {"use_bidirectional_attention": True}, "use_bidirectional_attention is not supported"),
        ("Gemma2", {"final_logit_softcapping": -1}, "final_logit_softcapping has a value of the wrong kind"),
        ("Mistral", {"sliding_window": 0}, "sliding_window has a value of the wrong kind"),
        ("Qwen2", {"use_mrope": True}, "use_mrope: "),
        ("Qwen3", {"layer_types": ["full_attention"]}, "layer_types is not a list of 3"),
        ("Qwen3", {"layer_types": ["linear_attention"] * 3}, "has 'linear_attention'; "),
        ("Qwen3", {"layer_types": ["sliding_attention"] * 3}, "give no window"),
    ],
)
def test_what_cannot_be_is_named_with_its_key(family: str, changes: dict[str, Any], message: str) -> None:
    raw = {name: value for name, value in (RAW | {"num_key_value_heads": 2} | changes).items() if value is not None}
    with pytest.raises((ConfigError, UnsupportedError)) as caught:
        CLASSES[family].config_from_hf(raw)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_ranks_that_do_not_fit_are_told_which_do() -> None:
    config = LlamaForCausalLM.config_from_hf(RAW | {"num_attention_heads": 12, "num_key_value_heads": 6})
    with pytest.raises(ConfigError, match=r"4 does not divide key/value heads \(6\); .* that does: 1, 2"):
        ParallelConfig(tensor_parallel_size=4).validate(config)
