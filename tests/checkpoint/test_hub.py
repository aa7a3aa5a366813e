"""Names of models, against a hub that runs here.

Names of the hub are looked up in other processes: huggingface_hub reads its environment once.
"""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tests.checkpoint.hub_site import HubSite, files_of, hub_site
from tests.waiting import LIMIT_S

from hasten.checkpoint.hub import model_name, resolve_model
from hasten.core.errors import CheckpointError, ConfigError

ID = "org/tiny-bloom"
NEEDED = ["config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
NOT_NEEDED = {"README.md": b"#", "pytorch_model.bin": b"x" * 100, "flax_model.msgpack": b"x", "onnx/model.onnx": b"x"}
Run = Callable[..., list[str]]


@pytest.fixture
def site() -> Iterator[HubSite]:
    with hub_site() as site:
        yield site


@pytest.fixture
def run(site: HubSite, tmp_path: Path) -> Run:
    """Evaluate expressions in one process; each gives the text of its value, or of the error that hasten raised."""

    def run(*expressions: str, **environment: str) -> list[str]:
        script = """
import sys
from hasten.checkpoint.hub import download_model, model_name, resolve_model
from hasten.core.errors import HastenError
for expression in sys.argv[1:]:
    try:
        print(eval(expression))
    except HastenError as error:
        print(f"{type(error).__name__}: {error}")
"""
        done = subprocess.run(
            [sys.executable, "-c", script, *expressions],
            env=site.environment(tmp_path / "home", **environment),
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=LIMIT_S,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()

    return run


def cache(tmp_path: Path, model: str = ID) -> Path:
    return tmp_path / "home" / "hub" / f"models--{model.replace('/', '--')}"


def test_what_is_needed_is_downloaded_once(site: HubSite, run: Run, tiny_bloom: Path, tmp_path: Path) -> None:
    commit = site.put(ID, files_of(tiny_bloom) | NOT_NEEDED)
    [found] = run(f"resolve_model({ID!r})")
    folder = cache(tmp_path) / "snapshots" / commit
    assert found == str(folder)
    assert sorted(path.name for path in folder.iterdir()) == site.downloaded == NEEDED
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == files_of(tiny_bloom)
    site.requests.clear()
    assert run(f"resolve_model({ID!r})", f"resolve_model('{ID}@main')") == [found, found]
    assert run(f"resolve_model({ID!r})", HF_HUB_OFFLINE="1") == [found]
    assert not site.requests


def test_bin_files_are_downloaded_where_there_is_no_other_kind(site: HubSite, run: Run, tiny_bloom: Path) -> None:
    files = {name: data for name, data in files_of(tiny_bloom).items() if "safetensors" not in name}
    index = json.dumps({"weight_map": {"a": "pytorch_model-00001-of-00002.bin"}}).encode()
    weights = {"pytorch_model-00001-of-00002.bin": b"1", "pytorch_model.bin.index.json": index}
    site.put(ID, files | weights | {"training_args.bin": b"x"})
    run(f"resolve_model({ID!r})")
    assert set(site.downloaded) == set(files) | set(weights)


def test_revisions(site: HubSite, run: Run, tiny_bloom: Path, tmp_path: Path) -> None:
    files = files_of(tiny_bloom)
    main, other = site.put(ID, files), site.put(ID, files | {"tokenizer_config.json": b"{}"}, "refs/pr/1")
    snapshots = cache(tmp_path) / "snapshots"
    assert run(
        f"resolve_model('{ID}@refs/pr/1')",
        f"resolve_model({ID!r}, revision='refs/pr/1')",
        f"resolve_model({ID!r}, revision={main!r})",
        f"resolve_model({ID!r})",
    ) == [str(snapshots / commit) for commit in (other, other, main, main)]
    [both, unknown] = run(f"resolve_model('{ID}@main', revision='x')", f"resolve_model('{ID}@v2')")
    assert both == f"ConfigError: {ID}@main and revision 'x' both name a revision; give one"
    assert unknown == f"CheckpointError: {ID} has no revision 'v2' at {site.url}"


def test_the_cache_is_used_as_it_is_and_download_brings_the_newest(
    site: HubSite, run: Run, tiny_bloom: Path, tmp_path: Path
) -> None:
    files = files_of(tiny_bloom)
    old = site.put(ID, files)
    run(f"resolve_model({ID!r})")
    new = site.put(ID, files | {"tokenizer_config.json": b"{}"})
    site.requests.clear()
    snapshots = cache(tmp_path) / "snapshots"
    calls = (f"resolve_model({ID!r})", f"download_model({ID!r})", f"resolve_model({ID!r})")
    assert run(*calls) == [str(snapshots / commit) for commit in (old, new, new)]
    assert site.downloaded == ["tokenizer_config.json"]


def test_a_download_that_was_cut_off_is_completed(site: HubSite, run: Run, tiny_bloom: Path, tmp_path: Path) -> None:
    shards = {f"model-0000{number}-of-00002.safetensors": bytes([number]) for number in (1, 2)}
    index = {"model.safetensors.index.json": json.dumps({"weight_map": dict(zip("ab", shards, strict=True))}).encode()}
    files = {name: data for name, data in files_of(tiny_bloom).items() if name != "model.safetensors"}
    commit = site.put(ID, files | shards | index)
    folder = cache(tmp_path) / "snapshots" / commit
    [found] = run(f"resolve_model({ID!r})")
    for missing in ("model-00002-of-00002.safetensors", "config.json", "tokenizer.json"):
        (folder / missing).unlink()
        [offline] = run(f"resolve_model({ID!r})", HF_HUB_OFFLINE="1")
        if missing == "tokenizer.json":  # a model does without one
            assert offline == found
        else:
            assert offline.startswith(
                f"CheckpointError: {ID} at revision main is not complete in the Hugging Face cache"
            )
            assert f"HF_HUB_OFFLINE is set: unset it, or run `hasten download {ID}`" in offline
        assert run(f"resolve_model({ID!r})") == [found]
        assert (folder / missing).is_file()


def test_nothing_is_downloaded_where_the_hub_is_not_to_be_asked(site: HubSite, run: Run) -> None:
    [offline] = run(f"download_model({ID!r})", HF_HUB_OFFLINE="1")
    assert offline == f"CheckpointError: {ID} cannot be downloaded while HF_HUB_OFFLINE is set; unset it"
    assert site.downloaded == []


def test_a_tokenizer_or_a_configuration_is_had_without_weights(site: HubSite, run: Run, tiny_bloom: Path) -> None:
    site.put(ID, files_of(tiny_bloom))
    [config, tokenizer] = run(f"resolve_model({ID!r}, part='config')", f"resolve_model({ID!r}, part='tokenizer')")
    assert config == tokenizer
    assert site.downloaded == [name for name in NEEDED if name != "model.safetensors"]


def test_other_caches_and_folders(site: HubSite, run: Run, tiny_bloom: Path, tmp_path: Path) -> None:
    commit = site.put(ID, files_of(tiny_bloom))
    found = run(f"resolve_model({ID!r}, download_dir='own')", f"download_model({ID!r}, output_dir='flat')")
    assert found == [f"own/models--org--tiny-bloom/snapshots/{commit}", "flat"]
    assert files_of(tmp_path / "flat") == files_of(tiny_bloom)
    assert not cache(tmp_path).exists()
    (tmp_path / "file").write_text("in the way")
    [error] = run(f"resolve_model({ID!r}, download_dir='file')")
    assert error.startswith("CheckpointError: cannot write ")
    assert error.endswith("; choose another cache with HF_HOME or download_dir")


def test_what_cannot_be_had_is_one_line_that_says_what_to_do(site: HubSite, run: Run, tiny_bloom: Path) -> None:
    files = files_of(tiny_bloom)
    site.put("org/gated", files)
    site.gated.add("org/gated")
    site.put("org/gguf", {"model.Q4_0.gguf": b"GGUF"})
    site.put("org/no-weights", {"config.json": files["config.json"], "model.onnx": b"x"})
    xglm = json.dumps({"architectures": ["XGLMForCausalLM"], "model_type": "xglm"}).encode()
    site.put("org/xglm", files | {"config.json": xglm})
    bits = json.loads(files["config.json"]) | {"quantization_config": {"quant_method": "bitsandbytes"}}
    site.put("org/bits", files | {"config.json": json.dumps(bits).encode()})
    expected = {
        "org/bits": "UnsupportedError: org/bits: quantization_config (bitsandbytes): quantized weights of this kind",
        "org/nothing": f"CheckpointError: org/nothing is neither a folder here nor a model at {site.url}; chec",
        "org/gated": f"CheckpointError: org/gated is gated: accept its conditions at {site.url}/org/gated, and log in",
        "org/gguf": "CheckpointError: org/gguf has no config.json, so it is not a model of transformers; GGUF is",
        "org/no-weights": "CheckpointError: org/no-weights has no weights that hasten reads, model*.safetensors or",
        "org/xglm": "UnsupportedError: org/xglm: architecture 'XGLMForCausalLM' is not supported; supp",
        "org/a--b": "ConfigError: org/a--b is neither a folder here nor a Hugging Face id:",
        "no/such/path": "CheckpointError: there is no folder no/such/path; give the folder of a checkpoint, or a H",
        "bloom-560m": "CheckpointError: there is no folder bloom-560m; give the folder of a checkpoint, or a Hugging",
        "./org/x": "CheckpointError: there is no folder org/x;",
        "home/x": "CheckpointError: there is no folder home/x;",
    }
    run("resolve_model('org/gguf')")  # makes `home`
    found = run(*(f"resolve_model({name!r})" for name in expected))
    assert len(found) == len(expected)
    for line, start in zip(found, expected.values(), strict=True):
        assert line.startswith(start)
    assert not {"model.safetensors"} & set(site.downloaded)
    [folder] = run("download_model('home')")
    assert folder == "ConfigError: 'home' is not a Hugging Face id, OWNER/NAME or OWNER/NAME@REVISION, such as " + (
        "bigscience/bloom-560m"
    )


def test_a_hub_that_does_not_answer_ends_in_time(site: HubSite, run: Run) -> None:
    site.silent.set()
    [silent] = run(f"resolve_model({ID!r})", HF_HUB_ETAG_TIMEOUT="1")
    [closed] = run(f"resolve_model({ID!r})", HF_ENDPOINT="http://127.0.0.1:9")
    for line, where in ((silent, site.url), (closed, "http://127.0.0.1:9")):
        assert line.startswith(f"CheckpointError: {ID} is no folder here, and {where} cannot be reached (")
        assert line.endswith("): check the network and the proxy, or give a folder")


def test_a_repository_in_a_cache_is_its_snapshot(tiny_bloom: Path, tmp_path: Path) -> None:
    storage = tmp_path / "models--org--tiny-bloom"
    snapshot = storage / "snapshots" / ("0" * 40)
    shutil.copytree(tiny_bloom, snapshot)
    (storage / "refs").mkdir()
    (storage / "refs" / "main").write_text("0" * 40)
    assert resolve_model(storage) == resolve_model(storage, revision="0" * 40) == snapshot
    assert resolve_model(snapshot) == snapshot
    with pytest.raises(CheckpointError, match=r"has no snapshot of revision 'v2'; its revisions are: main"):
        resolve_model(storage, revision="v2")
    with pytest.raises(ConfigError, match=r"revision 'v2' is of a Hugging Face id, but .* is a folder here"):
        resolve_model(tiny_bloom, revision="v2")
    for path in (storage, snapshot, "org/tiny-bloom", "org/tiny-bloom@v2"):
        assert model_name(path) == "tiny-bloom"


def test_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model" / "2-gpu").mkdir(parents=True)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve_model("~/model") == tmp_path / "model"
    assert model_name("~/model/2-gpu") == model_name(tmp_path / "model") == "model"
    with pytest.raises(CheckpointError, match=r"there is no folder .*; give the folder"):
        resolve_model("~/other")
    monkeypatch.chdir(tmp_path / "model")
    assert resolve_model(".") == Path()
    assert model_name(".") == "model"
