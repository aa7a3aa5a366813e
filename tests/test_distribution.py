"""What a package of hasten has in it: the wheel what its users run, the source distribution what its tests read."""

import os
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = (".ci", "docs", "examples", "src", "tests")
FILES = (
    *(".dockerignore", "CHANGELOG.md", "CONTRIBUTING.md", "Dockerfile", "LICENSE", "Makefile", "README.md"),
    *("constraints.txt", "pyproject.toml"),
)
DEMO = {"client.py": "client.py", "demo-model": "model", "stories/test.jsonl": "test.jsonl"}
"""Below examples/ -> below hasten/demo/."""


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with both."""
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "sdist", "-t", "wheel", "-d", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    return folder


@pytest.fixture(scope="module")
def installed(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel's files."""
    folder = tmp_path_factory.mktemp("installed")
    (wheel,) = built.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


def sources() -> Iterator[str]:
    """Files of the repository that a source distribution must have."""
    for folder in FOLDERS:
        for path in (ROOT / folder).rglob("*"):
            if path.is_file() and "__pycache__" not in path.parts:
                yield str(path.relative_to(ROOT))
    yield from FILES


def test_the_source_distribution_has_all_that_its_tests_read(built: Path) -> None:
    (archive,) = built.glob("*.tar.gz")
    with tarfile.open(archive) as files:
        found = {name.partition("/")[2] for name in files.getnames()}
    assert set(sources()) <= found
    assert not any("__pycache__" in name or name.startswith(("build", ".venv")) for name in found)


def test_the_wheel_has_the_package_and_the_demo(installed: Path) -> None:
    package = installed / "hasten"
    for path in (ROOT / "src" / "hasten").rglob("*"):
        if path.is_file() and "__pycache__" not in path.parts:
            assert (package / path.relative_to(ROOT / "src" / "hasten")).is_file()
    for source, target in DEMO.items():
        original = ROOT / "examples" / source
        files = [original] if original.is_file() else sorted(original.iterdir())
        for file in files:
            copy = package / "demo" / target / file.name if original.is_dir() else package / "demo" / target
            assert copy.read_bytes() == file.read_bytes()


def test_the_demo_of_an_installed_package_needs_no_repository(installed: Path, tmp_path: Path) -> None:
    code = (
        "import hasten\n"
        "from hasten.cli import demo\n"
        "print(hasten.__file__, *(demo.demo_file(name) for name in ('model', 'test.jsonl', 'client.py')), sep='\\n')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(installed)},
        capture_output=True,
        text=True,
        check=True,
    )
    package = installed / "hasten"
    names = ("__init__.py", "demo/model", "demo/test.jsonl", "demo/client.py")
    assert done.stdout.splitlines() == [str(package / name) for name in names]
