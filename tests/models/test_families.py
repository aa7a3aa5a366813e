"""Models of every family beside Hugging Face's own, in fp32."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.conftest import MakeModel
from tests.models import cases_experts, cases_gpt2, cases_llama, cases_parallel
from tests.models.conftest import BOUND, Worst, load_theirs
from tests.models.families import Change, Model
from torch import Tensor

from hasten import LLM, SamplingParams
from hasten.checkpoint import hugging_face, sources
from hasten.checkpoint.convert import Conversion, convert
from hasten.checkpoint.files import read_json
from hasten.checkpoint.hugging_face import read_hf_config
from hasten.core.errors import CheckpointError, UnsupportedError
from hasten.layers.experts import Experts
from hasten.models.hf_config import Fields
from hasten.models.registry import architecture_of, model_class
from hasten.parallel.groups import ParallelGroups, TensorGroup
from hasten.parallel.shard import shard_shape

ALL = (cases_llama.CASES, cases_gpt2.CASES, cases_parallel.CASES, cases_experts.CASES)
MODELS = {name: model for cases in ALL for name, model in cases.models.items()}
CONTROLS = {what: control for cases in ALL for what, control in cases.controls.items()}
WEIGHTS = {what: weight for cases in ALL for what, weight in cases.weights.items()}
LEFTOVERS = {name: leftovers for cases in ALL for name, leftovers in cases.leftovers.items()}

LENGTHS = [1, 2, 6, 7, 8, 9, 15, 16, 17, 31, 33, 48, 70]
"""On both sides of a block, of the windows and of the ropes' original lengths."""
COUNT = 12


@pytest.mark.parametrize("model", MODELS.values(), ids=list(MODELS))
def test_logits_are_those_of_hugging_face(model: Model, make_model: MakeModel, worst_logit: Worst) -> None:
    family, options = model
    folder = make_model(family, **options)
    # all prompts in one step, and in steps so small that prompts are cut and stand beside decodes
    for budget in (2048, 21):
        assert worst_logit(folder, LENGTHS, max_num_batched_tokens=budget, max_num_seqs=16) <= BOUND


@pytest.mark.parametrize(("name", "change"), CONTROLS.values(), ids=list(CONTROLS))
def test_what_is_left_out_shows(
    name: str, change: Change, make_model: MakeModel, worst_logit: Worst, monkeypatch: pytest.MonkeyPatch
) -> None:
    family, options = MODELS[name]
    folder = make_model(family, **options)
    monkeypatch.setattr(hugging_face, "read_hf_config", lambda folder: change(read_hf_config(folder)))
    assert worst_logit(folder, LENGTHS) > 2 * BOUND


@pytest.mark.parametrize(("name", "weight"), WEIGHTS.values(), ids=list(WEIGHTS))
def test_every_weight_counts(
    name: str, weight: str, make_model: MakeModel, worst_logit: Worst, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    family, options = MODELS[name]
    folder = make_model(family, **options)
    without = changed(folder, tmp_path, lambda state: state[weight].fill_(0.3))
    opened = sources.open_source
    monkeypatch.setattr("hasten.checkpoint.plan.open_source", lambda _, ranks: opened(without, ranks))
    assert worst_logit(folder, [5, 20]) > 10 * BOUND


def changed(folder: Path, tmp_path: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> Path:
    """A copy with other tensors."""
    path = Path(shutil.copytree(folder, tmp_path / "changed"))
    state = load_file(path / "model.safetensors")
    change(state)
    save_file(state, path / "model.safetensors", metadata={"format": "pt"})
    return path


# --- the engine -------------------------------------------------------------------------------------------------------

GREEDY = SamplingParams(temperature=0, max_tokens=COUNT, ignore_eos=True)
PROMPTS = [[(7 * n + k) % 400 + 4 for k in range(n)] for n in (1, 2, 9, 16, 17, 33, 70)]


@pytest.fixture(scope="module")
def right_tokens(make_model: MakeModel) -> Callable[[str], list[list[int]]]:
    """The tokens that Hugging Face's model chooses, without a cache."""
    known: dict[str, list[list[int]]] = {}

    def make(name: str) -> list[list[int]]:
        if name not in known:
            family, options = MODELS[name]
            model = load_theirs(make_model(family, **options))
            known[name] = [continued(model, prompt) for prompt in PROMPTS]
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


@pytest.mark.parametrize("name", [name for cases in ALL for name in cases.served])
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


SUMS = {"gptj": 1, "falcon 40b": 1, "stablelm, normed heads, parallel": 1, "olmo2": 3}
"""Sums over ranks per layer where they are not two; OLMo 2 has one for its norms of all heads."""


@pytest.mark.usefixtures("forked_ranks")
@pytest.mark.parametrize(("name", "ranks"), [case for cases in ALL for case in cases.ranks])
def test_ranks_give_the_tokens_of_one(
    name: str,
    ranks: int,
    make_model: MakeModel,
    right_tokens: Callable[[str], list[list[int]]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And add up what all have as often as it takes: once a layer where attention and MLP stand side by side."""
    family, options = MODELS[name]
    with LLM(make_model(family, **options), tensor_parallel_size=ranks, device="cpu", kv_cache_memory=1 << 22) as llm:
        assert generated(llm) == right_tokens(name)
        sums, all_reduce = list[Tensor](), TensorGroup.all_reduce

        def counted(self: TensorGroup, tensor: Tensor) -> Tensor:
            sums.append(tensor)
            return all_reduce(self, tensor)

        monkeypatch.setattr(TensorGroup, "all_reduce", counted)
        llm.generate([[5, 6, 7]], SamplingParams(temperature=0, max_tokens=1))
        layers = llm.engine.model_config.num_layers
    assert len(sums) == 1 + layers * SUMS.get(name, 2)  # one for the embedding


@pytest.mark.usefixtures("forked_ranks")
@pytest.mark.parametrize(("name", "ranks"), [case for cases in ALL for case in cases.whole_experts])
def test_ranks_with_whole_experts_give_the_tokens_of_one(
    name: str, ranks: int, make_model: MakeModel, right_tokens: Callable[[str], list[list[int]]]
) -> None:
    family, options = MODELS[name]
    limits: dict[str, Any] = {"tensor_parallel_size": ranks, "device": "cpu", "kv_cache_memory": 1 << 22}
    with LLM(make_model(family, **options), expert_parallel=True, **limits) as llm:
        mixtures = [module for module in llm.engine.worker.runner.model.modules() if isinstance(module, Experts)]
        count = options["num_experts" if "num_experts" in options else "num_local_experts"]
        assert {module.packed.count for module in mixtures} == {count // ranks}
        assert generated(llm) == right_tokens(name)


@pytest.mark.parametrize(("name", "ranks"), [case for cases in ALL for case in cases.converted])
def test_a_converted_checkpoint_gives_the_same_tokens(
    name: str, ranks: int, make_model: MakeModel, right_tokens: Callable[[str], list[list[int]]], tmp_path: Path
) -> None:
    family, options = MODELS[name]
    convert(Conversion(str(make_model(family, **options)), str(tmp_path / "out"), ranks=ranks, format="safetensors"))
    with LLM(tmp_path / "out", kv_cache_memory=1 << 22) as llm:
        assert generated(llm) == right_tokens(name)


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


@pytest.mark.parametrize("name", list(MODELS))
def test_all_keys_of_a_config_are_known(name: str, make_model: MakeModel) -> None:
    family, options = MODELS[name]
    fields = Fields(read_json(make_model(family, **options) / "config.json"))
    cls = model_class(architecture_of(fields))
    cls.config_from_hf(fields)
    assert fields.unknown(cls.hf_harmless) == []


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("name", list(MODELS))
def test_the_map_is_that_of_the_module_and_of_hugging_face(name: str, size: int, make_model: MakeModel) -> None:
    family, options = MODELS[name]
    folder = make_model(family, **options)
    config = read_hf_config(folder)
    cls = model_class(config.architecture)
    with torch.device("meta"):
        model = cls(config, ParallelGroups(tensor=TensorGroup(size - 1, size)))
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


@pytest.mark.parametrize(("name", "leftovers"), LEFTOVERS.items(), ids=list(LEFTOVERS))
def test_leftovers_of_old_checkpoints_and_base_names(
    name: str, leftovers: list[str], make_model: MakeModel, tmp_path: Path
) -> None:
    family, options = MODELS[name]
    folder = make_model(family, **options)
    prefix = sources.open_source(folder).weight_map.hf_prefix

    def add(state: dict[str, torch.Tensor]) -> None:
        state.update({name: torch.arange(6) for name in leftovers})
        for name in [name for name in state if name.startswith(prefix)]:
            state[name.removeprefix(prefix)] = state.pop(name)

    old = changed(folder, tmp_path, add)
    opened = sources.open_source(old)
    assert {spec.name: opened.shard(spec, 0, 1).sum() for spec in opened.specs} == {
        spec.name: tensor.sum() for spec in opened.specs for tensor in [sources.open_source(folder).shard(spec, 0, 1)]
    }
    unknown = leftovers[0].removeprefix(prefix) + "s"
    strange = with_tensor(old, unknown)
    with pytest.raises(CheckpointError, match=f"holds unknown tensor '{unknown}'"):
        sources.open_source(strange)


def with_tensor(folder: Path, name: str) -> Path:
    state = load_file(folder / "model.safetensors")
    save_file(state | {name: torch.zeros(1)}, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_sharded_files(make_model: MakeModel, worst_logit: Worst, tmp_path: Path) -> None:
    from transformers import LlamaForCausalLM as Reference

    folder = make_model("Llama")
    sharded = Path(shutil.copytree(folder, tmp_path / "sharded"))
    (sharded / "model.safetensors").unlink()
    Reference.from_pretrained(folder).save_pretrained(sharded, max_shard_size=20_000)
    # the tensors of one parameter lie in several files
    assert len(list(sharded.glob("model-*.safetensors"))) > 4
    assert worst_logit(sharded, [5, 20]) <= BOUND
