"""The API keys that are valid: who brings one over TCP may do what it is for.

A key is shown once, when it is made; the database has its sha256. All valid digests are in memory, and every one is
compared with the one that is brought, in constant time, so that neither a hit nor a miss tells how near it was.
"""

import asyncio
import hashlib
import hmac
import secrets
import time
from contextlib import suppress

from starlette.requests import Request

from agentd import ids
from agentd.api.access import Access, Scope, scope_of
from agentd.api.peers import RateLimiter
from agentd.errors import AgentdError, TooManyRequests, WrongCredentials
from agentd.store import api_keys
from agentd.store.api_keys import ApiKey
from agentd.store.database import Store

_PREFIX = "agentd_"  # so that a key that has got somewhere is known for what it is
_HEADERS = ("x-api-key", "api-key")  # besides Authorization, of clients of other APIs
_NOTED = 60.0  # seconds between two notes of when a key was used


class KeyRing:
    """The valid keys, and the authority over requests that bring one."""

    def __init__(self, store: Store) -> None:
        self.exist = asyncio.Event()  # set as soon as there is one, and from then on
        self._store = store
        self._valid: list[tuple[bytes, ApiKey]] = []
        self._requests = RateLimiter()
        self._noted: dict[int | None, float] = {}

    async def load(self) -> None:
        self._hold(await self._store.call(api_keys.valid))

    def __len__(self) -> int:
        return len(self._valid)

    async def add(self, name: str, scopes: Scope, rate: int | None) -> tuple[str, ApiKey]:
        """A new key and what is known of it. Raises Conflict."""
        text = _PREFIX + secrets.token_urlsafe(32)
        row = ApiKey(None, name, scopes.names, _digest(text).hex(), rate, ids.now())
        added = await self._store.call(api_keys.add, row)
        await self.load()
        return text, added

    async def revoke(self, name: str) -> ApiKey:
        """From the next request on it is wrong. Raises NotFound."""
        revoked = await self._store.call(api_keys.revoke, name)
        await self.load()
        return revoked

    async def __call__(self, request: Request) -> Access | None:
        """The authority: see `access.Authority`. Raises WrongCredentials, TooManyRequests."""
        brought = brought_key(request)
        if brought is None:
            return None
        key = self.find(brought)
        if key is None:
            raise WrongCredentials
        if key.rate is not None and self._requests.exceeded(key.author, "requests", key.rate):
            raise TooManyRequests(f"the key {key.name!r} may send {key.rate} requests a minute")
        self._note(key)
        return Access(scope_of(key.scopes), key.author)

    def find(self, text: str) -> ApiKey | None:
        """The valid key that this is. Takes as long for every text of one length."""
        digest, match = _digest(text), None
        for known, key in self._valid:
            if hmac.compare_digest(known, digest):
                match = key
        return match

    def _hold(self, rows: list[ApiKey]) -> None:
        self._valid = [(bytes.fromhex(row.digest), row) for row in rows]
        if rows:
            self.exist.set()

    def _note(self, key: ApiKey) -> None:
        now = time.monotonic()
        if now - self._noted.get(key.id, -_NOTED) >= _NOTED and key.id is not None:
            self._noted[key.id] = now
            with suppress(AgentdError):  # a full disk is no reason not to answer
                self._store.submit(api_keys.used, key.id, ids.now())


def brought_key(request: Request) -> str | None:
    """The key in a request's headers: a bearer's, or by the names that clients of other APIs have for it."""
    scheme, _, text = request.headers.get("authorization", "").strip().partition(" ")
    if scheme.lower() == "bearer" and text.strip():
        return text.strip()
    return next((value.strip() for name in _HEADERS if (value := request.headers.get(name, "")).strip()), None)


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).digest()
