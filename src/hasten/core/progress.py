"""Progress bars on standard error: shown on a terminal, and nothing anywhere else."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress, ProgressColumn, TaskID


class ProgressBar:
    """A bar that advances; one that is not shown does nothing."""

    def __init__(self, progress: "Progress | None" = None, task: "TaskID | None" = None) -> None:
        self._progress = progress
        self._task = task

    def advance(self, amount: float = 1) -> None:
        """Move on by `amount` of the total."""
        if self._progress is not None and self._task is not None:
            self._progress.advance(self._task, amount)

    def note(self, text: str) -> None:
        """Replace the text behind the bar, such as a rate."""
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, note=text)


@contextmanager
def progress_bar(
    description: str, total: float | None, *, unit: Literal["bytes", "items"] = "items", show: bool = True
) -> Iterator[ProgressBar]:
    """A bar up to `total` while the block runs, removed at its end; `total` None: the amount is unknown.

    It appears only if `show`, standard error is a terminal, and rich is installed.
    """
    console = _terminal() if show else None
    if console is None:
        yield ProgressBar()
        return
    from rich.progress import Progress

    with Progress(*_columns(unit), console=console, transient=True) as progress:
        yield ProgressBar(progress, progress.add_task(description, total=total, note=""))


def _terminal() -> "Console | None":
    """Standard error as a console, None where it is no terminal that can redraw a line."""
    if sys.stderr is None or not sys.stderr.isatty():
        return None
    try:
        from rich.console import Console
    except ImportError:  # core runs without rich
        return None
    console = Console(stderr=True)
    return console if console.is_terminal and not console.is_dumb_terminal else None


def _columns(unit: str) -> "tuple[ProgressColumn, ...]":
    from rich import progress

    start = (progress.TextColumn("{task.description}"), progress.BarColumn())
    if unit == "bytes":
        amounts: tuple[ProgressColumn, ...] = (progress.DownloadColumn(), progress.TransferSpeedColumn())
    else:
        amounts = (progress.MofNCompleteColumn(),)
    return (*start, *amounts, progress.TimeRemainingColumn(), progress.TextColumn("{task.fields[note]}"))
