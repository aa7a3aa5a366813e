"""Ropes that depend on the longest sequence, and config.json of LLaMA and the families of its build."""

import json
from typing import Any

import pytest
from tests.conftest import MakeModel
from tests.models.cases_llama import LLAMA3, YARN
from tests.models.conftest import BOUND, Worst
from tests.models.families import with_rope

from hasten import LLM, SamplingParams
from hasten.checkpoint import hugging_face
from hasten.checkpoint.hugging_face import read_hf_config
from hasten.core.errors import ConfigError, UnsupportedError
from hasten.core.model_config import RopeConfig
from hasten.core.parallel_config import ParallelConfig
from hasten.engine.batch import Batch
from hasten.engine.block_manager import BlockManager
from hasten.models.gemma import Gemma2ForCausalLM, Gemma3ForCausalLM, GemmaForCausalLM
from hasten.models.llama import LlamaForCausalLM
from hasten.models.mistral import MistralForCausalLM
from hasten.models.mixtral import MixtralForCausalLM
from hasten.models.phi3 import Phi3ForCausalLM
from hasten.models.qwen2 import Qwen2ForCausalLM
from hasten.models.qwen2_moe import Qwen2MoeForCausalLM
from hasten.models.qwen3 import Qwen3ForCausalLM
from hasten.models.qwen3_moe import Qwen3MoeForCausalLM


def test_yarn_for_an_original_length_in_which_no_pair_turns_often(make_model: MakeModel, worst_logit: Worst) -> None:
    rope = YARN | {"original_max_position_embeddings": 3, "beta_slow": 4.0}
    assert worst_logit(make_model("Llama", rope_parameters=rope), [5, 33]) <= BOUND


@pytest.mark.parametrize("form", ["within a kind", "beside the kinds"])
@pytest.mark.parametrize("family", ["Gemma3", "Olmo3"])
def test_yarn_of_one_kind_of_layers_reads_truncate_beside_the_kinds_alone(
    family: str, form: str, make_model: MakeModel, worst_logit: Worst, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = YARN | {"beta_fast": 2.0, "beta_slow": 0.5}
    ropes: dict[str, Any] = {"sliding_attention": {"rope_theta": 100.0}, "full_attention": full}
    (full if form == "within a kind" else ropes)["truncate"] = False
    layers = {"sliding_window": 7, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
    folder = make_model(family, rope_parameters=ropes, **layers)
    assert worst_logit(folder, [5, 33]) <= BOUND
    monkeypatch.setattr("hasten.models.gemma.rope_of_kind", dict.get)
    monkeypatch.setattr("hasten.models.olmo3.rope_of_kind", dict.get)
    assert worst_logit(folder, [5, 33]) > BOUND


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
        changed = with_rope(read_hf_config(folder), **control)
        monkeypatch.setattr(hugging_face, "read_hf_config", lambda _, changed=changed: changed)
        assert worst_logit(folder, [14, 40, 70]) > 2 * BOUND


def test_blocks_before_every_window_go_back_while_a_sequence_runs(
    make_model: MakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_model("Mistral", sliding_window=7)
    prompts, params = [[5, 8, 11] * 30, [9] * 60], SamplingParams(temperature=0, max_tokens=30, ignore_eos=True)

    def generated() -> tuple[list[list[int]], int]:
        used = list[int]()
        options: dict[str, Any] = {"max_num_batched_tokens": 12, "max_num_seqs": 2, "enable_prefix_caching": False}
        with LLM(folder, kv_cache_memory=1 << 22, **options) as llm:
            scheduler = llm.engine.scheduler
            schedule = scheduler.schedule

            def counted(prompt_tokens: int | None = None) -> Batch:
                used.append(scheduler.blocks.num_used)
                return schedule(prompt_tokens)

            monkeypatch.setattr(scheduler, "schedule", counted)
            outputs = llm.generate(prompts, params)
        return [list(output.outputs[0].token_ids) for output in outputs], max(used)

    tokens, most = generated()
    monkeypatch.setattr(BlockManager, "release_unseen", lambda self, sequence: None)
    expected, without = generated()
    assert tokens == expected
    assert most < without == 8 + 6


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
    "Mixtral": MixtralForCausalLM,
    "Phi3": Phi3ForCausalLM,
    "Qwen2": Qwen2ForCausalLM,
    "Qwen2Moe": Qwen2MoeForCausalLM,
    "Qwen3": Qwen3ForCausalLM,
    "Qwen3Moe": Qwen3MoeForCausalLM,
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
    assert found.attention.head_size == (getattr(reference, "head_dim", None) or 8)
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
    if found.experts is not None:
        assert found.experts.num_experts == reference.num_experts
        assert found.experts.top_k == reference.num_experts_per_tok
        assert found.experts.inner_size == getattr(reference, "moe_intermediate_size", reference.intermediate_size)
        assert found.experts.normalized == getattr(reference, "norm_topk_prob", True)
        assert found.experts.shared_size == getattr(reference, "shared_expert_intermediate_size", None)
        assert found.experts.dense_layers == ()
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
        ("Llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5 is not supported in this family"),
        (
            "Gemma3",
            {"rope_parameters": {"full_attention": {}, "sliding_attention": {"partial_rotary_factor": 0.25}}},
            "partial_rotary_factor 0.25 is not supported in this family",
        ),
        ("Llama", {"hidden_size": 10**400}, "hidden_size cannot be right: it is above 2147483647"),
        ("Llama", {"max_position_embeddings": 10**12}, "max_position_embeddings cannot be right"),
        ("Llama", {"num_attention_heads": 2**30, "head_dim": 2**30}, "heads of size 1073741824 cannot be right"),
        (
            "Llama",
            {"rope_theta": float("inf")},
            "rope_theta has a value of the wrong kind: inf is not a number above 0",
        ),
        ("Llama", {"head_dim": 7}, "7 dimensions of a head cannot turn in pairs"),
        ("Llama", {"attention_bias": "no"}, "attention_bias has a value of the wrong kind"),
        ("Gemma3", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping is not supported in Gemma 3"),
        ("Gemma3", {"use_bidirectional_attention": True}, "use_bidirectional_attention is not supported"),
        ("Gemma2", {"final_logit_softcapping": -1}, "final_logit_softcapping has a value of the wrong kind"),
        ("Mixtral", {"num_local_experts": 1}, "2 experts compute each token, but there are 1"),
        ("Qwen2Moe", {"mlp_only_layers": 3}, "mlp_only_layers 3 is not a list of layers"),
        ("Qwen3Moe", {"num_experts": 0}, "num_experts has a value of the wrong kind"),
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
