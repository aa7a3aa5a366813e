"""Results of benchmarks as JSON and as tables."""

import dataclasses
import json
import os
import platform
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from hasten import __version__
from hasten.core.errors import ConfigError
from hasten.core.files import write_text

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Spread:
    """A measure over repetitions, percentiles from the best repetition on: the 99th is that of the slowest 1%."""

    best: float
    p50: float
    p99: float

    @classmethod
    def of(cls, seconds: Sequence[float], figure: Callable[[float], float] = float) -> "Spread":
        """Of the times of repetitions, or of what `figure` makes of a time, such as tokens per second."""
        found = min(seconds), np.percentile(seconds, 50), np.percentile(seconds, 99)
        return cls(*(figure(float(each)) for each in found))


@dataclass(frozen=True)
class Environment:
    """Where and with what a figure was measured."""

    hasten: str
    torch: str
    transformers: str
    python: str
    device: str
    threads: int
    dtype: str


def environment(device: "torch.device", dtype: "torch.dtype") -> Environment:
    """This process's versions, and what it computed on and in."""
    import torch  # clients of a server use this module without it

    return Environment(
        hasten=__version__,
        torch=torch.__version__,
        transformers=version("transformers"),
        python=platform.python_version(),
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu(),
        threads=torch.get_num_threads(),
        dtype=str(dtype).removeprefix("torch."),
    )


def _cpu() -> str:
    import torch

    return f"CPU, {torch.backends.cpu.get_cpu_capability()}"


def to_json(value: Any) -> Any:
    """Dataclasses, and containers of them, as plain JSON values."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: to_json(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {key: to_json(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [to_json(entry) for entry in value]
    return value


def print_json(report: Mapping[str, Any]) -> None:
    """Print a report as one JSON object."""
    sys.stdout.write(json.dumps(to_json(report), ensure_ascii=False) + "\n")


def write_json(path: str, report: Mapping[str, Any]) -> None:
    """Write a report to a file; where that fails, print it, since it may have taken hours, and raise ConfigError."""
    try:
        write_text(Path(path), json.dumps(to_json(report), ensure_ascii=False, indent=1) + "\n")
    except OSError as error:
        print_json(report)
        raise ConfigError(
            f"cannot write the results to {path}: {error.strerror}; they are on standard output instead"
        ) from error


def require_writable(*paths: str | None) -> None:
    """Raise ConfigError if results could not be written to each path: better before hours of work than after."""
    given = [path for path in paths if path is not None]
    for path in given:
        _require_writable(path)
    files = [path for path in given if Path(path).is_file() or not Path(path).exists()]
    for index, path in enumerate(files):
        if Path(path).resolve() in (Path(other).resolve() for other in files[:index]):
            raise ConfigError(f"{path} is given for two results, of which the second would replace the first")


def _require_writable(path: str) -> None:
    folder = Path(path).absolute().parent
    if Path(path).is_dir():
        raise ConfigError(f"cannot write the results to {path}: it is a folder; give a file")
    if not folder.is_dir():
        raise ConfigError(
            f"cannot write the results to {path}: there is no folder {Path(path).parent}; create it first"
        )
    if not os.access(path if Path(path).exists() else folder, os.W_OK):
        raise ConfigError(f"cannot write the results to {path}: it is read-only, or you may not write there")


_ANY_WIDTH = 1000
"""More than any table takes."""


class _Output(Console):
    """Standard output. A reader that has gone is a BrokenPipeError, not rich's SystemExit(1)."""

    def on_broken_pipe(self) -> None:
        raise  # the error that rich handles


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a title and a table; all columns but the first hold figures.

    On a terminal that is too narrow for the table, each row is a paragraph with one line per figure.
    """
    table = Table(box=box.SIMPLE_HEAD)
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index else "left", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    console = _Output()
    # a pipe or a file has no width that figures would have to be cut to
    console = console if console.is_terminal else _Output(width=200)
    console.print(title, highlight=False)
    if console.measure(table, options=console.options.update(width=_ANY_WIDTH)).maximum <= console.width:
        console.print(table)
        return
    width = max(map(len, columns))
    for row in rows:
        console.print(f"\n{_heading(columns[0], row[0])}", highlight=False, markup=False)
        for column, cell in zip(columns[1:], row[1:], strict=True):
            if cell:
                console.print(f"  {column:<{width}}  {cell}", highlight=False, markup=False)


def _heading(column: str, cell: str) -> str:
    """What stands above a row's figures: its first cell, and what that is where it is a number."""
    try:
        float(cell)
    except ValueError:
        return cell
    return f"{column} {cell}"
