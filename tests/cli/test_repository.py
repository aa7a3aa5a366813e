from pathlib import Path

import pytest

from hasten.cli.main import BAD_INPUT, main
from hasten.server.repository import FolderRepository

DEMO = Path(__file__).parents[2] / "examples" / "demo-model"


def create(*argv: str) -> int:
    return main(["repository", "create", *argv])


def test_a_repository_for_a_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "model_repo"
    options = ("--decoupled", "--data-type", "fp16", "--tensor-para-size", "2", "--max-model-len", "64")
    assert create(str(DEMO), str(target), "--text-name", "story", *options) == 0
    names = ("fastertransformer", "preprocessing", "postprocessing", "ensemble", "story")
    assert capsys.readouterr().out.splitlines() == [str(target / name) for name in names]
    repository = FolderRepository([target])
    assert repository.names() == sorted(names)
    token = repository.describe("fastertransformer")
    assert token is not None
    engine = token.engine_config(1)
    assert (engine.model, engine.dtype, engine.scheduler.max_model_len) == (str(DEMO), "fp16", 64)
    assert engine.parallel.tensor_parallel_size == 2
    ini = (target / "fastertransformer" / "1" / "config.ini").read_text()
    assert "tensor_para_size=2\nweight_data_type=fp16\n" in ini
    text = (target / "fastertransformer" / "config.pbtxt").read_text()
    for expected in ('backend: "fastertransformer"', "decoupled: true", 'name: "input_ids"', 'string_value: "fp16"'):
        assert expected in text


def test_paths_do_not_depend_on_where_the_server_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(DEMO.parent)
    assert create("demo-model", str(tmp_path / "r"), "--tokenizer-path", "demo-model", "--name", "token") == 0
    monkeypatch.chdir(tmp_path)
    token = FolderRepository(["r"]).describe("token")
    assert token is not None
    engine = token.engine_config(1)
    assert (engine.model, engine.tokenizer) == (str(DEMO), str(DEMO))


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("nothing", "r"), "nothing"),
        ((str(DEMO), "r", "--tensor-para-size", "3"), "tensor parallel size 3 does not divide attention heads (4)"),
        ((str(DEMO), "r", "--name", "a/b"), "a model cannot be called 'a/b'"),
        ((str(DEMO), "r", "--data-type", "int8"), "data type 'int8' is not known"),
        ((str(DEMO),), "the following arguments are required: DIR"),
        ((str(DEMO), "r", "--for", "triton", "--text-name", "t"), "--text-name has no meaning with --for triton"),
        ((str(DEMO), "r", "--for", "torchserve"), "invalid choice: 'torchserve'"),
        ((), "the following arguments are required: MODEL, DIR"),
    ],
)
def test_what_cannot_be_made(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    argv: tuple[str, ...],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert create(*argv) == BAD_INPUT
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_what_is_there_stays(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert create(str(DEMO), str(tmp_path)) == 0
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert create(str(DEMO), str(tmp_path), "--max-model-len", "9") == BAD_INPUT
    assert f"{tmp_path / 'fastertransformer'} exists; give another folder" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_a_repository_for_triton(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert create(str(DEMO), str(tmp_path), "--for", "triton", "--name", "token", "--max-model-len", "64") == 0
    folder = tmp_path / "token"
    assert capsys.readouterr().out == f"{folder}\n"
    assert (folder / "1" / "model.py").is_file()
    text = (folder / "config.pbtxt").read_text()
    for expected in ('backend: "python"', f'string_value: "{DEMO}"', 'key: "max_model_len"'):
        assert expected in text
    assert create(str(DEMO), str(tmp_path), "--for", "triton", "--name", "token") == BAD_INPUT
