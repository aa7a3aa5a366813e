"""Accuracy of engines on last words, its confidence interval, and where two engines differ."""

from collections.abc import Sequence
from dataclasses import dataclass

from hasten.bench.intervals import Interval, bootstrap, wilson
from hasten.bench.lambada import Answer, LambadaResult, differing
from hasten.bench.peers import NotMeasured, fastest
from hasten.core.types import SamplingParams
from hasten.engine.llm import LLM
from hasten.engine.text import Tokenizer

_PROMPT_END = 160
"""Letters of a prompt that a difference is shown with."""


@dataclass(frozen=True)
class EngineAccuracy:
    """An engine on all texts."""

    engine: str
    accuracy: float
    """Per cent of the texts whose last word has all its tokens right."""
    interval: Interval
    """Of the accuracy, by Wilson's method."""
    right: int
    total: int
    seconds: float
    """Of the generate calls alone, the median of the repetitions."""
    repetition_seconds: list[float]


@dataclass(frozen=True)
class Difference:
    """A text that two engines continue by different tokens."""

    number: int
    """Of the text in the data set, from 1."""
    prompt_end: str
    target: str
    theirs: str
    ours: str
    position: int
    """Of the first token that differs, from 0."""
    their_token: str
    their_token_id: int
    our_token: str
    our_token_id: int
    margin: float
    """Log-probability of our token minus that of theirs, in nats, as hasten computes both."""


@dataclass(frozen=True)
class Comparison:
    """hasten and another engine on the same texts."""

    engine: str
    """The other engine."""
    speedup: float
    """Seconds of the other engine divided by hasten's."""
    speedup_range: Interval
    """The least and the largest of the repetitions."""
    accuracy_difference: float
    """hasten's accuracy minus the other's, in percentage points."""
    accuracy_difference_interval: Interval
    """By bootstrap over the texts."""
    differing: list[Difference]


@dataclass(frozen=True)
class Accuracy:
    """All engines on a data set; hasten comes last."""

    dataset: str
    samples: int
    batch_size: int
    engines: list[EngineAccuracy]
    comparisons: list[Comparison]
    """The one to be quoted comes first: the faster of Hugging Face's, else the fastest."""
    not_measured: list[NotMeasured]


def accuracy(
    results: Sequence[LambadaResult],
    llm: LLM,
    tokenizer: Tokenizer,
    *,
    dataset: str,
    batch_size: int,
    not_measured: Sequence[NotMeasured] = (),
) -> Accuracy:
    """The section of a report from the results of a run, of which hasten's is the last."""
    *others, ours = results
    quoted = fastest({other.engine: other.seconds for other in others})
    others.sort(key=lambda other: other.engine != quoted)
    return Accuracy(
        dataset=dataset,
        samples=ours.total,
        batch_size=batch_size,
        engines=[_engine(result) for result in results],
        comparisons=[_comparison(other, ours, llm, tokenizer) for other in others],
        not_measured=list(not_measured),
    )


def _engine(result: LambadaResult) -> EngineAccuracy:
    return EngineAccuracy(
        engine=result.engine,
        accuracy=result.accuracy,
        interval=wilson(result.right, result.total),
        right=result.right,
        total=result.total,
        seconds=result.seconds,
        repetition_seconds=result.repetition_seconds,
    )


def _comparison(theirs: LambadaResult, ours: LambadaResult, llm: LLM, tokenizer: Tokenizer) -> Comparison:
    ratios = [a / b for a, b in zip(theirs.repetition_seconds, ours.repetition_seconds, strict=True)]
    gains = [100.0 * (b.right - a.right) for a, b in zip(theirs.answers, ours.answers, strict=True)]
    pairs = [
        (number, a, b)
        for number, (a, b) in enumerate(zip(theirs.answers, ours.answers, strict=True), start=1)
        if a.answer_ids != b.answer_ids
    ]
    assert len(pairs) == differing(theirs, ours)
    margins = _margins(llm, [(a, b) for _, a, b in pairs])
    return Comparison(
        engine=theirs.engine,
        speedup=theirs.seconds / ours.seconds,
        speedup_range=Interval(min(ratios), max(ratios)),
        accuracy_difference=ours.accuracy - theirs.accuracy,
        accuracy_difference_interval=bootstrap(gains),
        differing=[_difference(*pair, margin, tokenizer) for pair, margin in zip(pairs, margins, strict=True)],
    )


def first_difference(theirs: Answer, ours: Answer) -> int:
    """Position of the first token that differs."""
    return next(at for at, (a, b) in enumerate(zip(theirs.answer_ids, ours.answer_ids, strict=True)) if a != b)


def _margins(llm: LLM, pairs: Sequence[tuple[Answer, Answer]]) -> list[float]:
    """Log-probability of our first differing token minus that of theirs, behind what both engines agree on."""
    prompts = []
    for theirs, ours in pairs:
        at = first_difference(theirs, ours)
        before = [*ours.prompt_ids, *ours.answer_ids[:at]]
        prompts += [[*before, theirs.answer_ids[at]], [*before, ours.answer_ids[at]]]
    if not prompts:
        return []
    params = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True, detokenize=False, prompt_logprobs=0)
    found = []
    for prompt, output in zip(prompts, llm.generate(prompts, params, use_tqdm=False), strict=True):
        assert output.prompt_logprobs is not None
        last = output.prompt_logprobs[-1]
        assert last is not None
        found.append(last[prompt[-1]].logprob)
    return [ours - theirs for theirs, ours in zip(found[::2], found[1::2], strict=True)]


def _difference(number: int, theirs: Answer, ours: Answer, margin: float, tokenizer: Tokenizer) -> Difference:
    at = first_difference(theirs, ours)
    return Difference(
        number=number,
        prompt_end=ours.prompt[-_PROMPT_END:],
        target=ours.target,
        theirs=theirs.model_answer,
        ours=ours.model_answer,
        position=at,
        their_token=tokenizer.decode([theirs.answer_ids[at]]),
        their_token_id=theirs.answer_ids[at],
        our_token=tokenizer.decode([ours.answer_ids[at]]),
        our_token_id=ours.answer_ids[at],
        margin=margin,
    )
