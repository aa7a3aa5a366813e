"""Convert a checkpoint: any source to FasterTransformer's format or to ranked safetensors."""

import shutil
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import Any

import torch

from hasten.checkpoint.faster_transformer.family import Family
from hasten.checkpoint.faster_transformer.folder import writable_family
from hasten.checkpoint.faster_transformer.source import FasterTransformerSource
from hasten.checkpoint.files import read_json
from hasten.checkpoint.hub import resolve_model
from hasten.checkpoint.plan import generation_eos, side_folder
from hasten.checkpoint.source import Source
from hasten.checkpoint.sources import open_source
from hasten.checkpoint.target import Target, clear_errors, copy_side_files
from hasten.checkpoint.writers import (
    FasterTransformerWriter,
    Format,
    Part,
    RankedSafetensorsWriter,
    StoppedError,
    Writer,
)
from hasten.core.dtypes import DTypeName
from hasten.core.errors import CheckpointError, ConfigError, UnsupportedError
from hasten.core.model_config import ModelConfig
from hasten.core.parallel_config import ParallelConfig


@dataclass(frozen=True)
class Conversion:
    """What to convert, into what."""

    input_dir: str
    """A folder or a Hugging Face id."""
    output_dir: str
    ranks: int = 1
    dtype: DTypeName = "fp32"
    format: Format | None = None
    """None: FasterTransformer's for a model that it could compute, else safetensors."""
    workers: int = 1
    by_shard: bool = False
    """One input file open at a time."""

    def __post_init__(self) -> None:
        if self.workers < 1:
            raise ConfigError(f"processes must be at least 1, got {self.workers}")


@dataclass(frozen=True)
class Opened:
    """Progress: the input is open and found good; nothing is written yet."""

    source: Source
    nbytes: int
    """What will be written."""
    format: Format
    """What will be written."""
    label: str
    """`HF >> FT`, and the like."""
    replaced: Path | None
    """The rank folder that the new one will replace."""


@dataclass(frozen=True)
class Wrote:
    """Progress: a part is written; parts come in the order of the weights."""

    part: Part
    path: Path
    """Where it will lie in the end."""


Report = Callable[[Opened | Wrote], None]


def convert(job: Conversion, report: Report = lambda _: None) -> None:
    """Convert a checkpoint; on any error, and on a kill, OUT stays as it was.

    CheckpointError, ConfigError and UnsupportedError say what is wrong and what to do.
    """
    parallel = ParallelConfig(tensor_parallel_size=job.ranks)
    given = resolve_model(job.input_dir)
    source = open_source(given, job.ranks)
    parallel.validate(source.config)
    family = _family(job.format, source.config)
    _check_apart(source, given, Path(job.output_dir), f"{job.ranks}-gpu")
    target = Target(Path(job.output_dir), job.ranks)
    side = side_folder(source)
    raw = read_json(side / "config.json") if (side / "config.json").is_file() else None
    target.check_model(raw)
    if source.manifest is not None:
        source.manifest.verify(source.folder, source.manifest.files)
    with clear_errors(job.output_dir, report) as notify, target.prepare() as new:
        writer = _writer(job, source, family, raw or {}, new / target.name)
        _check_space(writer.nbytes, new, job.output_dir)
        replaced = target.folder if target.folder.exists() else None
        notify(Opened(source, writer.nbytes, writer.format, f"{source.label} >> {writer.label}", replaced))
        _write(writer, job, lambda part: notify(Wrote(part, target.folder / part.file)))
        copy_side_files(side, new)


def _family(name: Format | None, config: ModelConfig) -> Family | None:
    """The family that a model is written as in FasterTransformer's format; None: it becomes safetensors."""
    try:
        return None if name == "safetensors" else writable_family(config)
    except UnsupportedError:
        if name is None:
            return None
        raise


def _check_apart(source: Source, given: Path, out: Path, name: str) -> None:
    taken = (out.resolve(), out.resolve() / name)
    if given.resolve() == out.resolve() or source.folder.resolve() in taken:
        raise ConfigError(f"the output {out / name} would take the place of the input; give another output folder")


def _writer(job: Conversion, source: Source, family: Family | None, raw: Mapping[str, Any], folder: Path) -> Writer:
    if family is None:
        return RankedSafetensorsWriter(source, folder, job.ranks, job.dtype, generation_eos(source))
    name = source.model_name if isinstance(source, FasterTransformerSource) else family.name(job.input_dir, raw)
    return FasterTransformerWriter(source, folder, job.ranks, job.dtype, family, name)


def _check_space(nbytes: int, folder: Path, shown: str) -> None:
    free = shutil.disk_usage(folder).free
    if free < nbytes:
        raise CheckpointError(
            f"no space left for {shown}: the output takes {nbytes / 1e6:,.1f} MB beside what is there, "
            f"{free / 1e6:,.1f} MB are free"
        )


def _write(writer: Writer, job: Conversion, wrote: Callable[[Part], None]) -> None:
    writer.start()
    batches: Iterable[tuple[Part, ...]] = (
        tuple(part for spec in specs for part in writer.parts[spec.name]) for specs in writer.source.batches()
    )
    if not job.by_shard:
        batches = [tuple(part for batch in batches for part in batch)]
    with _Workers(job.workers) as workers:
        for batch in batches:
            workers.run(writer.write, batch, wrote)
            writer.source.release()
    writer.finish()


class _Workers:
    """Threads that write parts at once: casts, transposes, checksums and writes all run outside Python's lock."""

    def __init__(self, count: int) -> None:
        self._stop = Event()
        self._torch_threads = torch.get_num_threads()
        # one thread a worker: the workers are the parallelism, and torch's own would only contend with them
        self._pool = ThreadPoolExecutor(count, "hasten-convert", torch.set_num_threads, (1,))
        self._first_error: BaseException | None = None

    def __enter__(self) -> "_Workers":
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._pool.shutdown(cancel_futures=True)
        torch.set_num_threads(self._torch_threads)

    def run(self, work: Callable[[Part, Event], None], parts: Iterable[Part], done: Callable[[Part], None]) -> None:
        """Do all parts and report each in order; the first error of any of them ends the rest and is raised."""
        futures: list[tuple[Part, Future[None]]] = [
            (part, self._pool.submit(self._run_part, work, part)) for part in parts
        ]
        for part, future in futures:
            try:
                future.result()
            except StoppedError:
                assert self._first_error is not None
                raise self._first_error from None
            done(part)

    def _run_part(self, work: Callable[[Part, Event], None], part: Part) -> None:
        try:
            if self._stop.is_set():
                raise StoppedError
            work(part, self._stop)
        except StoppedError:
            raise
        except BaseException as error:
            if not self._stop.is_set():
                self._first_error = error
                self._stop.set()
            raise
