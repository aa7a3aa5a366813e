"""Requests of all kinds for `hasten warm`: they compile the kernels that an engine's start does not."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from hasten.core.types import SamplingParams

if TYPE_CHECKING:
    from hasten.engine.llm import LLM

_TOKENS = 3
"""Of each output: a first one, one behind it, and one in a step launched before that is known."""
_ROWS = (1, 24)
"""Requests at once: kernels differ between few rows and many."""


def kinds(vocab_size: int, *, has_encoder: bool = False) -> Iterator[SamplingParams]:
    """Sampling parameters that use each kernel by which tokens are chosen; prompts of encoders have no logits."""
    token = min(7, vocab_size - 1)
    for temperature in (0.0, 1.0):
        yield _params(temperature=temperature)
        yield _params(temperature=temperature, logprobs=5)
        yield _params(temperature=temperature, repetition_penalty=1.1, presence_penalty=0.5, frequency_penalty=0.5)
        yield _params(temperature=temperature, logit_bias={token: 1.0}, bad_words_ids=((token, token),))
    yield _params(top_k=20)
    yield _params(top_p=0.9)
    yield _params(min_p=0.05)
    yield _params(top_k=20, top_p=0.9, min_p=0.05)
    yield _params(n=2)
    if not has_encoder:
        yield _params(prompt_logprobs=1)
    yield _params(beam_width=2)


def _params(**values: object) -> SamplingParams:
    return SamplingParams(max_tokens=_TOKENS, ignore_eos=True, detokenize=False, **values)  # type: ignore[arg-type]


def compute_all_kinds(llm: "LLM") -> int:
    """Compute requests of all kinds, a few and many at once; returns their number."""
    if llm.engine.worker.pooler is not None:
        return len([output for rows in _ROWS for output in llm.encode([[1, 2, 3, 4]] * rows, use_tqdm=False)])
    count = 0
    for rows in _ROWS:
        for params in kinds(llm.config.vocab_size, has_encoder=llm.config.encoder is not None):
            llm.generate([[1, 2, 3, 4]] * rows, params, use_tqdm=False)
            count += rows
    return count
