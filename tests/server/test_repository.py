import os
from collections.abc import Mapping
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hasten.core.config import EngineConfig
from hasten.core.errors import ConfigError
from hasten.server.create import default_text_name, has_tokenizer, model_configs, write_repository
from hasten.server.models.interfaces import Kind
from hasten.server.repository import FolderRepository, MemoryRepository, is_model_name

DEMO = Path(__file__).parents[2] / "examples" / "demo-model"


def make(root: Path, name: str, config: str | None = "", versions: tuple[str, ...] = ("1",)) -> Path:
    for version in versions:
        (root / name / version).mkdir(parents=True, exist_ok=True)
    (root / name).mkdir(exist_ok=True)
    if config is not None:
        (root / name / "config.pbtxt").write_text(config)
    return root / name


def test_models_are_folders(tmp_path: Path) -> None:
    make(tmp_path, "b")
    make(tmp_path, "a", None)
    make(tmp_path, ".hidden")
    (tmp_path / "file").write_text("")
    repository = FolderRepository([tmp_path])
    assert repository.names() == ["a", "b"]
    described = repository.describe("a")
    assert described is not None
    assert (described.name, described.versions, described.kind) == ("a", (1,), Kind.TOKEN)
    assert repository.describe("nope") is None


@pytest.mark.parametrize(
    ("policy", "versions"),
    [
        ("", (10,)),
        ("version_policy { latest { num_versions: 2 } }", (3, 10)),
        ("version_policy { latest { num_versions: 9 } }", (1, 2, 3, 10)),
        ("version_policy { latest { } }", (10,)),
        ("version_policy { all { } }", (1, 2, 3, 10)),
        ("version_policy { specific { versions: [ 3, 1, 7 ] } }", (1, 3)),
    ],
)
def test_version_policies(tmp_path: Path, policy: str, versions: tuple[int, ...]) -> None:
    make(tmp_path, "m", policy, ("1", "2", "3", "10", "0", "04", "x", "-1", "\N{ARABIC-INDIC DIGIT FIVE}"))
    (tmp_path / "m" / "20").write_text("a file is no version")
    described = FolderRepository([tmp_path]).describe("m")
    assert described is not None
    assert described.versions == versions


def test_what_is_wrong_names_file_and_line(tmp_path: Path) -> None:
    path = make(tmp_path, "m", "max_batch_size: 4\nnope: 1") / "config.pbtxt"
    repository = FolderRepository([tmp_path])
    with pytest.raises(ConfigError, match=rf"{path}:2:1 : .*nope"):
        repository.describe("m")
    path.write_bytes(b"\xff")
    with pytest.raises(ConfigError, match=f"{path} cannot be read"):
        repository.describe("m")
    make(tmp_path, "m", 'parameters { key: "int8_mode" value { string_value: "2" } }')
    with pytest.raises(ConfigError, match="'int8_mode' is '2'"):
        repository.describe("m")
    with pytest.raises(ConfigError, match="is not a folder"):
        FolderRepository([tmp_path / "nothing"])
    make(tmp_path, "plain", None)
    with pytest.raises(ConfigError, match="must be there, since configurations are not completed"):
        FolderRepository([tmp_path], auto_complete=False).describe("plain")


def test_a_model_in_two_repositories(tmp_path: Path) -> None:
    make(tmp_path / "one", "m")
    make(tmp_path / "two", "m")
    repository = FolderRepository([tmp_path / "one", tmp_path / "two"])
    assert repository.names() == ["m"]
    with pytest.raises(ConfigError, match=r"model 'm' is in .*one and in .*two; remove one of them"):
        repository.describe("m")


HOSTILE = ["", ".", "..", "/", "../m", "m/../../x", "/etc", "a/b", "a\\b", "m\0", "\0", "x" * 256, "é" * 128]


@pytest.mark.parametrize("name", HOSTILE)
def test_names_cannot_leave_the_repository(tmp_path: Path, name: str) -> None:
    make(tmp_path / "repository", "m")
    make(tmp_path, "x")
    repository = FolderRepository([tmp_path / "repository"])
    assert not is_model_name(name)
    assert repository.describe(name) is None
    assert repository.override(name, "{}", {"file:1/a": b""}) is None
    assert repository.stamp(name) == 0


@given(st.text(max_size=20))
def test_a_name_is_that_of_one_folder(name: str) -> None:
    if is_model_name(name):
        assert Path("root", name).parts == ("root", name)


def test_the_stamp_follows_changes(tmp_path: Path) -> None:
    folder = make(tmp_path, "m")
    repository = FolderRepository([tmp_path])
    before = repository.stamp("m")
    assert before is not None
    assert 0 < before == repository.stamp("m")
    os.utime(folder / "1", ns=(before + 10**9, before + 10**9))
    after = repository.stamp("m")
    assert after is not None
    assert after > before
    assert repository.stamp("nope") == 0


def test_a_configuration_that_is_sent_replaces_the_file(tmp_path: Path) -> None:
    make(tmp_path, "m", "max_batch_size: 4")
    repository = FolderRepository([tmp_path])
    sent = repository.override("m", '{"max_batch_size": 7}', {})
    assert sent is not None
    assert sent.config.max_batch_size == 7
    unsent = repository.override("m", None, {})
    assert unsent is not None
    assert unsent.config.max_batch_size == 4
    assert repository.override("nope", "{}", {}) is None


def test_files_that_are_sent(tmp_path: Path) -> None:
    repository = FolderRepository([tmp_path])
    result = repository.override("fresh", "{}", {"file:2/config.ini": b"[gpt]", "file:2/deep/x.bin": b"12"})
    assert result is not None
    assert result.versions == (2,)
    assert (result.folder / "2" / "config.ini").read_bytes() == b"[gpt]"
    assert (result.folder / "2" / "deep" / "x.bin").read_bytes() == b"12"
    folder = result.folder
    del result
    assert not folder.exists()
    with pytest.raises(ConfigError, match="Load parameter 'config' must be specified for model file override"):
        repository.override("fresh", None, {"file:1/x": b""})


@pytest.mark.parametrize(
    "path", ["../x", "1/../../x", "/etc/x", "", ".", "1/\0", "..", "a/../../../../../../../tmp/hasten-escaped"]
)
def test_files_cannot_leave_the_models_folder(tmp_path: Path, path: str) -> None:
    repository = FolderRepository([tmp_path])
    with pytest.raises(ConfigError, match=r"leads out of the model's folder|cannot be written"):
        repository.override("fresh", "{}", {f"file:{path}": b"x"})
    assert not Path("/tmp/hasten-escaped").exists()
    assert not (tmp_path.parent / "x").exists()


@pytest.mark.parametrize("parameter", ["model_checkpoint_path", "tokenizer_path"])
def test_a_configuration_that_is_sent_leads_nowhere_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, parameter: str
) -> None:
    def sent(path: str) -> str:
        return f'{{"parameters": {{"{parameter}": {{"string_value": "{path}"}}}}}}'

    make(tmp_path / "repository", "m", f'parameters {{ key: "{parameter}" value {{ string_value: "/weights/m" }} }}')
    repository = FolderRepository([tmp_path / "repository"])
    monkeypatch.chdir(tmp_path / "repository")  # what is not absolute begins in the model's folder, not here
    for path in ("/etc", "/weights/other", "..", "../../x", "m/1", f"{tmp_path}/repository/../x"):
        with pytest.raises(ConfigError, match="which is neither in the model repository nor what"):
            repository.override("m", sent(path), {})
    for path in ("/weights/m", f"{tmp_path}/repository/m/1"):
        assert repository.override("m", sent(path), {}) is not None


def test_models_made_in_memory() -> None:
    repository = MemoryRepository(model_configs(EngineConfig.create(str(DEMO), max_num_seqs=7)))
    assert repository.names() == ["demo-model", "ensemble", "fastertransformer", "postprocessing", "preprocessing"]
    described = repository.describe("fastertransformer")
    assert described is not None
    assert described.engine_config(1) == EngineConfig.create(str(DEMO), max_num_seqs=7)
    assert described.config.backend == "fastertransformer"
    assert repository.describe("nope") is None
    assert repository.stamp("ensemble") == 0
    with pytest.raises(ConfigError, match="its configuration cannot be replaced"):
        repository.override("ensemble", "{}", {})


def test_what_is_written_is_what_is_made_in_memory(tmp_path: Path) -> None:
    engine = EngineConfig.create(str(DEMO), max_model_len=99, enable_prefix_caching=False)
    configs = model_configs(engine, text_name="text", decoupled=True)
    write_repository(configs, tmp_path, engine)
    repository = FolderRepository([tmp_path])
    assert repository.names() == sorted(config.name for config in configs)
    for config in configs:
        described = repository.describe(config.name)
        assert described is not None
        assert described.config == config
        assert described.versions == (1,)
    token = repository.describe("fastertransformer")
    assert token is not None
    assert token.engine_config(1) == engine
    assert token.config.model_transaction_policy.decoupled
    ini = (tmp_path / "fastertransformer" / "1" / "config.ini").read_text()
    assert "model_name=demo-model\nnum_layer=4\nhead_num=4\n" in ini
    with pytest.raises(ConfigError, match="exists; give another folder, or move it elsewhere first"):
        write_repository(configs, tmp_path, engine)


@pytest.mark.parametrize(("section", "model_type"), [("gptj", "GPT-J"), ("gptneox", "GPT-NeoX"), ("gpt", "GPT")])
def test_the_backend_of_a_folder_of_faster_transformer(section: str, model_type: str, tmp_path: Path) -> None:
    (tmp_path / "config.ini").write_text(f"[{section}]\nhead_num=4\n", encoding="utf-8")
    (tmp_path / "tokenizer.json").write_text("{}")
    models = {config.name: config for config in model_configs(EngineConfig.create(str(tmp_path), tokenizer="/t"))}
    token, ensemble = models["fastertransformer"], models["ensemble"]
    assert token.parameters["model_type"].string_value == model_type
    before, middle, after = ensemble.ensemble_scheduling.step
    assert set(middle.output_map) <= {tensor.name for tensor in token.output}
    assert set(middle.input_map) <= {tensor.name for tensor in token.input}
    produced = {*before.output_map.values(), *middle.output_map.values()}
    assert set(after.input_map.values()) <= produced
    assert ("RESPONSE_INPUT_LENGTHS" in after.input_map) == (model_type == "GPT")


@pytest.mark.parametrize(("section", "model_type"), [("encoder", "T5"), ("bert", "bert")])
def test_the_backend_of_a_folder_with_an_encoder(section: str, model_type: str, tmp_path: Path) -> None:
    (tmp_path / "config.ini").write_text(f"[{section}]\nnum_layers=4\n", encoding="utf-8")
    (tmp_path / "tokenizer.json").write_text("{}")
    configs = model_configs(EngineConfig.create(str(tmp_path), tokenizer="/t"), text_name="text")
    assert [config.name for config in configs] == ["fastertransformer", "text"]
    assert configs[0].parameters["model_type"].string_value == model_type


def test_names_of_the_models(tmp_path: Path) -> None:
    engine = EngineConfig.create(str(DEMO))
    assert default_text_name("/models/bloom-560m") == "bloom-560m"
    assert default_text_name("/models/bloom-560m-ft/2-gpu/") == "bloom-560m-ft"
    assert default_text_name("/models/ensemble") == "ensemble-text"
    assert default_text_name("/") == "model-text"
    for token, text in (("ensemble", "t"), ("fastertransformer", "fastertransformer"), ("t", "a/b")):
        with pytest.raises(ConfigError, match="a model cannot be called"):
            model_configs(engine, token_name=token, text_name=text)


def test_without_a_tokenizer_there_is_the_token_model_alone(tmp_path: Path) -> None:
    files: Mapping[str, bool] = {"OUT/2-gpu": False, "OUT2/2-gpu": True}
    for name, tokenizer in files.items():
        folder = tmp_path / name
        folder.mkdir(parents=True)
        if tokenizer:
            (folder.parent / "tokenizer.json").write_text("{}")
        engine = EngineConfig.create(str(folder))
        assert has_tokenizer(engine) == tokenizer
        assert len(model_configs(engine)) == (5 if tokenizer else 1)
    assert has_tokenizer(EngineConfig.create(str(tmp_path / "OUT" / "2-gpu"), tokenizer="/t"))
