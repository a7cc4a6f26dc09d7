"""A pass, read from top to bottom: plan → tap → train → gate → stage → swap and trial.

Every step is written to the database before the act it describes. Whatever raises ends the pass as refused or failed;
serving never depends on it.
"""

import asyncio
import logging
import math
import shutil
from collections.abc import Awaitable, Callable
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar

from agentd.adapt import adapter_file, gate, zeroth_order
from agentd.adapt import dataset as datasets
from agentd.adapt.backpropagation import NLL_WEIGHT, TRAINED, Backpropagation
from agentd.adapt.dataset import Dataset, Member
from agentd.adapt.dial import Dial, Move, Replan, place
from agentd.adapt.planning import Setting
from agentd.adapt.progress import MemoryWatch, Progress
from agentd.adapt.revision_files import ADAPTER, CONTROL, LEDGER, RevisionFiles
from agentd.adapt.training import Training
from agentd.budget.expectation import ZO_STEPS
from agentd.config import Config
from agentd.engine.supervisor import Supervisor
from agentd.errors import AgentdError, PassFailed, TrainerFailed
from agentd.ids import now
from agentd.learn import ledger
from agentd.learn.spsa import StepResult
from agentd.store import events, examples, passes, revisions
from agentd.store.database import Store
from agentd.store.revisions import Revision

logger = logging.getLogger(__name__)
T = TypeVar("T")

CANDIDATE = "candidate"  # the name under which the engine holds what is not yet a revision
_SHORTEN, _SHORTENINGS = 0.6, 4  # an adapter that drifts too far is scaled by this, at the most this often
_MEZO_CHUNK = 6  # steps between two looks at whether backpropagation fits again
_SEEDS_APART = 1 << 10  # between the runs of zeroth-order steps of one pass
_DRIFT_ROOM = 0.8  # of gate.max_drift; the rest is left to the zeroth-order steps that follow


class Rejected(Exception):
    """The gate said no; the verdict is recorded already."""


class AdaptationPass:
    """One attempt to learn. `run` returns the staged revision, ready for its trial; it raises Rejected, AgentdError."""

    def __init__(
        self,
        *,
        config: Config,
        store: Store,
        engine: Supervisor,
        files: RevisionFiles,
        training: Training,
        setting: Setting,
        progress: Progress,
        memory: MemoryWatch,
        replan: Replan,
        model: Path,
        folder: Path,
        seed: int,
    ) -> None:
        self._config, self._store, self._engine, self._files = config, store, engine, files
        self._training, self._setting, self._progress = training, setting, progress
        self._dial = Dial(memory, config.memory.floor, replan, self._event)
        self._model, self._folder, self._seed = model, folder, seed
        self._parent = engine.revision
        self._tokens: dict[int, dict[str, Any]] = {}
        self._new: dict[str, Path] = {}
        self._rows: list[dict[str, Any]] = []
        self._steps: list[ledger.Step] = []

    async def run(self, data: Dataset) -> int:
        started = now()
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        await self._engine.call("open")
        try:
            data = await self._encode(data)
            if self._setting.blocks:
                await self._train_blocks(data)
            if self._setting.zo_steps:
                await self._train_trunk(data, self._setting.zo_steps - len(self._steps))
            await self._advance("trained")
            verdict = await self._gate(data)
        finally:
            await self._close()
        # What was learned from is no longer new, taken or not: the same examples would give the same verdict.
        learned = [member.example.id for member in data.of("train", "dev")]
        await self._store.call(examples.mark_used, learned, started)
        if not verdict.accepted:
            await self._advance("rejected", reason=verdict.reason)
            raise Rejected(verdict.reason)
        return await self._stage(data, verdict)

    # --- the steps

    async def _encode(self, data: Dataset) -> Dataset:
        """Tokenises what the pass works on; the parent's adapters are what it starts from."""
        self._progress.begin("tap", len(data.members), "tokenising")
        source, target = self._folder / "examples.jsonl", self._folder / "tokens.jsonl"
        data.write(source)
        await self._engine.call("encode", source=str(source), target=str(target), on_progress=self._count)
        data, self._tokens = await asyncio.to_thread(datasets.usable, data, target)
        roles = [(member.example.id, member.role) for member in data.members]
        await self._store.call(passes.add_examples, self._progress.id, roles)
        n_train, n_holdout = len(data.of("train", "dev")), len(data.of("holdout"))
        await self._store.call(passes.update, self._progress.id, n_train=n_train, n_holdout=n_holdout)
        for what, why in list(data.left_out.items())[:20]:
            await self._event("left out", f"{what}: {why}")
        await self._engine.call("use", weights=str(self._parent))
        return data

    async def _train_blocks(self, data: Dataset) -> None:
        """Backpropagation in the last blocks: in as many as memory allows at any time, see adapt/dial.py."""
        members = data.of("train", "dev")
        n_train = sum(member.role == "train" for member in members)
        adapter, control = await asyncio.to_thread(self._files.weights, self._parent)
        at, steps = 0, 1  # how far training is
        while self._setting.blocks:
            options = self._setting.train_options(self._seed, self._config.model_threads, NLL_WEIGHT)
            total = math.ceil(n_train / options["batch"]) * options["max_epochs"]
            options["first_step"] = place(at, steps, total)
            learning = Backpropagation(
                self._engine,
                self._training,
                model=self._model,
                folder=self._folder,
                setting=self._setting,
                members=members,
                tokens=self._tokens,
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
        progress.begin("tap", 0 if learning.from_engine else n, "hidden states of the frozen trunk")
        index = await learning.tap(self._count)
        if progress.state == "planned":
            await self._advance("tapped")
        progress.begin("train", message=setting.choice.plan.setting)
        train = asyncio.ensure_future(
            learning.train(index, adapter, control, self._folder / ADAPTER, self._on_training)
        )
        watch = asyncio.ensure_future(self._dial.watch(setting, self._training, progress))
        try:
            await asyncio.wait({train, watch}, return_when=asyncio.FIRST_COMPLETED)
            if watch.done():
                watch.result()
            try:
                done = await train
            except TrainerFailed:
                if self._dial.move is None or not self._dial.move.lost:
                    raise
                return None, self._dial.move
            return done, None if done["event"] == "done" else self._dial.move
        finally:
            for task in (train, watch):
                task.cancel()
            await asyncio.gather(train, watch, return_exceptions=True)
            await self._flush_steps()

    def _keep(self, done: dict[str, Any] | None) -> Path | None:
        """What a stopped trainer left, under a name that the next one does not write to."""
        left = self._folder / (ADAPTER if done is not None else f"best-{ADAPTER}")
        if not left.exists():
            return self._new.get(ADAPTER)
        kept = self._folder / f"{self._dial.moves}-{ADAPTER}"
        left.replace(kept)
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
            if drift <= limit:
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

    async def _gate(self, data: Dataset) -> gate.Verdict:
        """Scores holdout with what serves and with the candidate, in this engine."""
        holdout = data.of("holdout")
        self._progress.begin("gate", 2 * len(holdout), "holdout: what serves")
        before = await self._outcomes(holdout, str(self._parent), 0)
        await self._stage_candidate()
        self._progress.message = "holdout: the candidate"
        after = await self._outcomes(holdout, CANDIDATE, len(holdout))
        self._progress.message = "drift on neutral text"
        drift = await self._drift()
        adapted = {member.example.task for member in data.of("train")}
        verdict = await asyncio.to_thread(
            lambda: gate.judge(
                before, after, adapted=adapted, drift=drift, gate=self._config.adapt.gate, seed=self._seed
            )
        )
        accuracies = [f["after"]["accuracy"] for f in verdict.tasks.values() if f["after"]["accuracy"] is not None]
        self._progress.accuracy = accuracies[0] if accuracies else None
        await self._advance("gated", gate=verdict.as_json())
        return verdict

    async def _stage(self, data: Dataset, verdict: gate.Verdict) -> int:
        """Writes the revision: the pass's state, the files, its row. Files without a row go at the next start."""
        self._progress.begin("stage")
        number = await self._store.call(revisions.next_id)
        files = await asyncio.to_thread(self._files.verified, self._parent)
        files = {name: path for name, path in files.items() if name in (ADAPTER, CONTROL)} | self._new
        if self._steps:
            path = self._folder / LEDGER
            await asyncio.to_thread(ledger.write, path, ledger.Ledger(self._parent, self._steps))
            files[LEDGER] = path
        await self._refuse_known_to_be_bad(files)
        await self._advance("staged", revision=number)
        manifest: dict[str, Any] = {
            "parent": self._parent,
            "pass": self._progress.id,
            "created_at": now(),
            "method": self._setting.method,
            "blocks": self._setting.blocks,
            "zo_steps": len(self._steps),
            "tasks": verdict.tasks,
            "n_train": len(data.of("train", "dev")),
        }
        digest = await asyncio.to_thread(self._files.write, number, files, manifest)
        summary = {name: {"before": f["before"], "after": f["after"], "n": f["n"]} for name, f in verdict.tasks.items()}
        row = Revision(
            id=number,
            parent=self._parent,
            pass_id=self._progress.id,
            created_at=manifest["created_at"],
            state="staged",
            reason=verdict.reason,
            method=self._setting.method,
            blocks=self._setting.blocks,
            manifest_sha256=digest,
            summary=summary,
        )
        await self._store.call(revisions.add, row)
        return number

    # --- helpers

    async def _refuse_known_to_be_bad(self, files: dict[str, Path]) -> None:
        """What was rolled back once is not tried again unchanged."""
        known = [row.id for row in await self._store.call(revisions.all) if row.state == "rolled_back"]
        if (twin := await asyncio.to_thread(self._files.twin, files, known)) is not None:
            reason = f"it is the same as revision {twin}, which was rolled back"
            await self._advance("rejected", reason=reason)
            raise Rejected(reason)

    async def _outcomes(self, holdout: list[Member], weights: str, done: int) -> dict[str, gate.Outcome]:
        await self._engine.call("use", weights=weights)

        def count(scored: int) -> None:
            self._progress.step = done + scored

        scores = await self._engine.call("score", examples=[member.number for member in holdout], on_progress=count)
        return gate.outcomes(holdout, self._tokens, scores, NLL_WEIGHT)

    async def _drift(self) -> float:
        """KL(base ‖ candidate) on neutral text, in nats per token."""
        return float(await self._engine.call("drift", texts=neutral_texts(), reference="0", candidate=CANDIDATE))

    async def _stage_candidate(self) -> None:
        adapter, control = await asyncio.to_thread(self._files.weights, self._parent)
        await self._engine.stage(CANDIDATE, self._new.get(ADAPTER, adapter), self._new.get(CONTROL, control))

    async def _advance(self, state: str, **columns: Any) -> None:
        self._progress.state = state
        await self._store.call(passes.advance, self._progress.id, state, **columns)

    async def _event(self, kind: str, message: str, **data: Any) -> None:
        logger.info("pass %d: %s: %s", self._progress.id, kind, message)
        await self._store.call(events.add, kind, message, pass_id=self._progress.id, data=data)

    async def _close(self) -> None:
        """Frees the background context. An engine that died has freed it already."""
        await _quietly(lambda: self._engine.call("abandon"))
        await _quietly(lambda: self._engine.call("unstage", weights=CANDIDATE))
        await _quietly(lambda: self._engine.call("unstage", weights=TRAINED))

    async def _flush_steps(self) -> None:
        rows, self._rows = self._rows, []
        if rows:
            await self._store.call(passes.add_steps, self._progress.id, rows)

    def _count(self, done: int) -> None:
        self._progress.step = done

    def _on_training(self, event: dict[str, Any]) -> None:
        progress = self._progress
        if event["event"] == "step":
            progress.step, progress.steps, progress.loss = event["step"], event["steps"], event["loss"]
            row = {"phase": "bp", "step": event["step"], "loss": event["loss"], "seconds": event["seconds"]}
            self._rows.append(row)
        elif event["event"] == "dev":
            progress.dev_loss, progress.accuracy = event["loss"], event["accuracy"]
            dev = {"dev_loss": event["loss"], "dev_accuracy": event["accuracy"]}
            self._rows.append({"phase": "bp", "step": event["step"], "seconds": progress.seconds, **dev})

    def _on_zo_step(self, result: StepResult) -> None:
        progress = self._progress
        progress.step, progress.loss = result.step, result.loss
        progress.dev_loss = result.dev_loss if result.dev_loss is not None else progress.dev_loss
        row: dict[str, Any] = {"phase": "zo", "step": result.step, "loss": result.loss, "dev_loss": result.dev_loss}
        row |= {"seconds": progress.seconds, "projected_gradient": result.projected_gradient, "lr": result.lr}
        if result.applied:
            row |= {"seed": str(result.applied[0].seed), "epsilon": result.applied[0].epsilon}
        self._rows.append(row)


async def _quietly(step: Callable[[], Awaitable[T]]) -> None:
    try:
        await step()
    except AgentdError as error:
        logger.debug("while closing a pass: %s", error)


def neutral_texts() -> list[str]:
    """Text that has nothing to do with any task: what drift from the base is measured on."""
    return (resources.files("agentd.adapt") / "neutral.txt").read_text().strip().split("\n\n")


def prune_folders(root: Path, keep: int) -> None:
    """Deletes the working directories of all but the newest passes."""
    folders = sorted((path for path in root.glob("*") if path.name.isdigit()), key=lambda path: int(path.name))
    for folder in folders[:-keep]:
        shutil.rmtree(folder, ignore_errors=True)


def describe_failure(error: BaseException) -> str:
    """The reason a pass is recorded with."""
    if isinstance(error, AgentdError | PassFailed):
        return str(error)
    return f"{type(error).__name__}: {error}"
