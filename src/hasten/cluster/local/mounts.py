"""Folders at other paths, for one process and its children: `python -m hasten.cluster.local.mounts JSON COMMAND…`.

The process gets a mount namespace of its own, and a user namespace too unless it may mount anyway; it keeps its user.
Folders are bound to their paths there, which the rest of the machine does not see. A missing path is created
without a trace: the nearest folder that does exist is replaced, in the namespace, by one in memory that holds all its
entries (bound one by one) and the new one. That folder can be read only: what would be created right in it would vanish
with the job. In a folder that was mounted before it, the path is really created, as container engines do. Then the
command replaces this process.

JSON is `{"mounts": [[source, path, read_only], …], "working_dir": …}`. Without a command this is a check: it mounts and
ends.
"""

import ctypes
import errno
import json
import os
import stat
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

_NEW_MOUNTS, _NEW_USER = 0x00020000, 0x10000000
_READ_ONLY, _REMOUNT, _BIND, _RECURSIVE, _SLAVE = 1, 32, 4096, 16384, 1 << 19
_DETACH = 2
_AT_FDCWD, _AT_RECURSIVE = -100, 0x8000
_ATTRIBUTE_READ_ONLY = 1
FAILED = 125
"""Exit status where the mounts or the command could not be had, as of container engines."""


def mount_command(command: Sequence[str], mounts: Sequence[Sequence[object]], working_dir: str) -> list[str]:
    """What runs a command with mounts, in a folder that may lie in one of them."""
    request = json.dumps({"mounts": mounts, "working_dir": working_dir})
    return [sys.executable, "-P", "-m", "hasten.cluster.local.mounts", request, *command]


class MountError(Exception):
    """The kernel does not do it. `errno` is its reason, where it has one."""

    errno: int | None = None


_libc = ctypes.CDLL(None, use_errno=True)


def _call(doing: str, function: str, *arguments: object) -> None:
    try:
        called = getattr(_libc, function)
    except AttributeError:
        raise MountError(f"{doing}: this system's C library has no {function}") from None
    if called(*(argument.encode() if isinstance(argument, str) else argument for argument in arguments)) != 0:
        error = MountError(f"{doing}: {os.strerror(ctypes.get_errno())}")
        error.errno = ctypes.get_errno()
        raise error


def _mount(source: str | None, target: str, kind: str | None, flags: int, options: str | None = None) -> None:
    doing = f"cannot mount {source} at {target}" if source else f"cannot change the mount {target}"
    _call(doing, "mount", source, target, kind, ctypes.c_ulong(flags), options)


def _bind(source: str, target: str) -> None:
    _mount(source, target, None, _BIND | _RECURSIVE)


def _unshare(flags: int) -> int:
    return 0 if _libc.unshare(flags) == 0 else ctypes.get_errno()


def enter_namespace() -> None:
    """Give this process mounts of its own; MountError names another way where the kernel forbids it."""
    try:
        _separate()
        # mounts made here stay here; those that the machine makes later are seen here as well
        _mount(None, "/", None, _SLAVE | _RECURSIVE)
    except (OSError, MountError) as error:
        why = "the limit user.max_user_namespaces" if getattr(error, "errno", 0) == errno.ENOSPC else error
        raise MountError(
            f"the kernel does not let this user create a mount namespace ({why}); "
            "give --map-paths, which puts folders' own paths into the command instead"
        ) from error


def _separate() -> None:
    user, group = os.geteuid(), os.getegid()
    if _unshare(_NEW_MOUNTS) == 0:
        return
    if failed := _unshare(_NEW_MOUNTS | _NEW_USER):
        raise OSError(failed, os.strerror(failed))
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text(f"{user} {user} 1")
    Path("/proc/self/gid_map").write_text(f"{group} {group} 1")


class Mounter:
    """Makes mounts in this process's namespace."""

    def __init__(self) -> None:
        self._copies: list[str] = []
        """Folders that are replaced by one in memory."""
        self._volumes: list[str] = []
        """Where something is mounted that may be written."""

    def add(self, source: str, path: str, read_only: bool) -> None:
        """Let `path` show `source`, a folder or a file."""
        target = os.path.realpath(path)
        if target == "/":
            raise MountError("nothing can be mounted at /")
        folder = Path(source).is_dir()
        if not os.path.lexists(target):
            self._make(target, folder)
        if Path(target).is_dir() != folder:
            raise MountError(
                f"cannot mount {source} at {path}: one is a folder and the other is not, or does not exist"
            )
        _bind(source, target)
        if read_only:
            self._protect(target)
        elif folder:
            self._volumes.append(target)

    def finish(self) -> None:
        """Let nothing be created where it would vanish."""
        for copy in self._copies:
            _mount(None, copy, None, _REMOUNT | _BIND | _READ_ONLY)

    def _make(self, target: str, folder: bool) -> None:
        parent = Path(target).parent
        while not parent.exists():
            parent = parent.parent
        if str(parent) not in self._copies and not any(parent.is_relative_to(volume) for volume in self._volumes):
            self._copy(str(parent))
        Path(target).parent.mkdir(parents=True, exist_ok=True)
        if folder:
            Path(target).mkdir()
        else:
            Path(target).touch()

    def _copy(self, folder: str) -> None:
        """Replace a folder by one in memory with the same entries; others may delete some of them meanwhile."""
        # descriptors opened before anything is mounted lead to what a mount then hides
        entries: dict[str, int] = {}
        for entry in os.scandir(folder):
            with suppress(FileNotFoundError):
                entries[entry.name] = os.open(entry.path, os.O_PATH | os.O_NOFOLLOW)
        stage = "/tmp" if folder == "/" else folder
        _mount("none", stage, "tmpfs", 0, "mode=755")
        for name, descriptor in entries.items():
            self._copy_entry(descriptor, f"{stage}/{name}")
            os.close(descriptor)
        if folder == "/":
            _turn_to(stage)
            # the copy of the folder that the new root was built on has that root on top of it
            _call("cannot leave the stage", "umount2", stage, _DETACH)
        self._copies.append(folder)

    def _copy_entry(self, descriptor: int, target: str) -> None:
        mode = os.fstat(descriptor).st_mode
        if stat.S_ISLNK(mode):
            Path(target).symlink_to(os.readlink("", dir_fd=descriptor))
            return
        if stat.S_ISDIR(mode):
            Path(target).mkdir()
        else:
            Path(target).touch()
        try:
            _bind(f"/proc/self/fd/{descriptor}", target)
        except MountError as error:
            if error.errno != errno.ENOENT:
                raise
            # it was deleted since it was opened
            (Path(target).rmdir if stat.S_ISDIR(mode) else Path(target).unlink)()

    def _protect(self, target: str) -> None:
        attributes = (ctypes.c_uint64 * 4)(_ATTRIBUTE_READ_ONLY, 0, 0, 0)
        doing = f"cannot mount {target} for reading only (Linux does it since 5.12)"
        _call(doing, "mount_setattr", _AT_FDCWD, target, _AT_RECURSIVE, attributes, ctypes.c_size_t(32))


def _turn_to(folder: str) -> None:
    """Make a mount the root of this process."""
    os.chdir(folder)
    _call("cannot change the root", "pivot_root", ".", ".")
    _call("cannot leave the old root", "umount2", ".", _DETACH)
    os.chdir("/")


def run(request: str, command: Sequence[str]) -> int:
    """Mount, and become the command."""
    plan = json.loads(request)
    try:
        enter_namespace()
        mounter = Mounter()
        for source, path, read_only in sorted(plan["mounts"], key=lambda mount: Path(mount[1]).parts):
            mounter.add(source, path, read_only)
        mounter.finish()
    except OSError as error:
        raise MountError(f"{error.filename or 'a mount'}: {error.strerror}") from error
    try:
        os.chdir(plan["working_dir"])
    except OSError as error:
        raise MountError(f"cannot start in {plan['working_dir']}: {error.strerror}") from error
    if not command:
        return 0
    try:
        os.execvp(command[0], list(command))
    except OSError as error:
        what = "it is too long" if error.errno == errno.E2BIG else error.strerror
        raise MountError(f"cannot run {command[0]}: {what}") from error


def main(arguments: Sequence[str]) -> int:
    """The command line."""
    try:
        return run(arguments[0], arguments[1:])
    except MountError as error:
        sys.stderr.write(f"hasten: error: {error}\n")
        return FAILED


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
