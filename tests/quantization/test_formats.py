"""Quantized checkpoints, written by the writers of the tests: their values, on any rank, and what is refused."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.conftest import MakeModel
from tests.engine_logits import DECODED, engine_logits
from tests.quantization.writers import Case, awq, gptq, pack_quantized, set_config, write
from torch import Tensor

from hasten import LLM, SamplingParams
from hasten.checkpoint.convert import Conversion, convert
from hasten.checkpoint.hugging_face import HuggingFaceSource
from hasten.checkpoint.sources import open_dummy, open_source
from hasten.core.errors import CheckpointError, ConfigError, UnsupportedError
from hasten.models.weight_map import WeightSpec
from hasten.ops import GroupedWeight, QuantizedWeight, native
from hasten.quantization.formats.registry import format_of

CASES = {
    "gptq": gptq(4, 16),
    "gptq, groups that do not divide": gptq(4, 32),
    "gptq, one group": gptq(4, -1),
    "gptq, asymmetric": gptq(4, 16, symmetric=False),
    "gptq v2, asymmetric, in the order of activations": gptq(4, 16, symmetric=False, shuffled=True, version=2),
    "gptq, in the order of activations": gptq(4, 16, shuffled=True),
    "gptq, 8 bits": gptq(8, 16),
    "gptq, 8 bits, one group": gptq(8, -1),
    "gptq, 8 bits, asymmetric, in the order of activations": gptq(8, 16, symmetric=False, shuffled=True),
    "awq": awq(16),
    "pack-quantized": pack_quantized(4, 16),
    "pack-quantized, asymmetric": pack_quantized(4, 16, symmetric=False),
    "pack-quantized, channels": pack_quantized(4, -1),
    "pack-quantized, asymmetric, channels": pack_quantized(4, -1, symmetric=False),
    "pack-quantized, in the order of activations": pack_quantized(4, 16, shuffled=True),
    "pack-quantized, 8 bits, channels": pack_quantized(8, -1),
}
MODELS: dict[str, dict[str, Any]] = {
    "Bloom": {"n_head": 12, "hidden_size": 96, "n_layer": 1, "vocab_size": 509},
    "Llama": {"num_hidden_layers": 1},
    "GPT2": {"n_layer": 1},
}
"""Rows of QKV in another order; separate projections, fewer key/value heads; matrices stored as [h, o]."""

PROMPT = list(range(20, 60))


def opened(folder: Path) -> HuggingFaceSource:
    source = open_source(folder)
    assert isinstance(source, HuggingFaceSource)
    return source


def weight(source: HuggingFaceSource, spec: WeightSpec, rank: int = 0, size: int = 1) -> Tensor:
    found = source.weight(spec, rank, size, torch.float32)
    return found if isinstance(found, Tensor) else found.dequantized(torch.float32)


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))
def test_values_are_exact_on_every_rank(case: Case, family: str, make_model: MakeModel, tmp_path: Path) -> None:
    folders = write(make_model(family, **MODELS[family]), tmp_path, case)
    quantized, full = map(opened, folders)
    assert quantized.format is not None
    assert quantized.format.name == case.config["quant_method"]
    kinds = set()
    for spec in quantized.specs:
        kinds.add(type(quantized.weight(spec, 0, 1, torch.float32)))
        assert torch.equal(quantized.shard(spec, 0, 1), full.shard(spec, 0, 1))
        for size in (1, 2, 4):
            for rank in range(size):
                expected = full.shard(spec, rank, size)
                assert torch.equal(weight(quantized, spec, rank, size), expected), (spec.name, rank, size)
    # 8 bits with one scale a row are what int8 weights are
    assert kinds == {Tensor, QuantizedWeight if (case.bits, case.size) == (8, -1) else GroupedWeight}


@pytest.fixture
def widened(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights of 8 and 4 bits are multiplied in fp32."""
    monkeypatch.setattr(native, "integer_kernels", lambda: None)


@pytest.mark.parametrize(
    ("family", "case", "bound"),
    [
        ("Bloom", CASES["gptq, in the order of activations"], 1e-4),
        ("Llama", CASES["gptq, 8 bits, asymmetric, in the order of activations"], 1e-4),
        ("GPT2", CASES["pack-quantized, asymmetric"], 1e-4),
        ("Bloom", awq(32), 0.03),  # torch's product on a CPU takes these, in bf16
    ],
    ids=["gptq", "gptq, 8 bits", "pack-quantized", "awq"],
)
@pytest.mark.usefixtures("widened")
def test_logits_are_those_of_the_values(
    family: str, case: Case, bound: float, make_model: MakeModel, tmp_path: Path
) -> None:
    sizes = {"hidden_size": 128} if bound > 1e-4 else {}
    assert error_of_logits(write(make_model(family, **sizes), tmp_path, case)) <= bound


@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("Bloom", "gptq, in the order of activations"),
        ("Llama", "gptq, 8 bits, asymmetric, in the order of activations"),
        ("GPT2", "pack-quantized, asymmetric"),
        ("Bloom", "awq"),
    ],
)
def test_logits_of_kernels_differ_by_the_rounding_of_inputs(
    family: str, name: str, make_model: MakeModel, tmp_path: Path
) -> None:
    """Kernels round inputs to 15 bits: an error of 5e-5 in a product, which grows through the layers."""
    if native.integer_kernels() is None:
        pytest.skip("this CPU has no kernels for weights of 8 and 4 bits")
    assert error_of_logits(write(make_model(family), tmp_path, CASES[name])) <= 5e-4


def error_of_logits(folders: tuple[Path, Path]) -> float:
    """Of a quantized checkpoint beside one of its values, as a part of the norm."""
    prompts = [[5, 80, 7], PROMPT]
    options: dict[str, Any] = {"dtype": "fp32", "kv_cache_memory": 8 << 20}
    found, expected = (
        torch.cat(engine_logits(folder, prompts, [list(range(9, 9 + DECODED))] * 2, "cpu", **options))
        for folder in folders
    )
    return ((found - expected).norm() / expected.norm()).item()


@pytest.mark.usefixtures("forked_ranks")
def test_ranks_agree_with_one(make_model: MakeModel, tmp_path: Path) -> None:
    """The second product of attention reads 48 features, so each of 2 ranks has half of a group of 16."""
    folder, _ = write(make_model("Llama"), tmp_path, CASES["gptq, 8 bits"])
    options: dict[str, Any] = {"device": "cpu", "dtype": "fp32", "kv_cache_memory": 8 << 20}
    found = []
    for size in (1, 2):
        with LLM(folder, tensor_parallel_size=size, **options) as llm:
            (output,) = llm.generate([PROMPT], SamplingParams(max_tokens=1, prompt_logprobs=1), use_tqdm=False)
        assert output.prompt_logprobs is not None
        entries = zip(output.prompt_logprobs, PROMPT, strict=True)
        found.append([entry[token].logprob for entry, token in entries if entry])
    # kernels round inputs to 15 bits of the largest, which is that of a rank's part
    within = 1e-4 if native.integer_kernels() is None else 2e-3
    assert found[1] == pytest.approx(found[0], abs=within)


def test_a_quantized_checkpoint_is_converted_to_full_precision(make_model: MakeModel, tmp_path: Path) -> None:
    quantized, full = write(make_model("Bloom", **MODELS["Bloom"]), tmp_path, CASES["awq"])
    result = []
    for number, folder in enumerate((quantized, full)):
        convert(Conversion(str(folder), str(tmp_path / f"out{number}"), ranks=2))
        source = open_source(tmp_path / f"out{number}", 2)
        result.append({spec.name: source.shard(spec, 0, 1) for spec in source.specs})
    assert result[0].keys() == result[1].keys()
    assert all(torch.equal(tensor, result[1][name]) for name, tensor in result[0].items())


def test_awq_scales_the_inputs_behind_an_activation(make_model: MakeModel, tmp_path: Path) -> None:
    folder, full = write(make_model("Bloom", **MODELS["Bloom"]), tmp_path, CASES["awq"])
    scales = torch.rand(4 * 96, generator=torch.Generator().manual_seed(3)) + 0.5
    name = "transformer.h.0.mlp.gelu_impl.scales"
    change(folder, lambda state: state.update({name: scales}))
    source, plain = opened(folder), opened(full)
    (spec,) = (spec for spec in source.specs if spec.name == "layers.0.mlp.down.weight")
    for rank in range(2):
        expected = plain.shard(spec, rank, 2) / scales.chunk(2)[rank]
        torch.testing.assert_close(weight(source, spec, rank, 2), expected)


def test_old_files_have_biases_that_the_model_does_not(make_model: MakeModel, tmp_path: Path) -> None:
    folder, _ = write(make_model("Llama", **MODELS["Llama"]), tmp_path, CASES["gptq"])
    change(folder, lambda state: state.update({"model.layers.0.mlp.down_proj.bias": torch.zeros(48)}))
    assert opened(folder).format is not None


def test_older_repositories_have_a_file_of_their_own(make_model: MakeModel, tmp_path: Path) -> None:
    for name, case in (("quantize_config.json", CASES["gptq"]), ("quant_config.json", CASES["awq"])):
        folder, full = write(make_model("Llama", **MODELS["Llama"]), tmp_path / name, case)
        set_config(folder, quantization_config=None)
        entries = {"w_bit": 4, "q_group_size": 16, "version": "GEMM", "zero_point": True}
        old = entries if case is CASES["awq"] else {k: v for k, v in case.config.items() if k != "quant_method"}
        (folder / name).write_text(json.dumps(old))
        source, expected = opened(folder), opened(full)
        assert all(torch.equal(weight(source, spec), expected.shard(spec, 0, 1)) for spec in source.specs)


def test_rules_change_the_settings_of_some_modules(make_model: MakeModel, tmp_path: Path) -> None:
    """Query, key and value are then quantized in different ways, so one weight of all three is in full precision."""
    base = make_model("Llama", **MODELS["Llama"])
    folder, full = write(base, tmp_path / "4", CASES["gptq"])
    other, other_full = write(base, tmp_path / "8", CASES["gptq, 8 bits"])
    rules = {r"+:.*self_attn\.v_proj": {"bits": 8}, r"-:.*\.down_proj": {}}
    set_config(folder, quantization_config={**CASES["gptq"].config, "dynamic": rules})
    state, eight = (load_file(each / "model.safetensors") for each in (folder, other))
    plain, plain_eight = (load_file(each / "model.safetensors") for each in (full, other_full))
    down, value = "model.layers.0.mlp.down_proj", "model.layers.0.self_attn.v_proj"
    state = {name: tensor for name, tensor in state.items() if not name.startswith((down, value))}
    state |= {name: tensor for name, tensor in eight.items() if name.startswith(value)}
    state[f"{down}.weight"] = plain[f"{down}.weight"]
    plain[f"{value}.weight"] = plain_eight[f"{value}.weight"]
    save_file(state, folder / "model.safetensors")
    save_file(plain, full / "model.safetensors")
    source, expected = opened(folder), opened(full)
    assert all(torch.equal(weight(source, spec), expected.shard(spec, 0, 1)) for spec in source.specs)
    mixed = [spec.name for spec in source.specs if isinstance(source.weight(spec, 0, 1, torch.float32), Tensor)]
    assert "layers.0.attention.qkv.weight" in mixed
    assert "layers.0.down.weight" in mixed
    assert "layers.0.gate_up.weight" not in mixed


def change(folder: Path, edit: Callable[[dict[str, Tensor]], object]) -> None:
    state = load_file(folder / "model.safetensors")
    edit(state)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def read_all(folder: Path) -> None:
    source = opened(folder)
    for spec in source.specs:
        source.weight(spec, 0, 1, torch.float32)


UP = "model.layers.0.mlp.up_proj"


def nan(tensor: Tensor) -> Tensor:
    found = tensor.clone()
    found.view(-1)[5] = float("nan")
    return found


@pytest.mark.parametrize(
    ("case", "kind", "edit", "message"),
    [
        ("gptq", "scales", None, rf"lacks tensor '{UP[6:]}\.scales', which gptq keeps with '{UP[6:]}\.qweight'"),
        ("gptq", "scales", nan, rf"tensor '{UP}\.scales' has NaN or infinity: the checkpoint is damaged"),
        ("gptq", "scales", lambda s: s[:1], rf"tensor '{UP}\.scales' has shape \(1, 80\), but group_size 16 asks for"),
        ("gptq", "qweight", lambda q: q[:3], rf"tensor '{UP}\.qweight' has shape \(3, 80\), but bits 4 asks for \(6,"),
        ("gptq", "qzeros", lambda z: z + 1, rf"tensor '{UP}\.qzeros' has zero points other than 8, but sym is true:"),
        ("gptq", "g_idx", lambda g: g + 9, rf"tensor '{UP}\.g_idx' has numbers of groups outside 0 to 2"),
        ("gptq", "qweight", lambda q: q.float(), rf"tensor '{UP}\.qweight' has type torch.float32, but bits 4 asks"),
        ("awq", "qzeros", lambda z: z[:2], rf"tensor '{UP}\.qzeros' has shape \(2, 10\), but group_size 16 asks for"),
        ("pack-quantized", "weight_scale", None, rf"lacks tensor '{UP[6:]}\.weight_scale', which compressed-tensors"),
        ("pack-quantized", "weight_scale", nan, rf"tensor '{UP}\.weight_scale' has NaN or infinity"),
        (
            "pack-quantized, asymmetric", "weight_zero_point", None,
            rf"tensor '{UP}\.weight_zero_point' is missing, but config_groups\.group_0\.weights\.symmetric is false",
        ),
        (
            "pack-quantized", "weight_packed", lambda w: w[:, :3],
            rf"'{UP}\.weight_packed' has shape \(80, 3\), but config_groups\.group_0\.weights\.num_bits 4 asks for",
        ),
        ("pack-quantized", "weight_shape", lambda s: s + 8, rf"'{UP}\.weight_shape' is \[88, 56\], but config\.json"),
    ],
)  # fmt: skip
def test_damage_is_named_with_tensor_and_key(
    case: str,
    kind: str,
    edit: Callable[[Tensor], Tensor] | None,
    message: str,
    make_model: MakeModel,
    tmp_path: Path,
) -> None:
    folder, _ = write(make_model("Llama", **MODELS["Llama"]), tmp_path, CASES[case])

    def damage(state: dict[str, Tensor]) -> None:
        found = state.pop(f"{UP}.{kind}")
        if edit is not None:
            state[f"{UP}.{kind}"] = edit(found).contiguous()

    change(folder, damage)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_all(folder)
    assert str(folder / "model.safetensors") in str(caught.value)
    assert "\n" not in str(caught.value)


WEIGHTS = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 16, "symmetric": True}


def grouped(weights: dict[str, Any] | None = None, **entries: Any) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": WEIGHTS | (weights or {}), "input_activations": None}
    return {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {"all": group | entries}}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"quant_method": "bitsandbytes"}, r"quantization_config \(bitsandbytes\): quantized weights of this kind"),
        ({"load_in_8bit": True}, r"quantization_config \(bitsandbytes\): quantized weights of this kind"),
        ({"quant_method": "mxfp4"}, r"\(mxfp4\): .* are; give it in bf16"),
        ({"quant_method": "torchao"}, r"\(torchao\): .* export it as compressed-tensors, or give the full-precision"),
        ({"quant_method": "gguf"}, r"\(gguf\): .* those of gptq, awq, compressed-tensors, fp8 are; give the"),
        ({"quant_method": "gptq", "bits": 3}, r"quantization_config \(gptq\): bits 3 is not supported for gptq"),
        ({"quant_method": "gptq"}, r"quantization_config \(gptq\): config.json lacks 'bits'"),
        ({"quant_method": "gptq", "bits": 4, "group_size": 0}, r"\(gptq\): group_size 0 is not a whole number"),
        ({"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"}, r"checkpoint_format 'marlin' is not"),
        ({"quant_method": "gptq", "bits": 4, "dynamic": {"+:(": {}}}, r"dynamic has '\+:\(', which is no regular"),
        ({"quant_method": "awq", "bits": 4, "group_size": 16, "version": "gemv"}, r"version 'gemv' is not supported"),
        ({"quant_method": "awq", "bits": 8, "group_size": 16}, r"\(awq\): bits 8 is not supported for awq; 4 is"),
        ({"quant_method": "awq", "bits": 4, "group_size": 16, "zero_point": False}, r"zero_point false is not"),
        (grouped({"num_bits": 3}), r"config_groups\.all\.weights: int of num_bits 3; int of 4 or 8 is supported"),
        (grouped({"strategy": "block"}), r"config_groups\.all\.weights: strategy 'block'; tensor, channel and group"),
        (grouped({"symmetric": 3}), r"config_groups\.all\.weights: symmetric has a value of the wrong kind"),
        (grouped(input_activations=WEIGHTS), r"config_groups\.all\.input_activations: activations stay as they are"),
        (grouped(format="nvfp4-pack-quantized"), r"format 'nvfp4-pack-quantized' is not supported; supported are"),
        (grouped(targets=None), r"config_groups\.all\.targets is not a list of names"),
        (grouped() | {"transform_config": {"a": 1}}, r"transform_config: rotated weights are not supported"),
        (grouped() | {"config_groups": None}, r"config_groups is not an object of groups"),
        ([], None),
        ("int4", r"quantization_config is not an object"),
    ],
)  # fmt: skip
def test_what_is_not_read_is_refused_by_name(
    config: Any, message: str | None, make_model: MakeModel, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(make_model("Llama", **MODELS["Llama"]), tmp_path / "model"))
    set_config(folder, quantization_config=config)
    if message is None:  # nothing that is empty says anything
        assert opened(folder).format is None
        return
    with pytest.raises((ConfigError, UnsupportedError), match=message) as caught:
        open_source(folder)
    assert str(folder / "config.json") in str(caught.value)
    assert "\n" not in str(caught.value)


def test_other_keys_of_old_files_are_read_or_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"^compression_config \(compressed-tensors\): config_groups is not an object"
    ):
        format_of({"compression_config": {"format": "pack-quantized"}})
    with pytest.raises(UnsupportedError, match=r"^sparsity_config: sparse weights are not supported; give the dense"):
        format_of({"sparsity_config": {"format": "sparse-24-bitmask"}})
    with pytest.raises(
        UnsupportedError, match=r"^hf_quant_config.json \(modelopt\): .* export it as compressed-tensors"
    ):
        format_of({}, {"hf_quant_config.json": {"quantization": {"quant_algo": "NVFP4"}}})


def test_a_module_that_no_target_names_is_refused(make_model: MakeModel, tmp_path: Path) -> None:
    folder, _ = write(make_model("Llama", **MODELS["Llama"]), tmp_path, CASES["pack-quantized"])
    set_config(folder, quantization_config=grouped(targets=[r"re:.*self_attn.*"]))
    with pytest.raises(CheckpointError, match=rf"'{UP[:-7]}gate_proj' is quantized, but no targets of config_groups"):
        read_all(folder)


def test_what_is_quantized_is_not_quantized_again(make_model: MakeModel, tmp_path: Path) -> None:
    folder, _ = write(make_model("Llama", **MODELS["Llama"]), tmp_path, CASES["gptq"])
    with pytest.raises(UnsupportedError, match=r"has quantized weights, but random ones are in full precision: remove"):
        open_dummy(folder, torch.device("cpu"))
    with pytest.raises(ConfigError, match=r"is quantized already \(gptq\); leave out quantization int8, or give"):
        LLM(folder, device="cpu", quantization="int8")
