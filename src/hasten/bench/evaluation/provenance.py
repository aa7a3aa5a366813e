"""Provenance of a report: hashes of the weights, versions, the machine, the command."""

import hashlib
import platform
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from hasten.bench.power import GpuState, gpu_states
from hasten.bench.report import Environment
from hasten.checkpoint.manifest import MANIFEST
from hasten.core.cpus import available_cpus
from hasten.core.files import reading

_SUFFIXES = frozenset({".safetensors", ".bin", ".json", ".model", ".txt", ".ini", ".jinja"})
_OF_A_MANIFEST = frozenset({MANIFEST, "config.json", "tokenizer.json"})
"""Files that are hashed where a manifest lists the hashes of the others, which loading compares."""
_PACKAGES = (
    *("hasten", "torch", "transformers", "tokenizers", "safetensors", "numpy", "triton", "vllm", "ctranslate2"),
    *("tritonclient", "uvicorn"),
)
_READ = 1 << 20


@dataclass(frozen=True)
class FileHash:
    """A file of a checkpoint."""

    name: str
    nbytes: int
    sha256: str


@dataclass(frozen=True)
class Provenance:
    """What makes a report repeatable."""

    command: str
    date: str
    """Of the report, in UTC."""
    model_sha256: str
    """Of the names and hashes of all files."""
    files: list[FileHash]
    packages: dict[str, str]
    """Installed versions."""
    system: str
    processor: str
    cpus: int
    """That the process may use."""
    gpus: list[GpuState]
    environment: Environment | None = None


def file_hashes(folder: Path) -> list[FileHash]:
    """Names, sizes and SHA-256 of a checkpoint's files; of those that a manifest lists, the manifest's alone.

    ConfigError where a file cannot be read.
    """
    files = sorted(_files(folder))
    with reading(f"the files of {folder}"), ThreadPoolExecutor(available_cpus()) as pool:
        digests = list(pool.map(_sha256, files))
        sizes = [file.stat().st_size for file in files]
    names = [file.relative_to(folder).as_posix() for file in files]
    return [FileHash(*entry) for entry in zip(names, sizes, digests, strict=True)]


def model_sha256(files: Sequence[FileHash]) -> str:
    """A hash of all files by their names and hashes."""
    return hashlib.sha256("".join(f"{file.sha256}  {file.name}\n" for file in files).encode()).hexdigest()


def _files(folder: Path) -> Iterator[Path]:
    for file in folder.rglob("*"):
        listed = (file.parent / MANIFEST).is_file() and file.name not in _OF_A_MANIFEST
        hidden = any(part.startswith(".") for part in file.relative_to(folder).parts)
        if file.suffix in _SUFFIXES and file.is_file() and not listed and not hidden:
            yield file


def _sha256(file: Path) -> str:
    hasher = hashlib.sha256()
    with file.open("rb") as stream:
        while data := stream.read(_READ):
            hasher.update(data)
    return hasher.hexdigest()


def provenance(command: str, date: str, files: list[FileHash], gpus: Sequence[str]) -> Provenance:
    """What is known before anything is measured; `gpus` are ids that nvidia-smi knows."""
    return Provenance(
        command=command,
        date=date,
        model_sha256=model_sha256(files),
        files=files,
        packages=dict(_versions()),
        system=platform.platform(),
        processor=_processor(),
        cpus=available_cpus(),
        gpus=gpu_states(gpus),
    )


def _versions() -> Iterator[tuple[str, str]]:
    yield "python", platform.python_version()
    for package in _PACKAGES:
        try:
            yield package, version(package)
        except PackageNotFoundError:
            continue


def _processor() -> str:
    """The CPU's name, as Linux knows it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())
