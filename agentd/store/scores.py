"""Scores: whether each answer that somebody judged was right as it was served, by its task's metric. Prequential:
predict, then learn. Counters by task, revision and day tell how that went over time; a table's triggers keep them, so
that no one who looks counts rows.
"""

import json
from dataclasses import dataclass
from typing import Any

from sqlite_utils import Database

from agentd.learn import metrics
from agentd.store import inferences, tasks
from agentd.store.demonstrations import MESSAGE
from agentd.store.feedback_targets import choice_of
from agentd.store.inferences import STREAMING, Inference
from agentd.store.room import Priority, priority
from agentd.store.tasks import Task

_JUDGING = ("label", "demonstration", "boolean", "preference")
"""Kinds of feedback that say whether an answer was right."""
_STATES = ("accepted", "duplicate")


@dataclass(frozen=True)
class Day:
    """Of the `n` answers that a revision gave to a task on one day (UTC) and that somebody judged, how many were
    right."""

    day: str
    revision: int
    n: int
    right: int

    def as_json(self) -> dict[str, Any]:
        return {"day": self.day, "revision": self.revision, "n": self.n, "right": self.right}


def restate(db: Database, inference_id: str) -> None:
    """Scores the answer by the latest feedback on itself that says whether it was right: with one that says so a score
    replaces the one before, without any there is none.

    What was only inferred from behaviour says what is wrong and never what is right, and what an episode came to is no
    verdict on one answer: both are left out. So is an answer of which the client has only the beginning, until it has
    the rest.
    """
    inference = inferences.find(db, inference_id)
    verdict = None if inference is None or inference.finish_reason == STREAMING else _verdict(db, inference)
    if inference is None or verdict is None:
        db.execute("DELETE FROM scores WHERE inference_id = ?", [inference_id])
        return
    feedback_id, task, right = verdict
    db.execute(
        "INSERT INTO scores (inference_id, feedback_id, task, revision, day, correct) VALUES (?, ?, ?, ?, ?, ?)"
        " ON CONFLICT (inference_id) DO UPDATE SET feedback_id = excluded.feedback_id, task = excluded.task,"
        " correct = excluded.correct",
        [inference_id, feedback_id, task, inference.revision, inference.created_at[:10], right],
    )


@priority(Priority.EXPENDABLE)
def record(db: Database, inference: Inference, begun: bool = False) -> bool:
    """Stores an answer, see `inferences.record`; one that was judged while it streamed is scored when it is whole."""
    stored = inferences.record(db, inference, begun)
    if inference.finish_reason != STREAMING and _is_judged(db, inference.id):
        restate(db, inference.id)
    return stored


def end_streams(db: Database) -> None:
    """Scores what was judged of answers that a daemon which is gone was giving: no more of them comes."""
    judged = "SELECT id FROM inferences WHERE finish_reason = ? AND id IN (SELECT inference_id FROM feedback)"
    ids = [id for (id,) in db.execute(judged, [STREAMING])]
    inferences.end_streams(db)
    for id in ids:
        restate(db, id)


def scored_by(db: Database, feedback_ids: str) -> list[str]:
    """The answers whose scores rest on this feedback, a JSON list of ids."""
    inside = "SELECT inference_id FROM scores WHERE feedback_id IN (SELECT value FROM json_each(?))"
    return [id for (id,) in db.execute(inside, [feedback_ids])]


def days(db: Database, task: str, limit: int) -> list[Day]:
    """The last `limit` days and revisions of a task in their order."""
    rows = db.execute(
        "SELECT day, revision, n, correct FROM score_counts WHERE task = ? ORDER BY day DESC, revision DESC LIMIT ?",
        [task, limit],
    )
    return [Day(*row) for row in rows][::-1]


def series(db: Database, limit: int) -> dict[str, list[Day]]:
    """`days` of every task that has any."""
    by_task = {task.name: days(db, task.name, limit) for task in tasks.all(db)}
    return {name: scored for name, scored in by_task.items() if scored}


def _verdict(db: Database, inference: Inference) -> tuple[str, str, bool] | None:
    """The feedback, the task and whether the answer was right."""
    on_itself = (
        "SELECT id, task, kind, value FROM feedback WHERE inference_id = ? AND part_of IS NULL AND source != 'implicit'"
        f" AND state IN {_STATES} AND kind IN {_JUDGING} ORDER BY rowid DESC"
    )
    for id, name, kind, value in db.execute(on_itself, [inference.id]):
        task = tasks.find(db, name) if name is not None else None
        if task is None:
            continue
        right = is_right(kind, json.loads(value), inference, task, calls=_has_calls(db, name))
        if right is not None:
            return id, name, right
    return None


def is_right(kind: str, value: Any, inference: Inference, task: Task, *, calls: bool) -> bool | None:
    """Whether feedback of this kind and value (as stored) says that the answer was right, by the task's metric; None
    where it does not say, as with a text that is judged by its loss. A thumb says so itself. `calls`: the task has
    examples with calls."""
    if kind == "boolean":
        return bool(value)
    metric = metrics.resolved(task.metric, choices=bool(task.choices or task.open), calls=calls)
    right = value["chosen"] if kind == "preference" else value
    if metric == "accuracy":
        named = choice_of(right, task)
        return None if named is None else choice_of(inference.output, task) == named
    if metric in metrics.GENERATED:
        return metrics.share_right(metric, inference.output, inference.tool_calls, right) == 1.0
    return None


def _is_judged(db: Database, inference_id: str) -> bool:
    return db.execute("SELECT 1 FROM feedback WHERE inference_id = ? LIMIT 1", [inference_id]).fetchone() is not None


def _has_calls(db: Database, task: str) -> bool:
    one = f"SELECT 1 FROM examples WHERE task = ? AND kind = '{MESSAGE}' LIMIT 1"
    return db.execute(one, [task]).fetchone() is not None
