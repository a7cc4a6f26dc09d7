"""Who may do what: every route declares a scope, every door gives some by itself, and credentials give others.

A door is a socket that is listened on. At a UNIX socket its file's mode has decided who comes in, so the door gives its
scopes to all of them. Over TCP a request brings credentials: an API key, or a session's cookie. Each kind is an
`Authority`; the daemon lists them in `Services.authorities`, and they are asked in turn.
"""

import functools
import ipaddress
import logging
import operator
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from enum import Flag
from urllib.parse import urlsplit

from starlette.requests import Request

from agentd.api import peers
from agentd.errors import (
    CredentialsMissing,
    FromWebPage,
    HostNotServed,
    NoSession,
    OutOfScope,
    TooManyRequests,
    WrongCredentials,
)

logger = logging.getLogger(__name__)


class Scope(Flag):
    """What a route needs, and what a request may do. `ADMIN` holds all others; `NONE` is for anybody."""

    NONE = 0
    ASK = 1
    FEEDBACK = 2
    ADMIN = 7

    @property
    def names(self) -> list[str]:
        """As people write them; `admin` says all."""
        if Scope.ADMIN in self:
            return ["admin"]
        return [name for name, scope in SCOPES.items() if scope in self]


SCOPES = {"ask": Scope.ASK, "feedback": Scope.FEEDBACK, "admin": Scope.ADMIN}


def scope_of(names: Iterable[str]) -> Scope:
    """All of these together."""
    return functools.reduce(operator.or_, (SCOPES[name] for name in names), Scope.NONE)


@dataclass(frozen=True)
class Access:
    """What one request may do. `author` is noted with all that it sends: `uid:1000`, `key:NAME`, `tcp`; None where no
    one can say."""

    scopes: Scope
    author: str | None


Authority = Callable[[Request], Awaitable[Access | None]]
"""The access that a request's credentials give; None where it brings none of this kind. What is brought and was never
valid raises WrongCredentials; what a browser sends by itself and has expired is None."""


@dataclass(frozen=True)
class Door:
    """`scopes` are given to everybody who comes in here; with `credentials` a request may have others by what it
    brings."""

    name: str
    scopes: Scope
    credentials: bool = False

    @property
    def has_admin(self) -> bool:
        """Whether anybody could have the scope admin here."""
        return self.credentials or Scope.ADMIN in self.scopes


TCP = Door("tcp", Scope.NONE, credentials=True)
LOOPBACK = Door("tcp", Scope.ASK | Scope.FEEDBACK, credentials=True)
API = Door("api", Scope.ASK | Scope.FEEDBACK)
ADMIN = Door("admin", Scope.ADMIN)
BROWSER = Door("browser", Scope.NONE, credentials=True)
BROWSER_HEADER = "x-agentd-browser"
"""What `agentctl dashboard` adds to every request that it passes on from a browser to the admin socket: whoever reaches
its port has what their credentials give, not what the socket gives its owner."""


WRONG = 10  # keys of one address a minute that are answered with 401 and logged; more are 429
_READING = ("GET", "HEAD")


async def admit(request: Request, need: Scope) -> None:
    """The one place that lets a request in to a route; from here on `author` tells who sends it.

    Raises CredentialsMissing, WrongCredentials, TooManyRequests, OutOfScope, FromWebPage, HostNotServed, and what an
    authority has against it.
    """
    door: Door = request.app.state.door
    if door is ADMIN and BROWSER_HEADER in request.headers:
        door = BROWSER
    own = Access(door.scopes, peers.author(request))
    access, wrong = await _brought(request) if door.credentials else (None, None)
    access = access or own
    if wrong is not None and (door.scopes == Scope.NONE or need not in access.scopes):
        raise _refusal(request, wrong)
    if need not in access.scopes:
        known = access is not own or door.scopes != Scope.NONE
        if known:
            raise OutOfScope(need.names[0], access.scopes.names)
        raise NoSession("sign in: run `agentctl dashboard`") if door is BROWSER else CredentialsMissing(need.names[0])
    # What is for anybody (signing in) gives nothing by itself, and looks at the page it comes from on its own.
    if need != Scope.NONE and request.method not in _READING and (origin := request.headers.get("origin")):
        _admit_page(request, door, origin, same_origin=access is not own)
    if need != Scope.NONE and door is LOOPBACK and access is own:
        _admit_host(request)
    request.state.access = access


def _admit_page(request: Request, door: Door, origin: str, same_origin: bool) -> None:
    """A browser says of which page a request is that changes something. A page of this server itself counts where the
    request has brought credentials: those are of no use to a page elsewhere whose name was made to point here.

    Raises FromWebPage."""
    named = door.credentials and origin.lower() in request.app.state.services.config.serve.origins
    looked = getattr(request.state, "own_page", False)  # by the session
    own = looked or (same_origin and origin.partition("://")[2].lower() == request.headers.get("host", "").lower())
    if not (named or own):
        raise FromWebPage(origin)


def _admit_host(request: Request) -> None:
    """Where no one needs a key, the name by which the port was found has to be this machine's own: a page elsewhere
    whose name was made to point here (DNS rebinding) reads what its browser takes for its own. An address is no name
    that could be made to. Raises HostNotServed."""
    host = request.headers.get("host")
    if host is None:  # of HTTP/1.0, which browsers do not speak
        return
    name, pages = _name(host), request.app.state.services.config.serve.origins
    if name == "localhost" or name in [_name(page.partition("://")[2]) for page in pages]:
        return
    try:
        ipaddress.ip_address(name)
    except ValueError:
        raise HostNotServed(host) from None


def _name(address: str) -> str:
    """The host of HOST[:PORT]; nothing where it is no such."""
    try:
        return urlsplit(f"//{address}").hostname or ""
    except ValueError:
        return ""


async def _brought(request: Request) -> tuple[Access | None, WrongCredentials | None]:
    """What the request's credentials give, or what is wrong with them. Where the door gives enough by itself, wrong
    ones are as good as none: clients of the OpenAI API send a key where nobody asked for one."""
    try:
        for authority in request.app.state.services.authorities:
            if (access := await authority(request)) is not None:
                return access, None
    except WrongCredentials as error:
        return None, error
    return None, None


def _refusal(request: Request, wrong: WrongCredentials) -> WrongCredentials | TooManyRequests:
    """What wrong credentials are answered with, which depends on how many came from there; noted without them."""
    address = peers.address(request)
    if request.app.state.services.wrong_credentials.exceeded(address, "wrong credentials", WRONG):
        return TooManyRequests(f"{WRONG} wrong API keys came from {address} within a minute")
    logger.warning("a wrong API key came from %s", address)
    return wrong


def access_of(request: Request) -> Access:
    """What a request that was let in may do."""
    access: Access = request.state.access
    return access


def author(request: Request) -> str | None:
    """Who sends a request that was let in."""
    return access_of(request).author
