"""What the routes of OpenAI's API, and those with its form of errors, have in common."""

import logging
from collections.abc import Callable

import msgspec
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from hasten.core.errors import HastenError, InvalidRequestError
from hasten.server.by_size import by_size
from hasten.server.engine.client import EngineClient, QueueError
from hasten.server.http_errors import CLIENT_GONE, retry_after
from hasten.server.json_size import check_declared_size
from hasten.server.openai.errors import error_answer
from hasten.server.openai.params import Decoded, decode, queue_timeout
from hasten.server.openapi.operation import Handler, Operation, described
from hasten.server.types import ServiceError

_log = logging.getLogger(__name__)


ErrorAnswer = Callable[[Exception], tuple[int, bytes]]
"""HTTP status and body for an error."""


def guarded(handler: Handler, operation: Operation, answer: ErrorAnswer = error_answer) -> Handler:
    """A handler of an operation, whose errors become an API's error objects, by default those of OpenAI's."""

    async def wrapped(request: Request) -> Response:
        try:
            return await handler(request)
        except ClientDisconnect:
            return Response(status_code=CLIENT_GONE)
        except HTTPException:
            raise
        except RecursionError:
            return _error_response(InvalidRequestError("the request's lists and objects are nested too deeply"), answer)
        except Exception as error:
            if not isinstance(error, HastenError):
                _log.exception("%s %s failed", request.method, request.url.path)
            return _error_response(error, answer)

    return described(wrapped, operation)


def _error_response(error: Exception, answer: ErrorAnswer) -> Response:
    """The response to a request that failed before its first token."""
    status, body = answer(error)
    wait = error.retry_after if isinstance(error, QueueError | ServiceError) else None
    headers = {"retry-after": str(retry_after(wait))} if status in (429, 503) else None
    return Response(body, status, headers, media_type="application/json")


def checked_wait(request: Request, priority: int | None, client: EngineClient) -> float | None:
    """Seconds that a request may wait; QueueWaitError, before its prompt costs anything, where that is too short."""
    timeout = queue_timeout(request.headers)
    client.check_wait(priority or 0, timeout)
    return timeout


async def read_body(request: Request, decoder: msgspec.json.Decoder[Decoded]) -> Decoded:
    """What a body asks for; OpenAIError and InvalidRequestError where it is not valid, or too large."""
    check_declared_size(request.headers.get("content-length"))
    body = await request.body()
    return await by_size(len(body), decode, body, decoder)


def json_response(body: bytes) -> Response:
    """An answer of JSON."""
    return Response(body, media_type="application/json")
