"""Listening: UNIX sockets with the right mode from the start, or TCP; and HTTP/1.1 on them."""

import asyncio
import contextlib
import errno
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import h11
import uvicorn
from starlette.applications import Starlette
from uvicorn.protocols.http.h11_impl import H11Protocol

from agentd.api.peers import credentials, loopback_credentials
from agentd.api.tls import Tls
from agentd.errors import CannotListen

HEAD_SECONDS = 30.0  # for a client to send its request's head, and what is left of a body that no one reads
GRACE = 8  # seconds that requests have left when the daemon is told to stop; a little later they are cut off
_KEEP_ALIVE = 75  # seconds an idle connection is kept: longer than clients do, or they meet it while it closes


def unix_socket(path: Path, mode: int) -> socket.socket:
    """A listening socket at `path` with exactly `mode`. A stale socket is replaced; a live one, or a file that is no
    socket, is not. Raises CannotListen.
    """
    listener = socket.socket(socket.AF_UNIX)
    temporary = path.with_name(f".{os.getpid()}.sock")
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        _refuse_occupied(path)
        temporary.unlink(missing_ok=True)
        directory = os.open(path.parent, os.O_PATH | os.O_DIRECTORY)
        try:  # through the descriptor: a path that fits may be too long with the temporary name
            listener.bind(f"/proc/self/fd/{directory}/{temporary.name}")
        finally:
            os.close(directory)
        temporary.chmod(mode)
        listener.listen(128)
        temporary.rename(path)
    except OSError as error:
        listener.close()
        raise CannotListen(path, error.strerror or str(error)) from None
    except BaseException:
        listener.close()
        raise
    return listener


def _refuse_occupied(path: Path) -> None:
    if path.exists() and not path.is_socket():
        raise CannotListen(path, "a file that is no socket is there")
    with socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(1)
        try:
            probe.connect(str(path))
        except (FileNotFoundError, ConnectionRefusedError):
            return  # nothing there, or a file left behind by kill -9
        except TimeoutError:
            pass  # somebody listens and is busy
        raise CannotListen(path, "another server already listens there; stop it, or set another serve.socket")


def tcp_socket(address: str) -> socket.socket:
    """A socket that is bound to HOST:PORT and does not listen yet. Raises CannotListen."""
    host, _, port = address.rpartition(":")
    family = socket.AF_INET6 if host.startswith("[") else socket.AF_INET
    try:
        listener = socket.socket(family)
    except OSError as error:
        reason = error.strerror or str(error)
        if error.errno == errno.EAFNOSUPPORT:  # the unit's RestrictAddressFamilies=AF_UNIX, or a kernel without IPv6
            reason += "; as a service of systemd it has no network: leave serve.tcp out and enable agentd-tcp.socket"
        raise CannotListen(address, reason) from None
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:  # [::] means that, whatever the system's setting says; 0.0.0.0 is the other one
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        listener.bind((host.strip("[]"), int(port)))
    except OSError as error:
        listener.close()
        raise CannotListen(address, error.strerror or str(error)) from None
    return listener


def address_of(listener: socket.socket) -> str:
    """HOST:PORT of a TCP socket."""
    host, port = listener.getsockname()[:2]
    return f"[{host}]:{port}" if listener.family == socket.AF_INET6 else f"{host}:{port}"


class Protocol(H11Protocol):
    """HTTP/1.1 that gives up on a client who stops in the middle of a request's head, or does not even begin."""

    _deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        super().connection_made(transport)
        if self.limit_concurrency is not None and len(self.connections) >= self.limit_concurrency:
            transport.abort()  # before a word is said: uvicorn would let the silent ones stand
            return
        # asyncio's wrapper of the socket has the same getsockopt
        peer = credentials(transport.get_extra_info("socket"))
        if peer is None and self.client and self.server and self.server[1]:
            # the port goes with it, so that two connections of one user can be told apart in the log
            user = loopback_credentials(self.client, self.server)
            peer = (user, self.client[1]) if user else None
        self.client = peer or self.client
        self._watch()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._forget()

    def _watch(self) -> None:
        """Starts the clock when it is the client's turn, and stops it when the application has a request to answer.
        Between requests it is uvicorn's keep-alive that counts."""
        answered = self.conn.our_state in (h11.DONE, h11.MUST_CLOSE)
        if self.conn.their_state is not h11.IDLE and not answered:
            self._forget()
        elif self._deadline is None:
            self._deadline = self.loop.call_later(HEAD_SECONDS, self.timeout_keep_alive_handler)

    def _forget(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None


class Server(uvicorn.Server):
    """uvicorn on given sockets; the daemon handles signals and says when to stop.

    `tls` makes it https. It listens as soon as `wanted` is set. More than `connections` at a time are hung up on.
    """

    def __init__(
        self,
        app: Starlette,
        sockets: list[socket.socket],
        *,
        tls: Tls | None = None,
        wanted: asyncio.Event | None = None,
        connections: int | None = None,
    ) -> None:
        config = uvicorn.Config(
            app,
            http=Protocol,
            ws="none",
            log_level="warning",
            access_log=False,
            lifespan="off",
            proxy_headers=False,  # anybody may write X-Forwarded-For, and so be whoever it says
            server_header=False,
            timeout_keep_alive=_KEEP_ALIVE,
            timeout_graceful_shutdown=GRACE + 2,
            h11_max_incomplete_event_size=64 * 1024,
            limit_concurrency=None if connections is None else connections + 1,  # Protocol hangs up on that one
        )
        config.load()
        config.ssl = tls.context if tls else None
        super().__init__(config)
        self.tls = tls
        self._sockets, self._wanted, self._stopped = sockets, wanted, asyncio.Event()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def run_until_stopped(self) -> None:
        if self._wanted is not None:
            waiting = {asyncio.create_task(event.wait()) for event in (self._wanted, self._stopped)}
            await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            for task in waiting:
                task.cancel()
        if self.should_exit:
            for listener in self._sockets:
                listener.close()
            return
        await self.serve(sockets=self._sockets)

    def stop(self) -> None:
        self.should_exit = True
        self._stopped.set()
