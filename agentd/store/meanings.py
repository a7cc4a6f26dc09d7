"""Labels that have changed their meaning: examples from before would teach and judge what no one means any more."""

import json
from collections import Counter
from collections.abc import Iterable
from datetime import datetime, timedelta, timezone

from sqlite_utils import Database

from agentd import faults
from agentd.errors import InvalidRequest
from agentd.learn.concept_drift import JudgedAnswer, changed_places
from agentd.store import events, tasks
from agentd.store.feedback_targets import choice_of, feedback_target
from agentd.store.row import to_json
from agentd.store.tasks import Task

CHANGED, TAKEN_BACK = "labels changed", "labels not changed"
_WINDOW = 28  # days that are looked at
_ANSWERS = 2000  # judged ones of these, the newest


def review(db: Database) -> None:
    """Looks in the answers of the last weeks, as they were served and judged, for labels that have changed places, and
    sets aside the examples from before; says so in an event."""
    for task in tasks.all(db):
        if len(task.choices) < 2:
            continue
        start = (datetime.now(timezone.utc) - timedelta(days=_WINDOW)).date().isoformat()
        start = max(start, task.meaning.get("settled", ""))
        answers = list(_judged(db, task, start))
        if changed_places(answers, {}) is None:
            continue
        if drift := changed_places(answers, _served(db, task.name, start)):
            change(db, task, drift.labels, drift.day)


def change(db: Database, task: Task, labels: Iterable[str], day: str) -> tuple[Task, int]:
    """Sets aside what was said of these labels before a day (UTC, 2026-01-31), in place of any day before. Returns the
    task and how many examples that were. Raises InvalidRequest for labels that the task does not have."""
    labels = sorted(labels)
    if unknown := [label for label in labels if label not in task.choices]:
        raise InvalidRequest(f"task {task.name!r} has no choice {unknown[0]!r}; it has {to_json(task.choices)}")
    with db.atomic():
        since = {**task.meaning.get("since", {}), **dict.fromkeys(labels, day)}
        task = tasks.update(db, task, meaning={"since": since, "settled": day})
        tasks.readmit(db, task.name, labels)  # it may be an earlier day than was said before
        n = db.execute(
            "UPDATE examples SET state = 'stale' WHERE task = ? AND kind = 'label' AND state IN ('new', 'used')"
            " AND updated_at < ? AND target IN (SELECT value FROM json_each(?))",
            [task.name, day, to_json(labels)],
        ).rowcount
        what = f"since {day} {' and '.join(map(to_json, labels))} mean something else"
        data = {"task": task.name, "labels": labels, "since": day, "examples": n}
        events.add(db, CHANGED, f"task {task.name}: {what}; {n} examples from before are set aside", data=data)
        faults.change("labels changed")
    return task, n


def take_back(db: Database, task: Task) -> tuple[Task, int]:
    """Labels mean what they always did: examples that were set aside for that are new again, and what was said until
    today is no evidence of a change any more. Returns the task and how many examples came back."""
    with db.atomic():
        since, today = task.meaning.get("since", {}), datetime.now(timezone.utc).date().isoformat()
        task = tasks.update(db, task, meaning={"since": {}, "settled": today})
        n = tasks.readmit(db, task.name, [label for label in since if label in task.choices or task.open])
        if since:
            events.add(db, TAKEN_BACK, f"task {task.name}: {n} examples take part again", data={"task": task.name})
        faults.change("labels not changed")
    return task, n


def _judged(db: Database, task: Task, start: str) -> Iterable[JudgedAnswer]:
    """Answers since a day of which the right label is known."""
    newest = (
        "SELECT scores.day, correct, output, feedback.kind, value FROM scores"
        " JOIN inferences ON inferences.id = scores.inference_id JOIN feedback ON feedback.id = scores.feedback_id"
        " WHERE scores.task = ? AND scores.day >= ? ORDER BY scores.day DESC LIMIT ?"
    )
    for day, correct, output, kind, value in db.execute(newest, [task.name, start, _ANSWERS]):
        given = choice_of(output, task)
        target = feedback_target(kind, json.loads(value), output, task)
        right = given if correct else choice_of(target.target, task) if target else None
        if given is not None and right is not None:
            yield JudgedAnswer(day, given, right)


def _served(db: Database, task: str, start: str) -> Counter[str]:
    """By day, how many answers there were; only those are still there that were judged or are young enough."""
    counted = (
        "SELECT substr(created_at, 1, 10) AS day, count(*) FROM inferences"
        " WHERE task = ? AND created_at >= ? GROUP BY day"
    )
    return Counter(dict(db.execute(counted, [task, start]).fetchall()))
