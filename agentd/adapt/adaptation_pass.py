"""How a language model learns in a pass: backpropagation in the last blocks, zeroth-order steps in the trunk."""

import asyncio
import logging
import math
from pathlib import Path
from typing import Any

from agentd.adapt import adapter_file, zeroth_order
from agentd.adapt.attempt import CANDIDATE, Attempt, Means
from agentd.adapt.backpropagation import NLL_WEIGHT, TRAINED, Backpropagation
from agentd.adapt.dataset import Dataset
from agentd.adapt.dial import Dial, Move, Replan, place, trainer_limit
from agentd.adapt.planning import Setting
from agentd.adapt.progress import MemoryWatch
from agentd.adapt.revision_files import ADAPTER, CONTROL, LEDGER
from agentd.adapt.training import Training
from agentd.budget.expectation import ZO_STEPS
from agentd.errors import TrainerKilled
from agentd.learn import ledger
from agentd.learn.spsa import StepResult
from agentd.store import passes

logger = logging.getLogger(__name__)

_SHORTEN, _SHORTENINGS = 0.6, 4  # an adapter that drifts too far is scaled by this, at the most this often
_MEZO_CHUNK = 6  # steps between two looks at whether backpropagation fits again
_FRUITLESS = 5  # trainers in a row that are killed before they wrote anything: then memory is not what kills them
_SEEDS_APART = 1 << 10  # between the runs of zeroth-order steps of one pass
_DRIFT_ROOM = 0.8  # of gate.max_drift; the rest is left to the zeroth-order steps that follow


class AdaptationPass(Attempt):
    """A language model's pass: adapters by backpropagation in the last blocks, control vectors by zeroth-order steps in
    the trunk."""

    nll_weight = NLL_WEIGHT
    staged = (CANDIDATE, TRAINED)

    def __init__(
        self, means: Means, training: Training, setting: Setting, memory: MemoryWatch, replan: Replan, model: Path
    ) -> None:
        super().__init__(means)
        self._training, self._setting, self._model = training, setting, model
        self._dial = Dial(memory, means.config.memory.floor, replan, self._event)
        self._new: dict[str, Path] = {}
        self._steps: list[ledger.Step] = []
        self._kept: tuple[int, int] | None = None  # step, of so many, at which the running trainer wrote last
        self._fruitless = 0

    async def _learn(self, data: Dataset) -> None:
        if self._setting.blocks:
            await self._train_blocks(data)
        if self._setting.zo_steps:
            await self._train_trunk(data, self._setting.zo_steps - len(self._steps))

    async def _train_blocks(self, data: Dataset) -> None:
        """Backpropagation in the last blocks: in as many as memory allows at any time, see adapt/dial.py."""
        members = data.of("train", "dev")
        adapter, control = await asyncio.to_thread(self._files.weights, self._parent)
        at, steps = 0, 1  # how far training is
        while self._setting.blocks:
            options = self._setting.train_options(self._seed, self._config.model_threads, NLL_WEIGHT)
            n_train = sum(member.role == "train" or not self._setting.chooses for member in members)
            total = math.ceil(n_train / options["batch"]) * options["max_epochs"]
            options["first_step"] = place(at, steps, total)
            learning = Backpropagation(
                self._engine,
                self._training,
                model=self._model,
                folder=self._folder,
                setting=self._setting,
                members=members,
                tokens=self._encoded,
                options=options,
            )
            done, move = await self._segment(learning, adapter, control, len(members))
            if move is None:
                assert done is not None
                self._progress.message = f"best of {done['steps']} steps: step {done['best_step']}"
                self._new[ADAPTER] = self._folder / ADAPTER
                break
            if done is not None:
                at, steps = done["step"], done["steps"]
            elif self._kept is not None:
                at, steps = self._kept
            adapter = await asyncio.to_thread(self._keep, done)
            if adapter is not None:
                self._new[ADAPTER] = adapter
            self._progress.begin("paused", message=move.reason)
            await self._turn_to(await self._dial.next(self._setting, move))
            while not self._setting.blocks and len(self._steps) < ZO_STEPS["mezo"]:
                await self._train_trunk(data, _MEZO_CHUNK)
                control = self._new.get(CONTROL, control)
                await self._turn_to(await self._dial.next(self._setting, Move("MeZO steps taken meanwhile")))
            await self._stage_candidate()
            await self._engine.call("use", weights=CANDIDATE)
        if ADAPTER in self._new:
            await self._shorten(self._new[ADAPTER])

    async def _segment(
        self, learning: Backpropagation, adapter: Path | None, control: Path | None, n: int
    ) -> tuple[dict[str, Any] | None, Move | None]:
        """Training with one setting: the trainer's last event (None if it was killed), and why it stopped before its
        end (None if it did not)."""
        progress, setting = self._progress, self._setting
        self._kept = None
        progress.begin("tap", 0 if learning.from_engine else n, "hidden states of the frozen trunk")
        index = await learning.tap(self._count)
        if progress.state == "planned":
            await self._advance("tapped")
        progress.begin("train", message=setting.choice.plan.setting)
        train = asyncio.ensure_future(
            learning.train(index, adapter, control, self._folder / ADAPTER, self._on_training, trainer_limit(setting))
        )
        watch = asyncio.ensure_future(self._dial.watch(setting, self._training, progress))
        try:
            await asyncio.wait({train, watch}, return_when=asyncio.FIRST_COMPLETED)
            if watch.done():
                watch.result()
            try:
                done = await train
            except TrainerKilled as error:
                self._fruitless = 0 if self._kept else self._fruitless + 1
                if self._fruitless == _FRUITLESS:
                    raise
                asked = self._dial.move
                return None, asked if asked and asked.lost else Move(str(error), lost=True, smaller=True)
            return done, None if done["event"] == "done" else self._dial.move
        finally:
            for task in (train, watch):
                task.cancel()
            await asyncio.gather(train, watch, return_exceptions=True)
            await self._flush_steps()

    def _keep(self, done: dict[str, Any] | None) -> Path | None:
        """What a stopped trainer left, under a name that the next one does not write to; else what there was before."""
        parked, written = self._folder / ADAPTER, self._folder / f"kept-{ADAPTER}"
        left = parked if done is not None else written
        kept = self._new.get(ADAPTER)
        if left.exists():
            kept = left.replace(self._folder / f"{self._dial.moves}-{ADAPTER}")
        for path in (parked, written):  # older than what was kept; the next trainer must not be taken to have left it
            path.unlink(missing_ok=True)
        return kept

    async def _turn_to(self, setting: Setting) -> None:
        """Goes on with another setting; the pass's record has the largest one, which its peak belongs to."""
        self._setting, plan = setting, setting.choice.plan
        self._progress.method, self._progress.blocks = setting.method, setting.blocks
        columns: dict[str, Any] = {"method": setting.method, "blocks": setting.blocks}
        if plan.needed > self._progress.predicted_bytes:
            self._progress.predicted_bytes = plan.needed
            columns |= {"plan": setting.as_json(), "predicted": plan.predicted, "predicted_bytes": plan.needed}
        await self._store.call(lambda db: passes.update(db, self._progress.id, **columns))

    async def _shorten(self, adapter: Path) -> None:
        """Scales an adapter down until the model stays near the base on neutral text.

        A candidate that forgets too much would be rejected by the gate, and its examples' lesson lost with it. The
        drift is all that is looked at: holdout judges one candidate, once.
        """
        limit = _DRIFT_ROOM * self._config.adapt.gate.max_drift
        scale = 1.0
        for _ in range(_SHORTENINGS):
            await self._stage_candidate()
            drift = await self._drift()
            if drift is None or drift <= limit:
                break
            await asyncio.to_thread(adapter_file.scale, adapter, _SHORTEN)
            scale *= _SHORTEN
            await self._event("shortened", f"drift {drift:.3f} nats per token; the adapter is scaled to {scale:.2f}")

    async def _train_trunk(self, data: Dataset, steps: int) -> None:
        """Zeroth-order steps on the control vector, with the new adapter in place."""
        if steps <= 0:
            return
        await self._stage_candidate()  # MeZO starts from the parent's adapters
        await self._engine.call("use", weights=CANDIDATE)
        self._progress.begin("zo", steps, "SPSA on the control vectors")
        try:
            trajectory = await zeroth_order.run(
                self._engine,
                train=[member.number for member in data.of("train")],
                dev=[member.number for member in data.of("dev")],
                steps=steps,
                nll_weight=NLL_WEIGHT,
                seed=self._seed + self._progress.id + _SEEDS_APART * len(self._steps),
                weights=CANDIDATE,
                on_step=self._on_zo_step,
            )
        finally:
            await self._flush_steps()
        self._steps += trajectory.best_steps
        if trajectory.best_steps:
            control = self._folder / CONTROL
            await self._engine.call("write_control", path=str(control))
            self._new[CONTROL] = control

    async def _revision(self) -> tuple[dict[str, Path], dict[str, Any]]:
        files = await asyncio.to_thread(self._files.verified, self._parent)
        files = {name: path for name, path in files.items() if name in (ADAPTER, CONTROL)} | self._new
        if self._steps:
            path = self._folder / LEDGER
            await asyncio.to_thread(ledger.write, path, ledger.Ledger(self._parent, self._steps))
            files[LEDGER] = path
        setting = self._setting
        return files, {"method": setting.method, "blocks": setting.blocks, "zo_steps": len(self._steps)}

    # --- helpers

    async def _stage_candidate(self) -> None:
        adapter, control = await asyncio.to_thread(self._files.weights, self._parent)
        await self._engine.stage(CANDIDATE, self._new.get(ADAPTER, adapter), self._new.get(CONTROL, control))

    def _on_training(self, event: dict[str, Any]) -> None:
        progress = self._progress
        if event["event"] == "trunk":
            progress.step, progress.steps = event["blocks"], event["of"]
        elif event["event"] == "step":
            progress.step, progress.steps, progress.loss = event["step"], event["steps"], event["loss"]
            row = {"phase": "bp", "step": event["step"], "loss": event["loss"], "seconds": event["seconds"]}
            self._rows.append(row)
        elif event["event"] == "kept":
            self._kept = event["step"], event["steps"]
        elif event["event"] == "dev":
            progress.dev_loss, progress.accuracy = event["loss"], event["accuracy"]
            dev = {"dev_loss": event["loss"], "dev_accuracy": event["accuracy"]}
            self._rows.append({"phase": "bp", "step": event["step"], "seconds": progress.seconds, **dev})

    def _on_zo_step(self, result: StepResult) -> None:
        self._progress.note(result)
        self._rows.append(zeroth_order.row(result, self._progress.seconds))
