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
from hasten.core.types import FinishReason

if TYPE_CHECKING:
    from hasten.server.engine.ticket import Ticket
    from hasten.server.tracing import TracedCall

_MAX_CHARACTERS = 256
_tenant: ContextVar[str] = ContextVar("tenant", default="")
"""Of the request that the current task works for."""


def set_tenant(tenant: str) -> None:
    """Let the requests to engines that this task makes, and those that it starts, belong to a tenant; "": to none."""
    if tenant != _tenant.get():
        _tenant.set(tenant)


def cache_salt(given: str | None) -> str:
    """The salt of a request with this one of its own; "" where its blocks are for all. InvalidRequestError."""
    if given is not None and not 0 < len(given) <= _MAX_CHARACTERS:
        raise InvalidRequestError(f"cache_salt must have from 1 to {_MAX_CHARACTERS} characters, got {len(given)}")
    tenant = _tenant.get()
    return f"{tenant}/{given or ''}" if tenant or given else ""


current_call: ContextVar["Call | None"] = ContextVar("current_call", default=None)
"""The call that the running task works for; None outside of calls."""


@dataclass(slots=True)
class Call:
    """One call."""

    request_id: str
    trace: "TracedCall | None" = None
    """Where calls are traced."""
    record: "Callable[[Ticket, float, str | None], None] | None" = None
    """Counts a request by the time of its end and its error's class, where OpenTelemetry's metrics are exported."""
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

    def end_request(self, ticket: "Ticket", ended: float, error: BaseException | None = None) -> None:
        """Note that a request has ended, by its last output or by an error."""
        self.requests += 1
        self.prompt_tokens += len(ticket.prompt_token_ids)
        self.output_tokens += ticket.tokens
        self.queue_seconds = max(self.queue_seconds, (ticket.begun or ended) - ticket.arrived)
        self.reasons.update(ticket.reasons)
        if (first := ticket.first) is not None:
            self.cached_tokens += first.cached_tokens
            if self.first_token_seconds is None or first.at - self.began < self.first_token_seconds:
                self.first_token_seconds = first.at - self.began
        kind = None if error is None else type(error).__name__
        if self.trace is not None:
            self.trace.add(ticket, ended, kind)
        if self.record is not None:
            self.record(ticket, ended, kind)

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
