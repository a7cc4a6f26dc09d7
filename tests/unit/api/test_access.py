"""Who is let in: every real route at every door, with and without credentials."""

import itertools
from types import SimpleNamespace
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.testclient import TestClient

from agentd.api import access, app
from agentd.api.access import SCOPES, Access, Door, Scope
from agentd.api.peers import RateLimiter
from agentd.api.requests import on_error
from agentd.api.routes import DeclaredRoute
from agentd.config.schema import Config, ServeSettings
from agentd.errors import AgentdError, WrongCredentials

ROUTES = [route for route in app.API + app.ADMIN if isinstance(route, DeclaredRoute)]
LOOPBACK, NETWORK = access.LOOPBACK, access.TCP
CONFIG = Config(serve=ServeSettings(origins=("https://home.example:8443",)))
ALL = [Scope.NONE, Scope.ASK, Scope.FEEDBACK, Scope.ASK | Scope.FEEDBACK, Scope.ADMIN]


async def who(request: Request) -> Response:
    return JSONResponse({"author": access.author(request)})


async def by_header(request: Request) -> Access | None:
    """An authority for which a request says itself what it may do."""
    if (brought := request.headers.get("x-may")) is None:
        return None
    if brought == "wrong":
        raise WrongCredentials
    return Access(Scope(int(brought)), "key:mine")


def client(door: Door, host: str = "localhost") -> TestClient:
    """A server with the real routes' scopes, in front of a handler that says who came in; asked for as `host`."""
    routes = [DeclaredRoute("GET", f"/{i}", who, route.scope) for i, route in enumerate(ROUTES)]
    served: Any = Starlette(routes=routes, exception_handlers={AgentdError: on_error})
    served.state.services, served.state.door = (
        SimpleNamespace(wrong_credentials=RateLimiter(), authorities=[by_header], config=CONFIG),
        door,
    )
    return TestClient(served, base_url=f"http://{host}")


@pytest.fixture(autouse=True)
def _patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """Here more wrong credentials come than any one may bring."""
    monkeypatch.setattr(access, "WRONG", 1000)


def let_in(at: TestClient, may: Scope | str | None) -> list[int]:
    """The statuses of all routes for a request that brings this."""
    headers = {} if may is None else {"x-may": may if isinstance(may, str) else str(may.value)}
    return [at.get(f"/{i}", headers=headers).status_code for i in range(len(ROUTES))]


def expected(may: Scope, otherwise: int) -> list[int]:
    return [200 if route.scope in may else otherwise for route in ROUTES]


@pytest.mark.parametrize("door", [access.API, access.ADMIN], ids=lambda door: door.name)
def test_a_unix_socket_gives_what_it_gives_and_looks_at_no_credentials(door: Door) -> None:
    for brought in (None, "wrong", Scope.ADMIN):
        assert let_in(client(door), brought) == expected(door.scopes, 403)


def test_from_the_network_only_credentials_count() -> None:
    at = client(NETWORK)
    assert let_in(at, None) == expected(Scope.NONE, 401)
    assert let_in(at, "wrong") == [401] * len(ROUTES)
    for may in ALL:
        assert let_in(at, may) == expected(may, 403)


def test_on_loopback_wrong_credentials_are_as_good_as_none() -> None:
    at = client(LOOPBACK)
    assert let_in(at, None) == expected(LOOPBACK.scopes, 403)
    assert let_in(at, "wrong") == expected(LOOPBACK.scopes, 401)
    for may in ALL:  # what is valid counts, though it gives less
        assert let_in(at, may) == expected(may, 403)


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:8080", "127.0.0.1.evil.example", "localhost.evil.example"]
)
def test_without_a_key_a_name_that_was_made_to_point_here_gets_nothing(host: str) -> None:
    """DNS rebinding: for the browser it is the page's own server, so that nothing but the name gives it away."""
    at = client(LOOPBACK, host)
    for brought, otherwise in ((None, 403), ("wrong", 401)):
        statuses = {Scope.NONE: 200, Scope.ADMIN: otherwise}
        assert let_in(at, brought) == [statuses.get(route.scope, 421) for route in ROUTES]
    for may in ALL:  # a key is of no page elsewhere
        assert let_in(at, may) == expected(may, 403)


@pytest.mark.parametrize(
    "host", ["LocalHost:9", "127.0.0.1:8080", "127.8.0.1", "[::1]:8080", "10.0.0.7", "home.example"]
)
def test_this_machine_is_asked_for_by_its_names_and_by_any_address(host: str) -> None:
    assert let_in(client(LOOPBACK, host), None) == expected(LOOPBACK.scopes, 403)


def test_the_credentials_say_who_it_is() -> None:
    at = client(LOOPBACK)
    health = next(i for i, route in enumerate(ROUTES) if route.scope is Scope.NONE)
    assert at.get(f"/{health}").json() == {"author": "tcp"}
    assert at.get(f"/{health}", headers={"x-may": "0"}).json() == {"author": "key:mine"}


def test_admin_holds_all_others_and_they_do_not_hold_each_other() -> None:
    assert all(scope in Scope.ADMIN for scope in SCOPES.values())
    for one, other in itertools.permutations(SCOPES.values(), 2):
        assert (other in one) == (one is Scope.ADMIN)
    assert Scope.ADMIN not in Scope.ASK | Scope.FEEDBACK
    assert [scope.names for scope in ALL] == [[], ["ask"], ["feedback"], ["ask", "feedback"], ["admin"]]


def test_a_door_without_admin_has_no_routes_of_it() -> None:
    services: Any = None
    for door, has in ((access.API, False), (access.ADMIN, True), (NETWORK, True), (LOOPBACK, True)):
        paths = [route.path for route in app.application(services, door).routes if isinstance(route, DeclaredRoute)]
        assert any(path.startswith("/admin/") for path in paths) == has
