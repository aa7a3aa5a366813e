"""What the errors of the engine and of the rest of hasten are to a client.

Over HTTP they have Triton's shape, and OpenAI's on its own routes and those beside them.
"""

import logging
import math
from collections.abc import Mapping

from starlette.responses import Response

from hasten.core.errors import (
    CapacityError,
    ConfigError,
    EngineError,
    HastenError,
    InvalidRequestError,
    UnsupportedError,
)
from hasten.server.engine.queue import QueueError, QueueFullError
from hasten.server.protocol.bodies import dump_json
from hasten.server.protocol.tensors import about
from hasten.server.types import ErrorKind, ServiceError

CLIENT_GONE = ErrorKind.CANCELLED.value.http
OPENAI_PATHS = ("/v1/", "/tokenize", "/detokenize", "/score", "/rerank", "/v2/rerank", "/pooling", "/classify")
"""How paths begin whose errors have OpenAI's form."""
_MESSAGES_PATH = "/v1/messages"
_MESSAGE_ERRORS = {
    **{401: "authentication_error", 403: "permission_error", 404: "not_found_error", 413: "request_too_large"},
    **{429: "rate_limit_error", 503: "overloaded_error"},
}
_LONGEST_RETRY_S = 3600
"""An estimate beyond it is not worth more."""
_OPENAI_CODES = {401: "invalid_api_key", 404: "unknown_url"}


def retry_after(seconds: float | None) -> int:
    """Value of the header Retry-After: an estimate in whole seconds, up to an hour; 1 where there is none."""
    return max(1, math.ceil(min(seconds or 0, _LONGEST_RETRY_S)))


def openai_error(status: int, message: str, param: str | None = None, code: str | None = None) -> bytes:
    """The JSON of an error of OpenAI's API."""
    kind = "rate_limit_error" if status == 429 else "invalid_request_error" if status < 500 else "server_error"
    return dump_json({"error": {"message": message, "type": kind, "param": param, "code": code}})


def message_error(status: int, message: str) -> bytes:
    """The JSON of an error of Anthropic's Messages API."""
    kind = _MESSAGE_ERRORS.get(status, "api_error" if status >= 500 else "invalid_request_error")
    return dump_json({"type": "error", "error": {"type": kind, "message": message}})


def error_response(path: str, status: int, message: str, headers: Mapping[str, str] | None = None) -> Response:
    """The answer to a request that failed."""
    if path.startswith(_MESSAGES_PATH):
        body = message_error(status, message)
    elif path.startswith(OPENAI_PATHS):
        body = openai_error(status, message, code=_OPENAI_CODES.get(status))
    else:
        body = dump_json({"error": message})
    return Response(body, status, {"content-type": "application/json", **(headers or {})})


def service_error_response(path: str, error: ServiceError) -> Response:
    """The answer to a request that the service refused; where a later one may be taken, with when to try again."""
    headers = {"retry-after": str(retry_after(error.retry_after))} if error.kind.is_temporary else None
    return error_response(path, error.kind.value.http, str(error), headers)


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
