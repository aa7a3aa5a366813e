"""The server's HTTP routes in OpenAPI's form, described from the routes and the types that parse their bodies."""

import re
from collections.abc import Sequence
from importlib.resources import files
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from hasten import __version__
from hasten.server.errors import ErrorObject, error_body
from hasten.server.openapi.operation import Operation, operation_of
from hasten.server.page.routes import html_route

_PARAMETER = re.compile(r"{(\w+)(?::\w+)?}")
_TRITON = "Triton's protocol"
_TAGS = {
    "/v1/messages": "Anthropic's API",
    "/v1/": "OpenAI's API",
    "/v2/rerank": "Vectors and scores",
    "/v2": _TRITON,
    "/pooling": "Vectors and scores",
    "/classify": "Vectors and scores",
    "/score": "Vectors and scores",
    "/rerank": "Vectors and scores",
    "/tokenize": "Tokenizers",
    "/detokenize": "Tokenizers",
}
"""How paths begin, and what their routes belong to; the first one holds."""
_TRITON_BODY = "as KServe's predict protocol, version 2, and Triton's extensions have it; tensors may follow as binary"


def openapi(routes: Sequence[Route]) -> dict[str, Any]:
    """The description of all routes but those that are not in it by themselves (`include_in_schema`)."""
    shown = [(route, operation_of(route.endpoint)) for route in routes if route.include_in_schema]
    errors = [type(error_body(route.path, 500, ErrorObject.of(500, ""))) for route, _ in shown]
    types = [*errors, *(None if operation.body is None else operation.body for _, operation in shown)]
    schemas, components = msgspec.json.schema_components(types, ref_template="#/components/schemas/{name}")
    paths: dict[str, dict[str, Any]] = {}
    for (route, operation), error, body in zip(shown, schemas[: len(shown)], schemas[len(shown) :], strict=True):
        entry = paths.setdefault(_PARAMETER.sub(r"{\1}", route.path), {})
        for method in sorted((route.methods or set()) - {"HEAD"}):
            entry.setdefault(method.lower(), _operation(route, method, operation, error, body))
    header = {"type": "apiKey", "in": "header", "name": "x-api-key"}
    keys = {"bearer": {"type": "http", "scheme": "bearer"}, "key": header}
    return {
        "openapi": "3.1.0",
        "info": {"title": "hasten", "version": __version__},
        "paths": paths,
        "components": {"schemas": components, "securitySchemes": keys},
        "security": [{}, {"bearer": []}, {"key": []}],
    }


def _operation(route: Route, method: str, operation: Operation, error: Any, body: Any) -> dict[str, Any]:
    tag = next((tag for begin, tag in _TAGS.items() if route.path.startswith(begin)), "The server")
    identity = re.sub(r"\W+", "_", method.lower() + _PARAMETER.sub(r"\1", route.path)).strip("_")
    described: dict[str, Any] = {"operationId": identity, "summary": operation.summary, "tags": [tag]}
    path = {"in": "path", "required": True, "schema": {"type": "string"}}
    if names := _PARAMETER.findall(route.path):
        described["parameters"] = [{"name": name, **path} for name in names]
    if operation.body is not None:
        described["requestBody"] = {"required": True, "content": {"application/json": {"schema": body}}}
    elif method == "POST" and tag == _TRITON:
        content = {"application/json": {"schema": {"type": "object", "description": _TRITON_BODY}}}
        described["requestBody"] = {"required": False, "content": content}
    return described | {"responses": _responses(route, operation, error)}


def _responses(route: Route, operation: Operation, error: Any) -> dict[str, Any]:
    kinds = ["application/json", *(["text/event-stream"] if operation.streams else [])]
    if route.path in ("/", "/docs"):
        kinds = ["text/html"]
    elif route.path == "/metrics":
        kinds = ["text/plain"]
    return {
        "200": {"description": "The answer", "content": {kind: {} for kind in kinds}},
        "default": {"description": "An error", "content": {"application/json": {"schema": error}}},
    }


def docs_routes(routes: Sequence[Route]) -> list[Route]:
    """The description of these routes and of its own two, at /openapi.json, and the page that shows it, at /docs."""
    html = (files("hasten.server.openapi") / "docs.html").read_bytes()
    body = b""

    async def description(_: Request) -> Response:
        """The description of all routes in OpenAPI's form"""
        nonlocal body
        body = body or msgspec.json.encode(openapi([*routes, *own]))
        return Response(body, media_type="application/json")

    own = [html_route("/docs", html, "This description as a page"), Route("/openapi.json", description)]
    return own
