"""An output folder that changes in one step: written beside itself, swapped at the end, and left alone on failure."""

import contextlib
import ctypes
import errno
import fcntl
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from hasten.checkpoint.files import read_json
from hasten.checkpoint.model_files import OF_MODULE, POOLING_FILES, TOKENIZER_FILES
from hasten.checkpoint.sources import is_rank_folder, rank_folders
from hasten.core.errors import CheckpointError, ConfigError
from hasten.core.files import file_in_the_way

_SIDE_FILES = ("config.json", "generation_config.json", *TOKENIZER_FILES, *POOLING_FILES)
_SIDE_FOLDER = re.compile(r"\d+_\w+")
"""Of a module of sentence-transformers, whose files are small."""
_VOLATILE = frozenset({"_name_or_path", "dtype", "torch_dtype", "transformers_version"})
"""Keys of config.json that say nothing of what the model is."""
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
_RENAME_EXCHANGE = 2
_AT_FDCWD = -100
_NO_EXCHANGE = frozenset({errno.ENOSYS, errno.EINVAL, errno.EPERM, errno.EOPNOTSUPP, errno.EXDEV, errno.EACCES})
_OURS = (".bin", ".safetensors", ".ini", ".json")
_LOCK = ".lock"
_OLD = "old"
_MARK = ".hasten-"

Event = TypeVar("Event")


class Target:
    """`OUT/N-gpu` and the files beside it, prepared in a hidden folder.

    OUT is swapped as a whole; where it holds more than this one rank folder, or cannot be renamed, only `N-gpu` is, and
    then the files beside it must describe the same model.
    """

    def __init__(self, out: Path, ranks: int) -> None:
        self.shown = out
        self.out = out.resolve()
        self.name = f"{ranks}-gpu"
        self.whole = self._check()

    def _check(self) -> bool:
        """Whether OUT can be swapped as a whole; CheckpointError if it must not be touched."""
        if not os.path.lexists(self.out):
            return True
        if not self.out.is_dir():
            raise CheckpointError(f"{self.shown} is a file; give a folder to write to")
        entries = {path.name for path in self.out.iterdir() if not path.name.startswith(_MARK)}
        ours = {path.name for path in rank_folders(self.out).values()}
        if entries and not ours:
            raise CheckpointError(f"{self.shown} exists and is not a folder that hasten wrote; give another one")
        if self.name in entries:
            self._check_replaced(self.out / self.name)
        # a folder that someone stands in would vanish under them
        in_use = self.out.is_mount() or Path.cwd().is_relative_to(self.out)
        movable = not in_use and os.access(self.out.parent, os.W_OK)
        others = entries - {self.name, *_SIDE_FILES}
        return movable and all(map(_SIDE_FOLDER.fullmatch, others))

    def _check_replaced(self, folder: Path) -> None:
        if not is_rank_folder(folder):
            raise CheckpointError(f"{self.shown / self.name} was not written by a converter; give another folder")
        for path in folder.iterdir():
            if path.is_dir() or path.suffix not in _OURS:
                raise CheckpointError(f"{path} would be lost with the old {self.name}; move it elsewhere first")

    def check_model(self, config: Mapping[str, Any] | None) -> None:
        """CheckpointError if OUT keeps rank folders of a model that config.json describes otherwise."""
        path = self.out / "config.json"
        if self.whole or config is None or not path.is_file():
            return
        if _lasting(read_json(path)) != _lasting(config):
            raise CheckpointError(f"{self.shown} holds another model (its config.json differs); give another folder")

    @property
    def folder(self) -> Path:
        """The rank folder as it will be called, for the log."""
        return self.shown / self.name

    @contextlib.contextmanager
    def prepare(self) -> Iterator[Path]:
        """A new OUT to fill, with an empty `N-gpu`; swapped in when the block ends well, else removed."""
        parents = _make_parents(self.out if not self.whole else self.out.parent)
        parent = self.out.parent if self.whole else self.out
        prefix = f".{self.out.name}{_MARK}" if self.whole else _MARK
        _remove_stale(self.out.parent, f".{self.out.name}{_MARK}")
        _remove_stale(self.out, _MARK)
        try:
            with _locked_folder(parent, prefix) as work:
                new = work / "new"
                (new / self.name).mkdir(parents=True)
                yield new
                self._swap_in(work, new)
        except BaseException:
            _remove_empty(parents)
            raise

    def _swap_in(self, work: Path, new: Path) -> None:
        if self.whole:
            if self.out.exists():
                shutil.copymode(self.out, new)
            swap(new, self.out, work / _OLD)
            return
        swap(new / self.name, self.out / self.name, work / _OLD)
        for name in _side_files(new):
            (self.out / name).parent.mkdir(exist_ok=True)
            (new / name).replace(self.out / name)


@contextlib.contextmanager
def appearing(out: Path) -> Iterator[Path]:
    """A folder to fill that becomes `out`, which is new or empty, when the block ends well, and else vanishes."""
    shown, out = out, out.resolve()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{shown} exists; give a folder that is new or empty")
    parents = _make_parents(out.parent)
    prefix = f".{out.name}{_MARK}"
    _remove_stale(out.parent, prefix)
    try:
        with _locked_folder(out.parent, prefix) as work:
            new = work / "new"
            new.mkdir()
            yield new
            swap(new, out, work / _OLD)
    except BaseException:
        _remove_empty(parents)
        raise


@contextlib.contextmanager
def clear_errors(shown: str, report: Callable[[Event], None]) -> Iterator[Callable[[Event], None]]:
    """Turn the system's errors while `shown` is written into CheckpointErrors that say what to do.

    Yields what to report progress by: its own errors, such as those of a closed standard output, stay what they are.
    """
    reporting: list[OSError] = []

    def guarded(event: Event) -> None:
        try:
            report(event)
        except OSError as error:
            reporting.append(error)
            raise

    try:
        yield guarded
    except OSError as error:
        if any(error is other for other in reporting):
            raise
        where = f" ({error.filename})" if error.filename else ""
        if (file := file_in_the_way(error)) is not None:
            raise CheckpointError(f"cannot write {shown}: {file} is a file, and a folder is needed there") from error
        if error.errno in _FULL:
            raise CheckpointError(
                f"no space left to write {shown}{where}; free some, or give another folder"
            ) from error
        raise CheckpointError(f"cannot write {shown}{where}: {error.strerror or error}") from error


def copy_side_files(source: Path, target: Path) -> None:
    """Copy what a checkpoint has next to its weights: configuration, tokenizer, and what makes vectors."""
    for name in _side_files(source):
        (target / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(source / name, target / name)


def _side_files(folder: Path) -> list[str]:
    """Those that `folder` has, by their names below it."""
    modules = (str(path.relative_to(folder)) for path in folder.glob("*/*"))
    names = (*_SIDE_FILES, *filter(OF_MODULE.fullmatch, modules))
    return [name for name in names if (folder / name).is_file()]


def _lasting(config: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in config.items() if name not in _VOLATILE}


def swap(new: Path, target: Path, spare: Path) -> None:
    """Put `new` where `target` is, in one step where the kernel can; what was there ends at `new` or in `spare`."""
    try:
        new.rename(target)
        return
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
    if not exchange(new, target):
        spare.mkdir(exist_ok=True)
        target.rename(spare / target.name)
        new.rename(target)


def exchange(first: Path, second: Path) -> bool:
    """Exchange two paths atomically; False where kernel or file system cannot."""
    call = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if call is None:
        return False
    if call(_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), _RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in _NO_EXCHANGE:
        return False
    raise OSError(code, os.strerror(code), str(second))


def _make_parents(folder: Path) -> list[Path]:
    """Make `folder`; returns those that were missing, innermost first."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    return missing


def _remove_empty(folders: list[Path]) -> None:
    for folder in folders:
        with contextlib.suppress(OSError):
            folder.rmdir()


@contextlib.contextmanager
def _locked_folder(parent: Path, prefix: str) -> Iterator[Path]:
    """A folder that is removed at the end, and that others can tell from a dead run's by its lock."""
    while True:
        work = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
        try:
            with (work / _LOCK).open("w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                if (work / _LOCK).exists():  # no other run has taken it for a dead one's meanwhile
                    yield work
                    return
        finally:
            shutil.rmtree(work, ignore_errors=True)


def _remove_stale(parent: Path, prefix: str) -> None:
    """Remove the folders of runs that died; what such a run had moved away and not replaced goes back."""
    for work in parent.iterdir() if parent.is_dir() else ():
        if not work.name.startswith(prefix):
            continue
        with contextlib.suppress(OSError), (work / _LOCK).open("r+") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            for old in (work / _OLD).iterdir() if (work / _OLD).is_dir() else ():
                if not (parent / old.name).exists():
                    old.rename(parent / old.name)
            shutil.rmtree(work, ignore_errors=True)
