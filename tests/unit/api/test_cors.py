"""Web pages: those that are named may ask, no other may, and none has cookies."""

from types import SimpleNamespace
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.testclient import TestClient

from agentd.api import access
from agentd.api.access import Access, Scope
from agentd.api.cors import Cors
from agentd.api.peers import RateLimiter
from agentd.api.requests import on_error
from agentd.api.routes import DeclaredRoute
from agentd.config.schema import Config, ServeSettings
from agentd.errors import AgentdError

PAGE = "https://chat.example:3000"
OTHER = ["https://chat.example", "http://chat.example:3000", f"{PAGE}.evil.example", "null", "https://evil.example"]


async def answer(request: Request) -> Response:
    return PlainTextResponse("hello")


async def key(request: Request) -> Access | None:
    return Access(Scope.ASK, "key:page") if "authorization" in request.headers else None


@pytest.fixture
def client() -> TestClient:
    routes = [DeclaredRoute("GET", "/ask", answer, Scope.ASK), DeclaredRoute("POST", "/ask", answer, Scope.ASK)]
    app: Any = Starlette(routes=routes, exception_handlers={AgentdError: on_error}, middleware=[Middleware(Cors)])
    config = Config(serve=ServeSettings(origins=(PAGE,)))
    app.state.services, app.state.door = (
        SimpleNamespace(wrong_credentials=RateLimiter(), authorities=[key], config=config),
        access.TCP,
    )
    return TestClient(app, base_url="http://board.local:8080")


def preflight(client: TestClient, origin: str) -> Any:
    asked = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization,x-stainless-os"}
    return client.options("/ask", headers={"Origin": origin, **asked})


def test_a_page_that_is_named_may_ask(client: TestClient) -> None:
    before = preflight(client, PAGE)
    assert before.status_code == 204
    assert before.headers["access-control-allow-origin"] == PAGE
    assert before.headers["access-control-allow-headers"] == "authorization,x-stainless-os"
    asked = client.post("/ask", headers={"Origin": PAGE, "Authorization": "Bearer x"})
    assert (asked.status_code, asked.headers["access-control-allow-origin"]) == (200, PAGE)
    assert asked.headers["vary"] == "Origin"
    without = client.post("/ask", headers={"Origin": PAGE})
    assert (without.status_code, without.headers["access-control-allow-origin"]) == (401, PAGE)
    for response in (before, asked, without):
        assert "access-control-allow-credentials" not in response.headers
        assert "*" not in response.headers.values()


@pytest.mark.parametrize("origin", OTHER)
def test_no_other_page_may(client: TestClient, origin: str) -> None:
    assert preflight(client, origin).status_code == 405
    for method in ("GET", "POST"):
        response = client.request(method, "/ask", headers={"Origin": origin, "Authorization": "Bearer x"})
        assert response.status_code == (403 if method == "POST" else 200)
        assert not [name for name in response.headers if name.startswith("access-control")]


def test_a_page_of_this_server_may_with_credentials(client: TestClient) -> None:
    own = {"Origin": "http://board.local:8080"}
    assert client.post("/ask", headers={**own, "Authorization": "Bearer x"}).status_code == 200
    client.app.state.door = access.LOOPBACK  # type: ignore[attr-defined]  # a name that was made to point here, no key
    assert client.post("/ask", headers=own).status_code == 403


def test_headers_that_are_none_are_not_given_back(client: TestClient) -> None:
    asked = {"Origin": PAGE, "Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "a\x7fb"}
    assert "access-control-allow-headers" not in client.options("/ask", headers=asked).headers
