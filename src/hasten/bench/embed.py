"""Vectors of many texts at once: texts and tokens per second, and how near they are to Hugging Face's."""

import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, TypedDict

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention
from torch import Tensor

from hasten.bench.engines import clock
from hasten.bench.report import Environment, print_table
from hasten.core.types import PoolingParams
from hasten.engine.llm import LLM

_PARAMS = PoolingParams(normalize=True)
_WARM_UP_TEXTS = 8
_FIRST_TOKEN = 5
"""Smaller ids are special in most vocabularies: some models count what is padding by its id."""


@dataclass(frozen=True)
class EmbedResult:
    """One engine on all texts; rates come from the median time."""

    engine: str
    texts: int
    tokens: int
    seconds: list[float]
    """Of each repetition."""
    median_seconds: float
    texts_per_second: float
    tokens_per_second: float


@dataclass(frozen=True)
class Agreement:
    """Cosines between the vectors of another engine and hasten's, of the same texts."""

    engine: str
    """The other one."""
    minimum: float
    mean: float
    largest_difference: float
    """Between numbers of vectors of length 1."""


class EmbedReport(TypedDict):
    """What is written: each engine on the same texts, and how far vectors agree."""

    environment: Environment
    results: list[EmbedResult]
    agreement: list[Agreement]
    speedups: dict[str, float]
    """How many times as fast hasten is as each other engine."""


class Embedder(Protocol):
    """What the benchmark needs of an engine."""

    label: str

    def embed(self, prompts: Sequence[Sequence[int]]) -> tuple[Tensor, float]:
        """Vectors of length 1 of texts, given as token ids, [s, w] in fp32 on the host, and the seconds it took."""
        ...


class HastenEmbedder:
    """hasten, with all texts at once."""

    label = "hasten"

    def __init__(self, llm: LLM) -> None:
        self._llm = llm

    def embed(self, prompts: Sequence[Sequence[int]]) -> tuple[Tensor, float]:
        """Vectors, and seconds."""
        start = clock(self._llm.device)
        outputs = self._llm.embed(prompts, pooling_params=_PARAMS, use_tqdm=False)
        # as numbers of an array: Python's would take longer than the engine does, and others are not asked for them
        rows = bytearray().join(output.outputs.tobytes() for output in outputs)
        vectors = torch.frombuffer(rows, dtype=torch.float32).view(len(outputs), -1)
        return vectors, clock(self._llm.device) - start


def texts(count: int, shortest: int, longest: int, vocab_size: int, seed: int = 0) -> list[list[int]]:
    """Random texts as token ids, with lengths spread evenly between the two; the same for the same seed."""
    rng = random.Random(seed)
    lowest = min(_FIRST_TOKEN, vocab_size - 1)
    lengths = [rng.randint(shortest, longest) for _ in range(count)]
    return [[rng.randrange(lowest, vocab_size) for _ in range(length)] for length in lengths]


def measure(
    engines: Sequence[Embedder], prompts: Sequence[Sequence[int]], *, repetitions: int = 1
) -> tuple[list[EmbedResult], list[Agreement]]:
    """Have every engine embed all texts, in turns, after an untimed batch each; the last engine is hasten."""
    longest = sorted(prompts, key=len)[-_WARM_UP_TEXTS:]
    for engine in engines:
        engine.embed(longest)
    seconds: list[list[float]] = [[] for _ in engines]
    vectors: list[Tensor] = [torch.empty(0)] * len(engines)
    for _ in range(repetitions):
        for index, engine in enumerate(engines):
            vectors[index], took = engine.embed(prompts)
            seconds[index].append(took)
    results = [_result(engine.label, prompts, times) for engine, times in zip(engines, seconds, strict=True)]
    own = vectors[-1]
    return results, [_agreement(engine.label, each, own) for engine, each in zip(engines, vectors, strict=True)][:-1]


def _result(engine: str, prompts: Sequence[Sequence[int]], seconds: list[float]) -> EmbedResult:
    median, tokens = statistics.median(seconds), sum(map(len, prompts))
    return EmbedResult(
        engine=engine,
        texts=len(prompts),
        tokens=tokens,
        seconds=seconds,
        median_seconds=median,
        texts_per_second=len(prompts) / median,
        tokens_per_second=tokens / median,
    )


def _agreement(engine: str, theirs: Tensor, ours: Tensor) -> Agreement:
    cosines = F.cosine_similarity(theirs.double(), ours.double(), dim=-1)
    return Agreement(engine, float(cosines.min()), float(cosines.mean()), float((theirs - ours).abs().max()))


def speedups(results: Sequence[EmbedResult]) -> dict[str, float]:
    """How many times as fast the last engine is as each of the others."""
    own = results[-1]
    return {result.engine: result.median_seconds / own.median_seconds for result in results[:-1]}


def show(results: Sequence[EmbedResult], agreement: Sequence[Agreement]) -> None:
    """Print a table."""
    first, ratios = results[0], speedups(results)
    title = f"{first.texts} texts, {first.tokens} tokens"
    for name, ratio in ratios.items():
        title += f"; hasten is {ratio:.2f} times as fast as {name}"
    found = {entry.engine: f"{entry.minimum:.6f} / {entry.mean:.6f}" for entry in agreement}
    rows = [
        (
            result.engine,
            f"{result.median_seconds:.2f}",
            f"{result.texts_per_second:.1f}",
            f"{result.tokens_per_second:.0f}",
            found.get(result.engine, ""),
        )
        for result in results
    ]
    print_table(title, ("engine", "seconds", "texts/s", "tokens/s", "cosine with hasten, min / mean"), rows)
