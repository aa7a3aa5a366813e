"""A client's call on its way: whose it is, and what its requests of engines took, for its log line and its trace.

How soon a first token comes shows whether a prompt's beginning is in the prefix cache, where prompts share blocks with
prompts of the same salt alone. A request may bring a salt of its own, and has that of the API key that it came with, so
that this tells nothing of the prompts of others.
"""

import time
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from hasten.core.errors import InvalidRequestError
from hasten.core.types import FinishReason, PoolingParams, SamplingParams

if TYPE_CHECKING:
    from hasten.server.engine.ticket import Ticket
    from hasten.server.tracing import TracedCall

_MAX_CHARACTERS = 256
_tenant: ContextVar[str] = ContextVar("tenant", default="")
"""Of the request that the current task works for."""


def set_tenant(tenant: str) -> None:
    """Let the requests to engines that this task makes, and those that it starts, belong to a tenant; "": to none."""
    _tenant.set(tenant)


def cache_salt(given: str | None) -> str:
    """The salt of a request with this one of its own; "" where its blocks are for all. InvalidRequestError."""
    if given is not None and not 0 < len(given) <= _MAX_CHARACTERS:
        raise InvalidRequestError(f"cache_salt must have from 1 to {_MAX_CHARACTERS} characters, got {len(given)}")
    tenant = _tenant.get()
    return f"{tenant}/{given or ''}" if tenant or given else ""


current_call: ContextVar["Call | None"] = ContextVar("current_call", default=None)
"""The call that the running task works for; None outside of calls."""


@dataclass(frozen=True)
class EndedRequest:
    """One request of an engine that has ended. Times are in seconds on the clock of `time.monotonic`."""

    model: str
    params: SamplingParams | PoolingParams
    arrived: float
    begun: float | None
    """When the engine began to compute it; None where it did not."""
    first_token: float | None
    ended: float
    prompt_tokens: int
    cached_tokens: int
    output_tokens: int
    reasons: tuple[FinishReason, ...]
    """How its completions ended."""
    error: str | None = None
    """Class of the error that ended it."""


@dataclass(slots=True)
class Call:
    """One call."""

    request_id: str
    trace: "TracedCall | None" = None
    """Where calls are traced."""
    record: Callable[[EndedRequest], None] | None = None
    """Counts a request of it, where OpenTelemetry's metrics are exported."""
    model: str = ""
    """As the client called it."""
    began: float = field(default_factory=time.monotonic)
    requests: int = 0
    """Of engines, that have ended."""
    prompt_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    queue_seconds: float = 0.0
    """Of the request that waited for the longest."""
    first_token_seconds: float | None = None
    """Until the first token of any of its requests."""
    reasons: set[FinishReason] = field(default_factory=set)

    def end_request(
        self, ticket: "Ticket", ended: float, reason: FinishReason | None = None, error: BaseException | None = None
    ) -> None:
        """Note that a request has ended; `reason` and `error` of one that ended without its last output."""
        self.requests += 1
        self.prompt_tokens += len(ticket.prompt_token_ids)
        self.output_tokens += ticket.tokens
        self.queue_seconds = max(self.queue_seconds, (ticket.begun or ended) - ticket.arrived)
        reasons = tuple(ticket.reasons) if reason is None else (*ticket.reasons, reason)
        self.reasons.update(reasons)
        first, cached = None, 0
        if ticket.first is not None:
            first, cached = ticket.first.at, ticket.first.cached_tokens
            self.cached_tokens += cached
            if self.first_token_seconds is None or first - self.began < self.first_token_seconds:
                self.first_token_seconds = first - self.began
        if self.trace is None and self.record is None:
            return
        assert ticket.params is not None, "a ticket of a call has its parameters"
        request = EndedRequest(
            model=ticket.model,
            params=ticket.params,
            arrived=ticket.arrived,
            begun=ticket.begun,
            first_token=first,
            ended=ended,
            prompt_tokens=len(ticket.prompt_token_ids),
            cached_tokens=cached,
            output_tokens=ticket.tokens,
            reasons=reasons,
            error=None if error is None else type(error).__name__,
        )
        if self.trace is not None:
            self.trace.add(request)
        if self.record is not None:
            self.record(request)

    def fields(self) -> Mapping[str, object]:
        """What a log line says of its requests; nothing where it had none."""
        if not self.requests:
            return {}
        fields: dict[str, object] = {"model": self.model, "prompt_tokens": self.prompt_tokens}
        fields |= {"cached_tokens": self.cached_tokens, "completion_tokens": self.output_tokens}
        fields |= {"queue_ms": round(1e3 * self.queue_seconds, 1)}
        if self.first_token_seconds is not None:
            fields["first_token_ms"] = round(1e3 * self.first_token_seconds, 1)
        return fields | {"finish_reason": ",".join(sorted(self.reasons))}


def note_model(name: str) -> None:
    """The running call asks for a model of this name."""
    if (call := current_call.get()) is not None:
        call.model = name
