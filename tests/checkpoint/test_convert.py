import configparser
import json
import os
import pickle
from collections.abc import Callable
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from hasten.checkpoint.convert import Conversion, Opened, Wrote, convert
from hasten.checkpoint.manifest import MANIFEST, Manifest
from hasten.core.errors import CheckpointError, ChecksumError, ConfigError, UnsupportedError

FtFiles = Callable[[Path, int, str], dict[str, bytes]]
Copy = Callable[..., Path]


def run(source: Path, out: Path, ranks: int = 1, **options: Any) -> Path:
    convert(Conversion(input_dir=str(source), output_dir=str(out), ranks=ranks, **options))
    return out / f"{ranks}-gpu"


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def weights(folder: Path) -> dict[str, bytes]:
    return {name: data for name, data in contents(folder).items() if name.endswith(".bin")}


def expected_ini(folder: Path, ranks: int, dtype: str) -> str:
    """As FasterTransformer writes it: Python's configparser over values of transformers' configuration."""
    from transformers import BloomConfig

    config = BloomConfig.from_pretrained(folder)
    post = config.apply_residual_connection_post_layernorm
    parser = configparser.ConfigParser()
    parser["gpt"] = {
        name: str(value)
        for name, value in (
            ("model_name", folder),
            ("num_layer", config.n_layer),
            ("head_num", config.n_head),
            ("inter_size", 4 * config.hidden_size),
            ("size_per_head", config.hidden_size // config.n_head),
            ("vocab_size", config.vocab_size),
            ("tensor_para_size", ranks),
            ("weight_data_type", dtype),
            ("model_variant", "bloom-post" if post else "bloom-pre"),
            ("layernorm_eps", config.layer_norm_epsilon),
            ("layernorm_type", "post_layernorm" if post else "pre_layernorm"),
            ("activation_type", "Gelu"),
            ("has_positional_encoding", False),
            ("has_pre_decoder_layernorm", True),
            ("has_post_decoder_layernorm", True),
            ("use_attention_linear_bias", True),
            ("start_id", config.bos_token_id),
            ("end_id", config.eos_token_id),
        )
    }
    text = StringIO()
    parser.write(text, space_around_delimiters=False)
    return text.getvalue()


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("model", ["tiny_bloom", "tiny_bloom_12_heads", "tiny_bloom_post_norm", "tiny_bloom_odd_vocab"])
def test_every_byte_is_as_faster_transformer_writes_it(
    model: str, ranks: int, dtype: str, request: pytest.FixtureRequest, ft_files: FtFiles, tmp_path: Path
) -> None:
    source: Path = request.getfixturevalue(model)
    folder = run(source, tmp_path / "out", ranks, dtype=dtype, workers=2)
    assert weights(folder) == ft_files(source, ranks, dtype)
    assert (folder / "config.ini").read_text(encoding="utf-8") == expected_ini(source, ranks, dtype)


def test_bf16_files_are_the_cast_tensors(tiny_bloom: Path, tmp_path: Path) -> None:
    folder = run(tiny_bloom, tmp_path / "out", dtype="bf16")
    stored = load_file(tiny_bloom / "model.safetensors")["transformer.h.1.mlp.dense_4h_to_h.weight"]
    found = torch.from_file(
        str(folder / "model.layers.1.mlp.dense_4h_to_h.weight.0.bin"), size=stored.numel(), dtype=torch.bfloat16
    )
    assert torch.equal(found.view(stored.shape[::-1]), stored.to(torch.bfloat16).t())
    assert "weight_data_type=bf16" in (folder / "config.ini").read_text(encoding="utf-8")


def test_an_untied_head_is_written_vocabulary_first(tiny_bloom_untied: Path, ft_files: FtFiles, tmp_path: Path) -> None:
    folder = run(tiny_bloom_untied, tmp_path / "out", 2)
    found = weights(folder)
    head = load_file(tiny_bloom_untied / "model.safetensors")["lm_head.weight"]
    assert found.pop("model.lm_head.weight.bin") == head.numpy().tobytes()
    assert found == ft_files(tiny_bloom_untied, 2, "fp32")


def test_a_tied_head_gives_no_file_even_if_the_checkpoint_holds_it(
    tiny_bloom: Path, as_bin: Copy, ft_files: FtFiles, tmp_path: Path
) -> None:
    embedding = load_file(tiny_bloom / "model.safetensors")["transformer.word_embeddings.weight"]
    source = as_bin(tiny_bloom, **{"lm_head.weight": embedding})
    assert weights(run(source, tmp_path / "out")) == ft_files(tiny_bloom, 1, "fp32")


@pytest.mark.parametrize(("ranks", "of_30_layers"), [(1, 365), (2, 545), (4, 905)])
def test_number_of_files(ranks: int, of_30_layers: int, tiny_bloom: Path, tmp_path: Path) -> None:
    once, whole_of_layer, split_of_layer = 5, 6, 6
    assert once + 30 * (whole_of_layer + split_of_layer * ranks) == of_30_layers
    folder = run(tiny_bloom, tmp_path / "out", ranks)
    assert len(weights(folder)) == once + 3 * (whole_of_layer + split_of_layer * ranks)


@pytest.mark.parametrize("output_format", ["fastertransformer", "safetensors"])
def test_shards_workers_and_input_formats_change_nothing(
    output_format: str, tiny_bloom: Path, as_shards: Copy, as_bin: Copy, tmp_path: Path
) -> None:
    def made(source: Path, **options: Any) -> dict[str, bytes]:
        files = contents(
            run(source, tmp_path / f"out{len(list(tmp_path.iterdir()))}", 2, format=output_format, **options)
        )
        return {name: data for name, data in files.items() if name.endswith((".bin", ".safetensors"))}

    plain = made(tiny_bloom)
    shards = as_shards(tiny_bloom)
    assert made(shards) == plain
    assert made(shards, by_shard=True, workers=3) == plain
    for index, options in enumerate(({}, {"shards": 3}, {"shards": 3, "legacy": True})):
        source = as_bin(tiny_bloom, **options)
        torch.save({"optimizer": torch.zeros(3)}, source / "optimizer.bin")
        assert made(source, by_shard=bool(index), workers=2) == plain


def test_a_checkpoint_of_the_base_model_has_no_prefix(tiny_bloom: Path, ft_files: FtFiles, tmp_path: Path) -> None:
    from transformers import BloomModel

    BloomModel.from_pretrained(tiny_bloom).save_pretrained(tmp_path / "base")
    assert "h.0.input_layernorm.bias" in load_file(tmp_path / "base" / "model.safetensors")
    assert weights(run(tmp_path / "base", tmp_path / "out", 2)) == ft_files(tiny_bloom, 2, "fp32")


def test_the_output_is_complete(tiny_bloom: Path, tmp_path: Path) -> None:
    folder = run(tiny_bloom, tmp_path / "out", 2)
    beside = {path.name for path in folder.parent.iterdir()}
    assert beside >= {"2-gpu", "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"}
    manifest = Manifest.read(folder)
    assert manifest is not None
    assert set(manifest.files) == {path.name for path in folder.iterdir()} - {MANIFEST}
    manifest.verify(folder, manifest.files)


def test_reports_come_in_the_order_of_the_model(tiny_bloom: Path, tmp_path: Path) -> None:
    events: list[Opened | Wrote] = []
    convert(Conversion(str(tiny_bloom), str(tmp_path / "out"), ranks=2, workers=4), events.append)
    opened, *wrote = events
    assert isinstance(opened, Opened)
    assert opened.label == "HF >> FT"
    parts = [event.part for event in wrote if isinstance(event, Wrote)]
    assert sum(part.nbytes for part in parts) == opened.nbytes
    assert [part.name for part in parts[:3]] == [
        "model.wte",
        "model.pre_decoder_layernorm.weight",
        "model.pre_decoder_layernorm.bias",
    ]
    assert parts[-1].name == "model.final_layernorm.bias"


@pytest.mark.parametrize("through", ["fastertransformer", "safetensors"])
def test_a_converted_folder_converts_again(
    through: str, tiny_bloom_12_heads: Path, ft_files: FtFiles, tmp_path: Path
) -> None:
    first = run(tiny_bloom_12_heads, tmp_path / "first", 3, format=through)
    direct = run(tiny_bloom_12_heads, tmp_path / "direct", 2, dtype="fp16")
    again = run(first, tmp_path / "again", 2, dtype="fp16")
    assert weights(again) == weights(direct)
    assert (tmp_path / "again" / "tokenizer.json").exists()
    if through == "fastertransformer":
        assert (again / "config.ini").read_bytes() == (direct / "config.ini").read_bytes()


def test_another_rank_count_is_added_and_the_same_one_replaced(tiny_bloom: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(tiny_bloom, out, 1)
    before = contents(out / "1-gpu")
    run(tiny_bloom, out, 2)
    run(out / "1-gpu", out, 4)
    run(tiny_bloom, out, 2, dtype="fp16")
    assert {path.name for path in out.iterdir() if path.is_dir()} == {"1-gpu", "2-gpu", "4-gpu"}
    assert contents(out / "1-gpu") == before
    assert "weight_data_type=fp16" in (out / "2-gpu" / "config.ini").read_text(encoding="utf-8")


def test_another_model_replaces_a_folder_but_joins_none(
    tiny_bloom: Path, tiny_bloom_post_norm: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    run(tiny_bloom, out, 2)
    run(tiny_bloom_post_norm, out, 2)
    assert (out / "config.json").read_bytes() == (tiny_bloom_post_norm / "config.json").read_bytes()
    before = contents(out)
    with pytest.raises(CheckpointError, match="another model"):
        run(tiny_bloom, out, 4)
    assert contents(out) == before


def _nothing_left(folder: Path) -> bool:
    return not any(path.name.startswith(".") for path in folder.iterdir())


@pytest.mark.parametrize(
    ("value", "dtype", "message"),
    [
        (70000.0, "fp16", r"'transformer|h\.1\.mlp\.dense_4h_to_h\.weight' holds 70000, which fp16 cannot.*bf16"),
        (3.4e38, "bf16", "which bf16 cannot.*fp32"),
        (float("nan"), "fp32", "not a number"),
        (float("inf"), "fp16", "an infinity"),
    ],
)
def test_values_that_the_type_cannot_hold(
    value: float, dtype: str, message: str, tiny_bloom: Path, resaved: Copy, tmp_path: Path
) -> None:
    def spoil(state: dict[str, torch.Tensor]) -> None:
        state["transformer.h.1.mlp.dense_4h_to_h.weight"][3, 5] = value

    source = resaved(tiny_bloom, spoil)
    with pytest.raises(CheckpointError, match=message):
        run(source, tmp_path / "new" / "out", 2, dtype=dtype, workers=2)
    assert not (tmp_path / "new").exists()
    assert _nothing_left(tmp_path)


def test_an_error_leaves_the_old_folder(tiny_bloom: Path, resaved: Copy, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(tiny_bloom, out, 2)
    before = contents(out)
    source = resaved(tiny_bloom, lambda state: state["transformer.ln_f.bias"].fill_(float("nan")))
    with pytest.raises(CheckpointError):
        run(source, out, 2)
    assert contents(out) == before
    assert _nothing_left(tmp_path)


def test_heads_must_divide(tiny_bloom: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"3 does not divide attention heads \(8\)"):
        run(tiny_bloom, tmp_path / "out", 3)
    with pytest.raises(ConfigError, match="at least 1"):
        run(tiny_bloom, tmp_path / "out", 0)
    with pytest.raises(ConfigError, match="processes must be at least 1"):
        run(tiny_bloom, tmp_path / "out", workers=0)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_not_ours_is_left_alone(tiny_bloom: Path, copy_of: Copy, tmp_path: Path) -> None:
    full = tmp_path / "full"
    full.mkdir()
    (full / "letter.txt").write_text("dear", encoding="utf-8")
    with pytest.raises(CheckpointError, match="not a folder that hasten wrote"):
        run(tiny_bloom, full)
    with pytest.raises(CheckpointError, match="is a file"):
        run(tiny_bloom, full / "letter.txt")
    with pytest.raises(CheckpointError, match=r"letter\.txt is a file, and a folder is needed there$"):
        run(tiny_bloom, full / "letter.txt" / "out")
    out = tmp_path / "out"
    folder = run(tiny_bloom, out)
    (folder / "notes.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(CheckpointError, match="would be lost"):
        run(tiny_bloom, out)
    (folder / "notes.txt").rename(out / "notes.txt")
    run(tiny_bloom, out, dtype="fp16")
    assert (out / "notes.txt").read_text(encoding="utf-8") == "mine"
    source = copy_of(tiny_bloom)
    for outside in (source, source / "." / "..", folder):
        with pytest.raises((ConfigError, CheckpointError)):
            run(source, outside)
    before = sorted(source.iterdir())
    for given, output in ((folder, out), (source, source)):
        with pytest.raises(ConfigError, match="take the place of the input; give another output folder"):
            run(given, output)
    assert sorted(source.iterdir()) == before


def test_an_empty_folder_may_be_given(tiny_bloom: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    assert run(tiny_bloom, tmp_path / "out").is_dir()


def test_the_current_folder_may_be_given(tiny_bloom: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        run(tiny_bloom, Path(), 2)
        assert {"2-gpu", "config.json"} <= {path.name for path in Path().iterdir()}
        assert _nothing_left(Path())


def test_torch_keeps_its_threads(tiny_bloom: Path, tmp_path: Path) -> None:
    before = torch.get_num_threads()
    run(tiny_bloom, tmp_path / "out", workers=3)
    assert torch.get_num_threads() == before


def test_unreadable_inputs(tiny_bloom: Path, copy_of: Copy, edit_config: Callable[..., None], tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(CheckpointError, match="there is no folder"):
        run(tmp_path / "nowhere", out)
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        run(tmp_path / "empty", out)
    source = copy_of(tiny_bloom)
    edit_config(source, architectures=["XGLMForCausalLM"])
    with pytest.raises(UnsupportedError, match="BloomForCausalLM"):
        run(source, out)
    edit_config(source, architectures=["BloomForCausalLM"], n_head=None)
    with pytest.raises(ConfigError, match="n_head"):
        run(source, out)
    edit_config(source, n_head="many")
    with pytest.raises(ConfigError, match="wrong kind"):
        run(source, out)
    for damaged in ("{", "[" * 100_000, '{"n_head": ' + "9" * 5000 + "}"):
        (source / "config.json").write_text(damaged, encoding="utf-8")
        with pytest.raises(CheckpointError, match=r"config\.json cannot be read as JSON"):
            run(source, out)
    assert not out.exists()


def test_damaged_safetensors(tiny_bloom: Path, copy_of: Copy, as_shards: Copy, tmp_path: Path) -> None:
    source = copy_of(tiny_bloom)
    file = source / "model.safetensors"
    os.truncate(file, file.stat().st_size - 5)
    with pytest.raises(CheckpointError, match=r"model\.safetensors is truncated or damaged"):
        run(source, tmp_path / "out")
    shards = as_shards(tiny_bloom)
    index = shards / "model.safetensors.index.json"
    where = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    last = max(where.values())
    index.write_text(json.dumps({"weight_map": {n: f for n, f in where.items() if n != "transformer.ln_f.bias"}}))
    with pytest.raises(CheckpointError, match=r"lacks tensor 'ln_f\.bias'"):
        run(shards, tmp_path / "out")
    index.write_text(json.dumps({"weight_map": where}))
    (shards / last).unlink()
    with pytest.raises(CheckpointError, match=f"{last} is missing, but"):
        run(shards, tmp_path / "out")
    assert not (tmp_path / "out").exists()


class _Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, ("executed",))


def test_pickles_are_never_executed(
    tiny_bloom: Path, as_bin: Copy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    source = as_bin(tiny_bloom)
    file = source / "pytorch_model.bin"
    whole = file.read_bytes()
    file.write_bytes(whole[:-200])
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin"):
        run(source, tmp_path / "out")
    for evil in (lambda: torch.save({"a": _Evil()}, file), lambda: file.write_bytes(pickle.dumps(_Evil(), protocol=2))):
        evil()
        with pytest.raises(CheckpointError, match="does not execute"):
            run(source, tmp_path / "out")
    torch.save([torch.zeros(2)], file)
    with pytest.raises(CheckpointError, match="plain set of named tensors"):
        run(source, tmp_path / "out")
    assert not (tmp_path / "executed").exists()


def test_missing_extra_and_misshapen_tensors(tiny_bloom: Path, resaved: Copy, tmp_path: Path) -> None:
    name = "transformer.h.2.mlp.dense_h_to_4h.bias"
    changes: dict[str, Callable[[dict[str, torch.Tensor]], None]] = {
        r"lacks tensor 'h\.2\.mlp\.dense_h_to_4h\.bias'": lambda state: state.__delitem__(name),
        r"holds unknown tensor 'h\.9\.extra'": lambda state: state.update({"transformer.h.9.extra": torch.zeros(2)}),
        r"'transformer\.h\.2.*shape \(7,\), .* \(256,\)": lambda state: state.update({name: torch.zeros(7)}),
        r"type torch\.int32": lambda state: state.update({name: torch.zeros(256, dtype=torch.int32)}),
        "twice": lambda state: state.update({name.removeprefix("transformer."): torch.zeros(256)}),
    }
    for message, change in changes.items():
        source = resaved(tiny_bloom, change)
        with pytest.raises(CheckpointError, match=message):
            run(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_changed_input_file_is_refused(tiny_bloom: Path, tmp_path: Path) -> None:
    folder = run(tiny_bloom, tmp_path / "first", 2)
    file = folder / "model.layers.1.mlp.dense_4h_to_h.weight.1.bin"
    data = bytearray(file.read_bytes())
    data[100] ^= 1
    file.write_bytes(data)
    with pytest.raises(ChecksumError, match=r"dense_4h_to_h\.weight\.1\.bin"):
        run(folder, tmp_path / "second", 1)
