"""Every route declares what it takes; the declaration is what requests are checked against and what is published."""

import asyncio
import json
from types import SimpleNamespace
from typing import Any

import pytest
from starlette.requests import Request
from starlette.routing import BaseRoute

from agentd.api import access, requests, schemas
from agentd.api.access import Scope
from agentd.api.app import ADMIN, API
from agentd.api.openapi import document
from agentd.api.requests import on_error
from agentd.api.routes import DeclaredRoute
from agentd.errors import AgentdError

ROUTES = [route for route in API + ADMIN if isinstance(route, DeclaredRoute)]
WRONG = {"integer": ["x", "-1", str(1 << 70)], "enum": ["other", ""], "pattern": ["-", "x1"]}


def operation(route: DeclaredRoute) -> dict[str, Any]:
    (method,) = (route.methods or set()) - {"HEAD"}
    description: dict[str, Any] = document(ROUTES)["paths"][route.path.replace(":path}", "}")][method.lower()]
    return description


def ask(route: DeclaredRoute, query: str) -> dict[str, Any]:
    """The error of a request that must end before the handler looks for its services."""
    scope = {
        "type": "http",
        "method": "GET",
        "path": route.path,
        "query_string": query.encode(),
        "headers": [],
        "path_params": {},
        "app": SimpleNamespace(state=SimpleNamespace(door=access.ADMIN)),
    }

    async def answer() -> Any:
        try:
            return await route.endpoint(Request(scope))
        except AgentdError as error:
            return await on_error(Request(scope), error)

    response = asyncio.run(answer())
    assert response.status_code == 400
    error = json.loads(response.body)["error"]
    is_text = route.path.startswith("/api/")  # Ollama's
    assert isinstance(error, str) == is_text
    return {"message": error} if is_text else error


def test_nothing_is_served_that_is_not_declared() -> None:
    undeclared: list[BaseRoute] = [route for route in API + ADMIN if not isinstance(route, DeclaredRoute)]
    assert not undeclared
    assert all(route.body or route.media != "application/json" for route in ROUTES if "POST" in (route.methods or ()))


def test_every_route_needs_a_scope_but_two_that_say_that_it_is_there() -> None:
    needs = {route.path: route.scope for route in ROUTES}
    assert [path for path, scope in needs.items() if scope is Scope.NONE] == ["/", "/health"]
    assert all((scope is Scope.ADMIN) == path.startswith("/admin/") for path, scope in needs.items())
    assert {route.path for route in API if isinstance(route, DeclaredRoute)} == {
        route.path for route in ROUTES if route.scope in access.API.scopes
    }


@pytest.mark.parametrize("route", ROUTES, ids=lambda route: route.path)
def test_every_body_and_query_parameter_is_published(route: DeclaredRoute) -> None:
    published = operation(route)
    queries = {each["name"]: each["schema"] for each in published.get("parameters", ()) if each["in"] == "query"}
    assert queries == route.query
    if route.body is not None:
        (content,) = published["requestBody"]["content"].values()
        assert content["schema"]["$ref"].endswith(f"/{route.body.__name__}")
        properties = document(ROUTES)["components"]["schemas"][route.body.__name__].get("properties", {})
        assert len(properties) == len(route.body.model_fields)


@pytest.mark.parametrize("route", ROUTES, ids=lambda route: route.path)
def test_every_query_parameter_is_checked_as_it_is_published(route: DeclaredRoute) -> None:
    for name, schema in route.query.items():
        kind = next((kind for kind in ("enum", "pattern") if kind in schema), schema.get("type", ""))
        for value in WRONG.get(kind, []):
            assert ask(route, f"{name}={value}")["param"] == name, value
            assert ask(route, f"{name}={value}&{name}={value}")["param"] == name
    if not route.lenient:
        assert "unknown query parameter 'colour'" in ask(route, "colour=red")["message"]


def test_a_handler_cannot_parse_another_body_than_it_declares() -> None:
    request = Request({"type": "http", "path": "/", "headers": [], "method": "POST"})
    request.state.body_model = schemas.AdaptBody
    with pytest.raises(TypeError, match="AdaptBody"):
        asyncio.run(requests.parse(request, schemas.RollbackBody, 100))
