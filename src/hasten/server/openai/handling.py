"""What routes of OpenAI's API and those beside it have in common: how bodies are read and errors answered."""

import logging
import re
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from hasten.core.errors import HastenError, InvalidRequestError
from hasten.core.text import shortened
from hasten.server.by_size import by_size
from hasten.server.engine.client import EngineClient
from hasten.server.engine.queue import QueueError, Queueing
from hasten.server.errors import CLIENT_GONE, INTERNAL, ErrorObject, error_response, kind_of, retry_after
from hasten.server.json_size import check_declared_size
from hasten.server.openai.params import Decoded, OpenAIError, decode, queue_timeout
from hasten.server.openai.types import ChatRequest, CompletionRequest
from hasten.server.openapi.operation import Handler, Operation, described
from hasten.server.pooling.texts import TextLengthError
from hasten.server.pooling.types import EmbeddingRequest, PoolingRequest, RerankRequest, ScoreRequest
from hasten.server.types import LONGEST_MESSAGE, ServiceError

_REQUESTS = (CompletionRequest, ChatRequest, EmbeddingRequest, PoolingRequest, ScoreRequest, RerankRequest)
_FIELDS = {name for request in _REQUESTS for name in request.__struct_fields__}


def error_object(error: Exception) -> tuple[int, ErrorObject]:
    """HTTP status of an error, and what is said of it."""
    message = shortened(str(error) if isinstance(error, HastenError) else INTERNAL, LONGEST_MESSAGE)
    if isinstance(error, OpenAIError):
        return error.status, ErrorObject.of(error.status, message, error.param, error.code)
    codes = kind_of(error).value
    status = codes.openai or codes.http
    param = _field(error) if isinstance(error, InvalidRequestError) else None
    return status, ErrorObject.of(status, message, param, _code(error))


def _field(error: InvalidRequestError) -> str | None:
    """The field that a message begins with."""
    named = re.split(r"\W", str(error), maxsplit=1)[0]
    return named if named in _FIELDS else None


def _code(error: Exception) -> str | None:
    if isinstance(error, TextLengthError):
        return "context_length_exceeded"
    if isinstance(error, QueueError):
        return error.reason
    return "service_unavailable" if kind_of(error).is_temporary else None


_log = logging.getLogger(__name__)


def guarded(handler: Handler, operation: Operation) -> Handler:
    """A handler of an operation, whose errors are answered in its API's form."""

    async def wrapped(request: Request) -> Response:
        try:
            return await handler(request)
        except ClientDisconnect:
            return Response(status_code=CLIENT_GONE)
        except HTTPException:
            raise
        except RecursionError:
            nested = InvalidRequestError("the request's lists and objects are nested too deeply")
            return _error_response(request, nested)
        except Exception as error:
            if not isinstance(error, HastenError):
                _log.exception("%s %s failed", request.method, request.url.path)
            return _error_response(request, error)

    return described(wrapped, operation)


def _error_response(request: Request, error: Exception) -> Response:
    """The response to a request that failed before its first token."""
    status, said = error_object(error)
    wait = error.retry_after if isinstance(error, QueueError | ServiceError) else None
    headers = {"retry-after": str(retry_after(wait))} if status in (429, 503) else None
    return error_response(request.url.path, status, said, headers)


def api_route(
    path: str,
    summary: str,
    body: type[Decoded],
    answer: Callable[[Request, Decoded], Awaitable[Response]],
    *,
    streams: bool = False,
) -> Route:
    """POST to a path, answered from the request's body, which is read as a type."""
    decoder = msgspec.json.Decoder(body)

    async def handler(request: Request) -> Response:
        return await answer(request, await _read_body(request, decoder))

    return Route(path, guarded(handler, Operation(summary, body, streams)), methods=["POST"])


def checked_queueing(request: Request, client: EngineClient, priority: int | None, salt: str | None = None) -> Queueing:
    """How a request waits; QueueWaitError, before its prompt costs anything, where it may not wait for long enough."""
    queueing = Queueing(priority or 0, queue_timeout(request.headers), salt)
    client.check_wait(queueing)
    return queueing


async def _read_body(request: Request, decoder: msgspec.json.Decoder[Decoded]) -> Decoded:
    """What a body asks for; OpenAIError and InvalidRequestError where it is not valid, too large, or packed."""
    encoding = request.headers.get("content-encoding", "").strip()
    if encoding.lower() not in ("", "identity"):
        raise OpenAIError(
            f"bodies with content-encoding {encoding[:80]!r} are not supported here; leave it out", status=415
        )
    check_declared_size(request.headers.get("content-length"))
    body = await request.body()
    return await by_size(len(body), decode, body, decoder)


def json_response(answer: Any) -> Response:
    """An answer of JSON, which may be encoded already."""
    body = answer if isinstance(answer, bytes) else msgspec.json.encode(answer)
    return Response(body, media_type="application/json")
