"""Whole models with a key/value cache in 8 bits."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from tests.conftest import MakeModel
from tests.encoder_decoders import save_encoder_decoder
from tests.encoders import save_encoder
from tests.engine_logits import DECODED, engine_logits
from tests.quantization.definition import changed_folder
from torch import Tensor

from hasten import LLM, SamplingParams, ops
from hasten.checkpoint.plan import open_checkpoint
from hasten.core.errors import CheckpointError, ConfigError, UnsupportedError
from hasten.engine.cache_ranges import stored_ranges
from hasten.engine.runner import Runner
from hasten.parallel.groups import TensorGroup

pytestmark = pytest.mark.any_python

OPTIONS: dict[str, Any] = {"dtype": "fp32", "kv_cache_memory": 1 << 20, "device": "cpu"}
TYPES = list(ops.CACHE_DTYPES)
NEAR = {"fp8": 0.2, "int8": 0.1}
"""Root mean square of the differences from a cache in fp32, divided by the logits' standard deviation."""
FAMILIES: dict[str, dict[str, Any]] = {
    "Bloom": {},
    "Llama": {"num_key_value_heads": 2},
    "Gemma2": {"head_dim": 16, "sliding_window": 24},
}
"""ALiBi; groups of heads that turn; windows and capped scores."""


def ids_of(length: int) -> list[int]:
    return torch.randint(200, (length,), generator=torch.Generator().manual_seed(length)).tolist()


PROMPTS = [ids_of(length) for length in (1, 17, 40)]


@contextmanager
def engine(folder: Path, **options: Any) -> Iterator[LLM]:
    with LLM(folder, **{**OPTIONS, **options}) as llm:
        yield llm


def logits_of(folder: Path, device: str = "cpu", **options: Any) -> Tensor:
    options = {**OPTIONS, **options}
    del options["device"]
    followed_by = [ids_of(DECODED)] * len(PROMPTS)
    return torch.cat(engine_logits(folder, PROMPTS, followed_by, device, **options)).cpu()


def distance(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).square().mean().sqrt() / expected.std())


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_near_those_of_a_cache_in_full_precision(family: str, make_model: MakeModel) -> None:
    folder = make_model(family, **FAMILIES[family])
    full = logits_of(folder)
    for name in TYPES:
        assert 1e-5 < distance(logits_of(folder, kv_cache_dtype=name), full) <= NEAR[name]


def test_the_same_memory_holds_as_many_more_tokens_and_the_engine_says_so(
    tiny_bloom: Path, caplog: pytest.LogCaptureFixture
) -> None:
    memory = {"kv_cache_memory": 40 * 3 * 2 * 64 * 16 * 4}  # keys and values of 3 layers, 64 wide, of 40 blocks in fp32
    with engine(tiny_bloom, **memory) as full, engine(tiny_bloom, dtype="bf16", **memory) as half:
        assert (full.engine.worker.num_blocks, half.engine.worker.num_blocks) == (40, 80)
    with caplog.at_level("INFO", logger="hasten"), engine(tiny_bloom, kv_cache_dtype="fp8_e4m3", **memory) as llm:
        assert "fp8 key/value cache of 160 blocks of 16 tokens (1 MiB per rank)" in repr(llm)
    assert "key/value cache in fp8, with a scale for each head from random tokens" in caplog.text


@pytest.mark.parametrize("name", TYPES)
def test_shared_copied_and_preempted_blocks_hold_the_same(name: str, make_model: MakeModel) -> None:
    """Prefixes, several completions, beams and preemptions, compared with requests that are alone."""
    folder = make_model("Llama", num_key_value_heads=2)
    prompts = [ids_of(48) + ids_of(length) for length in (3, 9, 20)]
    kinds = [
        SamplingParams(temperature=0, max_tokens=24, ignore_eos=True),
        SamplingParams(temperature=1, seed=3, n=3, max_tokens=24, ignore_eos=True),
        SamplingParams(beam_width=3, n=3, max_tokens=8),
    ]
    options = {"kv_cache_dtype": name, "deterministic": True, "max_model_len": 128}

    def tokens(outputs: Any) -> list[list[list[int]]]:
        return [[list(completion.token_ids) for completion in output.outputs] for output in outputs]

    with engine(folder, **options, enable_prefix_caching=False) as llm:
        alone = [tokens(llm.generate([prompt], params))[0] for prompt, params in zip(prompts, kinds, strict=True)]
        block_bytes = llm.engine.worker.runner.block_bytes
    with engine(folder, **options, kv_cache_memory=14 * block_bytes) as llm:
        for _ in range(2):
            assert tokens(llm.generate(prompts, kinds)) == alone
        assert llm.engine.scheduler.blocks.prefix_hits > 0
        assert llm.engine.scheduler.stats.preemptions > 0


@pytest.mark.usefixtures("forked_ranks")
@pytest.mark.parametrize("split", [{"tensor_parallel_size": 2}, {"pipeline_parallel_size": 2}], ids=str)
def test_ranks_hold_their_part(split: dict[str, int], make_model: MakeModel) -> None:
    folder = make_model("Llama", num_key_value_heads=2, num_hidden_layers=2)
    params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)
    scored: list[list[float]] = []
    for options in ({}, {"kv_cache_dtype": "int8"}, {"kv_cache_dtype": "int8", **split}):
        with engine(folder, **options) as llm:
            (output,) = llm.generate([PROMPTS[-1]], params, use_tqdm=False)
        assert output.prompt_logprobs is not None
        scored.append([next(iter(entry.values())).logprob for entry in output.prompt_logprobs if entry])
    full, each, several = scored
    assert several == pytest.approx(each, abs=1e-3)
    assert several != pytest.approx(full, abs=1e-4)


HEADS, LAYERS = 2, 2
SCHEME = {"num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": True, "dynamic": False}


@pytest.fixture
def with_scales(make_model: MakeModel, tmp_path: Path) -> Callable[..., Path]:
    """A checkpoint of compressed-tensors that has scales of its cache alone; `change` is made to its tensors."""
    folder = make_model("Llama", num_key_value_heads=HEADS, num_hidden_layers=LAYERS)

    def make(
        change: Callable[[dict[str, Tensor]], object] = lambda _: None, scheme: dict[str, Any] | None = SCHEME
    ) -> Path:
        def add(state: dict[str, Tensor]) -> None:
            for layer in range(LAYERS):
                module = f"model.layers.{layer}.self_attn"
                state[f"{module}.k_scale"] = torch.tensor([0.01 * (layer + 1)], dtype=torch.bfloat16)
                state[f"{module}.v_scale"] = torch.tensor([[[0.02]], [[0.03]]])
            change(state)

        result = changed_folder(folder, tmp_path / "scaled", add)
        config = json.loads((result / "config.json").read_text())
        quantized = {"quant_method": "compressed-tensors", "config_groups": {}, "kv_cache_scheme": scheme}
        (result / "config.json").write_text(json.dumps(config | {"quantization_config": quantized}))
        return result

    return make


def test_scales_of_a_checkpoint_are_used(with_scales: Callable[..., Path], caplog: pytest.LogCaptureFixture) -> None:
    folder = with_scales()
    with caplog.at_level("INFO", logger="hasten"), engine(folder, kv_cache_dtype="fp8") as llm:
        layers = cast(Any, llm.engine.worker.runner.model).layers
        for number in range(LAYERS):
            scales_2m = layers[str(number)].attention.cache_scales.scales_2m
            key = float(torch.tensor(0.01 * (number + 1), dtype=torch.bfloat16))
            assert torch.allclose(scales_2m, torch.tensor([[key, key], [0.02, 0.03]]), rtol=1e-6)
        assert len(llm.generate([PROMPTS[1]], SamplingParams(max_tokens=2, temperature=0, ignore_eos=True))) == 1
    assert "key/value cache in fp8, with a scale for each head from the checkpoint" in caplog.text
    with engine(folder, kv_cache_dtype="int8") as llm:  # the same ranges in another type
        scales_2m = cast(Any, llm.engine.worker.runner.model).layers["0"].attention.cache_scales.scales_2m
        assert scales_2m[1].tolist() == pytest.approx([0.02 * 448 / 127, 0.03 * 448 / 127])
    with engine(folder) as llm:
        assert cast(Any, llm.engine.worker.runner.model).layers["0"].attention.cache_scales is None


def test_each_rank_takes_the_scales_of_its_heads(with_scales: Callable[..., Path]) -> None:
    checkpoint = open_checkpoint(with_scales(scheme=SCHEME | {"type": "int"}))
    runner = cast(Runner, SimpleNamespace(attention_names=["layers.1.attention"]))
    for size, value in ((2, 0.03), (4, 0.03)):
        found = stored_ranges(runner, checkpoint, TensorGroup(size - 1, size))
        assert found is not None
        assert found[0][1].tolist() == pytest.approx([value * 127])


def without(name: str) -> Callable[[dict[str, Tensor]], object]:
    return lambda state: state.pop(f"model.layers.1.self_attn.{name}")


def of(name: str, scale: Tensor) -> Callable[[dict[str, Tensor]], object]:
    return lambda state: state.update({f"model.layers.1.self_attn.{name}": scale})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("v_scale"), r"lacks scales of the keys or values of layers\.1\.attention"),
        (of("k_scale", torch.tensor([0.0])), r"'layers\.1\.self_attn\.k_scale' is no positive number"),
        (of("k_scale", torch.tensor([float("nan")])), r"'layers\.1\.self_attn\.k_scale' is no positive number"),
        (of("v_scale", torch.ones(3)), r"has shape \(3,\) and type torch\.float32, but must be one number or"),
    ],
)
def test_damaged_scales_are_named(
    change: Callable[[dict[str, Tensor]], object], message: str, with_scales: Callable[..., Path]
) -> None:
    with pytest.raises(CheckpointError, match=message):
        LLM(with_scales(change), kv_cache_dtype="fp8", **OPTIONS)


def test_schemes_of_other_caches_are_refused(with_scales: Callable[..., Path]) -> None:
    folder = with_scales(scheme=SCHEME | {"num_bits": 4})
    with pytest.raises(UnsupportedError, match=r"^kv_cache_scheme: num_bits 8 and symmetric true are supported$"):
        LLM(folder, kv_cache_dtype="fp8", **OPTIONS)


def test_other_types_are_refused(tiny_bloom: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        ConfigError, match=r"^kv_cache_dtype 'fp4' is not supported; there is auto, fp8, fp8_e4m3, int8$"
    ):
        LLM(tiny_bloom, kv_cache_dtype="fp4")  # type: ignore[arg-type]  # as a user may
    with pytest.raises(
        ConfigError, match=r"^kv_cache_dtype: BertModel generates no text, and keeps no keys and values"
    ):
        LLM(save_encoder(tmp_path, "Bert"), kv_cache_dtype="int8", device="cpu")
    with pytest.raises(
        ConfigError, match=r"^kv_cache_dtype is for models without an encoder; T5ForConditionalGeneration has"
    ):
        LLM(save_encoder_decoder(tmp_path / "t5", "t5"), kv_cache_dtype="int8", device="cpu")
    monkeypatch.setattr(ops, "multiplies", lambda *_: False)
    with pytest.raises(UnsupportedError, match=r"^kv_cache_dtype: fp8 needs a GPU of compute capability 8\.9 or later"):
        LLM(tiny_bloom, kv_cache_dtype="fp8", **OPTIONS)


def test_keys_that_are_not_finite_have_no_scale(tiny_bloom: Path, tmp_path: Path) -> None:
    def damage(state: dict[str, Tensor]) -> None:
        state["transformer.h.0.self_attention.query_key_value.weight"] *= float("inf")

    damaged = changed_folder(tiny_bloom, tmp_path / "damaged", damage)
    with pytest.raises(
        ConfigError, match=r"^kv_cache_dtype int8: keys or values of the model are not finite in float32"
    ):
        LLM(damaged, kv_cache_dtype="int8", **OPTIONS)


@pytest.mark.gpu
@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize(("dtype", "bound"), [("fp16", 0.01), ("bf16", 0.05)])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_gpu_computes_the_same(family: str, dtype: str, bound: float, name: str, make_model: MakeModel) -> None:
    folder = make_model(family, **FAMILIES[family])
    right, full = logits_of(folder, kv_cache_dtype=name), logits_of(folder)
    options = {"dtype": dtype, "kv_cache_dtype": name, "kv_cache_memory": 8 << 20}
    found, eager = (logits_of(folder, "cuda", **options, enforce_eager=eager) for eager in (False, True))
    assert torch.allclose(found, eager, atol=1e-2)
    # a key that lies between two numbers may become the other one of them, which changes as much as its rounding did
    assert distance(found, right) <= bound + distance(right, full)
