"""The demo model knows the ends of the stories, and would not if attention, norms or cache were a little wrong."""

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from torch import Tensor

from hasten.bench import lambada
from hasten.bench.engines import HastenEngine, HuggingFaceEngine
from hasten.core.dtypes import Quantization
from hasten.engine.calibration.quantize import QuantizeOptions, quantize
from hasten.engine.llm import LLM
from hasten.layers.attention import Attention
from hasten.layers.norm import LayerNorm
from hasten.layers.position import alibi_slopes
from hasten.models.bloom import BloomBlock, BloomForCausalLM
from hasten.ops import cpu, reference

EXAMPLES = Path(__file__).parents[2] / "examples"
FOLDER, STORIES = EXAMPLES / "demo-model", EXAMPLES / "stories" / "test.jsonl"

MOST_BYTES = 8 * 1000**2
LEAST_ACCURACY = 60.0
HARMED = 48
"""Stories on which a harm is measured."""
CALIBRATED = 128
"""Other stories with which weights of 4 bits are calibrated."""
BESIDE_HUGGING_FACE = 32
"""Stories that Hugging Face answers as well."""


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    # without a prefix cache: what a harmed model has computed must not serve the next test
    with LLM(FOLDER, dtype="fp32", device="cpu", kv_cache_memory=64 << 20, enable_prefix_caching=False) as engine:
        yield engine


@pytest.fixture(scope="module")
def model(llm: LLM) -> BloomForCausalLM:
    found = llm.engine.worker.runner.model
    assert isinstance(found, BloomForCausalLM)
    return found


@pytest.fixture(scope="module")
def samples(llm: LLM) -> list[lambada.Sample]:
    return lambada.read_samples(str(STORIES), llm.tokenizer)


def answers(llm: LLM, samples: list[lambada.Sample]) -> lambada.LambadaResult:
    (result,) = lambada.run([HastenEngine(llm)], samples, llm.tokenizer, batch_size=16)
    return result


@pytest.fixture(scope="module")
def unharmed(llm: LLM, samples: list[lambada.Sample]) -> lambada.LambadaResult:
    """What the model makes of all stories."""
    return answers(llm, samples)


Ruins = Callable[[], None]


@pytest.fixture
def assert_ruined(
    llm: LLM, model: BloomForCausalLM, samples: list[lambada.Sample], unharmed: lambada.LambadaResult
) -> Ruins:
    """Fail unless the model, as it is now, gets fewer than half as many stories right as unharmed."""

    def check() -> None:
        for attention in attentions(model):
            attention.key_cache.zero_()
            attention.value_cache.zero_()
        before = sum(answer.right for answer in unharmed.answers[:HARMED])
        now = answers(llm, samples[:HARMED]).right
        assert now < before / 2, f"{now} of {HARMED} are still right; unharmed it was {before}"

    return check


def blocks(model: BloomForCausalLM) -> list[BloomBlock]:
    return [layer for layer in model.layers.values() if isinstance(layer, BloomBlock)]


def attentions(model: BloomForCausalLM) -> list[Attention]:
    return [block.attention for block in blocks(model)]


def test_the_folder_is_small_and_its_heads_can_be_divided(model: BloomForCausalLM) -> None:
    assert sum(path.stat().st_size for path in FOLDER.rglob("*")) <= MOST_BYTES
    assert all(attention.num_heads % 4 == 0 for attention in attentions(model))


def test_it_knows_how_most_stories_end(unharmed: lambada.LambadaResult) -> None:
    assert unharmed.total == 512
    assert unharmed.accuracy >= LEAST_ACCURACY


def points_lost(llm: LLM, samples: list[lambada.Sample], unharmed: lambada.LambadaResult) -> float:
    """What a quantized model loses of the unharmed one's accuracy on these, the first samples of all.

    A hundred would be too few: other samples of a calibration, or another processor's rounding, move it by three there.
    """
    before = sum(answer.right for answer in unharmed.answers[: len(samples)])
    return 100 * (before - answers(llm, samples).right) / len(samples)


# float8 is computed by conversions on a CPU, which takes longer
@pytest.mark.parametrize(("scheme", "stories"), [("int8", 512), ("w8a8", 512), ("fp8", 256)])
def test_weights_of_8_bits_cost_it_at_most_a_point(
    scheme: Quantization, stories: int, samples: list[lambada.Sample], unharmed: lambada.LambadaResult
) -> None:
    with LLM(FOLDER, quantization=scheme, dtype="fp32", device="cpu", kv_cache_memory=64 << 20) as quantized:
        assert points_lost(quantized, samples[:stories], unharmed) <= 1


def test_a_calibrated_checkpoint_with_weights_of_4_bits_costs_it_at_most_two_points(
    samples: list[lambada.Sample], unharmed: lambada.LambadaResult, llm: LLM, tmp_path: Path
) -> None:
    others = tmp_path / "others.jsonl"
    command: list[str | Path] = [sys.executable, STORIES.with_name("generate.py"), "--exclude", STORIES]
    subprocess.run([*command, "--output", others, "--count", str(CALIBRATED), "--seed", "1"], check=True)
    read = lambada.read_samples(str(others), llm.tokenizer)
    calibration = [sample.prompt_ids + sample.target_ids for sample in read]
    quantize(str(FOLDER), tmp_path / "out", QuantizeOptions("int4", samples=calibration, device="cpu"))
    with LLM(tmp_path / "out", dtype="fp32", device="cpu", kv_cache_memory=64 << 20) as quantized:
        assert points_lost(quantized, samples, unharmed) <= 2


def test_its_answers_are_those_of_hugging_face(
    samples: list[lambada.Sample], unharmed: lambada.LambadaResult, llm: LLM
) -> None:
    reference = HuggingFaceEngine(str(FOLDER), dtype="fp32", device="cpu")
    (theirs,) = lambada.run([reference], samples[:BESIDE_HUGGING_FACE], llm.tokenizer, batch_size=16)
    ours = unharmed.answers[:BESIDE_HUGGING_FACE]
    assert [answer.answer_ids for answer in ours] == [answer.answer_ids for answer in theirs.answers]


WRONG_SLOPES: dict[str, Tensor] = {
    "of 8 heads": alibi_slopes(8)[:4],
    "of heads in another order": alibi_slopes(4).roll(1),
}


@pytest.mark.parametrize("slopes_n", WRONG_SLOPES.values(), ids=list(WRONG_SLOPES))
def test_wrong_alibi_slopes_ruin_it(
    slopes_n: Tensor, model: BloomForCausalLM, assert_ruined: Ruins, monkeypatch: pytest.MonkeyPatch
) -> None:
    for attention in attentions(model):
        monkeypatch.setattr(attention, "slopes_n", slopes_n)
    assert_ruined()


SwapNorms = Callable[[BloomForCausalLM], None]


def swap_in_layer(number: int) -> SwapNorms:
    """Swap the two norms of one layer; a second call undoes it."""

    def swap(model: BloomForCausalLM) -> None:
        block = blocks(model)[number]
        block.input_norm, block.post_norm = block.post_norm, block.input_norm

    return swap


def swap_ends(model: BloomForCausalLM) -> None:
    """Swap the norm behind the embedding and the last one; a second call undoes it."""
    assert isinstance(model.final_norm, LayerNorm)
    model.embedding_norm, model.final_norm = model.final_norm, model.embedding_norm


SWAPS: dict[str, SwapNorms] = {
    "first layer": swap_in_layer(0),
    "last layer": swap_in_layer(3),
    "embedding and end": swap_ends,
}


@pytest.mark.parametrize("swap", SWAPS.values(), ids=list(SWAPS))
def test_swapped_layer_norms_ruin_it(swap: SwapNorms, model: BloomForCausalLM, assert_ruined: Ruins) -> None:
    swap(model)
    try:
        assert_ruined()
    finally:
        swap(model)


def shifted(slots_t: Tensor, cache: Tensor, by: int) -> Tensor:
    """Each slot moved by so many, from one end of the cache to the other."""
    return (slots_t + by) % (cache.shape[0] * cache.shape[1])


@pytest.mark.parametrize(
    ("of_keys", "of_values"), [(-1, -1), (1, 0), (0, 1)], ids=["keys and values", "keys alone", "values alone"]
)
def test_shifted_cache_slots_ruin_it(
    of_keys: int, of_values: int, assert_ruined: Ruins, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write_cache(
        key_tmd: Tensor, value_tmd: Tensor, key_cache: Tensor, value_cache: Tensor, slots_t: Tensor, *, scales: None
    ) -> None:
        for new_tmd, cache, by in ((key_tmd, key_cache, of_keys), (value_tmd, value_cache, of_values)):
            cache.flatten(0, 1)[shifted(slots_t, cache, by)] = new_tmd

    monkeypatch.setattr(reference.heads, "write_cache", write_cache)
    monkeypatch.setattr(cpu.heads, "store_heads", reference.store_heads)
    assert_ruined()
