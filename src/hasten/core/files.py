"""Files whose errors name them."""

import codecs
import errno
import fcntl
import os
import shutil
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from hasten.core.errors import ConfigError

FOLDER_LOCK = ".lock"
"""The file in a folder that `held` locks."""
_LONGEST_NAME = 200
"""Bytes; systems allow 255, some less."""


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Let an OSError name the file that is being written: the system names none where a disk is full."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise


def file_in_the_way(error: OSError) -> str | None:
    """The file that stands where an OSError's path needs a folder; None for other errors."""
    if error.filename is None or error.errno not in (errno.EEXIST, errno.ENOTDIR):
        return None
    path = Path(os.fsdecode(error.filename))
    return next((str(each) for each in (path, *path.parents) if _is_no_folder(each)), None)


def _is_no_folder(path: Path) -> bool:
    try:
        return not stat.S_ISDIR(path.stat().st_mode)
    except OSError:
        return False


def write_text(path: Path, text: str, *, sync: bool = False) -> None:
    """Write a text file in UTF-8, as `write_bytes` does."""
    write_bytes(path, text.encode(), sync=sync)


def write_bytes(path: Path, data: bytes, *, sync: bool = False) -> None:
    """Write a file in one step: a full disk or an interrupt leaves what was there. An OSError names the file.

    Links, pipes, devices and files in folders that take no others are written in place. `sync`: return once it is on
    disk.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        if not _replaceable(path):
            path.write_bytes(data)
            return
        try:
            with partial.open("wb") as file:
                if path.exists():
                    os.fchmod(file.fileno(), stat.S_IMODE(path.stat().st_mode))
                file.write(data)
                file.flush()
                if sync:
                    os.fsync(file.fileno())
            partial.replace(path)
        except BaseException:
            with suppress(OSError):
                partial.unlink()
            raise
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


def _replaceable(path: Path) -> bool:
    """Whether another file, whose name is somewhat longer, may take the place of this one, or of none."""
    if len(os.fsencode(path.name)) > _LONGEST_NAME or path.is_symlink() or not os.access(path.parent, os.W_OK):
        return False
    return not path.exists() or (path.is_file() and os.access(path, os.W_OK))


@contextmanager
def reading(what: str) -> Iterator[None]:
    """ConfigError `cannot read WHAT` with the reason, where a file cannot be read or is not UTF-8."""
    try:
        yield
    except OSError as error:
        raise ConfigError(f"cannot read {what}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"cannot read {what}: {_other_encoding(error)}; save it as UTF-8") from error


def _other_encoding(error: UnicodeDecodeError) -> str:
    """What a text is that is not UTF-8."""
    if error.object.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "it is UTF-16"
    return f"it is not UTF-8, with the byte 0x{error.object[error.start]:02x} at position {error.start}"


def expand_home(path: Path, advice: str) -> Path:
    """The path with its `~` or `~USER` expanded; ConfigError where there is no such home directory.

    The error for `~` ends in the advice.
    """
    try:
        return path.expanduser()
    except RuntimeError:
        user = path.parts[0].removeprefix("~")
        reason = f"there is no user {user}; write the path in full" if user else f"there is no home directory; {advice}"
        raise ConfigError(f"{path} cannot be expanded: {reason}") from None


@contextmanager
def held(folder: Path, what: str) -> Iterator[None]:
    """Create a folder and hold it for this process; ConfigError where another one writes `what` to it."""
    with naming(folder):
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder / FOLDER_LOCK, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        try:
            with naming(folder / FOLDER_LOCK):
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(f"another process is writing {what} to {folder}; wait for it or end it") from None
        yield
    finally:
        os.close(descriptor)


@contextmanager
def removed_on_failure(folders: Sequence[Path]) -> Iterator[None]:
    """Remove folders that are being written where that fails: the next attempt would take them for complete ones."""
    try:
        yield
    except BaseException:
        for folder in folders:
            shutil.rmtree(folder, ignore_errors=True)
        raise
