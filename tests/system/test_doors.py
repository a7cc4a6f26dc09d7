"""TCP, keys and certificates of a real daemon."""

import contextlib
import http.client
import json
import signal
import socket
import ssl
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from tests.support.certificates import certificate
from tests.support.daemon import Answer, DaemonProcess, eventually

ASK = {"messages": [{"role": "user", "content": "Say yes."}], "max_tokens": 4, "temperature": 0}


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


class Remote:
    """The daemon over TCP."""

    def __init__(self, port: int, trusted: Path | None = None) -> None:
        self._port = port
        self._tls = ssl.create_default_context(cafile=str(trusted)) if trusted else None

    def send(self, method: str, path: str, body: Any = None, key: str | None = None, **headers: str) -> Answer:
        names: Mapping[str, str] = {name.replace("_", "-"): value for name, value in headers.items()}
        with contextlib.closing(self._connection()) as connection:
            data = None if body is None else json.dumps(body)
            connection.request(method, path, data, {**names, **({"Authorization": f"Bearer {key}"} if key else {})})
            response = connection.getresponse()
            return Answer(response.status, dict(response.headers.items()), response.read())

    def _connection(self) -> http.client.HTTPConnection:
        if self._tls is None:
            return http.client.HTTPConnection("127.0.0.1", self._port, timeout=60)
        return http.client.HTTPSConnection("127.0.0.1", self._port, timeout=60, context=self._tls)


def agentctl(daemon: DaemonProcess, *arguments: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "agentd.ctl.app", "--socket", str(daemon.admin), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def add(daemon: DaemonProcess, name: str, scopes: str = "ask,feedback") -> str:
    done = agentctl(daemon, "key", "add", name, "--scope", scopes)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture(scope="module")
def port() -> int:
    return free_port()


@pytest.fixture(scope="module")
def daemon(port: int) -> Iterator[DaemonProcess]:
    with DaemonProcess(settings={"serve": {"tcp": f"0.0.0.0:{port}"}}) as daemon:
        yield daemon.start()


@pytest.fixture(scope="module")
def remote(port: int) -> Remote:
    return Remote(port)


def test_nothing_listens_before_the_first_key_and_then_only_keys_get_in(daemon: DaemonProcess, remote: Remote) -> None:
    with pytest.raises(ConnectionRefusedError):
        remote.send("GET", "/v1/models")
    assert "no one gets in at 0.0.0.0" in daemon.log
    assert "agentctl key add" in daemon.log
    key = add(daemon, "first")
    eventually(lambda: listens(remote))
    assert remote.send("POST", "/v1/chat/completions", ASK, key).status == 200
    assert remote.send("GET", "/health").json == {"status": "ok"}
    for path in ("/v1/models", "/openapi.json", "/metrics", "/admin/status"):
        assert remote.send("GET", path).status == 401
        assert remote.send("GET", path, key="wrong").status == 401
    assert remote.send("GET", "/admin/status", key=key).error["code"] == "insufficient_scope"
    assert not [path for path in remote.send("GET", "/openapi.json", key=key).json["paths"] if "/admin" in path]


def listens(remote: Remote) -> bool:
    with contextlib.suppress(ConnectionRefusedError):
        return remote.send("GET", "/health").status == 200
    return False


def test_what_a_key_sends_is_its_own(daemon: DaemonProcess, remote: Remote) -> None:
    key = add(daemon, "author")
    eventually(lambda: listens(remote))
    answer = remote.send("POST", "/v1/chat/completions", ASK, key, X_Forwarded_For="uid:0")
    said = {"inference_id": answer.json["id"], "kind": "comment", "value": "Well."}
    assert remote.send("POST", "/v1/feedback", said, key).status == 201
    line = {"task": "reviews", "text": "Fine.", "label": "yes"}
    assert remote.send("POST", "/v1/examples", line, key).status == 200
    assert daemon.inference(answer.json["id"])["author"] == "key:author"
    listed = daemon.get("/admin/feedback?author=key:author", admin=True).json
    assert listed["total"] == 1
    gone = agentctl(daemon, "feedback", "forget", "--author", "key:author", "-y", "--json")
    assert json.loads(gone.stdout)["inferences"] == 1


def test_revoking_takes_effect_at_once_and_outlives_a_kill(daemon: DaemonProcess, remote: Remote) -> None:
    stays, goes, owner = add(daemon, "stays"), add(daemon, "goes"), add(daemon, "owner", "admin")
    eventually(lambda: listens(remote))
    assert remote.send("GET", "/v1/models", key=goes).status == 200
    assert remote.send("POST", "/admin/keys/goes/revoke", {}, owner).status == 200  # an admin's key may do that
    assert remote.send("GET", "/v1/models", key=goes).status == 401
    daemon.kill()
    daemon.start()
    statuses = [remote.send("GET", "/v1/models", key=key).status for key in (stays, goes, owner)]
    assert statuses == [200, 401, 200]
    assert agentctl(daemon, "key", "revoke", "goes").returncode == 4
    rows = {row.split("\t")[0]: row.split("\t") for row in agentctl(daemon, "key", "list").stdout.splitlines()}
    assert rows["goes"][5] != ""
    assert rows["stays"][5] == ""
    doctor = agentctl(daemon, "doctor").stdout
    assert f"http://0.0.0.0:{remote._port}, with one of" in doctor
    assert stays not in daemon.log
    assert goes not in daemon.log


def test_the_dashboard_of_another_machine_comes_through_the_port(daemon: DaemonProcess, remote: Remote) -> None:
    add(daemon, "any")
    eventually(lambda: listens(remote))
    shown = agentctl(daemon, "dashboard", "--tcp")
    assert shown.returncode == 0, shown.stderr
    address = urlsplit(shown.stdout.strip())
    assert address.netloc == f"{socket.gethostname()}:{remote._port}"
    assert remote.send("GET", "/ui/").status == 200
    token, host = {"token": address.fragment.removeprefix("key=")}, f"127.0.0.1:{remote._port}"
    assert remote.send("POST", "/ui/session", token, Origin="http://evil.example").status == 403
    answer = remote.send("POST", "/ui/session", token, Origin=f"http://{host}")
    cookie = answer.headers["set-cookie"].partition(";")[0]
    assert remote.send("GET", "/admin/status", Cookie=cookie).status == 200
    assert remote.send("POST", "/admin/pause", {}, Cookie=cookie, Origin="http://evil.example").status == 403
    assert agentctl(daemon, "dashboard", "--tcp", "--port", "1").returncode == 2


def test_loopback_is_open_unless_it_is_said_otherwise() -> None:
    port = free_port()
    remote = Remote(port)
    with DaemonProcess() as daemon:
        daemon.start()
        assert "set serve.tcp" in agentctl(daemon, "dashboard", "--tcp").stderr
        daemon.stop()
        daemon.configure(None, {"serve": {"tcp": f"127.0.0.1:{port}"}})
        daemon.start()
        assert agentctl(daemon, "dashboard", "--tcp").stdout.startswith(f"http://127.0.0.1:{port}/ui/#key=")
        key = add(daemon, "a")
        for brought in (None, "unused", key):
            assert remote.send("POST", "/v1/chat/completions", ASK, brought).status == 200
            assert remote.send("GET", "/admin/status", key=brought).status in (401, 403)
        daemon.stop()
        daemon.configure(None, {"serve": {"tcp": f"127.0.0.1:{port}", "require_key": True}})
        daemon.start()
        statuses = [remote.send("GET", "/v1/models", key=brought).status for brought in (None, "unused", key)]
        assert statuses == [401, 401, 200]


def test_a_port_that_systemd_opened_asks_for_keys() -> None:
    """As agentd-tcp.socket hands it over, by the name tcp."""
    port = free_port()
    hand_over = (
        f"import os, socket, sys; s = socket.create_server(('0.0.0.0', {port})); os.dup2(s.fileno(), 3);"
        "os.set_inheritable(3, True);"
        "os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS='1', LISTEN_FDNAMES='tcp');"
        "os.execvp(sys.argv[1], sys.argv[1:])"
    )
    with DaemonProcess(wrapper=[sys.executable, "-c", hand_over]) as daemon:
        daemon.start()
        remote = Remote(port)
        assert remote.send("GET", "/v1/models").status == 401
        assert remote.send("GET", "/v1/models", key=add(daemon, "a")).status == 200
        assert daemon.status()["tcp"] == [{"address": f"0.0.0.0:{port}", "tls": False, "needs_key": True, "open": True}]


def test_a_certificate_is_used_and_read_again(tmp_path: Path) -> None:
    port = free_port()
    crt, key = certificate(tmp_path)
    tls = {"certificate": str(crt), "key": str(key)}
    settings = {"serve": {"tcp": f"127.0.0.1:{port}", "tls": tls}}
    with DaemonProcess(settings=settings) as daemon:
        daemon.start()
        assert Remote(port, crt).send("GET", "/health").status == 200
        with pytest.raises((http.client.HTTPException, ConnectionError)):
            Remote(port).send("GET", "/health")
        certificate(tmp_path)
        with pytest.raises(ssl.SSLCertVerificationError):
            Remote(port, crt).send("GET", "/health")
        daemon.process.send_signal(signal.SIGHUP)  # type: ignore[union-attr]
        eventually(lambda: trusts(Remote(port, crt)))
        crt.write_text("nonsense")
        daemon.process.send_signal(signal.SIGHUP)  # type: ignore[union-attr]
        eventually(lambda: "no certificate and key in PEM" in daemon.log)
        daemon.stop()
        status, log = daemon.run_to_end()
    assert status == 78
    assert "serve.tls: " in log.splitlines()[-1]


def trusts(remote: Remote) -> bool:
    with contextlib.suppress(ssl.SSLCertVerificationError):
        return remote.send("GET", "/health").status == 200
    return False
