"""How a language model learns in a pass: backpropagation in the last blocks, zeroth-order steps in the trunk."""

import asyncio
import contextlib
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import astuple
from pathlib import Path
from typing import Any, ClassVar

import anyio

from agentd import __version__, durable
from agentd.adapt.passes import parked, zeroth_order
from agentd.adapt.passes.base import CANDIDATE, ENCODED, Attempt, Means
from agentd.adapt.passes.loss_journal import LossJournal
from agentd.adapt.passes.memory_control import MemoryControl, Move, Replan, place, trainer_limit
from agentd.adapt.passes.progress import MemoryWatch
from agentd.adapt.passes.trainer_job import NLL_WEIGHT, TRAINED, Backpropagation
from agentd.adapt.passes.trainer_process import Training
from agentd.adapt.planning.dataset import Dataset, Member
from agentd.adapt.planning.setting import Setting, with_answers, workload_of
from agentd.budget.expectation import ZO_STEPS
from agentd.engine.operations import Use, WriteControl
from agentd.errors import PassFailed, PassRefused, TrainerKilled, TrainerOverLimit
from agentd.formats import lora_gguf
from agentd.formats.training_state import TrainingState
from agentd.learn import ledger
from agentd.learn.encoded import METRIC
from agentd.learn.optimise import StepResult
from agentd.revision.files import ADAPTER, CONTROL, LEDGER
from agentd.store import events, passes
from agentd.store.row import to_json

logger = logging.getLogger(__name__)

_MEZO_CHUNK = 6  # steps between two looks at whether backpropagation fits again
_NOTE_EVERY = 45.0  # seconds of zeroth-order steps
_SEEDS_APART = 1 << 10  # between the runs of zeroth-order steps of one pass
_NAMED = 100  # examples, in an event
_DRIFT_ROOM = 0.8  # of gate.max_drift; the rest is left to the zeroth-order steps that follow


class AdaptationPass(Attempt):
    """A language model's pass: adapters by backpropagation in the last blocks, control vectors by zeroth-order steps in
    the trunk."""

    nll_weight = NLL_WEIGHT
    staged: ClassVar[tuple[str, ...]] = (CANDIDATE, TRAINED)
    parks: ClassVar[bool] = True

    def __init__(
        self, means: Means, training: Training, setting: Setting, memory: MemoryWatch, replan: Replan, model: Path
    ) -> None:
        super().__init__(means)
        self._training, self._setting, self._model = training, setting, model
        self._control = MemoryControl(
            memory,
            means.config.memory.floor,
            means.config.adapt.max_time,
            replan,
            self._event,
            spent=means.progress.seconds if means.parked else 0.0,
        )
        self._memory = memory
        self._new: dict[str, Path] = {}
        self._steps: list[ledger.Step] = []
        self._kept: tuple[int, int] | None = None  # (step, steps) at which the running trainer wrote last
        self._noted = 0.0  # seconds of the pass that are in the database
        self._step_scale = 1.0  # the part of the step size that trainers have come down to

    async def _learn(self, data: Dataset) -> None:
        config = self._config
        workload = await asyncio.to_thread(workload_of, list(self._encoded.values()), config.context, config.adapt.rank)
        with contextlib.suppress(PassRefused):  # then there is less memory than there was, which the control sees to
            prefers = self._parked.plan if self._parked else None
            await self._record(await self._control.plan(with_answers(workload, config, data), prefers), anew=True)
        if self._setting.blocks:
            try:
                await self._train_blocks(data)
            finally:
                self._progress.controls_memory = False
        if self._setting.zo_steps and not self._control.out_of_time:
            await self._train_trunk(data, self._setting.zo_steps - len(self._steps))

    async def _train_blocks(self, data: Dataset) -> None:
        """Backpropagation in the last blocks: in as many as memory allows at any time, see memory_control.py."""
        members = data.of("train", "replay", "dev")
        adapter, control = await asyncio.to_thread(self._start)
        at, steps = 0, 1  # how far training is
        goes_on = False  # the trainer, from the state that it has written
        if self._parked is not None and self._parked.state is not None:
            at, steps, goes_on = await asyncio.to_thread(self._go_on, self._parked.state)
            adapter, control = self._new.get(ADAPTER, adapter), self._new.get(CONTROL, control)
            if self._new:
                await self._stage_candidate()
                await self._engine.call(Use(CANDIDATE))
        while self._setting.blocks:
            n_train = sum(member.role != "dev" for member in members)
            options = self._setting.train_options(self._seed, self._config.model_threads, NLL_WEIGHT, n_train)
            total = math.ceil(n_train / options["batch"]) * options["max_epochs"]
            options["first_step"] = place(at, steps, total)
            options["lr"] *= self._step_scale
            options["seconds"] = self._control.seconds_left
            learning = Backpropagation(
                self._engine,
                self._training,
                model=self._model,
                folder=self._folder,
                setting=self._setting,
                members=members,
                encoded=self._encoded,
                file=self._folder / ENCODED,
                options=options,
            )
            parking = self._parking(members, at, steps, goes_on) if self.parks else {}
            goes_on = False
            done, move = await self._segment(learning, adapter, control, len(members), parking)
            if move is None:
                assert done is not None
                self._progress.message = f"best of {done['steps']} steps: step {done['best_step']}"
                self._new[ADAPTER] = self._folder / ADAPTER
                self._note_doubted(members, set(done["doubted"]))
                break
            if done is not None:
                at, steps = done["step"], done["steps"]
            elif self._kept is not None:
                at, steps = self._kept
            kept = await asyncio.to_thread(self._keep, done)
            if kept is not None:
                adapter = self._new[ADAPTER] = kept
            self._progress.begin("paused", message=move.reason)
            has_plan = await self._move(move)
            while has_plan and not self._setting.blocks and len(self._steps) < ZO_STEPS["mezo"]:
                await self._train_trunk(data, _MEZO_CHUNK)
                control = self._new.get(CONTROL, control)
                has_plan = await self._move(Move("MeZO steps taken meanwhile"))
            if not has_plan:
                if not self._new:
                    why = self._control.exhausted or move.reason
                    raise PassFailed(f"nothing was learned before training had to end: {why}")
                break
            await self._stage_candidate()
            await self._engine.call(Use(CANDIDATE))
        if ADAPTER in self._new:
            await self._stage_candidate()
            await self._shorten(_DRIFT_ROOM * self._config.adapt.gate.max_drift)

    def _go_on(self, state: TrainingState) -> tuple[int, int, bool]:
        """As it was when the segment began of which the trainer has written the state: how far training was then, and
        whether the trainer goes on from there. With another setting it begins with the matrices of that state."""
        header, place = state.header, state.header["place"]
        self._new = {name: self._folder / file for name, file in header["new"].items()}
        self._steps = [ledger.Step(*values) for values in header["zo"]]
        self._step_scale, self._control.moves = header["scale"], header["moves"]
        if (self._setting.method, self._setting.blocks) == (header["method"], header["blocks"]):
            return header["at"], header["steps"], True
        self._new[ADAPTER] = self._folder / f"{self._control.moves}-parked-{ADAPTER}"
        state.extract("adapter", self._new[ADAPTER])
        self._step_scale *= place["scale"]
        return place["step"], place["steps"], False

    def _parking(self, members: Sequence[Member], at: int, steps: int, goes_on: bool) -> dict[str, Any]:
        """Where the trainer keeps its state, what that belongs to, and what `_go_on` finds in it."""
        context = {
            "method": self._setting.method,
            "blocks": self._setting.blocks,
            "at": at,
            "steps": steps,
            "new": {name: path.name for name, path in self._new.items()},
            "zo": [astuple(step) for step in self._steps],
            "scale": self._step_scale,
            "moves": self._control.moves,
        }
        where = str(self._folder / parked.STATE)
        return {"parking": where, "goes_on": goes_on, "identity": self._identity(members), "context": context}

    def _identity(self, members: Sequence[Member]) -> str:
        return parked.identity(self._files.base_sha256, self._origin, members)

    def _journal(self, members: Sequence[Member], steps: int, seed: int, objective: str) -> LossJournal:
        """Of so many zeroth-order steps from where the pass is now."""
        begun_with = {name: durable.sha256(path) for name, path in self._new.items()}
        facts = [__version__, self._identity(members), begun_with, steps, seed, objective]
        header = {"belongs": to_json(facts), "method": self._setting.method, "blocks": self._setting.blocks}
        return LossJournal(self._folder / parked.LOSSES.format(len(self._steps)), header)

    async def _segment(
        self,
        learning: Backpropagation,
        adapter: Path | None,
        control: Path | None,
        n: int,
        parking: Mapping[str, Any],
    ) -> tuple[dict[str, Any] | None, Move | None]:
        """Training with one setting: the trainer's last event (None if it was killed), and why it stopped before its
        end (None if it did not)."""
        progress, setting = self._progress, self._setting
        self._kept = None
        progress.begin("tap", 0 if learning.from_engine else n, "hidden states of the frozen trunk")
        with anyio.move_on_after(self._control.seconds_until_stopped) as time_left:
            index = await learning.tap(self._count)
        if time_left.cancelled_caught:
            return None, Move("there is no time left")
        if progress.state == "planned":
            await self._advance("tapped")
        progress.begin("train", message=setting.choice.plan.setting)
        progress.controls_memory = True
        train = asyncio.ensure_future(
            learning.train(
                index, adapter, control, self._folder / ADAPTER, self._on_training, trainer_limit(setting), parking
            )
        )
        watch = asyncio.ensure_future(self._control.watch(setting, self._training, progress))
        try:
            await asyncio.wait({train, watch}, return_when=asyncio.FIRST_COMPLETED)
            if watch.done():
                watch.result()
            try:
                done = await train
            except TrainerKilled as error:
                move = self._control.move
                if move and move.lost:
                    return None, move
                trainer_bytes = (
                    trainer_limit(setting)
                    if isinstance(error, TrainerOverLimit)
                    else self._memory.now.get("trainer", 0)
                )
                return None, Move(str(error), lost=True, smaller=True, trainer_bytes=trainer_bytes)
            return done, None if done["event"] == "done" else self._control.move
        finally:
            for task in (train, watch):
                task.cancel()
            await asyncio.gather(train, watch, return_exceptions=True)
            await self._flush_steps()

    def _keep(self, done: dict[str, Any] | None) -> Path | None:
        """What a stopped trainer left, under a name that the next one does not write to and where a power cut leaves
        it; None where it left nothing."""
        stopped, written = self._folder / ADAPTER, self._folder / f"kept-{ADAPTER}"
        left = stopped if done is not None else written
        adapter = None
        if left.exists():
            adapter = self._folder / f"{self._control.moves}-{ADAPTER}"
            durable.publish(left, adapter)
        for path in (stopped, written):  # older than what was kept; the next trainer must not be taken to have left it
            path.unlink(missing_ok=True)
        return adapter

    async def _move(self, move: Move) -> bool:
        """Goes on with another setting, if there is one; the pass's record has the largest one, which its peak belongs
        to."""
        setting = await self._control.next(self._setting, move)
        if setting is not None:
            await self._record(setting)
        return setting is not None

    async def _record(self, setting: Setting, *, anew: bool = False) -> None:
        """Goes on with this setting; `anew`: what was recorded of an earlier one counts no more."""
        self._setting, plan = setting, setting.choice.plan
        self._progress.method, self._progress.blocks = setting.method, setting.blocks
        columns: dict[str, Any] = {"method": setting.method, "blocks": setting.blocks}
        if anew or plan.needed > self._progress.predicted_bytes:
            self._progress.predicted_bytes = plan.needed
            columns |= {"plan": setting.as_json(), "predicted": plan.predicted, "predicted_bytes": plan.needed}
        await self._store.call(lambda db: passes.update(db, self._progress.id, **columns))

    async def _scale(self, factor: float) -> bool:
        if ADAPTER not in self._new:
            return False
        await asyncio.to_thread(lora_gguf.scale, self._new[ADAPTER], factor)
        return True

    async def _train_trunk(self, data: Dataset, steps: int) -> None:
        """Zeroth-order steps on the control vector, with the new adapter in place."""
        if steps <= 0:
            return
        await self._stage_candidate()  # MeZO starts from the parent's adapters
        await self._engine.call(Use(CANDIDATE))
        self._progress.begin("zo", steps, "SPSA on the control vectors")
        seed = self._seed + self._progress.id + _SEEDS_APART * len(self._steps)
        members, journal = data.of("train", "replay", "dev"), None
        if self.parks:
            journal = await asyncio.to_thread(self._journal, members, steps, seed, data.objective)
        try:
            trajectory = await zeroth_order.run(
                self._engine,
                train=[member.number for member in data.of("train", "replay")],
                dev=[member.number for member in data.of("dev")],
                steps=steps,
                nll_weight=NLL_WEIGHT,
                seed=seed,
                weights=CANDIDATE,
                on_step=self._on_zo_step,
                out_of_time=lambda: self._control.out_of_time,
                jumps=data.objective == METRIC,
                journal=journal,
            )
        except asyncio.CancelledError:
            if journal is not None:
                journal.save()
            raise
        finally:
            await self._flush_steps()
        self._steps += trajectory.best_steps
        if trajectory.best_steps:
            # under a name of its own: what a restart goes on from may name the one before
            control = self._folder / f"{len(self._steps)}-{CONTROL}"
            await self._engine.call(WriteControl(control))
            self._new[CONTROL] = control

    async def _revision(self) -> tuple[dict[str, Path], dict[str, Any]]:
        files = await asyncio.to_thread(self._files.verified, self._origin)
        files = {name: path for name, path in files.items() if name in (ADAPTER, CONTROL)} | self._new
        if self._steps:
            path = self._folder / LEDGER
            await asyncio.to_thread(ledger.write, path, ledger.Ledger(self._origin, self._steps))
            files[LEDGER] = path
        setting = self._setting
        return files, {"method": setting.method, "blocks": setting.blocks, "zo_steps": len(self._steps)}

    # --- helpers

    def _start(self) -> tuple[Path | None, Path | None]:
        """Adapter and control vector that it begins with. Raises RevisionCorrupt."""
        return self._files.weights(self._origin)

    async def _stage_candidate(self) -> None:
        adapter, control = await asyncio.to_thread(self._start)
        await self._engine.stage(CANDIDATE, self._new.get(ADAPTER, adapter), self._new.get(CONTROL, control))

    def _on_training(self, event: dict[str, Any]) -> None:
        progress = self._progress
        if event["event"] == "trunk":
            progress.step, progress.steps = event["blocks"], event["of"]
        elif event["event"] == "step":
            progress.step, progress.steps, progress.loss = event["step"], event["steps"], event["loss"]
            row = {"phase": "bp", "step": event["step"], "loss": event["loss"], "seconds": event["seconds"]}
            self._rows.append(row)
        elif event["event"] == "back":
            self._step_scale *= event["scale"]
            logger.info("pass %d: back to step %d", self._progress.id, event["step"])
        elif event["event"] == "resumed":
            progress.step, progress.steps = self._kept = event["step"], event["steps"]
            self._step_scale *= event["scale"]
        elif event["event"] == "saved":
            self._note_progress()
        elif event["event"] in ("anew", "unsaved"):
            what = (
                "training begins anew" if event["event"] == "anew" else "a restart would lose what is learned from here"
            )
            self._say(event["event"], f"{what}: {event['reason']}")
        elif event["event"] == "kept":
            self._kept = event["step"], event["steps"]
        elif event["event"] == "dev":
            progress.dev_loss, progress.accuracy = event["loss"], event["accuracy"]
            dev = {"dev_loss": event["loss"], "dev_accuracy": event["accuracy"]}
            self._rows.append({"phase": "bp", "step": event["step"], "seconds": progress.seconds, **dev})

    def _say(self, kind: str, message: str, data: Mapping[str, Any] | None = None) -> None:
        logger.info("pass %d: %s", self._progress.id, message)
        self._store.submit(events.add, kind, message, pass_id=self._progress.id, data=data)

    def _note_doubted(self, members: Sequence[Member], doubted: set[int]) -> None:
        """Which examples say what the others do not: their owner may know better."""
        for task in sorted({member.task.name for member in members if member.number in doubted}):
            there = [member for member in members if member.task.name == task and member.role == "train"]
            ids = [member.example.id for member in there if member.number in doubted]
            message = f"{len(ids)} of {len(there)} examples of {task} say what the others do not, and counted little"
            self._say("doubted", message, {"task": task, "examples": ids[:_NAMED]})

    def _on_zo_step(self, result: StepResult) -> None:
        self._progress.note(result)
        self._rows.append(zeroth_order.row(result, self._progress.seconds))
        if self._progress.seconds - self._noted > _NOTE_EVERY:
            self._note_progress()

    def _note_progress(self) -> None:
        """Beside what a restart goes on from, so that this has its record."""
        rows, self._rows, self._noted = self._rows, [], self._progress.seconds
        self._store.submit(passes.note_progress, self._progress.id, self._progress.phases_so_far, rows)
