"""The daemon's end of the engine process: spawn it, send commands, get answers. Lives on the event loop."""

import asyncio
import contextlib
import json
import logging
import os
import signal
import socket
import sys
from collections.abc import AsyncGenerator, Callable
from typing import Any

import anyio

from agentd.engine.operations import Cancel, Classify, Embed, Operation, P, R, ServingOperation, Submit
from agentd.engine.process import wire
from agentd.engine.protocol import Classification, Generate, ModelInfo, Piece
from agentd.errors import AgentdError, EngineDied, EngineUnavailable
from agentd.host import openmp

logger = logging.getLogger(__name__)


class EngineClient:
    """One engine process. `on_progress` of a call gets what its command reports on the way."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self._settings = settings
        self._process: asyncio.subprocess.Process | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._number = 0
        self._calls: dict[int, asyncio.Future[Any]] = {}
        self._requests: set[asyncio.Future[Any]] = set()  # those of the calls that are for one
        self._progress: dict[int, Callable[[Any], None]] = {}
        self._streams: dict[str, asyncio.Queue[Piece | AgentdError]] = {}
        self.dead = asyncio.Event()
        self._reader: asyncio.Task[None] | None = None

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process else None

    async def start(self) -> ModelInfo:
        """Spawns the process and waits until it has loaded the model. Raises what it could not do."""
        ours, theirs = socket.socketpair()
        try:
            with theirs:
                self._process = await asyncio.create_subprocess_exec(
                    sys.executable,
                    "-m",
                    "agentd.engine.process.runner",
                    str(theirs.fileno()),
                    json.dumps(self._settings),
                    pass_fds=[theirs.fileno()],
                    stdin=asyncio.subprocess.DEVNULL,
                    env=_environment(self._settings),
                )
        except OSError as error:
            ours.close()
            raise EngineUnavailable(f"the engine process cannot be started: {error.strerror}") from None
        reader, self._writer = await asyncio.open_connection(sock=ours, limit=wire.LIMIT)
        ready: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._calls[0] = ready
        self._reader = asyncio.create_task(self._read(reader))
        try:
            info: ModelInfo = wire.reader(ModelInfo)(await ready)
            return info
        except EngineDied:
            raise EngineUnavailable(
                f"the engine process ended while it loaded {self._settings['path']} ({self._status()})"
            ) from None
        finally:
            self._calls.pop(0, None)

    async def call(self, operation: Operation[R, P], on_progress: Callable[[P], None] | None = None) -> R:
        """Runs an operation and returns its result. Raises its error, or EngineDied."""
        if self._writer is None:
            raise EngineUnavailable("the engine is not running")
        if self.dead.is_set():
            raise EngineDied(self._status())
        self._number += 1
        number = self._number
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._calls[number] = future
        if isinstance(operation, ServingOperation):
            self._requests.add(future)
        if on_progress:
            self._progress[number] = lambda tree: on_progress(wire.progress(operation, tree))
        try:
            self._writer.write(wire.command(number, operation))
            return wire.result(operation, await future)
        finally:
            self._calls.pop(number, None)
            self._requests.discard(future)
            self._progress.pop(number, None)

    def generate(self, request: Generate) -> AsyncGenerator[Piece, None]:
        """Streams a request's pieces; the last one has `finish` set. Cancels the request when left early."""
        return self._stream(request.key, Submit(request))

    async def embed(self, key: str, input: dict[str, Any]) -> Piece:
        """The one piece of what is to be embedded."""
        async with contextlib.aclosing(self._stream(key, Embed(key, input))) as pieces:
            return await anext(pieces)

    async def _stream(self, key: str, operation: Operation[None, None]) -> AsyncGenerator[Piece, None]:
        queue: asyncio.Queue[Piece | AgentdError] = asyncio.Queue()
        self._streams[key] = queue
        finished = False
        try:
            await self.call(operation)
            while not finished:
                piece = await queue.get()
                if isinstance(piece, AgentdError):
                    finished = True
                    raise piece
                if piece.error:
                    finished = True
                    raise wire.revive(piece.error)
                finished = piece.finish is not None
                yield piece
        except AgentdError:
            finished = True
            raise
        finally:
            self._streams.pop(key, None)
            if not finished and self._writer and not self.dead.is_set():
                self._number += 1  # no one waits for the answer
                self._writer.write(wire.command(self._number, Cancel(key)))

    async def classify(self, input: dict[str, Any]) -> Classification:
        return await self.call(Classify(input))

    def give_up(self, error: AgentdError) -> None:
        """Ends all requests on their way with this error."""
        for future in self._requests:
            if not future.done():
                future.set_exception(error)
        for queue in self._streams.values():
            queue.put_nowait(error)

    def kill(self) -> None:
        """Ends the process at once."""
        if self._process and self._process.returncode is None:
            self._process.kill()

    async def stop(self) -> None:
        """Ends the process: first asked, then killed."""
        if self._process is None:
            return
        if self._writer:
            self._writer.close()  # the end of its input is its order to leave
        await self._end(3)
        if self._reader:
            await asyncio.wait({self._reader}, timeout=1)

    async def _read(self, reader: asyncio.StreamReader) -> None:
        try:
            while line := await reader.readline():
                self._dispatch(json.loads(line))
        except (ConnectionError, ValueError) as error:
            logger.warning("the engine's channel broke: %s", error)
        finally:
            assert self._process is not None
            if self._writer:
                self._writer.close()
            await self._end(1)
            self._bury(self._status())

    async def _end(self, seconds: float) -> None:
        """Waits for the process to end by itself, as it does when its channel is closed, before it is killed.

        Killing a process that has just died would take its exit status away from asyncio.
        """
        assert self._process is not None
        try:
            with anyio.fail_after(seconds):
                await self._process.wait()
        except TimeoutError:
            self._process.kill()
            await self._process.wait()

    def _status(self) -> str:
        code = self._process.returncode if self._process else None
        return f"killed by {_signal_name(-code)}" if code is not None and code < 0 else f"it ended with status {code}"

    def _dispatch(self, message: dict[str, Any]) -> None:
        for tree in message.get("pieces", ()):
            if queue := self._streams.get(tree["key"]):
                queue.put_nowait(wire.piece(tree))
        if "id" not in message:
            return
        number = message["id"]
        if "progress" in message:
            if callback := self._progress.get(number):
                try:
                    callback(message["progress"])
                except Exception:  # a listener's mistake must not end the engine
                    logger.exception("a progress listener failed")
            return
        future = self._calls.get(number)
        if future is None or future.done():
            return
        if "error" in message:
            future.set_exception(wire.revive(message["error"]))
        else:
            future.set_result(message["result"])

    def _bury(self, detail: str) -> None:
        self.dead.set()
        for future in self._calls.values():
            if not future.done():
                future.set_exception(EngineDied(detail))
        self.give_up(EngineDied(detail))


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _environment(settings: dict[str, Any]) -> dict[str, str]:
    """The engine's environment: not the service manager's descriptors, and for how long threads spin (host/openmp.py).
    PyTorch has an OpenMP of its own, which no one watches."""
    inherited = {k: v for k, v in os.environ.items() if k not in ("NOTIFY_SOCKET", "LISTEN_FDS", "LISTEN_PID")}
    threads = settings["threads"] if settings["engine"] == "llamacpp" else 1
    return {"GOMP_SPINCOUNT": str(openmp.spin_count(threads)), **inherited}
