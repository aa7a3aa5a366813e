"""What a route does, for people and for the server's description of itself."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

Handler = Callable[[Request], Awaitable[Response]]
_ATTRIBUTE = "operation"


@dataclass(frozen=True)
class Operation:
    """One route."""

    summary: str
    body: Any = None
    """The type that its body is parsed as, where it takes one."""
    streams: bool = False
    """Whether its answer may be server-sent events."""


def described(handler: Handler, operation: Operation) -> Handler:
    """The handler, which says what it does."""
    setattr(handler, _ATTRIBUTE, operation)
    return handler


def operation_of(handler: Any) -> Operation:
    """What a handler says that it does, or else the first line of its docstring."""
    found = getattr(handler, _ATTRIBUTE, None)
    if isinstance(found, Operation):
        return found
    return Operation((handler.__doc__ or "").strip().partition("\n")[0].rstrip("."))
