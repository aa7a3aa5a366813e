"""Control groups of this process, of version 1 and 2: where the limits of a container are written."""

from collections.abc import Iterator
from pathlib import Path

SYSTEM = Path("/sys/fs/cgroup")
OWN = Path("/proc/self/cgroup")


def own_groups(controller: str, system: Path = SYSTEM, own: Path = OWN) -> Iterator[Path]:
    """Folders of the groups of this process that a controller may limit, each with those that it lies in.

    A container may see its own group as the root, whatever path the system names.
    """
    try:
        lines = own.read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        for mounted in (system / controllers, *(system / name for name in controllers.split(","))):
            group = mounted / path.lstrip("/")
            yield from (folder for folder in (group, *group.parents) if folder.is_relative_to(mounted))


def words(file: Path) -> list[str]:
    """What is in a file of a group; nothing where it is not there."""
    try:
        return file.read_text(encoding="ascii").split()
    except OSError:
        return []


def number(file: Path) -> int | None:
    """The number in a file of a group; None where there is none: no file, or `max`."""
    found = words(file)
    return int(found[0]) if len(found) == 1 and found[0].isdecimal() else None
