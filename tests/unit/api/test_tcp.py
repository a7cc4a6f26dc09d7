"""The daemon's own servers over real sockets, without an engine: which doors there are, and when they open."""

import asyncio
import socket
import tempfile
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack, closing
from pathlib import Path
from typing import Any, cast

import anyio
import pytest

from agentd import daemon, models
from agentd.api.access import Scope
from agentd.api.services import Services
from agentd.config.schema import Config, ServeSettings, StateSettings
from agentd.formats.gguf_header import read_header
from agentd.host.systemd import Notifier
from agentd.models import ModelFile
from agentd.store.database import Store
from tools import tiny_model

Ask = Callable[[str, str | None], Awaitable[int]]


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


def run(visit: Callable[[Services, Ask], Awaitable[None]], host: str, **settings: Any) -> None:
    """`visit` while the daemon's servers run, with serve.tcp at `host`; `Ask` is (path, key) → status."""
    port = free_port()

    async def ask(path: str, key: str | None) -> int:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        bearer = f"Authorization: Bearer {key}\r\n" if key else ""
        writer.write(f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n{bearer}\r\n".encode())
        answer = await reader.read()
        writer.close()
        await writer.wait_closed()
        return int(answer[9:12])

    async def work(folder: Path, store: Store) -> None:
        tcp = ServeSettings(socket=folder / "api.sock", tcp=f"{host}:{port}", **settings)
        path = tiny_model.write(folder / "tiny.gguf")
        file = ModelFile(path, "0" * 64, path.stat().st_size, read_header(path), (path,), (), models.cache(), False)
        nobody = cast(Any, None)
        config = Config(state=StateSettings(dir=folder), serve=tcp)
        services = Services(config, store, nobody, nobody, nobody, file, nobody)
        async with AsyncExitStack() as stack:
            servers = daemon.serving(services, stack, Notifier({}))
            running = asyncio.gather(*(server.run_until_stopped() for server in servers))
            try:
                with anyio.fail_after(60):
                    await asyncio.sleep(0.2)
                    await visit(services, ask)
            finally:
                for server in servers:
                    server.stop()
                await running

    with (
        tempfile.TemporaryDirectory(prefix="agentd-", dir="/tmp") as name,
        closing(Store(Path(name) / "a.db")) as store,
    ):
        asyncio.run(work(Path(name), store))


def test_off_loopback_nothing_listens_before_the_first_key() -> None:
    async def visit(services: Services, ask: Ask) -> None:
        with pytest.raises(ConnectionRefusedError):
            await ask("/api/version", None)
        key, _ = await services.keys.add("a", Scope.ASK, None)
        await asyncio.sleep(0.2)
        assert await ask("/api/version", key) == 200
        assert await ask("/api/version", None) == 401
        assert await ask("/api/version", "wrong") == 401
        assert await ask("/admin/keys", key) == 403
        await services.keys.revoke("a")
        assert await ask("/api/version", key) == 401
        assert [(each["needs_key"], each["tls"]) for each in services.tcp] == [(True, False)]

    run(visit, "0.0.0.0")


def test_on_loopback_a_key_is_not_needed_and_any_will_do() -> None:
    async def visit(services: Services, ask: Ask) -> None:
        admin, _ = await services.keys.add("a", Scope.ADMIN, None)
        assert [await ask("/api/version", key) for key in (None, *["unused"] * 20, admin)] == [200] * 22
        assert [await ask("/admin/keys", key) for key in (None, "unused", admin)] == [403, 401, 200]

    run(visit, "127.0.0.1")


def test_where_it_is_said_loopback_asks_for_keys_too() -> None:
    async def visit(services: Services, ask: Ask) -> None:
        key, _ = await services.keys.add("a", Scope.ASK, None)
        await asyncio.sleep(0.2)
        assert [await ask("/api/version", brought) for brought in (None, "unused", key)] == [401, 401, 200]

    run(visit, "127.0.0.1", require_key=True)
