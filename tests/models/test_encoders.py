"""Encoders of every family, compared with transformers: hidden states of each token, and logits of classifiers."""

import json
import shutil
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.encoders import TEXTS, save_encoder, save_pooling, their_output, theirs
from torch import Tensor

from hasten import LLM, PoolingParams
from hasten.checkpoint.convert import Conversion, convert
from hasten.checkpoint.hugging_face import read_hf_config
from hasten.core.errors import CheckpointError, HastenError, UnsupportedError
from hasten.core.model_config import ModelConfig
from hasten.layers.position import relative_buckets
from hasten.models import encoder
from hasten.models.registry import MODELS, model_class, task_of


def rope(theta: float) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": theta}


BOUND = 1e-5
"""Largest difference between two hidden states, which are of size 1, or two logits."""
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("Bert", {}),
    "bert, other activation": ("Bert", {"hidden_act": "gelu_new", "type_vocab_size": 3}),
    "roberta": ("Roberta", {}),
    "xlm-roberta": ("XLMRoberta", {"type_vocab_size": 1}),
    "distilbert": ("DistilBert", {}),
    "mpnet": ("MPNet", {}),
    "modernbert": ("ModernBert", {"local_attention": 14, "num_hidden_layers": 4}),
    "modernbert, other": (
        "ModernBert",
        {"local_attention": 40, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
        | {"attention_bias": True, "mlp_bias": True, "norm_bias": True, "hidden_activation": "silu"}
        | {"rope_parameters": {"full_attention": rope(300.0), "sliding_attention": rope(50.0)}},
    ),
    "mpnet, 3 heads": ("MPNet", {"num_attention_heads": 3}),
}
HEADS = ("ForSequenceClassification", "ForTokenClassification")
LONG: list[Any] = [[5 + (7 * place) % 50 for place in range(length)] for length in (1, 2, 15, 16, 17, 129, 300)]
"""Token ids, some longer than the farthest distance with a bias of its own, and than a chunk of queries on a CPU."""

Folder = Callable[..., Path]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    @cache
    def made(name: str, head: str = "Model", **config: Any) -> Path:
        family, own = FAMILIES[name]
        return save_encoder(tmp_path_factory.mktemp("encoder"), family, head, **own, **config)

    return made


@pytest.fixture
def load() -> Iterator[Callable[..., LLM]]:
    opened: list[LLM] = []

    def loaded(folder: Path, **options: Any) -> LLM:
        opened.append(LLM(folder, device="cpu", progress_bars=False, **options))
        return opened[-1]

    yield loaded
    for llm in opened:
        llm.close()


Load = Callable[..., LLM]


def hidden_states(llm: LLM, prompts: list[Any]) -> list[Tensor]:
    return [output.outputs.data for output in llm.encode(prompts, pooling_task="token_embed")]


@pytest.mark.parametrize("name", FAMILIES)
def test_hidden_states(name: str, folder: Folder, load: Load) -> None:
    path = folder(name)
    llm, model = load(path), theirs(path)
    outputs = llm.encode([*TEXTS, *LONG], pooling_task="token_embed")
    for output in outputs:
        expected = their_output(model, output.prompt_token_ids)
        assert expected.std() > 0.5
        assert (output.outputs.data - expected).abs().max() < BOUND
    vectors = llm.embed([*TEXTS, *LONG])
    for vector, output in zip(vectors, outputs, strict=True):
        mean = output.outputs.data.mean(0)
        assert torch.allclose(torch.tensor(vector.outputs.embedding), mean, atol=BOUND)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("name", [name for name in FAMILIES if "," not in name])
def test_classifiers(name: str, head: str, folder: Folder, load: Load) -> None:
    path = folder(name, head, num_labels=3)
    llm, model = load(path), theirs(path, f"Model{head}")
    assert llm.labels == ("LABEL_0", "LABEL_1", "LABEL_2")
    (task,) = llm.engine.worker.pooler.tasks  # type: ignore[union-attr]
    params = PoolingParams(task=task, activation=False)
    for output, scored in zip(llm.encode(TEXTS, pooling_params=params), llm.encode(TEXTS), strict=True):
        expected = their_output(model, output.prompt_token_ids)
        probabilities = expected.softmax(-1)
        if task == "classify":
            assert (torch.tensor(output.outputs.probs) - expected).abs().max() < BOUND
            assert (torch.tensor(scored.outputs.probs) - probabilities).abs().max() < BOUND
        else:
            assert (output.outputs.data - expected).abs().max() < BOUND
            assert (scored.outputs.data - probabilities).abs().max() < BOUND


def test_weights_agree_with_the_module(folder: Folder) -> None:
    for name in FAMILIES:
        for head in ("Model", *HEADS):
            config = read_hf_config(folder(name, head, **({"num_labels": 3} if head != "Model" else {})))
            cls = model_class(config.architecture)
            with torch.device("meta"):
                shapes = {key: tuple(value.shape) for key, value in cls(config).named_parameters()}
            assert {spec.name: spec.shape(config) for spec in cls.weight_map(config).specs} == shapes


def test_a_padding_token_within_a_text_takes_no_position(folder: Folder, load: Load) -> None:
    ids = [0, 9, 1, 12, 1, 1, 14, 2]
    for name in ("roberta", "xlm-roberta", "mpnet"):
        path = folder(name)
        (found,) = hidden_states(load(path), [ids])
        assert (found - their_output(theirs(path), ids)).abs().max() < BOUND


def test_mpnet_pads_with_token_1_whatever_its_config_says(folder: Folder, load: Load) -> None:
    ids = [0, 9, 1, 12, 3, 3, 14, 2]
    path = folder("mpnet", pad_token_id=3)
    (found,) = hidden_states(load(path), [ids])
    assert (found - their_output(theirs(path), ids)).abs().max() < BOUND


def test_types_of_tokens(folder: Folder, load: Load) -> None:
    path = folder("bert", "ForSequenceClassification", num_labels=1)
    llm, model = load(path), theirs(path, "ModelForSequenceClassification")
    documents = ["the garden", "a letter in the morning and bread", "of"]
    for document, output in zip(documents, llm.score("he was in the house", documents), strict=True):
        pair = llm.get_tokenizer()("he was in the house", document, return_token_type_ids=True)
        assert output.prompt_token_ids == pair["input_ids"]
        expected = their_output(model, pair["input_ids"], pair["token_type_ids"]).sigmoid()
        assert abs(output.outputs.score - float(expected)) < BOUND
        assert abs(output.outputs.score - float(their_output(model, pair["input_ids"]).sigmoid())) > 1e-3


def _without(config: ModelConfig, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if name == "relative":
        shorter = partial(relative_buckets, farthest=16, causal=False)
        monkeypatch.setattr("hasten.layers.position.relative_buckets", lambda buckets, *_, **__: shorter(buckets))
    else:
        monkeypatch.setattr("hasten.engine.engine.position_rows", lambda *_: None)


@pytest.mark.parametrize(("family", "what"), [("mpnet", "relative"), ("roberta", "rows"), ("mpnet", "rows")])
def test_controls(family: str, what: str, folder: Folder, load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    path = folder(family)
    _without(read_hf_config(path), what, monkeypatch)
    (found,) = hidden_states(load(path), [LONG[-2]])
    assert (found - their_output(theirs(path), LONG[-2])).abs().max() > 1e-2


@pytest.mark.usefixtures("forked_ranks")
def test_ranks_and_steps_change_nothing(folder: Folder, load: Load) -> None:
    path = folder("mpnet")
    whole = hidden_states(load(path), [*TEXTS, *LONG])
    for options in ({"tensor_parallel_size": 2}, {"max_num_batched_tokens": 16, "max_num_seqs": 3}):
        found = hidden_states(load(path, **options), [*TEXTS, *LONG])
        assert all((ours - alone).abs().max() < BOUND for ours, alone in zip(found, whole, strict=True))


def test_old_names_and_other_heads(folder: Folder, load: Load, tmp_path: Path) -> None:
    """Checkpoints of the first training: gamma and beta, the heads for masked words, buffers."""
    path = folder("bert")
    expected = hidden_states(load(path), TEXTS[:2])
    masked = save_encoder(tmp_path / "masked", "Bert", "ForPreTraining")
    tensors = {f"bert.{name}": tensor for name, tensor in load_file(path / "model.safetensors").items()}
    tensors |= {k: v for k, v in load_file(masked / "model.safetensors").items() if k.startswith("cls.")}
    old = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): tensor
        for name, tensor in tensors.items()
    }
    old["bert.embeddings.position_ids"] = torch.arange(320).unsqueeze(0)
    save_file(old, masked / "model.safetensors")
    found = hidden_states(load(masked), TEXTS[:2])
    assert all(torch.equal(ours, theirs_) for ours, theirs_ in zip(found, expected, strict=True))


def test_int8_weights(folder: Folder, load: Load) -> None:
    path = folder("bert")
    whole, rounded = (hidden_states(load(path, **options), TEXTS) for options in ({}, {"quantization": "int8"}))
    for exact, found in zip(whole, rounded, strict=True):
        cosine = torch.nn.functional.cosine_similarity(exact.flatten(), found.flatten(), dim=0)
        assert 0.99 < cosine < 1 - 1e-7


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"is_decoder": True}, "is_decoder"),
        ({"position_embedding_type": "relative_key"}, "position_embedding_type"),
        ({"hidden_act": "mish"}, "hidden_act"),
        ({"id2label": {"0": "a", "2": "b"}}, "id2label"),
        ({"problem_type": "ranking"}, "problem_type"),
        ({"sentence_transformers": {"activation_fn": "os.system"}}, "os.system"),
        ({"architectures": ["BertForQuestionAnswering"]}, "BertForQuestionAnswering"),
    ],
    ids=str,
)
def test_bad_configurations(change: dict[str, Any], expected: str, folder: Folder, tmp_path: Path) -> None:
    raw = json.loads((folder("bert", HEADS[0], num_labels=3) / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(raw | change))
    with pytest.raises(HastenError, match=expected) as caught:
        read_hf_config(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "labels", "activation"),
    [
        ({}, 3, "softmax"),
        ({}, 1, "sigmoid"),
        ({"problem_type": "multi_label_classification"}, 3, "sigmoid"),
        ({"problem_type": "regression"}, 1, "none"),
        ({"sentence_transformers": {"activation_fn": "torch.nn.modules.linear.Identity"}}, 1, "none"),
        ({"sbert_ce_default_activation_function": "torch.nn.modules.activation.Sigmoid"}, 3, "sigmoid"),
    ],
)
def test_activations(change: dict[str, Any], labels: int, activation: str) -> None:
    raw = {"num_labels": labels, **change}
    found = encoder.classifier_from_hf(raw, "classify")
    assert found is not None
    assert (len(found.labels), found.activation) == (labels, activation)


@pytest.mark.parametrize(
    ("head", "named", "found"),
    [
        ("Model", "tanh", None),
        ("Model", "silu", None),
        ("ForMaskedLM", "silu", "silu"),
        ("ForSequenceClassification", "tanh", "tanh"),
        ("ForTokenClassification", "tanh", "tanh"),
    ],
)
def test_an_activation_of_a_head_counts_where_the_head_is(head: str, named: str, found: str | None) -> None:
    sizes = {"hidden_size": 48, "num_attention_heads": 4, "num_labels": 3}
    raw = {"architectures": [f"ModernBert{head}"], "classifier_activation": named, **sizes}
    config = model_class(f"ModernBert{head}").config_from_hf(raw)
    words, classifier = config.masked_words, config.classifier
    assert (words.activation if words else classifier.dense if classifier else None) == found


@pytest.mark.parametrize(("head", "named"), [("ForMaskedLM", "tanh"), ("ForSequenceClassification", "silu")])
def test_an_activation_that_a_head_lacks_is_named(head: str, named: str) -> None:
    sizes = {"hidden_size": 48, "num_attention_heads": 4, "num_labels": 3}
    raw = {"architectures": [f"ModernBert{head}"], "classifier_activation": named, **sizes}
    with pytest.raises(UnsupportedError, match=f"classifier_activation '{named}' is not supported"):
        model_class(f"ModernBert{head}").config_from_hf(raw)


def test_a_pooler_that_is_missing_is_an_error(folder: Folder, tmp_path: Path) -> None:
    path = save_encoder(tmp_path, "Bert", "ForSequenceClassification")
    tensors = load_file(path / "model.safetensors")
    del tensors["bert.pooler.dense.weight"]
    save_file(tensors, path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"bert\.pooler\.dense\.weight"):
        LLM(path, device="cpu")


CONVERTED = (("bert", "Model"), ("bert", HEADS[0]), ("mpnet", "Model"), ("modernbert, other", HEADS[0]))


@pytest.mark.usefixtures("forked_ranks")
def test_converted_checkpoints_give_the_same(folder: Folder, load: Load, tmp_path: Path) -> None:
    """In FasterTransformer's format, which BERT has, or ranked safetensors; with all that makes vectors of texts."""
    for number, (name, head) in enumerate(CONVERTED):
        path, out = shutil.copytree(folder(name, head), tmp_path / str(number)), tmp_path / f"out-{number}"
        if head == "Model":
            dense = {"in_features": 48, "out_features": 8, "bias": False}
            save_pooling(
                path,
                [("Pooling", "1_Pooling", {"pooling_mode_cls_token": True}), ("Dense", "2_Dense", dense)],
                sentence_bert_config={"max_seq_length": 200},
            )
            save_file({"linear.weight": torch.randn(8, 48)}, path / "2_Dense" / "model.safetensors")
        convert(Conversion(str(path), str(out), ranks=2))
        assert (out / "2-gpu" / "config.ini").is_file() == (name == "bert")
        convert(Conversion(str(out / "2-gpu"), str(out), ranks=1))  # next to the first, whose files stay
        first, second, expected = load(out / "1-gpu"), load(out / "2-gpu"), load(path)
        result = [[output.outputs for output in llm.encode([*TEXTS, LONG[3]])] for llm in (first, second, expected)]
        assert result[0] == result[1] == result[2]
        assert (first.labels, first.engine.max_model_len) == (expected.labels, expected.engine.max_model_len)
    with pytest.raises(UnsupportedError, match=r"FasterTransformer had no MPNetModel .* --format safetensors"):
        convert(Conversion(str(folder("mpnet")), str(tmp_path / "out"), format="fastertransformer"))


def test_the_task_of_an_architecture_is_known_without_its_class() -> None:
    for architecture in MODELS:
        encodes = issubclass(model_class(architecture), encoder.Encoder)
        assert (task_of(architecture) != "generate") == encodes, architecture
        assert (task_of(architecture) == "embed") == (encodes and "Classification" not in architecture), architecture
