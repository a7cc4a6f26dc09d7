"""Tools change: examples that call what a task's requests no longer declare are set aside until they do again."""

import json
from collections.abc import Callable
from typing import Any

from sqlite_utils import Database

from agentd.errors import InvalidRequest
from agentd.store import events, tasks
from agentd.store.demonstrations import MESSAGE, check_arguments, parameters_of
from agentd.store.row import to_json
from agentd.store.tasks import PREFERENCE, SCORE, THUMB

DRIFTED, BACK = "schema drift", "schema drift over"
_REQUESTS = 50  # the newest of a task: what any of them declares is there
_NAMED = 5  # tools in an event

_ANSWERS: dict[str, Callable[[Any], Any]] = {
    MESSAGE: lambda target: target,
    PREFERENCE: lambda target: target["chosen"],
    THUMB: lambda target: target["answer"],
    SCORE: lambda target: target["answer"],
}
"""By the kinds of examples that may call tools, the answer of a target that is learned or judged."""

Tools = dict[str, list[dict[str, Any]]]
"""By name, the schemas of its parameters that requests declare."""


def review(db: Database) -> None:
    """Makes examples stale whose answers call tools which are gone, or with arguments that these do not take any more,
    and those new again whose tools are back; says so once, in an event. A task without requests that declare tools is
    left."""
    held = "state IN ('new', 'used', 'stale') AND kind IN (SELECT value FROM json_each(?))"
    names = db.execute(f"SELECT DISTINCT task FROM examples WHERE {held}", [to_json([*_ANSWERS])]).fetchall()
    for (name,) in names:
        tools = _declared(db, name)
        if not tools:
            continue
        task = tasks.find(db, name)
        # What was only compared or judged before a task had choices is stale for another reason.
        kinds = [MESSAGE] if task is not None and (task.choices or task.open) else [*_ANSWERS]
        calling = f"SELECT id, kind, target, state FROM examples WHERE task = ? AND {held} AND instr(target, ?)"
        gone: dict[str, list[str]] = {}
        back: dict[str, list[str]] = {}
        for id, kind, target, state in db.execute(calling, [name, to_json(kinds), '"tool_calls"']).fetchall():
            unknown = _unknown(_ANSWERS[kind](json.loads(target)), tools)
            if unknown is not None and state != "stale":
                gone.setdefault(unknown, []).append(id)
            elif unknown is None and state == "stale":
                back.setdefault("", []).append(id)
        with db.atomic():
            _set(db, name, gone, "stale", DRIFTED)
            _set(db, name, back, "new", BACK)


def _declared(db: Database, task: str) -> Tools:
    belongs = "task = ?" if task != "default" else "(task IS NULL OR task = ?)"
    newest = f"SELECT input FROM inferences WHERE {belongs} ORDER BY rowid DESC LIMIT ?"
    tools: Tools = {}
    for (text,) in db.execute(newest, [task, _REQUESTS]):
        for tool in json.loads(text).get("tools", ()):
            schemas = tools.setdefault(tool["function"]["name"], [])
            if (parameters := parameters_of(tool["function"])) not in schemas:
                schemas.append(parameters)
    return tools


def _unknown(answer: Any, tools: Tools) -> str | None:
    """The first tool that an answer, a text or a message, calls as it may not; None: it may."""
    for call in answer.get("tool_calls") or () if isinstance(answer, dict) else ():
        name, arguments = call["function"]["name"], json.loads(call["function"]["arguments"])
        if not any(_fits(arguments, schema) for schema in tools.get(name, ())):
            return str(name)
    return None


def _fits(arguments: dict[str, Any], schema: dict[str, Any]) -> bool:
    try:
        check_arguments(arguments, schema, "")
    except InvalidRequest:
        return False
    return True


def _set(db: Database, task: str, drifted: dict[str, list[str]], state: str, event: str) -> None:
    ids = [id for some in drifted.values() for id in some]
    if not ids:
        return
    db.execute("UPDATE examples SET state = ? WHERE id IN (SELECT value FROM json_each(?))", [state, to_json(ids)])
    if event == BACK:
        events.add(db, event, f"task {task}: {len(ids)} examples take part again: the tools that they call are back")
        return
    names = sorted(drifted)
    listed = ", ".join(names[:_NAMED]) + (f" and {len(names) - _NAMED} more" if len(names) > _NAMED else "")
    what = f"task {task}: {len(ids)} examples are set aside: newer requests do not declare {listed} as they call it"
    events.add(db, event, what, data={"task": task, "examples": len(ids), "tools": names})
