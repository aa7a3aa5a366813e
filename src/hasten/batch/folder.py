"""The output folder of a batch: its identity, its finished rows, and the lock of the process that writes to it."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hasten.core.errors import ConfigError
from hasten.core.files import FOLDER_LOCK, reading, write_text
from hasten.core.text import from_json

JOB, SUMMARY = "job.json", "summary.json"
_WORDS = {
    "input": "the input differs",
    "model": "the model differs",
    "defaults": "the sampling options differ",
    "part": "the part differs",
}
"""What messages say where a field of job.json is another."""


def claim(folder: Path, job: Mapping[str, Any]) -> None:
    """Write down whose results a folder has; ConfigError where it has rows of another job, or other files."""
    file = folder / JOB
    if not file.exists():
        if any(path.name != FOLDER_LOCK and not path.name.endswith(".partial") for path in folder.iterdir()):
            raise ConfigError(f"{folder} is not empty and has no {JOB}; give a new folder for the results")
        write_text(file, json.dumps(job, indent=2) + "\n", sync=True)
        return
    known = _known(file)
    other = next((name for name in _WORDS if known.get(name) != job.get(name)), None)
    if other is None:
        return
    if has_rows(folder):
        raise ConfigError(
            f"{folder} has results of another batch: {_WORDS[other]} ({known.get(other)!r:.120}, now "
            f"{job.get(other)!r:.120}); give another folder"
        )
    # the earlier command did nothing yet: it may have named a model that is not there
    write_text(file, json.dumps(job, indent=2) + "\n", sync=True)


def has_rows(folder: Path) -> bool:
    """Whether any row of a batch is done, or begun to be written."""
    files = (*folder.glob("results-*.jsonl"), *folder.glob("errors-*.jsonl"), *folder.glob(".*.partial"))
    return any(file.stat().st_size for file in files)


def _known(file: Path) -> dict[str, Any]:
    try:
        with reading(str(file)):
            known = from_json(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{file} is not valid JSON ({error}); give a new folder for the results") from None
    return known if isinstance(known, dict) else {}
