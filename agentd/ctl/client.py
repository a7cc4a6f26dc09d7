"""The daemon as seen from outside: JSON over HTTP/1.1 on a UNIX socket, with the standard library alone."""

import contextlib
import errno
import functools
import http.client
import json
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote, urlencode

from agentd.config import paths
from agentd.ctl.errors import ApiError, CtlError, NotReachable, UsageError

JSON = dict[str, Any]
T = TypeVar("T")

SYSTEM_SOCKET = Path("/run/agentd/admin.sock")  # RuntimeDirectory=agentd of the system service
_START = "start it with `agentd` or `systemctl start agentd`, or name its socket with --socket"


def default_socket() -> Path:
    """The first admin socket that exists: of the user's daemon, in the state directory, of the system service."""
    candidates = [paths.runtime_dir() / "admin.sock", paths.state_dir() / "admin.sock", SYSTEM_SOCKET]
    return next((path for path in candidates if os.path.lexists(path)), candidates[0])


class Daemon:
    """One daemon behind its admin socket. Every call opens a connection of its own.

    Every method raises NotReachable where there is no one to talk to, ApiError with the daemon's own message for a
    status of 400 and above, and CtlError for an answer that is not agentd's. `timeout` is in seconds of silence.
    """

    def __init__(self, path: Path | None = None, timeout: float = 60.0) -> None:
        self.path = path or default_socket()
        self.timeout = timeout

    def get(self, path: str, **query: str | int | None) -> JSON:
        parameters = {name: value for name, value in query.items() if value is not None}
        return self._exchange("GET", f"{path}?{urlencode(parameters)}" if parameters else path)

    def post(self, path: str, body: JSON | None = None) -> JSON:
        return self._exchange("POST", path, json.dumps(body or {}).encode(), "application/json")

    def upload(self, path: str, lines: bytes) -> JSON:
        """Posts a JSONL body as it is; the daemon checks the lines and stores all of them or none."""
        return self._exchange("POST", path, lines, "application/x-ndjson")

    def send(self, path: str, data: bytes) -> JSON:
        """Posts bytes as they are."""
        return self._exchange("POST", path, data, "application/octet-stream")

    def download(self, path: str) -> Iterator[bytes]:
        """Yields the parts of an answer that is no JSON. Raises NotReachable if it breaks off before its end."""
        connection = UnixConnection(self.path, self.timeout)
        try:
            response = self._request(connection, "GET", path, None, "")
            left = int(response.getheader("Content-Length", "0"))
            read = functools.partial(response.read, 1 << 16)
            while part := self._guard(read):
                left -= len(part)
                yield part
            if left:
                raise NotReachable(self.path, "the answer broke off before its end", "look at its log, then try again")
        finally:
            connection.close()

    def stream(self, path: str, body: JSON) -> Iterator[JSON]:
        """Posts `body` and yields the JSON of each server-sent event until `[DONE]`."""
        connection = UnixConnection(self.path, self.timeout)
        try:
            response = self._request(connection, "POST", path, json.dumps(body).encode(), "application/json")
            while line := self._guard(response.readline):
                if not line.startswith(b"data:"):
                    continue
                data = line[5:].strip()
                if data == b"[DONE]":
                    return
                event = self._parse(data)
                if "error" in event:
                    raise _api_error(response.status, event)
                yield event
            raise NotReachable(self.path, "the answer broke off before its end", "look at its log, then ask again")
        finally:
            connection.close()

    def _exchange(self, method: str, path: str, body: bytes | None = None, kind: str = "") -> JSON:
        connection = UnixConnection(self.path, self.timeout)
        try:
            response = self._request(connection, method, path, body, kind)
            return self._parse(self._guard(response.read))
        finally:
            connection.close()

    def _request(
        self, connection: "UnixConnection", method: str, path: str, body: bytes | None, kind: str
    ) -> http.client.HTTPResponse:
        self._guard(connection.connect)

        def send() -> http.client.HTTPResponse:
            # a daemon that refuses a body half-way has sent its reason already: read it
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                connection.request(method, path, body, {"Content-Type": kind} if kind else {})
            return connection.getresponse()

        response = self._guard(send)
        if response.status >= 400:
            raise _api_error(response.status, self._parse(self._guard(response.read)))
        return response

    def _guard(self, act: Callable[[], T]) -> T:
        try:
            return act()
        except TimeoutError:
            reason = f"it did not answer within {self.timeout:g} s"
            raise NotReachable(self.path, reason, "look at its log; `agentctl doctor` tells more") from None
        except (OSError, http.client.HTTPException) as error:
            raise NotReachable(self.path, *_explain(error, self.path)) from None

    def _parse(self, data: bytes) -> JSON:
        try:
            answer = json.loads(data)
        except ValueError:
            answer = None
        if not isinstance(answer, dict):
            raise CtlError(f"what answers at {self.path} is not agentd; name the admin socket with --socket")
        return answer


class UnixConnection(http.client.HTTPConnection):
    """HTTP/1.1 over a UNIX socket."""

    def __init__(self, path: Path, timeout: float) -> None:
        super().__init__("agentd", timeout=timeout)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(os.fsencode(self._path))


def segment(identifier: object) -> str:
    """An identifier as one segment of a URL's path."""
    text = quote(str(identifier), safe="")
    if text in ("", ".", ".."):
        raise UsageError(f"{str(identifier)!r} is not an identifier")
    return text


def _api_error(status: int, answer: JSON) -> ApiError:
    error = answer.get("error")
    if not isinstance(error, dict):
        return ApiError(status, f"the daemon answered with HTTP status {status} and no reason", "unknown")
    return ApiError(status, str(error.get("message")), str(error.get("code")))


def _explain(error: Exception, path: Path) -> tuple[str, str]:
    """The reason and the advice for a failure of the connection."""
    number = error.errno if isinstance(error, OSError) else None
    if number == errno.ENOENT:
        return "there is no socket", _START
    if number == errno.ECONNREFUSED:
        return "a socket is there and nobody listens (the daemon was killed)", _START
    if number in (errno.EACCES, errno.EPERM):
        return "permission denied", f"run agentctl as the daemon's user{_owner(path)}, or with sudo"
    if isinstance(error, http.client.HTTPException | ConnectionError):
        return "the daemon hung up before it answered", "look at its log, then try again"
    return str(error), "name its admin socket with --socket"


def _owner(path: Path) -> str:
    import pwd

    try:
        return f" ({pwd.getpwuid(path.parent.stat().st_uid).pw_name})"
    except (OSError, KeyError):
        return ""
