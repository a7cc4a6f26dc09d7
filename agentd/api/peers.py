"""Who is at the other end of the socket, and how much one source may say."""

import ipaddress
import socket
import struct
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

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


def loopback_credentials(peer: Any, own: Any, tables: Path = Path("/proc/net")) -> str | None:
    """ "uid:1000" of a TCP client on this machine: the kernel lists every socket with its owner. None where it is in
    another network namespace (a published port of a container) or gone. The line of the peer's socket has its address
    first and ours second (proc_net_tcp.txt in the kernel's documentation)."""
    family = socket.AF_INET6 if ":" in str(peer[0]) else socket.AF_INET
    local, remote = _in_table(family, peer), _in_table(family, own)
    try:
        lines = (tables / ("tcp6" if family == socket.AF_INET6 else "tcp")).read_text().splitlines()[1:]
    except OSError:
        return None
    for fields in map(str.split, lines):
        # a socket that no one has open any more is listed as root's, with inode 0
        if fields[1:3] == [local, remote] and fields[9] != "0":
            return f"uid:{fields[7]}"
    return None


def _in_table(family: socket.AddressFamily, address: Any) -> str:
    """An address as /proc/net/tcp has it: words of 32 bits in the machine's own byte order, a colon, the port."""
    packed = socket.inet_pton(family, str(address[0]))
    words = struct.unpack(f"={len(packed) // 4}I", packed)
    return "".join(f"{word:08X}" for word in words) + f":{address[1]:04X}"


def author(request: Request) -> str | None:
    """Who is at the other end: "uid:1000", "tcp" for a TCP client whose user the kernel does not tell, None where
    no one can say."""
    if request.client is None:
        return None
    return request.client.host if request.client.host.startswith("uid:") else "tcp"


def address(request: Request) -> str:
    """Where a request comes from, as far as one sender may be told from others: of IPv6 the network, in which a host
    chooses its address as it likes."""
    host = request.client.host if request.client else "unknown"
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return host  # uid:1000, on loopback
    if isinstance(address, ipaddress.IPv6Address):
        if address.ipv4_mapped:
            return str(address.ipv4_mapped)
        return str(ipaddress.ip_network((address, 64), strict=False))
    return str(address)


class RateLimiter:
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
