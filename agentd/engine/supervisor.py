"""Keeps an engine running on the revision that should serve: starts it, restarts it, retries what it had not begun."""

import asyncio
import contextlib
import itertools
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable
from pathlib import Path
from typing import Any

from agentd import faults
from agentd.engine.activity import Activity
from agentd.engine.client import EngineClient
from agentd.engine.protocol import Classification, Generate, ModelInfo, Piece
from agentd.errors import AgentdError, CrashLoop, EngineDied, EngineUnavailable, Overloaded, RevisionCorrupt

logger = logging.getLogger(__name__)

Files = Callable[[int], tuple[Path | None, Path | None]]
"""Adapter and control vector of a revision, verified; raises RevisionCorrupt."""

EXPORTED = "exported"  # the name under which the engine holds a revision that is written into a file

_BACKOFF = (0.1, 0.5, 2.0, 5.0, 15.0, 30.0)  # seconds between restarts of an engine that keeps dying
_LEARNING = frozenset({"encode", "tap", "loss", "pair", "descend", "score", "drift"})  # it may be held
_CRASH_LOOP = 4  # deaths in a row after which a revision is not tried again
_HEALTHY = 60.0  # seconds of life after which the backoff starts anew


class Supervisor:
    """`fallback` says which revision to serve when one turns out to be unusable."""

    def __init__(
        self,
        settings: dict[str, Any],
        files: Files,
        activity: Activity,
        *,
        revision: int,
        queue_limit: int,
        fallback: Callable[[RevisionCorrupt, int], Awaitable[int]],
    ) -> None:
        self._settings, self._files, self._activity = settings, files, activity
        self._fallback = fallback
        self._limit = settings["slots"] + queue_limit
        self._client: EngineClient | None = None
        self._up = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._stopping = False
        self._swapping = asyncio.Lock()
        self.revision = revision
        self.restarts = 0
        self.info: ModelInfo | None = None
        self.problem: str | None = None
        self.degraded: str | None = None  # why the base serves in place of a revision; until another is chosen

    @property
    def ready(self) -> bool:
        return self._up.is_set()

    def set_queue(self, limit: int) -> None:
        """How many requests may wait."""
        self._limit = self._settings["slots"] + limit

    @property
    def pid(self) -> int | None:
        return self._client.pid if self._client else None

    async def start(self) -> None:
        """Starts the engine; raises if that fails with the base model, because then the model or its settings are
        wrong."""
        for failures in itertools.count(1):
            try:
                await self._launch()
                break
            except EngineUnavailable:  # and EngineDied
                if self.revision == 0:
                    raise
                await self._give_up_on(failures)
        self._task = asyncio.create_task(self._watch())

    async def stop(self) -> None:
        self._stopping = True
        self._up.clear()
        if self._task:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
        if self._client:
            await self._client.stop()

    async def call(self, op: str, *, on_progress: Callable[[Any], None] | None = None, **arguments: Any) -> Any:
        """A command to the engine that runs now. Raises EngineDied if it dies meanwhile; nothing is retried.

        Background work waits here as long as it is held.
        """
        if op in _LEARNING:
            await self._activity.released()
        if not self._up.is_set() or self._client is None:
            raise EngineUnavailable(self.problem or "the engine is starting")
        return await self._client.call(op, on_progress=on_progress, **arguments)

    async def alive(self, timeout: float) -> bool:
        """Whether the engine thread answers within `timeout` seconds."""
        try:
            await asyncio.wait_for(self.call("ping"), timeout)
        except (AgentdError, asyncio.TimeoutError):
            return False
        return True

    async def generate(self, request: Generate) -> AsyncGenerator[Piece, None]:
        """Serves a request. If the engine dies before the first piece, the next engine gets it again."""
        if self._activity.active >= self._limit:
            raise Overloaded(self._activity.active)
        with self._activity.request():
            for attempt in range(3):
                begun = False
                await self._wait_until_up()
                client = self._client
                assert client is not None
                pieces = client.generate(request)
                try:
                    async for piece in pieces:
                        begun = True
                        yield piece
                    return
                except EngineDied:
                    if self._client is client:  # a slow reader may hear of it when the next one is long up
                        self._up.clear()
                    if begun or attempt == 2:
                        raise
                finally:
                    await pieces.aclose()

    async def classify(self, input: dict[str, Any]) -> Classification:
        """Has a classifier answer. If the engine dies meanwhile, the next engine gets the input again."""
        if self._activity.active >= self._limit:
            raise Overloaded(self._activity.active)
        with self._activity.request():
            for attempt in range(3):
                await self._wait_until_up()
                client = self._client
                assert client is not None
                try:
                    return Classification(**await client.call("classify", input=input))
                except EngineDied:
                    if self._client is client:
                        self._up.clear()
                    if attempt == 2:
                        raise
            raise AssertionError("unreachable")

    async def stage(self, weights: str, adapter: Path | None, control: Path | None) -> None:
        """Loads adapters that are no revision yet, under a name of their own."""
        await self.call("stage", weights=weights, adapter=_text(adapter), control=_text(control))

    async def swap(self, revision: int) -> float:
        """Stages a revision's files and lets every new request be answered by it. Returns the swap's milliseconds."""
        async with self._swapping:
            milliseconds = await self._swap(revision)
            self.degraded = None
            return milliseconds

    async def _swap(self, revision: int) -> float:
        previous = self.revision
        await self._stage(revision)
        faults.point("swap staged")
        seconds = await self._command("swap", weights=str(revision))
        self.revision = revision
        faults.point("swap done")
        if previous not in (0, revision):
            with contextlib.suppress(AgentdError):
                await self._command("unstage", weights=str(previous))
        return 1e3 * float(seconds)

    async def _stage(self, revision: int) -> None:
        if revision:
            adapter, control = await asyncio.to_thread(self._files, revision)
            await self._command("stage", weights=str(revision), adapter=_text(adapter), control=_text(control))

    async def _command(self, op: str, **arguments: Any) -> Any:
        if self._client is None:
            raise EngineUnavailable(self.problem or "the engine is starting")
        return await self._client.call(op, **arguments)

    async def _wait_until_up(self) -> None:
        if self._up.is_set():
            return
        try:
            await asyncio.wait_for(self._up.wait(), 60)
        except asyncio.TimeoutError:
            raise EngineUnavailable(self.problem or "the engine is starting") from None

    async def _launch(self) -> None:
        client = EngineClient(self._settings)
        try:
            self.info = await client.start()
            self._client = client
            await self._restore()
        except BaseException:
            await client.stop()
            raise
        self.problem = None
        self._up.set()

    async def _give_up_on(self, failures: int) -> None:
        """A revision under which the engine dies again and again is left for the base model."""
        if failures < _CRASH_LOOP or self.revision == 0:
            return
        await self.distrust(CrashLoop(self.revision, failures, "engine"))

    async def distrust(self, error: CrashLoop) -> None:
        """Serves something else than the revision that `error` names, and is degraded for that reason."""
        async with self._swapping:
            self.revision = await self._fallback(error, self.revision)
            self.degraded = str(error)

    async def _restore(self) -> None:
        """Puts the revision that should serve into a fresh engine, or the best one that can be used."""
        async with self._swapping:  # another revision may be on its way in; the last one counts
            while True:
                try:
                    await self._swap(self.revision)
                    return
                except RevisionCorrupt as error:
                    self.revision = await self._fallback(error, self.revision)

    async def _watch(self) -> None:
        failures = 0
        loop = asyncio.get_running_loop()
        while True:
            assert self._client is not None
            started = loop.time()
            await self._client.dead.wait()
            self._up.clear()
            self.restarts += 1
            failures = 0 if loop.time() - started > _HEALTHY else failures + 1
            logger.error("the engine died; starting it again")
            while not self._up.is_set():
                await asyncio.sleep(_BACKOFF[min(failures, len(_BACKOFF) - 1)])
                try:
                    await self._give_up_on(failures)
                    await self._launch()
                except Exception as error:  # whatever it was, without this loop nothing would be served again
                    self.problem = str(error) or type(error).__name__
                    logger.error(
                        "the engine does not start: %s", self.problem, exc_info=not isinstance(error, AgentdError)
                    )
                    failures += 1


def _text(path: Path | None) -> str | None:
    return None if path is None else str(path)
