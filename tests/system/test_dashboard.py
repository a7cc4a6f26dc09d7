"""The dashboard over HTTP: who gets in, by which way, and what other pages cannot do."""

import contextlib
import http.client
import json
import socket
from collections.abc import Iterator, Mapping
from http.cookies import SimpleCookie

import pytest

from agentd.ctl.proxy import proxy
from tools.daemon import Answer, DaemonProcess, eventually, exchange

JSON = {"Content-Type": "application/json"}


@pytest.fixture(scope="module")
def daemon() -> Iterator[DaemonProcess]:
    with DaemonProcess() as daemon:
        yield daemon.start()


@pytest.fixture(scope="module")
def port(daemon: DaemonProcess) -> Iterator[int]:
    with proxy(daemon.ctl) as port:
        yield port


def ask(port: int, method: str, path: str, body: object = None, headers: Mapping[str, str] = {}) -> Answer:
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=60)) as connection:
        connection.request(method, path, None if body is None else json.dumps(body), dict(headers))
        response = connection.getresponse()
        return Answer(response.status, dict(response.headers.items()), response.read())


def own(port: int) -> dict[str, str]:
    """What a browser says of a page that comes from here."""
    return {**JSON, "Origin": f"http://127.0.0.1:{port}"}


def token(daemon: DaemonProcess) -> str:
    return str(daemon.post("/admin/dashboard", admin=True).json["token"])


@pytest.fixture
def cookie(daemon: DaemonProcess, port: int) -> str:
    answer = ask(port, "POST", "/ui/session", {"token": token(daemon)}, own(port))
    assert answer.status == 200, answer.body
    (morsel,) = SimpleCookie(answer.headers["set-cookie"]).values()
    assert morsel["httponly"]
    assert morsel["samesite"] == "strict"
    return f"{morsel.key}={morsel.value}"


def test_the_page_has_a_policy_and_nothing_secret(port: int) -> None:
    answer = ask(port, "GET", "/ui/")
    assert answer.status == 200
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    again = ask(port, "GET", "/ui/app.js", headers={"If-None-Match": ask(port, "GET", "/ui/app.js").headers["etag"]})
    assert again.status == 304
    assert ask(port, "GET", "/ui").headers["location"] == "/ui/"


@pytest.mark.parametrize("name", ["nothing.js", "..%2fdaemon.py", "%2e%2e/daemon.py", "index", "app.js/", "%00", ""])
def test_nothing_but_its_files_is_served(port: int, name: str) -> None:
    answer = ask(port, "GET", f"/ui/{name}")
    assert answer.status == (404 if name else 200)
    assert b"import asyncio" not in answer.body


ROUTES = [
    ("GET", "/admin/status"),
    ("GET", "/admin/inferences"),
    ("GET", "/admin/events"),
    ("GET", "/admin/backup"),
    ("POST", "/admin/rollback"),
    ("POST", "/admin/dashboard"),
    ("POST", "/v1/feedback"),
    ("GET", "/v1/models"),
]


@pytest.mark.parametrize(("method", "path"), ROUTES)
def test_without_a_session_there_is_nothing(port: int, cookie: str, method: str, path: str) -> None:
    for headers in ({}, {"Cookie": "agentd=x"}, {"Cookie": cookie[:-3]}, {"x-agentd-browser": ""}):
        answer = ask(port, method, path, {} if method == "POST" else None, {**own(port), **headers})
        assert (answer.status, answer.error["code"]) == (401, "no_session")


def test_with_a_session_a_page_of_ours_may_do_what_the_owner_may(port: int, cookie: str) -> None:
    assert ask(port, "GET", "/admin/status", headers={"Cookie": cookie}).json["state"] == "serving"
    answer = ask(port, "POST", "/admin/pause", {}, {**own(port), "Cookie": cookie})
    assert answer.json == {"paused": True}


def test_a_page_cannot_let_in_another_one(port: int, cookie: str) -> None:
    assert ask(port, "POST", "/admin/dashboard", {}, {**own(port), "Cookie": cookie}).status == 401


@pytest.mark.parametrize("origin", ["http://evil.example", "null", "http://127.0.0.1:1", None])
def test_another_page_can_do_nothing_with_the_cookie(
    daemon: DaemonProcess, port: int, cookie: str, origin: str | None
) -> None:
    headers = {**JSON, "Cookie": cookie} | ({} if origin is None else {"Origin": origin})
    for path in ("/admin/resume", "/admin/rollback", "/v1/feedback"):
        answer = ask(port, "POST", path, {}, headers)
        assert (answer.status, answer.error["code"]) == (403, "forbidden_origin")
    assert ask(port, "POST", "/ui/session", {"token": token(daemon)}, headers).status == 403
    assert "access-control-allow-origin" not in ask(port, "GET", "/admin/status", headers=headers).headers


def test_a_token_lets_in_once(daemon: DaemonProcess, port: int) -> None:
    once = {"token": token(daemon)}
    assert ask(port, "POST", "/ui/session", once, own(port)).status == 200
    assert ask(port, "POST", "/ui/session", once, own(port)).error["code"] == "no_session"
    assert once["token"] not in daemon.log


def test_signing_out_ends_the_session(port: int, cookie: str) -> None:
    headers = {**own(port), "Cookie": cookie}
    assert ask(port, "DELETE", "/ui/session", {}, headers).status == 200
    assert ask(port, "GET", "/admin/status", headers=headers).status == 401


def test_a_name_that_is_pointed_at_the_port_gets_nothing(port: int, cookie: str) -> None:
    for host in ("evil.example", f"evil.example:{port}", "127.0.0.1.evil.example", ""):
        assert ask(port, "GET", "/ui/", headers={"Host": host, "Cookie": cookie}).status == 403
    assert ask(port, "GET", "/ui/", headers={"Host": "localhost:9"}).status == 200  # as through a tunnel


def test_what_is_no_request_ends_its_connection_alone(port: int, cookie: str) -> None:
    for data in (
        b"\r\n\r\n",
        b"GET\r\n\r\n",
        b"POST /ui/session HTTP/1.1\r\nHost: localhost\r\nContent-Length: -1\r\n\r\n",
    ):
        with socket.create_connection(("127.0.0.1", port), 10) as connection:
            connection.sendall(data)
            connection.shutdown(socket.SHUT_WR)
            while connection.recv(4096):
                pass
    assert ask(port, "GET", "/admin/status", headers={"Cookie": cookie}).status == 200


def test_the_socket_itself_needs_no_session(daemon: DaemonProcess) -> None:
    assert daemon.get("/ui/", admin=True).status == 200
    assert daemon.get("/ui/").status == 404  # the API's socket has no dashboard
    marked = exchange(daemon.admin, "GET", "/admin/status", headers={"x-agentd-browser": "1"})
    assert marked.status == 401


def test_events_come_as_they_happen(port: int, cookie: str) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    with contextlib.closing(connection):
        connection.request("GET", "/admin/events", headers={"Cookie": cookie, "Accept": "text/event-stream"})
        response = connection.getresponse()
        assert response.headers["content-type"].startswith("text/event-stream")
        assert response.readline().startswith(b":")
        ask(port, "POST", "/admin/pause", {}, {**own(port), "Cookie": cookie})
        ask(port, "POST", "/admin/resume", {}, {**own(port), "Cookie": cookie})
        lines: list[bytes] = []
        while not any(b"adaptation resumed" in line for line in lines):
            lines.append(response.readline())
        seen = next(int(line[4:]) for line in lines if line.startswith(b"id: "))
    # who was away is told what was missed
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=60)) as again:
        headers = {"Cookie": cookie, "Accept": "text/event-stream", "Last-Event-ID": str(seen - 1)}
        again.request("GET", "/admin/events", headers=headers)
        response = again.getresponse()
        while (line := response.readline()) != b"id: %d\n" % seen:
            assert line


def test_the_queue_holds_what_nobody_has_judged_and_feedback_can_be_taken_back(daemon: DaemonProcess) -> None:
    def queue(**query: str) -> list[str]:
        words = "&".join(["judged=false", *(f"{name}={value}" for name, value in query.items())])
        return [row["id"] for row in daemon.get(f"/admin/inferences?{words}", admin=True).json["inferences"]]

    answers = [daemon.ask(metadata={"task": "reviews"}).json["id"] for _ in range(2)]
    other = daemon.ask().json["id"]
    assert queue()[:3] == [other, *answers[::-1]]
    assert queue(task="reviews") == answers[::-1]
    body = {"inference_id": answers[0], "kind": "label", "value": "no"}
    given = daemon.post("/v1/feedback", body).json
    daemon.post("/v1/feedback", {"inference_id": other, "kind": "comment", "value": "hm"})
    assert queue()[:2] == [other, answers[1]]
    daemon.post("/admin/forget", {"feedback": [given["id"]], "keep_inferences": True}, admin=True)
    assert queue(task="reviews") == answers[::-1]
    assert daemon.get("/admin/examples", admin=True).json["examples"] == []
    assert daemon.get("/admin/feedback?kind=label", admin=True).json["total"] == 0
    daemon.post("/v1/feedback", body)
    given = daemon.get("/admin/feedback?kind=label", admin=True).json["feedback"][0]
    daemon.post("/admin/forget", {"feedback": [given["id"]]}, admin=True)
    assert queue(task="reviews") == [answers[1]]  # forgotten with all that was only there for it


def test_a_daemon_stops_though_somebody_listens() -> None:
    with DaemonProcess() as daemon:
        daemon.start()
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(str(daemon.admin))
            connection.sendall(b"GET /admin/events HTTP/1.1\r\nHost: a\r\nAccept: text/event-stream\r\n\r\n")
            assert connection.recv(15).startswith(b"HTTP/1.1 200")
            assert daemon.stop() == 0


def test_the_proxy_says_that_the_daemon_is_gone() -> None:
    with DaemonProcess() as daemon:
        daemon.start()
        with proxy(daemon.ctl) as port:
            daemon.kill()
            answer = eventually(lambda: ask(port, "GET", "/ui/"))
            assert answer.status == 502
            assert "does not answer" in answer.error["message"]
