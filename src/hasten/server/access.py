"""Access log of both transports: each call is counted by API and status, and gets a log line and an id.

A client may name a call itself, in the header (over gRPC: the metadata) `x-request-id`; the answer has it too.
"""

import logging
import re
import secrets
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import grpc
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from hasten.server.call import Call, current_call
from hasten.server.errors import CLIENT_GONE, OPENAI_PATHS
from hasten.server.security import OPEN_CALLS, OPEN_PATHS

if TYPE_CHECKING:
    from hasten.server.tracing import OtelMetrics, Tracing

REQUEST_ID = "x-request-id"
_REQUEST_ID = re.compile(r"[!-~]{1,128}")
_LONGEST_PATH = 200
_MODEL_APIS = frozenset({"openai", "triton_http", "triton_grpc"})
"""Whose calls are traced, and logged where requests are."""
_HEADERS = frozenset({REQUEST_ID.encode(), b"traceparent", b"tracestate"})
_SERVER_ERROR = 500
_SERVER_FAULTS = frozenset({"UNKNOWN", "UNIMPLEMENTED", "INTERNAL", "UNAVAILABLE", "DATA_LOSS", "DEADLINE_EXCEEDED"})
"""Statuses of gRPC that are the server's fault, by OpenTelemetry's conventions."""
_GRPC_STATUS = {code.value[0]: code.name for code in grpc.StatusCode}
_log = logging.getLogger(__name__)


class AccessLog:
    """The calls of one server."""

    def __init__(
        self, tracing: "Tracing | None" = None, metrics: "OtelMetrics | None" = None, *, log_requests: bool = False
    ) -> None:
        """`log_requests`: calls to models have a line at any level of the log, and not at verbose ones alone."""
        self.counts: Counter[tuple[str, str]] = Counter()
        """(API, status) -> calls that were answered or given up."""
        self._tracing = tracing
        self._metrics = metrics
        self._log_requests = log_requests

    def begin(self, api: str, name: str, headers: Mapping[str, str]) -> Call:
        """A call that has come; `headers`: its id and W3C's trace context, where it has them."""
        given = headers.get(REQUEST_ID, "")
        request_id = given if _REQUEST_ID.fullmatch(given) else secrets.token_hex(8)
        if api not in _MODEL_APIS:
            return Call(request_id)
        trace = None if self._tracing is None else self._tracing.call(name, headers, request_id)
        return Call(request_id, trace, None if self._metrics is None else partial(self._metrics.record, name))

    def end(self, call: Call, api: str, name: str, status: str, *, failed: bool) -> None:
        """Count a call that has ended, log it, and end its trace; `failed`: by the server's fault."""
        self.counts[api, status] += 1
        level = logging.INFO if self._log_requests and api in _MODEL_APIS else logging.DEBUG
        if _log.isEnabledFor(level):
            _log_call(level, call, name, status)
        if call.trace is not None:
            call.trace.end(name, status, failed=failed)

    def http(self, app: ASGIApp) -> ASGIApp:
        """An application whose requests are recorded."""

        async def recorded(scope: Scope, receive: Receive, send: Send) -> None:
            if scope["type"] != "http":
                await app(scope, receive, send)
                return
            status, headers = CLIENT_GONE, scope["headers"]
            found = {key.decode("latin-1"): value.decode("latin-1") for key, value in headers if key in _HEADERS}
            api, path = _api_and_name(scope["path"])
            call = self.begin(api, f"{scope['method']} {path}", found)

            async def answer(message: Message) -> None:
                nonlocal status
                if message["type"] == "http.response.start":
                    status = message["status"]
                    own = (REQUEST_ID.encode(), call.request_id.encode())
                    message["headers"] = [*message.get("headers", ()), own]
                await send(message)

            current = current_call.set(call)
            try:
                await app(scope, receive, answer)
            finally:
                current_call.reset(current)
                self.end(call, api, f"HTTP {scope['method']} {path}", str(status), failed=status >= _SERVER_ERROR)

        return recorded

    def grpc(self, method: str, handle: Callable[[Any, Any], Awaitable[Any]]) -> Callable[[Any, Any], Awaitable[Any]]:
        """A handler of the calls of a method, by its path, which are recorded."""
        name = method.rpartition("/")[2]
        api = "probe" if name in OPEN_CALLS else "triton_grpc"

        async def recorded(request: Any, context: Any) -> Any:
            status, metadata = grpc.StatusCode.CANCELLED.name, context.invocation_metadata() or ()
            call = self.begin(api, name, {key: value for key, value in metadata if isinstance(value, str)})
            context.set_trailing_metadata(((REQUEST_ID, call.request_id),))
            current = current_call.set(call)
            try:
                response = await handle(request, context)
                status = grpc.StatusCode.OK.name
                return response
            except grpc.aio.AbortError:
                code = context.code()
                status = code.name if isinstance(code, grpc.StatusCode) else _GRPC_STATUS[code]
                raise
            finally:
                current_call.reset(current)
                self.end(call, api, f"gRPC {method}", status, failed=status in _SERVER_FAULTS)

        return recorded


def _log_call(level: int, call: Call, name: str, status: str) -> None:
    """One line, with its parts as `fields` of the record."""
    milliseconds = 1e3 * (time.monotonic() - call.began)
    fields = {"call": name, "status": status, "duration_ms": round(milliseconds, 1), "request_id": call.request_id}
    if call.trace is not None:
        fields["trace_id"] = call.trace.trace_id
    about = call.fields()
    shown = "".join(f", {key} {value}" for key, value in about.items())
    text = "%s %s in %.1f ms, request id %s%s"
    _log.log(level, text, name, status, milliseconds, call.request_id, shown, extra={"fields": {**fields, **about}})


@lru_cache(64)
def _api_and_name(path: str) -> tuple[str, str]:
    """The API that an HTTP path belongs to, and what the log calls it."""
    return _api(path), quote(path, safe="/:")[:_LONGEST_PATH]


def _api(path: str) -> str:
    if path in OPEN_PATHS:
        return "probe"
    if path.startswith(OPENAI_PATHS):
        return "openai"
    if path == "/v2" or path.startswith("/v2/"):
        return "triton_http"
    return "page" if path in ("/", "/state") else "other"
