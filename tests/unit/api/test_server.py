"""Sockets, and clients that are slow on purpose: the server alone, in this process, with short timeouts."""

import asyncio
import contextlib
import errno
import os
import socket
import stat
import tempfile
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from pathlib import Path

import anyio
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from agentd.api import requests, server, streaming
from agentd.api.requests import on_error
from agentd.api.server import Server, tcp_socket, unix_socket
from agentd.errors import AgentdError, CannotListen


@pytest.fixture
def directory() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="agentd-", dir="/tmp") as name:
        yield Path(name)


def test_a_socket_has_its_mode_from_the_start(directory: Path) -> None:
    for mode in (0o660, 0o600):
        with unix_socket(directory / "new" / "a.sock", mode):
            assert stat.S_IMODE((directory / "new" / "a.sock").stat().st_mode) == mode
    assert [path.name for path in (directory / "new").iterdir()] == ["a.sock"]


def test_a_stale_socket_is_replaced_and_a_live_one_is_not(directory: Path) -> None:
    path = directory / "a.sock"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    with unix_socket(path, 0o600):
        with pytest.raises(CannotListen, match="another server already listens there"):
            unix_socket(path, 0o600)
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(path))


@pytest.mark.parametrize("length", [100, 101, 107])
def test_every_path_that_a_client_can_connect_to_can_be_bound(directory: Path, length: int) -> None:
    path = directory / ("s" * (length - len(str(directory)) - 1))
    assert len(str(path)) == length
    with unix_socket(path, 0o600), socket.socket(socket.AF_UNIX) as client:
        client.connect(str(path))
    assert [file.name for file in directory.iterdir()] == [path.name]


def test_a_file_that_is_no_socket_is_left_alone(directory: Path) -> None:
    path = directory / "notes.txt"
    path.write_text("mine")
    with pytest.raises(CannotListen, match="no socket is there"):
        unix_socket(path, 0o600)
    assert path.read_text() == "mine"


def test_a_directory_that_cannot_be_made(directory: Path) -> None:
    (directory / "file").touch()
    with pytest.raises(CannotListen, match="File exists"):
        unix_socket(directory / "file" / "a.sock", 0o600)


def test_a_loopback_port_that_is_taken() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        with pytest.raises(CannotListen, match=f"{address}.*in use"):
            tcp_socket(address)


def test_a_service_without_network_says_what_to_enable(monkeypatch: pytest.MonkeyPatch) -> None:
    """The unit's RestrictAddressFamilies=AF_UNIX lets no other socket be made."""

    def refused(*_: object) -> None:
        raise OSError(errno.EAFNOSUPPORT, os.strerror(errno.EAFNOSUPPORT))

    monkeypatch.setattr(socket, "socket", refused)
    with pytest.raises(CannotListen, match=r"0\.0\.0\.0:8080.*agentd-tcp\.socket"):
        tcp_socket("0.0.0.0:8080")


@pytest.fixture
def path(directory: Path) -> Path:
    return directory / "a.sock"


def serve(path: Path, visit: Callable[[], Awaitable[None]], *routes: Route, connections: int | None = None) -> None:
    """Runs `visit` while a server with these routes listens at `path`."""

    async def run() -> None:
        app = Starlette(routes=list(routes), exception_handlers={AgentdError: on_error})
        running = Server(app, [unix_socket(path, 0o600)], connections=connections)
        task = asyncio.create_task(running.run_until_stopped())
        try:
            with anyio.fail_after(20):
                await visit()
        finally:
            running.stop()
            await task

    asyncio.run(run())


async def conversation(path: Path, *parts: bytes, pause: float = 0.0) -> bytes:
    """Sends the parts, and reads until the server hangs up."""
    reader, writer = await asyncio.open_unix_connection(str(path))
    try:
        for part in parts:
            if reader.at_eof() or writer.is_closing():
                break
            writer.write(part)
            await asyncio.sleep(pause)
        with anyio.fail_after(10):
            return await reader.read()
    except ConnectionError:  # hung up on in the middle of a part
        return b""
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


async def hello(request: Request) -> Response:
    return PlainTextResponse("hello")


async def echo(request: Request) -> Response:
    return PlainTextResponse(await requests.read(request, 1000))


HELLO, ECHO = Route("/hello", hello), Route("/echo", echo, methods=["POST"])
GET = b"GET /hello HTTP/1.1\r\nHost: a\r\n\r\n"


@pytest.mark.parametrize(
    "parts",
    [
        (),
        (b"GET /hel",),
        (b"GET /hello HTTP/1.1\r\nHost: a\r\nX-Slow:", *[b"x"] * 30),
        (GET, b"GET /hello HTTP/1.1\r\n"),
    ],
    ids=["silent", "half a line", "trickling", "the second request"],
)
def test_a_head_that_never_ends_is_hung_up_on(
    path: Path, monkeypatch: pytest.MonkeyPatch, parts: tuple[bytes, ...]
) -> None:
    monkeypatch.setattr(server, "HEAD_SECONDS", 0.3)

    async def visit() -> None:
        begin = asyncio.get_running_loop().time()
        answer = await conversation(path, *parts, pause=0.05)
        assert asyncio.get_running_loop().time() - begin < 5
        assert answer.count(b"hello") == (GET in parts)

    serve(path, visit, HELLO)


def test_a_long_answer_is_not_hung_up_on(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "HEAD_SECONDS", 0.1)

    async def slow(request: Request) -> Response:
        await asyncio.sleep(0.5)
        return PlainTextResponse("hello", headers={"Connection": "close"})

    async def visit() -> None:
        assert (await conversation(path, GET)).endswith(b"hello")

    serve(path, visit, Route("/hello", slow))


@pytest.mark.parametrize("body", [b"", b"half"])
def test_a_body_that_never_ends_is_answered_with_408_and_hung_up_on(
    path: Path, monkeypatch: pytest.MonkeyPatch, body: bytes
) -> None:
    monkeypatch.setattr(requests, "SILENCE", 0.2)

    async def visit() -> None:
        head = b"POST /echo HTTP/1.1\r\nHost: a\r\nContent-Length: 100\r\n\r\n"
        answer = await conversation(path, head + body)
        assert answer.startswith(b"HTTP/1.1 408")
        assert b'"code":"request_timeout"' in answer

    serve(path, visit, ECHO)


def test_one_connection_too_many_is_hung_up_on_and_its_place_is_free_again(path: Path) -> None:
    async def visit() -> None:
        standing = [await asyncio.open_unix_connection(str(path)) for _ in range(2)]
        await asyncio.sleep(0.1)
        assert await conversation(path) == b""
        standing[0][1].write(GET)
        assert b"200 OK" in await standing[0][0].readuntil(b"hello")
        for _, writer in standing:
            writer.close()
            await writer.wait_closed()
        await asyncio.sleep(0.1)
        assert b"hello" in await conversation(path, GET.replace(b"a\r\n", b"a\r\nConnection: close\r\n"))

    serve(path, visit, HELLO, connections=2)


def test_a_reader_who_stops_reading_is_given_up(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "PATIENCE", 0.3)
    closed = asyncio.Event()

    async def endless() -> AsyncGenerator[bytes, None]:
        try:
            while True:
                yield b"data: " + b"x" * 10_000 + b"\n\n"
        finally:
            closed.set()

    async def stream(request: Request) -> Response:
        return streaming.EventStream(endless())

    async def visit() -> None:
        _, writer = await asyncio.open_unix_connection(str(path), limit=1)
        writer.write(GET)
        with anyio.fail_after(5):
            await closed.wait()
        writer.transport.abort()

    serve(path, visit, Route("/hello", stream))


def test_a_reader_who_leaves_closes_the_stream(path: Path) -> None:
    closed = asyncio.Event()

    async def endless() -> AsyncGenerator[bytes, None]:
        try:
            while True:
                yield b"data: x\n\n"
                await asyncio.sleep(0.01)
        finally:
            closed.set()

    async def stream(request: Request) -> Response:
        return streaming.EventStream(endless())

    async def visit() -> None:
        reader, writer = await asyncio.open_unix_connection(str(path))
        writer.write(GET)
        await reader.readuntil(b"data: x")
        writer.close()
        with anyio.fail_after(5):
            await closed.wait()

    serve(path, visit, Route("/hello", stream))
