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
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from agentd import allocator, code_pages, logs
from agentd.engine import wire
from agentd.engine.protocol import Classifier, Engine, Generate, Piece, Replaying
from agentd.engine.session import Session
from agentd.errors import AgentdError, NotAClassifier, NotSupported

logger = logging.getLogger(__name__)

URGENT = {"generate", "classify", "cancel", "stage", "unstage", "swap", "abandon", "stop"}
SOON = {"ping", "stats"}  # answered between forward passes: who only looks must not hold up the work
_REQUESTS = {"generate", "classify", "cancel"}  # nothing that background work computes with changes by them
_KEPT = {"stage", "replay", "collect"}  # work that is no session's: it goes on when one is abandoned
_LATER = object()  # the result of a command that became background work


class Runner:
    """`load` makes the engine; meanwhile the daemon's end is noticed already."""

    _engine: Engine

    def __init__(self, load: Callable[[], Engine], channel: socket.socket) -> None:
        self._load, self._channel = load, channel
        # Appended to by the reader thread, taken from by the engine thread: deques allow that without a lock.
        self._urgent: deque[dict[str, Any]] = deque()
        self._soon: deque[dict[str, Any]] = deque()
        self._later: deque[dict[str, Any]] = deque()
        self._wake = threading.Event()
        self._session: Any = None  # a Session, or a classifier's own
        self._running: tuple[dict[str, Any], Iterator[Any]] | None = None
        self._stopping = False

    def run(self) -> int:
        """Works until told to stop. Returns the process's exit status."""
        threading.Thread(target=self._read, daemon=True).start()
        try:
            self._engine = self._load()
        except Exception as error:
            self._fail({"id": 0, "op": "load"}, error)
            return 1
        self._send({"id": 0, "result": self._engine.info.as_json()})
        code_pages.forget()
        while not self._stopping:
            self._wake.clear()
            while self._urgent:
                self._answer(self._urgent.popleft())
            self._attend()
            if self._engine.busy:
                continue
            if self._running or self._later:
                self._work()
            else:
                self._wake.wait()
        self._close_session()
        self._engine.close()
        return 0

    def interrupted(self) -> bool:
        """Whether background work has to give way."""
        return bool(self._urgent)

    def serve(self) -> bool:
        """Answers requests in the middle of background work until nobody waits. False, perhaps with some on their way,
        when a command comes that wants the work to be given up first."""
        while self._urgent or self._engine.busy:
            while self._urgent:
                if self._urgent[0]["op"] not in _REQUESTS:
                    return False
                self._answer(self._urgent.popleft())
            self._attend()
        return True

    def _attend(self) -> None:
        """Answers who only looks, and takes a step for those who wait for tokens."""
        while self._soon:
            self._answer(self._soon.popleft())
        if self._engine.busy:
            self._send_pieces(self._engine.step())

    # --- commands

    def _read(self) -> None:
        try:
            with self._channel.makefile("rb") as lines:
                for line in lines:
                    command = json.loads(line)
                    op = command["op"]
                    (self._urgent if op in URGENT else self._soon if op in SOON else self._later).append(command)
                    self._wake.set()
        except Exception:
            logger.exception("the daemon's channel broke")
        os._exit(0)  # the daemon is gone; nothing here is worth finishing

    def _answer(self, command: dict[str, Any]) -> None:
        try:
            handler: Callable[[dict[str, Any]], Any] = getattr(self, "_on_" + command["op"])
            result = handler(command)
        except Exception as error:
            self._fail(command, error)
        else:
            if result is not _LATER:
                self._send({"id": command["id"], "result": result})

    def _on_generate(self, command: dict[str, Any]) -> None:
        self._engine.submit(Generate.from_json(command["request"]))

    def _on_classify(self, command: dict[str, Any]) -> dict[str, Any]:
        if not isinstance(self._engine, Classifier):
            raise NotAClassifier(self._engine.info.name)
        return self._engine.classify(command["input"]).as_json()

    def _on_cancel(self, command: dict[str, Any]) -> None:
        self._engine.cancel(command["key"])

    def _on_ping(self, command: dict[str, Any]) -> dict[str, Any]:
        return self._engine.stats()

    _on_stats = _on_ping

    def _on_stage(self, command: dict[str, Any]) -> object:
        if isinstance(self._engine, Replaying):  # which takes long, so requests come in between
            self._later.append(command)
            return _LATER
        self._engine.stage(command["weights"], *_files(command))
        return None

    def _on_unstage(self, command: dict[str, Any]) -> None:
        self._engine.unstage(command["weights"])

    def _on_swap(self, command: dict[str, Any]) -> float:
        return self._engine.swap(command["weights"])

    def _on_abandon(self, command: dict[str, Any]) -> None:
        """Drops the background session with everything that waits for it."""
        dropped = [command for command in self._later if command["op"] not in _KEPT]
        kept = [command for command in self._later if command["op"] in _KEPT]
        if self._running and self._running[0]["op"] not in _KEPT:
            dropped.insert(0, self._running[0])
            self._running = None
        self._close_session()
        self._later.clear()
        self._later.extend(kept)
        for other in dropped:
            self._fail(other, AgentdError("the background session was abandoned"))

    def _on_stop(self, command: dict[str, Any]) -> None:
        self._stopping = True

    # --- background

    def _work(self) -> None:
        """Advances the running background command by one step."""
        if self._running is None:
            command = self._later.popleft()
            try:
                self._running = command, self._begin(command)
            except Exception as error:
                self._fail(command, error)
                return
        command, steps = self._running
        try:
            progress = next(steps)
            if progress is not None:
                self._send({"id": command["id"], "progress": progress})
        except StopIteration as stop:
            self._running = None
            self._send({"id": command["id"], "result": stop.value})
        except Exception as error:
            self._running = None
            self._fail(command, error)

    def _begin(self, command: dict[str, Any]) -> Iterator[Any]:
        if command["op"] in _KEPT:
            if not isinstance(self._engine, Replaying):
                raise NotSupported("this engine replays no ledgers")
            if command["op"] == "replay":
                return self._engine.replaying(Path(command["ledger"]))
            if command["op"] == "collect":
                return self._engine.collecting(Path(command["ledger"]), Path(command["target"]), command["kind"])
            return self._engine.staging(command["weights"], *_files(command))
        if command["op"] == "open":
            self._close_session()
            if isinstance(self._engine, Classifier):
                self._session = self._engine.session(self.interrupted)
            else:
                self._session = Session(self._engine.background(self.interrupted, self.serve))
            return iter(())
        if self._session is None:
            raise AgentdError(f"{command['op']}: no background session is open")
        if command["op"] == "close":
            self._close_session()
            return iter(())
        arguments = {key: value for key, value in command.items() if key not in ("id", "op")}
        steps: Iterator[Any] = getattr(self._session, command["op"])(**arguments)
        return steps

    def _close_session(self) -> None:
        if self._session:
            self._session.close()
            self._session = None

    # --- answers

    def _send_pieces(self, pieces: list[Piece]) -> None:
        if pieces:
            self._send({"pieces": [piece.as_json() for piece in pieces]})

    def _fail(self, command: dict[str, Any], error: Exception) -> None:
        if not isinstance(error, AgentdError):
            logger.exception("%s failed", command["op"])
        self._send({"id": command["id"], "error": wire.describe(error)})

    def _send(self, message: dict[str, Any]) -> None:
        try:
            self._channel.sendall(wire.pack(message))
        except OSError:
            os._exit(0)  # the daemon is gone


def _files(command: dict[str, Any]) -> tuple[Path | None, Path | None]:
    adapter, control = (Path(path) if path else None for path in (command["adapter"], command["control"]))
    return adapter, control


def main() -> int:
    """`python -m agentd.engine.runner FD SETTINGS`: talks over the inherited descriptor FD."""
    logs.configure(default="WARNING", prefix="engine: ")
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the daemon decides what follows
    channel = socket.socket(fileno=int(sys.argv[1]))
    settings = json.loads(sys.argv[2])
    return Runner(lambda: make_engine(settings), channel).run()


def make_engine(settings: dict[str, Any]) -> Engine:
    """The engine that the settings name: {"engine", "path", "context", "slots", "threads", "gpu_layers"}, and for
    transformers {"folder", "key", "revisions", "dtype"} besides (engine/transformers/engine.py)."""
    if settings["engine"] == "int8":
        from agentd.engine.int8.engine import Int8Engine

        return Int8Engine(Path(settings["path"]), threads=settings["threads"])
    if settings["engine"] == "transformers":
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
    )


if __name__ == "__main__":
    sys.exit(main())
