"""Tasks: what there is to learn. Declared in the configuration, or by the first feedback that names one."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from sqlite_utils import Database

from agentd import ids
from agentd.errors import Conflict, InvalidRequest, LabelNotInChoices, NotFound
from agentd.learn.labels import normal_label
from agentd.store.normalise import label_key, same_label
from agentd.store.row import Row, columns, insert, select, to_json

PREFERENCE, THUMB, SCORE = _PROVISIONAL = ("preference", "thumb", "score")
"""Kinds of examples that compare or judge answers, and say nothing about what answers the task has."""


@dataclass(frozen=True)
class Task(Row):
    """A task. Without `choices` its answers are free text or calls; `open` choices grow with every new label. `metric`
    is how answers are judged, see `learn.metrics`. `meaning` says of labels since when they mean what they do ("since":
    {label: day}), and until when that has been looked at ("settled": day), see meanings.py."""

    table = "tasks"

    name: str
    choices: list[str]
    open: bool
    metric: str
    prompt: str | None
    source: str
    created_at: str
    meaning: dict[str, Any] = field(default_factory=dict)


def find(db: Database, name: str) -> Task | None:
    rows = select(db, Task, "WHERE name = ?", [name])
    return rows[0] if rows else None


def get(db: Database, name: str) -> Task:
    """Raises NotFound."""
    if task := find(db, name):
        return task
    raise NotFound("task", name)


def all(db: Database) -> list[Task]:
    return select(db, Task, "ORDER BY name")


def declare(db: Database, task: Task) -> None:
    """Adds the task or replaces its declaration; what feedback declares never replaces what the configuration did.

    Examples whose label is no longer one of the choices become stale; they come back with their choice.
    """
    known = find(db, task.name)
    if known is None:
        insert(db, task)
        return
    if known.source == "config" and task.source != "config":
        return
    update(db, known, choices=task.choices, open=task.open, metric=task.metric, prompt=task.prompt, source=task.source)
    if not task.open:
        gone = "task = ? AND kind = 'label' AND target NOT IN (SELECT value FROM json_each(?))"
        parameters = [task.name, to_json(task.choices)]
        db.execute(f"UPDATE examples SET state = 'stale' WHERE state IN ('new', 'used') AND {gone}", parameters)
        readmit(db, task.name, task.choices)


def edit(db: Database, name: str, merge: Mapping[str, str], remove: Sequence[str]) -> tuple[Task, dict[str, int]]:
    """Takes choices away: with `merge` the examples of each old label get the new one, which is added if need be, with
    `remove` they become stale. Returns the task and how many examples were relabelled and set aside.

    Raises NotFound for an unknown task, InvalidRequest for labels that it does not have, and Conflict where the
    configuration declares it.
    """
    task = get(db, name)
    if task.source == "config":
        raise Conflict(f"task {name!r} is declared in the configuration; change its choices there")
    gone = [*merge, *remove]
    if unknown := [label for label in gone if label not in task.choices]:
        raise InvalidRequest(f"task {name!r} has no choice {unknown[0]!r}; it has {to_json(task.choices)}")
    if twice := [label for label in merge.values() if label in gone]:
        raise InvalidRequest(f"{twice[0]!r} would be taken away and kept")
    choices = [choice for choice in task.choices if choice not in gone]
    targets: dict[str, str] = {}
    for old, new in merge.items():
        target = same_label(new, choices) or normal_label(new)
        if not target:
            raise InvalidRequest("a label must have something to read in it")
        targets[old] = target
        if target not in choices:
            choices.append(target)
    of_label = "WHERE task = ? AND kind = 'label' AND target = ?"
    relabelled = set_aside = 0
    since = dict(task.meaning.get("since", {}))
    for old, target in targets.items():
        day = since.pop(old, "")
        statement = f"UPDATE examples SET target = ?, state = 'new', updated_at = ? {of_label} AND updated_at >= ?"
        relabelled += db.execute(statement, [target, ids.now(), name, old, day]).rowcount
        if day:  # what was said before, with the other meaning, stays aside under the new name
            db.execute(f"UPDATE examples SET target = ? {of_label}", [target, name, old])
            since[target] = max(day, since.get(target, ""))
    for label in remove:
        statement = f"UPDATE examples SET state = 'stale' {of_label} AND state IN ('new', 'used')"
        set_aside += db.execute(statement, [name, label]).rowcount
    meaning = {**task.meaning, "since": since} if task.meaning else {}
    return update(db, task, choices=choices, meaning=meaning), {"relabelled": relabelled, "set_aside": set_aside}


def admit(db: Database, name: str, kind: str, target: str, choices: Sequence[str] | None = None) -> tuple[Task, str]:
    """The task `name` after an example of `kind` with this target: declared if it is new, grown if it is open.
    `choices` closes a task that is new or open. Returns the target as it is to be stored, too: a label that is one of
    the choices but for case, blanks or composed accents is that choice.

    A task that has been declared by nothing but preferences, thumbs and scores gets choices with its first label; they
    become stale.

    Raises LabelNotInChoices, InvalidRequest, and Conflict for choices other than those the task has.
    """
    if not name:
        raise InvalidRequest("the name of a task must not be empty", param="task")
    if not target.strip():
        raise InvalidRequest(f"the value of a {kind} must have something to read in it", param="value")
    task = find(db, name)
    if kind == "label" and task is not None and _is_provisional(db, task):
        db.execute("UPDATE examples SET state = 'stale' WHERE task = ? AND state IN ('new', 'used')", [name])
        task = update(db, task, open=True, metric="accuracy")
    if kind in _PROVISIONAL and task is not None and (task.choices or task.open):
        raise InvalidRequest(
            f"the answers of task {name!r} are labels; pairs and judged answers are for free text", param="kind"
        )
    if kind != "label":
        if choices is not None:
            raise InvalidRequest("choices belong to a label, not to a demonstration", param="choices")
        return task or _declared(db, name, [], open=False), target
    if choices is not None:
        return _with_choices(db, task, name, target, choices)
    if (known := same_label(target, task.choices if task else [])) is not None and task is not None:
        return task, known
    label = normal_label(target)
    if not label:
        raise InvalidRequest("a label must have something to read in it", param="value")
    if task is None:
        return _declared(db, name, [label], open=True), label
    if task.open:
        readmit(db, name, [label])
        return update(db, task, choices=[*task.choices, label]), label
    if task.choices:
        raise LabelNotInChoices(target, name, task.choices)
    raise InvalidRequest(
        f"the answers of task {name!r} are free text; give a demonstration, or name another task", param="kind"
    )


def _with_choices(db: Database, task: Task | None, name: str, target: str, choices: Sequence[str]) -> tuple[Task, str]:
    keys = {label_key(choice) for choice in choices}
    if len(choices) < 2 or len(keys) != len(choices) or "" in keys:
        raise InvalidRequest(
            "choices must be two or more texts that differ in more than case and blanks", param="choices"
        )
    known = task.choices if task else []
    named = [same_label(choice, known) or normal_label(choice) for choice in choices]
    label = same_label(target, named)
    if label is None:
        raise LabelNotInChoices(target, name, choices)
    if task is None:
        return _declared(db, name, named, open=False), label
    if task.open and set(known) <= set(named):
        readmit(db, name, named)
        return update(db, task, choices=named, open=False), label
    if set(known) != set(named):
        raise Conflict(f"task {name!r} has the choices {to_json(known)} already", param="choices")
    return task, label


def readmit(db: Database, name: str, labels: Sequence[str]) -> int:
    """Examples that were set aside with their choice come back with it, but for those from before it changed its
    meaning. Returns how many."""
    meant = (
        "SELECT day.value FROM tasks, json_each(tasks.meaning, '$.since') AS day"
        " WHERE tasks.name = examples.task AND day.key = examples.target"
    )
    statement = (
        "UPDATE examples SET state = 'new' WHERE state = 'stale' AND task = ? AND kind = 'label'"
        f" AND target IN (SELECT value FROM json_each(?)) AND updated_at >= coalesce(({meant}), '')"
    )
    return db.execute(statement, [name, to_json(list(labels))]).rowcount


def _is_provisional(db: Database, task: Task) -> bool:
    if task.source == "config" or task.choices or task.open:
        return False
    kinds = ", ".join(f"'{kind}'" for kind in _PROVISIONAL)
    cursor = db.execute(
        f"SELECT max(kind IN ({kinds})), max(kind NOT IN ({kinds})) FROM examples WHERE task = ?", [task.name]
    )
    judged, answered = cursor.fetchone()
    return bool(judged) and not answered


def _declared(db: Database, name: str, choices: list[str], *, open: bool) -> Task:
    task = Task(name, choices, open, "accuracy" if choices else "auto", None, "feedback", ids.now())
    insert(db, task)
    return task


def update(db: Database, task: Task, **changed: Any) -> Task:
    """The task with other values in some columns."""
    values = columns(Task, changed)
    assignments = ", ".join(f"{column} = :{column}" for column in values)
    db.execute(f"UPDATE tasks SET {assignments} WHERE name = :_name", {**values, "_name": task.name})
    return replace(task, **changed)
