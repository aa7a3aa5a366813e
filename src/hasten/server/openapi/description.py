"""The server's HTTP routes in OpenAPI's form, described from the routes and the types that parse their bodies."""

import re
from collections.abc import Iterator, Sequence
from importlib.resources import files
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from hasten import __version__
from hasten.server.errors import OPENAI_PATHS
from hasten.server.openapi.operation import Operation, operation_of
from hasten.server.page.routes import page_headers

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
_ERRORS: dict[str, Any] = {
    "OpenAIError": {
        "type": "object",
        "properties": {
            "error": {
                "type": "object",
                "properties": {
                    "message": {"type": "string"},
                    "type": {"type": "string"},
                    "param": {"type": ["string", "null"]},
                    "code": {"type": ["string", "null"]},
                },
                "required": ["message", "type", "param", "code"],
            }
        },
        "required": ["error"],
    },
    "AnthropicError": {
        "type": "object",
        "properties": {
            "type": {"const": "error"},
            "error": {
                "type": "object",
                "properties": {"type": {"type": "string"}, "message": {"type": "string"}},
                "required": ["type", "message"],
            },
        },
        "required": ["type", "error"],
    },
    "Error": {"type": "object", "properties": {"error": {"type": "string"}}, "required": ["error"]},
}


def openapi(routes: Sequence[Route]) -> dict[str, Any]:
    """The description of all routes but those that are not in it by themselves (`include_in_schema`)."""
    shown = [(route, operation_of(route.endpoint)) for route in routes if route.include_in_schema]
    types = [operation.body for _, operation in shown if operation.body is not None]
    schemas, components = msgspec.json.schema_components(types, ref_template="#/components/schemas/{name}")
    bodies = iter(schemas)
    paths: dict[str, dict[str, Any]] = {}
    for route, operation in shown:
        body = None if operation.body is None else next(bodies)
        path = _PARAMETER.sub(r"{\1}", route.path)
        entry = paths.setdefault(path, {})
        for method in sorted((route.methods or set()) - {"HEAD"}):
            entry.setdefault(method.lower(), _operation(route, method, operation, body))
    header = {"type": "apiKey", "in": "header", "name": "x-api-key"}
    keys = {"bearer": {"type": "http", "scheme": "bearer"}, "key": header}
    return {
        "openapi": "3.1.0",
        "info": {"title": "hasten", "version": __version__},
        "paths": paths,
        "components": {"schemas": _ERRORS | components, "securitySchemes": keys},
        "security": [{}, {"bearer": []}, {"key": []}],
    }


def _operation(route: Route, method: str, operation: Operation, body: Any) -> dict[str, Any]:
    tag = next((tag for begin, tag in _TAGS.items() if route.path.startswith(begin)), "The server")
    identity = re.sub(r"\W+", "_", method.lower() + _PARAMETER.sub(r"\1", route.path)).strip("_")
    described: dict[str, Any] = {"operationId": identity, "summary": operation.summary, "tags": [tag]}
    if parameters := list(_parameters(route)):
        described["parameters"] = parameters
    if body is not None:
        described["requestBody"] = {"required": True, "content": {"application/json": {"schema": body}}}
    elif method == "POST" and tag == _TRITON:
        content = {"application/json": {"schema": {"type": "object", "description": _TRITON_BODY}}}
        described["requestBody"] = {"required": False, "content": content}
    return described | {"responses": _responses(route, operation)}


def _parameters(route: Route) -> Iterator[dict[str, Any]]:
    for name in _PARAMETER.findall(route.path):
        yield {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}


def _responses(route: Route, operation: Operation) -> dict[str, Any]:
    kinds = ["application/json", *(["text/event-stream"] if operation.streams else [])]
    if route.path in ("/", "/docs"):
        kinds = ["text/html"]
    elif route.path == "/metrics":
        kinds = ["text/plain"]
    error = "Error"
    if route.path.startswith("/v1/messages"):
        error = "AnthropicError"
    elif route.path.startswith(OPENAI_PATHS):
        error = "OpenAIError"
    schema = {"schema": {"$ref": f"#/components/schemas/{error}"}}
    return {
        "200": {"description": "The answer", "content": {kind: {} for kind in kinds}},
        "default": {"description": "An error", "content": {"application/json": schema}},
    }


def docs_routes(routes: Sequence[Route]) -> list[Route]:
    """The description of these routes and of its own two, at /openapi.json, and the page that shows it, at /docs."""
    html = (files("hasten.server.openapi") / "docs.html").read_bytes()
    headers = page_headers(html)
    body = b""

    async def docs(_: Request) -> Response:
        """This description as a page"""
        return Response(html, headers=headers, media_type="text/html")

    async def description(_: Request) -> Response:
        """The description of all routes in OpenAPI's form"""
        nonlocal body
        body = body or msgspec.json.encode(openapi([*routes, *own]))
        return Response(body, media_type="application/json")

    own = [Route("/docs", docs), Route("/openapi.json", description)]
    return own
