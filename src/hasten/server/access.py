"""Access log of both transports: each call is counted by API and status, and gets a log line and an id.

A client may name a call itself, in the header (over gRPC: the metadata) `x-request-id`; the answer has it too.
"""

import logging
import re
import secrets
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any
from urllib.parse import quote

import grpc
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from hasten.server.http_errors import CLIENT_GONE, OPENAI_PATHS
from hasten.server.security import OPEN_CALLS, OPEN_PATHS

REQUEST_ID = "x-request-id"
_REQUEST_ID = re.compile(r"[!-~]{1,128}")
_LONGEST_PATH = 200
_GRPC_STATUS = {code.value[0]: code.name for code in grpc.StatusCode}
_log = logging.getLogger(__name__)


class AccessLog:
    """The calls of one server."""

    def __init__(self) -> None:
        self.counts: Counter[tuple[str, str]] = Counter()
        """(API, status) -> calls that were answered or given up."""

    def record(self, api: str, call: str, status: str, began: float, request_id: str) -> None:
        """Count a call that has ended, and log it at verbose levels; `began` is on the clock of time.monotonic."""
        self.counts[api, status] += 1
        _log.debug("%s %s in %.1f ms, request id %s", call, status, 1e3 * (time.monotonic() - began), request_id)

    def http(self, app: ASGIApp) -> ASGIApp:
        """An application whose requests are recorded."""
        return _RecordedApp(app, self)

    def grpc(self) -> grpc.aio.ServerInterceptor:
        """An interceptor that records calls."""
        return _Interceptor(self)


def _request_id(given: str) -> str:
    return given if _REQUEST_ID.fullmatch(given) else secrets.token_hex(8)


def _api(path: str) -> str:
    """The API that an HTTP path belongs to."""
    if path in OPEN_PATHS:
        return "probe"
    if path.startswith(OPENAI_PATHS):
        return "openai"
    if path == "/v2" or path.startswith("/v2/"):
        return "triton_http"
    return "page" if path in ("/", "/state") else "other"


class _RecordedApp:
    """ASGI middleware."""

    def __init__(self, app: ASGIApp, calls: AccessLog) -> None:
        self._app = app
        self._calls = calls

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began, status = time.monotonic(), CLIENT_GONE
        headers: dict[bytes, bytes] = dict(scope["headers"])
        request_id = _request_id(headers.get(REQUEST_ID.encode(), b"").decode("latin-1"))

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), (REQUEST_ID.encode(), request_id.encode())]
            await send(message)

        try:
            await self._app(scope, receive, answer)
        finally:
            path = scope["path"]
            call = f"HTTP {scope['method']} {quote(path, safe='/:')[:_LONGEST_PATH]}"
            self._calls.record(_api(path), call, str(status), began, request_id)


class _Interceptor(grpc.aio.ServerInterceptor):  # type: ignore[misc]  # grpc has no types
    def __init__(self, calls: AccessLog) -> None:
        self._calls = calls

    async def intercept_service(self, continuation: Callable[[Any], Awaitable[Any]], details: Any) -> Any:
        """The handler of a call, recorded; None where there is no such call."""
        handler = await continuation(details)
        if handler is None:
            return None
        request_id = _request_id(str(dict(details.invocation_metadata or ()).get(REQUEST_ID, "")))
        many = handler.request_streaming
        recorded = self._recorded(handler.stream_stream if many else handler.unary_unary, details.method, request_id)
        made = grpc.stream_stream_rpc_method_handler if many else grpc.unary_unary_rpc_method_handler
        return made(recorded, handler.request_deserializer, handler.response_serializer)

    def _recorded(self, handle: Callable[..., Awaitable[Any]], method: str, request_id: str) -> Any:
        async def recorded(request: Any, context: Any) -> Any:
            began, status = time.monotonic(), grpc.StatusCode.CANCELLED.name
            context.set_trailing_metadata(((REQUEST_ID, request_id),))
            try:
                response = await handle(request, context)
                status = grpc.StatusCode.OK.name
                return response
            except grpc.aio.AbortError:
                code = context.code()
                status = code.name if isinstance(code, grpc.StatusCode) else _GRPC_STATUS[code]
                raise
            finally:
                api = "probe" if method.rpartition("/")[2] in OPEN_CALLS else "triton_grpc"
                self._calls.record(api, f"gRPC {method}", status, began, request_id)

        return recorded
