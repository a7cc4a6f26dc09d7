"""A real daemon in a process of its own, and HTTP to it: tests, demos and benchmarks look at it the way clients do."""

import asyncio
import contextlib
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
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import psutil
import yaml

from agentd.ctl.client import Daemon
from agentd.ctl.errors import CtlError
from agentd.ctl.progress import Ended, follow, view
from tools import tiny_model

T = TypeVar("T")

ROOT = Path(__file__).resolve().parent.parent
REVIEWS = ROOT / "configs" / "reviews.yaml"  # the configuration of demo and benchmarks
_START = 120.0  # seconds a model may take to load
# The state of a quiet daemon: it learns nothing by itself, and is small.
_SETTINGS: dict[str, Any] = {
    "model": {"context": 1024, "threads": 1},
    "adapt": {"enabled": False},
    "tasks": {
        "reviews": {
            "choices": ["yes", "no"],
            "prompt": "Did the reviewer like this movie? Answer yes or no.\n\n{text}",
        }
    },
}
_SURROUNDINGS = ("XDG_RUNTIME_DIR", "RUNTIME_DIRECTORY", "STATE_DIRECTORY", "NOTIFY_SOCKET", "LISTEN_")
_OWN = ("AGENTD_STATE_DIR", "AGENTD_SERVE_SOCKET", "AGENTD_SERVE_ADMIN_SOCKET")


PATIENCE = 5.0  # times as long is waited: a slow or busy machine is no fault, only what never happens is


class ToolFailed(Exception):
    """A tool cannot go on; the message says why."""


def end_daemons_on_sigterm() -> None:
    """Lets SIGTERM end a program by way of its `finally` clauses, which end the daemons that it has started."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))


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
    """`python -m agentd` with a state directory and sockets of its own. Used as a context manager, it is gone
    afterwards, its directory too.

    `model`: a model file; without it, what `config` names, or else a tiny model made on the spot.
    `settings` are laid over those of the YAML file `config`, or without one over those of a quiet daemon.
    `config` given, AGENTD_* variables apply as they do for any daemon; without, none is inherited.
    `state`: a directory that stays, with the log in it. `wrapper` is put before the command.
    """

    def __init__(
        self,
        model: Path | str | None = None,
        settings: Mapping[str, Any] | None = None,
        *,
        config: Path | None = None,
        state: Path | None = None,
        environment: Mapping[str, str] | None = None,
        wrapper: Sequence[str] = (),
    ) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix="agentd-", dir="/tmp"))  # socket paths must be short
        self.state = state.absolute() if state else self.directory / "state"
        self.api, self.admin = self.directory / "api.sock", self.directory / "admin.sock"
        self.ctl = Daemon(self.admin, timeout=_START)
        self.config = self.directory / "agentd.yaml"
        self.log_file = (self.state if state else self.directory) / "daemon.log"
        self._stays = state is not None
        self.environment, self.wrapper = dict(environment or {}), list(wrapper)
        self.process: subprocess.Popen[bytes] | None = None
        self._base = yaml.safe_load(config.read_text(encoding="utf-8")) if config else _SETTINGS
        self._left_out = (*_SURROUNDINGS, *(_OWN if config else ("AGENTD_",)))
        if model is None and config is None:
            model = tiny_model.write(self.directory / "tiny.gguf")
        self.configure(model, settings or {})

    def configure(self, model: Path | str | None, settings: Mapping[str, Any]) -> None:
        """Writes the configuration that the next start reads."""
        own: dict[str, Any] = {
            "serve": {"socket": str(self.api), "admin_socket": str(self.admin)},
            "state": {"dir": str(self.state)},
        }
        if model is not None:
            own["model"] = {"path": str(model.absolute() if isinstance(model, Path) else model)}
        self.config.write_text(yaml.safe_dump(_merged(_merged(self._base, own), settings)))

    def __enter__(self) -> "DaemonProcess":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        if self._stays and self.process is not None and self.process.poll() is None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.stop()
        self.kill()
        shutil.rmtree(self.directory, ignore_errors=True)

    # --- life

    def start(self, *, wait: bool = True) -> "DaemonProcess":
        """Starts it and, with `wait`, returns once it answers. Raises ToolFailed with its log if it does not."""
        variables = {name: value for name, value in os.environ.items() if not name.startswith(self._left_out)}
        self.log_file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with self.log_file.open("ab") as log:
            self.process = subprocess.Popen(
                [*self.wrapper, sys.executable, "-m", "agentd", "--config", str(self.config)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=ROOT,
                env={**variables, "PYTHONWARNINGS": "default", **self.environment},
            )
        if wait:
            self.wait_until_ready()
        return self

    def wait_until_ready(self, timeout: float = _START) -> None:
        def ready() -> bool:
            assert self.process is not None
            if self.process.poll() is not None:
                raise ToolFailed(f"the daemon ended with {self.process.poll()}:\n{self.log[-3000:]}")
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
        with contextlib.suppress(AssertionError):
            eventually(lambda: not any(map(lives, children)))

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    def cpu_seconds(self) -> float:
        """What the daemon itself has computed so far: how long it was busy, whoever else needs the machine."""
        times = psutil.Process(self.pid).cpu_times()
        return float(times.user + times.system)

    def pids(self) -> dict[str, int]:
        """The daemon, and its engine and trainer if they run."""
        pids = {"daemon": self.pid}
        for child in psutil.Process(self.pid).children():
            with contextlib.suppress(psutil.Error):
                command = child.cmdline()
                for name, module in (("engine", "agentd.engine.process.runner"), ("trainer", "agentd.trainer")):
                    if module in command and "--probe" not in command:
                        pids[name] = child.pid
        return pids

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
        """A short greedy chat completion, the same in any company."""
        messages = [{"role": "user", "content": text}]
        body = {"messages": messages, "max_tokens": 4, "temperature": 0, "seed": 0, **options}
        return self.post("/v1/chat/completions", body)

    def status(self) -> dict[str, Any]:
        tree: dict[str, Any] = self.get("/admin/status", admin=True).json
        return tree

    def inference(self, id: str) -> dict[str, Any]:
        """The inference as it is recorded."""
        answer = self.get(f"/admin/inferences/{id}", admin=True)
        assert answer.status == 200, answer.body
        tree: dict[str, Any] = answer.json
        return tree

    def counts(self) -> dict[str, int]:
        """How many rows each table has, through a connection that only reads. Events are left out: the daemon writes
        them whenever it looks after itself, independent of what a client does meanwhile.
        """
        uri = f"{(self.state / 'agentd.db').as_uri()}?mode=ro"
        with contextlib.closing(sqlite3.connect(uri, uri=True)) as db:
            # an index of terms holds nothing of its own, and cannot be read row by row
            own = "type = 'table' AND sql NOT LIKE 'CREATE VIRTUAL TABLE%'"
            tables = [name for (name,) in db.execute(f"SELECT name FROM sqlite_master WHERE {own}")]
            tables.remove("events")
            return {table: db.execute(f"SELECT count(*) FROM {table}").fetchone()[0] for table in tables}


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


def lives(process: psutil.Process) -> bool:
    """Whether it still runs. One that has ended may stay as a zombie for seconds, until init looks after it."""
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def eventually(look: Callable[[], T], timeout: float = 10.0) -> T:
    """The first true value of `look`, asked again and again, and less often the longer it takes: whoever is asked has
    other work to do. `timeout` is in seconds of an idle machine."""
    began = time.monotonic()
    deadline = began + PATIENCE * timeout
    while True:
        if value := look():
            return value
        now = time.monotonic()
        assert now < deadline, f"{look} did not come true within {PATIENCE * timeout:g} s"
        time.sleep(min(0.1, 0.02 + 0.03 * (now - began)))


def _merged(under: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(under)
    for name, value in over.items():
        known = merged.get(name)
        merged[name] = _merged(known, value) if isinstance(known, dict) and isinstance(value, Mapping) else value
    return merged


async def followed(daemon: Daemon, number: int) -> Ended:
    """How pass `number` ends, its progress shown meanwhile. One that is cancelled ends at once: a thread that went on
    looking would keep the process. Raises NotReachable."""
    cancelled = threading.Event()

    def pause(seconds: float) -> None:
        if cancelled.wait(seconds):
            raise CtlError("nobody waits any more")

    try:
        with view() as progress:
            return await asyncio.to_thread(follow, daemon, number, progress, sleep=pause)
    finally:
        cancelled.set()
