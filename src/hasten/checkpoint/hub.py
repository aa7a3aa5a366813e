"""Models by the name that a user gives: a folder, a folder of the Hugging Face cache, or an id on the Hugging Face hub.

An id is looked up in the cache first and downloaded only where it is not there. huggingface_hub is imported for ids
alone, and torch never.
"""

import logging
import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from hasten.checkpoint.hub_download import HubModel, download, readable_errors, storage_of
from hasten.checkpoint.model_files import Part, has_part
from hasten.core.config import EngineConfig
from hasten.core.errors import CheckpointError, ConfigError
from hasten.core.files import expand_home

_log = logging.getLogger(__name__)

_EXAMPLE = "bigscience/bloom-560m"
_ID = re.compile(r"(?P<id>\w[\w.-]*/\w[\w.-]*)(@(?P<revision>[^@]+))?", re.ASCII)
_CACHED = re.compile(r"models--(?P<owner>.+?)--(?P<name>.+)")
_RANK_FOLDER = re.compile(r"\d+-gpu")


def resolve_model(
    name: str | os.PathLike[str],
    *,
    part: Part = "model",
    revision: str | None = None,
    download_dir: str | os.PathLike[str] | None = None,
    show_progress: bool = True,
) -> Path:
    """The path of what a user names as a model or a tokenizer, downloaded if need be.

    A path stays as it is, with `~` expanded; `models--OWNER--NAME` of a Hugging Face cache becomes its snapshot.
    Anything else is OWNER/NAME[@REVISION] on the hub. `download_dir` is the cache to use instead of Hugging Face's own.
    CheckpointError says why a model cannot be had, and what to do.
    """
    path = _path(name)
    if path.exists():
        if revision is not None and not _is_cache_folder(path):
            raise ConfigError(f"revision {revision!r} is of a Hugging Face id, but {path} is a folder here")
        return _snapshot_of(path, revision or "main") if _is_cache_folder(path) else path
    model = _hub_model(os.fspath(name), revision)
    if model is None:
        raise CheckpointError(
            f"there is no folder {path}; give the folder of a checkpoint, or a Hugging Face id such as {_EXAMPLE}"
        )
    with readable_errors(model):
        return _from_cache_or_hub(model, part, download_dir, show_progress)


def download_model(
    name: str,
    *,
    revision: str | None = None,
    output_dir: str | os.PathLike[str] | None = None,
    show_progress: bool = True,
) -> Path:
    """Bring a model's newest files into the Hugging Face cache, or into a folder of their own; returns the folder."""
    model = None if _path(name).exists() else _hub_model(name, revision)
    if model is None:
        raise ConfigError(f"{name!r} is not a Hugging Face id, OWNER/NAME or OWNER/NAME@REVISION, such as {_EXAMPLE}")
    with readable_errors(model):
        return download(model, "model", None, None if output_dir is None else _path(output_dir), show_progress)


def model_name(name: str | os.PathLike[str]) -> str:
    """What to call a model: the last part of its id or of its folder's path.

    The folder above is what counts for `N-gpu`, and the repository's name for a snapshot in a Hugging Face cache.
    """
    path = _path(name)
    if not path.exists() and (model := _hub_model(os.fspath(name), None)) is not None:
        return model.id.rpartition("/")[2]
    path = path.resolve()
    if _RANK_FOLDER.fullmatch(path.name):
        path = path.parent
    storage = path.parent.parent if path.parent.name == "snapshots" else path
    cached = _CACHED.fullmatch(storage.name)
    return cached["name"] if cached else path.name


def _path(name: str | os.PathLike[str]) -> Path:
    """A name as a path; ConfigError for an empty one, which would be the current folder."""
    if not os.fspath(name):
        raise ConfigError(f"the name of a model or a folder is empty; give a folder, or an id such as {_EXAMPLE}")
    return expand_home(Path(name), "write the whole path")


def resolve_engine(config: EngineConfig) -> EngineConfig:
    """The same engine with folders in place of the names of its model and tokenizer, downloaded if need be."""
    options: dict[str, Any] = {"download_dir": config.download_dir, "show_progress": config.progress_bars}
    part: Part = "config" if config.load_format == "dummy" else "model"
    model = resolve_model(config.model, part=part, revision=config.revision, **options)
    tokenizer = None if config.tokenizer is None else resolve_model(config.tokenizer, part="tokenizer", **options)
    return replace(
        config,
        model=str(model),
        tokenizer=None if tokenizer is None else str(tokenizer),
        revision=None,
        download_dir=None,
    )


def _hub_model(name: str, revision: str | None) -> HubModel | None:
    """What an id names; None for what must be a path by its form, or because its first part is a folder here."""
    match = _ID.fullmatch(name)
    if match is None or Path(name).parts[0] == ".." or Path(name).parent.is_dir():
        return None
    if revision is not None and match["revision"] is not None:
        raise ConfigError(f"{name} and revision {revision!r} both name a revision; give one")
    return HubModel(match["id"], revision or match["revision"] or "main")


def _is_cache_folder(path: Path) -> bool:
    return _CACHED.fullmatch(path.name) is not None and (path / "snapshots").is_dir()


def _snapshot_of(storage: Path, revision: str) -> Path:
    folder = _snapshot(storage, revision)
    if folder is None:
        known = ", ".join(sorted(path.name for path in (storage / "refs").glob("*"))) or "none"
        raise CheckpointError(f"{storage} has no snapshot of revision {revision!r}; its revisions are: {known}")
    return folder


def _snapshot(storage: Path, revision: str) -> Path | None:
    """The folder of a branch, tag or commit in a repository's cache."""
    ref = storage / "refs" / revision
    folder = storage / "snapshots" / (ref.read_text(encoding="utf-8").strip() if ref.is_file() else revision)
    return folder if folder.is_dir() else None


def _from_cache_or_hub(
    model: HubModel, part: Part, download_dir: str | os.PathLike[str] | None, show_progress: bool
) -> Path:
    from huggingface_hub import constants

    cache = Path(constants.HF_HUB_CACHE) if download_dir is None else _path(download_dir)
    found = _snapshot(storage_of(model, cache), model.revision)
    offline = bool(constants.HF_HUB_OFFLINE)
    if found is not None and has_part(found, part) and (offline or has_part(found, "tokenizer")):
        _log.info("%s: found in the Hugging Face cache, %s", model.id, found)
        return found
    if offline:
        raise CheckpointError(
            f"{model.id} at revision {model.revision} is not complete in the Hugging Face cache ({cache}), and "
            f"HF_HUB_OFFLINE is set: unset it, or run `hasten download {model.id}` where there is a network"
        )
    return download(model, part, cache, None, show_progress)
