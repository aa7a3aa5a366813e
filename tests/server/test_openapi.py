"""The server's description of its HTTP routes: all of them are in it, with the types that parse their bodies."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

import httpx
import jsonschema  # type: ignore[import-untyped]
import pytest
from tests.server.running import running_with_routes
from tests.server.tool_model import TOOLS
from tests.waiting import LIMIT_S

from hasten.server.options import EndpointOptions, SecurityOptions, ServeOptions

pytestmark = pytest.mark.any_python
KEY = {"x-api-key": "secret"}


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[httpx.Client, Sequence[Any]]]:
    """A client of a server without models, with a key; and its routes."""
    folder = tmp_path_factory.mktemp("empty")
    (folder / "models").mkdir()
    (folder / "keys").write_text("secret\n")

    options = ServeOptions(
        model_repository=(str(folder / "models"),),
        endpoints=EndpointOptions(http_port=0, allow_grpc=False, metrics_port=0),
        security=SecurityOptions(api_key_file=str(folder / "keys")),
    )
    with running_with_routes(options) as (server, routes):
        assert server.http is not None
        with httpx.Client(base_url=f"http://127.0.0.1:{server.http.port}", timeout=LIMIT_S) as client:
            yield client, routes[server.http.port]


@pytest.fixture(scope="module")
def description(served: tuple[httpx.Client, Sequence[Any]]) -> Any:
    return served[0].get("/openapi.json", headers=KEY).raise_for_status().json()


def test_every_route_is_described(served: tuple[httpx.Client, Sequence[Any]], description: Any) -> None:
    described = {(path, method.upper()) for path, methods in description["paths"].items() for method in methods}
    routes = [route for route in served[1] if route.path != "/v1/{path:path}"]
    there = {(route.path.replace(":path}", "}"), method) for route in routes for method in route.methods - {"HEAD"}}
    assert described == there
    assert len(described) > 50


def test_what_is_described_is_valid(description: Any) -> None:
    assert description["openapi"] == "3.1.0"
    operations = [operation for methods in description["paths"].values() for operation in methods.values()]
    identities = [operation["operationId"] for operation in operations]
    assert len(set(identities)) == len(identities)
    for path, methods in description["paths"].items():
        for operation in methods.values():
            assert operation["summary"], path
            assert "default" in operation["responses"]
            names = [parameter["name"] for parameter in operation.get("parameters", ())]
            assert names == re.findall(r"{(\w+)}", path)
    for name, schema in description["components"]["schemas"].items():
        jsonschema.Draft202012Validator.check_schema(schema)
        for reference in re.findall(r"'\$ref': '#/components/schemas/(\w+)'", str(schema)):
            assert reference in description["components"]["schemas"], name


BODIES: dict[str, dict[str, Any]] = {
    "/v1/completions": {"model": "m", "prompt": ["a", "b"], "max_tokens": 3, "echo": True},
    "/v1/chat/completions": {"model": "m", "messages": [{"role": "user", "content": "a"}], "tools": TOOLS},
    "/v1/responses": {"model": "m", "input": "a", "text": {"format": {"type": "text"}}},
    "/v1/messages": {"model": "m", "messages": [{"role": "user", "content": "a"}], "max_tokens": 3},
    "/v1/embeddings": {"model": "m", "input": [[1, 2]]},
    "/rerank": {"model": "m", "query": "a", "documents": ["b", {"text": "c"}]},
    "/tokenize": {"model": "m", "prompt": "a"},
}


@pytest.mark.parametrize("path", BODIES)
def test_the_schema_of_a_body_takes_what_the_server_takes(
    served: tuple[httpx.Client, Sequence[Any]], description: Any, path: str
) -> None:
    (schema,) = [each["schema"] for each in description["paths"][path]["post"]["requestBody"]["content"].values()]
    validator = jsonschema.Draft202012Validator(schema | {"components": description["components"]})
    assert validator.is_valid(BODIES[path])
    assert served[0].post(path, json=BODIES[path], headers=KEY).status_code == 404  # there is no model
    for wrong in ({"mood": 1}, {"model": 1}):
        body = BODIES[path] | wrong
        assert not validator.is_valid(body)
        assert served[0].post(path, json=body, headers=KEY).status_code == 400


def test_the_page_loads_nothing_from_elsewhere_and_tells_nothing_without_a_key(
    served: tuple[httpx.Client, Sequence[Any]],
) -> None:
    client, _ = served
    page = client.get("/docs")
    assert page.status_code == 200
    assert page.headers["content-type"].startswith("text/html")
    assert "connect-src 'self'" in page.headers["content-security-policy"]
    assert re.findall(r"(?:https?:)?//[a-z]", page.text.replace("<!--", "")) == []
    assert client.get("/openapi.json").status_code == 401


def test_errors_have_the_form_that_is_described(served: tuple[httpx.Client, Sequence[Any]], description: Any) -> None:
    for path in ("/v1/completions", "/v1/messages", "/v2/models/{model}/infer"):
        schema = description["paths"][path]["post"]["responses"]["default"]["content"]["application/json"]["schema"]
        validator = jsonschema.Draft202012Validator(schema | {"components": description["components"]})
        for headers in ({}, KEY):
            answer = served[0].post(path.replace("{model}", "m"), json={}, headers=headers)
            assert answer.status_code in (400, 401, 404)
            assert validator.is_valid(answer.json()), answer.text
