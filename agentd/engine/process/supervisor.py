"""Keeps an engine running on the revision that should serve: starts it, restarts it, retries what it had not begun."""

import asyncio
import contextlib
import itertools
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import anyio

from agentd import faults
from agentd.engine import canaries
from agentd.engine.operations import ForgetPrefixes, Operation, P, R, Stage, Stats, Swap, Unstage, Warm
from agentd.engine.process.activity import Activity
from agentd.engine.process.client import EngineClient
from agentd.engine.process.suspects import Suspects
from agentd.engine.protocol import Classification, Generate, ModelInfo, Piece
from agentd.errors import AgentdError, CrashLoop, EngineDied, EngineUnavailable, Overloaded, RevisionCorrupt
from agentd.host.file_digest import Stamp
from agentd.models import ModelFile

logger = logging.getLogger(__name__)

T = TypeVar("T")

Files = Callable[[int], tuple[Path | None, Path | None]]
"""Adapter and control vector of a revision, verified; raises RevisionCorrupt."""

EXPORTED = "exported"  # the name under which the engine holds a revision that is written into a file

_BACKOFF = (0.1, 0.5, 2.0, 5.0, 15.0, 30.0)  # seconds between restarts of an engine that keeps dying
_CRASH_LOOP = 4  # deaths in a row after which a revision has to answer canary prompts before it serves
_FATAL = 2  # of those, or of being put in place, that a revision's engine may die of
_CANARY = 60.0  # seconds that a canary prompt may take
_HEALTHY = 60.0  # seconds of life after which the backoff starts anew
_PULSE = 2.0  # seconds between questions to the serving loop
_STALLED = 10.0  # seconds without an answer that are worth saying
_HUNG = 40.0  # seconds without an answer after which the engine is ended, on a machine that is fast enough;
_STEPS = 20.0  # else this many times the longest step of serving
_SLICES = 20  # of that time; one in which the daemon itself stood still is no longer than the others


class Supervisor:
    """`fallback` says which revision to serve when one turns out to be unusable. `model`, where it is given, is the one
    that revisions belong to: no engine starts on another, and one whose files are written to is ended."""

    def __init__(
        self,
        settings: dict[str, Any],
        files: Files,
        activity: Activity,
        *,
        revision: int,
        queue_limit: int,
        fallback: Callable[[RevisionCorrupt, int], Awaitable[int]],
        model: ModelFile | None = None,
    ) -> None:
        self._settings, self._files, self._activity = settings, files, activity
        self._fallback, self._model = fallback, model
        self._loaded: list[Stamp | None] = []  # of the model's files, when the engine loaded them
        self._limit = settings["slots"] + queue_limit
        self._client: EngineClient | None = None
        self._up = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        self._stopping = False
        self._waiting: set[anyio.CancelScope] = set()  # requests that no engine has yet
        self._swapping = asyncio.Lock()
        self._suspects = Suspects()
        self._suspicion: CrashLoop | None = None  # why the revision has to answer canary prompts first
        self._fatal = 0  # engines that died of the revision itself
        self._asked: float | None = None  # when the serving loop was asked something it has not answered
        self.revision = revision
        self.restarts = 0
        self.info: ModelInfo | None = None
        self.problem: str | None = None
        self.degraded: str | None = None  # why the base serves in place of a revision; until another is chosen

    @property
    def ready(self) -> bool:
        return self._up.is_set()

    @property
    def stalled(self) -> str | None:
        """Says so while the serving loop does not turn."""
        seconds = 0.0 if self._asked is None else asyncio.get_running_loop().time() - self._asked
        return f"the engine has not answered for {seconds:.0f} s" if seconds > _STALLED else None

    def set_queue(self, limit: int) -> None:
        """How many requests may wait."""
        self._limit = self._settings["slots"] + limit

    @property
    def pid(self) -> int | None:
        return self._client.pid if self._client else None

    @property
    def requests(self) -> int:
        """How many have come so far."""
        return self._activity.begun

    def suspect(self, times: int, what: str) -> None:
        """The revision has to answer canary prompts before it serves: `what` died `times` times in a row with it."""
        if self.revision:
            self._suspicion = CrashLoop(self.revision, times, what)

    async def start(self) -> None:
        """Starts the engine; raises if that fails with the base model, because then the model or its settings are
        wrong."""
        for failures in itertools.count(1):
            try:
                await self._launch()
                break
            except EngineUnavailable:  # and EngineDied
                if self.revision == 0 or failures >= _CRASH_LOOP:
                    raise
        self._tasks = [asyncio.create_task(work) for work in (self._watch(), self._feel_pulse(), self._watch_model())]

    async def stop(self) -> None:
        self._stopping = True
        self._up.clear()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._client:
            await self._client.stop()

    def give_up(self) -> None:
        """Ends the requests that are still there with an error of their own, as the daemon waits for them no more."""
        self.problem = "agentd is stopping"
        for scope in self._waiting:
            scope.deadline = anyio.current_time()
        if self._client:
            self._client.give_up(EngineUnavailable(self.problem))

    async def call(self, operation: Operation[R, P], on_progress: Callable[[P], None] | None = None) -> R:
        """An operation of the engine that runs now. Raises EngineDied if it dies meanwhile; nothing is retried.

        Background work waits here as long as it is held.
        """
        if operation.waits_for_release:
            await self._activity.released()
        if not self._up.is_set() or self._client is None:
            raise EngineUnavailable(self.problem or "the engine is starting")
        return await self._client.call(operation, on_progress)

    async def alive(self, timeout: float) -> bool:
        """Whether the engine thread answers within `timeout` seconds."""
        try:
            with anyio.fail_after(timeout):
                await self.call(Stats())
        except (AgentdError, TimeoutError):
            return False
        return True

    async def generate(self, request: Generate) -> AsyncGenerator[Piece, None]:
        """Serves a request. If the engine dies before the first piece, the next engine gets it again, once.

        Raises Overloaded, EndsTheEngine, EngineDied and what the engine raises.
        """
        if self._activity.active >= self._limit:
            raise Overloaded(self._activity.active)
        fingerprint = Suspects.fingerprint([self.revision, replace(request, key="")])
        with self._activity.request():
            for retried in (False, True):
                begun = False
                async with self._suspects.turn(fingerprint):
                    client = await self._wait_until_up()
                    pieces = client.generate(request)
                    try:
                        async for piece in pieces:
                            begun = True
                            yield piece
                        self._suspects.served(fingerprint)
                        return
                    except EngineDied:
                        self._died(client, fingerprint)
                        if begun or retried:
                            raise
                    finally:
                        await pieces.aclose()

    async def classify(self, input: dict[str, Any]) -> Classification:
        """Has a classifier answer. If the engine dies meanwhile, the next engine gets the input again, once."""
        if self._activity.active >= self._limit:
            raise Overloaded(self._activity.active)
        with self._activity.request():
            return await self._answered(input, lambda client: client.classify(input))

    async def embed(self, key: str, inputs: Sequence[dict[str, Any]]) -> list[Piece]:
        """The embeddings of texts or tokens, one after the other, so that others get their turn in between."""
        if self._activity.active >= self._limit:
            raise Overloaded(self._activity.active)
        with self._activity.request():
            return [
                await self._answered(input, lambda client, i=i, input=input: client.embed(f"{key}-{i}", input))  # type: ignore[misc]
                for i, input in enumerate(inputs)
            ]

    async def _answered(self, input: dict[str, Any], ask: Callable[[EngineClient], Awaitable[T]]) -> T:
        """What the engine answers at once. If it dies meanwhile, the next engine is asked again, once."""
        fingerprint = Suspects.fingerprint([self.revision, input])
        for retried in (False, True):
            async with self._suspects.turn(fingerprint):
                client = await self._wait_until_up()
                try:
                    answer = await ask(client)
                    self._suspects.served(fingerprint)
                    return answer
                except EngineDied:
                    self._died(client, fingerprint)
                    if retried:
                        raise
        raise AssertionError("unreachable")

    def _died(self, client: EngineClient, fingerprint: str) -> None:
        if self._stopping:
            return
        self._suspects.died(fingerprint, client.pid)
        if self._client is client:  # a slow reader may hear of it when the next one is long up
            self._up.clear()

    async def stage(self, weights: str, adapter: Path | None, control: Path | None) -> None:
        """Loads adapters that are no revision yet, under a name of their own."""
        await self.call(Stage(weights, adapter, control))

    async def swap(self, revision: int, patience: float = 0.0) -> float:
        """Stages a revision's files and lets every new request be answered by it, at first for `patience` seconds
        computing what prompts often begin with, while no one is served. Returns the swap's milliseconds."""
        async with self._swapping:
            milliseconds = await self._swap(revision, patience)
            self.degraded = None
            return milliseconds

    async def forget_prefixes(self, before: float | None = None) -> None:
        """Drops what is kept of prompts, all of it or what is older than this (seconds since the epoch); where no
        engine answers, all files."""
        folder = (self._settings.get("prefixes") or {}).get("folder")
        if folder is None:
            return
        try:
            await self.call(ForgetPrefixes(before))
        except AgentdError:
            await asyncio.to_thread(_empty, Path(folder))

    async def _swap(self, revision: int, patience: float = 0.0) -> float:
        previous = self.revision
        await self._stage(revision)
        if patience and self._settings.get("prefixes"):
            with anyio.move_on_after(patience):
                await self._command(Warm(str(revision)))
        faults.point("swap staged")
        seconds = await self._command(Swap(str(revision)))
        self.revision = revision
        faults.point("swap done")
        if previous not in (0, revision):
            with contextlib.suppress(AgentdError):
                await self._command(Unstage(str(previous)))
        return 1e3 * seconds

    async def _stage(self, revision: int) -> None:
        if revision:
            adapter, control = await asyncio.to_thread(self._files, revision)
            await self._command(Stage(str(revision), adapter, control))

    async def _command(self, operation: Operation[R, Any]) -> R:
        if self._client is None:
            raise EngineUnavailable(self.problem or "the engine is starting")
        return await self._client.call(operation)

    async def _wait_until_up(self) -> EngineClient:
        if not self._up.is_set():
            try:
                with anyio.fail_after(60) as scope:
                    self._waiting.add(scope)
                    await self._up.wait()
            except TimeoutError:
                raise EngineUnavailable(self.problem or "the engine is starting") from None
            finally:
                self._waiting.discard(scope)
        assert self._client is not None
        return self._client

    async def _launch(self) -> None:
        if self._model:
            self._loaded = self._model.stamps()
            await asyncio.to_thread(self._model.verify)
        client = EngineClient(self._settings)
        try:
            self.info = await client.start()
            if self._model:  # it may have changed while it was loaded
                await asyncio.to_thread(self._model.verify)
            self._client = client
            try:
                await self._restore()
                if self._suspicion:
                    await self._ask_canaries(client)
            except EngineDied:
                if self.revision:
                    await self._blame(self._suspicion or CrashLoop(self.revision, self._fatal + 1, "engine"))
                raise
        except BaseException:
            await client.stop()
            raise
        self._suspicion, self._fatal, self.problem = None, 0, None
        self._up.set()

    async def _ask_canaries(self, client: EngineClient) -> None:
        """Raises EngineDied where the revision kills the engine; any answer clears it."""
        for prompt in canaries.PROMPTS:
            try:
                with anyio.fail_after(_CANARY):
                    await canaries.ask(client, self.info, prompt)
            except TimeoutError:
                raise EngineDied(f"no answer to a canary prompt in {_CANARY:.0f} s") from None
            except EngineDied:
                raise
            except (AgentdError, ArithmeticError) as error:
                logger.warning("a canary prompt: %s", error)

    async def _blame(self, error: CrashLoop) -> None:
        """The engine died of the revision itself, with no request there; once more, and it is left for the base."""
        self._fatal += 1
        if self._fatal < _FATAL:
            return
        async with self._swapping:
            self.revision = await self._fallback(error, self.revision)
            self.degraded, self._suspicion, self._fatal = str(error), None, 0

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
            if failures >= _CRASH_LOOP:
                self.suspect(failures, "engine")
            while not self._up.is_set():
                await asyncio.sleep(_BACKOFF[min(failures, len(_BACKOFF) - 1)])
                try:
                    await self._launch()
                except Exception as error:  # any: without this loop nothing would be served again
                    self.problem = str(error) or type(error).__name__
                    logger.error(
                        "the engine does not start: %s", self.problem, exc_info=not isinstance(error, AgentdError)
                    )
                    failures += 1

    async def _feel_pulse(self) -> None:
        """Asks the serving loop whether it turns, and ends an engine in which it does not."""
        loop, limit = asyncio.get_running_loop(), _HUNG
        while True:
            await asyncio.sleep(_PULSE)
            client = await self._when_up()
            self._asked = loop.time()
            try:
                stats = await _within(limit, client.call(Stats()))
                limit = max(_HUNG, _STEPS * stats["longest_step"])
            except TimeoutError:
                logger.error("%s; it is ended", self.stalled)
                client.kill()
                await client.dead.wait()
            except AgentdError:
                pass  # it died; _watch starts the next one
            finally:
                self._asked = None

    async def _watch_model(self) -> None:
        """Ends an engine whose model is written to: what it maps is no longer what its answers are said to be of."""
        while self._model:
            await asyncio.sleep(_PULSE)
            client = await self._when_up()
            if await asyncio.to_thread(self._model.written_since, self._loaded):
                logger.error("the model's file was written to; the engine is ended")
                client.kill()
                await client.dead.wait()

    async def _when_up(self) -> EngineClient:
        await self._up.wait()
        assert self._client is not None
        return self._client


async def _within(seconds: float, work: Coroutine[Any, Any, T]) -> T:
    """What `work` returns in that time, of which none counts in which this process itself stood still: it was frozen,
    or had something else to do. Raises TimeoutError."""
    task = asyncio.create_task(work)
    try:
        for _ in range(_SLICES):
            await asyncio.wait({task}, timeout=seconds / _SLICES)
            if task.done():
                return task.result()
        raise TimeoutError
    finally:
        task.cancel()


def _empty(folder: Path) -> None:
    for path in folder.glob("*"):
        path.unlink(missing_ok=True)
