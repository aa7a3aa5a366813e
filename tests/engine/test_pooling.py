"""Vectors and scores of texts through `LLM`: every pooling, what stands before texts, limits and errors."""

import gc
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.conftest import MakeModel
from tests.encoders import TEXTS, save_encoder, save_pooling, their_output, theirs
from torch import Tensor

from hasten import LLM, InvalidRequestError, PoolingParams
from hasten.checkpoint.hugging_face import read_hf_config
from hasten.checkpoint.pooling import read_pooling
from hasten.core.errors import EngineError, HastenError
from hasten.core.types import PoolingTask, Request, SamplingParams
from hasten.engine.batch import Batch
from hasten.engine.launched_step import Launched
from hasten.engine.pooling import Pooled, Pooler, normalized, pool
from hasten.engine.request_state import Output

BOUND = 1e-5
MODES = ("cls_token", "max_tokens", "mean_tokens", "mean_sqrt_len_tokens", "weightedmean_tokens", "lasttoken")


def pooling_of(*modes: str, **more: Any) -> tuple[str, str, dict[str, Any]]:
    raw = {"word_embedding_dimension": 48, **{f"pooling_mode_{mode}": mode in modes for mode in MODES}, **more}
    return "Pooling", "1_Pooling", raw


NORMALIZE = ("Normalize", "2_Normalize", dict[str, Any]())


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_encoder(tmp_path_factory.mktemp("bert"), "Bert", is_matryoshka=True)
    save_pooling(folder, [pooling_of("mean_tokens"), NORMALIZE])
    return folder


@pytest.fixture(scope="module")
def llm(bert: Path) -> Iterator[LLM]:
    with LLM(bert, device="cpu") as llm:
        yield llm


@pytest.fixture(scope="module")
def hidden(bert: Path, llm: LLM) -> dict[str, Tensor]:
    """Transformers' hidden states of each text."""
    model = theirs(bert)
    return {text: their_output(model, llm.tokenizer.encode(text)) for text in TEXTS}


@pytest.fixture
def copied(bert: Path, tmp_path: Path) -> Callable[..., Path]:
    """The model with other files of sentence-transformers."""

    def made(modules: Any, **files: Any) -> Path:
        folder = Path(shutil.copytree(bert, tmp_path / "model"))
        save_pooling(folder, modules, **files)
        return folder

    return made


def by_definition(hidden_th: Tensor, mode: str) -> Tensor:
    count = len(hidden_th)
    weights = torch.arange(1.0, count + 1).unsqueeze(1)
    return {
        "cls_token": hidden_th[0],
        "max_tokens": hidden_th.max(0).values,
        "mean_tokens": hidden_th.sum(0) / count,
        "mean_sqrt_len_tokens": hidden_th.sum(0) / count**0.5,
        "weightedmean_tokens": (hidden_th * weights).sum(0) / weights.sum(),
        "lasttoken": hidden_th[-1],
    }[mode]


def vectors(outputs: Any) -> list[Tensor]:
    return [torch.tensor(output.outputs.embedding) for output in outputs]


@pytest.mark.parametrize("modes", [*((mode,) for mode in MODES), MODES], ids=lambda modes: "+".join(modes))
def test_every_pooling(modes: tuple[str, ...], copied: Callable[..., Path], hidden: dict[str, Tensor]) -> None:
    with LLM(copied([pooling_of(*modes)]), device="cpu") as llm:
        for text, found in zip(TEXTS, vectors(llm.embed(TEXTS)), strict=True):
            expected = torch.cat([by_definition(hidden[text], mode) for mode in modes])
            assert (found - expected).abs().max() < BOUND


def test_the_last_layer_computes_first_tokens_alone(
    copied: Callable[..., Path], hidden: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where vectors are made of no others, and beside a text whose tokens are all asked for."""
    computed: list[int] = []
    original = Pooler.__call__

    def counted(self: Pooler, hidden_th: Tensor, *args: Any) -> Pooled:
        computed.append(len(hidden_th))
        return original(self, hidden_th, *args)

    monkeypatch.setattr(Pooler, "__call__", counted)
    with LLM(copied([pooling_of("cls_token")]), device="cpu") as llm:
        found = vectors(llm.embed(TEXTS))
        for text, vector in zip(TEXTS, found, strict=True):
            torch.testing.assert_close(vector, hidden[text][0], rtol=0, atol=BOUND)
        tasks: list[PoolingTask] = ["embed", "token_embed", "embed"]
        ids = [tuple(llm.tokenizer.encode(text)) for text in TEXTS[:3]]
        for number, (task, tokens) in enumerate(zip(tasks, ids, strict=True)):
            params = PoolingParams(task=task)
            llm.engine.add(Request(request_id=str(number), prompt_token_ids=tokens, pooling=params))
        outputs: dict[str, Any] = {output.request_id: output.outputs for output in llm.engine.step()}
    assert computed == [len(TEXTS), 2 + len(ids[1])]
    for number in (0, 2):
        torch.testing.assert_close(
            torch.tensor(outputs[str(number)].embedding), hidden[TEXTS[number]][0], rtol=0, atol=BOUND
        )
    torch.testing.assert_close(outputs["1"].data, hidden[TEXTS[1]], rtol=0, atol=BOUND)


def test_normalized(llm: LLM, hidden: dict[str, Tensor]) -> None:
    for text, found in zip(TEXTS, vectors(llm.embed(TEXTS)), strict=True):
        mean = hidden[text].mean(0)
        assert (found - mean / mean.norm()).abs().max() < BOUND
    (raw,) = vectors(llm.embed(TEXTS[0], pooling_params=PoolingParams(normalize=False)))
    assert (raw - hidden[TEXTS[0]].mean(0)).abs().max() < BOUND
    (same,) = vectors(llm.encode(TEXTS[0], PoolingParams(normalize=False)))
    assert torch.equal(same, raw)
    (short,) = vectors(llm.embed(TEXTS[0], pooling_params=PoolingParams(dimensions=8)))
    assert (short - raw[:8] / raw[:8].norm()).abs().max() < BOUND


def test_a_dense_module(copied: Callable[..., Path], hidden: dict[str, Tensor]) -> None:
    raw = {
        "in_features": 48,
        "out_features": 12,
        "bias": True,
        "activation_function": "torch.nn.modules.activation.Tanh",
    }
    folder = copied([pooling_of("mean_tokens"), ("Dense", "2_Dense", raw)])
    torch.manual_seed(1)
    weight, bias = torch.randn(12, 48) / 7, torch.randn(12)
    save_file({"linear.weight": weight, "linear.bias": bias}, folder / "2_Dense" / "model.safetensors")
    with LLM(folder, device="cpu") as llm:
        for text, found in zip(TEXTS, vectors(llm.embed(TEXTS)), strict=True):
            assert (found - torch.tanh(weight @ hidden[text].mean(0) + bias)).abs().max() < BOUND
    torch.save({"linear.weight": weight}, folder / "2_Dense" / "pytorch_model.bin")
    (folder / "2_Dense" / "model.safetensors").unlink()
    with pytest.raises(HastenError, match="2_Dense: its weights are not those"):
        read_pooling(folder, read_hf_config(folder))


def test_prompts(copied: Callable[..., Path], hidden: dict[str, Tensor]) -> None:
    prompts = {"query": "find: ", "plain": ""}
    files = {"config_sentence_transformers": {"prompts": prompts, "default_prompt_name": "query"}}
    text = TEXTS[0]
    with LLM(copied([pooling_of("mean_tokens", include_prompt=False)], **files), device="cpu") as llm:
        model = theirs(Path(llm._model))
        with_prompt = their_output(model, llm.tokenizer.encode(f"find: {text}"))
        skipped = len(llm.tokenizer.encode("find: ")) - 1  # but for what ends every text
        for name, before in ((None, None), ("query", None), (None, "find: ")):
            (found,) = vectors(llm.embed(text, prompt_name=name, prompt=before))
            assert (found - with_prompt[skipped:].mean(0)).abs().max() < BOUND
        (found,) = vectors(llm.embed(text, prompt_name="plain"))
        assert (found - hidden[text].mean(0)).abs().max() < BOUND
        with pytest.raises(InvalidRequestError, match="'documents' is no prompt of the model; there are: query, plain"):
            llm.embed(text, prompt_name="documents")


def test_limits(copied: Callable[..., Path]) -> None:
    files = {"sentence_bert_config": {"max_seq_length": 12, "do_lower_case": True}}
    with LLM(copied([pooling_of("mean_tokens")], **files), device="cpu") as llm:
        assert llm.engine.max_model_len == 12
        text = "the garden of Anna and the harbour in the morning"
        tokens = llm.get_tokenizer()
        with pytest.raises(
            InvalidRequestError, match=r"^prompts\[1\]: the text has \d+ tokens, more than the longest of 12"
        ):
            llm.embed(["the", text])
        for most, expected in ((-1, 12), (7, 7), (400, 12)):
            (output,) = llm.embed(text, truncate_prompt_tokens=most)
            assert output.prompt_token_ids == tokens(text, truncation=True, max_length=expected)["input_ids"]
        (output,) = llm.embed([list(range(5, 40))], truncate_prompt_tokens=5)
        assert output.prompt_token_ids == [5, 6, 7, 8, 9]
        with pytest.raises(InvalidRequestError, match="truncate_prompt_tokens is 2, which leaves no token"):
            llm.embed(text, truncate_prompt_tokens=2)
        assert not llm.engine.has_unfinished


def test_a_thousand_texts_one_by_one_and_together(llm: LLM) -> None:
    texts = [f"{TEXTS[number % len(TEXTS)]} {number}" for number in range(1000)]
    together = llm.embed(texts)
    assert [output.prompt for output in together] == texts
    for number in (0, 1, 500, 999):
        (alone,) = vectors(llm.embed(texts[number]))
        assert (alone - torch.tensor(together[number].outputs.embedding)).abs().max() < BOUND
    assert llm.engine.stats.used_blocks == 0


def test_empty_text_has_the_vector_of_what_surrounds_every_text(llm: LLM) -> None:
    (empty,) = llm.embed("")
    assert len(empty.prompt_token_ids) == 2
    with pytest.raises(InvalidRequestError, match="the text has no tokens"):
        llm.embed([[]])


def test_cosines_of_pairs(llm: LLM) -> None:
    queries, documents = ["the garden"], ["a garden", "the letter", "the garden"]
    first, *others = vectors(llm.embed([*queries, *documents]))
    scores = [output.outputs.score for output in llm.score(queries, documents)]
    assert scores == pytest.approx([float(first @ other) for other in others], abs=BOUND)
    assert scores[2] == pytest.approx(1.0, abs=BOUND)
    with pytest.raises(InvalidRequestError, match="2 queries, but 3 documents"):
        llm.score(["a", "b"], documents)


def test_what_an_encoder_cannot_do(llm: LLM) -> None:
    with pytest.raises(InvalidRequestError, match="BertModel generates no text; it does embed, token_embed"):
        llm.generate("the garden")
    with pytest.raises(InvalidRequestError, match="BertModel is not a model to classify; it does embed, token_embed"):
        llm.classify("the garden")
    with pytest.raises(InvalidRequestError, match="dimensions is 49; the model's vectors have 48"):
        llm.embed("the garden", pooling_params=PoolingParams(dimensions=49))
    uncut = replace(llm.engine.worker.pooler.info, dimensions=None)  # type: ignore[union-attr]  # it has one
    uncut.check(PoolingParams(dimensions=48))
    with pytest.raises(InvalidRequestError, match=r"config\.json does not say that its vectors"):
        uncut.check(PoolingParams(dimensions=8))
    with pytest.raises(InvalidRequestError, match="the text has token id 999999"):
        llm.embed([[5, 999_999]])
    with pytest.raises(InvalidRequestError, match="2 token_type_ids for 1 tokens"):
        llm.engine.add(Request(request_id="a", prompt_token_ids=(5,), pooling=PoolingParams(), token_type_ids=(0, 0)))
    assert not llm.engine.has_unfinished
    assert repr(llm).endswith("max_model_len 320, to embed and token_embed)")


@pytest.mark.parametrize("given", [SamplingParams(), [PoolingParams()], {"task": "embed"}], ids=str)
def test_pooling_params_of_another_kind_are_named(llm: LLM, given: Any) -> None:
    for method in (llm.embed, llm.encode, llm.classify, llm.fill_mask):
        with pytest.raises(
            InvalidRequestError, match=r"^pooling_params must be PoolingParams, the same for all texts; "
        ):
            method("the garden", pooling_params=given)
    with pytest.raises(InvalidRequestError, match=r"^chat_template is not supported: the tokenizer says how two texts"):
        llm.score("the garden", "of", chat_template="x")  # type: ignore[call-arg]


def test_texts_are_queued_while_steps_are_computed(bert: Path) -> None:
    """Few wait at any time, a refused one withdraws the others, and Python's collector is left as it was."""
    with LLM(bert, device="cpu", max_num_batched_tokens=320) as llm:
        engine, queued, given = llm.engine, list[int](), 0

        def texts(wrong: int | None) -> Iterator[list[int]]:
            for number in range(60):
                yield [999_999] if number == wrong else [5 + number] * 40

        launch = engine.worker.launch

        def launched(batch: Batch) -> Launched:
            nonlocal given
            given += len(batch.sequences)
            queued.append(len(engine.requests.states))
            assert not gc.isenabled()
            return launch(batch)

        engine.worker.launch = launched  # type: ignore[method-assign]  # what it has is looked at
        outputs = llm.embed(texts(None))
        assert [output.prompt_token_ids[0] for output in outputs] == list(range(5, 65))
        assert given == 60
        assert max(queued) <= 8 + 16, "a step's, and those that are queued together"
        given = 0
        with pytest.raises(InvalidRequestError, match=r"prompts\[50\]: the text has token id 999999"):
            llm.embed(texts(50))
        assert 0 < given <= 50
        assert not engine.has_unfinished
        assert gc.isenabled()
        (again,) = llm.embed([[5] * 40])
        assert again.outputs.embedding == pytest.approx(outputs[0].outputs.embedding, abs=BOUND)


def test_another_call_is_refused_while_texts_are_still_to_be_queued(bert: Path) -> None:
    """Even where the engine has nothing left of those that were."""
    with LLM(bert, device="cpu", max_num_batched_tokens=320) as llm:
        step, idle = llm.engine.step, 0

        def stepped() -> list[Output]:
            nonlocal idle
            outputs = step()
            idle += not llm.engine.has_unfinished
            with pytest.raises(EngineError, match="another call of this LLM is under way"):
                llm.embed([[5] * 3])
            return outputs

        llm.engine.step = stepped  # type: ignore[method-assign]  # as if another thread came then
        assert len(llm.embed([[5 + number] * 40 for number in range(60)])) == 60
        assert idle > 1
        llm.engine.step = step  # type: ignore[method-assign]
        assert len(llm.embed([[5] * 3])) == 1


def test_vectors_of_length_one() -> None:
    vectors_sw = torch.tensor([[3.0, 4.0], [0.0, 0.0], [1e-20, 0.0], [1e-3, -1e-3]])
    expected = torch.nn.functional.normalize(vectors_sw, dim=-1)
    torch.testing.assert_close(normalized(vectors_sw), expected, rtol=1e-6, atol=0)


def test_withdrawn_texts_leave_nothing(llm: LLM) -> None:
    engine = llm.engine
    for name in ("a", "b"):
        engine.add(Request(request_id=name, prompt_token_ids=(5, 6, 7), pooling=PoolingParams()))
    assert engine.abort("a") is None
    assert [output.request_id for output in engine.step()] == ["b"]
    assert not engine.has_unfinished
    assert engine.stats.used_blocks == 0


def test_hidden_states_that_are_not_finite_are_an_error(bert: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(bert, tmp_path / "model"))
    tensors = load_file(folder / "model.safetensors")
    tensors["encoder.layer.2.output.dense.bias"].fill_(float("inf"))
    save_file(tensors, folder / "model.safetensors")
    with LLM(folder, device="cpu") as llm, pytest.raises(EngineError, match=r"prompts\[0\]: the hidden states are not"):
        llm.embed(["the"])


@pytest.mark.parametrize(
    ("modules", "expected"),
    [
        ([], "modules.json has no Pooling"),
        ([("WeightedLayerPooling", "1_X", {})], "module 1, 'WeightedLayerPooling', is not supported"),
        ([pooling_of()], "names no way of pooling"),
        ([pooling_of("mean_tokens", pooling_mode_magic=True)], "pooling_mode_magic is not supported"),
        ([pooling_of("mean_tokens", pooling_mode="magic")], "pooling_mode 'magic' is not supported"),
        ([pooling_of("cls_token", "mean_tokens", include_prompt=False)], "include_prompt false is not supported"),
        ([NORMALIZE], "module 1, 'Normalize', is not supported there"),
        ([pooling_of("mean_tokens"), ("Dense", "../2_Dense", {})], "is not a folder below it"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_modules_that_are_unknown_or_wrong(modules: Any, expected: str, bert: Path, tmp_path: Path) -> None:
    shutil.copy(bert / "config.json", tmp_path)
    folder = tmp_path / "model"
    folder.mkdir()
    shutil.copy(bert / "config.json", folder)
    save_pooling(folder, modules)
    with pytest.raises(HastenError, match=expected) as caught:
        read_pooling(folder, read_hf_config(folder))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"sentence_bert_config": {"max_seq_length": 0}}, "max_seq_length 0"),
        ({"config_sentence_transformers": {"prompts": ["a"]}}, "prompts"),
        ({"config_sentence_transformers": {"default_prompt_name": "a"}}, "default_prompt_name 'a' is none of"),
        ({"modules": {}}, "modules.json is not a JSON list"),
    ],
)
def test_files_that_are_wrong(files: dict[str, Any], expected: str, bert: Path, tmp_path: Path) -> None:
    shutil.copy(bert / "config.json", tmp_path)
    save_pooling(tmp_path, [pooling_of("mean_tokens")], **files)
    with pytest.raises(HastenError, match=expected):
        read_pooling(tmp_path, read_hf_config(tmp_path))


def test_newer_names_of_poolings(bert: Path, tmp_path: Path) -> None:
    shutil.copy(bert / "config.json", tmp_path)
    for named, expected in (("lasttoken", ("last",)), (["cls", "mean"], ("cls", "mean"))):
        save_pooling(tmp_path, [("Pooling", "1_Pooling", {"embedding_dimension": 48, "pooling_mode": named})])
        assert read_pooling(tmp_path, read_hf_config(tmp_path)).modes == expected


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"task": "translate"}, "task must be one of embed"),
        ({"dimensions": 0}, "dimensions must be at least 1"),
        ({"dimensions": True}, "dimensions must be a whole number"),
        ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens must be -1 or at least 1"),
        ({"normalize": 1}, "normalize must be True or False"),
        ({"task": "classify", "normalize": True}, "normalize is for vectors, not for classify"),
        ({"temperature": 1.0}, "temperature is not a parameter of PoolingParams"),
    ],
    ids=str,
)
def test_parameters_that_are_wrong(fields: dict[str, Any], expected: str) -> None:
    with pytest.raises(InvalidRequestError, match=expected):
        PoolingParams(**fields)


def test_pooling_in_half_precision_sums_in_single() -> None:
    hidden = torch.full((5000, 4), 0.1, dtype=torch.float16)
    assert (pool(hidden, [4999, 1], "mean") - float(hidden[0, 0])).abs().max() < 1e-6


def test_requests_need_no_sampling_parameters() -> None:
    assert Request(request_id="a", prompt_token_ids=(1,)).params == SamplingParams()
    assert json.loads(json.dumps(PoolingParams().__dict__))["task"] == "embed"


def test_what_is_for_models_that_generate(bert: Path) -> None:
    with pytest.raises(HastenError, match="deterministic is for models that generate text; BertModel does not"):
        LLM(bert, device="cpu", deterministic=True)


@pytest.mark.parametrize("family", ["Qwen3", "OPT", "GPT2"])
def test_decoders_that_give_vectors(family: str, make_model: MakeModel, tmp_path: Path) -> None:
    source = make_model(family, tie_word_embeddings=False)
    folder = Path(shutil.copytree(source, tmp_path / "model"))
    save_pooling(folder, [pooling_of("lasttoken"), NORMALIZE])
    model = theirs(folder)
    with LLM(folder, device="cpu") as llm:
        for output in llm.embed(TEXTS):
            last = their_output(model, output.prompt_token_ids)[-1]
            assert (torch.tensor(output.outputs.embedding) - last / last.norm()).abs().max() < BOUND
        with pytest.raises(InvalidRequestError, match="generates no text; it does embed, token_embed"):
            llm.generate("the garden")


def test_a_decoder_without_a_head(make_model: MakeModel, tmp_path: Path) -> None:
    """As published embedding models are, whose files are those of the base model."""
    folder = Path(shutil.copytree(make_model("Qwen3", tie_word_embeddings=False), tmp_path / "model"))
    tensors = load_file(folder / "model.safetensors")
    names = {name: name.removeprefix("model.") for name in tensors if name != "lm_head.weight"}
    save_file({short: tensors[name] for name, short in names.items()}, folder / "model.safetensors")
    save_pooling(folder, [pooling_of("lasttoken")])
    with LLM(folder, device="cpu") as llm:
        assert len(llm.embed("the garden")[0].outputs.embedding) == 48


@pytest.mark.any_python
@pytest.mark.parametrize(
    ("modes", "include_prompt"),
    [(("mean_tokens",), False), (("cls_token", "max_tokens"), True), (("lasttoken",), True)],
)
def test_sentence_transformers_gives_the_same_vectors(
    modes: tuple[str, ...], include_prompt: bool, copied: Callable[..., Path]
) -> None:
    from sentence_transformers import SentenceTransformer  # takes seconds, which no other test needs

    prompts = {"prompts": {"query": "the question: "}}
    pooling = pooling_of(*modes, include_prompt=include_prompt)
    folder = copied([pooling, NORMALIZE], config_sentence_transformers=prompts)
    model = SentenceTransformer(str(folder), device="cpu")
    with LLM(folder, device="cpu") as llm:
        for name in (None, "query"):
            expected = torch.from_numpy(model.encode(TEXTS, prompt_name=name))
            found = torch.stack(vectors(llm.embed(TEXTS, prompt_name=name)))
            assert (found - expected).abs().max() < BOUND
