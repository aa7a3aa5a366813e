"""Perplexity and accuracy on last words of a model, and the texts that they are measured on."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hasten.bench.lambada import read_samples
from hasten.core.errors import ConfigError
from hasten.core.files import reading
from hasten.core.text import utf8_lines
from hasten.core.types import SamplingParams
from hasten.engine.llm import LLM
from hasten.engine.text import Tokenizer

_LEAST_TOKENS = 16
"""Of the last piece of a text file; a shorter one is left out."""


@dataclass(frozen=True)
class Text:
    """A text in tokens."""

    token_ids: list[int]
    target: int = 0
    """How many of the last tokens are those of the last word; 0 where it is not asked for."""


@dataclass(frozen=True)
class Quality:
    """What a model makes of texts."""

    perplexity: float
    accuracy: float | None
    """Per cent of the last words whose tokens are all the most probable ones; None where none is asked for."""


def read_texts(path: str, tokenizer: Tokenizer, most_tokens: int) -> list[Text]:
    """The texts of a file, of at most `most_tokens` tokens each: JSON lines, each an object with `text`, or any text.

    Of longer JSON lines the ends are taken; any other text is cut into pieces. ConfigError where there is none.
    """
    with reading(f"the texts of {path}"):
        lines = [line for line in utf8_lines(Path(path).read_bytes()) if line.strip()]
    if not lines:
        raise ConfigError(f"{path} holds no text")
    if lines[0].lstrip().startswith("{"):
        samples = read_samples(path, tokenizer)
        return [
            Text((sample.prompt_ids + sample.target_ids)[-most_tokens:], min(len(sample.target_ids), most_tokens - 1))
            for sample in samples
        ]
    return _pieces("\n".join(lines), tokenizer, most_tokens)


def _pieces(text: str, tokenizer: Tokenizer, most_tokens: int) -> list[Text]:
    """A text in pieces, each of which begins as the tokenizer begins texts."""
    start = tokenizer.encode("")
    ids = tokenizer.encode(text, add_special_tokens=False)
    length = most_tokens - len(start)
    pieces = [ids[first : first + length] for first in range(0, len(ids), length)]
    return [Text(start + piece) for piece in pieces if len(piece) >= min(_LEAST_TOKENS, len(ids))]


def divided(texts: Sequence[Text], count: int) -> tuple[list[Text], list[Text]]:
    """So many of the texts, evenly spread over all of them, and the others."""
    count = min(count, len(texts))
    chosen = {number * len(texts) // count for number in range(count)}
    return [texts[number] for number in sorted(chosen)], [text for n, text in enumerate(texts) if n not in chosen]


def measured(model: str, texts: Sequence[Text], *, device: str = "auto") -> Quality:
    """What the model in a folder makes of texts, each of its tokens being predicted from those before it."""
    params = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True, detokenize=False, prompt_logprobs=0)
    with LLM(model, device=device, enable_prefix_caching=False, progress_bars=False) as llm:
        outputs = llm.generate([text.token_ids for text in texts], params, use_tqdm=False)
    total, count, right = 0.0, 0, 0
    for text, output in zip(texts, outputs, strict=True):
        assert output.prompt_logprobs is not None
        pairs = list(zip(text.token_ids, output.prompt_logprobs, strict=True))
        found = [entry[token] for token, entry in pairs if entry is not None]
        total -= sum(each.logprob for each in found)
        count += len(found)
        right += text.target > 0 and all(each.rank == 1 for each in found[-text.target :])
    predicted = sum(text.target > 0 for text in texts)
    return Quality(math.exp(total / max(1, count)), 100 * right / predicted if predicted else None)
