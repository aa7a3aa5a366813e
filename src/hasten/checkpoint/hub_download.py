"""Files of a model on the Hugging Face hub, brought into its cache or a folder; what goes wrong in one line.

huggingface_hub is imported for this alone, and torch never.
"""

import logging
import os
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hasten.checkpoint.model_files import Part, needed_files
from hasten.core.errors import CheckpointError, ConfigError, HastenError
from hasten.core.progress import ProgressBar, progress_bar
from hasten.core.text import from_json
from hasten.models.registry import architecture_of

_log = logging.getLogger(__name__)

_DOWNLOADS_AT_ONCE = 4


@dataclass(frozen=True)
class HubModel:
    """A model on the hub at a revision."""

    id: str
    revision: str


def storage_of(model: HubModel, cache: Path) -> Path:
    """The folder of a model in a Hugging Face cache."""
    return cache / f"models--{model.id.replace('/', '--')}"


def download(model: HubModel, part: Part, cache: Path | None, output_dir: Path | None, show_progress: bool) -> Path:
    """Download what is needed of a model and is not there; returns the snapshot or `output_dir`."""
    from huggingface_hub import HfApi, constants, hf_hub_download

    cache = cache or Path(constants.HF_HUB_CACHE)
    info = HfApi().model_info(
        model.id, revision=model.revision, files_metadata=True, timeout=constants.HF_HUB_ETAG_TIMEOUT
    )
    assert info.sha is not None
    sizes = {file.rfilename: file.size or 0 for file in info.siblings or ()}
    names = needed_files(model.id, part, list(sizes))

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
    folder = output_dir or storage_of(model, cache) / "snapshots" / info.sha
    missing = [name for name in names if not (folder / name).is_file()] if output_dir is None else names
    if missing:
        total = sum(sizes[name] for name in missing)
        _check_space(total, folder, model)
        _log.info("downloading %s at %s: %d files, %.2f GB", model.id, info.sha, len(missing), total / 1e9)
        with progress_bar(f"Downloading {model.id}", total, unit="bytes", show=show_progress) as bar:
            _fetch_all(fetch, missing, bar)
    if output_dir is None:
        _write_ref(storage_of(model, cache), model.revision, info.sha)
    return folder


def _check_config(path: Path, model: HubModel) -> None:
    """Refuse an architecture and a format of weights that hasten lacks before the weights are downloaded."""
    from hasten.quantization.formats.registry import format_of

    try:
        raw = from_json(path.read_text(encoding="utf-8"))
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
            f"no space left to download {model.id} into {parent}: it takes {nbytes / 1e6:,.1f} MB, "
            f"{free / 1e6:,.1f} MB are free"
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
def readable_errors(model: HubModel) -> Iterator[None]:
    """Turn what huggingface_hub and the network raise into one line that says what to do."""
    try:
        from huggingface_hub import constants, errors
    except ImportError:
        raise ConfigError(
            f"{model.id} is no folder here, and a Hugging Face id needs huggingface_hub: pip install huggingface_hub"
        ) from None
    except ValueError as error:  # it reads the environment while it is imported
        raise ConfigError(
            f"{model.id} is no folder here, and huggingface_hub cannot be imported ({_line(error)}): is a variable of "
            "the environment that begins with HF_ wrong?"
        ) from error
    where = constants.ENDPOINT
    try:
        yield
    except HastenError:
        raise
    except errors.OfflineModeIsEnabled as error:
        raise CheckpointError(f"{model.id} cannot be downloaded while HF_HUB_OFFLINE is set; unset it") from error
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
