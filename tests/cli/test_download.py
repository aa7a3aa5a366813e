"""Commands that name a model by its Hugging Face id, against a hub that runs here."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tests.checkpoint.hub_site import HubSite, files_of, hub_site
from tests.waiting import LIMIT_S

pytestmark = pytest.mark.any_python

ID = "org/tiny-bloom"
Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def site(tiny_bloom: Path) -> Iterator[HubSite]:
    with hub_site() as site:
        site.put(ID, files_of(tiny_bloom) | {"README.md": b"#"})
        yield site


@pytest.fixture
def hasten(site: HubSite, tmp_path: Path) -> Run:
    """`hasten` in a process with this hub and an empty cache."""

    def run(*argv: str, **variables: str) -> "subprocess.CompletedProcess[str]":
        environment = site.environment(tmp_path / "home", OMP_NUM_THREADS="1", **variables)
        command = [sys.executable, "-m", "hasten", *argv]
        return subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=LIMIT_S)

    return run


def test_download_prints_the_folder(hasten: Run, site: HubSite, tiny_bloom: Path, tmp_path: Path) -> None:
    done = hasten("download", ID)
    assert done.returncode == 0, done.stderr
    assert files_of(Path(done.stdout.removesuffix("\n"))) == files_of(tiny_bloom)
    assert done.stderr == ""
    assert hasten("download", ID, "--output-dir", "here", "--revision", "main").stdout == "here\n"
    assert files_of(tmp_path / "here") == files_of(tiny_bloom)
    for arguments, message in (
        (("org/none",), "hasten: error: org/none is neither a folder here nor a model at http://127.0.0.1:"),
        ((ID, "--revision", "v2"), f"hasten: error: {ID} has no revision 'v2' at http://127.0.0.1:"),
    ):
        failed = hasten("download", *arguments)
        assert (failed.returncode, failed.stdout) == (2, "")
        assert failed.stderr.startswith(message)
        assert failed.stderr.count("\n") == 1


def test_a_wrong_variable_of_the_hub_is_named(hasten: Run) -> None:
    failed = hasten("download", ID, HF_HUB_ETAG_TIMEOUT="soon")
    assert (failed.returncode, failed.stdout) == (2, "")
    assert "huggingface_hub cannot be imported (invalid literal for int() with base 10: 'soon')" in failed.stderr
    assert failed.stderr.endswith("is a variable of the environment that begins with HF_ wrong?\n")


def test_one_rank_downloads_for_all(hasten: Run, site: HubSite, tiny_bloom: Path) -> None:
    command = ("--prompt", "Anna walked", "--max-new-tokens", "4", "--json", "--kv-cache-memory", "4000000")
    done = hasten("generate", ID, *command, "--tensor-para-size", "2")
    assert done.returncode == 0, done.stderr
    assert site.downloaded == sorted(set(site.downloaded))
    assert "model.safetensors" in site.downloaded
    site.requests.clear()
    for model in (ID, str(tiny_bloom)):  # by now from the cache
        assert json.loads(hasten("generate", model, *command).stdout) == json.loads(done.stdout)
    assert not site.requests


def test_other_commands_take_an_id(hasten: Run, site: HubSite, tmp_path: Path) -> None:
    converted = hasten("convert", "-i", ID, "-o", "out")
    assert converted.returncode == 0, converted.stderr
    assert f"model_name={ID}\n" in (tmp_path / "out" / "1-gpu" / "config.ini").read_text()
    created = hasten("repository", "create", f"{ID}@main", "models", "--tokenizer-path", ID)
    assert created.returncode == 0, created.stderr
    assert (tmp_path / "models" / "tiny-bloom" / "config.pbtxt").is_file()
    text = (tmp_path / "models" / "fastertransformer" / "config.pbtxt").read_text()
    snapshot = next((tmp_path / "home" / "hub" / "models--org--tiny-bloom" / "snapshots").iterdir())
    assert text.count(str(snapshot)) == 2
    assert "model_name=tiny-bloom\n" in (tmp_path / "models" / "fastertransformer" / "1" / "config.ini").read_text()
