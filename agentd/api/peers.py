"""Who is at the other end of the socket, and how much one source may say."""

import socket
import struct
import time
from collections import deque
from collections.abc import Callable

from starlette.requests import Request

_CREDENTIALS = struct.Struct("3i")  # pid, uid, gid: struct ucred of unix(7)
_WINDOW = 60.0  # seconds
_SOURCES = 1024  # that are counted at the same time; beyond that the longest silent one is forgotten


def credentials(connection: socket.socket) -> tuple[str, int] | None:
    """("uid:1000", pid) of a peer on a UNIX socket, as the kernel noted them when it connected; else None."""
    if connection.family != socket.AF_UNIX:
        return None
    try:
        data = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    except OSError:
        return None
    pid, uid, _ = _CREDENTIALS.unpack(data)
    return (f"uid:{uid}", pid) if pid else None


def author(request: Request) -> str | None:
    """Who sends this request: "uid:1000", "tcp" for the loopback port, None where nobody can say."""
    if request.client is None:
        return None
    return request.client.host if request.client.host.startswith("uid:") else "tcp"


class Flood:
    """Counts what each source says within a minute."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._said: dict[tuple[str | None, str], deque[float]] = {}

    def exceeded(self, author: str | None, source: str, limit: int) -> bool:
        """Notes one more from this source, and says whether it is beyond `limit` within the last minute."""
        now = self._clock()
        key = (author, source)
        said = self._said.pop(key, None) or deque()
        while said and said[0] <= now - _WINDOW:
            said.popleft()
        self._said[key] = said  # the last one to have spoken comes last
        if len(self._said) > _SOURCES:
            del self._said[next(iter(self._said))]
        if len(said) >= limit:
            return True
        said.append(now)
        return False
