"""Judges recall of tasks whose setting is `auto`, when nobody waits and no pass runs: examples are answered as they are
served, with and without past corrections. A verdict is in the database before it takes effect. A board that is never
idle gets its verdict, too: what has waited long enough is judged between its requests, which go first."""

import asyncio
import contextlib
import logging
import math
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from agentd.adapt.kinds.kind import EngineKind
from agentd.adapt.recall.examination import Examination, examination
from agentd.adapt.recall.switch import RecallSwitch
from agentd.adapt.recall.verdict import Answers, Judgement, judge
from agentd.budget import footprint
from agentd.budget.planner import budget_of
from agentd.budget.workload import Workload
from agentd.config.schema import Config
from agentd.durable import make_directory
from agentd.engine.operations import Abandon, Answer, Encode, Open, ScoreExamples, Use
from agentd.engine.process.activity import Activity
from agentd.engine.process.supervisor import Supervisor
from agentd.errors import AgentdError
from agentd.host import memory
from agentd.store import events, examples, recall
from agentd.store.database import Store

logger = logging.getLogger(__name__)

FEWEST = 3  # corrections of a task that make it worth asking
_AGAIN = 600.0  # seconds after which what could not be judged is tried again
_LATEST = 900.0  # seconds after which it is judged though requests keep coming
_GROWTH = 1.5  # times as many corrections after which it is judged again


class RecallJudge:
    """`free` says whether the engine's background is no one else's; `folder` is for its files while it works."""

    def __init__(
        self,
        config: Callable[[], Config],
        store: Store,
        engine: Supervisor,
        activity: Activity,
        switch: RecallSwitch,
        kind: EngineKind[Any],
        folder: Path,
        free: Callable[[], bool],
    ) -> None:
        self._config, self._store, self._engine, self._activity = config, store, engine, activity
        self._switch, self._kind, self._folder, self._free = switch, kind, folder, free
        self._put_off: dict[str, tuple[float, str]] = {}  # by task, when to try again, and why not now
        self._since: dict[str, float] = {}  # by task, when it was due first
        self._loop: asyncio.Task[None] | None = None
        self._work: asyncio.Task[None] | None = None

    def run(self) -> None:
        """Looks again and again whether there is something to judge, where the model reads text."""
        shutil.rmtree(self._folder, ignore_errors=True)  # what a crash has left holds users' texts
        if self._loop is None and self._kind.model.classifier is None:
            self._loop = asyncio.create_task(self._watch())

    async def shut_down(self) -> None:
        if self._loop is not None:
            self._loop.cancel()
        await self.stop()

    async def stop(self) -> None:
        """Ends a judgement that is on its way, and waits until it has ended; it is begun again later."""
        if self._work is not None and not self._work.done():
            self._work.cancel()
            await asyncio.wait({self._work})

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(self._config().adapt.trigger.check)
            with contextlib.suppress(AgentdError):
                due = await self._due()
                if due and (turn := self._turn(due)) is not None and self._free():
                    self._work = asyncio.create_task(self._judge(turn, due[turn]))
                    await asyncio.wait({self._work})

    async def _due(self) -> dict[str, int]:
        """The tasks that are to be judged, and how many corrections they have. Of the others that are not judged yet it
        is said why not."""
        due: dict[str, int] = {}
        self._switch.waits = {}
        for name, each in sorted((await self._store.call(examples.count)).items()):
            n, row = sum(each["train"].values()), self._switch.row(name)
            if self._switch.setting(name) != "auto":
                continue
            if n < FEWEST:
                if row.decided_at is None:
                    self._switch.waits[name] = f"{FEWEST - n} more corrections"
                continue
            grown = n >= max(row.corrections + 2, _GROWTH * row.corrections) or 2 * n < row.corrections
            if row.decided_at is None or row.revision != self._engine.revision or grown:
                due[name] = n
        now = time.monotonic()
        self._since = {name: self._since.get(name, now) for name in due}
        return due

    def _turn(self, due: Mapping[str, int]) -> str | None:
        """The task that is judged now. Of all others it is said what they wait for."""
        settings, now = self._config().adapt, time.monotonic()
        turn: str | None = None
        idle, latest = self._activity.idle_seconds >= settings.trigger.idle, min(_LATEST, settings.trigger.latest)
        held: str | None = None
        if not settings.enabled:
            held = "adapt.enabled, which is false"
        elif not self._engine.ready or self._activity.held:
            held = "the engine"
        elif not self._free():
            held = "the end of a pass or a trial"
        for name in due:
            again, why = self._put_off.get(name, (now, ""))
            left = self._since[name] + latest - now
            if held is not None:
                self._switch.waits[name] = held
            elif again > now:
                self._switch.waits[name] = f"another try in {(again - now) / 60:.0f} min: {why}"
            elif not idle and left > 0:
                self._switch.waits[name] = (
                    f"{settings.trigger.idle:g} s without a request (adapt.trigger.idle); in {left / 60:.0f} min it is "
                    "judged all the same"
                )
            elif turn is None:
                turn = name
                self._switch.waits[name] = "its examples to be answered, which is going on"
            else:
                self._switch.waits[name] = "others that are judged first"
        return turn

    async def _judge(self, name: str, corrections: int) -> None:
        revision, config = self._engine.revision, self._config()
        try:
            asked = await self._store.call(
                lambda db: examination(db, name, config.adapt.gate, config.adapt.recall_tokens, corrections)
            )
            if asked is None:
                verdict = Judgement(False, None, "no example of the task has an answer that is known to be right", {})
            elif (reason := await asyncio.to_thread(self._too_large, asked)) is not None:
                logger.info("recall is not judged now: %s", reason)
                self._postpone(name, reason)
                return
            else:
                on = self._switch.row(name).active
                verdict = await self._examine(asked, revision, on)
                if verdict.figures["n"] < min(FEWEST, len(asked.questions)):
                    self._postpone(name, "hardly anything was answered in time (adapt.gate.max_time)")
                    return
            await self._conclude(name, verdict, revision, corrections)
        except Exception as error:
            logger.warning("recall was not judged: %s", error, exc_info=not isinstance(error, AgentdError))
            self._postpone(name, str(error))

    def _postpone(self, name: str, reason: str) -> None:
        self._put_off[name] = time.monotonic() + _AGAIN, reason

    async def _conclude(self, name: str, verdict: Judgement, revision: int, corrections: int) -> None:
        before = self._switch.row(name)
        row = await self._store.call(
            recall.judged,
            name,
            active=verdict.active,
            k=verdict.k,
            reason=verdict.reason,
            figures=verdict.figures,
            revision=revision,
            corrections=corrections,
        )
        if row is None:
            return
        self._switch.note(row)
        self._put_off.pop(name, None)
        turned = "stays " if before.active == verdict.active and before.decided_at else ""
        message = f"task {name}: {turned}{'on' if verdict.active else 'off'}: {verdict.reason}"
        await self._store.call(events.add, "recall", message, revision=revision or None, data=verdict.figures)

    def _too_large(self, asked: Examination) -> str | None:
        """Why a session for this does not fit the memory there is."""
        config = self._config()
        texts = [str(question.line(0, 0)) for question in asked.questions]
        texts += ["word " * (asked.tokens + len(max(texts, key=len)) // 4)]
        workload = Workload.estimated(texts, rank=1, context=config.context)
        shapes = self._kind.shapes(config)
        needed = footprint.total(footprint.engine_terms(shapes, workload, zeroth_order=False))
        free = budget_of(memory.read().available, config.memory.reserve, config.memory.limit)
        return f"{needed} bytes are needed, and {free} are free" if needed > free else None

    async def _examine(self, asked: Examination, revision: int, on: bool) -> Judgement:
        await asyncio.to_thread(make_directory, self._folder)
        source, target = self._folder / "asked.jsonl", self._folder / "encoded.jsonl"
        groups = await asyncio.to_thread(asked.write, source)
        answers: list[Answers] = []
        try:
            await self._engine.call(Open())
            if asked.metric == "loss":
                await self._engine.call(Encode(source, target))
            await self._engine.call(Use(str(revision)))
            for lines in groups:
                answers.append(await self._answers(asked, source, list(lines), len(groups)))
        finally:
            with contextlib.suppress(AgentdError):
                await self._engine.call(Abandon())
            for file in (source, target):
                file.unlink(missing_ok=True)
        settings = self._config().adapt
        return judge(
            answers[0],
            dict(zip(asked.counts, answers[1:], strict=True)),
            held_out=asked.held_out,
            alpha=settings.gate.alpha,
            on=on,
            seed=settings.seed,
        )

    async def _answers(self, asked: Examination, source: Path, lines: list[int], groups: int) -> Answers:
        began = time.monotonic()
        if asked.metric == "loss":
            scores = await self._engine.call(ScoreExamples(lines))
            losses = [-math.fsum(score.target) / max(1, len(score.target)) for score in scores]
            return Answers(losses=losses, seconds=(time.monotonic() - began) / len(lines))
        seconds = self._config().adapt.gate.max_time / groups
        said = await self._engine.call(Answer(source, lines, seconds))
        hits = [asked.right(question, each) for question, each in zip(asked.questions, said, strict=True)]
        return Answers(hits=hits, seconds=(time.monotonic() - began) / len(lines))
