"""The engine process: one thread owns the engine, serving always goes first, background work fills the rest.

A reader thread takes commands from the daemon. Urgent ones interrupt background work: an engine that can answers
requests in the middle of it, others give a forward pass up and repeat it. Everything else waits its turn. When the
daemon goes away, so does this process.
"""

import json
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agentd import logs
from agentd.engine.operations import (
    Abandon,
    Cancel,
    Classify,
    Collect,
    Embed,
    ForgetPrefixes,
    Lane,
    Open,
    Operation,
    R,
    Refusals,
    Replay,
    ServingOperation,
    Stage,
    Stats,
    Submit,
    Swap,
    Unstage,
    Warm,
    WeightsOperation,
)
from agentd.engine.process import wire
from agentd.engine.protocol import Classifier, Embedder, Engine, Keeping, Piece, Prompting, Replaying
from agentd.engine.session import OperationSession, Steps
from agentd.errors import AgentdError, NotAClassifier, NotALanguageModel, NotSupported
from agentd.host import allocator, page_cache

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Command:
    """An operation that the daemon waits for under a number."""

    number: int
    operation: Operation[Any, Any]

    @property
    def outlives_session(self) -> bool:
        return isinstance(self.operation, WeightsOperation)


class Runner:
    """`load` makes the engine; meanwhile the daemon's end is noticed already."""

    _engine: Engine

    def __init__(self, load: Callable[[], Engine], channel: socket.socket) -> None:
        self._load, self._channel = load, channel
        # Appended to by the reader thread, taken from by the engine thread: deques allow that without a lock.
        self._urgent: deque[Command] = deque()
        self._soon: deque[Command] = deque()
        self._later: deque[Command] = deque()
        self._lanes = {Lane.URGENT: self._urgent, Lane.SOON: self._soon, Lane.LATER: self._later}
        self._wake = threading.Event()
        self._cancelled: set[str] = set()  # requests that wait in a lane still
        self._longest_step = 0.0  # seconds
        self._session: OperationSession | None = None
        self._running: tuple[Command, Steps[Any, Any]] | None = None
        self._handlers: dict[type[Operation[Any, Any]], Callable[[Any], Any]] = {}
        self._on(Submit, self._submit)
        self._on(Embed, self._embed)
        self._on(Cancel, self._cancel)
        self._on(Classify, lambda op: self._classifier().classify(op.input))
        self._on(Refusals, lambda op: [self._refusal(each) for each in op.inputs])
        self._on(Stats, lambda op: {**self._engine.stats(), "longest_step": self._longest_step})
        self._on(Stage, lambda op: self._engine.stage(op.weights, op.adapter, op.control))
        self._on(Unstage, lambda op: self._engine.unstage(op.weights))
        self._on(Swap, lambda op: self._engine.swap(op.weights))
        self._on(ForgetPrefixes, lambda op: self._keeping().forget(op.before))
        self._on(Abandon, lambda op: self._abandon())

    def _on(self, operation: type[Operation[R, Any]], handler: Callable[[Any], R]) -> None:
        self._handlers[operation] = handler

    def run(self) -> int:
        """Works until the daemon goes. Returns the process's exit status where the engine cannot be made."""
        threading.Thread(target=self._read, daemon=True).start()
        try:
            self._engine = self._load()
        except Exception as error:
            self._fail(0, "loading", error)
            return 1
        self._send({"id": 0, "result": self._engine.info})
        if isinstance(self._engine, Prompting):
            self._engine.prepare()
        page_cache.forget()
        allocator.settle()
        keeping = self._engine if isinstance(self._engine, Keeping) else None
        while True:
            self._wake.clear()
            while self._urgent:
                self._answer(self._urgent.popleft())
            self._attend()
            if self._engine.busy or (keeping is not None and keeping.tend()):
                continue
            if self._running or self._later:
                self._work()
            else:
                self._wake.wait()

    def interrupted(self) -> bool:
        """Whether background work has to give way. It asks often, so who only looks is answered here, too."""
        while self._soon:
            self._answer(self._soon.popleft())
        return bool(self._urgent)

    def serve(self) -> bool:
        """Answers requests in the middle of background work until no one waits. False, perhaps with some on their way,
        when a command comes that wants the work to be given up first."""
        while self._urgent or self._engine.busy:
            while self._urgent:
                if not isinstance(self._urgent[0].operation, ServingOperation):
                    return False
                self._answer(self._urgent.popleft())
            self._attend()
        return True

    def _attend(self) -> None:
        """Answers who only looks, and takes a step for those who wait for tokens."""
        while self._soon:
            self._answer(self._soon.popleft())
        if self._engine.busy:
            started = time.monotonic()
            self._send_pieces(self._engine.step())
            self._longest_step = max(self._longest_step, time.monotonic() - started)

    # --- commands

    def _read(self) -> None:
        try:
            with self._channel.makefile("rb") as lines:
                for line in lines:
                    message = json.loads(line)
                    command = Command(message["id"], wire.operation(message))
                    if isinstance(command.operation, Cancel):
                        self._cancelled.add(command.operation.key)  # it may not even have been looked at
                    self._lanes[command.operation.lane].append(command)
                    self._wake.set()
        except Exception:
            logger.exception("the daemon's channel broke")
        os._exit(0)  # the daemon is gone; nothing here is worth finishing

    def _answer(self, command: Command) -> None:
        operation = command.operation
        if isinstance(operation, Stage) and isinstance(self._engine, Replaying):
            self._later.append(command)  # it takes long, so requests come in between
            return
        try:
            result = self._handlers[type(operation)](operation)
        except Exception as error:
            self._fail(command.number, type(operation).__name__, error)
        else:
            self._send({"id": command.number, "result": result})

    def _submit(self, op: Submit) -> None:
        if op.request.key in self._cancelled:
            raise AgentdError("the request was cancelled")
        self._engine.submit(op.request)

    def _embed(self, op: Embed) -> None:
        if op.key in self._cancelled:
            raise AgentdError("the request was cancelled")
        if not isinstance(self._engine, Embedder):
            raise NotALanguageModel(self._engine.info.name)
        self._engine.embed(op.key, op.input)

    def _cancel(self, op: Cancel) -> None:
        self._cancelled.discard(op.key)
        self._engine.cancel(op.key)

    def _abandon(self) -> None:
        """Drops the background session with everything that waits for it."""
        dropped = [command for command in self._later if not command.outlives_session]
        rest = [command for command in self._later if command.outlives_session]
        if self._running and not self._running[0].outlives_session:
            dropped.insert(0, self._running[0])
            self._running = None
        self._close_session()
        self._later.clear()
        self._later.extend(rest)
        for other in dropped:
            error = AgentdError("the background session was abandoned")
            self._fail(other.number, type(other.operation).__name__, error)

    # --- background

    def _work(self) -> None:
        """Advances the running background command by one step."""
        if self._running is None:
            command = self._later.popleft()
            try:
                self._running = command, self._begin(command.operation)
            except Exception as error:
                self._fail(command.number, type(command.operation).__name__, error)
                return
        command, steps = self._running
        try:
            progress = next(steps)
            if progress is not None:
                self._send({"id": command.number, "progress": progress})
        except StopIteration as stop:
            self._running = None
            self._send({"id": command.number, "result": stop.value})
        except Exception as error:
            self._running = None
            self._fail(command.number, type(command.operation).__name__, error)

    def _begin(self, operation: Operation[Any, Any]) -> Steps[Any, Any]:
        match operation:
            case Stage(weights, adapter, control):
                return self._replaying().staging(weights, adapter, control)
            case Warm(weights):
                return self._keeping().warming(weights, self.interrupted)
            case Replay(ledger):
                return self._replaying().replaying(ledger)
            case Collect(ledger, target, kind):
                return self._replaying().collecting(ledger, target, kind)
            case Open():
                return self._open()
        if self._session is None:
            raise AgentdError(f"{type(operation).__name__}: no background session is open")
        return self._session.begin(operation)

    def _open(self) -> Generator[None, None, None]:
        self._close_session()
        self._session = self._engine.session(self.interrupted, self.serve)
        yield

    def _replaying(self) -> Replaying:
        if not isinstance(self._engine, Replaying):
            raise NotSupported("this engine replays no ledgers")
        return self._engine

    def _keeping(self) -> Keeping:
        if not isinstance(self._engine, Keeping):
            raise NotALanguageModel(self._engine.info.name)
        return self._engine

    def _classifier(self) -> Classifier:
        if not isinstance(self._engine, Classifier):
            raise NotAClassifier(self._engine.info.name)
        return self._engine

    def _refusal(self, input: dict[str, Any]) -> str | None:
        return self._engine.refusal(input) if isinstance(self._engine, Prompting) else None

    def _close_session(self) -> None:
        if self._session:
            self._session.close()
            self._session = None

    # --- answers

    def _send_pieces(self, pieces: list[Piece]) -> None:
        if pieces:
            self._write(wire.pieces(pieces))

    def _fail(self, number: int, what: str, error: Exception) -> None:
        if not isinstance(error, AgentdError):
            logger.exception("%s failed", what)
        self._send({"id": number, "error": wire.describe(error)})

    def _send(self, message: dict[str, Any]) -> None:
        self._write(wire.pack(message))

    def _write(self, message: bytes) -> None:
        try:
            self._channel.sendall(message)
        except OSError:
            os._exit(0)  # the daemon is gone


def main() -> int:
    """`python -m agentd.engine.process.runner FD SETTINGS`: talks over the inherited descriptor FD."""
    logs.configure(default="WARNING", prefix="engine: ")
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the daemon decides what follows
    channel = socket.socket(fileno=int(sys.argv[1]))
    settings = json.loads(sys.argv[2])
    return Runner(lambda: make_engine(settings), channel).run()


_MODULE = "agentd.engine.process.runner"


def make_engine(settings: dict[str, Any]) -> Engine:
    """The engine that the settings name: {"engine", "path", "context", "slots", "threads", "gpu_layers"}, for those of
    language models "prefixes" (engine/slot_prefixes.py), and for transformers {"folder", "key", "revisions", "dtype"}
    besides (engine/transformers/engine.py)."""
    if settings["engine"] == "int8":
        with allocator.importing():
            from agentd.engine.int8.engine import Int8Engine

        return Int8Engine(Path(settings["path"]), threads=settings["threads"])
    if settings["engine"] == "transformers":
        from agentd.nn.import_stubs import import_lean

        with allocator.importing():
            import_lean(_MODULE, meta_device=True)
            from agentd.engine.transformers.engine import TransformersEngine

        return TransformersEngine(
            Path(settings["path"]),
            folder=Path(settings["folder"]),
            key=settings["key"],
            revisions=Path(settings["revisions"]),
            context=settings["context"],
            slots=settings["slots"],
            threads=settings["threads"],
            dtype=settings["dtype"],
            prefixes=settings.get("prefixes"),
        )
    if settings["engine"] != "llamacpp":
        raise AgentdError(f"there is no engine {settings['engine']!r}")
    from agentd.engine.llamacpp.engine import LlamaCppEngine

    allocator.few_arenas()
    allocator.large_apart()
    return LlamaCppEngine(
        Path(settings["path"]),
        context=settings["context"],
        slots=settings["slots"],
        threads=settings["threads"],
        gpu_layers=settings["gpu_layers"],
        prefixes=settings.get("prefixes"),
    )


if __name__ == "__main__":
    sys.exit(main())
