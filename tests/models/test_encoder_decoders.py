"""Encoder-decoders compared with transformers' `generate`, in fp32."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests.conftest import save_tokenizer
from tests.encoder_decoders import KINDS, save_encoder_decoder, their_logprobs, their_tokens, without_padding
from tests.models.families import with_attention

from hasten import LLM, SamplingParams
from hasten.checkpoint import hugging_face
from hasten.checkpoint.convert import Conversion, convert
from hasten.checkpoint.hugging_face import read_hf_config
from hasten.checkpoint.writers import Format
from hasten.core.errors import ConfigError, InvalidRequestError, UnsupportedError
from hasten.core.model_config import ModelConfig

PROMPTS = [[(7 * n + k * k) % 190 + 5 for k in range(n)] for n in (1, 2, 15, 16, 17, 33, 70, 150)]
GREEDY = SamplingParams(temperature=0, max_tokens=14, min_tokens=14)
BEAMS = SamplingParams(max_tokens=10, beam_width=3, n=2)
SAMPLED = SamplingParams(seed=5, n=3, max_tokens=20, ignore_eos=True)
Save = Callable[[str], Path]


@pytest.fixture(scope="module")
def save(tmp_path_factory: pytest.TempPathFactory) -> Save:
    """The folder of a kind, saved once."""
    made: dict[str, Path] = {}

    def of(kind: str) -> Path:
        if kind not in made:
            made[kind] = save_encoder_decoder(tmp_path_factory.mktemp(kind), kind)
        return made[kind]

    return of


def tokens(llm: LLM, params: SamplingParams, prompts: list[list[int]] = PROMPTS) -> list[list[list[int]]]:
    outputs = llm.generate(prompts, params, use_tqdm=False)
    return [[list(completion.token_ids) for completion in output.outputs] for output in outputs]


def greedy(folder: Path, count: int = 14) -> list[list[list[int]]]:
    return their_tokens(folder, PROMPTS, min_new_tokens=count, max_new_tokens=count)


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_and_beams_are_those_of_transformers(kind: str, save: Save) -> None:
    folder = save(kind)
    expected, beams = (
        greedy(folder),
        their_tokens(folder, PROMPTS, max_new_tokens=10, num_beams=3, num_return_sequences=2),
    )
    with LLM(folder, kv_cache_memory=1 << 22, overlap_steps=True) as llm:
        for _ in range(2):  # the second time with what the encoder left for the same prompts
            assert tokens(llm, GREEDY) == expected
        assert llm.engine.scheduler.blocks.prefix_hits >= sum(map(len, PROMPTS))
        assert [[without_padding(folder, beam) for beam in each] for each in tokens(llm, BEAMS)] == beams
        (output,) = llm.generate([PROMPTS[3]], SamplingParams(seed=1, logprobs=3, max_tokens=8), use_tqdm=False)
    found = output.outputs[0]
    assert found.logprobs is not None
    right = their_logprobs(folder, PROMPTS[3], found.token_ids)
    for index, top in enumerate(found.logprobs):
        assert all(abs(entry.logprob - float(right[index, token])) < 1e-4 for token, entry in top.items())


@pytest.mark.parametrize("kind", ["t5"])
def test_preempted_requests_go_on_with_the_same_tokens(kind: str, save: Save) -> None:
    folder = save(kind)
    with LLM(folder, kv_cache_memory=1 << 22, enable_prefix_caching=False) as llm:
        block, sampled = llm.engine.worker.runner.block_bytes, tokens(llm, SAMPLED)
        beams = tokens(llm, BEAMS)
    limits: dict[str, Any] = {"max_model_len": 150, "max_num_batched_tokens": 150, "max_num_seqs": 6}
    for cached in (True, False):
        with LLM(folder, kv_cache_memory=22 * block, enable_prefix_caching=cached, **limits) as llm:
            assert tokens(llm, GREEDY) == greedy(folder)
            assert tokens(llm, SAMPLED) == sampled
            assert tokens(llm, BEAMS) == beams
            assert llm.engine.scheduler.stats.preemptions > 0
            assert llm.engine.scheduler.blocks.num_used == 0


@pytest.mark.usefixtures("forked_ranks")
def test_ranks_and_converted_checkpoints_give_the_same_tokens(save: Save, tmp_path: Path) -> None:
    folder = save("flan-t5")
    with pytest.raises(UnsupportedError, match=r"FasterTransformer had no BartFor.* --format safetensors"):
        convert(Conversion(str(save("bart")), str(tmp_path / "out"), format="fastertransformer"))
    formats: tuple[tuple[Format, int], ...] = (("fastertransformer", 1), ("safetensors", 2))
    for kind, ranks in formats:
        out = tmp_path / kind
        convert(Conversion(str(folder), str(out), ranks=2, format=kind))
        with LLM(out, tensor_parallel_size=ranks, device="cpu", kv_cache_memory=1 << 22) as llm:
            assert tokens(llm, GREEDY) == greedy(folder)


def test_an_activation_beside_the_projection_wins(tmp_path: Path) -> None:
    folder = save_encoder_decoder(tmp_path, "flan-t5")
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw | {"dense_act_fn": "relu"}))
    with LLM(folder, kv_cache_memory=1 << 22) as llm:
        assert tokens(llm, GREEDY) == greedy(folder)
        (output,) = llm.generate([PROMPTS[3]], SamplingParams(seed=1, logprobs=3, max_tokens=8), use_tqdm=False)
    right = their_logprobs(folder, PROMPTS[3], output.outputs[0].token_ids)
    for index, top in enumerate(output.outputs[0].logprobs or ()):
        assert all(abs(entry.logprob - float(right[index, token])) < 1e-4 for token, entry in top.items())
    assert read_hf_config(folder).activation == "relu"
    (folder / "config.json").write_text(json.dumps(raw | {"is_gated_act": False}))
    assert not read_hf_config(folder).gated_mlp


@pytest.mark.parametrize("kind", KINDS)
def test_half_of_an_encoder_decoder_is_refused(kind: str, tmp_path: Path) -> None:
    folder = save_encoder_decoder(tmp_path, kind)
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw | {"is_encoder_decoder": False}))
    with pytest.raises(UnsupportedError, match="is_encoder_decoder False is not supported; supported is True"):
        read_hf_config(folder)


def _without_scale(config: ModelConfig) -> ModelConfig:
    return replace(config, logit_scale=None)


def _shorter(config: ModelConfig) -> ModelConfig:
    return with_attention(config, relative_farthest=20)


def _symmetric(config: ModelConfig) -> ModelConfig:
    assert config.encoder is not None
    attention = replace(config.encoder.attention, relative_farthest=20)
    return replace(config, encoder=replace(config.encoder, attention=attention))


@pytest.mark.parametrize("change", [_without_scale, _shorter, _symmetric])
def test_what_is_left_out_shows(
    change: Callable[[ModelConfig], ModelConfig], save: Save, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save("t5")
    monkeypatch.setattr(hugging_face, "read_hf_config", lambda folder: change(read_hf_config(folder)))
    params = SamplingParams(temperature=0, logprobs=1, max_tokens=40, ignore_eos=True)
    with LLM(folder, kv_cache_memory=1 << 22) as llm:
        (output,) = llm.generate([PROMPTS[-1]], params, use_tqdm=False)
    found = output.outputs[0]
    assert found.logprobs is not None
    right = their_logprobs(folder, PROMPTS[-1], found.token_ids)
    pairs = zip(found.token_ids, found.logprobs, strict=True)
    assert max(abs(top[token].logprob - float(right[index, token])) for index, (token, top) in enumerate(pairs)) > 1e-2


def changed(folder: Path, copy: Path, **values: Any) -> Path:
    """A copy of a model with other values in both of its configurations."""
    shutil.copytree(folder, copy)
    for name in ("config.json", "generation_config.json"):
        before = json.loads((copy / name).read_text())
        (copy / name).write_text(json.dumps(before | values))
    return copy


@pytest.mark.parametrize("bad", [-1, 200, 1_000_000])
def test_forced_tokens_outside_the_vocabulary_cannot_come_and_end_nothing(
    bad: int, save: Save, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The last token of the vocabulary is what -1 would be, if it were an index."""
    names = ("forced_bos_token_id", "forced_eos_token_id")
    params = SamplingParams(temperature=0, max_tokens=4)
    found = []
    for title, value in (("free", None), ("bad", bad)):
        folder = changed(save("bart"), tmp_path / title, **dict.fromkeys(names, value))
        with LLM(folder, kv_cache_memory=1 << 22) as llm:
            found.append(tokens(llm, params))
    assert found[0] == found[1]
    for name in names:
        assert f"{name} [{bad}] is not in the vocabulary of 200 tokens; it is ignored" in caplog.text


@pytest.mark.parametrize("kind", ["t5", "bart"])
@pytest.mark.parametrize("bad", [-1, 200])
def test_an_output_cannot_begin_behind_a_token_outside_the_vocabulary(
    kind: str, bad: int, save: Save, tmp_path: Path
) -> None:
    folder = changed(save(kind), tmp_path / "bad", decoder_start_token_id=bad)
    with pytest.raises(ConfigError, match=f"config.json: decoder_start_token_id {bad} is not in the vocabulary of"):
        LLM(folder, device="cpu")


def test_bad_input(save: Save) -> None:
    folder = save("t5")
    refused: dict[str, Any] = {"pipeline_parallel_size": 2, "deterministic": True}
    for name, value in refused.items():
        options = {name: value}
        with pytest.raises(ConfigError, match=f"{name}.*T5ForConditionalGeneration"):
            LLM(folder, device="cpu", **options)
    with LLM(folder, kv_cache_memory=1 << 22, max_model_len=40, max_num_batched_tokens=30, max_num_seqs=4) as llm:
        for prompt, params, message in (
            ([], SamplingParams(), "the prompt has no tokens"),
            (
                [5] * 31,
                SamplingParams(),
                r"31 tokens; the encoder takes 30 at the most \(max_num_batched_tokens\)",
            ),
            ([5], SamplingParams(prompt_logprobs=1), "prompt_logprobs are of models that continue their prompts"),
            ([200], SamplingParams(), "the vocabulary ends at 199"),
        ):
            with pytest.raises(InvalidRequestError, match=message):
                llm.generate([prompt], params)
        assert llm.generate([[5] * 30], GREEDY, use_tqdm=False)[0].outputs[0].finish_reason == "length"
        with pytest.raises(InvalidRequestError, match="generates text"):
            llm.embed([[5, 6]])


@pytest.mark.parametrize(
    "constraint", [{"regex": "[a-z]+"}, {"choice": ["a"]}, {"structured_outputs": {"json_object": True}}], ids=str
)
def test_no_grammar_where_every_output_begins_with_a_forced_token(constraint: dict[str, Any], tmp_path: Path) -> None:
    folder = save_encoder_decoder(tmp_path, "bart", vocab_size=save_tokenizer(tmp_path))
    with (
        LLM(folder, kv_cache_memory=1 << 22) as llm,
        pytest.raises(
            InvalidRequestError, match=r"begins with token 7 \(forced_bos_token_id\), which no grammar knows"
        ),
    ):
        llm.generate([[5, 6]], SamplingParams(**constraint))
