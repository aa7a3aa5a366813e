"""Accuracy and time on LAMBADA: the last word of each text, from the text before it.

The algorithm is that of FasterTransformer's `bloom_lambada.py`: context and target (a space and the last word) are
encoded as a pair; a batch generates as many tokens as its longest target has; an answer is right only if all tokens of
the target are; the time is that of the generate calls alone.
"""

import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NotRequired, TypedDict

from hasten.bench.engines import Engine
from hasten.bench.peers import NotMeasured, fastest, has_failed
from hasten.bench.report import Environment
from hasten.core.errors import ConfigError, InvalidRequestError
from hasten.core.files import reading
from hasten.core.text import from_json, require_utf8, utf8_lines
from hasten.engine.text import Tokenizer


@dataclass(frozen=True)
class Sample:
    """A text cut before its last word."""

    prompt: str
    target: str
    prompt_ids: list[int]
    target_ids: list[int]


@dataclass(frozen=True)
class Answer:
    """What an engine made of one sample."""

    prompt: str
    model_answer: str
    target: str
    prompt_ids: list[int]
    answer_ids: list[int]
    target_ids: list[int]
    right: bool


@dataclass(frozen=True)
class LambadaResult:
    """What an engine made of all samples."""

    engine: str
    accuracy: float
    """Per cent."""
    right: int
    total: int
    seconds: float
    """Of the generate calls alone; the median where the samples were run more than once."""
    answers: list[Answer]
    repetition_seconds: list[float] = field(default_factory=list)
    """Of each run of all samples."""

    @property
    def line(self) -> str:
        """The closing line of the reference, to the letter."""
        return f"Accuracy: {self.accuracy:0.4f}% ({self.right}/{self.total}) (elapsed time: {self.seconds:.4f} sec)"


@dataclass(frozen=True)
class Comparison:
    """hasten and another engine on the same samples."""

    engine: str
    speedup: float
    """How many times as fast hasten is."""
    differing_samples: int
    """Samples to which the two gave other tokens."""


class LambadaReport(TypedDict):
    """What is written: one engine, or others and hasten, on the same samples."""

    environment: Environment
    results: list[LambadaResult]
    speedup: NotRequired[float]
    """That of the comparison with `compared_with`."""
    differing_samples: NotRequired[int]
    """Those of the same comparison."""
    compared_with: NotRequired[str]
    """The engine that is quoted: the faster of Hugging Face's, where any is measured."""
    comparisons: NotRequired[list[Comparison]]
    not_measured: NotRequired[list[NotMeasured]]


def read_texts(path: str) -> Iterator[tuple[str, str]]:
    """Context and target of each line; ConfigError names the line that holds none."""
    with reading(f"the dataset {path}"):
        lines = utf8_lines(Path(path).read_bytes())
    for number, line in enumerate(lines, start=1):
        if line.strip():
            yield _cut(_text(line, f"{path}, line {number}"), f"{path}, line {number}")


def _text(line: str, where: str) -> str:
    try:
        entry = from_json(line)
    except ValueError as error:
        raise ConfigError(f"{where}: not JSON: {error}") from error
    if not isinstance(entry, dict) or not isinstance(entry.get("text"), str):
        raise ConfigError(f'{where}: not an object with a string "text"')
    text = str(entry["text"])
    try:
        require_utf8("the text", text)
    except InvalidRequestError as error:
        raise ConfigError(f"{where}: {error}") from None
    return text.strip("\n")  # as the reference does


def _cut(text: str, where: str) -> tuple[str, str]:
    context, _, word = text.rpartition(" ")
    if not context.strip() or not word:
        raise ConfigError(f"{where}: a text needs at least two words, and no space behind the last: {text!r}")
    return context, " " + word


def read_samples(path: str, tokenizer: Tokenizer) -> list[Sample]:
    """All samples of a dataset of JSON lines, each an object with `text`."""
    samples = [Sample(*texts, *tokenizer.encode_pair(*texts)) for texts in read_texts(path)]
    if not samples:
        raise ConfigError(f"the dataset {path} holds no text")
    return samples


def run(
    engines: Sequence[Engine],
    samples: Sequence[Sample],
    tokenizer: Tokenizer,
    *,
    batch_size: int,
    repetitions: int = 1,
    advance: Callable[[int], object] = lambda _: None,
) -> list[LambadaResult]:
    """Run all samples through every engine, batch by batch; a peer that fails has no result.

    Each engine first runs one batch untimed. The engines then take turns batch by batch, and in turns begin, so that
    noise of the machine hits them alike. `advance` is called for every finished batch.
    """
    if batch_size < 1 or repetitions < 1:
        raise ConfigError("batch size and repetitions must be at least 1")
    batches = [samples[first : first + batch_size] for first in range(0, len(samples), batch_size)]
    for engine in engines:
        _generate(engine, batches[0])
    seconds: list[list[float]] = [[] for _ in engines]
    answers: list[list[Answer]] = []
    for _ in range(repetitions):
        answers = [[] for _ in engines]
        spent = [0.0 for _ in engines]
        for turn, batch in enumerate(batches):
            order = range(len(engines)) if turn % 2 == 0 else reversed(range(len(engines)))
            for index in order:
                token_ids, elapsed = _generate(engines[index], batch)
                spent[index] += elapsed
                answers[index] += [_answer(s, ids, tokenizer) for s, ids in zip(batch, token_ids, strict=True)]
            advance(len(batch))
        for index, value in enumerate(spent):
            seconds[index].append(value)
    return [
        _result(engine.label, times, predictions)
        for engine, times, predictions in zip(engines, seconds, answers, strict=True)
        if not has_failed(engine)
    ]


def _generate(engine: Engine, batch: Sequence[Sample]) -> tuple[list[list[int]], float]:
    length = max(len(sample.target_ids) for sample in batch)
    generation = engine.generate([sample.prompt_ids for sample in batch], [length] * len(batch))
    return generation.token_ids, generation.seconds


def _answer(sample: Sample, token_ids: list[int], tokenizer: Tokenizer) -> Answer:
    answer_ids = token_ids[: len(sample.target_ids)]
    return Answer(
        prompt=sample.prompt,
        model_answer=tokenizer.decode(answer_ids),
        target=sample.target,
        prompt_ids=sample.prompt_ids,
        answer_ids=answer_ids,
        target_ids=sample.target_ids,
        right=answer_ids == sample.target_ids,
    )


def _result(engine: str, seconds: list[float], answers: list[Answer]) -> LambadaResult:
    right, median = sum(answer.right for answer in answers), statistics.median(seconds)
    return LambadaResult(engine, 100 * right / len(answers), right, len(answers), median, answers, seconds)


def differing(first: LambadaResult, second: LambadaResult) -> int:
    """On how many samples two engines gave other tokens."""
    return sum(a.answer_ids != b.answer_ids for a, b in zip(first.answers, second.answers, strict=True))


def comparisons(results: Sequence[LambadaResult]) -> list[Comparison]:
    """The last result and each of the others; the comparison to be quoted is the last."""
    *others, ours = results
    quoted = fastest({other.engine: other.seconds for other in others})
    others.sort(key=lambda other: other.engine == quoted)
    return [Comparison(other.engine, other.seconds / ours.seconds, differing(other, ours)) for other in others]
