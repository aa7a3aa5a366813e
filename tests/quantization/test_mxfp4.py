"""Checkpoints of gpt-oss with experts in MXFP4, compared with transformers' own dequantization."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.conftest import MakeModel
from tests.models.conftest import BOUND
from tests.quantization.writers import set_config
from tests.rank_shards import rank_shards
from torch import Tensor

from hasten import LLM, SamplingParams
from hasten.checkpoint.convert import Conversion, convert
from hasten.checkpoint.hugging_face import HuggingFaceSource
from hasten.checkpoint.plan import open_checkpoint
from hasten.checkpoint.sources import open_dummy, open_source
from hasten.cli.main import main
from hasten.core.errors import CheckpointError, UnsupportedError
from hasten.quantization.formats.mxfp4 import dequantized

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "head_dim": 16,
    "sliding_window": 9,
}
CONFIG = {
    "quant_method": "mxfp4",
    "modules_to_not_convert": [
        "model.layers.*.self_attn",
        "model.layers.*.mlp.router",
        "model.embed_tokens",
        "lm_head",
    ],
}
CPU = torch.device("cpu")
GATE_UP = "model.layers.1.mlp.experts.gate_up_proj"


def is_of_experts(name: str) -> bool:
    return name.endswith(("experts.gate_up_proj", "experts.down_proj"))


def theirs(blocks: Tensor, scales: Tensor, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    made: Tensor = convert_moe_packed_tensors(blocks, scales, dtype=dtype)
    return made


@pytest.fixture(scope="module")
def folders(make_model: MakeModel, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A checkpoint with random experts in MXFP4, and one of the values that transformers makes of them."""
    result = tmp_path_factory.mktemp("mxfp4")
    full, quantized = result / "full", result / "quantized"
    state = load_file(shutil.copytree(make_model("GptOss", **SIZES), full) / "model.safetensors")
    shutil.copytree(full, quantized)
    stored = {name: tensor for name, tensor in state.items() if not is_of_experts(name)}
    generator = torch.Generator().manual_seed(0)
    for name in filter(is_of_experts, state):
        experts, into, out = state[name].shape
        shape = experts, out, into // 32
        blocks = torch.randint(256, (*shape, 16), dtype=torch.uint8, generator=generator)
        scales = torch.randint(122, 126, shape, dtype=torch.uint8, generator=generator)
        stored |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        state[name] = theirs(blocks, scales)
    for folder, tensors in ((full, state), (quantized, stored)):
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    set_config(quantized, quantization_config=CONFIG)
    return quantized, full


def test_every_code_and_every_scale_is_what_transformers_makes_of_it() -> None:
    blocks = torch.arange(256, dtype=torch.uint8).view(16, 16).expand(255, 2, 16, 16).contiguous()
    scales = torch.arange(255, dtype=torch.uint8).view(255, 1, 1).expand(255, 2, 16).contiguous()
    found = dequantized(blocks, scales)
    assert found.dtype is torch.bfloat16
    expected = theirs(blocks, scales).transpose(1, 2)
    assert torch.equal(found.view(torch.int16), expected.contiguous().view(torch.int16))  # 0 and -0 differ too


@pytest.mark.parametrize("whole", [False, True], ids=["experts divided", "whole experts"])
def test_values_are_exact_on_every_rank(whole: bool, folders: tuple[Path, Path]) -> None:
    quantized, full = map(open_checkpoint, folders)
    for size in (1, 2):
        for rank in range(size):
            found, expected = (rank_shards(each, rank, size, expert_parallel=whole) for each in (quantized, full))
            assert found.keys() == expected.keys()
            assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())


def test_tokens_are_those_of_transformers(folders: tuple[Path, Path]) -> None:
    from transformers import AutoModelForCausalLM, Mxfp4Config

    folder, prompts = folders[0], [[7, 9, 200], [(7 * k) % 400 + 4 for k in range(40)]]
    settings = Mxfp4Config(dequantize=True)
    kinds = {"dtype": torch.float32, "attn_implementation": "eager"}
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=settings, **kinds).eval()
    with LLM(folder, dtype="fp32", device="cpu", kv_cache_memory=1 << 22) as llm:
        assert llm.engine.worker.quantization is None  # nothing is left of it in memory
        outputs = llm.generate(prompts, SamplingParams(max_tokens=1, prompt_logprobs=1), use_tqdm=False)
    for prompt, output in zip(prompts, outputs, strict=True):
        with torch.inference_mode():
            expected = model(torch.tensor([prompt])).logits[0].log_softmax(-1)
        assert output.prompt_logprobs is not None
        for index, entry in enumerate(output.prompt_logprobs[1:]):
            token = prompt[index + 1]
            assert entry is not None
            assert entry[token].logprob == pytest.approx(float(expected[index, token]), abs=BOUND)


def test_the_memory_of_the_experts_is_said_before_they_are_loaded(
    folders: tuple[Path, Path], caplog: pytest.LogCaptureFixture
) -> None:
    quantized, full = folders
    open_source(full)
    assert caplog.messages == []
    open_source(quantized)
    (message,) = caplog.messages
    assert (
        "the experts are stored in mxfp4 and dequantized while they are loaded; in 16 bits they need 0.0 GB" in message
    )
    source = open_source(quantized)
    assert isinstance(source, HuggingFaceSource)
    assert source.dequantized_bytes == 2 * 2 * 4 * 3 * 64 * 32


def test_a_converted_checkpoint_is_in_full_precision(folders: tuple[Path, Path], tmp_path: Path) -> None:
    convert(Conversion(str(folders[0]), str(tmp_path / "out"), ranks=2))
    found, expected = (rank_shards(open_checkpoint(folder, 2), 1, 2) for folder in (tmp_path / "out", folders[1]))
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())


def test_random_weights_and_plans_are_those_of_full_precision(
    folders: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    shapes = [[spec.shape(result.config) for spec in result.specs] for result in map(open_dummy, folders, [CPU, CPU])]
    assert shapes[0] == shapes[1]
    found = []
    for folder in folders:
        assert main(["plan", str(folder), "--gpu", "H200", "--json"]) == 0
        found.append(json.loads(capsys.readouterr().out)["weights"])
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("kind", "edit", "message"),
    [
        ("scales", None, rf"lacks tensor '{GATE_UP[6:]}_scales', which mxfp4 keeps with '{GATE_UP[6:]}_blocks'"),
        ("scales", lambda s: s[:, :1], rf"tensor '{GATE_UP}_scales' has shape \(4, 1, 2\), but mxfp4 asks for"),
        ("scales", lambda s: s.fill_(255), rf"tensor '{GATE_UP}_scales' has NaN: the checkpoint is damaged"),
        ("blocks", lambda b: b.float(), rf"tensor '{GATE_UP}_blocks' has type torch.float32, but mxfp4 asks for"),
    ],
)  # fmt: skip
def test_damage_is_named(
    kind: str,
    edit: Callable[[Tensor], Tensor] | None,
    message: str,
    folders: tuple[Path, Path],
    tmp_path: Path,
) -> None:
    folder = Path(shutil.copytree(folders[0], tmp_path / "damaged"))
    state = load_file(folder / "model.safetensors")
    found = state.pop(f"{GATE_UP}_{kind}")
    if edit is not None:
        state[f"{GATE_UP}_{kind}"] = edit(found).contiguous()
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=message):
        rank_shards(open_checkpoint(folder), 0, 1)


def test_groups_must_divide_the_input_features(make_model: MakeModel, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(make_model("GptOss", **SIZES | {"hidden_size": 48}), tmp_path / "odd"))
    state = load_file(folder / "model.safetensors")
    bits = torch.zeros(4, 64, 1, 16, dtype=torch.uint8)
    state |= {f"{GATE_UP}_blocks": bits, f"{GATE_UP}_scales": bits[..., 0].contiguous()}
    del state[GATE_UP]
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    set_config(folder, quantization_config=CONFIG)
    with pytest.raises(CheckpointError, match=rf"'{GATE_UP}_blocks' is of 48 input features, no multiple of 32"):
        rank_shards(open_checkpoint(folder), 0, 1)


def test_other_models_in_this_format_are_refused_by_name(make_model: MakeModel, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(make_model("Llama"), tmp_path / "llama"))
    set_config(folder, quantization_config=CONFIG)
    with pytest.raises(UnsupportedError, match=r"quantization_config \(mxfp4\): .* are; give it in bf16"):
        open_source(folder)
