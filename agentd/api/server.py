"""Listening: UNIX sockets with the right mode from the start, descriptors from systemd, or a loopback port."""

import asyncio
import contextlib
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import uvicorn
from starlette.applications import Starlette

from agentd.errors import AgentdError


def unix_socket(path: Path, mode: int) -> socket.socket:
    """A listening socket at `path` with exactly `mode`. A stale file is replaced, a live server is not."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    with socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(1)
        try:
            probe.connect(str(path))
        except OSError:
            pass
        else:
            raise AgentdError(f"another server already listens on {path}")
    listener = socket.socket(socket.AF_UNIX)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.unlink(missing_ok=True)
    listener.bind(str(temporary))
    temporary.chmod(mode)
    listener.listen(128)
    temporary.rename(path)
    return listener


def tcp_socket(address: str) -> socket.socket:
    """A listening socket on a loopback HOST:PORT."""
    host, _, port = address.rpartition(":")
    family = socket.AF_INET6 if host.startswith("[") else socket.AF_INET
    listener = socket.socket(family)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host.strip("[]"), int(port)))
    except OSError as error:
        raise AgentdError(f"cannot listen on {address}: {error.strerror}") from None
    listener.listen(128)
    return listener


class Server(uvicorn.Server):
    """uvicorn on given sockets; the daemon handles signals and says when to stop."""

    def __init__(self, app: Starlette, sockets: list[socket.socket]) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                log_level="warning",
                access_log=False,
                lifespan="off",
                server_header=False,
                timeout_graceful_shutdown=10,
                h11_max_incomplete_event_size=64 * 1024,
            )
        )
        self._sockets = sockets

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def run_until_stopped(self) -> None:
        await self.serve(sockets=self._sockets)

    async def started_listening(self) -> None:
        while not self.started:  # uvicorn has no event for it
            await asyncio.sleep(0.01)

    def stop(self) -> None:
        self.should_exit = True
