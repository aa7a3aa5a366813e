"""Files whose errors name them."""

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from hasten.core.errors import ConfigError


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Let an OSError name the file that is being written: the system names none where a disk is full."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise


def write_text(path: Path, text: str) -> None:
    """Write a text file in UTF-8; an OSError names the file, whatever went wrong."""
    with naming(path):
        path.write_text(text, encoding="utf-8")


@contextmanager
def reading(what: str) -> Iterator[None]:
    """ConfigError `cannot read WHAT` with the reason, where a file cannot be read or is not UTF-8."""
    try:
        yield
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else None
        raise ConfigError(f"cannot read {what}: {reason or error}") from error


def expand_home(path: Path, advice: str) -> Path:
    """The path with its `~` expanded; ConfigError that ends in the advice where there is no home directory."""
    try:
        return path.expanduser()
    except RuntimeError:
        raise ConfigError(f"{path} cannot be expanded: there is no home directory; {advice}") from None


@contextmanager
def removed_on_failure(folders: Sequence[Path]) -> Iterator[None]:
    """Remove folders that are being written where that fails: the next attempt would take them for complete ones."""
    try:
        yield
    except BaseException:
        for folder in folders:
            shutil.rmtree(folder, ignore_errors=True)
        raise
