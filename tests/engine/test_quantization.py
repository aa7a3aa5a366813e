"""Whole models with weights of 8 bits compared with models of the values that these stand for, in fp32."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.conftest import MakeModel
from tests.engine_logits import DECODED, engine_logits
from tests.quantization.definition import TRANSPOSED, TYPES, changed_folder, dequantized_folder, rounded
from tests.quantization.test_int4 import rounded as rounded_to_4_bits
from tests.quantization.writers import is_quantized
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from hasten import LLM, SamplingParams
from hasten.checkpoint.convert import Conversion, convert
from hasten.checkpoint.plan import open_checkpoint
from hasten.core.dtypes import DTypeName, Quantization
from hasten.core.errors import CheckpointError, ConfigError, UnsupportedError
from hasten.ops import TORCH_DTYPES, native
from hasten.ops.cpu import int8

SAME = {"kernels": 6e-3, "digits": 6e-3, "widened": 1e-4}
"""Largest difference of two logits between int8 weights and their values in fp32, by how they are multiplied: but for
the last, activations have 15 bits."""
NEAR = {"int8": 0.06, "w8a8": 0.08, "fp8": 0.2}
"""Root mean square of the differences from the full-precision model, divided by the logits' standard deviation."""
IN_BF16, IN_15_BITS = 0.03, 1e-3
"""The same of int4 weights, whose products a CPU computes in bf16, or by kernels with activations of 15 bits."""
HEADS = {
    "Bloom": "transformer.word_embeddings.weight",
    "Llama": "lm_head.weight",
    "GPT2": "transformer.wte.weight",
}
"""What the head of each family is in its files: two are tied to the embedding."""
FULL_INPUTS = {"w8a8": re.compile("query_key_value|[qkv]_proj|c_attn"), "fp8": re.compile("lm_head")}
"""Linear layers whose inputs are not rounded to 8 bits."""
FAMILIES = list(HEADS)
OPTIONS: dict[str, Any] = {"dtype": "fp32", "kv_cache_memory": 8 << 20}
GREEDY = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)


def multiply(way: str, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Let quantized weights be multiplied in one of the ways of `SAME`; False where this CPU does not have it."""
    if way == "kernels":
        return native.integer_kernels() is not None
    monkeypatch.setattr(native, "integer_kernels", lambda: None)
    exact = int8.exact_int8()
    monkeypatch.setattr(int8, "exact_int8", lambda: way == "digits")
    return exact or way == "widened"


def ids_of(length: int) -> list[int]:
    return torch.randint(200, (length,), generator=torch.Generator().manual_seed(length)).tolist()


PROMPTS = [ids_of(length) for length in (1, 17, 40)]


def logits_of(folder: Path, **options: Any) -> Tensor:
    followed_by = [ids_of(DECODED)] * len(PROMPTS)
    return torch.cat(engine_logits(folder, PROMPTS, followed_by, "cpu", **OPTIONS, **options))


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_the_values_that_int8_stands_for(
    family: str, make_model: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_model(family)
    dequantized = dequantized_folder(folder, tmp_path / "dequantized", HEADS[family])
    full, expected = logits_of(folder), logits_of(dequantized)
    for way, bound in SAME.items():
        if not multiply(way, monkeypatch):
            continue
        found = logits_of(folder, quantization="int8")
        assert (found - expected).abs().max() <= bound
        assert 10 * SAME["widened"] < (found - full).square().mean().sqrt() / full.std() <= NEAR["int8"]


def rounding_model(folder: Path, kind: str) -> nn.Module:
    """Transformers' model of a folder, whose linear layers round what they take, each token by itself."""
    model: nn.Module = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)

    def rounded_input(module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        (x,) = args
        return (rounded(x.flatten(0, -2), TYPES[kind]).view_as(x),)

    for name, module in model.named_modules():
        exempt = FULL_INPUTS[kind].search(name) is not None
        if isinstance(module, (nn.Linear, Conv1D)) and not exempt:
            module.register_forward_pre_hook(rounded_input)
    return model


@pytest.mark.parametrize("kind", ["w8a8", "fp8"])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_rounded_weights_and_inputs(
    family: str, kind: str, make_model: MakeModel, tmp_path: Path
) -> None:
    folder = make_model(family)
    dequantized = dequantized_folder(folder, tmp_path / "dequantized", HEADS[family], kind=kind)
    model = rounding_model(dequantized, kind)
    ids = [prompt + ids_of(DECODED) for prompt in PROMPTS]
    expected = torch.cat([model(torch.tensor([each])).logits[0].detach() for each in ids])
    found, full = logits_of(folder, quantization=kind), logits_of(folder)
    # Where a value lies between two numbers and becomes the other one, all tokens that see it differ; others are equal.
    assert min(rms(row) for row in found - expected) <= 0.02 * rms(found - full)
    assert rms(found - expected) <= rms(found - full)
    assert 10 * SAME["widened"] < rms(found - full) / float(full.std()) <= NEAR[kind]


def rms(x: Tensor) -> float:
    return float(x.square().mean().sqrt())


def logprobs_of(folder: Path, **options: Any) -> list[float]:
    params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=3)
    with LLM(folder, device="cpu", **OPTIONS, **options) as llm:
        (output,) = llm.generate([PROMPTS[-1]], params, use_tqdm=False)
    assert output.prompt_logprobs is not None
    found = [entry[token] for entry, token in zip(output.prompt_logprobs, PROMPTS[-1], strict=True) if entry]
    return [each.logprob for each in found]


@pytest.mark.any_python
@pytest.mark.usefixtures("forked_ranks")
@pytest.mark.parametrize("family", FAMILIES)
def test_each_of_two_ranks_quantizes_its_shards(family: str, make_model: MakeModel, tmp_path: Path) -> None:
    folder = make_model(family)
    expected = logprobs_of(dequantized_folder(folder, tmp_path / "dequantized", HEADS[family], ranks=2))
    found = logprobs_of(folder, tensor_parallel_size=2, quantization="int8")
    assert found == pytest.approx(expected, abs=SAME["digits"])
    assert found != pytest.approx(logprobs_of(folder), abs=SAME["digits"])


@pytest.mark.any_python
@pytest.mark.usefixtures("forked_ranks")
@pytest.mark.parametrize("kind", ["w8a8", "fp8"])
def test_each_of_two_ranks_rounds_its_part_of_the_inputs(kind: str, tiny_bloom: Path, tmp_path: Path) -> None:
    dequantized = dequantized_folder(tiny_bloom, tmp_path / "dequantized", HEADS["Bloom"], ranks=2, kind=kind)
    expected = torch.tensor(logprobs_of(dequantized))
    found = torch.tensor(logprobs_of(tiny_bloom, tensor_parallel_size=2, quantization=kind))
    assert SAME["digits"] < rms(found - expected) <= NEAR[kind]


def int4_folder(folder: Path, target: Path, head: str) -> Path:
    """A copy of a folder with the values that int4 weights, and the head's int8 ones, stand for."""

    def dequantize(state: dict[str, Tensor]) -> None:
        for name, weight in state.items():
            if is_quantized(name, weight):
                turned = TRANSPOSED.search(name) is not None
                part = rounded_to_4_bits(weight.T if turned else weight)
                state[name] = (part.T if turned else part).contiguous()
        state[head] = rounded(state[head], torch.int8)

    return changed_folder(folder, target, dequantize)


@pytest.mark.parametrize("family", FAMILIES)
def test_int4_is_near_full_precision_and_a_checkpoint_of_the_same_values(
    family: str, make_model: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_model(family)

    expected, full = logits_of(int4_folder(folder, tmp_path / "rounded", HEADS[family])), logits_of(folder)
    for way, bound in (("kernels", IN_15_BITS), ("widened", IN_BF16)):
        if not multiply(way, monkeypatch):
            continue
        found = logits_of(folder, quantization="int4")
        assert (found - expected).norm() <= bound * expected.norm()
        assert 2 * IN_BF16 * full.norm() < (found - full).norm() < full.norm()


def test_less_is_held_and_the_log_says_of_what(tiny_bloom: Path, caplog: pytest.LogCaptureFixture) -> None:
    with (
        caplog.at_level("INFO", logger="hasten"),
        LLM(tiny_bloom, device="cpu", quantization="int8", **OPTIONS) as llm,
    ):
        model: Any = llm.engine.worker.runner.model
    message = next(record.getMessage() for record in caplog.records if "loaded" in record.getMessage())
    assert "GB of weights as int8 and torch.float32 in" in message
    held = model.layers["0"].mlp.up.packed
    if native.integer_kernels() is None:
        assert (held.plain if held.blocked is None else held.blocked).dtype == torch.int8
    else:
        assert held.integers.values.dtype == torch.uint8
    assert (held.plain is None) == (held.integers is not None or int8.exact_int8())
    assert not any("mixture" in record.getMessage() for record in caplog.records)


def test_experts_stay_in_full_precision_and_the_log_says_so(
    make_model: MakeModel, caplog: pytest.LogCaptureFixture
) -> None:
    folder = make_model("Qwen2Moe", num_experts=4, moe_intermediate_size=32, shared_expert_intermediate_size=32)
    with (
        caplog.at_level("INFO", logger="hasten"),
        LLM(folder, device="cpu", quantization="int8", **OPTIONS) as llm,
    ):
        assert len(llm.generate([PROMPTS[1]], GREEDY, use_tqdm=False)[0].outputs[0].token_ids) == 4
        model: Any = llm.engine.worker.runner.model
        layer = model.layers["0"]
    assert layer.experts.packed.linears[0][0].scales is None
    shared = layer.experts.shared.down.packed
    assert (shared.scales if shared.integers is None else shared.integers) is not None
    assert "quantization int8: the experts of the mixture are in torch.float32" in caplog.text


@pytest.fixture
def ft(tiny_bloom: Path, tmp_path: Path) -> Path:
    """A folder in FasterTransformer's format."""
    convert(Conversion(str(tiny_bloom), str(tmp_path / "ft")))
    return tmp_path / "ft" / "1-gpu"


def with_mode(folder: Path, mode: str) -> Path:
    ini = folder / "config.ini"
    ini.write_text(ini.read_text().replace("end_id=", f"int8_mode={mode}\nend_id="))
    return folder


def test_config_ini_chooses_it_as_in_fastertransformer(ft: Path, tiny_bloom: Path) -> None:
    assert open_checkpoint(ft).quantization is None
    assert open_checkpoint(with_mode(ft, "1"), verify=False).quantization == "int8"
    found = logits_of(ft, verify_checksums=False)
    assert torch.equal(found, logits_of(tiny_bloom, quantization="int8"))


@pytest.mark.parametrize("mode", ["2", "3", "yes"])
def test_other_modes_are_refused(mode: str, ft: Path) -> None:
    with pytest.raises(UnsupportedError) as caught:
        open_checkpoint(with_mode(ft, mode), verify=False)
    assert f"config.ini: int8_mode is '{mode}', but must be 0 or 1: 2 is SmoothQuant, whose int8" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_other_schemes_are_refused_by_name(tiny_bloom: Path) -> None:
    with pytest.raises(ConfigError, match=r"^quantization 'int3' is not supported; there is int8, w8a8, fp8"):
        LLM(tiny_bloom, quantization="int3")  # type: ignore[arg-type]  # as a user may


def test_a_weight_with_nan_is_named(tiny_bloom: Path, tmp_path: Path) -> None:
    def damage(state: dict[str, Tensor]) -> None:
        state["transformer.h.1.mlp.dense_h_to_4h.weight"][7, 3] = float("nan")

    damaged = changed_folder(tiny_bloom, tmp_path / "damaged", damage)
    with pytest.raises(CheckpointError, match=r"tensor layers\.1\.mlp\.up\.weight has NaN or infinity in row 7"):
        LLM(damaged, device="cpu", quantization="int8", **OPTIONS)


@pytest.mark.gpu
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("dtype", "bound"), [("fp16", 6e-3), ("bf16", 5e-2)])
@pytest.mark.parametrize("enforce_eager", [False, True], ids=["graphs", "eager"])
@pytest.mark.parametrize("quantization", ["int8", "w8a8", "fp8", "int4"])
def test_a_gpu_computes_the_same(
    family: str,
    quantization: Quantization,
    dtype: DTypeName,
    bound: float,
    enforce_eager: bool,
    make_model: MakeModel,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sizes = {"n_embd": 128} if family == "GPT2" else {"hidden_size": 128}  # wide enough for the kernel for some rows

    def round_weights(state: dict[str, Tensor]) -> None:
        # both devices then quantize the same values: a value that the type moves across a rounding boundary becomes
        # another int8, which changes the logits more than computing in the type does
        state.update({name: weight.to(TORCH_DTYPES[dtype]).float() for name, weight in state.items()})

    folder = changed_folder(make_model(family, **sizes), tmp_path / "rounded", round_weights)
    multiply("widened", monkeypatch)
    if quantization == "int4":  # whose products a CPU computes in bf16
        right = logits_of(int4_folder(folder, tmp_path / "int4", HEADS[family]))
    else:
        right = logits_of(folder, quantization=quantization)
    options = OPTIONS | {"dtype": dtype, "quantization": quantization, "enforce_eager": enforce_eager}
    found = torch.cat(engine_logits(folder, PROMPTS, [ids_of(DECODED)] * len(PROMPTS), "cuda", **options)).cpu()
    error = (found - right).norm()
    if quantization in ("int8", "int4"):
        assert error / right.norm() <= bound
        return
    # The types' own rounding makes inputs become the other one of two numbers: that changes logits less than rounding
    # inputs at all does, or in bf16 about as much.
    most = 0.7 if dtype == "fp16" else 1.4
    assert error <= most * (right - logits_of(folder)).norm()
