"""State of the local backend on disk: a folder for each job and server, and the lock of its owner.

    HOME/jobs/NAMESPACE/NAME/         a job; HOME/servers/NAMESPACE/NAME@VERSION/ a server
        spec.json                     the spec, and the plan for it; written by commands
        state.json                    its state; written by the holder of `lock`: the supervisor while that lives
        lock                          locked by the supervisor from before the folder can be seen until its last act
        logs/                         what the instances wrote
    HOME/volumes/NAMESPACE/NAME.json  a volume
    HOME/gpus/HOST/                   the queue for GPUs, and their owners
    HOME/scratch/                     folders being created or deleted

Files change in one step (a temporary file, fsync, rename), folders appear and vanish by a rename: a writer that dies
leaves the old or the new, never a half. The kernel releases a lock when its holder dies, however that happens.
"""

import errno
import fcntl
import json
import os
import shutil
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from hasten.cluster.backend import Status
from hasten.cluster.local.launch import JobPlan, Launch, ServerPlan, job_plan_of, launch_of, server_plan_of
from hasten.cluster.spec import TrainingJob, TritonServer, checked_name, checked_namespace, checked_version, server_of
from hasten.core.errors import ClusterError, ConfigError, ExistsError, NotFoundError
from hasten.core.files import expand_home
from hasten.core.text import from_json

HOME_VARIABLE = "HASTEN_HOME"
SPEC, STATE = "spec.json", "state.json"
Parsed = TypeVar("Parsed")
_MOST_EVENTS = 100
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_UNUSABLE = frozenset((*_FULL, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EIO, errno.ENAMETOOLONG))
_SCRATCH_S = 3600.0
"""After so long a temporary folder in scratch belongs to a command that died."""
_TEMPORARY = "hasten-temporary-"
"""How names of temporary folders begin: a home may be a folder that has other things, a `scratch` among them."""


@dataclass(kw_only=True)
class InstanceState:
    """One process of a job or server, as its supervisor knows it. Times are seconds since 1970."""

    name: str
    status: str = "PENDING"
    created: float
    ended: float | None = None
    is_chief: bool = False
    gpus: int = 0
    devices: list[str] = field(default_factory=list)
    pid: int | None = None
    start: int | None = None
    """When the kernel says that `pid` started: with it, the number means this process and no later one."""
    ready: bool = False
    restarts: int = 0
    reason: str | None = None
    ports: dict[str, int] = field(default_factory=dict)
    template: str = ""
    """Which form of a server's plan it runs."""


@dataclass(kw_only=True)
class State:
    """How a job or server is."""

    uid: str
    host: str
    boot: str
    created: float
    status: str = "PENDING"
    reason: str | None = None
    started: float | None = None
    ended: float | None = None
    expires: float | None = None
    """When it is to be deleted."""
    done: bool = False
    """Whether nothing of it runs any more and nothing will change."""
    pid: int | None = None
    start: int | None = None
    instances: list[InstanceState] = field(default_factory=list)
    events: list[dict[str, Any]] = field(default_factory=list)

    def event(self, reason: str, message: str, source: str, *, warning: bool = False) -> None:
        """Note what happened; of many events the last are kept."""
        kind = "Warning" if warning else "Normal"
        event = {"time": time.time(), "kind": kind, "reason": reason, "source": source, "message": message}
        self.events = [*self.events[-_MOST_EVENTS + 1 :], event]


def home_folder(home: Path | None) -> Path:
    """Where the local backend keeps its state: `home`, else HASTEN_HOME, else ~/.hasten; ConfigError for a file."""
    chosen = home or Path(os.environ.get(HOME_VARIABLE) or "~/.hasten")
    folder = expand_home(chosen, f"set {HOME_VARIABLE} to a folder").absolute()
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{folder} is not a folder: jobs, servers and volumes are kept there; set {HOME_VARIABLE}")
    return folder


@contextmanager
def using(path: Path) -> Iterator[None]:
    """ConfigError where the state is kept on what is read-only, full, or not this user's: the user can help that."""
    try:
        yield
    except OSError as error:
        if error.errno in _UNUSABLE:
            what = error.filename2 or error.filename or path
            raise ConfigError(
                f"cannot use {what} ({error.strerror}): jobs, servers and volumes are kept in the folder "
                f"{HOME_VARIABLE}, default ~/.hasten; set it to one that can be written and has room"
            ) from error
        raise


def make_folder(path: Path) -> None:
    """A folder that is there already will do; ConfigError where there can be none."""
    with using(path):
        try:
            path.mkdir(parents=True, exist_ok=True, mode=0o700)
        except FileExistsError as error:
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(path)) from error


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    """Change a file in one step."""
    with using(path):
        descriptor, name = tempfile.mkstemp(prefix=".", dir=path.parent)
        try:
            with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                json.dump(data, file)
                file.flush()
                os.fsync(file.fileno())
            Path(name).replace(path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise


def read_json(path: Path, record: Path | None = None) -> dict[str, Any]:
    """A file that `write_json` wrote; UnreadableError for any other, whose advice is to move `record` aside.

    `record` holds the file and nothing of any other job, server or volume; it is the file itself if it is not given.
    """
    try:
        value = from_json(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        raise
    except (ValueError, OSError) as error:
        raise UnreadableError(path, str(error), record) from error
    if not isinstance(value, dict):
        raise UnreadableError(path, "it is not a JSON object", record)
    return value


class UnreadableError(ClusterError):
    """A record is damaged, or is not one."""

    def __init__(self, path: Path, why: str, record: Path | None = None) -> None:
        super().__init__(f"the record {path} cannot be read: {why}; repair it, or move {record or path} elsewhere")


def try_lock(path: Path) -> int | None:
    """A descriptor that holds the lock on a file, None where another has it. It is free once the descriptor closes.

    FileNotFoundError where the file's folder is gone, and where it goes, or is followed by another of its name, between
    the file's opening and the lock: that lock would be on a file which nobody finds any more.
    """
    with using(path):
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(descriptor), path.stat()):
            return descriptor
    except BlockingIOError:
        os.close(descriptor)
        return None
    except BaseException:
        os.close(descriptor)
        raise
    os.close(descriptor)
    raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock on a file; waits for those who have it."""
    make_folder(path.parent)
    with using(path):
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


@dataclass(frozen=True)
class Folder:
    """What is kept of one job or server."""

    path: Path

    @property
    def home(self) -> Path:
        """The folder of all state."""
        return self.path.parents[2]

    @property
    def namespace(self) -> str:
        """Its namespace."""
        return self.path.parent.name

    @property
    def name(self) -> str:
        """Its name; a server's with `@` and its version."""
        return self.path.name

    @property
    def logs(self) -> Path:
        """Where its instances' output is."""
        return self.path / "logs"

    @property
    def end_mark(self) -> Path:
        """A file that tells the supervisor, from its first moment on, that all is to end."""
        return self.path / "end"

    def job_plan(self) -> JobPlan:
        """What a job's supervisor runs."""
        return self._read(SPEC, lambda spec: job_plan_of(spec["plan"]))

    def server_plan(self) -> ServerPlan:
        """What a server's supervisor runs."""
        return self._read(SPEC, lambda spec: server_plan_of(spec["plan"]))

    def server(self) -> TritonServer:
        """A server as it was asked for."""
        return self._read(SPEC, lambda spec: server_of(spec["asked"]))

    def launch(self) -> tuple[Launch, str]:
        """How its processes are started, and the shell that an interactive one of them gets."""
        return self._read(
            SPEC, lambda spec: (launch_of(spec["plan"]), str(spec["asked"].get("shell", TrainingJob.shell)))
        )

    def state(self) -> State:
        """How it is, as last written."""
        return self._read(STATE, _state_of)

    def _read(self, file: str, parse: Callable[[dict[str, Any]], Parsed]) -> Parsed:
        """UnreadableError where the file is damaged or of another version, NotFoundError where there is none."""
        path = self.path / file
        try:
            return parse(read_json(path, self.path))
        except (FileNotFoundError, NotADirectoryError):
            raise NotFoundError(f"there is no {self.name} in namespace {self.namespace}") from None
        except (TypeError, KeyError, ValueError, AttributeError) as error:
            raise UnreadableError(path, f"it is of another version of hasten ({error})", self.path) from error

    def write_spec(self, spec: Mapping[str, Any]) -> None:
        """Change what is asked."""
        write_json(self.path / SPEC, spec)

    def write_state(self, state: State) -> None:
        """Change the record; for the holder of the lock alone."""
        write_json(self.path / STATE, asdict(state))

    def mark_end(self) -> None:
        """Tell the supervisor that all is to end; on a full disk a signal has to do."""
        with using(self.end_mark):
            try:
                self.end_mark.touch()
            except OSError as error:
                if error.errno not in _FULL:
                    raise

    def try_lock(self) -> int | None:
        """Own it, where its supervisor does not live; NotFoundError if it is gone."""
        try:
            return try_lock(self.path / "lock")
        except FileNotFoundError:
            raise NotFoundError(f"there is no {self.name} in namespace {self.namespace}") from None

    def remove(self) -> None:
        """Let it vanish in one step, then delete its files. It makes none: this is how a full disk is emptied."""
        trash = scratch(self.home) / f"{_TEMPORARY}{uuid.uuid4().hex}"
        with using(self.path), suppress(FileNotFoundError):
            self.path.rename(trash)
        shutil.rmtree(trash, ignore_errors=True)


def _state_of(record: dict[str, Any]) -> State:
    instances = [InstanceState(**instance) for instance in record.pop("instances")]
    state = State(**record, instances=instances)
    for status in (state.status, *(instance.status for instance in instances)):
        Status(status)
    return state


def scratch(home: Path) -> Path:
    """The folder for what is in the making, rid of what dead commands left in it."""
    folder = home / "scratch"
    make_folder(folder)
    for left in folder.glob(f"{_TEMPORARY}*"):
        with suppress(FileNotFoundError):
            if time.time() - left.stat().st_mtime > _SCRATCH_S:
                shutil.rmtree(left, ignore_errors=True)
    return folder


def create(
    folder: Folder, spec: Mapping[str, Any], state: State, files: Mapping[str, Path], *, what: str, advice: str
) -> tuple[Folder, int]:
    """Make a job's or server's folder with all that is in it, in one step; returns it and its lock, which is held.

    `files` are copied into it by their names. ExistsError, with `advice`, where there is one.
    """
    with using(folder.path):
        draft = Folder(Path(tempfile.mkdtemp(prefix=_TEMPORARY, dir=scratch(folder.home))))
    lock = None
    try:
        with using(folder.path):
            draft.logs.mkdir()
            lock = draft.try_lock()
            for name, source in files.items():
                _copy(source, draft.path / name)
            draft.write_spec(spec)
            draft.write_state(state)
            make_folder(folder.path.parent)
            draft.path.rename(folder.path)
    except BaseException as error:
        if lock is not None:
            os.close(lock)
        shutil.rmtree(draft.path, ignore_errors=True)
        if isinstance(error, OSError) and folder.path.exists():
            raise ExistsError(f"{what} exists in namespace {folder.namespace}: {advice}") from None
        if isinstance(error, OSError):
            raise ClusterError(f"cannot write {folder.path}: {error.strerror}") from error
        raise
    assert lock is not None
    return folder, lock


def _copy(source: Path, target: Path) -> None:
    try:
        opened = source.open("rb")
    except OSError as error:
        raise ConfigError(f"--config-file {source}: {error.strerror}") from error
    target.parent.mkdir(exist_ok=True)
    with opened, target.open("xb") as copy:
        shutil.copyfileobj(opened, copy)


def job_folder(home: Path, name: str, namespace: str) -> Folder:
    """Where a job's record is, whether there is one or not; ConfigError for what is no name."""
    return Folder(home / "jobs" / checked_namespace(namespace) / checked_name(name, "a job's name"))


def server_folder(home: Path, name: str, version: str, namespace: str) -> Folder:
    """The same of a server."""
    checked = (checked_name(name, "a server's name"), checked_version(version))
    return Folder(home / "servers" / checked_namespace(namespace) / "@".join(checked))


def folders(home: Path, kind: str, namespace: str | None) -> list[Folder]:
    """All of a kind (`jobs`, `servers`), of one namespace or of all."""
    root = home / kind
    spaces = [root / checked_namespace(namespace)] if namespace is not None else _entries(root)
    return [Folder(entry) for space in spaces for entry in _entries(space)]


def _entries(folder: Path) -> list[Path]:
    with using(folder):
        try:
            return sorted(folder.iterdir())
        except (FileNotFoundError, NotADirectoryError):
            return []
