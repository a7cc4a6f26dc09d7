"""Tools change: examples that call what a task's requests no longer declare are set aside until they do again."""

import json
from typing import Any

from sqlite_utils import Database

from agentd.errors import InvalidRequest
from agentd.store import events
from agentd.store.demonstrations import MESSAGE, check_arguments
from agentd.store.row import to_json

DRIFTED, BACK = "schema drift", "schema drift over"
_REQUESTS = 50  # the newest of a task: what any of them declares is there
_NAMED = 5  # tools in an event

Tools = dict[str, list[dict[str, Any]]]
"""By name, the schemas of its parameters that requests declare."""


def review(db: Database) -> None:
    """Makes messages stale that call tools which are gone, or with arguments that these do not take any more, and those
    new again whose tools are back; says so once, in an event. A task without requests that declare tools is left."""
    held = "kind = ? AND state IN ('new', 'used', 'stale')"
    tasks = [task for (task,) in db.execute(f"SELECT DISTINCT task FROM examples WHERE {held}", [MESSAGE]).fetchall()]
    for task in tasks:
        tools = _declared(db, task)
        if not tools:
            continue
        rows = db.execute(f"SELECT id, target, state FROM examples WHERE task = ? AND {held}", [task, MESSAGE])
        gone: dict[str, list[str]] = {}
        back: dict[str, list[str]] = {}
        for id, target, state in rows.fetchall():
            unknown = _unknown(json.loads(target), tools)
            if unknown is not None and state != "stale":
                gone.setdefault(unknown, []).append(id)
            elif unknown is None and state == "stale":
                back.setdefault("", []).append(id)
        with db.atomic():
            _set(db, task, gone, "stale", DRIFTED)
            _set(db, task, back, "new", BACK)


def _declared(db: Database, task: str) -> Tools:
    belongs = "task = ?" if task != "default" else "(task IS NULL OR task = ?)"
    newest = f"SELECT input FROM inferences WHERE {belongs} ORDER BY rowid DESC LIMIT ?"
    tools: Tools = {}
    for (text,) in db.execute(newest, [task, _REQUESTS]):
        for tool in json.loads(text).get("tools", ()):
            schemas = tools.setdefault(tool["function"]["name"], [])
            if (parameters := tool["function"].get("parameters") or {}) not in schemas:
                schemas.append(parameters)
    return tools


def _unknown(message: dict[str, Any], tools: Tools) -> str | None:
    """The first tool that a message calls as it may not; None: it may."""
    for call in message.get("tool_calls") or ():
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
