"""A board's daemon over its admin socket: JSON over HTTP/1.1 on a UNIX socket, with the standard library alone."""

import contextlib
import http.client
import json
import os
import socket
from pathlib import Path
from typing import Any

JSON = dict[str, Any]
SYSTEM_SOCKET = Path("/run/agentd/admin.sock")


class Unreachable(Exception):
    """No one answers at the socket: the daemon is down, or starts."""


class Refused(Exception):
    """The daemon said no; `code` and `status` are its answer's."""

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(message)
        self.status, self.code = status, code


def default_socket() -> Path:
    """The first that exists of the user's daemon, and of the system service."""
    run = os.environ.get("XDG_RUNTIME_DIR")
    state = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local/state") / "agentd"
    candidates = [*([Path(run) / "agentd" / "admin.sock"] if run else []), state / "admin.sock"]
    return next((path for path in candidates if path.exists()), SYSTEM_SOCKET)


class Board:
    """Every call opens a connection of its own. Raises Unreachable, Refused. `timeout` is in seconds of silence."""

    def __init__(self, path: Path, timeout: float = 120.0) -> None:
        self._path, self._timeout = path, timeout

    def get(self, path: str) -> JSON:
        return _object(self._exchange("GET", path, None))

    def post(self, path: str, body: JSON) -> JSON:
        return _object(self._exchange("POST", path, json.dumps(body).encode()))

    def download(self, path: str) -> bytes:
        return self._exchange("GET", path, None)

    def _exchange(self, method: str, path: str, body: bytes | None) -> bytes:
        connection = _Connection(self._path, self._timeout)
        try:
            with contextlib.suppress(BrokenPipeError):  # who refuses a body half-way has answered already
                connection.request(method, path, body, {"Content-Type": "application/json"} if body else {})
            response = connection.getresponse()
            data = response.read()
        except (OSError, http.client.HTTPException) as error:
            raise Unreachable(f"{self._path}: {error or type(error).__name__}") from None
        finally:
            connection.close()
        if response.status >= 400:
            error = _object(data).get("error") or {}
            raise Refused(response.status, str(error.get("code")), str(error.get("message")))
        return data


class _Connection(http.client.HTTPConnection):
    def __init__(self, path: Path, timeout: float) -> None:
        super().__init__("agentd", timeout=timeout)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(str(self._path))


def _object(data: bytes) -> JSON:
    try:
        tree = json.loads(data)
    except ValueError:
        tree = None
    if not isinstance(tree, dict):
        raise Unreachable("what answers there is not agentd")
    return tree
