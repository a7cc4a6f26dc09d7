"""A real daemon, in a process of its own, with the real model: for tests that look at it the way clients do."""

import atexit
import contextlib
import functools
import http.client
import json
import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import psutil
import yaml

T = TypeVar("T")

# The state of a quiet daemon: it learns nothing by itself, and is small.
_SETTINGS: dict[str, Any] = {
    "model": {"context": 1024},
    "adapt": {"enabled": False},
    "tasks": {
        "reviews": {
            "choices": ["yes", "no"],
            "prompt": "Did the reviewer like this movie? Answer yes or no.\n\n{text}",
        }
    },
}
_INHERITED = ("AGENTD_", "XDG_RUNTIME_DIR", "RUNTIME_DIRECTORY", "STATE_DIRECTORY", "NOTIFY_SOCKET", "LISTEN_")


@dataclass(frozen=True)
class Answer:
    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> dict[str, Any]:
        """The error in the shape that OpenAI's clients expect."""
        error: dict[str, Any] = self.json["error"]
        assert {"message", "type", "code"} <= error.keys()
        return error


class DaemonProcess:
    """`python -m agentd` with a state directory and sockets of its own. `settings` are laid over those of `_SETTINGS`,
    `wrapper` is put before the command. Used as a context manager, it is gone afterwards, its directory too.
    """

    def __init__(
        self,
        model: Path | str,
        settings: Mapping[str, Any] | None = None,
        *,
        environment: Mapping[str, str] | None = None,
        wrapper: Sequence[str] = (),
    ) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix="agentd-", dir="/tmp"))  # socket paths must be short
        self.state = self.directory / "state"
        self.api, self.admin = self.directory / "api.sock", self.directory / "admin.sock"
        self.config = self.directory / "agentd.yaml"
        self.log_file = self.directory / "log"
        self.environment, self.wrapper = dict(environment or {}), list(wrapper)
        self.process: subprocess.Popen[bytes] | None = None
        self.configure(model, settings or {})

    def configure(self, model: Path | str, settings: Mapping[str, Any]) -> None:
        """Writes the configuration that the next start reads."""
        own = {
            "model": {"path": str(model)},
            "serve": {"socket": str(self.api), "admin_socket": str(self.admin)},
            "state": {"dir": str(self.state)},
        }
        self.config.write_text(yaml.safe_dump(_merged(_merged(_SETTINGS, own), settings)))

    def __enter__(self) -> "DaemonProcess":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self.kill()
        shutil.rmtree(self.directory, ignore_errors=True)

    # --- life

    def start(self, *, wait: bool = True) -> "DaemonProcess":
        """Starts it and, with `wait`, returns once it answers; fails with its log if it does not."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith(_INHERITED)}
        with self.log_file.open("ab") as log:
            self.process = subprocess.Popen(
                [*self.wrapper, sys.executable, "-m", "agentd", "--config", str(self.config)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**kept, "PYTHONWARNINGS": "default", **self.environment},
            )
        if wait:
            self.wait_until_ready()
        return self

    def wait_until_ready(self, timeout: float = 60.0) -> None:
        def ready() -> bool:
            assert self.process is not None
            assert self.process.poll() is None, f"the daemon ended with {self.process.returncode}:\n{self.log}"
            with contextlib.suppress(OSError, http.client.HTTPException):
                return self.get("/health").status == 200
            return False

        eventually(ready, timeout)

    def run_to_end(self, timeout: float = 60.0) -> tuple[int, str]:
        """For a start that must fail: its exit status and what it said."""
        self.start(wait=False)
        return self.wait(timeout), self.log

    def wait(self, timeout: float = 60.0) -> int:
        assert self.process is not None
        return self.process.wait(timeout)

    def stop(self) -> int:
        """SIGTERM; returns the exit status."""
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)
        return self.wait(20)

    def kill(self) -> None:
        """SIGKILL, if it lives, and waits until what it started is gone too."""
        if self.process is None or self.process.poll() is not None:
            return
        children = psutil.Process(self.process.pid).children(recursive=True)
        self.process.kill()
        self.process.wait(10)
        psutil.wait_procs(children, timeout=10)

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    @property
    def log(self) -> str:
        return self.log_file.read_text(errors="replace")

    # --- talking to it

    def get(self, path: str, *, admin: bool = False) -> Answer:
        return exchange(self.admin if admin else self.api, "GET", path)

    def post(self, path: str, body: Any = None, *, admin: bool = False, headers: Mapping[str, str] = {}) -> Answer:
        """`body` is sent as JSON, or as it is if it is bytes already."""
        data = body if isinstance(body, bytes) else json.dumps({} if body is None else body).encode()
        return exchange(self.admin if admin else self.api, "POST", path, data, headers)

    def ask(self, text: str = "Say yes.", **options: Any) -> Answer:
        """A short greedy chat completion."""
        body = {"messages": [{"role": "user", "content": text}], "max_tokens": 4, "temperature": 0, **options}
        return self.post("/v1/chat/completions", body)

    def status(self) -> dict[str, Any]:
        found: dict[str, Any] = self.get("/admin/status", admin=True).json
        return found

    def inference(self, id: str) -> dict[str, Any]:
        """The inference as it is recorded."""
        answer = self.get(f"/admin/inferences/{id}", admin=True)
        assert answer.status == 200, answer.body
        found: dict[str, Any] = answer.json
        return found

    def counts(self) -> dict[str, int]:
        """How many rows each table has, through a connection that only reads. Events are left out: the daemon writes
        them whenever it looks after itself, whatever a client does meanwhile.
        """
        uri = f"{(self.state / 'agentd.db').as_uri()}?mode=ro"
        with contextlib.closing(sqlite3.connect(uri, uri=True)) as db:
            tables = [name for (name,) in db.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
            tables.remove("events")
            return {table: db.execute(f"SELECT count(*) FROM {table}").fetchone()[0] for table in tables}


@functools.cache
def shared(model: Path) -> DaemonProcess:
    """One daemon for every test that only talks to it. It lives until the end of the session."""
    daemon = DaemonProcess(model)
    atexit.register(daemon.close)
    return daemon.start()


class UnixConnection(http.client.HTTPConnection):
    """HTTP/1.1 over a UNIX socket."""

    def __init__(self, path: Path, timeout: float = 60.0) -> None:
        super().__init__("agentd", timeout=timeout)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(str(self._path))

    def answer(self, method: str, path: str, body: bytes | None = None, headers: Mapping[str, str] = {}) -> Answer:
        # who refuses a body half-way has answered already
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self.request(method, path, body, dict(headers))
        response = self.getresponse()
        return Answer(response.status, dict(response.headers.items()), response.read())


def exchange(
    path: Path, method: str, target: str, body: bytes | None = None, headers: Mapping[str, str] = {}
) -> Answer:
    """One request on a connection of its own."""
    with contextlib.closing(UnixConnection(path)) as connection:
        return connection.answer(method, target, body, headers)


@contextlib.contextmanager
def streaming(path: Path, target: str, body: Any) -> Iterator[Iterator[dict[str, Any]]]:
    """The events of a streamed answer as they come; leaving the context hangs up."""
    with contextlib.closing(UnixConnection(path)) as connection:
        connection.request("POST", target, json.dumps({**body, "stream": True}).encode())
        response = connection.getresponse()
        assert response.status == 200, response.read()

        def events() -> Iterator[dict[str, Any]]:
            while line := response.readline():
                if line.startswith(b"data: {"):
                    yield json.loads(line[6:])

        try:
            yield events()
        finally:
            response.close()


def eventually(look: Callable[[], T], timeout: float = 10.0) -> T:
    """The first true value of `look`, asked again and again."""
    deadline = time.monotonic() + timeout
    while True:
        if found := look():
            return found
        assert time.monotonic() < deadline, f"{look} did not come true within {timeout:g} s"
        time.sleep(0.02)


def _merged(under: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(under)
    for name, value in over.items():
        known = merged.get(name)
        merged[name] = _merged(known, value) if isinstance(known, dict) and isinstance(value, Mapping) else value
    return merged
