"""What the errors of the engine and of the rest of hasten are to a client."""

import logging

from hasten.core.errors import (
    CapacityError,
    ConfigError,
    EngineError,
    HastenError,
    InvalidRequestError,
    UnsupportedError,
)
from hasten.server.engine.client import QueueError, QueueFullError
from hasten.server.protocol.tensors import about
from hasten.server.types import ErrorKind, ServiceError

INTERNAL = "internal error; the server's log says more"
_log = logging.getLogger(__name__)
_KINDS: tuple[tuple[type[HastenError], ErrorKind], ...] = (
    (QueueError, ErrorKind.OVERLOADED),
    (InvalidRequestError, ErrorKind.INVALID),
    (ConfigError, ErrorKind.INVALID),
    (UnsupportedError, ErrorKind.UNSUPPORTED),
    (CapacityError, ErrorKind.UNAVAILABLE),
    (EngineError, ErrorKind.UNAVAILABLE),
)


def kind_of(error: Exception) -> ErrorKind:
    """What kind an error is of: of the client's own making, of the server's state, or neither."""
    if isinstance(error, ServiceError):
        return error.kind
    return next((kind for base, kind in _KINDS if isinstance(error, base)), ErrorKind.INTERNAL)


def service_error(error: HastenError, request_id: str = "") -> ServiceError:
    """An error as the service reports it."""
    if isinstance(error, ServiceError):
        return error
    if isinstance(error, QueueError):
        text = "Exceeds maximum queue size" if isinstance(error, QueueFullError) else "Request timeout expired"
        return ServiceError(kind_of(error), f"{about(request_id)}{text}: {error}", error.retry_after)
    return ServiceError(kind_of(error), str(error))


def client_error(error: Exception, what: str) -> ServiceError:
    """Any error as a client sees it: of one that nobody foresaw, the log alone says more, with `what` failed."""
    if isinstance(error, HastenError):
        return service_error(error)
    _log.error("%s failed", what, exc_info=error)
    return ServiceError(ErrorKind.INTERNAL, INTERNAL)
