"""The examples of a pass: which ones, in which role, and their tokens."""

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

from sqlite_utils import Database

from agentd.config.schema import GateSettings
from agentd.errors import PassRefused
from agentd.learn.encoded import LIKELIHOOD, METRIC, UNLIKELIHOOD, Encoded
from agentd.learn.metrics import resolved
from agentd.store import examples, selection, tasks
from agentd.store.demonstrations import MESSAGE
from agentd.store.examples import Example
from agentd.store.tasks import PREFERENCE, SCORE, THUMB, Task

_HELD_OUT_EVERY = 5  # examples, see store/examples.py
_DEV_EVERY = 8  # one training example in eight judges the training itself; the gate's holdout stays untouched

_TOLD_APART = 0.02  # standard deviations from the mean of a task's scores; what is nearer says nothing
_GOOD = 0.5  # of a score from 0 to 1


@dataclass(frozen=True)
class Member:
    """An example in its role: `train`, `dev`, `holdout`, or `replay`, which is the model's own (replay.py). `number` is
    its place in the engine's session; `established` that it judged an earlier revision that was committed. `advantage`
    says of a scored answer how much better it is than the task's others, from -1 to 1; `whole` that a text comes to its
    end; `recalled` is what stands in its prompt besides, {"turns", "tokens"} as engine.protocol.Recalled has them."""

    number: int
    example: Example
    role: str
    task: Task
    established: bool = False
    advantage: float = 1.0
    whole: bool = True
    recalled: dict[str, Any] | None = None

    @property
    def choices(self) -> list[str]:
        """Labels are told apart; a demonstration is learned as text, in any task."""
        return self.task.choices if self.example.kind == "label" else []

    @property
    def answered(self) -> bool:
        """Whether the right answer is known, and others are wrong. Answers that were only compared or judged say how
        likely they should be: an answer to the same input that is generated is neither right nor wrong by them."""
        return self.example.kind not in (PREFERENCE, THUMB, SCORE)

    @property
    def target(self) -> str | dict[str, Any]:
        """The answer that is learned, or of what was judged the one that was given: a text, or a message."""
        target: str | dict[str, Any] = self.as_line()["target"]
        return target

    def as_line(self) -> dict[str, Any]:
        """As the engine encodes it: {"input", "choices", "target"}, of a preference "rejected", of what was judged
        "objective" and "weight", "whole", "recalled". Target and rejected are texts or assistant messages."""
        example = self.example
        line: dict[str, Any] = {"input": example.input, "choices": self.choices}
        if not self.whole:
            line["whole"] = False
        if self.recalled is not None:
            line["recalled"] = self.recalled
        if example.kind == PREFERENCE:
            pair = json.loads(example.target)
            return {**line, "target": pair["chosen"], "rejected": pair["rejected"]}
        if example.kind in (THUMB, SCORE):
            judged = json.loads(example.target)
            good = judged["good"] if example.kind == THUMB else self.advantage > 0
            objective = LIKELIHOOD if good else UNLIKELIHOOD
            return {**line, "target": judged["answer"], "objective": objective, "weight": abs(self.advantage)}
        return {**line, "target": json.loads(example.target) if example.kind == MESSAGE else example.target}

    @property
    def answers(self) -> set[str]:
        """The texts of all answers that are told apart or learned; a message is as long as its JSON."""
        texts = [*self.choices, self.target, self.as_line().get("rejected", "")]
        return {answer if isinstance(answer, str) else json.dumps(answer, ensure_ascii=False) for answer in texts} - {
            ""
        }


@dataclass(frozen=True)
class Dataset:
    """`left_out` has reasons by task, `unusable` those of examples that could not be encoded, by their ids; `undrawn`
    are ids of examples that had their turn, and whose weight was drawn against them or whose score says nothing;
    `objective` is LIKELIHOOD, or METRIC for what is learned of right answers. Holdout is judged alike by either."""

    members: list[Member]
    left_out: dict[str, str]
    unusable: dict[str, str] = field(default_factory=dict)
    undrawn: Sequence[str] = ()
    objective: str = LIKELIHOOD

    def of(self, *roles: str) -> list[Member]:
        return [member for member in self.members if member.role in roles]

    @property
    def metrics(self) -> dict[str, str]:
        """By task, how its answers are judged."""
        calls = {member.task.name for member in self.members if member.example.kind == MESSAGE}
        tasks = {member.task.name: member.task for member in self.members}
        return {
            name: resolved(task.metric, choices=bool(task.choices), calls=name in calls) for name, task in tasks.items()
        }

    def write(self, path: Path) -> None:
        """As the engine's session reads it, a member a line."""
        with path.open("w", encoding="utf-8") as file:
            for member in self.members:
                line = member.as_line()
                if self.objective == METRIC and member.answered and member.role != "holdout":
                    line["objective"] = METRIC
                file.write(json.dumps(line, ensure_ascii=False) + "\n")


@dataclass(frozen=True)
class TaskReadiness:
    """What a task with training examples has for a pass.

    new       new training examples that a pass would draw, which is the sum of their weights
    held_out  examples that judge it, counted up to `gate.min_holdout`
    learned   whether a pass has learned from it before
    waits     why a pass could not adapt it now, None if it could
    lacking   held-out examples that are missing
    """

    new: float
    held_out: int
    learned: bool
    waits: str | None = None
    lacking: int = 0


@dataclass(frozen=True)
class Readiness:
    """What a pass would find, by task."""

    tasks: dict[str, TaskReadiness]

    @property
    def new(self) -> int:
        """New training examples that a pass could learn from and judge."""
        return int(math.fsum(task.new for task in self.tasks.values() if not task.waits) + 1e-6)

    @property
    def ready(self) -> list[str]:
        """The tasks that a pass could adapt."""
        return [name for name, task in self.tasks.items() if not task.waits]

    @property
    def waiting(self) -> dict[str, str]:
        """By task, why a pass could not adapt it."""
        return {name: task.waits for name, task in self.tasks.items() if task.waits}

    def missing(self, min_examples: int) -> dict[str, dict[str, Any]]:
        """By task, what is missing until a pass with it starts by itself: {"more": about how many examples, or None
        where their number is not what is missing, "until": "first pass" or "next pass", "reason"}. A task that misses
        nothing is not there."""
        missing: dict[str, dict[str, Any]] = {}
        for name, task in self.tasks.items():
            among = self.new + (task.new if task.waits else 0.0)
            to_learn = max(0, math.ceil((min_examples - among) * _HELD_OUT_EVERY / (_HELD_OUT_EVERY - 1) - 1e-6))
            more: int | None = max(to_learn, _HELD_OUT_EVERY * task.lacking)
            if task.waits and not task.lacking:
                more = None
            if more != 0:
                until = "next pass" if task.learned else "first pass"
                missing[name] = {"more": more, "until": until, "reason": task.waits}
        return missing


def readiness(db: Database, gate: GateSettings) -> Readiness:
    """The one rule for whether a pass starts and what it takes. A task is adapted only if enough holdout can tell
    whether that helped, and if there is something to tell apart."""
    known = {task.name: task for task in tasks.all(db)}
    new = examples.expected_new(db)
    by_task: dict[str, TaskReadiness] = {}
    for name, counts in sorted(examples.count(db).items()):
        if not sum(counts["train"].values()):
            continue
        n = selection.held_out(db, name, gate.min_holdout)
        waits = None
        if n < gate.min_holdout:
            waits = f"{n} are held out, gate.min_holdout asks for {gate.min_holdout}"
        elif known[name].choices and not selection.tells_apart(db, name):
            waits = "all its training examples have the same label"
        learned = counts["train"]["used"] > 0
        by_task[name] = TaskReadiness(new.get(name, 0.0), n, learned, waits, max(0, gate.min_holdout - n))
    return Readiness(by_task)


def select(db: Database, *, limit: int, seed: int, gate: GateSettings, relearn: bool = False) -> Dataset:
    """Takes what a pass learns from, and what judges it.

    Examples of tasks that are not ready wait, and take no other's place. Every task with holdout is judged, adapted or
    not. With `relearn` the pass begins at the base: what was learned before is learned again, ready or not, and has no
    smaller share than what is new. Raises PassRefused when nothing can be learned, or be judged.
    """
    known = {task.name: task for task in tasks.all(db)}
    ready = readiness(db, gate)
    left_out = {name: why for name, why in ready.waiting.items() if not (relearn and ready.tasks[name].learned)}
    if relearn and not ready.ready:
        why = "; ".join(f"task {name}: {reason}" for name, reason in ready.waiting.items())
        raise PassRefused(f"no task could be judged: {why or 'there are no examples'}")
    draw = selection.for_relearning if relearn else selection.for_training
    drawn = draw(db, limit, seed, [name for name in known if name not in left_out])
    old = selection.established(db)
    holdout = {name: selection.holdout(db, name, gate.max_holdout, old.get(name, set())) for name in known}
    roles = [(example, "dev" if is_dev(example.text_key) else "train") for example in drawn.examples]
    roles += [(example, "holdout") for name in sorted(holdout) for example in holdout[name]]
    members = _members(roles, known, old)
    taken = {member.example.id for member in members}
    silent = [example.id for example in drawn.examples if example.id not in taken]  # had their turn, too
    dataset = Dataset(members, left_out, undrawn=[*drawn.undrawn, *silent])
    if not dataset.of("train"):
        why = "; ".join(f"task {name}: {reason}" for name, reason in left_out.items())
        raise PassRefused(f"there is nothing to learn from: {why or 'no training examples'}. Send more feedback")
    return dataset


def judging(db: Database, gate: GateSettings) -> Dataset:
    """The holdout of every task that has enough of it, and nothing to learn from; it may be empty."""
    known = {task.name: task for task in tasks.all(db)}
    old = selection.established(db)
    holdout = {name: selection.holdout(db, name, gate.max_holdout, old.get(name, set())) for name in sorted(known)}
    enough = [held for held in holdout.values() if len(held) >= gate.min_holdout]
    return Dataset(_members([(example, "holdout") for held in enough for example in held], known, {}), {})


def _members(
    roles: Sequence[tuple[Example, str]], known: Mapping[str, Task], old: Mapping[str, set[str]]
) -> list[Member]:
    """Numbered in this order, without those whose score says nothing."""
    scores: dict[tuple[str, bool], list[float]] = {}
    for example, role in roles:
        if example.kind == SCORE:
            scores.setdefault((example.task, role == "holdout"), []).append(json.loads(example.target)["score"])
    members: list[Member] = []
    for example, role in roles:
        advantage = 1.0
        if example.kind == SCORE:
            among = scores.get((example.task, False)) or scores[example.task, True]
            advantage = _advantage(json.loads(example.target)["score"], among)
            if abs(advantage) < _TOLD_APART:
                continue
        established = role == "holdout" and example.id in old.get(example.task, ())
        members.append(Member(len(members), example, role, known[example.task], established, advantage))
    return members


def _advantage(score: float, scores: Sequence[float]) -> float:
    """How many standard deviations a score is above the mean of its task's, from -1 to 1. Scores that are all the same
    have no better and worse: there those from one half on are good."""
    largest = max(map(abs, scores), default=0.0) or 1.0
    scaled = [each / largest for each in scores]  # the square of a finite number need not be one
    deviation = statistics.pstdev(scaled)
    if deviation < 1e-9:
        return 1.0 if score >= _GOOD else -1.0
    return max(-1.0, min(1.0, (score / largest - statistics.fmean(scaled)) / deviation))


def is_dev(text_key: str) -> bool:
    """Whether a training example judges the training; like the split, for life, from other digits of its text's key."""
    return int(text_key[8:16], 16) % _DEV_EVERY == 0


def usable(dataset: Dataset, path: Path, first: int = 0) -> tuple[Dataset, dict[int, Encoded]]:
    """The dataset without what could not be encoded, and what the engine wrote of every other member, by its number;
    `first` is the line on which they begin."""
    encoded: dict[int, Encoded] = {}
    members = []
    unusable: dict[str, str] = {}
    with path.open(encoding="utf-8") as lines:
        for member, line in zip(dataset.members, islice(lines, first, None), strict=True):
            tree = json.loads(line)
            if "error" in tree:
                unusable[member.example.id] = tree["error"]
            else:
                encoded[member.number] = Encoded.from_json(tree)
                members.append(member)
    return replace(dataset, members=members, unusable=unusable), encoded
