"""Models by the name that a user gives: a folder, a folder of the Hugging Face cache, or an id on the Hugging Face hub.

An id is looked up in the cache first and downloaded only where it is not there. huggingface_hub is imported for ids
alone, and torch never.
"""

import json
import logging
import os
import re
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from hasten.core.config import EngineConfig
from hasten.core.errors import CheckpointError, ConfigError, HastenError
from hasten.core.files import expand_home
from hasten.core.progress import ProgressBar, progress_bar
from hasten.models.registry import architecture_of
from hasten.quantization.formats.files import METHODS

Part = Literal["model", "config", "tokenizer"]
"""What of a model is needed: everything, what describes it, or its tokenizer."""

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
"""Files of a tokenizer that may lie beside the weights."""
TOKENIZER_ALONE = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
"""Those of which one makes a tokenizer."""
ADAPTER = "adapter_config.json"
"""What PEFT puts beside an adapter, which transformers then applies to its base model."""

_log = logging.getLogger(__name__)

_EXAMPLE = "bigscience/bloom-560m"
_ID = re.compile(r"(?P<id>\w[\w.-]*/\w[\w.-]*)(@(?P<revision>[^@]+))?", re.ASCII)
_CACHED = re.compile(r"models--(?P<owner>.+?)--(?P<name>.+)")
_RANK_FOLDER = re.compile(r"\d+-gpu")
POOLING_FILES = ("modules.json", "config_sentence_transformers.json", "sentence_bert_config.json")
"""What sentence-transformers writes next to a model, for all its modules."""
_SIDE_FILES = ("config.json", "generation_config.json", *METHODS, *TOKENIZER_FILES, *POOLING_FILES, ADAPTER)
OF_MODULE = re.compile(r"\d+_\w+/(config\.json|model\.safetensors|pytorch_model\.bin)")
"""Files of such a module, which are small."""
_WEIGHTS = (
    re.compile(r"model[^/]*\.safetensors(\.index\.json)?"),
    re.compile(r"pytorch_model[^/]*\.bin(\.index\.json)?"),
)
"""Weights at the top of a repository: the first kind that it has is downloaded."""
_WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")
_DOWNLOADS_AT_ONCE = 4


@dataclass(frozen=True)
class HubModel:
    """A model on the hub at a revision."""

    id: str
    revision: str


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
            f"{path} is missing; give the folder of a checkpoint, or a Hugging Face id such as {_EXAMPLE}"
        )
    with _readable_errors(model):
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
    with _readable_errors(model):
        return _download(model, "model", None, None if output_dir is None else _path(output_dir), show_progress)


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


def _storage(model: HubModel, cache: Path) -> Path:
    return cache / f"models--{model.id.replace('/', '--')}"


def _has(folder: Path, part: Part) -> bool:
    """Whether a snapshot has what is needed; downloads that were cut off leave some out."""
    if part == "tokenizer":
        return any((folder / name).is_file() for name in TOKENIZER_ALONE)
    return (folder / "config.json").is_file() and (part == "config" or _has_weights(folder))


def _has_weights(folder: Path) -> bool:
    if any((folder / name).is_file() for name in _WEIGHT_FILES):
        return True
    for name in _WEIGHT_FILES:
        index = folder / f"{name}.index.json"
        if index.is_file():
            try:
                files = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
            except (ValueError, KeyError, AttributeError, TypeError):
                return False
            return all((folder / str(file)).is_file() for file in files)
    return False


def _from_cache_or_hub(
    model: HubModel, part: Part, download_dir: str | os.PathLike[str] | None, show_progress: bool
) -> Path:
    from huggingface_hub import constants

    cache = Path(constants.HF_HUB_CACHE) if download_dir is None else _path(download_dir)
    found = _snapshot(_storage(model, cache), model.revision)
    offline = bool(constants.HF_HUB_OFFLINE)
    if found is not None and _has(found, part) and (offline or _has(found, "tokenizer")):
        _log.info("%s: found in the Hugging Face cache, %s", model.id, found)
        return found
    if offline:
        raise CheckpointError(
            f"{model.id} at revision {model.revision} is not complete in the Hugging Face cache ({cache}), and "
            f"HF_HUB_OFFLINE is set: unset it, or run `hasten download {model.id}` where there is a network"
        )
    return _download(model, part, cache, None, show_progress)


def _download(model: HubModel, part: Part, cache: Path | None, output_dir: Path | None, show_progress: bool) -> Path:
    """Download what is needed of a model and is not there; returns the snapshot or `output_dir`."""
    from huggingface_hub import HfApi, constants, hf_hub_download

    cache = cache or Path(constants.HF_HUB_CACHE)
    info = HfApi().model_info(
        model.id, revision=model.revision, files_metadata=True, timeout=constants.HF_HUB_ETAG_TIMEOUT
    )
    assert info.sha is not None
    sizes = {file.rfilename: file.size or 0 for file in info.siblings or ()}
    names = _needed(model, part, list(sizes))

    def fetch(name: str, tqdm_class: Any = _Unshown) -> Path:
        return Path(
            hf_hub_download(
                model.id,
                name,
                revision=info.sha,
                cache_dir=cache,
                local_dir=output_dir,
                etag_timeout=constants.HF_HUB_ETAG_TIMEOUT,
                tqdm_class=tqdm_class,
            )
        )

    if "config.json" in names and part != "tokenizer":
        _check_config(fetch("config.json"), model)
    folder = output_dir or _storage(model, cache) / "snapshots" / info.sha
    missing = [name for name in names if not (folder / name).is_file()] if output_dir is None else names
    if missing:
        total = sum(sizes[name] for name in missing)
        _check_space(total, folder, model)
        _log.info("downloading %s at %s: %d files, %.2f GB", model.id, info.sha, len(missing), total / 1e9)
        with progress_bar(f"Downloading {model.id}", total, unit="bytes", show=show_progress) as bar:
            _fetch_all(fetch, missing, bar)
    if output_dir is None:
        _write_ref(_storage(model, cache), model.revision, info.sha)
    return folder


def _needed(model: HubModel, part: Part, names: Sequence[str]) -> list[str]:
    side = [name for name in names if name in _SIDE_FILES or OF_MODULE.fullmatch(name)]
    if part != "model":
        return side
    if "config.json" not in side:
        gguf = "; GGUF is not supported" if any(name.endswith(".gguf") for name in names) else ""
        raise CheckpointError(f"{model.id} has no config.json, so it is not a model of transformers{gguf}")
    for kind in _WEIGHTS:
        if weights := [name for name in names if kind.fullmatch(name)]:
            return side + weights
    raise CheckpointError(
        f"{model.id} has no weights that hasten reads, model*.safetensors or pytorch_model*.bin, at its top"
    )


def _check_config(path: Path, model: HubModel) -> None:
    """Refuse an architecture and a format of weights that hasten lacks before the weights are downloaded."""
    from hasten.quantization.formats.registry import format_of

    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        architecture_of(raw)
        format_of(raw)
    except ValueError as error:
        raise CheckpointError(f"{model.id}: its config.json is not JSON ({error})") from error
    except HastenError as error:
        raise type(error)(f"{model.id}: {error}") from error


def _check_space(nbytes: int, folder: Path, model: HubModel) -> None:
    parent = next(path for path in (folder, *folder.parents) if path.exists())
    free = shutil.disk_usage(parent).free
    if free < nbytes:
        raise CheckpointError(
            f"no space left to download {model.id} into {parent}: it takes {nbytes / 1e9:.2f} GB, {free / 1e9:.2f} GB "
            "are free"
        )


def _write_ref(storage: Path, revision: str, commit: str) -> None:
    """Remember the commit of a branch or tag, so that the next look-up needs no network."""
    if revision == commit:
        return
    ref = storage / "refs" / revision
    ref.parent.mkdir(parents=True, exist_ok=True)
    new = ref.with_name(f"{ref.name}.{os.getpid()}.new")
    new.write_text(commit, encoding="utf-8")
    new.replace(ref)


class _StoppedError(Exception):
    """Another download failed, or the user gave up."""


class _Unshown:
    """What huggingface_hub tells of a download's progress, as far as it calls it; shows nothing."""

    def __init__(self, *_: Any, **options: Any) -> None:
        self.n = options.get("initial") or 0

    def __enter__(self) -> "_Unshown":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def update(self, amount: float | None = 1) -> None:
        """Take note of bytes that came."""

    def close(self) -> None:
        """End."""

    def set_postfix_str(self, *_: Any, **__: Any) -> None:
        """Show nothing."""


def _fetch_all(fetch: Callable[[str, Any], Path], names: Sequence[str], bar: ProgressBar) -> None:
    stop = threading.Event()

    class Shown(_Unshown):
        def update(self, amount: float | None = 1) -> None:
            if stop.is_set():
                raise _StoppedError
            bar.advance(amount or 0)

    with ThreadPoolExecutor(_DOWNLOADS_AT_ONCE, "hasten-download") as pool:
        futures = [pool.submit(fetch, name, Shown) for name in names]
        try:
            for future in futures:
                future.result()
        except BaseException:
            stop.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise


@contextmanager
def _readable_errors(model: HubModel) -> Iterator[None]:
    """Turn what huggingface_hub and the network raise into one line that says what to do."""
    try:
        from huggingface_hub import constants, errors
    except ImportError:
        raise ConfigError(
            f"{model.id} is no folder here, and a Hugging Face id needs huggingface_hub: pip install huggingface_hub"
        ) from None
    where = constants.ENDPOINT
    try:
        yield
    except HastenError:
        raise
    except errors.GatedRepoError as error:
        raise CheckpointError(
            f"{model.id} is gated: accept its conditions at {where}/{model.id}, and log in with `hf auth login` or "
            "HF_TOKEN"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise CheckpointError(
            f"{model.id} is neither a folder here nor a model at {where}; check its name, or, if it is private, log in "
            "with `hf auth login` or HF_TOKEN"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise CheckpointError(f"{model.id} has no revision {model.revision!r} at {where}") from error
    except errors.HFValidationError as error:
        raise ConfigError(f"{model.id} is neither a folder here nor a Hugging Face id: {_line(error)}") from error
    except errors.HfHubHTTPError as error:
        raise CheckpointError(f"{where} failed to give {model.id} ({_line(error)}); try again later") from error
    except Exception as error:  # whatever the network's library raises
        if isinstance(error, OSError) and error.errno is not None and error.filename is not None:
            raise CheckpointError(
                f"cannot write {error.filename}: {error.strerror}; choose another cache with HF_HOME or download_dir"
            ) from error
        raise CheckpointError(
            f"{model.id} is no folder here, and {where} cannot be reached ({_line(error)}): check the network and the "
            "proxy, or give a folder"
        ) from error


def _line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(". ")
