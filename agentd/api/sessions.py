"""Browsers that the daemon's owner has let in: a token that is good once, traded for a cookie.

All of it is in memory, hashed: a restart ends every session. What a browser sends by itself (the cookie) is believed
only where the request comes from a page of this very daemon, so that no other page can act in the owner's name.
"""

import hashlib
import secrets
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from http.cookies import CookieError, SimpleCookie
from typing import TypeVar
from urllib.parse import urlsplit

from agentd.errors import FromWebPage, NoSession

T = TypeVar("T")

TOKEN_SECONDS = 300.0
"""For which a token is good."""
_IDLE, _LONGEST = 12 * 3600.0, 7 * 86400.0  # seconds without a request, and in all, after which a session ends
_TOKENS, _SESSIONS = 16, 64  # that are known at the same time; the oldest ones go first
_SAFE = ("GET", "HEAD")


@dataclass
class Session:
    """`author` is who asked for the token that it began with."""

    author: str | None
    begun: float
    used: float


class Sessions:
    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._tokens: dict[bytes, tuple[float, str | None]] = {}
        self._sessions: dict[bytes, Session] = {}

    def offer(self, author: str | None) -> str:
        """A token that begins one session, if it is used soon."""
        token = secrets.token_urlsafe(32)
        _put(self._tokens, _hash(token), (self._clock() + TOKEN_SECONDS, author), _TOKENS)
        return token

    def begin(self, token: str) -> str:
        """Trades a token for the value of a cookie. Raises NoSession for one that is unknown, used or too old."""
        until, author = self._tokens.pop(_hash(token), (0.0, None))
        now = self._clock()
        if now >= until:
            raise NoSession("this token is not known here, was used before, or is too old")
        cookie = secrets.token_urlsafe(32)
        _put(self._sessions, _hash(cookie), Session(author, now, now), _SESSIONS)
        return cookie

    def end(self, headers: Mapping[str, str]) -> None:
        """Ends the session of a request, if it has one."""
        for cookie in _cookies(headers):
            self._sessions.pop(_hash(cookie), None)

    def of(self, method: str, headers: Mapping[str, str]) -> Session | None:
        """The session that a request belongs to. Raises FromWebPage where another page sends it."""
        now = self._clock()
        for cookie in _cookies(headers):
            session = self._sessions.get(_hash(cookie))
            if session is None:
                continue
            if now - session.used > _IDLE or now - session.begun > _LONGEST:
                del self._sessions[_hash(cookie)]
                continue
            if method not in _SAFE:
                require_own_page(headers)
            session.used = now
            return session
        return None


def require_own_page(headers: Mapping[str, str]) -> None:
    """Raises FromWebPage unless the request was sent by a page of the host that it is sent to. A browser says so with
    everything that may change something; who leaves it out is no page of ours."""
    origin, site = headers.get("origin", ""), headers.get("sec-fetch-site", "same-origin")
    if site != "same-origin" or not origin or urlsplit(origin).netloc.lower() != headers.get("host", "").lower():
        raise FromWebPage(origin or "none")


def cookie_name(headers: Mapping[str, str]) -> str:
    """Cookies are shared by all ports of a host: two daemons behind one must not end each other's sessions."""
    port = headers.get("host", "").rpartition(":")[2]
    return f"agentd-{''.join(character for character in port if character.isascii() and character.isalnum())}"


def _cookies(headers: Mapping[str, str]) -> list[str]:
    try:
        jar = SimpleCookie(headers.get("cookie", ""))
    except CookieError:
        return []
    morsel = jar.get(cookie_name(headers))
    return [morsel.value] if morsel else []


def _hash(secret: str) -> bytes:
    """What is kept of a secret. It is found by its hash, so a comparison tells nothing of it."""
    return hashlib.sha256(secret.encode("utf-8", "replace")).digest()


def _put(known: dict[bytes, T], key: bytes, value: T, limit: int) -> None:
    """The oldest ones give way."""
    while len(known) >= limit:
        del known[next(iter(known))]
    known[key] = value
