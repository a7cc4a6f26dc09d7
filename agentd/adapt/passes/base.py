"""What every pass does, read from top to bottom: encode → learn → gate → stage. How it learns is the engine's matter.

Every step is written to the database before the act it describes. Any exception ends the pass as refused or failed;
serving never depends on it.
"""

import asyncio
import json
import logging
import math
import random
import shutil
import time
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from agentd.adapt.gate import gate, skills
from agentd.adapt.gate.answers import GateAnswers
from agentd.adapt.gate.drift_corpus import drift_corpus
from agentd.adapt.gate.skills import Baseline, Skill
from agentd.adapt.passes import parked
from agentd.adapt.passes.parked import Parked
from agentd.adapt.passes.progress import Progress
from agentd.adapt.planning import dataset as datasets
from agentd.adapt.planning import replay
from agentd.adapt.planning.dataset import Dataset, Member
from agentd.config.schema import Config
from agentd.engine.operations import (
    Abandon,
    Answer,
    Drift,
    Encode,
    Open,
    ScoreExamples,
    ScoreTexts,
    Unstage,
    Use,
)
from agentd.engine.process.supervisor import Supervisor
from agentd.engine.protocol import BASE, Scores
from agentd.errors import AgentdError, PassFailed, PassRefused
from agentd.ids import now
from agentd.learn.encoded import Encoded
from agentd.revision.files import RevisionFiles
from agentd.store import events, examples, passes, revisions, transitions
from agentd.store.database import Store
from agentd.store.revisions import Revision
from agentd.store.transitions import Learned

logger = logging.getLogger(__name__)

ENCODED = "encoded.jsonl"  # in a pass's folder: what the engine made of the examples
_PORTION = 4096  # tokens of held-out examples that are scored at a time, about
_SHORTEN, _SHORTENINGS = 0.6, 5  # what drifts too far is scaled by this at the least, so often at most
_SHORTER = 0.97  # of the scale at which it would drift as far as it may
CANDIDATE = "candidate"  # the name under which the engine holds what is not yet a revision


class Rejected(Exception):
    """The gate said no; the verdict is recorded already."""


@dataclass(frozen=True)
class Means:
    """What every attempt works with. `folder` is its own, and exists; `relearn`: it begins at the base, not at what
    serves. `parked` is what it goes on from after a restart."""

    config: Config
    store: Store
    engine: Supervisor
    files: RevisionFiles
    progress: Progress
    folder: Path
    seed: int
    baseline: Baseline
    relearn: bool = False
    parked: Parked | None = None


class Attempt(ABC):
    """One attempt to learn. `run` returns the staged revision, ready for its trial; it raises Rejected, AgentdError."""

    nll_weight: ClassVar[float]  # of an answer's own log-likelihood in the loss, beside the choice among answers
    staged: ClassVar[tuple[str, ...]] = (CANDIDATE,)  # names that the engine may hold when the pass ends
    parks: ClassVar[bool] = False  # whether it may go on after a restart
    improves: bool  # whether the candidate has to be better than what serves, or only no worse

    def __init__(self, means: Means) -> None:
        self._config, self._store, self._engine, self._files = means.config, means.store, means.engine, means.files
        self._progress, self._folder, self._seed = means.progress, means.folder, means.seed
        self._baseline = means.baseline
        self._parent = means.engine.revision  # what serves, which the candidate is compared with
        self._relearn = means.relearn
        self._parked = means.parked
        self.improves = not means.relearn
        self._origin = 0 if means.relearn else self._parent  # what the candidate is made from
        self._encoded: dict[int, Encoded] = {}  # what the engine made of the examples, by number
        self._rows: list[dict[str, Any]] = []  # of steps, not yet in the database
        self.learned = Learned()  # once the gate has judged it

    async def run(self, data: Dataset) -> int:
        await self._engine.call(Open())
        try:
            selected = data
            data = await self._encode(data)
            mixed, own = await self._with_replay(data, len(selected.members))
            if self.parks and self._parked is None:
                await asyncio.to_thread(parked.write, self._folder, selected, own)
            if self._origin != self._parent:
                await self._engine.call(Use(str(self._origin)))
            await self._learn(mixed)
            await self._advance("trained")
            verdict = await self._gate(data)
        finally:
            await self._close()
        # What was corrected since it was read, while the pass was planned or ran, stays new.
        learned = [member.example for member in data.of("train", "dev")]
        read = max((example.updated_at for example in learned), default=None)
        self.learned = Learned((*(example.id for example in learned), *data.undrawn), read)
        if not verdict.accepted:
            await self._reject(verdict.reason)
        return await self._stage(data, verdict)

    # --- what differs

    @abstractmethod
    async def _learn(self, data: Dataset) -> None:
        """Makes a candidate, starting from the origin, which the engine uses when this begins."""

    @abstractmethod
    async def _stage_candidate(self) -> None:
        """Gives the engine the candidate as it is now, under its name."""

    @abstractmethod
    async def _revision(self) -> tuple[dict[str, Path], dict[str, Any]]:
        """The new revision's files by name, and what its manifest says of how it was made: method, blocks, zo_steps."""

    async def _scale(self, factor: float) -> bool:
        """Takes this part of what was learned, for the candidate that is staged next; whether that can be done."""
        return False

    async def _drift(self) -> float | None:
        """KL(base ‖ candidate) in nats per token on text that has nothing to do with any task; None: the model reads
        no text."""
        return await self._engine.call(Drift(drift_corpus(), BASE, CANDIDATE))

    async def _skills(self) -> dict[str, Skill]:
        """What base and candidate can do besides their tasks; nothing where the model reads no text, or where no loss
        would matter."""
        if self._config.adapt.gate.max_skill_loss >= 1:
            return {}
        listed = skills.probes()
        texts = ScoreTexts([p.prompt for p in listed], [p.answers for p in listed], [p.chat for p in listed])
        if self._baseline.log_likelihoods is None:
            await self._engine.call(Use(BASE))
            self._baseline.log_likelihoods = await self._engine.call(texts)
        await self._engine.call(Use(CANDIDATE))
        after = await self._engine.call(texts)
        return skills.compare(self._baseline.log_likelihoods, after, self._seed)

    def _adapted(self, data: Dataset) -> set[str]:
        """The tasks on which the candidate has to be better."""
        return {member.example.task for member in data.of("train")}

    # --- the steps

    async def _encode(self, data: Dataset) -> Dataset:
        """The engine reads what the pass works on; the parent's weights are what it starts from."""
        self._progress.begin("tap", len(data.members), "reading the examples")
        source, target = self._folder / "examples.jsonl", self._folder / ENCODED
        data.write(source)
        await self._engine.call(Encode(source, target), self._count)
        learns, read = bool(data.of("train")), max((each.example.updated_at for each in data.members), default=None)
        data, self._encoded = await asyncio.to_thread(datasets.usable, data, target)
        roles = [(member.example.id, member.role) for member in data.members]
        await self._store.call(passes.add_examples, self._progress.id, roles)
        n_train, n_holdout = len(data.of("train", "dev")), len(data.of("holdout"))
        await self._store.call(passes.update, self._progress.id, n_train=n_train, n_holdout=n_holdout)
        for name, why in data.left_out.items():
            await self._event("left out", f"task {name}: {why}")
        if n := sum(member.recalled is not None for member in data.members):
            await self._event("recall", f"{n} of {n_train} training examples have past corrections in their prompts")
        if data.unusable:
            context = self._config.context
            await self._store.call(examples.set_aside, data.unusable, read, context, self._progress.id)
        if learns and not data.of("train"):
            raise PassRefused(f"none of the training examples can be used; {next(iter(data.unusable.values()))}")
        await self._engine.call(Use(str(self._parent)))
        return data

    async def _with_replay(self, data: Dataset, written: int) -> tuple[Dataset, list[Member]]:
        """With the model's own answers where no call is wanted, for tasks whose examples nearly all call; and these
        answers, among which some may be unusable. `written`: examples that the engine was given."""
        answered = await self._own_answers(data, written) if self._parked is None else list(self._parked.own)
        if not answered:
            return data, answered
        source, target = self._folder / "replay.jsonl", self._folder / ENCODED
        own = Dataset(answered, {}, objective=data.objective)
        own.write(source)
        await self._engine.call(Encode(source, target, more=True))
        own, encoded = await asyncio.to_thread(datasets.usable, own, target, written)
        self._encoded |= encoded
        await self._engine.call(Use(str(self._parent)))
        return replace(data, members=[*data.members, *own.members]), answered

    async def _own_answers(self, data: Dataset, written: int) -> list[Member]:
        """What the model says to messages that want no call."""
        asked = await asyncio.to_thread(replay.questions, data, self._seed)
        if not asked:
            return []
        self._progress.begin("tap", len(asked), "its own answers, where no call is wanted")
        source = self._folder / "replay.jsonl"
        await asyncio.to_thread(replay.write, asked, source)
        seconds = min(replay.SECONDS, self._config.adapt.gate.max_time)
        answers = await self._engine.call(Answer(source, list(range(len(asked))), seconds), self._count)
        own = replay.members(asked, answers, written)
        why = f"{len(own)} of the model's own answers in words are learned again beside calls"
        await self._event("replay", f"{why}; {len(asked)} messages that want no call were asked")
        return own

    async def _gate(self, data: Dataset) -> gate.Verdict:
        """Scores and answers holdout with what serves and with the candidate, in this engine."""
        holdout, settings = data.of("holdout"), self._config.adapt.gate
        answers = GateAnswers.of(data, self._folder / "answered.jsonl", self._seed)
        total = len(holdout) + len(answers.lines)
        self._progress.begin("gate", 2 * total, "holdout: what serves")
        portions = list(_portions(random.Random(self._seed).sample(holdout, len(holdout)), self._encoded))
        scored = await self._scores(portions, str(self._parent), 0, settings.max_time / 2)
        if len(scored) < len(holdout):
            many = f"{len(scored)} of {len(holdout)} held-out examples"
            await self._event("judged", f"{many} are judged: there was no time for more (adapt.gate.max_time)")
            holdout = [member for member in holdout if member.number in scored]
            portions = [portion for portion in portions if portion[0] in scored]
        chosen = await self._chosen(holdout, scored, settings.max_time / 2)
        spent = await answers.ask(
            self._engine, candidate=False, seconds=settings.max_time / 2, report=self._counting(len(holdout))
        )
        await self._stage_candidate()
        self._progress.message = "drift from the base"
        drift = await self._shorten(settings.max_drift)
        self._progress.message = "holdout: the candidate"
        rescored = await self._scores(portions, CANDIDATE, total)
        rechosen = await self._chosen(holdout, rescored, settings.max_time / 2)
        left = settings.max_time - spent
        await answers.ask(self._engine, candidate=True, seconds=left, report=self._counting(total + len(holdout)))
        self._progress.message = "skills that no task asks for"
        shown = await self._skills()
        before = answers.judged(self._outcomes(holdout, scored, chosen), holdout, candidate=False)
        after = answers.judged(self._outcomes(holdout, rescored, rechosen), holdout, candidate=True)
        adapted, no_calls = self._adapted(data), answers.no_calls()
        verdict = await asyncio.to_thread(
            lambda: gate.judge(
                before,
                after,
                adapted=adapted,
                drift=drift,
                gate=settings,
                seed=self._seed,
                no_calls=no_calls,
                skills=shown,
                improves=self.improves,
            )
        )
        for name, samples in answers.samples().items():
            verdict.tasks[name]["answers"] = samples
        accuracies = [f["after"]["accuracy"] for f in verdict.tasks.values() if f["after"]["accuracy"] is not None]
        self._progress.accuracy = accuracies[0] if accuracies else None
        await self._advance("gated", gate=verdict.as_json())
        return verdict

    async def _stage(self, data: Dataset, verdict: gate.Verdict) -> int:
        """Writes the revision: the pass's state, the files, its row. Files without a row go at the next start."""
        self._progress.begin("stage")
        number = await self._store.call(revisions.next_id)
        files, facts = await self._revision()
        await self._refuse_known_to_be_bad(files)
        await self._advance("staged", revision=number)
        created = now()
        manifest: dict[str, Any] = {
            "parent": self._origin,
            "pass": self._progress.id,
            "created_at": created,
            **facts,
            "tasks": verdict.figures,
            **({"skills": verdict.skills} if verdict.skills else {}),
            "n_train": len(data.of("train", "dev")),
            **({"instead_of": self._parent} if self._relearn else {}),
        }
        digest = await asyncio.to_thread(self._files.write, number, files, manifest)
        summary = {name: {"before": f["before"], "after": f["after"], "n": f["n"]} for name, f in verdict.tasks.items()}
        row = Revision(
            id=number,
            parent=self._origin,
            pass_id=self._progress.id,
            created_at=created,
            state="staged",
            reason=verdict.reason,
            method=facts["method"],
            blocks=facts["blocks"],
            manifest_sha256=digest,
            summary=summary,
        )
        await self._store.call(revisions.add, row)
        return number

    # --- helpers

    async def _shorten(self, limit: float) -> float | None:
        """Scales what was learned down until the candidate, which is staged, stays near the base on neutral text;
        returns its drift.

        A candidate that forgets too much would be rejected by the gate, and nothing of its examples be learned. The
        drift is all that is looked at: holdout judges one candidate, once.
        """
        drift, whole = await self._drift(), 1.0
        for _ in range(_SHORTENINGS):
            if drift is None or drift <= limit or not await self._scale(factor := shortening(drift, limit)):
                break
            whole *= factor
            message = f"drift {drift:.3f} nats per token; what was learned is scaled to {whole:.2f}"
            await self._event("shortened", message)
            await self._stage_candidate()
            drift = await self._drift()
        return drift

    async def _refuse_known_to_be_bad(self, files: dict[str, Path]) -> None:
        """What was rolled back once is not tried again unchanged."""
        known = [row.id for row in await self._store.call(revisions.all) if row.state == "rolled_back"]
        if (twin := await asyncio.to_thread(self._files.twin, files, known)) is not None:
            await self._reject(f"it is the same as revision {twin}, which was rolled back")

    async def _reject(self, reason: str) -> None:
        self._progress.state = "rejected"
        await self._store.call(transitions.reject, self._progress.id, reason, self.learned)
        raise Rejected(reason)

    async def _scores(
        self, portions: Sequence[list[int]], weights: str, done: int, seconds: float = math.inf
    ) -> dict[int, Scores]:
        """By number, of those for which there is time: after `seconds` no further portion is begun."""
        await self._engine.call(Use(weights))
        scores: dict[int, Scores] = {}
        deadline = time.monotonic() + seconds
        for numbers in portions:
            if scores and time.monotonic() > deadline:
                break
            some = await self._engine.call(ScoreExamples(numbers), self._counting(done + len(scores)))
            scores |= zip(numbers, some, strict=True)
        return scores

    async def _chosen(self, holdout: Sequence[Member], scores: Mapping[int, Scores], seconds: float) -> dict[int, bool]:
        """By number, whether the right choice is made where two are about as good. Of these a batch's scores do not say
        which one is served, so they are answered as they are served, with the weights in use."""
        near = [member for member in holdout if member.choices and gate.is_near_tie(scores[member.number])]
        if not near:
            return {}
        file = self._folder / "chosen.jsonl"
        lines = [{"input": each.example.input, "target": each.target, "choices": each.choices} for each in near]
        await asyncio.to_thread(file.write_text, "".join(f"{json.dumps(line)}\n" for line in lines), "utf-8")
        said = await self._engine.call(Answer(file, list(range(len(near))), seconds))
        answered = ((member, each) for member, each in zip(near, said, strict=True) if each is not None)
        return {member.number: each.text == member.target for member, each in answered if each.error is None}

    def _outcomes(
        self, holdout: Sequence[Member], scores: Mapping[int, Scores], chosen: Mapping[int, bool]
    ) -> dict[str, gate.Outcome]:
        in_order = [scores[member.number] for member in holdout]
        return gate.outcomes(holdout, self._encoded, in_order, self.nll_weight, chosen)

    async def _advance(self, state: str, **columns: Any) -> None:
        self._progress.state = state
        await self._store.call(passes.advance, self._progress.id, state, **columns)

    async def _event(self, kind: str, message: str, **data: Any) -> None:
        # What clients call their tasks belongs in the database, from which it can be forgotten.
        logger.info("pass %d: %s", self._progress.id, kind)
        await self._store.call(events.add, kind, message, pass_id=self._progress.id, data=data)

    async def _flush_steps(self) -> None:
        rows, self._rows = self._rows, []
        if rows:
            await self._store.call(passes.add_steps, self._progress.id, rows)

    async def _close(self) -> None:
        """Frees what the engine holds for the pass. An engine that died has freed it already."""
        await _quietly(self._engine.call(Abandon()))
        for name in self.staged:
            await _quietly(self._engine.call(Unstage(name)))

    def _count(self, done: int) -> None:
        self._progress.step = done

    def _counting(self, before: int) -> Callable[[int], None]:
        """Counts on from there."""
        return lambda done: self._count(before + done)


def _portions(members: Sequence[Member], encoded: Mapping[int, Encoded]) -> Iterator[list[int]]:
    """Their numbers, of about so many tokens at a time that it takes a minute or two where a board is slow."""
    numbers: list[int] = []
    tokens = 0
    for member in members:
        if tokens > _PORTION:
            yield numbers
            numbers, tokens = [], 0
        numbers.append(member.number)
        tokens += encoded[member.number].n_distinct
    yield numbers


async def _quietly(step: Awaitable[Any]) -> None:
    try:
        await step
    except AgentdError as error:
        logger.debug("while closing a pass: %s", error)


def shortening(drift: float, limit: float) -> float:
    """What to scale a candidate by that drifts further than `limit`: near the base drift grows as the square of the
    way, and what is taken away is taken from all that was learned."""
    return max(_SHORTEN, _SHORTER * math.sqrt(limit / drift)) if math.isfinite(drift) else _SHORTEN


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
