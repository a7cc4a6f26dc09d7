"""Forgetting: taking feedback back, with what came of it, and naming the revisions that had learned from it."""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from sqlite_utils import Database

from agentd import faults
from agentd.errors import NotFound
from agentd.store import events, examples, inferences, passes, recall_index, revisions, scores, tasks
from agentd.store.examples import Example
from agentd.store.feedback import Feedback, weight_of
from agentd.store.feedback_targets import FeedbackTarget, target_on
from agentd.store.room import Priority, priority
from agentd.store.row import select, to_json

_FORGOTTEN = "(forgotten)"
_LENGTHS = {  # bytes of a row, about, with its places in indexes
    "inferences": "length(input) + length(output) + length(params) + 1000",
    "feedback": "length(value) + 1000",
    "examples": "length(input) + length(target) + 1000",
}
_HOLDING = ("staged", "trial", "committed", "rolled_back")  # states of revisions whose weights are still there


@dataclass(frozen=True)
class Selection:
    """What is to be forgotten: everything that any of these names. `tags` are name and text of one tag each.
    `keep_inferences`: answers stay that only feedback which goes was about; it was given by mistake."""

    feedback: tuple[str, ...] = ()
    inferences: tuple[str, ...] = ()
    examples: tuple[str, ...] = ()
    authors: tuple[str, ...] = ()
    tags: tuple[tuple[str, str], ...] = ()
    keep_inferences: bool = False


@dataclass(frozen=True)
class Forgotten:
    """What went: ids of rows, and the passes whose working files hold texts of it. `revisions` are those that learned
    from it and still exist; `inherited` those among them that have it from an ancestor only."""

    feedback: list[str] = field(default_factory=list)
    inferences: list[str] = field(default_factory=list)
    examples: list[str] = field(default_factory=list)
    passes: list[int] = field(default_factory=list)
    revisions: list[int] = field(default_factory=list)
    inherited: list[int] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        counts = {name: len(getattr(self, name)) for name in ("feedback", "inferences", "examples")}
        return {**counts, "passes": self.passes, "revisions": self.revisions, "inherited": self.inherited}


def look(db: Database, selection: Selection) -> Forgotten:
    """What `forget` would take away; changes nothing. Raises NotFound for unknown ids, and authors who left nothing."""
    feedback_ids = _feedback(db, selection)
    feedback_ids |= _ids(db, "SELECT id FROM feedback WHERE part_of IN (SELECT value FROM json_each(?))", feedback_ids)
    inference_ids = _inferences(db, selection, feedback_ids)
    # Whoever asks for an inference to be forgotten means all that was said about it.
    feedback_ids |= _ids(
        db, "SELECT id FROM feedback WHERE inference_id IN (SELECT value FROM json_each(?))", inference_ids
    )
    learned = _examples(db, selection, feedback_ids, inference_ids)
    passes = _numbers(
        db, "SELECT DISTINCT pass_id FROM pass_examples WHERE example_id IN (SELECT value FROM json_each(?))", learned
    )
    direct = set(
        _numbers(
            db,
            "SELECT DISTINCT revisions.id FROM revisions JOIN pass_examples USING (pass_id)"
            " WHERE role != 'holdout' AND example_id IN (SELECT value FROM json_each(?))",
            learned,
        )
    )
    every = revisions.all(db)
    tainted = set(direct)
    for row in every:  # parents come before their children
        if row.parent in tainted:
            tainted.add(row.id)
    there = {row.id for row in every if row.state in _HOLDING}
    return Forgotten(
        feedback=sorted(feedback_ids),
        inferences=sorted(inference_ids),
        examples=sorted(learned),
        passes=passes,
        revisions=sorted(tainted & there),
        inherited=sorted((tainted - direct) & there),
    )


def size(db: Database, forgotten: Forgotten) -> int:
    """Bytes that the log of `forget` takes, about: what is deleted is overwritten."""
    total = 0
    for table, length in _LENGTHS.items():
        statement = f"SELECT coalesce(sum({length}), 0) FROM {table} WHERE id IN (SELECT value FROM json_each(?))"
        total += db.execute(statement, [to_json(getattr(forgotten, table))]).fetchone()[0] * 5 // 4
    return total


@priority(Priority.DELETING)
def forget(db: Database, selection: Selection, weights: Mapping[str, float] | None = None) -> Forgotten:
    """Deletes it. An example that others have vouched for too keeps their latest answer, with the weight that their
    sources have by `weights`, as `feedback.add` takes them.

    Raises NotFound for unknown ids, and authors who left nothing. Revisions stay, marked; see `adapt.rebuild`.
    """
    forgotten = look(db, selection)
    with db.atomic():
        named = _tasks_of(db, forgotten)
        for id in forgotten.revisions:
            db.execute(
                "UPDATE revisions SET forgotten = forgotten + ? WHERE id = ?", [len(forgotten.examples) or 1, id]
            )
        for number in forgotten.passes:
            passes.forget_answers(db, number, set(forgotten.examples))
        gone = to_json(forgotten.feedback)
        rescored = scores.scored_by(db, gone)
        db.execute("DELETE FROM feedback WHERE id IN (SELECT value FROM json_each(?))", [gone])
        inferences.forget_recalled(db, forgotten.examples)
        for example in select(
            db, Example, "WHERE id IN (SELECT value FROM json_each(?))", [to_json(forgotten.examples)]
        ):
            if example.id in selection.examples or not _answered(db, example, weights):
                db.execute("DELETE FROM examples WHERE id = ?", [example.id])
        if forgotten.examples:
            recall_index.compact(db)
        inference_ids = to_json(forgotten.inferences)
        db.execute("DELETE FROM inferences WHERE id IN (SELECT value FROM json_each(?))", [inference_ids])
        for inference_id in rescored:  # others may have judged the answer before
            scores.restate(db, inference_id)
        for name in named:
            _forget_labels(db, name)
        for counter in ("example_counts", "feedback_counts"):  # their rows name tasks and labels
            db.execute(f"DELETE FROM {counter} WHERE n = 0")
        faults.change("feedback forgotten")
        events.add(
            db, "forgotten", _told(forgotten), data={"revisions": forgotten.revisions, "passes": forgotten.passes}
        )
    return forgotten


@priority(Priority.DELETING)
def forget_some(
    db: Database,
    selection: Selection,
    forgotten: Forgotten,
    limit: int,
    weights: Mapping[str, float] | None = None,
) -> bool:
    """Deletes some `limit` bytes of `forgotten`, which `look` returned for the selection; False once nothing is left.
    For a disk without room for the log of all of it: where that ends half-way, it goes on when it is asked for again.
    """
    theirs = "EXISTS (SELECT 1 FROM feedback WHERE example_id = examples.id)"  # goes, or stays, with that feedback
    for table, length in _LENGTHS.items():
        also = f" AND (NOT {theirs} OR id IN (SELECT value FROM json_each(:named)))" if table == "examples" else ""
        rows = db.execute(
            f"SELECT id, {length} FROM {table} WHERE id IN (SELECT value FROM json_each(:ids)){also} LIMIT 200",
            {"ids": to_json(getattr(forgotten, table)), "named": to_json(list(selection.examples))},
        ).fetchall()
        total = 0
        ids: list[str] = []
        for id, of_row in rows:
            total += of_row
            if ids and total > limit:
                break
            ids.append(id)
        if ids:
            named: dict[str, Any] = {table: tuple(ids)}
            forget(db, Selection(**named, keep_inferences=selection.keep_inferences), weights)
            return True
    return False


def clean_ancestor(db: Database, revision: int) -> int:
    """The nearest revision on the way to the base that holds nothing forgotten and may serve."""
    for id in revisions.lineage(db, revision):
        row = revisions.get(db, id)
        if row.state in ("base", "committed") and row.forgotten == 0:
            return id
    return 0


def discard_holders(db: Database, reason: str) -> list[int]:
    """Gives up every revision that holds something forgotten, and makes what its pass learned new again.

    Returns the revisions. The serving one must not be among them any more.
    """
    holders = [row for row in revisions.all(db) if row.forgotten and row.state in ("committed", "rolled_back")]
    with db.atomic():
        for row in holders:
            revisions.set_state(db, row.id, "discarded", reason)
            db.execute(
                "UPDATE examples SET state = 'new' WHERE state = 'used' AND id IN"
                " (SELECT example_id FROM pass_examples WHERE pass_id = ? AND role != 'holdout')",
                [row.pass_id],
            )
    return [row.id for row in holders]


def _feedback(db: Database, selection: Selection) -> set[str]:
    _require(db, "feedback", "feedback", selection.feedback)
    for author in selection.authors:  # a typing error must not pass for "nothing is left of them"
        tables = ("feedback", "inferences", "examples")
        if not any(
            db.execute(f"SELECT 1 FROM {table} WHERE author = ? LIMIT 1", [author]).fetchone() for table in tables
        ):
            raise NotFound("author", author)
    ids = set(selection.feedback)
    ids |= _ids(db, "SELECT id FROM feedback WHERE author IN (SELECT value FROM json_each(?))", selection.authors)
    for name, text in selection.tags:
        statement = "SELECT feedback.id FROM feedback, json_each(tags) AS tag WHERE tag.key = ? AND tag.value = ?"
        ids |= {id for (id,) in db.execute(statement, [name, text])}
    return ids


def _inferences(db: Database, selection: Selection, feedback_ids: set[str]) -> set[str]:
    """Those asked for, and those that only the feedback in `feedback_ids` was about: they hold its author's words."""
    _require(db, "inferences", "inference", selection.inferences)
    ids = set(selection.inferences)
    ids |= _ids(db, "SELECT id FROM inferences WHERE author IN (SELECT value FROM json_each(?))", selection.authors)
    if selection.keep_inferences:
        return ids
    return ids | _ids(
        db,
        "SELECT DISTINCT inference_id FROM feedback AS f WHERE inference_id IS NOT NULL"
        " AND id IN (SELECT value FROM json_each(?1)) AND NOT EXISTS (SELECT 1 FROM feedback AS other"
        " WHERE other.inference_id = f.inference_id AND other.id NOT IN (SELECT value FROM json_each(?1)))",
        feedback_ids,
    )


def _examples(db: Database, selection: Selection, feedback_ids: set[str], inference_ids: set[str]) -> set[str]:
    _require(db, "examples", "example", selection.examples)
    ids = set(selection.examples)
    inside = "IN (SELECT value FROM json_each(?))"
    ids |= _ids(db, f"SELECT DISTINCT example_id FROM feedback WHERE example_id NOT NULL AND id {inside}", feedback_ids)
    ids |= _ids(db, f"SELECT id FROM examples WHERE source_inference_id {inside}", inference_ids)
    return ids | _ids(db, f"SELECT id FROM examples WHERE author {inside}", selection.authors)


def _answered(db: Database, example: Example, weights: Mapping[str, float] | None) -> bool:
    """Gives the example the latest answer that others have vouched for, if there is one."""
    task = tasks.find(db, example.task)
    latest: tuple[FeedbackTarget, Feedback] | None = None
    weight = 0.0
    for other in select(db, Feedback, "WHERE example_id = ? AND state = 'accepted' ORDER BY rowid DESC", [example.id]):
        about = None if other.inference_id is None else inferences.get(db, other.inference_id)
        target = target_on(about, other.kind, other.value, task)
        if target is None:
            continue  # the task's choices are others now
        latest = latest or (target, other)
        if target == latest[0]:
            weight = max(weight, weight_of(db, other, weights))
    if latest is None:
        return False
    target, other = latest
    if (example.kind, example.target) == (target.kind, target.target):
        db.execute("UPDATE examples SET author = ?, weight = ? WHERE id = ?", [other.author, weight, example.id])
    else:
        now = target.kind, example.input, target.target, other.inference_id
        examples.put(db, examples.NewExample(example.task, *now, author=other.author, weight=weight))
    return True


def _tasks_of(db: Database, forgotten: Forgotten) -> list[str]:
    """The tasks of what is to go."""
    rows = db.execute(
        "SELECT task FROM examples WHERE id IN (SELECT value FROM json_each(?))"
        " UNION SELECT task FROM feedback WHERE id IN (SELECT value FROM json_each(?))"
        " UNION SELECT task FROM inferences WHERE id IN (SELECT value FROM json_each(?))",
        [to_json(forgotten.examples), to_json(forgotten.feedback), to_json(forgotten.inferences)],
    )
    return sorted(name for (name,) in rows if name is not None)


def _forget_labels(db: Database, name: str) -> None:
    """Takes back what feedback has declared and no one says any more: choices, and with the last of them the task."""
    task = tasks.find(db, name)
    if task is not None and task.source != "feedback":
        return
    tables = ("examples", "feedback", "inferences")
    if not any(db.execute(f"SELECT 1 FROM {table} WHERE task = ? LIMIT 1", [name]).fetchone() for table in tables):
        db.execute("DELETE FROM tasks WHERE name = ?", [name])
        _forget_name(db, name)
    elif task is not None and task.open:
        said = {
            label for (label,) in db.execute("SELECT target FROM examples WHERE task = ? AND kind = 'label'", [name])
        }
        choices = to_json([choice for choice in task.choices if choice in said])
        db.execute("UPDATE tasks SET choices = ? WHERE name = ?", [choices, name])


_TEXTS = {"passes": ("reason",), "revisions": ("reason",), "activations": ("reason",), "events": ("message",)}
"""Columns in which sentences may name a task."""


def _forget_name(db: Database, name: str) -> None:
    """Takes the name of a task that is gone out of what was written about it. It stays in the manifests of revisions,
    whose bytes their checksums vouch for."""
    pattern = re.compile(rf"(?<!\w){re.escape(name)}(?!\w)")
    for table, texts in _TEXTS.items():
        for column in texts:
            rows = db.execute(f"SELECT rowid, {column} FROM {table} WHERE instr({column}, ?)", [name]).fetchall()
            for rowid, text in rows:
                _set_text(db, table, column, rowid, pattern.sub(_FORGOTTEN, text))
    for rowid, text in db.execute("SELECT rowid, gate FROM passes").fetchall():
        gate = json.loads(text)
        if name in gate.get("tasks", {}):
            gate["tasks"] = _renamed(gate["tasks"], name)
            gate["reason"] = pattern.sub(_FORGOTTEN, str(gate.get("reason")))
            _set_text(db, "passes", "gate", rowid, to_json(gate))
    for rowid, text in db.execute("SELECT rowid, summary FROM revisions").fetchall():
        if name in (summary := json.loads(text)):
            _set_text(db, "revisions", "summary", rowid, to_json(_renamed(summary, name)))


def _renamed(tasks: dict[str, Any], name: str) -> dict[str, Any]:
    return {_FORGOTTEN if key == name else key: value for key, value in tasks.items()}


def _set_text(db: Database, table: str, column: str, rowid: int, text: str) -> None:
    db.execute(f"UPDATE {table} SET {column} = ? WHERE rowid = ?", [text, rowid])


def _told(forgotten: Forgotten) -> str:
    feedback, examples, inferences = map(len, (forgotten.feedback, forgotten.examples, forgotten.inferences))
    text = f"{feedback} feedback, {examples} examples, {inferences} inferences"
    if not forgotten.revisions:
        return f"{text}; no revision had learned from them"
    return f"{text}; revisions that learned from them: {', '.join(map(str, forgotten.revisions))}"


def _require(db: Database, table: str, noun: str, ids: Iterable[str]) -> None:
    for id in ids:
        if db.execute(f"SELECT 1 FROM {table} WHERE id = ?", [id]).fetchone() is None:
            raise NotFound(noun, id)


def _ids(db: Database, statement: str, values: Iterable[str]) -> set[str]:
    return {id for (id,) in db.execute(statement, [to_json(list(values))])}


def _numbers(db: Database, statement: str, values: Iterable[str]) -> list[int]:
    return sorted(number for (number,) in db.execute(statement, [to_json(list(values))]))
