"""What the requests of a model's engines took, counted where all APIs meet. Times are in seconds.

Histograms have the bounds of vLLM's metrics and finer ones between them.
"""

from dataclasses import dataclass, field, fields
from functools import partial
from typing import TYPE_CHECKING, Self

from hasten.core.types import FinishReason
from hasten.server.exposition import Histogram

if TYPE_CHECKING:
    from hasten.engine.block_watch import BlockTimes
    from hasten.server.engine.ticket import Ticket
    from hasten.server.engine.wire import Computed, Output

FIRST_TOKEN_S = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0),
    *(160.0, 640.0, 2560.0),
)
TOKEN_S = (
    *(0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0),
)
REQUEST_S = (
    *(0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0, 960.0),
    *(1920.0, 7680.0),
)
STEP_TOKENS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
BLOCK_S = (
    *(0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 30.0, 60.0, 120.0, 300.0),
    *(600.0, 1200.0, 1800.0),
)
COMPLETIONS = (1, 2, 5, 10, 20)
TOKENS = tuple(digit * 10**power for power in range(8) for digit in (1, 2, 5))
"""Of a request: vLLM's histograms end at the model's maximum length."""
_FINE_TOKEN_S = (0.001, 0.0025, 0.005, *TOKEN_S)
_FINE_S = tuple(sorted({0.001, 0.0025, 0.005, 0.01, 0.025, 0.03, 0.05, 0.1, 0.2, *REQUEST_S}))


@dataclass
class EngineCounters:
    """Of the requests of one engine, or of several engines together."""

    time_to_first_token: Histogram = field(default_factory=partial(Histogram, FIRST_TOKEN_S))
    """From the arrival of a request until its engine had its first token, whether or not it streams."""
    inter_token_latency: Histogram = field(default_factory=partial(Histogram, _FINE_TOKEN_S))
    """From one token of a completion to the next, as its engine has them: measured per step."""
    time_per_output_token: Histogram = field(default_factory=partial(Histogram, _FINE_TOKEN_S))
    """Per request: from its first token to its end, for each token but the first."""
    latency: Histogram = field(default_factory=partial(Histogram, _FINE_S))
    queue_time: Histogram = field(default_factory=partial(Histogram, _FINE_S))
    """Until the engine began to compute it."""
    prefill_time: Histogram = field(default_factory=partial(Histogram, _FINE_S))
    """From there to its first token."""
    decode_time: Histogram = field(default_factory=partial(Histogram, _FINE_S))
    """From there to its end."""
    inference_time: Histogram = field(default_factory=partial(Histogram, _FINE_S))
    """Both."""
    prompt_lengths: Histogram = field(default_factory=partial(Histogram, TOKENS))
    output_lengths: Histogram = field(default_factory=partial(Histogram, TOKENS))
    """Of all completions of a request together."""
    max_tokens: Histogram = field(default_factory=partial(Histogram, TOKENS))
    """That each completion of a request might have had."""
    computed_lengths: Histogram = field(default_factory=partial(Histogram, TOKENS))
    """Of prompts, without what was in the prefix cache."""
    completions: Histogram = field(default_factory=partial(Histogram, COMPLETIONS))
    """That a request asked for; of a beam search, its beams."""
    step_tokens: Histogram = field(default_factory=partial(Histogram, STEP_TOKENS))
    """That a step computed, of prompts and outputs."""
    block_lifetime: Histogram = field(default_factory=partial(Histogram, BLOCK_S))
    block_idle: Histogram = field(default_factory=partial(Histogram, BLOCK_S))
    block_reuse_gap: Histogram = field(default_factory=partial(Histogram, BLOCK_S))
    """Of watched blocks of the cache, as BlockTimes has them."""
    prompt_tokens: int = 0
    """Of requests that have output."""
    cached_tokens: int = 0
    """Those of them that were in the prefix cache."""
    generation_tokens: int = 0
    finished: dict[FinishReason, int] = field(default_factory=lambda: dict.fromkeys(FinishReason, 0))
    """Completions by how they ended; a request that is withdrawn, or whose engine dies, counts once."""
    texts: int = 0
    """Of which a vector or scores were made."""

    def step(self, computed: "Computed") -> None:
        """Count a step."""
        self.step_tokens.observe(computed.tokens)
        if computed.continued:
            self.inter_token_latency.observe(computed.seconds, computed.continued)

    def watch(self, blocks: "BlockTimes") -> None:
        """Count what became known of blocks of the cache."""
        for histogram, times in (
            (self.block_lifetime, blocks.lifetimes),
            (self.block_idle, blocks.idle),
            (self.block_reuse_gap, blocks.reuse_gaps),
        ):
            for seconds in times:
                histogram.observe(seconds)

    def begin(self, ticket: "Ticket") -> None:
        """Count a request that has its first output."""
        prompt = len(ticket.prompt_token_ids)
        self.prompt_tokens += prompt
        self.queue_time.observe(ticket.queue_seconds)
        if (first := ticket.first) is not None:
            self.cached_tokens += first.cached_tokens
            self.time_to_first_token.observe(first.at - ticket.arrived)
            self.computed_lengths.observe(prompt - first.cached_tokens)

    def add(self, output: "Output", tokens: int) -> None:
        """Count an output of a request, by its number of tokens."""
        self.generation_tokens += tokens
        self.texts += output.finished and output.pooled is not None
        for delta in output.completions:
            if delta.finish_reason is not None:
                self.finished[delta.finish_reason] += 1

    def finish(self, ticket: "Ticket", now: float) -> None:
        """Count a request that has all of its output."""
        self.latency.observe(now - ticket.arrived)
        self.prompt_lengths.observe(len(ticket.prompt_token_ids))
        if (first := ticket.first) is None:
            return
        begun = ticket.begun or ticket.arrived
        self.output_lengths.observe(ticket.tokens)
        self.max_tokens.observe(ticket.max_tokens)
        self.completions.observe(ticket.width)
        self.prefill_time.observe(first.at - begun)
        self.decode_time.observe(now - first.at)
        self.inference_time.observe(now - begun)
        if ticket.tokens > len(ticket.reasons):
            each = ticket.tokens / max(1, len(ticket.reasons))
            self.time_per_output_token.observe((now - first.at) / (each - 1))

    def merge(self, other: Self) -> None:
        """Add what another engine counted."""
        for each in fields(self):
            mine, others = getattr(self, each.name), getattr(other, each.name)
            if isinstance(mine, Histogram):
                mine.merge(others)
            elif isinstance(mine, dict):
                for reason, count in others.items():
                    mine[reason] += count
            else:
                setattr(self, each.name, mine + others)


class LanguageCounters:
    """Of a model's engines, by their numbers. Loading the model again does not set them back."""

    def __init__(self) -> None:
        self.engines: list[EngineCounters] = []

    def of(self, engine: int) -> EngineCounters:
        """Those of one engine."""
        while len(self.engines) <= engine:
            self.engines.append(EngineCounters())
        return self.engines[engine]

    @property
    def total(self) -> EngineCounters:
        """Of all engines together, as of now."""
        total = EngineCounters()
        for counters in self.engines:
            total.merge(counters)
        return total
