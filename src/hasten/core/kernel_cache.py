"""The folder in which Triton's compiler keeps compiled kernels: who can write to it can run code in this process."""

import contextlib
import grp
import os
import pwd
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path

from hasten.core.errors import ConfigError

_ROOT = 0


def kernel_cache(environment: Mapping[str, str] = os.environ) -> Path:
    """The folder, by the variables that Triton's compiler looks at."""
    folder = environment.get("TRITON_CACHE_DIR")
    return Path(folder) if folder else Path(environment.get("TRITON_HOME") or "~").expanduser() / ".triton" / "cache"


def check_kernel_cache(folder: Path) -> None:
    """ConfigError where another user than root can write to the folder of compiled kernels; makes it if it is missing.

    A group may write that has no other members.
    """
    with contextlib.suppress(OSError):  # Triton's compiler says what is wrong with a folder that cannot be made
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if not folder.is_dir():
        return
    for path, found, is_above in _relevant(folder.resolve()):
        why = _open_to_others(found, is_above=is_above)
        if why is not None:
            raise ConfigError(
                f"{path} {why}, who could run code here by compiled kernels in {folder}: change that (chmod go-w, "
                "chown), or set TRITON_CACHE_DIR to a folder of your own"
            )


def _relevant(folder: Path) -> Iterator[tuple[str, os.stat_result, bool]]:
    """The folder, those that it lies in, which are `above`, and those of single kernels in it."""
    yield str(folder), folder.stat(), False
    for path in folder.parents:
        yield str(path), path.stat(), True
    with os.scandir(folder) as entries:
        for entry in entries:
            with contextlib.suppress(FileNotFoundError):  # another process's temporary folder
                if not entry.is_symlink():
                    yield entry.path, entry.stat(), False


def _open_to_others(found: os.stat_result, *, is_above: bool) -> str | None:
    """What lets other users write to what is found, None if nothing does; what is `is_above` may be sticky, as /tmp."""
    safe = {os.geteuid(), _ROOT, *((_overflow_user(),) if is_above else ())}
    if found.st_uid not in safe:
        return f"belongs to user {found.st_uid}"
    if is_above and found.st_mode & stat.S_ISVTX:
        return None
    if found.st_mode & stat.S_IWOTH:
        return "can be written to by all users"
    if found.st_mode & stat.S_IWGRP and _has_others(found.st_gid):
        return f"can be written to by the members of group {found.st_gid}"
    return None


def _overflow_user() -> int:
    """Who owns files of users outside this process's user namespace, as whom nobody in it can act."""
    return int(Path("/proc/sys/kernel/overflowuid").read_text())


def _has_others(group: int) -> bool:
    """Whether a user other than this one and root is known to be a member of a group."""
    own = {os.geteuid(), _ROOT}
    if any(user.pw_gid == group and user.pw_uid not in own for user in pwd.getpwall()):
        return True
    try:
        members = grp.getgrgid(group).gr_mem
    except KeyError:
        return False
    known = {user.pw_name for user in pwd.getpwall() if user.pw_uid in own}
    return any(name not in known for name in members)
