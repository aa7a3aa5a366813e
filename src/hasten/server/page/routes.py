"""The page at `/`: a playground and the server's live state, put together as one file that loads nothing."""

import base64
import hashlib
import re
import time
from collections.abc import Mapping
from dataclasses import asdict
from importlib.resources import files
from typing import TYPE_CHECKING, Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from hasten.server.engine.client import EngineClient
from hasten.server.openai.models import models_by_id
from hasten.server.openai.prompts import ChatPrompts
from hasten.server.openapi.operation import Operation, described

if TYPE_CHECKING:
    from hasten.server.service import Service

_SCRIPTS = ("dom", "tokens", "panel", "play", "history", "plots", "state")
"""In the order in which they run."""
_INLINE = re.compile(r"<(script|style)>(.*?)</\1>", re.DOTALL)


def page_routes(service: "Service", prompts: ChatPrompts) -> list[Route]:
    """The page and the state that it polls every second. The page itself has nothing that a key should guard.

    `prompts`: those of the API, which know what engines have chat templates.
    """

    async def state(_: Request) -> Response:
        """What the page asks for every second: engines with their counters"""
        body = msgspec.json.encode(await server_state(service, prompts))
        return Response(body, headers={"cache-control": "no-store"}, media_type="application/json")

    return [
        html_route("/", page_html(), "A page with a playground and the server's live state"),
        Route("/state", state),
    ]


def html_route(path: str, html: bytes, summary: str) -> Route:
    """A page that loads nothing from elsewhere."""
    headers = {
        "content-security-policy": content_security_policy(html.decode()),
        "cache-control": "no-cache",
        "referrer-policy": "no-referrer",
        "x-content-type-options": "nosniff",
    }

    async def page(_: Request) -> Response:
        return Response(html, headers=headers, media_type="text/html")

    return Route(path, described(page, Operation(summary)))


def page_html() -> bytes:
    """The page with its style and its scripts inside."""
    folder = files("hasten.server.page")
    scripts = "\n".join((folder / f"{name}.js").read_text(encoding="utf-8") for name in _SCRIPTS)
    html, style = ((folder / name).read_text(encoding="utf-8") for name in ("index.html", "page.css"))
    html = html.replace("<style></style>", f"<style>{style}</style>")
    return html.replace("<script></script>", f'<script>"use strict";\n{scripts}</script>').encode()


def content_security_policy(html: str) -> str:
    """A policy that lets a page run its own script and style, by their hashes, and ask its own server; nothing else."""
    hashes: Mapping[str, list[str]] = {"script": [], "style": []}
    for kind, text in _INLINE.findall(html):
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        hashes[kind].append(f"'sha256-{digest}'")
    return (
        f"default-src 'none'; script-src {' '.join(hashes['script'])}; style-src {' '.join(hashes['style'])}; "
        "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


async def server_state(service: "Service", prompts: ChatPrompts) -> dict[str, Any]:
    """Engines with their counters, and the models that have no engine and are no other name of one.

    `time` is in seconds, of a clock that only goes forward.
    """
    engines = service.engines()
    ids = {key: name for name, key in reversed(models_by_id(engines, service.text_models()).items())}
    others = [
        {"name": entry.name, "version": entry.version, "state": entry.state, "reason": entry.reason}
        for entry in service.index()
        if (entry.name, entry.version) not in engines and entry.name not in ids.values()
    ]
    found = [
        _engine(ids[key], client) | {"chat": await prompts.has_template(client)} for key, client in engines.items()
    ]
    return {"time": time.monotonic(), "engines": found, "others": others}


def _engine(name: str, client: EngineClient) -> dict[str, Any]:
    info = client.info
    facts = {"type": info.model_type, "dtype": info.types, "device": info.device, "max_model_len": info.max_model_len}
    pooling = info.pooling
    does = {"tasks": ("generate",), "labels": ()}
    if pooling is not None:
        does = {"tasks": pooling.tasks, "labels": pooling.labels}
    ready = [replica.ready for replica in client.replicas]
    state = {"id": name, "ready": client.ready, "replicas": len(ready), "replicas_ready": sum(ready)}
    return state | facts | does | asdict(client.stats())
