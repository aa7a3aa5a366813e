"""Salts of the prefix cache: prompts share blocks with prompts of the same salt alone.

How soon a first token comes shows whether a prompt's beginning is cached. A request may bring a salt of its own, and
has that of the API key that it came with, so that this tells nothing of the prompts of others.
"""

from contextvars import ContextVar

from hasten.core.errors import InvalidRequestError

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
