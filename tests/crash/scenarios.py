"""What a daemon lives through while it is killed or its disk fails, and what must be true after the next start.

Everything is the daemon's own: its wiring, store, controller, files, supervisor, and llama.cpp in an engine process, on
a tiny model. Three things differ, all for speed: the engine process is forked instead of executed, the trainer fails at
once, or writes where it is and waits first (what it does alone is nothing to the state), and drift is measured on two
texts.
"""

import asyncio
import contextlib
import gc
import importlib
import json
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

from sqlite_utils import Database

from agentd import daemon
from agentd.adapt import rebuild
from agentd.adapt.gate.drift_corpus import drift_corpus
from agentd.adapt.passes import base as passes_base
from agentd.adapt.passes import parked
from agentd.adapt.passes.trainer_process import Training
from agentd.adapt.planning import engine_sample
from agentd.api.services import Services
from agentd.config import schema as configuration
from agentd.config.schema import Config
from agentd.engine.process import client as engine_client
from agentd.engine.process import runner
from agentd.engine.protocol import Generate, Sampling
from agentd.errors import AgentdError, TrainerFailed
from agentd.formats import training_state
from agentd.host import systemd
from agentd.store import examples, feedback, imports, inferences, meanings, passes, revisions, tasks, trials
from agentd.store.examples import NewExample
from agentd.store.feedback import NewFeedback
from agentd.store.forgetting import Selection
from agentd.store.inferences import Inference
from agentd.store.recovery import known_directories

PARKS = 2  # blocks with which the trainer writes where it is and waits; it fails when it is to go on from there

Acknowledge = Callable[[str], None]
Scenario = Callable[[Services, Acknowledge], Awaitable[None]]


def settings(model: Path, directory: Path, **adapt: Any) -> Config:
    """A daemon with its state in `directory`/state, whose passes are short and easily satisfied."""
    path = directory / "agentd.json"
    tree: dict[str, Any] = {
        "model": {"path": str(model), "context": 512, "threads": 1},
        "serve": {"socket": str(directory / "api.sock"), "slots": 1},
        "state": {"dir": str(directory / "state")},
        "memory": {"reserve": 0, "floor": 0},
        "adapt": {
            "enabled": False,
            "gate": {"alpha": 0.4, "min_holdout": 3, "max_drift": 100, "max_skill_loss": 1, **adapt.get("gate", {})},
            "trial": {"duration": adapt.get("trial", 0)},
        },
        "tasks": {"mood": {"choices": ["yes", "no"]}},
    }
    path.write_text(json.dumps(tree))
    return configuration.load(path, {})


@contextlib.asynccontextmanager
async def running(config: Config) -> AsyncIterator[Services]:
    """The daemon as `agentd.daemon.run` has it, without its HTTP servers."""
    async with AsyncExitStack() as stack:
        with daemon.locked(config.state.dir):
            services = await daemon.build(config, stack, systemd.Notifier({}))
            await daemon.bring_up(services, stack)
            yield services


# --- what happens


async def learn(s: Services, acknowledge: Acknowledge) -> None:
    """A pass that is refused; feedback, a pass that is committed, and a rollback."""
    await adapt(s, method="mezo")  # there is nothing to learn from yet
    await s.store.call(imports.add_many, [_example(number) for number in range(40)])
    for number in range(3):
        acknowledge(await give(s, f"a question {number}"))
    await adapt(s, method="mezo", zo_steps=2)
    acknowledge(await give(s, "a question after the pass"))
    if s.supervisor.revision:
        await s.adaptation.rollback(0, "for a change")


async def learn_again(s: Services, acknowledge: Acknowledge) -> None:
    """One more pass; what becomes of it is up to the settings."""
    acknowledge(await give(s, "before"))
    await adapt(s, method="mezo", zo_steps=2)
    acknowledge(await give(s, "after"))


async def take_back(s: Services, acknowledge: Acknowledge) -> None:
    """A pass whose trial is stopped by its owner."""
    await s.adaptation.start("manual", {"method": "mezo", "zo_steps": 2})
    while not ended(s) and (s.adaptation.progress_json() or {})["phase"] != "trial":
        await asyncio.sleep(0.005)
    await s.adaptation.stop("taken back")
    acknowledge(await give(s, "after"))


async def stop_in_a_trial(s: Services, acknowledge: Acknowledge) -> None:
    """A pass whose trial the daemon's own end interrupts; it goes on after the next start."""
    await s.adaptation.start("manual", {"method": "mezo", "zo_steps": 2})
    while not ended(s) and (s.adaptation.progress_json() or {})["phase"] != "trial":
        await asyncio.sleep(0.005)
    acknowledge(await give(s, "in the trial"))


async def tap(s: Services, acknowledge: Acknowledge) -> None:
    """A pass with backpropagation, whose trainer dies."""
    await adapt(s, method="suffix-bp", blocks=1, zo_steps=0)
    acknowledge(await give(s, "after"))


async def resume(s: Services, acknowledge: Acknowledge) -> None:
    """A start in the middle of a trial, or of a pass."""
    while not ended(s):
        await asyncio.sleep(0.01)
    acknowledge(await give(s, "after"))


async def stop_in_training(s: Services, acknowledge: Acknowledge) -> None:
    """A pass whose training the daemon's own end interrupts; it goes on after the next start."""
    await s.adaptation.start("manual", {"method": "suffix-bp", "blocks": PARKS, "zo_steps": 0})
    while not ended(s) and not list((s.config.state.dir / "passes").glob(f"*/{parked.STATE}")):
        await asyncio.sleep(0.005)
    acknowledge(await give(s, "in training"))


async def forget_and_rebuild(s: Services, acknowledge: Acknowledge) -> None:
    rows = await s.store.call(examples.list_, 1, 0, "mood", "train", "used")
    options = {"method": "mezo", "zo_steps": 2}
    await rebuild.rebuild(s.store, s.adaptation, Selection(examples=(rows[0].id,)), options)
    while not ended(s):
        await asyncio.sleep(0.01)
    mood = await s.store.call(tasks.get, "mood")
    mood, _ = await s.store.call(meanings.change, mood, mood.choices, "2999-01-01")
    await s.store.call(meanings.take_back, mood)
    acknowledge(await give(s, "after"))


SCENARIOS: dict[str, Scenario] = {
    "first start and pass": learn,
    "rejected": learn_again,
    "taken back": take_back,
    "stopped in a trial": stop_in_a_trial,
    "trainer dies": tap,
    "start in a trial": resume,
    "rebuilt": forget_and_rebuild,
    "stopped in training": stop_in_training,
    "start with a parked pass": resume,
}
# scenario -> (settings of adapt, the state it starts from)
GIVEN: dict[str, tuple[dict[str, Any], str]] = {
    "first start and pass": ({}, "nothing"),
    "rejected": ({"gate": {"alpha": 1e-9}}, "one revision"),
    "taken back": ({"trial": 3600}, "one revision"),
    "stopped in a trial": ({"trial": 3600}, "one revision"),
    "trainer dies": ({}, "one revision"),
    "start in a trial": ({}, "a trial"),
    "rebuilt": ({}, "one revision serves"),
    "stopped in training": ({}, "one revision"),
    "start with a parked pass": ({}, "a parked pass"),
}


def ended(s: Services) -> bool:
    """Whether no pass runs; what one failed with, other than by a record of it, is raised."""
    task = s.adaptation._task
    if task is not None and task.done() and not task.cancelled() and (error := task.exception()) is not None:
        raise error
    return task is None or task.done()


async def adapt(s: Services, **options: Any) -> None:
    await s.adaptation.start("manual", options)
    while not ended(s):
        await asyncio.sleep(0.005)


async def give(s: Services, text: str) -> str:
    """Feedback on a recorded answer; returns its id once it is stored."""

    def add(db: Database) -> str:
        id = f"{text} {inferences.latest(db, 1)}"[:60] + os.urandom(4).hex()
        inference = Inference(
            id, "", s.supervisor.revision, "chat", "mood", _input(text), "no", {}, "stop", 1, 1, 1.0, 1.0
        )
        inferences.record(db, inference)
        return feedback.add(db, NewFeedback(id, "label", "yes", author="uid:1"))[0].id

    return await s.store.call(add)


def _example(number: int) -> NewExample:
    return NewExample("mood", "label", _input(f"text {number}"), "no" if number % 8 == 7 else "yes")


def _input(text: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": text}]}


# --- what must be true afterwards


async def check(config: Config, acknowledged: list[str]) -> None:
    """Starts a daemon on what is left and fails with AssertionError if anything is not as promised."""
    trial = config.adapt.trial.model_copy(update={"duration": 0.0})
    config = config.model_copy(update={"adapt": config.adapt.model_copy(update={"trial": trial})})
    async with running(config) as s:
        while not ended(s):
            await asyncio.sleep(0.005)
        await s.store.call(_rows, acknowledged)
        serving = await s.store.call(revisions.committed)
        assert s.supervisor.revision == serving, f"revision {s.supervisor.revision} serves, {serving} should"
        assert (await s.store.call(revisions.get, serving)).state in ("base", "committed")
        request = Generate("check", _input("Hello"), Sampling(temperature=0), max_tokens=2)
        answered = {piece.revision async for piece in s.supervisor.generate(request)}
        assert answered == {serving}, f"answers come from {answered}"
        s.adaptation.files.verified(serving)
        await _files(s, config)
        await give(s, "the next one")  # it works again
    names = {path.name for path in config.state.dir.iterdir()}
    reserves = {"reserve-feedback", "reserve-deleting"}
    assert names - reserves <= {"agentd.db", "lock", "starts", "revisions", "passes"}, names
    for path in config.state.dir.rglob("*"):
        assert path.stat().st_mode & 0o077 == 0, f"{path} is open to others"


def _rows(db: Database, acknowledged: list[str]) -> None:
    assert db.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    assert db.execute("PRAGMA foreign_key_check").fetchall() == []
    stored = {row.id for row in feedback.list_(db, 10_000)}
    assert set(acknowledged) <= stored, "acknowledged feedback is lost"
    assert passes.unfinished(db) == []
    assert trials.running(db) is None
    states = {row.id: row.state for row in revisions.all(db)}
    assert not {"staged", "trial"} & set(states.values()), states
    for row in passes.latest(db, 1000):
        if row.state in ("committed", "rolled_back") and states[row.revision or 0] != "discarded":
            assert states[row.revision or 0] == row.state, (row.id, row.state, states)


async def _files(s: Services, config: Config) -> None:
    known = await s.store.call(known_directories)
    folders = {path.name for path in (config.state.dir / "revisions").iterdir()}
    assert folders == {str(number) for number in known}, f"files {folders}, rows {known}"
    for number in known:
        s.adaptation.files.verified(number)


# --- an engine that starts at once


class ForkedEngine:
    """What the client sees of an engine process (asyncio.subprocess.Process), for one that was forked."""

    def __init__(self, pid: int) -> None:
        self.pid, self.returncode = pid, None
        self._waiting: asyncio.Future[int] | None = None

    async def wait(self) -> int:
        if self._waiting is None:
            self._waiting = asyncio.get_running_loop().run_in_executor(None, self._wait)
        return await asyncio.shield(self._waiting)

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)

    def _wait(self) -> int:
        _, status = os.waitpid(self.pid, 0)
        self.returncode = os.waitstatus_to_exitcode(status)  # type: ignore[assignment]  # None until then
        return os.waitstatus_to_exitcode(status)


async def _fork_engine(*command: str, pass_fds: list[int], **_: Any) -> ForkedEngine:
    assert command[1:3] == ("-m", "agentd.engine.process.runner"), command
    pid = os.fork()
    if pid:
        return ForkedEngine(pid)
    status = 1
    try:
        descriptor = os.dup2(pass_fds[0], 3)
        os.closerange(4, 4096)  # the daemon's end of the channel among them, or its death would go unnoticed
        signal.set_wakeup_fd(-1)
        settings = json.loads(command[4])
        status = runner.Runner(lambda: runner.make_engine(settings), socket.socket(fileno=descriptor)).run()
    finally:
        os._exit(status)


async def _supported(self: Training, model: Path, sample: Path | None = None) -> dict[str, Any]:
    return {"supported": True, "reason": None}


async def _no_sample(*_: Any) -> None:
    """The trainer would compare nothing with it."""


async def _dead_trainer(
    self: Training,
    spec: dict[str, Any],
    path: Path,
    on_event: Callable[[dict[str, Any]], None],
    answer: Any = None,
    limit: int | None = None,
) -> dict[str, Any]:
    path.write_text(json.dumps(spec))
    if spec["end_block"] - spec["first_block"] == PARKS and not spec["goes_on"]:
        place = {"step": 1, "steps": 2, "scale": 1.0}
        training_state.write(Path(spec["parking"]), {"belongs": {}, "place": place, **spec["context"]}, [])
        await asyncio.Event().wait()
    raise TrainerFailed("the trainer ended with status -9")


class _Subprocesses:
    """asyncio as agentd.engine.process.client uses it."""

    def __getattr__(self, name: str) -> Any:
        return _fork_engine if name == "create_subprocess_exec" else getattr(asyncio, name)


def prepare() -> None:
    """Loads all that a run needs, and replaces what is too slow to be done a thousand times."""
    for module in ("agentd.engine.llamacpp.engine", "anyio._backends._asyncio", "uvicorn.lifespan.off"):
        importlib.import_module(module)

    vars(engine_client)["asyncio"] = _Subprocesses()
    Training.probe = _supported  # type: ignore[method-assign]
    vars(engine_sample)["sample"] = _no_sample
    Training.run = _dead_trainer  # type: ignore[method-assign]
    vars(passes_base)["drift_corpus"] = lambda: drift_corpus()[:2]
    gc.collect()
    gc.freeze()  # a fork copies none of what the collector would write to, and has little to go through


def expected(error: BaseException) -> bool:
    """Whether an error is one that agentd raises on purpose."""
    return isinstance(error, AgentdError)


if __name__ == "__main__":
    sys.exit("see test_points.py")
