"""Statistics of an engine. Imports no torch, so that other processes can use it."""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

_COUNTERS = (
    *("prefix_hit_tokens", "prefix_query_tokens", "preemptions", "steps"),
    *("prompt_tokens", "generation_tokens"),
    *("mixed_steps", "limited_steps", "mixed_seconds", "predicted_mixed_seconds"),
    *("estimated_flops", "estimated_read_bytes", "estimated_write_bytes"),
)


@dataclass(slots=True)
class StepTally:
    """Counters since the start that change with each step or token; read without any cost."""

    prompts: int = 0
    """Tokens of the prompts that were taken."""
    computed: int = 0
    """Tokens that steps computed, of prompts and outputs."""
    generated: int = 0
    """Tokens that were chosen; of a beam search all its beams' tokens."""
    first: int = 0
    """Those that were the first ones of their completions."""


@dataclass(frozen=True)
class EngineStats:
    """What goes on now, and counters since the start."""

    running: int = 0
    """Requests that have begun and are not finished."""
    waiting: int = 0
    """Requests that have not begun, or were preempted."""
    used_blocks: int = 0
    """Cache blocks that a sequence holds."""
    num_blocks: int = 0
    prefix_hit_tokens: int = 0
    prefix_query_tokens: int = 0
    """Tokens of prompts that were looked up in the prefix cache, and those found there."""
    preemptions: int = 0
    steps: int = 0
    prompt_tokens: int = 0
    """Of the requests that were taken."""
    generation_tokens: int = 0
    """Tokens chosen; of a beam search all its beams' tokens."""
    mixed_steps: int = 0
    limited_steps: int = 0
    """Steps that computed prompts while others decoded, and those of them in which the target for the time between
    tokens left prompt tokens for a later step."""
    mixed_seconds: float = 0.0
    predicted_mixed_seconds: float = 0.0
    """Time of these steps, measured and predicted."""
    estimated_flops: float = 0.0
    estimated_read_bytes: float = 0.0
    estimated_write_bytes: float = 0.0
    """Operations and bytes of memory of each rank's steps; 0 where they are not estimated."""

    def after(self, earlier: "EngineStats") -> "EngineStats":
        """What goes on here, with counters that go on where those of an earlier engine ended."""
        return replace(self, **{name: getattr(earlier, name) + getattr(self, name) for name in _COUNTERS})

    def since(self, earlier: "EngineStats") -> "EngineStats":
        """What goes on here, with what counters have come to since an earlier moment."""
        return replace(self, **{name: getattr(self, name) - getattr(earlier, name) for name in _COUNTERS})

    @classmethod
    def total(cls, parts: "Sequence[EngineStats]") -> "EngineStats":
        """What goes on in several engines together."""
        return cls(**{field.name: sum(getattr(part, field.name) for part in parts) for field in fields(cls)})
