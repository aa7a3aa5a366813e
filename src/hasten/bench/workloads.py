"""Workloads of the benchmarks: prompt and output lengths drawn from fixed seeds, prompts of random token ids.

Lengths and seeds are those that peers are measured with, so that figures can be put side by side.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass

from hasten.core.errors import ConfigError


@dataclass(frozen=True)
class Workload:
    """Requests by their lengths."""

    name: str
    prompt_lengths: tuple[int, ...]
    output_lengths: tuple[int, ...]

    @property
    def max_len(self) -> int:
        """Longest sequence, prompt and output together."""
        return max(p + o for p, o in zip(self.prompt_lengths, self.output_lengths, strict=True))

    def prompts(self, vocab_size: int, rng: random.Random) -> list[list[int]]:
        """A prompt of random token ids for each request."""
        return [random_prompt(length, vocab_size, rng) for length in self.prompt_lengths]


def random_prompt(length: int, vocab_size: int, rng: random.Random) -> list[int]:
    """Random token ids, clear of the special ones at both ends of the vocabulary where there is room."""
    low, high = (10, min(vocab_size, 100_000) - 10) if vocab_size > 20 else (0, vocab_size - 1)
    return [rng.randint(low, high) for _ in range(length)]


def fixed(batch_size: int, prompt_length: int = 128, output_length: int = 128) -> Workload:
    """Equal requests: `lat` is a batch of 1."""
    if min(batch_size, prompt_length, output_length) < 1:
        raise ConfigError("batch size, prompt length and output length must be at least 1")
    return Workload(f"fixed-{batch_size}", (prompt_length,) * batch_size, (output_length,) * batch_size)


def long() -> Workload:
    """Eight prompts of 16,384 tokens, and 64 new tokens each."""
    return Workload("long", (16_384,) * 8, (64,) * 8)


def lambada(count: int | None = None) -> Workload:
    """Prompts as long as LAMBADA's under BLOOM's tokenizer, N(87, 25) clipped to 20..230, and 4 new tokens each."""
    count = _count(count, 5153)
    rng = random.Random(0)
    lengths = tuple(min(230, max(20, round(rng.gauss(87, 25)))) for _ in range(count))
    return Workload("lambada", lengths, (4,) * count)


def tput(count: int | None = None, max_model_len: int = 2048) -> Workload:
    """Prompts and outputs of 100 to 1024 tokens."""
    return _uniform("tput", _count(count, 1000), (100, 1024), (100, 1024), max_model_len)


def mixed(count: int | None = None) -> Workload:
    """Prompts and outputs of 16 to 256 tokens: `tput` for a machine without a GPU."""
    return _uniform("mixed", _count(count, 64), (16, 256), (16, 256), 512)


WORKLOADS: dict[str, Callable[[int | None], Workload]] = {"mixed": mixed, "tput": tput, "lambada": lambada}
"""Workloads of many requests, by name."""


def _count(count: int | None, default: int) -> int:
    if count is not None and count < 1:
        raise ConfigError(f"the number of requests must be at least 1, got {count}")
    return default if count is None else count


def _uniform(name: str, count: int, inputs: tuple[int, int], outputs: tuple[int, int], max_len: int) -> Workload:
    rng = random.Random(0)
    prompt_lengths = tuple(rng.randint(*inputs) for _ in range(count))
    drawn = [rng.randint(*outputs) for _ in range(count)]
    return Workload(
        name, prompt_lengths, tuple(min(o, max_len - p) for o, p in zip(drawn, prompt_lengths, strict=True))
    )
