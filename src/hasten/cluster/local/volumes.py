"""Volumes of the local backend: folders of this machine, known by names."""

import getpass
import logging
import os
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from hasten.cluster.backend import VolumeRecord
from hasten.cluster.local.plan import Source
from hasten.cluster.local.state import UnreadableError, locked, make_folder, read_json, using, write_json
from hasten.cluster.spec import Volume, checked_name, checked_namespace, mounts
from hasten.core.errors import ExistsError, NotFoundError

_log = logging.getLogger(__name__)


def user_name() -> str:
    """Who runs this process; a number where it has no name."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return str(os.getuid())


class Volumes:
    """The records of one home."""

    def __init__(self, home: Path) -> None:
        self._root = home / "volumes"

    def _path(self, name: str, namespace: str) -> Path:
        file = checked_name(name, "a volume's name") + ".json"
        return self._root / checked_namespace(namespace) / file

    def plan(self, volume: Volume) -> dict[str, Any]:
        """What is written of a volume."""
        return {
            "name": volume.name,
            "namespace": volume.namespace,
            "path": str(Path(volume.path or "").absolute()),
            "read_only": volume.read_only,
            "description": volume.description or "",
        }

    def create(self, volume: Volume) -> None:
        """Make a folder known; ExistsError where the name is taken."""
        path = self._path(volume.name, volume.namespace)
        with locked(self._root / "lock"):
            if path.exists():
                raise ExistsError(
                    f"volume {volume.name} exists in namespace {volume.namespace}: take another name, or delete it"
                )
            make_folder(path.parent)
            write_json(path, {**self.plan(volume), "owner": user_name(), "created": time.time()})

    def all(self, namespace: str | None) -> list[VolumeRecord]:
        """All volumes, of one namespace or of all; a record that cannot be read is left out, with a warning."""
        records = []
        spaces = "*" if namespace is None else checked_namespace(namespace)
        for path in sorted(self._root.glob(f"{spaces}/[!.]*.json")):
            try:
                records.append(_record(path))
            except FileNotFoundError:
                continue
            except UnreadableError as error:
                _log.warning("%s", error)
        return records

    def delete(self, name: str, namespace: str) -> None:
        """Forget a volume; its folder stays."""
        path = self._path(name, namespace)
        with using(path):
            try:
                path.unlink()
            except FileNotFoundError:
                raise NotFoundError(_missing(name, namespace)) from None

    def sources(self, data: Sequence[str], namespace: str) -> dict[str, Source]:
        """The volumes that `--data` names; NotFoundError for one that nobody made."""
        found = {}
        for name, _ in mounts(data, "--data"):
            try:
                found[name] = _source(self._path(name, namespace))
            except FileNotFoundError:
                raise NotFoundError(
                    f"{_missing(name, namespace)}; create it with `data create {name} --path DIR`"
                ) from None
        return found


def _missing(name: str, namespace: str) -> str:
    return f"there is no volume {name} in namespace {namespace}"


def _source(path: Path) -> Source:
    record = read_json(path)
    try:
        return Source(record["path"], record["read_only"])
    except KeyError as error:
        raise UnreadableError(path, f"it is no volume's ({error} is missing)") from error


def _record(path: Path) -> VolumeRecord:
    record = read_json(path)
    try:
        return VolumeRecord(
            name=record["name"],
            namespace=record["namespace"],
            access_mode="ReadOnlyMany" if record["read_only"] else "ReadWriteMany",
            description=record["description"] or record["path"],
            owner=record["owner"],
            created=datetime.fromtimestamp(record["created"], UTC),
        )
    except (KeyError, TypeError) as error:
        raise UnreadableError(path, f"it is no volume's ({error})") from error
