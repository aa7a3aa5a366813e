"""GPUs of this machine: their number, the queue for them, and their owners.

A request is a ticket, a file in HOME/gpus/HOST whose name is its position in the queue. The first in the queue is
served as soon as enough GPUs are free, the others after it, so small requests do not overtake a large one for ever. A
ticket is valid while its job's supervisor lives, so there is no counter that could go wrong, and no daemon.
"""

import logging
import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from hasten.cluster.local.processes import host_name
from hasten.cluster.local.state import Folder, UnreadableError, locked, read_json, write_json
from hasten.cluster.spec import is_number
from hasten.core.errors import ClusterError, ConfigError, NotFoundError

_log = logging.getLogger(__name__)
GPUS_VARIABLE = "HASTEN_GPUS"
VISIBLE = "CUDA_VISIBLE_DEVICES"
_DEVICES = Path("/dev")
_SMI_S = 30.0
_MOST_GPUS = 1024
_TICKET = re.compile(r"[0-9]{20}\.ticket")
_SOONEST_S, _LATEST_S = 0.2, 2.0


def devices(environment: Mapping[str, str] = os.environ) -> list[str]:
    """What CUDA_VISIBLE_DEVICES may name here, one for each GPU.

    HASTEN_GPUS=N says that there are N. Otherwise a CUDA_VISIBLE_DEVICES that is set already limits the choice;
    otherwise the device files /dev/nvidia0, … count, or what nvidia-smi lists.
    """
    configured = environment.get(GPUS_VARIABLE)
    if configured is not None:
        if not is_number(configured) or int(configured) > _MOST_GPUS:
            raise ConfigError(f"{GPUS_VARIABLE}={configured!r} is not a number of GPUs, up to {_MOST_GPUS}")
        return [str(number) for number in range(int(configured))]
    visible = environment.get(VISIBLE)
    if visible is not None:
        return [device.strip() for device in visible.split(",") if device.strip() not in ("", "-1", "NoDevFiles")]
    return [str(number) for number in range(_count_of_devices())]


def _count_of_devices() -> int:
    files = sum(bool(re.fullmatch(r"nvidia\d+", entry.name)) for entry in _DEVICES.iterdir())
    if files or shutil.which("nvidia-smi") is None:
        return files
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=_SMI_S, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return 0
    return sum(line.startswith("GPU ") for line in listed.stdout.split("\n"))


@dataclass(frozen=True)
class Ticket:
    """A request for GPUs."""

    owner: str
    """The folder of the job or server."""
    count: int
    label: str = ""
    devices: list[str] | None = None
    """Those that it was given."""


@dataclass(frozen=True)
class Wait:
    """Why a ticket is not served yet."""

    reason: str
    ahead: int
    """Tickets before it."""

    @property
    def pause(self) -> float:
        """Seconds until the next look: the further back, the longer."""
        return min(_LATEST_S, _SOONEST_S * (1 + self.ahead))


class GpuQueue:
    """Tickets of one home. `clear` is called for an owner that died, before its GPUs are given to others."""

    def __init__(self, home: Path, clear: Callable[[Folder], object]) -> None:
        self._folder = home / "gpus" / host_name()
        self._lock = self._folder / "lock"
        self._clear = clear

    def draw(self, owner: Folder, count: int, label: str = "") -> Path:
        """A ticket for `count` GPUs at the end of the queue. It counts only while the owner's lock is held."""
        with locked(self._lock):
            last = max((int(path.stem) for path in self._paths()), default=0)
            path = self._folder / f"{max(time.time_ns(), last + 1):020d}.ticket"
            write_json(path, asdict(Ticket(str(owner.path), count, label)))
        return path

    def of(self, owner: Folder, label: str | None = None) -> list[Path]:
        """Tickets of a job or server: all, or those of a label."""
        mine = [(path, ticket) for path, ticket in self._tickets() if ticket.owner == str(owner.path)]
        return [path for path, ticket in mine if label in (None, ticket.label)]

    def take(self, path: Path, gpus: list[str]) -> list[str] | Wait:
        """Devices for a ticket, or why there are none yet. `gpus` is `devices()`."""
        with locked(self._lock):
            tickets = self._living()
            mine = next((ticket for at, ticket in tickets if at == path), None)
            if mine is None:
                raise ClusterError(f"the ticket {path} was deleted")
            if mine.devices is not None:
                return list(mine.devices)
            free = [gpu for gpu in gpus if gpu not in _given(tickets)]
            before = sum(at < path and ticket.devices is None for at, ticket in tickets)
            if before == 0 and len(free) >= mine.count:
                given = free[: mine.count]
                write_json(path, asdict(replace(mine, devices=given)))
                return given
        return Wait(_waits(mine.count, len(free), len(gpus), before), before)

    def give_back(self, path: Path) -> None:
        """Release a ticket and its GPUs."""
        path.unlink(missing_ok=True)

    def allocated(self) -> int:
        """How many GPUs are given to somebody who lives."""
        with locked(self._lock):
            return len(_given(self._living()))

    def _paths(self) -> list[Path]:
        """The tickets' files, in the order of the queue. Other files are not of the queue."""
        found = sorted(self._folder.glob("*.ticket"))
        strange = [path for path in found if not _TICKET.fullmatch(path.name)]
        for path in strange:
            _log.warning("%s is not a ticket and is ignored: move it elsewhere", path)
        return [path for path in found if path not in strange]

    def _tickets(self) -> Iterable[tuple[Path, Ticket]]:
        for path in self._paths():
            try:
                yield path, _ticket(path)
            except FileNotFoundError:
                continue
            except UnreadableError as error:
                _log.warning("%s; it is ignored", error)

    def _living(self) -> list[tuple[Path, Ticket]]:
        """All tickets but those of owners that died; their processes are ended first."""
        return [(path, ticket) for path, ticket in self._tickets() if self._holds(path, ticket)]

    def _holds(self, path: Path, ticket: Ticket) -> bool:
        owner = Folder(Path(ticket.owner))
        try:
            lock = owner.try_lock()
        except NotFoundError:
            path.unlink(missing_ok=True)
            return False
        if lock is None:
            return True
        os.close(lock)
        self._clear(owner)
        path.unlink(missing_ok=True)
        return False


def _ticket(path: Path) -> Ticket:
    record = read_json(path)
    try:
        ticket = Ticket(**record)
    except TypeError as error:
        raise UnreadableError(path, str(error)) from error
    devices = ticket.devices
    good = isinstance(ticket.owner, str) and isinstance(ticket.count, int) and isinstance(ticket.label, str)
    if not good or not (devices is None or isinstance(devices, list)):
        raise UnreadableError(path, "it is no ticket's")
    return ticket


def _given(tickets: Iterable[tuple[Path, Ticket]]) -> set[str]:
    return {device for _, ticket in tickets for device in ticket.devices or ()}


def _waits(count: int, free: int, total: int, before: int) -> str:
    needed = f"waits for {count} GPU{'s' * (count > 1)}, {free} of {total} {'is' if free == 1 else 'are'} free"
    return needed if before == 0 else f"{needed}, {before} before it in the queue"
