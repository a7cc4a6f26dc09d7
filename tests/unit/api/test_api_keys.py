"""API keys over the real store: what they open, how they are kept, and what wrong ones meet."""

import asyncio
import hashlib
import hmac
import logging
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.testclient import TestClient

from agentd.api import access, api_keys, key_ring
from agentd.api.access import Scope
from agentd.api.key_ring import KeyRing
from agentd.api.lenient import Body
from agentd.api.peers import RateLimiter
from agentd.api.requests import on_error
from agentd.api.routes import DeclaredRoute
from agentd.config.schema import Config
from agentd.errors import AgentdError, Conflict, NotFound
from agentd.store.database import Store


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with closing(Store(tmp_path / "agentd.db")) as opened:
        yield opened


async def who(request: Request) -> Response:
    return JSONResponse({"author": access.author(request)})


def client(
    ring: KeyRing,
    store: Store,
    door: access.Door = access.TCP,
    address: str = "192.0.2.7",
    wrong: RateLimiter | None = None,
) -> TestClient:
    routes = [
        DeclaredRoute("GET", "/ask", who, Scope.ASK),
        DeclaredRoute("GET", "/feedback", who, Scope.FEEDBACK),
        DeclaredRoute("GET", "/admin/keys", api_keys.list_keys, Scope.ADMIN),
        DeclaredRoute("POST", "/admin/keys", api_keys.add_key, Scope.ADMIN, api_keys.KeyBody),
        DeclaredRoute("POST", "/admin/keys/{name}/revoke", api_keys.revoke_key, Scope.ADMIN, Body),
    ]
    served: Any = Starlette(routes=routes, exception_handlers={AgentdError: on_error})
    parts = {"authorities": [ring], "keys": ring, "store": store, "config": Config()}
    served.state.services = SimpleNamespace(wrong_credentials=wrong or RateLimiter(), **parts)
    served.state.door = door
    return TestClient(served, base_url="http://localhost", client=(address, 5))


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def test_a_key_opens_what_it_is_for_and_says_whose_it_is(store: Store) -> None:
    ring = KeyRing(store)
    text, _ = asyncio.run(ring.add("kitchen", Scope.ASK, None))
    at = client(ring, store)
    assert at.get("/ask", headers=bearer(text)).json() == {"author": "key:kitchen"}
    for headers in ({"x-api-key": text}, {"api-key": f" {text} "}, {"authorization": f"bearer  {text}"}):
        assert at.get("/ask", headers=headers).status_code == 200
    refused = at.get("/feedback", headers=bearer(text))
    assert (refused.status_code, refused.json()["error"]["code"]) == (403, "insufficient_scope")
    missing = at.get("/ask")
    assert (missing.status_code, missing.headers["www-authenticate"]) == (401, "Bearer")
    assert "agentctl key add" in missing.json()["error"]["message"]


@pytest.mark.parametrize(
    "headers",
    [
        {"Authorization": "Bearer "},
        {"Authorization": "Basic {}"},
        {"Authorization": "{}"},
        {"Cookie": "key={}"},
        {"x-api-key": ""},
        {"X-Forwarded-For": "127.0.0.1"},
    ],
)
def test_what_is_no_key_is_none(store: Store, headers: dict[str, str]) -> None:
    ring = KeyRing(store)
    text, _ = asyncio.run(ring.add("kitchen", Scope.ADMIN, None))
    answer = client(ring, store).get("/ask", headers={name: value.format(text) for name, value in headers.items()})
    assert (answer.status_code, answer.json()["error"]["code"]) == (401, "missing_api_key")


def test_nothing_near_a_key_is_one(store: Store) -> None:
    ring = KeyRing(store)
    text, row = asyncio.run(ring.add("kitchen", Scope.ASK, None))
    near = [text[:-1], text + "x", text.upper(), text[7:], row.digest, text[:-1] + chr(ord(text[-1]) ^ 1), "é" + text]
    assert [ring.find(each) for each in near] == [None] * len(near)
    assert ring.find(text) == row


def test_every_key_is_compared_in_constant_time_whichever_it_is(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """How long it takes in fact is measured by `python -m tools.bench keys`."""
    ring = KeyRing(store)
    texts = [asyncio.run(ring.add(f"key{i}", Scope.ASK, None))[0] for i in range(5)]
    compared: list[int] = []

    def compare(one: bytes, other: bytes) -> bool:
        compared.append(len(one))
        return hmac.compare_digest(one, other)

    monkeypatch.setattr(key_ring, "hmac", SimpleNamespace(compare_digest=compare))
    for text in (texts[0], texts[-1], texts[-1][:-1] + "!", "", "é"):
        compared.clear()
        found = ring.find(text)
        assert (found.name if found else None) == {texts[0]: "key0", texts[-1]: "key4"}.get(text)
        assert compared == [32] * 5


def test_only_the_hash_is_kept(store: Store, tmp_path: Path) -> None:
    ring = KeyRing(store)
    text, row = asyncio.run(ring.add("kitchen", Scope.ASK, None))
    assert row.digest == hashlib.sha256(text.encode()).hexdigest()
    assert text.startswith("agentd_")
    assert len(text) == len("agentd_") + 43  # 256 bits
    assert all(text.encode() not in file.read_bytes() for file in tmp_path.iterdir())
    listed = client(ring, store, access.ADMIN).get("/admin/keys").text
    assert text not in listed
    assert row.digest not in listed


def test_a_revoked_key_is_wrong_at_once_and_after_a_start(store: Store) -> None:
    ring = KeyRing(store)
    at, owner = client(ring, store), client(ring, store, access.ADMIN)
    made = owner.post("/admin/keys", json={"name": "kitchen", "scopes": ["ask", "feedback"], "rate": 5})
    assert made.status_code == 201
    text = made.json()["key"]
    assert at.get("/feedback", headers=bearer(text)).status_code == 200
    assert owner.post("/admin/keys/kitchen/revoke").json()["revoked_at"] is not None
    refused = at.get("/feedback", headers=bearer(text))
    assert (refused.status_code, refused.json()["error"]["code"]) == (401, "invalid_api_key")
    again = KeyRing(store)
    asyncio.run(again.load())
    assert (len(again), again.find(text)) == (0, None)
    assert owner.post("/admin/keys/kitchen/revoke").status_code == 404
    assert owner.post("/admin/keys", json={"name": "kitchen", "scopes": ["ask"]}).status_code == 201
    (old, new) = owner.get("/admin/keys").json()["keys"]
    assert (old["revoked_at"] is None, new["revoked_at"]) == (False, None)
    assert old["last_used_at"] is not None


def test_names_are_unique_among_valid_keys(store: Store) -> None:
    ring = KeyRing(store)
    asyncio.run(ring.add("kitchen", Scope.ASK, None))
    with pytest.raises(Conflict, match="revoke it first"):
        asyncio.run(ring.add("kitchen", Scope.ADMIN, None))
    with pytest.raises(NotFound):
        asyncio.run(ring.revoke("cellar"))


@pytest.mark.parametrize(
    "body",
    [
        {"name": "a b", "scopes": ["ask"]},
        {"name": "", "scopes": ["ask"]},
        {"name": "a", "scopes": []},
        {"name": "a", "scopes": ["write"]},
        {"name": "a", "scopes": ["ask"], "rate": 0},
        {"name": "a"},
    ],
)
def test_a_key_that_cannot_be(store: Store, body: dict[str, Any]) -> None:
    assert client(KeyRing(store), store, access.ADMIN).post("/admin/keys", json=body).status_code == 400


def test_a_key_has_its_rate_and_others_are_none_the_worse(store: Store) -> None:
    ring = KeyRing(store)
    slow, _ = asyncio.run(ring.add("slow", Scope.ASK, 3))
    fast, _ = asyncio.run(ring.add("fast", Scope.ASK, None))
    at = client(ring, store)
    assert [at.get("/ask", headers=bearer(slow)).status_code for _ in range(5)] == [200] * 3 + [429] * 2
    assert at.get("/ask", headers=bearer(slow)).headers["retry-after"] == "60"
    assert [at.get("/ask", headers=bearer(fast)).status_code for _ in range(5)] == [200] * 5
    on_loopback = client(ring, store, access.LOOPBACK)
    assert on_loopback.get("/ask", headers=bearer(slow)).status_code == 429  # it is still this key's request


def test_wrong_keys_are_limited_per_address_and_logged_without_the_key(
    store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    ring = KeyRing(store)
    text, _ = asyncio.run(ring.add("kitchen", Scope.ASK, None))
    wrong = RateLimiter()
    at, other = (client(ring, store, address=address, wrong=wrong) for address in ("192.0.2.7", "192.0.2.8"))
    with caplog.at_level(logging.WARNING):
        statuses = [at.get("/ask", headers=bearer(f"agentd_guess{i}")).status_code for i in range(13)]
    assert statuses == [401] * 10 + [429] * 3
    assert caplog.text.count("a wrong API key came from 192.0.2.7") == 10
    assert "guess" not in caplog.text
    assert other.get("/ask", headers=bearer("agentd_guess")).status_code == 401
    assert at.get("/ask", headers=bearer(text)).status_code == 200  # no one locks others out


def test_where_none_is_needed_wrong_keys_are_not_counted(store: Store, caplog: pytest.LogCaptureFixture) -> None:
    """Clients that insist on a key have one like "unused"; what they may not do without a right one stays limited."""
    at = client(KeyRing(store), store, access.LOOPBACK)
    with caplog.at_level(logging.WARNING):
        assert {at.get("/ask", headers=bearer("unused")).status_code for _ in range(30)} == {200}
    assert "wrong" not in caplog.text
    assert [at.get("/admin/keys", headers=bearer("x")).status_code for _ in range(12)] == [401] * 10 + [429] * 2


def test_hosts_of_one_network_of_ipv6_are_one(store: Store) -> None:
    ring, wrong = KeyRing(store), RateLimiter()

    def status(address: str) -> int:
        return client(ring, store, address=address, wrong=wrong).get("/ask", headers=bearer("wrong")).status_code

    assert [status(f"2001:db8::{i}") for i in range(11)] == [401] * 10 + [429]
    assert status("2001:db8:1::1") == 401
