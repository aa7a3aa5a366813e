"""Sections of a report on disk, so that a run that was ended goes on where it was."""

import hashlib
import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from hasten.bench.report import to_json
from hasten.core.files import write_text

Kind = TypeVar("Kind")
_KEY_LETTERS = 16


class SectionStore:
    """A folder with a file for each section that has been measured, known by everything that it depends on.

    `identity` is what all sections depend on; `fresh`: measure again what is there already. `say` receives progress.
    """

    def __init__(
        self, folder: Path, identity: Mapping[str, Any], *, fresh: bool = False, say: Callable[[str], None]
    ) -> None:
        self._folder = folder
        self._identity = identity
        self._fresh = fresh
        self._say = say

    def has(self, name: str, kind: type[Any], options: Mapping[str, Any]) -> bool:
        """Whether a section was measured before under the same options, and will be read."""
        return not self._fresh and _read(self._file(name, options), kind) is not None

    def section(self, name: str, kind: type[Kind], options: Mapping[str, Any], measure: Callable[[], Kind]) -> Kind:
        """A section of the given type: read where it was measured under the same options, measured otherwise."""
        file = self._file(name, options)
        found = None if self._fresh else _read(file, kind)
        if found is not None:
            self._say(f"{name}: measured before ({file})")
            return found
        self._say(f"{name} …")
        start = time.perf_counter()
        measured = measure()
        _write(file, measured)
        self._say(f"{name}: {time.perf_counter() - start:.1f} s")
        return measured

    def _file(self, name: str, options: Mapping[str, Any]) -> Path:
        known = json.dumps(
            to_json({"section": name, **self._identity, "options": options}), sort_keys=True, default=str
        )
        key = hashlib.sha256(known.encode()).hexdigest()[:_KEY_LETTERS]
        words = "".join(letter if letter.isalnum() else "-" for letter in name)
        return self._folder / f"{words}-{key}.json"


def _read(file: Path, kind: type[Kind]) -> Kind | None:
    """A section; None where there is none, or a file that is not of its type."""
    import msgspec

    try:
        return msgspec.json.decode(file.read_bytes(), type=kind)
    except (OSError, msgspec.DecodeError, UnicodeDecodeError):
        return None


def _write(file: Path, section: Any) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    write_text(file, json.dumps(to_json(section), ensure_ascii=False, indent=1))
