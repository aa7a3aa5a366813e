"""FasterTransformer's folders of the families other than BLOOM, compared with those of an independent writer."""

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tests.checkpoint.ft_writer import TYPES, WRITERS, Files
from tests.conftest import MakeModel
from tests.encoder_decoders import KINDS, save_encoder_decoder
from tests.encoders import save_encoder
from tests.rank_shards import rank_shards

from hasten.checkpoint.convert import Conversion, convert
from hasten.checkpoint.manifest import MANIFEST
from hasten.checkpoint.plan import Checkpoint, open_checkpoint
from hasten.core.errors import CheckpointError, UnsupportedError
from hasten.core.model_config import ModelConfig

NEOX: dict[str, Any] = {"hidden_size": 64}
"""Wide enough for a quarter of each head to turn."""
pytestmark = pytest.mark.any_python
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("GPT2", {}),
    "gpt-neox": ("GPTNeoX", NEOX),
    "gpt-neox, sequential": ("GPTNeoX", NEOX | {"use_parallel_residual": False}),
    "gpt-j": ("GPTJ", {}),
    "opt": ("OPT", {}),
    "opt-350m": ("OPT", {"word_embed_proj_dim": 32, "do_layer_norm_before": False}),
    "opt, narrow embeddings": ("OPT", {"word_embed_proj_dim": 32, "tie_word_embeddings": False}),
    "t5": ("T5", {"num_heads": 4}),
    "flan-t5": ("T5", {"num_heads": 4}),
    "mt5": ("MT5", {"num_heads": 4, "relative_attention_max_distance": 128}),
    "bert": ("Bert", {}),
    "bert, classifier": ("Bert", {"head": "ForSequenceClassification", "hidden_act": "relu"}),
}
OURS = ("model.embeddings.", "model.pooler.", "model.classifier.")
"""What files of BERT begin with that FasterTransformer's converter does not write."""
UNCLEAR = {"gpt-neox, sequential": r"-gpu: use_gptj_residual is 0 and there are \d ranks: .*; convert the original ch"}
"""Models whose folders for several ranks cannot be understood without a manifest."""
UNSAID = {
    "GPTNeoX": "which GELU the model has, and the exact one is assumed, as in Pythia; put the checkpoint's config.json "
    "beside it if it is another"
}
ROPE = {"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 0.5}
RANKS = (1, 2, 4)
Copy = Callable[[Path], Path]
State = dict[str, torch.Tensor]


@pytest.fixture(params=list(MODELS))
def model(request: pytest.FixtureRequest) -> str:
    """Each of the models."""
    return str(request.param)


@pytest.fixture(scope="session")
def saved(make_model: MakeModel, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """What transformers saved of a model."""

    @cache
    def save(name: str) -> Path:
        family, options = MODELS[name]
        if name in KINDS:
            return save_encoder_decoder(tmp_path_factory.mktemp(name), name, **options)
        if family == "Bert":
            return save_encoder(tmp_path_factory.mktemp("bert"), family, **options)
        return make_model(family, **options)

    return save


@pytest.fixture
def source(model: str, saved: Callable[[str], Path]) -> Path:
    """What transformers saved."""
    return saved(model)


def written(files: Files, folder: Path) -> Path:
    folder.mkdir(parents=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return folder


def converted(source: Path, out: Path, ranks: int, **options: Any) -> Path:
    convert(Conversion(str(source), str(out), ranks=ranks, workers=2, **options))
    return out / f"{ranks}-gpu"


def contents(folder: Path) -> Files:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != MANIFEST}


def loaded(checkpoint: Checkpoint, size: int) -> Iterator[State]:
    for rank in range(size):
        yield rank_shards(checkpoint, rank, size)


def as_in_files(state: State, config: ModelConfig) -> State:
    """A rank's tensors without what the files lack: rows of positions that no token has, and the projections of narrow
    embeddings, which are multiplied into embedding and head.
    """
    result = dict(state)
    if config.position_offset:
        result["embedding.positions"] = result["embedding.positions"].clone()
        result["embedding.positions"][: config.position_offset] = 0
    if config.embedding_size is not None:
        into, out = result.pop("embedding.projection.weight"), result.pop("project_out.weight")
        narrow = result["embedding.weight"]
        result |= {"embedding.weight": narrow @ into.t(), "head.weight": result.get("head.weight", narrow) @ out}
    return result


def assert_loads_as(folder: Path, source: Path, size: int) -> None:
    """That the ranks of both have the same tensors, products up to a rounding."""
    whole = open_checkpoint(source)
    products = {"embedding.weight", "head.weight"} if whole.config.embedding_size is not None else {}
    for found, stored in zip(loaded(open_checkpoint(folder), size), loaded(whole, size), strict=True):
        expected = as_in_files(stored, whole.config)
        assert found.keys() == expected.keys()
        assert [
            name for name in expected if name not in products and not torch.equal(found[name], expected[name])
        ] == []
        for name in products:
            torch.testing.assert_close(found[name], expected[name])


def described(checkpoint: Checkpoint) -> dict[str, Any]:
    """The configuration, without what not every config.ini has a key for and nothing computes."""
    config = checkpoint.config
    if config.embedding_size is not None:
        config = replace(config, embedding_size=None, tie_word_embeddings=False)
    known = asdict(config)
    return {name: value for name, value in known.items() if name not in ("pad_token_id", "max_position_embeddings")}


@pytest.mark.parametrize("dtype", list(TYPES))
@pytest.mark.parametrize("ranks", RANKS)
def test_every_byte_is_as_documented(model: str, source: Path, ranks: int, dtype: str, tmp_path: Path) -> None:
    folder = converted(source, tmp_path / "out", ranks, dtype=dtype)
    expected, found = WRITERS[MODELS[model][0]](source, ranks, dtype), contents(folder)
    assert found.pop("config.ini").decode() == expected.pop("config.ini").decode()
    if MODELS[model][0] == "Bert":
        assert any(name.startswith(OURS) for name in found)
        found = {name: data for name, data in found.items() if not name.startswith(OURS)}
    assert found.keys() == expected.keys()
    products = ("model.wte.bin", "model.lm_head.weight.bin") if "word_embed_proj_dim" in MODELS[model][1] else ()
    assert [name for name in found if name not in products and found[name] != expected[name]] == []
    for name in products:
        each, other = (np.frombuffer(files[name], TYPES[dtype]).astype(np.float32) for files in (found, expected))
        np.testing.assert_allclose(each, other, rtol=1e-3 if dtype == "fp16" else 1e-5, atol=1e-5)


@pytest.mark.parametrize("ranks", RANKS)
def test_a_folder_of_faster_transformer_itself_loads_for_any_ranks(
    model: str, source: Path, ranks: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It has no manifest and no config.json."""
    folder = written(WRITERS[MODELS[model][0]](source, ranks, "fp32"), tmp_path / f"{ranks}-gpu")
    if MODELS[model][0] == "Bert":
        with pytest.raises(
            CheckpointError, match=r"word_embeddings.*: FasterTransformer's own .*; convert the original"
        ):
            open_checkpoint(folder)
        return
    if ranks > 1 and model in UNCLEAR:
        with pytest.raises(UnsupportedError, match=UNCLEAR[model]):
            open_checkpoint(folder)
        return
    found = described(open_checkpoint(folder))
    assert [record.getMessage() for record in caplog.records] == [
        f"{folder / 'config.ini'} does not say {text}" for name, text in UNSAID.items() if name == MODELS[model][0]
    ]
    assert found == described(open_checkpoint(source))
    for size in RANKS:
        assert_loads_as(folder, source, size)


@pytest.mark.parametrize("ranks", RANKS)
def test_a_converted_folder_converts_again(model: str, source: Path, ranks: int, tmp_path: Path) -> None:
    first = converted(source, tmp_path / "first", ranks)
    again = converted(first, tmp_path / "again", 2)
    assert contents(again) == contents(converted(source, tmp_path / "direct", 2))
    safe = converted(first, tmp_path / "safe", 2, format="safetensors")
    assert_loads_as(safe, source, 4)


def test_gpt2_is_written_as_the_runtime_reads_it_where_the_converter_drops_something(
    make_model: MakeModel, tmp_path: Path
) -> None:
    """An MLP of another width, a head of its own, an epsilon."""
    source = make_model("GPT2", n_inner=80, tie_word_embeddings=False, layer_norm_epsilon=1e-3)
    folder = converted(source, tmp_path / "out", 2).rename(tmp_path / "2-gpu")
    ini = (folder / "config.ini").read_text(encoding="utf-8")
    assert "inter_size=80\n" in ini
    assert ini.endswith("tensor_para_size=2\nlayernorm_eps=0.001\n\n")
    plain = WRITERS["GPT2"](source, 2, "fp32")
    state = load_file(source / "model.safetensors")
    head = state["lm_head.weight"].numpy().tobytes()
    assert {name: data for name, data in contents(folder).items() if name != "config.ini"} == {
        **{name: data for name, data in plain.items() if name != "config.ini"},
        "model.lm_head.weight.bin": head,
    }
    (folder / MANIFEST).unlink()
    assert described(open_checkpoint(folder)) == described(open_checkpoint(source))
    assert_loads_as(folder, source, 4)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (("GPT2", {"activation_function": "relu"}), "GPT-2 has no activation relu"),
        (("GPT2", {"scale_attn_weights": False}), "GPT-2 has no attention scores with a scale of their own"),
        (
            ("GPT2", {"scale_attn_by_inverse_layer_idx": True}),
            "GPT-2 has no attention scores with a scale of their own",
        ),
    ],
)
def test_what_faster_transformer_cannot_compute_is_refused_or_becomes_safetensors(
    model: tuple[str, dict[str, Any]], message: str, make_model: MakeModel, tmp_path: Path
) -> None:
    source = make_model(model[0], **model[1])
    with pytest.raises(UnsupportedError, match=f"FasterTransformer's {message}; convert to .* --format safetensors"):
        converted(source, tmp_path / "out", 1, format="fastertransformer")
    assert (converted(source, tmp_path / "out", 1) / "rank-00000-of-00001.safetensors").is_file()


@pytest.mark.parametrize("tied", [True, False])
def test_narrow_embeddings_of_a_config_json_beside_a_folder(
    tied: bool, make_model: MakeModel, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = make_model("OPT", word_embed_proj_dim=32, tie_word_embeddings=tied)
    folder = converted(source, tmp_path / "out", 2)
    assert (tmp_path / "out" / "config.json").is_file()
    assert_loads_as(folder, source, 2)
    (folder / MANIFEST).unlink()
    assert_loads_as(folder, source, 1)
    assert "head is used" not in caplog.text


@pytest.mark.parametrize(("family", "options"), [("GPTJ", {}), ("GPTNeoX", NEOX)])
def test_the_runtimes_with_rotary_positions_need_a_file_of_a_tied_head(
    family: str, options: dict[str, Any], make_model: MakeModel, tmp_path: Path
) -> None:
    source = make_model(family, tie_word_embeddings=True, **options)
    folder = converted(source, tmp_path / "out", 2)
    assert (folder / "model.lm_head.weight.bin").read_bytes() == (folder / "model.wte.bin").read_bytes()
    checkpoint = open_checkpoint(folder)
    assert checkpoint.config.tie_word_embeddings
    assert_loads_as(folder, source, 4)


def test_a_gpt_neox_that_hasten_wrote_is_clear(make_model: MakeModel, tmp_path: Path) -> None:
    """Whether its biases are divided: with parallel residuals alone. The sums are read by the runtime, not here."""
    for parallel in (True, False):
        source = make_model("GPTNeoX", use_parallel_residual=parallel, hidden_act="gelu_new", **NEOX)
        folder = converted(source, tmp_path / str(parallel), 4)
        assert_loads_as(folder, source, 2)
        assert open_checkpoint(folder).config.activation == "gelu_tanh"  # config.json lies beside it
    odd = next(folder.parent.parent.glob("True/4-gpu/model.layers.1.mlp.attention.bias.sum.bin"))
    (odd.parent / MANIFEST).unlink()
    odd.write_bytes(b"four")
    with pytest.raises(CheckpointError, match=r"mlp\.attention\.bias\.sum\.bin has 4 bytes, but 256 are"):
        open_checkpoint(odd.parent)
    odd.unlink()
    open_checkpoint(odd.parent)


def test_without_a_file_that_is_split_nothing_says_for_how_many_ranks(make_model: MakeModel, tmp_path: Path) -> None:
    files, name = WRITERS["GPTNeoX"](make_model("GPTNeoX", **NEOX), 4, "fp32"), "model.layers.0.attention.dense.weight"
    folder = written({file: data for file, data in files.items() if name not in file}, tmp_path / "4-gpu")
    with pytest.raises(CheckpointError, match=f"4-gpu/{name}.0.bin is missing; copy it"):
        open_checkpoint(folder)


def test_a_gpt_j_is_called_as_its_config_json_does(
    make_model: MakeModel, copy_of: Copy, edit_config: Callable[..., None], tmp_path: Path
) -> None:
    source = copy_of(make_model("GPTJ"))
    edit_config(source, _name_or_path="EleutherAI/gpt-j-6B")
    ini = (converted(source, tmp_path / "out", 1) / "config.ini").read_text(encoding="utf-8")
    assert ini.startswith("[gptj]\nmodel_name=EleutherAI/gpt-j-6B\nhead_num=")


def test_an_opt_with_a_tied_head_shares_it(make_model: MakeModel, tmp_path: Path) -> None:
    source = make_model("OPT")
    folder = converted(source, tmp_path / "out", 2)
    assert (folder / "model.lm_head.weight.bin").read_bytes() == (folder / "model.wte.bin").read_bytes()
    assert open_checkpoint(folder).config.tie_word_embeddings
    (folder / MANIFEST).unlink()
    (folder / "model.lm_head.weight.bin").unlink()  # the runtime takes the embedding then
    assert_loads_as(folder, source, 2)


def test_odd_folders(make_model: MakeModel, tmp_path: Path) -> None:
    files = WRITERS["GPT2"](make_model("GPT2"), 2, "fp32")
    ini = files["config.ini"].decode()
    wpe, dense = "model.wpe.bin", "model.layers.1.attention.dense.weight.1.bin"
    odd: dict[str, Files] = {
        r"config.ini lacks 'max_pos_seq_len' in \[gpt\]": {"config.ini": ini.replace("max_pos", "max").encode()},
        "head_num in .* is 'four', not a whole number": {
            "config.ini": ini.replace("head_num=4", "head_num=four").encode()
        },
        "start_id in .* is 'x', not a token id": {"config.ini": ini.replace("start_id=1", "start_id=x").encode()},
        "data type 'int8' is not known": {"config.ini": ini.replace("=fp32", "=int8").encode()},
        r"config.ini has none of the sections \[gpt\].*: it is of a kind": {"config.ini": b"[swin]\nnum_layer=2\n"},
        "config.ini cannot be read as FasterTransformer's config.ini: File contains no section": {
            "config.ini": b"a=1\n"
        },
        f"{wpe} has 8 bytes, but 24576 are \\(128, 48\\) of fp32": {wpe: b"eight..."},
        "model.layers.7.mlp.x.bin belongs to no weight": {"model.layers.7.mlp.x.bin": b""},
    }
    for number, (message, changes) in enumerate(odd.items()):
        with pytest.raises(CheckpointError, match=message):
            open_checkpoint(written(files | changes, tmp_path / str(number)))
    folder = written({name: data for name, data in files.items() if name != dense}, tmp_path / "missing")
    with pytest.raises(CheckpointError, match=f"{dense} is missing"):
        open_checkpoint(folder)
    folder = written(
        files | {"config.ini": ini.replace("=fp32", "=fp32\nactivation_type=Swish").encode()}, tmp_path / "x"
    )
    with pytest.raises(UnsupportedError, match="activation_type is Swish, but Gelu in every GPT-2"):
        open_checkpoint(folder)


def test_a_config_json_beside_a_folder_says_more_and_must_not_contradict(make_model: MakeModel, tmp_path: Path) -> None:
    source = make_model("GPT2")
    folder = written(WRITERS["GPT2"](source, 2, "fp16"), tmp_path / "2-gpu")
    raw = json.loads((source / "config.json").read_text(encoding="utf-8"))
    beside = tmp_path / "config.json"
    beside.write_text(json.dumps(raw | {"layer_norm_epsilon": 1e-3}), encoding="utf-8")
    config = open_checkpoint(folder).config
    assert (config.norm_eps, config.dtype, config.pad_token_id) == (1e-3, "fp16", 3)
    beside.write_text(json.dumps(raw | {"n_layer": 2}), encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"config.ini and config.json beside it differ in num_layers \(3 and 2\)"):
        open_checkpoint(folder)


def test_what_a_t5_of_faster_transformer_itself_may_say(saved: Callable[[str], Path], tmp_path: Path) -> None:
    """All of transformers' keys; an encoder alone, biases, another type and another epsilon are refused."""
    files = WRITERS["T5"](saved("flan-t5"), 2, "fp32")
    ini = files["config.ini"].decode()
    more = ini.replace("d_kv", "dropout_rate = 0.1\nreturn_dict = True\ntop_k = 50\nodd = 1\nd_kv", 1)
    folder = written(files | {"config.ini": more.encode()}, tmp_path / "2-gpu")
    with pytest.MonkeyPatch.context() as patch:
        warned: list[str] = []
        patch.setattr(
            "hasten.checkpoint.faster_transformer.folder._log.warning", lambda text, *of: warned.append(text % of)
        )
        assert_loads_as(folder, saved("flan-t5"), 4)
    assert {text.rpartition(": ")[2] for text in warned} == {"odd"}
    alone = ini[: ini.index("[decoder]")] + "[decoder]\n\n" + ini[ini.index("[structure]") :]
    odd = {
        r"\[decoder\] is empty: it is of an encoder alone": alone,
        r"t5_with_bias is true, but False in every T5; .* \[structure\]": ini.replace("bias = false", "bias = true"),
        r"model_type is umt5, but t5 in every T5": ini.replace("= t5", "= umt5"),
        r"config.ini lacks \[structure\]": ini[: ini.index("[structure]")],
    }
    for message, text in odd.items():
        (folder / "config.ini").write_text(text, encoding="utf-8")
        with pytest.raises((CheckpointError, UnsupportedError), match=message):
            open_checkpoint(folder)


@pytest.mark.parametrize(
    ("kind", "options", "problem"),
    [
        ("t5", {"relative_attention_max_distance": 64}, "T5 has no biases by distance up to 64"),
        ("flan-t5", {"layer_norm_epsilon": 1e-5}, "T5 has no epsilon 1e-05"),
        ("umt5", {}, "FasterTransformer had no UMT5ForConditionalGeneration"),
    ],
)
def test_which_t5_faster_transformer_cannot_compute(
    kind: str, options: dict[str, Any], problem: str, tmp_path: Path
) -> None:
    source = save_encoder_decoder(tmp_path / "source", kind, **options)
    with pytest.raises(UnsupportedError, match=f"{problem}.*; convert to .* --format safetensors"):
        converted(source, tmp_path / "out", 1, format="fastertransformer")
