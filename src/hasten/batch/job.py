"""A batch: every row of a file is computed once, however often the process is killed."""

import json
import math
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import msgspec

from hasten.batch.engine import BatchEngine, LLMEngine, Refused
from hasten.batch.folder import SUMMARY, claim
from hasten.batch.lines import Answer, error_line
from hasten.batch.part import Part
from hasten.batch.requests import RowReader
from hasten.batch.shards import ShardWriter
from hasten.batch.source import Row, RowIndex, id_of, open_rows
from hasten.checkpoint.hub import model_name
from hasten.core.errors import ConfigError, EngineError, HastenError, InvalidRequestError
from hasten.core.files import held, write_text
from hasten.core.progress import ProgressBar, progress_bar
from hasten.core.types import Request, RequestOutput
from hasten.server.openai.params import OpenAIError, completion_params, decode
from hasten.server.openai.types import CompletionRequest

if TYPE_CHECKING:
    from hasten.engine.llm import LLM

DEFAULT_ROWS_PER_SHARD = 10_000
_NOTE_EVERY_S = 0.2
_REFILL = 64
"""Prompts that are missing in the window of an engine, or a quarter of it, before it is filled again."""
_DONE = 1
_WHOLE = Part()
_encode, _decoder = msgspec.json.Encoder().encode, msgspec.json.Decoder(CompletionRequest)


@dataclass(frozen=True)
class BatchSummary:
    """What came of a batch."""

    output: str
    rows: int
    results: int
    errors: int
    resumed: int
    """Rows that earlier runs had done."""
    prompt_tokens: int
    """Of this run's results, as the other figures are."""
    completion_tokens: int
    seconds: float
    """From the first row to the last, without loading the model."""

    @property
    def tokens_per_second(self) -> float:
        """Generated tokens."""
        return self.completion_tokens / self.seconds if self.seconds else 0.0


class BatchJob:
    """The rows of `source` on their way into the folder `output`; a context manager that holds the folder.

    With a `part`, other processes compute the others, and its folder is one within `output`.
    `model` is what the model is called, by which rows may name it, and by the last part of that name and by `names`.
    `defaults` are fields of requests that do not have them. ConfigError where the folder has another job's results.
    """

    def __init__(
        self,
        source: str | os.PathLike[str],
        output: str | os.PathLike[str],
        *,
        model: str,
        names: Sequence[str] = (),
        defaults: Mapping[str, Any] | None = None,
        rows_per_shard: int = DEFAULT_ROWS_PER_SHARD,
        retry_errors: bool = False,
        part: Part = _WHOLE,
    ) -> None:
        if rows_per_shard < 1:
            raise ConfigError(f"rows_per_shard must be at least 1, got {rows_per_shard}")
        self._source, self._part = open_rows(Path(source)), part
        self.folder = part.folder(Path(output))
        self._models = tuple(dict.fromkeys((*names, model, model_name(model))))
        self._defaults = dict(defaults or {})
        _check_defaults(self._defaults)
        self._index = RowIndex.of(self._source, part)
        if self.folder.is_file():
            raise ConfigError(f"{self.folder} is a file; give a new folder for the results")
        self._stack = ExitStack()
        with ExitStack() as stack:
            stack.enter_context(held(self.folder, "this batch"))
            claim(self.folder, self._described(model))
            self._results = stack.enter_context(ShardWriter(self.folder, "results", rows_per_shard))
            self._errors = stack.enter_context(ShardWriter(self.folder, "errors", rows_per_shard))
            self._recover(retry_errors)
            self._stack = stack.pop_all()

    def _described(self, model: str) -> dict[str, Any]:
        part = {} if self._part.is_whole else {"part": str(self._part)}
        return {"input": self._source.digest, "model": model, "defaults": self._defaults, **part}

    def _recover(self, retry_errors: bool) -> None:
        """Read what earlier runs have done."""
        self._done = bytearray(self._index.size)
        if retry_errors:
            self._errors.discard()
        self._counts = {"results": self._mark(self._results), "errors": self._mark(self._errors)}
        self.resumed = sum(self._counts.values())

    def _mark(self, writer: ShardWriter) -> int:
        count = 0
        for number in writer.recover():
            if number >= self._index.size or not self._part.has(number) or self._done[number]:
                raise ConfigError(f"{self.folder} is damaged: it has row {number} twice or too many; use a new folder")
            self._done[number] = _DONE
            count += 1
        return count

    @property
    def left(self) -> int:
        """Rows that have neither a result nor an error."""
        return self._index.rows - self._counts["results"] - self._counts["errors"]

    def run(self, engine: BatchEngine, *, show_progress: bool = True) -> BatchSummary:
        """Compute what is left. A failure of the engine is raised; what is done by then stays done."""
        run = _Run(engine, RowReader(engine, self._models, self._defaults), self)
        with progress_bar("batch", self._index.rows, show=show_progress) as bar:
            bar.advance(self.resumed)
            run.compute(bar)
        return self._ended(run.prompt_tokens, run.completion_tokens, run.seconds)

    def finish(self) -> BatchSummary:
        """The summary of a job of which nothing was left to compute."""
        return self._ended(0, 0, 0.0)

    def _ended(self, prompt_tokens: int, completion_tokens: int, seconds: float) -> BatchSummary:
        self._results.seal()
        self._errors.seal()
        summary = BatchSummary(
            output=str(self.folder),
            rows=self._index.rows,
            results=self._counts["results"],
            errors=self._counts["errors"],
            resumed=self.resumed,
            prompt_tokens=prompt_tokens,
            completion_tokens=completion_tokens,
            seconds=seconds,
        )
        write_text(self.folder / SUMMARY, json.dumps(asdict(summary), indent=2) + "\n", sync=True)
        return summary

    def unfinished(self) -> Iterator[Row]:
        """The rows that are not done."""
        for row in self._source.rows():
            if row.number >= self._index.size:
                raise ConfigError(f"{self._source.path} grew while it was read; start again with a new folder")
            if self._part.has(row.number) and not self._done[row.number]:
                yield row

    def is_repeated(self, row: Row) -> bool:
        """Whether an earlier row has the same id."""
        return row.number in self._index.repeated

    def write_result(self, row: Row, line: bytes) -> None:
        """Write what came of a row."""
        self._results.write(line)
        self._done[row.number] = _DONE
        self._counts["results"] += 1

    def write_error(self, row: Row, line: bytes) -> None:
        """Write why nothing came of a row."""
        self._errors.write(line)
        self._done[row.number] = _DONE
        self._counts["errors"] += 1

    def __enter__(self) -> "BatchJob":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stack.close()


def _check_defaults(defaults: Mapping[str, Any]) -> None:
    """Raise what every row would be refused for."""
    for name, value in defaults.items():
        _require_finite(name, value)
    try:
        request = decode(_encode({"model": "", "prompt": "", **defaults}), _decoder)
        completion_params(request, 1)
    except (OpenAIError, InvalidRequestError) as error:
        raise ConfigError(str(error)) from None


def _require_finite(name: str, value: Any) -> None:
    """ConfigError for NaN and infinity, of which JSON would make null: the model's own default."""
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{name} must be finite, got {value}")
    if isinstance(value, Mapping):
        value = list(value.values())
    for each in value if isinstance(value, list | tuple) else ():
        _require_finite(name, each)


class _Run:
    """The rows that are in the engine, which never has more prompts than its window."""

    def __init__(self, engine: BatchEngine, reader: RowReader, job: BatchJob) -> None:
        self._engine = engine
        self._reader = reader
        self._job = job
        self._answers: dict[int, Answer] = {}
        self._in_engine = set[str]()
        """Ids of prompts: the row's number and the prompt's index in it."""
        self.prompt_tokens = self.completion_tokens = 0
        self.seconds = 0.0

    def compute(self, bar: ProgressBar) -> None:
        """Compute all rows that are not done; what is under way when this fails is withdrawn."""
        rows, start, noted = self._job.unfinished(), time.perf_counter(), 0.0
        try:
            while self._fill(rows, bar):
                for output in self._engine.step():
                    if self._take(output):
                        bar.advance()
                self.seconds = time.perf_counter() - start
                if self.seconds - noted >= _NOTE_EVERY_S:
                    noted = self.seconds
                    bar.note(f"{self.completion_tokens / self.seconds:.0f} tokens/s")
        finally:
            self._withdraw(self._in_engine)

    def _fill(self, rows: Iterator[Row], bar: ProgressBar) -> bool:
        """Give the engine rows until its window is full; whether it has anything to do.

        Many at once, since reading a row alone, between two steps, takes several times as long.
        """
        window = self._engine.window
        if len(self._in_engine) > window - max(1, min(_REFILL, window // 4)):
            return True
        while len(self._in_engine) < window:
            row = next(rows, None)
            if row is None:
                self._engine.no_more()
                break
            try:
                self._begin(row)
            except EngineError:
                raise
            except HastenError as error:
                self._job.write_error(row, error_line(row, error))
                bar.advance()
        return bool(self._in_engine)

    def _begin(self, row: Row) -> None:
        """Queue a row's prompts, all of them or none."""
        name = id_of(row)
        if self._job.is_repeated(row):
            raise InvalidRequestError(f"custom_id {name!r:.200} is also that of an earlier row; ids must differ")
        request = self._reader.read(row)
        queued = set[str]()
        try:
            for index, (prompt, params) in enumerate(zip(request.prompts, request.params, strict=True)):
                each = f"{row.number}.{index}"
                salt = request.cache_salt
                self._add(Request(request_id=each, prompt_token_ids=tuple(prompt), params=params, cache_salt=salt))
                queued.add(each)
        except BaseException:
            self._withdraw(queued)
            raise
        self._answers[row.number] = Answer(row, name, request)
        self._in_engine |= queued

    def _add(self, request: Request) -> None:
        try:
            self._engine.add(request)
        except InvalidRequestError as error:
            raise _refusal(request.request_id, str(error)) from None

    def _withdraw(self, ids: Iterable[str]) -> None:
        for each in ids:
            self._engine.abort(each)

    def _take(self, output: RequestOutput | Refused) -> bool:
        """Take what came of a prompt; whether its row is done by it."""
        self._in_engine.discard(output.request_id)
        number, index = map(int, output.request_id.split("."))
        answer = self._answers.get(number)
        if answer is None:
            return False  # another prompt of its row has failed
        try:
            if isinstance(output, Refused):
                raise _refusal(output.request_id, output.reason)
            line = answer.take(index, output)
        except HastenError as error:
            del self._answers[number]
            self._job.write_error(answer.row, error_line(answer.row, error))
            return True
        if line is None:
            return False
        del self._answers[number]
        self.prompt_tokens += answer.usage.prompt_tokens
        self.completion_tokens += answer.usage.completion_tokens
        self._job.write_result(answer.row, line)
        return True


def _refusal(request_id: str, reason: str) -> InvalidRequestError:
    """Why the engine takes no such prompt, of which its row has another name."""
    return InvalidRequestError(reason.removeprefix(f"request {request_id}: "))


def run_batch(
    llm: "LLM",
    source: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    names: Sequence[str] = (),
    defaults: Mapping[str, Any] | None = None,
    rows_per_shard: int = DEFAULT_ROWS_PER_SHARD,
    retry_errors: bool = False,
    part: str | None = None,
    use_tqdm: bool = True,
) -> BatchSummary:
    """Compute all rows of a file of requests with an `LLM`, and write the results to a folder.

    Called again after it was killed, it goes on where it was. `part`: `INDEX/COUNT`, the rows of one of several
    processes. See BatchJob for the other arguments.
    """
    options: dict[str, Any] = {"rows_per_shard": rows_per_shard, "retry_errors": retry_errors}
    options["part"] = _WHOLE if part is None else Part.parse(part)
    with BatchJob(source, output, model=llm.model, names=names, defaults=defaults, **options) as job:
        return job.run(LLMEngine(llm), show_progress=use_tqdm)
