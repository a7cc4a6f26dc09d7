"""Who gets in: every operation over TCP with no key, wrong keys, keys for other things and malformed headers.

`python -m tools.fuzz --keys N`. Requests are made from the daemon's own /openapi.json, which says what scope each
needs; what is brought with them is drawn at random. A request that may not in must be refused, one that may must not,
and tricks with paths, methods, hosts and proxies' headers must change neither.
"""

import base64
import contextlib
import hashlib
import http.client
import random
import secrets
import socket
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import schemathesis
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis.errors import Unsatisfiable
from schemathesis import GenerationMode

from tools.daemon import DaemonProcess, eventually
from tools.fuzz import Client, is_error, wire_form

SCOPES = {"ask": {"ask"}, "feedback": {"feedback"}, "both": {"ask", "feedback"}, "admin": {"ask", "feedback", "admin"}}
_ANYBODYS = "/health"
_EACH = 12  # cases of one operation at a time
_REFUSED = {401, 403, 404, 405, 429}
_TRICKS: list[dict[str, str]] = [
    {"X-Forwarded-For": "127.0.0.1"},
    {"X-Forwarded-For": "uid:0", "X-Forwarded-Proto": "https", "Forwarded": "for=127.0.0.1"},
    {"X-Real-IP": "127.0.0.1", "Host": "localhost"},
    {"X-Original-URL": "/health", "X-Rewrite-URL": "/health"},
    {"X-HTTP-Method-Override": "GET", "X-Method-Override": "GET"},
    {"Cookie": "session=admin; key=admin"},
    {"Connection": "close, Authorization"},
]
_TWO_LENGTHS = b"Transfer-Encoding: chunked\r\nContent-Length: 4\r\n\r\n"


@dataclass
class Intrusion:
    """What came back, by what was brought. `problems` are the cases that must not be."""

    cases: int = 0
    seconds: float = 0.0
    statuses: dict[str, Counter[int]] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def note(self, kind: str, status: int) -> None:
        self.cases += 1
        self.statuses.setdefault(kind, Counter())[status] += 1

    def summary(self) -> str:
        lines = [f"{self.cases} cases in {self.seconds:.0f} s"]
        for kind, counts in sorted(self.statuses.items()):
            lines.append(f"{kind}: " + ", ".join(f"{status}: {n}" for status, n in sorted(counts.items())))
        return "\n".join([*lines, f"{len(self.problems)} problems", *self.problems[:20]])


@dataclass(frozen=True)
class Brought:
    """`scopes` are those that it gives; None: it is no valid key. `seen`: it is read as a key."""

    kind: str
    headers: Mapping[str, str]
    scopes: set[str] | None = None
    seen: bool = False


def run(cases: int, number: int = 0, limit: float = 3600.0) -> Intrusion:
    """Starts a daemon with a tiny model on every address, and tries."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    with DaemonProcess(settings={"serve": {"tcp": f"0.0.0.0:{port}"}}) as daemon:
        daemon.start()
        keys = {name: _key(daemon, name, scopes) for name, scopes in SCOPES.items()}
        gone = _key(daemon, "gone", {"admin"})
        assert daemon.post("/admin/keys/gone/revoke", {}, admin=True).status == 200
        eventually(lambda: _listens(port))
        document = daemon.get("/openapi.json", admin=True).json
        report = intrude(port, document, keys, gone, cases, number, limit)
        if "Traceback" in daemon.log:
            report.problems.append(f"a traceback in the log: {daemon.log[-2000:]}")
        report.problems += [f"the key {name} is in the log" for name, key in keys.items() if key in daemon.log]
    return report


def _key(daemon: DaemonProcess, name: str, scopes: set[str]) -> str:
    answer = daemon.post("/admin/keys", {"name": name, "scopes": sorted(scopes)}, admin=True)
    return str(answer.json["key"])


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def intrude(
    port: int,
    document: dict[str, Any],
    keys: Mapping[str, str],
    revoked: str,
    cases: int,
    number: int = 0,
    limit: float = 3600.0,
) -> Intrusion:
    """Sends `cases` cases or some more, at most for `limit` seconds."""
    report, client, draw = Intrusion(), Client(("127.0.0.1", port)), random.Random(number)
    operations: list[Any] = [cast(Any, r).ok() for r in schemathesis.openapi.from_dict(document).get_all_operations()]
    began, turn = time.monotonic(), 0
    each = max(1, min(_EACH, cases // (2 * len(operations))))
    while report.cases < cases and time.monotonic() - began < limit:
        for operation in operations:
            needed = _needed(document, operation)
            if time.monotonic() - began < limit:
                _cases(client, operation, needed, each, number + turn, keys, revoked, draw, report)
        _raw(port, keys, report)
        turn += 1
    report.seconds = time.monotonic() - began
    client.close()
    return report


def _needed(document: dict[str, Any], operation: Any) -> set[str]:
    entry = document["paths"][operation.path][operation.method.lower()]
    return {scope for way in entry["security"] for scope in way["key"]}


def _cases(
    client: Client,
    operation: Any,
    needed: set[str],
    n: int,
    number: int,
    keys: Mapping[str, str],
    revoked: str,
    draw: random.Random,
    report: Intrusion,
) -> None:
    @seed(number)
    @settings(
        max_examples=n, deadline=None, database=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck)
    )
    @given(case=operation.as_strategy(generation_mode=GenerationMode.POSITIVE))
    def each(case: Any) -> None:
        method, target, body, headers = wire_form(operation, case)
        brought = _draw(keys, revoked, draw)
        trick = draw.choice(_TRICKS) if draw.random() < 0.4 else {}
        target = _bent(target, draw) if brought.scopes is None and draw.random() < 0.2 else target
        sent = {**headers, **trick, **brought.headers}
        what = f"{brought.kind}: {method} {target} {sorted({*trick, *brought.headers})}"
        try:
            status, answer = client.send(method, target, body, sent)
        except (OSError, http.client.HTTPException) as error:
            report.problems.append(f"no answer ({type(error).__name__}: {error}): {what}")
            client.close()
            return
        report.note(brought.kind, status)
        # Behind a question mark a path is no path: this one asks for the health, which is anybody's.
        asks = set() if target.startswith(f"{_ANYBODYS}?") else needed
        _judge(operation.path, asks, brought, status, answer, what, report)

    with contextlib.suppress(Unsatisfiable):
        each()


def _judge(
    path: str, needed: set[str], brought: Brought, status: int, answer: bytes, what: str, report: Intrusion
) -> None:
    if brought.scopes is not None and needed <= brought.scopes:
        # A page's own address is wanted besides, and the owner's consent to what a fleet asks for.
        if status == 403 and any(code in answer for code in (b"forbidden_origin", b"no_consent")):
            return
        if status in (401, 403) or (status >= 500 and status not in (501, 503)):
            report.problems.append(f"{status} for who may: {what}: {answer[:200]!r}")
        return
    is_open = not needed and not brought.seen
    if not is_open and status not in _REFUSED:
        report.problems.append(f"{status} for who may not: {what}: {answer[:200]!r}")
    if status >= 400 and not (is_error(path, answer) or is_error("/api/" if path[:5] != "/api/" else "/", answer)):
        report.problems.append(f"{status} without an error's shape: {what}: {answer[:200]!r}")


def _draw(keys: Mapping[str, str], revoked: str, draw: random.Random) -> Brought:
    admin = keys["admin"]
    if draw.random() < 0.3:
        name = draw.choice(list(keys))
        forms = [{"Authorization": f"Bearer {keys[name]}"}, {"x-api-key": keys[name]}, {"api-key": keys[name]}]
        forms += [{"authorization": f"bEARER   {keys[name]} "}]
        return Brought(f"key for {name}", draw.choice(forms), SCOPES[name])
    if draw.random() < 0.3:
        return Brought("no key", {})
    near = [
        *(secrets.token_urlsafe(32), f"agentd_{secrets.token_urlsafe(32)}", revoked, admin[:-1], admin + "A"),
        *(admin.swapcase(), admin[7:], hashlib.sha256(admin.encode()).hexdigest(), "admin", "null", "*", "' OR 1=1 --"),
        *("x" * 40_000, "\xff\xfe" + admin, f"{admin},{admin}", f"{admin} {admin}", f'"{admin}"', "key:admin", "uid:0"),
    ]
    if draw.random() < 0.6:
        return Brought("wrong key", {draw.choice(("x-api-key", "api-key")): draw.choice(near)}, seen=True)
    malformed = [
        *("Bearer", "Bearer ", "bearer\t", "", admin, f"Basic {base64.b64encode(f'a:{admin}'.encode()).decode()}"),
        *(f"Token {admin}", f"Bearer:{admin}", f"Bearer={admin}", f"Digest {admin}", f"BearerBearer {admin}"),
    ]
    others = [{"Authorization": value} for value in malformed]
    others += [{"Cookie": f"key={admin}; Authorization=Bearer {admin}"}, {"Proxy-Authorization": f"Bearer {admin}"}]
    others += [{"X-Authorization": f"Bearer {admin}"}, {"x-goog-api-key": admin}, {"Authentication": admin}]
    return Brought("malformed header", draw.choice(others))


def _bent(target: str, draw: random.Random) -> str:
    """A path that may look like another one to somebody."""
    path = target.partition("?")[0]
    return draw.choice(
        [
            *(f"/{path}", f"{path}/", f"{_ANYBODYS}/..{path}", f"{_ANYBODYS}/%2e%2e{path}", path.upper(), f"{path}%00"),
            *(f"{path};/health", f"{path}%2f", f"{path}?/health", f"{path}#/health", path.replace("/", "//", 1)),
            *(f"http://localhost{path}", f"{_ANYBODYS}?{path}", f"/.{path}", path.replace("a", "%61")),
        ]
    )


def _raw(port: int, keys: Mapping[str, str], report: Intrusion) -> None:
    """What no HTTP library sends. Each asks for the keys with one that may only ask, or none."""
    lesser, target = keys["ask"].encode(), b"GET /admin/keys HTTP/1.1\r\nHost: a\r\n"
    end = b"Connection: close\r\n\r\n"
    requests = [
        target + end,
        target + b"Authorization: Bearer " + lesser + b"\r\n" + end,
        target + b"Authorization:Bearer " + lesser + b"\r\nAuthorization: Bearer x\r\n" + end,
        target + b"Authorization: Bearer x\r\nAuthorization: Bearer " + lesser + b"\r\n" + end,
        target + b"Authorization : Bearer " + lesser + b"\r\n" + end,
        target + b"Authorization: Bearer\r\n " + lesser + b"\r\n" + end,
        target + b"Authorization: Bearer \x00" + lesser + b"\r\n" + end,
        target + b"Authorization: Bearer " + lesser + b"\nX-Scope: admin\r\n" + end,
        target + b"Authorization: Bearer " + b"x" * 70_000 + b"\r\n" + end,
        b"GET /admin/keys HTTP/1.0\r\n\r\n",
        b"GET /admin/keys HTTP/0.9\r\n\r\n",
        b"GET http://127.0.0.1/admin/keys HTTP/1.1\r\nHost: a\r\n" + end,
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHost: a\r\nContent-Length: 60\r\n\r\n" + target + end,
        b"POST /health HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\nContent-Length: 4\r\n\r\n0\r\n\r\n"
        + target
        + end,
        b"GET /v1/models HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer " + lesser + b"\r\n\r\n" + target + end,
        b"GET /admin/keys HTTP/1.1\r\nHost: a\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n",
    ]
    for request in requests:
        answer = b"".join(_exchange(port, request))
        status = int(answer[9:12]) if answer[:5] == b"HTTP/" and answer[9:12].isdigit() else 0
        report.note("written by hand", status)
        if b'"keys"' in answer or b"last_used_at" in answer or b"HTTP/1.1 5" in answer:
            report.problems.append(f"{status} for who may not: {request[:200]!r}: {answer[:200]!r}")


def _exchange(port: int, request: bytes) -> Iterator[bytes]:
    """What comes back until the server hangs up, or says no more."""
    with socket.create_connection(("127.0.0.1", port), timeout=1) as connection, contextlib.suppress(OSError):
        connection.sendall(request)
        while part := connection.recv(1 << 16):
            yield part
            if b"Connection: close" not in request and b"\r\n\r\n" in part:
                connection.shutdown(socket.SHUT_WR)
