"""The routes of the server's description of itself: as JSON, and as a page that loads nothing from elsewhere."""

from collections.abc import Sequence
from importlib.resources import files

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from hasten.server.openapi.description import openapi
from hasten.server.page.routes import page_headers


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
