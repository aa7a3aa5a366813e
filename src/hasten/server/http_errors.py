"""What errors look like over HTTP: Triton's shape, and OpenAI's on its own routes and those beside them."""

import math
from collections.abc import Mapping

from starlette.responses import Response

from hasten.server.protocol.bodies import dump_json
from hasten.server.types import ErrorKind, ServiceError

CLIENT_GONE = 499
"""Nobody reads it; it stands in the log and among the counts of calls."""
STATUS = {
    ErrorKind.INVALID: 400,
    ErrorKind.NOT_FOUND: 404,
    ErrorKind.ALREADY_EXISTS: 400,
    ErrorKind.UNAVAILABLE: 503,
    ErrorKind.EXHAUSTED: 503,
    ErrorKind.UNSUPPORTED: 501,
    ErrorKind.CANCELLED: CLIENT_GONE,
    ErrorKind.INTERNAL: 500,
}
OPENAI_PATHS = ("/v1/", "/tokenize", "/detokenize", "/score", "/rerank", "/v2/rerank", "/pooling", "/classify")
"""How paths begin whose errors have OpenAI's form."""
_LONGEST_RETRY_S = 3600
"""An estimate beyond it is not worth more."""
_OPENAI_CODES = {401: "invalid_api_key", 404: "unknown_url"}


def retry_after(seconds: float | None) -> int:
    """Value of the header Retry-After: an estimate in whole seconds, up to an hour; 1 where there is none."""
    return max(1, math.ceil(min(seconds or 0, _LONGEST_RETRY_S)))


def error_response(path: str, status: int, message: str, headers: Mapping[str, str] | None = None) -> Response:
    """The answer to a request that failed."""
    error: object = message
    if path.startswith(OPENAI_PATHS):
        kind = "invalid_request_error" if status < 500 else "server_error"
        error = {"message": message, "type": kind, "param": None, "code": _OPENAI_CODES.get(status)}
    return Response(
        dump_json({"error": error}),
        status_code=status,
        headers={"content-type": "application/json", **(headers or {})},
    )


def service_error_response(path: str, error: ServiceError) -> Response:
    """The answer to a request that the service refused; where a later one may be taken, with when to try again."""
    headers = {"retry-after": str(retry_after(error.retry_after))} if error.is_temporary else None
    return error_response(path, STATUS[error.kind], str(error), headers)
