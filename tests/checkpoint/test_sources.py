import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tests.rank_shards import rank_shards

from hasten.checkpoint.convert import Conversion, convert
from hasten.checkpoint.manifest import MANIFEST
from hasten.checkpoint.plan import Checkpoint, open_checkpoint, rank_tensors
from hasten.checkpoint.writers import Format
from hasten.core.errors import CheckpointError, ChecksumError, ConfigError, UnsupportedError
from hasten.core.model_config import ModelConfig
from hasten.models.bloom import BloomForCausalLM
from hasten.parallel.shard import merge

State = dict[str, torch.Tensor]
WholeTensors = Callable[[Path], State]
Copy = Callable[..., Path]
FORMATS: tuple[Format, ...] = ("fastertransformer", "safetensors")


def converted(source: Path, out: Path, ranks: int, output_format: Format, dtype: str = "fp32") -> Path:
    convert(Conversion(str(source), str(out), ranks=ranks, format=output_format, dtype=dtype, workers=2))  # type: ignore[arg-type]
    return out / f"{ranks}-gpu"


def loaded(checkpoint: Checkpoint, size: int, dtype: torch.dtype = torch.float32) -> State:
    """All ranks' shards, put together again."""
    config = checkpoint.config
    ranks = [rank_shards(checkpoint, rank, size, dtype) for rank in range(size)]
    specs = {spec.name: spec for spec in BloomForCausalLM.weight_map(config).specs}
    assert all(list(state) == list(ranks[0]) for state in ranks)
    assert all(tensor.is_contiguous() for state in ranks for tensor in state.values())
    return {
        name: merge([state[name] for state in ranks], spec.split, config.attention, config.vocab_size)
        for name, spec in specs.items()
    }


def assert_same(found: State, expected: State) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


@pytest.fixture(scope="module")
def twelve_heads(make_bloom: Callable[..., Path]) -> Path:
    """12 heads divide by many sizes, and 509 tokens by none."""
    return make_bloom(n_head=12, hidden_size=96, vocab_size=509, n_layer=2, tie_word_embeddings=False)


def test_tensors_may_be_put_in_order_elsewhere(twelve_heads: Path) -> None:
    """Each is given away as it is in the file, and everything is done with what came back."""
    source, files = open_checkpoint(twelve_heads).source, load_file(twelve_heads / "model.safetensors")
    expected, given = [source.shard(spec, 0, 1) for spec in source.specs], list[torch.Tensor]()

    def upload(tensor: torch.Tensor) -> torch.Tensor:
        given.append(tensor)
        return -tensor

    source.upload = upload
    found = [source.shard(spec, 0, 1) for spec in source.specs]
    assert all(torch.equal(-tensor, other) for tensor, other in zip(found, expected, strict=True))
    assert len(given) == len(files)
    assert all(any(torch.equal(tensor, stored) for stored in files.values()) for tensor in given)


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_hugging_face_shares_make_the_whole(
    size: int, twelve_heads: Path, as_bin: Copy, as_shards: Copy, whole_tensors: WholeTensors
) -> None:
    expected = whole_tensors(twelve_heads)
    for folder in (twelve_heads, as_bin(twelve_heads, shards=2), as_shards(twelve_heads)):
        assert loaded(open_checkpoint(folder), size).keys() == expected.keys()
        assert_same(loaded(open_checkpoint(folder), size), expected)


@pytest.mark.parametrize("stored", [1, 2, 3, 4, 6])
@pytest.mark.parametrize("output_format", FORMATS)
def test_any_rank_count_reads_any_other(
    output_format: Format, stored: int, twelve_heads: Path, whole_tensors: WholeTensors, tmp_path: Path
) -> None:
    folder = converted(twelve_heads, tmp_path / "out", stored, output_format)
    expected = whole_tensors(twelve_heads)
    for size in (1, 2, 3, 4, 6):
        assert_same(loaded(open_checkpoint(folder, size), size), expected)


@pytest.mark.parametrize("output_format", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_types_are_cast_on_the_way(
    output_format: Format, dtype: torch.dtype, twelve_heads: Path, whole_tensors: WholeTensors, tmp_path: Path
) -> None:
    for stored in ("fp32", "bf16"):
        checkpoint = open_checkpoint(converted(twelve_heads, tmp_path / stored, 2, output_format, stored))
        assert checkpoint.config.dtype == stored
        kept = {"fp32": torch.float32, "bf16": torch.bfloat16}[stored]
        expected = {name: tensor.to(kept).to(dtype) for name, tensor in whole_tensors(twelve_heads).items()}
        assert_same(loaded(checkpoint, 2, dtype), expected)


@pytest.mark.parametrize("model", ["tiny_bloom", "tiny_bloom_untied", "tiny_bloom_post_norm"])
@pytest.mark.parametrize("output_format", FORMATS)
def test_a_rank_folder_stands_alone(
    model: str, output_format: Format, request: pytest.FixtureRequest, whole_tensors: WholeTensors, tmp_path: Path
) -> None:
    source: Path = request.getfixturevalue(model)
    alone = converted(source, tmp_path / "out", 2, output_format).rename(tmp_path / "2-gpu")
    checkpoint = open_checkpoint(alone, 2)
    assert checkpoint.tokenizer_folder is None
    known, wanted = vars(checkpoint.config), vars(open_checkpoint(source).config)
    unsaid = {"pad_token_id", "max_position_embeddings"} if output_format == "fastertransformer" else set()
    assert {k: v for k, v in known.items() if k not in unsaid} == {k: v for k, v in wanted.items() if k not in unsaid}
    assert_same(loaded(checkpoint, 2), whole_tensors(source))


def test_a_folder_of_faster_transformer_itself(
    tiny_bloom_untied: Path, whole_tensors: WholeTensors, tmp_path: Path
) -> None:
    """It has neither manifest nor config.json, and its untied head is transposed."""
    folder = converted(tiny_bloom_untied, tmp_path / "out", 4, "fastertransformer").rename(tmp_path / "ft")
    (folder / MANIFEST).unlink()
    expected = whole_tensors(tiny_bloom_untied)
    (folder / "model.lm_head.weight.bin").write_bytes(expected["head.weight"].t().contiguous().numpy().tobytes())
    checkpoint = open_checkpoint(folder, 2)
    assert not checkpoint.config.tie_word_embeddings
    assert_same(loaded(checkpoint, 2), expected)


HEAD, EMBEDDING = "lm_head.weight", "transformer.word_embeddings.weight"
FT_HEAD, FT_EMBEDDING = "model.lm_head.weight.bin", "model.wte.bin"


@pytest.fixture
def own_head(tiny_bloom: Path, resaved: Copy) -> Path:
    """A head that fine-tuning moved away from the embedding, under a configuration that still ties them."""
    head = torch.randn(load_file(tiny_bloom / "model.safetensors")[EMBEDDING].shape) * 0.2
    return resaved(tiny_bloom, lambda state: state.update({HEAD: head}))


def test_a_head_that_differs_from_the_embedding_wins_over_the_configuration(
    own_head: Path, as_bin: Copy, as_shards: Copy, whole_tensors: WholeTensors, caplog: pytest.LogCaptureFixture
) -> None:
    expected = whole_tensors(own_head)
    assert torch.equal(expected["head.weight"], load_file(own_head / "model.safetensors")[HEAD])
    for folder in (own_head, as_bin(own_head), as_bin(own_head, shards=2), as_shards(own_head)):
        caplog.clear()
        checkpoint = open_checkpoint(folder)
        assert not checkpoint.config.tie_word_embeddings
        assert_same(loaded(checkpoint, 2), expected)
        assert [record.getMessage().partition(" ties ")[0] for record in caplog.records] == [f"{folder}/config.json"]


def test_a_head_that_equals_the_embedding_stays_tied(
    tiny_bloom: Path, as_bin: Copy, resaved: Copy, whole_tensors: WholeTensors, caplog: pytest.LogCaptureFixture
) -> None:
    expected = whole_tensors(tiny_bloom)
    embedding = load_file(tiny_bloom / "model.safetensors")[EMBEDDING]

    def copied(state: State) -> None:
        state[HEAD] = embedding.clone()

    def only_the_head(state: State) -> None:
        state[HEAD] = state.pop(EMBEDDING)

    for folder in (
        resaved(tiny_bloom, copied),
        resaved(tiny_bloom, only_the_head),
        as_bin(tiny_bloom, **{HEAD: embedding}),
        as_bin(tiny_bloom, shards=2, **{HEAD: embedding}),
    ):
        assert_same(whole_tensors(folder), expected)
        checkpoint = open_checkpoint(folder)
        assert checkpoint.config.tie_word_embeddings
        assert_same(loaded(checkpoint, 2), expected)
    assert not caplog.records


@pytest.mark.parametrize("output_format", FORMATS)
@pytest.mark.parametrize("ranks", [1, 2])
def test_conversion_keeps_a_head_that_differs(
    output_format: Format,
    ranks: int,
    own_head: Path,
    whole_tensors: WholeTensors,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    expected = whole_tensors(own_head)
    folder = converted(own_head, tmp_path / "out", ranks, output_format)
    assert "head is used" in caplog.text
    caplog.clear()
    assert_same(loaded(open_checkpoint(folder), 2), expected)
    assert_same(loaded(open_checkpoint(converted(folder, tmp_path / "again", 1, output_format)), 1), expected)
    assert not caplog.records


def test_a_head_in_a_folder_of_faster_transformer_itself(
    own_head: Path, whole_tensors: WholeTensors, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It has no manifest, and a config.json beside it ties the head."""
    folder = converted(own_head, tmp_path / "out", 2, "fastertransformer")
    (folder / MANIFEST).unlink()
    expected = whole_tensors(own_head)
    head = expected["head.weight"].t().contiguous()
    (folder / FT_HEAD).write_bytes(head.numpy().tobytes())
    assert_same(loaded(open_checkpoint(tmp_path / "out"), 1), expected)
    assert "head is used" in caplog.text
    (tmp_path / "out" / "config.json").unlink()
    caplog.clear()
    assert_same(loaded(open_checkpoint(folder), 1), expected)
    assert not caplog.records
    (folder / FT_HEAD).write_bytes(b"anything")
    with pytest.raises(CheckpointError, match=f"{FT_HEAD} has 8 bytes"):
        open_checkpoint(folder)


def test_a_head_of_faster_transformer_that_equals_the_embedding_is_shared(
    tiny_bloom: Path, whole_tensors: WholeTensors, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = converted(tiny_bloom, tmp_path / "out", 2, "fastertransformer")
    expected = whole_tensors(tiny_bloom)
    (folder / FT_HEAD).write_bytes((folder / FT_EMBEDDING).read_bytes())
    with pytest.raises(CheckpointError, match=f"{FT_HEAD} belongs to no weight"):
        open_checkpoint(folder)  # the manifest does not list it
    (folder / MANIFEST).unlink()
    assert_same(loaded(open_checkpoint(folder), 1), expected)
    (folder / FT_HEAD).write_bytes(expected["embedding.weight"].t().contiguous().numpy().tobytes())
    for beside in ("config.json", "none"):
        if beside == "none":
            (tmp_path / "out" / "config.json").unlink()
        checkpoint = open_checkpoint(folder)
        assert checkpoint.config.tie_word_embeddings
        assert_same(loaded(checkpoint, 1), expected)
    assert not caplog.records


def test_a_configuration_without_a_tie_needs_the_head(tiny_bloom_untied: Path, tmp_path: Path) -> None:
    folder = converted(tiny_bloom_untied, tmp_path / "out", 2, "fastertransformer")
    (folder / MANIFEST).unlink()
    (folder / FT_HEAD).unlink()
    with pytest.raises(CheckpointError, match=f"{FT_HEAD} is missing"):
        open_checkpoint(folder)


def test_out_finds_the_folder_of_the_wanted_ranks(tiny_bloom: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for ranks in (1, 2, 4):
        converted(tiny_bloom, out, ranks, FORMATS[ranks == 2])
    for ranks, folder in ((1, "1-gpu"), (2, "2-gpu"), (4, "4-gpu"), (8, "1-gpu")):
        checkpoint = open_checkpoint(out, ranks)
        assert checkpoint.source.folder == out / folder
        assert checkpoint.tokenizer_folder == out
    assert open_checkpoint(out / "4-gpu", 2).tokenizer_folder == out
    assert open_checkpoint(tiny_bloom).tokenizer_folder == tiny_bloom


@pytest.mark.parametrize("output_format", FORMATS)
def test_a_rank_verifies_the_files_it_reads_and_no_others(
    output_format: Format, tiny_bloom: Path, tmp_path: Path
) -> None:
    folder = converted(tiny_bloom, tmp_path / "out", 4, output_format)
    name = (
        "rank-00003-of-00004.safetensors"
        if output_format == "safetensors"
        else "model.layers.1.mlp.dense_h_to_4h.bias.3.bin"
    )
    data = bytearray((folder / name).read_bytes())
    data[-1] ^= 1
    (folder / name).write_bytes(data)
    dict(rank_tensors(open_checkpoint(folder, 4), 2, 4, torch.float32))
    dict(rank_tensors(open_checkpoint(folder, 2), 0, 2, torch.float32))
    for rank, size in ((3, 4), (1, 2), (0, 1)):
        with pytest.raises(ChecksumError, match=name):
            dict(rank_tensors(open_checkpoint(folder, size), rank, size, torch.float32))
    dict(rank_tensors(open_checkpoint(folder, 4, verify=False), 3, 4, torch.float32))


def test_damaged_rank_folders(
    tiny_bloom: Path, copy_of: Copy, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ft = converted(tiny_bloom, tmp_path / "ft", 2, "fastertransformer")
    name = "model.layers.0.attention.dense.weight.1.bin"

    def truncate(folder: Path) -> None:
        (folder / name).write_bytes((folder / name).read_bytes()[:-4])

    def edit_ini(folder: Path, old: str, new: str) -> None:
        text = (folder / "config.ini").read_text(encoding="utf-8")
        (folder / MANIFEST).unlink()
        (folder / "config.ini").write_text(text.replace(old, new), encoding="utf-8")

    damages: dict[str, Callable[[Path], object]] = {
        rf"{name} has 8188 bytes, but 8192 are \(32, 64\) of fp32": truncate,
        f"{name} is missing": lambda folder: (folder / name).unlink(),
        "extra.bin belongs to no weight": lambda folder: (folder / "model.extra.bin").write_bytes(b""),
        "lacks 'head_num'": lambda folder: edit_ini(folder, "head_num=8\n", ""),
        r"FasterTransformer's config\.ini: head_num in \[gpt\] is 'eight', not a whole number": lambda folder: edit_ini(
            folder, "head_num=8", "head_num=eight"
        ),
        "differs from manifest": lambda folder: (folder / "config.ini").write_text(
            (folder / "config.ini").read_text().replace("end_id=2", "end_id=3")
        ),
        "not a manifest": lambda folder: (folder / MANIFEST).write_text("{}"),
    }
    for message, damage in damages.items():
        folder = copy_of(ft)
        damage(folder)
        with pytest.raises(CheckpointError, match=message):
            open_checkpoint(folder)
    folder = copy_of(ft)
    edit_ini(folder, "use_attention_linear_bias=True", "use_attention_linear_bias=False")
    with pytest.raises(UnsupportedError, match="has_positional_encoding is False, but True in every GPT-2"):
        open_checkpoint(folder)
    for key, old, new in (
        ("has_positional_encoding", "False", "True"),
        ("has_pre_decoder_layernorm", "True", "False"),
        ("has_post_decoder_layernorm", "True", "False"),
        ("activation_type", "Gelu", "Relu"),
    ):
        folder = copy_of(ft)
        edit_ini(folder, f"{key}={old}", f"{key}={new}")
        with pytest.raises(UnsupportedError, match=rf"{key} is {new}, but {old} in every BLOOM"):
            open_checkpoint(folder)
    folder = copy_of(ft)
    edit_ini(folder, "layernorm_type=pre_layernorm", "layernorm_type=deep_norm")
    with pytest.raises(UnsupportedError, match="layernorm_type 'deep_norm' is not one of pre_layernorm, post_layernor"):
        open_checkpoint(folder)
    folder = copy_of(ft)
    edit_ini(folder, "end_id=2", "end_id=2\nint8_scale=0.5")
    open_checkpoint(folder)
    assert "ignored, since hasten does not know what they change: int8_scale" in caplog.text
    folder = copy_of(ft.parent) / "2-gpu"
    edit_ini(folder, "layernorm_type=pre", "layernorm_type=post")
    with pytest.raises(CheckpointError, match="differ in residual_after_norm"):
        open_checkpoint(folder)
    (copy_of(ft) / "notes.bin").write_bytes(b"a stray file")
    open_checkpoint(folder.parents[1] / str(int(folder.parents[0].name) + 1))


def test_damaged_rank_files(tiny_bloom: Path, copy_of: Copy, tmp_path: Path) -> None:
    ranked = converted(tiny_bloom, tmp_path / "out", 2, "safetensors")
    folder = copy_of(ranked)
    (folder / "rank-00001-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"rank-00001-of-00002\.safetensors is missing"):
        open_checkpoint(folder)
    folder = copy_of(ranked)
    file = folder / "rank-00001-of-00002.safetensors"
    file.write_bytes(file.read_bytes()[:-8])
    checkpoint = open_checkpoint(folder, 2)
    with pytest.raises(ChecksumError, match="bytes, manifest"):
        dict(rank_tensors(checkpoint, 1, 2, torch.float32))
    checkpoint = open_checkpoint(folder, 2, verify=False)
    with pytest.raises(CheckpointError, match="truncated or damaged"):
        dict(rank_tensors(checkpoint, 1, 2, torch.float32))


def test_end_tokens_of_the_generation_config_win(
    tiny_bloom: Path, copy_of: Copy, edit_config: Callable[..., None], tmp_path: Path
) -> None:
    folder = copy_of(tiny_bloom)
    for given, expected in (([2, 7], (2, 7)), (5, (5,)), (None, (2,))):
        edit_config(folder, "generation_config.json", eos_token_id=given)
        assert open_checkpoint(folder).config.eos_token_ids == expected
    edit_config(folder, "generation_config.json", eos_token_id=[2, 7])
    for output_format in FORMATS:
        rank_folder = converted(folder, tmp_path / output_format, 1, output_format)
        assert open_checkpoint(rank_folder).config.eos_token_ids == (2, 7)
    assert "end_id=2\n" in (tmp_path / "fastertransformer" / "1-gpu" / "config.ini").read_text(encoding="utf-8")
    alone = rank_folder.rename(tmp_path / "1-gpu")
    assert open_checkpoint(alone).config.eos_token_ids == (2, 7)


@pytest.mark.parametrize("output_format", FORMATS)
def test_tokens_outside_the_vocabulary_are_ignored_by_name(
    output_format: Format,
    tiny_bloom: Path,
    copy_of: Copy,
    edit_config: Callable[..., None],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    vocab = open_checkpoint(tiny_bloom).config.vocab_size
    folder = copy_of(tiny_bloom)
    edit_config(folder, eos_token_id=[vocab, 2, -1], bos_token_id=vocab, pad_token_id=-1)
    (folder / "generation_config.json").unlink()

    def tokens(path: Path) -> tuple[object, ...]:
        config = open_checkpoint(path).config
        return config.bos_token_id, config.eos_token_ids, config.pad_token_id

    assert tokens(folder) == (None, (2,), None)
    assert [record.getMessage().partition(": ")[2] for record in caplog.records] == [
        f"{name} {ids} is not in the vocabulary of {vocab} tokens; it is ignored"
        for name, ids in (("bos_token_id", [vocab]), ("eos_token_id", [vocab, -1]), ("pad_token_id", [-1]))
    ]
    assert tokens(converted(folder, tmp_path / "out", 1, output_format)) == (None, (2,), None)
    edit_config(folder, eos_token_id=2)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [vocab, 7]}), encoding="utf-8")
    assert tokens(folder)[1] == (7,)
    # transformers takes the end tokens of generation_config.json alone, and none of these can come
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": vocab}), encoding="utf-8")
    assert tokens(folder)[1] == ()
    assert tokens(converted(folder, tmp_path / "none", 1, output_format))[1] == ()
    for wrong in (True, "</s>", [2.0]):
        edit_config(folder, "generation_config.json", eos_token_id=wrong)
        with pytest.raises(CheckpointError, match="is not a token id or a list of them"):
            open_checkpoint(folder)


def test_a_config_ini_of_faster_transformer_with_tokens_outside_the_vocabulary(
    tiny_bloom: Path, tmp_path: Path
) -> None:
    folder = converted(tiny_bloom, tmp_path / "out", 1, "fastertransformer").rename(tmp_path / "1-gpu")
    (folder / MANIFEST).unlink()
    ini = folder / "config.ini"
    text = ini.read_text(encoding="utf-8")
    ini.write_text(text.replace("end_id=2", "end_id=-1").replace("start_id=1", "start_id=99999"), encoding="utf-8")
    config = open_checkpoint(folder).config
    assert (config.bos_token_id, config.eos_token_ids) == (None, ())


def test_settings_of_a_generation_config_that_are_not_applied_are_named(
    tiny_bloom: Path, copy_of: Copy, edit_config: Callable[..., None], caplog: pytest.LogCaptureFixture
) -> None:
    folder = copy_of(tiny_bloom)
    edit_config(folder, "generation_config.json", suppress_tokens=[5], repetition_penalty=1.2, new_setting=1)
    open_checkpoint(folder)
    assert [record.getMessage().partition(".json: ")[2] for record in caplog.records] == [
        "not applied, since every request brings its own settings: repetition_penalty, suppress_tokens",
        "ignored, since hasten does not know what they change: new_setting",
    ]


@pytest.mark.parametrize("said", [{}, {"dtype": "auto"}, {"torch_dtype": "auto"}])
def test_the_type_is_the_weights_own_where_config_json_leaves_it_open(
    said: dict[str, str], tiny_bloom: Path, resaved: Copy, edit_config: Callable[..., None]
) -> None:
    def halve(state: State) -> None:
        state.update({name: tensor.half() for name, tensor in state.items()})

    folder = resaved(tiny_bloom, halve)
    edit_config(folder, **({"dtype": None, "torch_dtype": None} | said))
    assert open_checkpoint(folder).config.dtype == "fp16"


def test_what_is_no_checkpoint_says_what_is_read(tiny_bloom: Path, copy_of: Copy, tmp_path: Path) -> None:
    gguf = tmp_path / "bloom.Q4_0.gguf"
    gguf.write_bytes(b"GGUF")
    for path in (gguf, tmp_path):
        with pytest.raises(CheckpointError, match=r"bloom\.Q4_0\.gguf: GGUF is not supported; give a folder with conf"):
            open_checkpoint(path)
    with pytest.raises(CheckpointError, match=r"model\.safetensors has weights alone; give its folder, which must als"):
        open_checkpoint(tiny_bloom / "model.safetensors")
    with pytest.raises(CheckpointError, match="is a file; give the folder of a checkpoint"):
        open_checkpoint(tiny_bloom / "tokenizer.json")
    folder = copy_of(tiny_bloom)
    (folder / "adapter_config.json").write_text("{}", encoding="utf-8")
    with pytest.raises(UnsupportedError, match=r"adapter_config\.json: adapters are not supported; merge it"):
        open_checkpoint(folder)


def test_dummy_weights_are_the_same_for_every_rank_count(tiny_bloom_12_heads: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((tiny_bloom_12_heads / "config.json").read_bytes())
    with pytest.raises(CheckpointError, match="has no weights"):
        open_checkpoint(tmp_path)
    checkpoint = open_checkpoint(tmp_path, dummy=torch.device("cpu"))
    whole = loaded(checkpoint, 1)
    assert_same(loaded(checkpoint, 4), whole)
    assert_same(loaded(open_checkpoint(tmp_path, dummy=torch.device("cpu")), 3), whole)
    assert whole["layers.0.mlp.up.weight"].std().item() == pytest.approx(0.02, rel=0.05)
    assert not torch.equal(whole["layers.0.mlp.up.weight"], whole["layers.1.mlp.up.weight"])
    assert torch.equal(whole["final_norm.weight"], torch.ones(96))
    assert not whole["layers.2.attention.qkv.bias"].any()


def test_a_size_that_does_not_divide(tiny_bloom: Path) -> None:
    with pytest.raises(ConfigError, match="does not divide attention heads"):
        next(rank_tensors(open_checkpoint(tiny_bloom), 0, 3, torch.float32))


def test_old_names_in_config_json(tiny_bloom: Path, copy_of: Copy, edit_config: Callable[..., None]) -> None:
    expected: ModelConfig = open_checkpoint(tiny_bloom).config
    folder = copy_of(tiny_bloom)
    edit_config(folder, n_embed=64, hidden_size=None, num_attention_heads=8, n_head=None, architectures=None)
    assert open_checkpoint(folder).config == expected
