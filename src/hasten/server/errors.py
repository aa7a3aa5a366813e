"""What the errors of the engine and of the rest of hasten are to a client.

Over HTTP they have Triton's shape, and OpenAI's on its own routes and those beside them.
"""

import logging
import math
from collections.abc import Mapping
from typing import Literal

import msgspec
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
from hasten.server.protocol.tensors import about
from hasten.server.types import ErrorKind, ServiceError

CLIENT_GONE = ErrorKind.CANCELLED.value.http
OPENAI_PATHS = ("/v1/", "/tokenize", "/detokenize", "/score", "/rerank", "/v2/rerank", "/pooling", "/classify")
"""How paths begin whose errors have OpenAI's form."""
MESSAGES_PATH = "/v1/messages"
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


class ErrorObject(msgspec.Struct):
    """What is wrong with a request, as OpenAI's API says it."""

    message: str
    type: str
    param: str | None
    code: str | None

    @classmethod
    def of(cls, status: int, message: str, param: str | None = None, code: str | None = None) -> "ErrorObject":
        """One of this HTTP status; `param` is the field of the request that is wrong."""
        kind = "rate_limit_error" if status == 429 else "invalid_request_error" if status < 500 else "server_error"
        return cls(message, kind, param, code)


class OpenAIErrors(msgspec.Struct):
    """The body of an error of OpenAI's API and those beside it."""

    error: ErrorObject


class MessageErrorObject(msgspec.Struct):
    """What is wrong with a request, as Anthropic's API says it."""

    type: str
    message: str


class AnthropicErrors(msgspec.Struct):
    """The body of an error of Anthropic's API."""

    error: MessageErrorObject
    type: Literal["error"] = "error"


class TritonErrors(msgspec.Struct):
    """The body of any other error."""

    error: str


def error_body(path: str, status: int, error: ErrorObject) -> OpenAIErrors | AnthropicErrors | TritonErrors:
    """An error in the form of the API that a path belongs to."""
    if path.startswith(MESSAGES_PATH):
        kind = _MESSAGE_ERRORS.get(status, "api_error" if status >= 500 else "invalid_request_error")
        return AnthropicErrors(MessageErrorObject(kind, error.message))
    return OpenAIErrors(error) if path.startswith(OPENAI_PATHS) else TritonErrors(error.message)


def error_response(
    path: str, status: int, error: str | ErrorObject, headers: Mapping[str, str] | None = None
) -> Response:
    """The answer to a request that failed."""
    if isinstance(error, str):
        error = ErrorObject.of(status, error, code=_OPENAI_CODES.get(status))
    body = msgspec.json.encode(error_body(path, status, error))
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
