"""Tasks: what there is to learn. Declared in the configuration, or by the first feedback that names one."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from sqlite_utils import Database

from agentd import ids
from agentd.errors import Conflict, InvalidRequest, LabelNotInChoices, NotFound
from agentd.store.row import Row, columns, insert, select, to_json


@dataclass(frozen=True)
class Task(Row):
    """A task. Without `choices` its answers are free text; `open` choices grow with every new label."""

    table = "tasks"

    name: str
    choices: list[str]
    open: bool
    metric: str
    prompt: str | None
    source: str
    created_at: str


def find(db: Database, name: str) -> Task | None:
    found = select(db, Task, "WHERE name = ?", [name])
    return found[0] if found else None


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
    _update(db, known, choices=task.choices, open=task.open, metric=task.metric, prompt=task.prompt, source=task.source)
    if not task.open:
        named = "task = ? AND kind = 'label' AND target {} (SELECT value FROM json_each(?))"
        parameters = [task.name, to_json(task.choices)]
        gone, back = named.format("NOT IN"), named.format("IN")
        db.execute(f"UPDATE examples SET state = 'stale' WHERE state IN ('new', 'used') AND {gone}", parameters)
        db.execute(f"UPDATE examples SET state = 'new' WHERE state = 'stale' AND {back}", parameters)


def admit(db: Database, name: str, kind: str, target: str, choices: Sequence[str] | None = None) -> Task:
    """The task `name` after an example of `kind` (label or demonstration) with this target: declared if it is new,
    grown if it is open. `choices` closes a task that is new or open.

    Raises LabelNotInChoices, InvalidRequest, and Conflict for choices other than those the task has.
    """
    if not name:
        raise InvalidRequest("the name of a task must not be empty", param="task")
    if not target:
        raise InvalidRequest(f"the value of a {kind} must not be empty", param="value")
    task = find(db, name)
    if kind == "demonstration":
        if choices is not None:
            raise InvalidRequest("choices belong to a label, not to a demonstration", param="choices")
        return task or _declared(db, name, [], open=False)
    if choices is not None:
        return _with_choices(db, task, name, target, choices)
    if task is None:
        return _declared(db, name, [target], open=True)
    if target in task.choices:
        return task
    if task.open:
        return _update(db, task, choices=[*task.choices, target])
    if task.choices:
        raise LabelNotInChoices(target, name, task.choices)
    raise InvalidRequest(
        f"the answers of task {name!r} are free text; give a demonstration, or name another task", param="kind"
    )


def _with_choices(db: Database, task: Task | None, name: str, target: str, choices: Sequence[str]) -> Task:
    if len(choices) < 2 or len(set(choices)) != len(choices) or "" in choices:
        raise InvalidRequest("choices must be two or more different texts", param="choices")
    if target not in choices:
        raise LabelNotInChoices(target, name, choices)
    if task is None:
        return _declared(db, name, list(choices), open=False)
    if task.open and set(task.choices) <= set(choices):
        return _update(db, task, choices=list(choices), open=False)
    if set(task.choices) != set(choices):
        raise Conflict(f"task {name!r} has the choices {to_json(task.choices)} already", param="choices")
    return task


def _declared(db: Database, name: str, choices: list[str], *, open: bool) -> Task:
    task = Task(name, choices, open, "accuracy" if choices else "loss", None, "feedback", ids.now())
    insert(db, task)
    return task


def _update(db: Database, task: Task, **changed: Any) -> Task:
    values = columns(Task, changed)
    assignments = ", ".join(f"{column} = :{column}" for column in values)
    db.execute(f"UPDATE tasks SET {assignments} WHERE name = :_name", {**values, "_name": task.name})
    return replace(task, **changed)
