"""Examples: what feedback became, and how much of it each task has."""

from typing import Annotated

import typer

from agentd.ctl import output
from agentd.ctl.client import JSON, Daemon
from agentd.ctl.options import Json, Limit, Offset, Socket, TaskFilter
from agentd.ctl.output import Column

_EXAMPLES = [
    Column("id", "id"),
    Column("updated", "updated_at"),
    Column("task", "task"),
    Column("kind", "kind"),
    Column("split", "split"),
    Column("state", "state"),
    Column("target", "target", wide=True),
    Column("input", "input", wide=True),
]
_TASKS = [
    Column("task", "name"),
    Column("choices", "choices", wide=True),
    Column("open", "open"),
    Column("metric", "metric"),
    Column("declared by", "source"),
    Column("new", "examples.train.new", right=True),
    Column("used", "examples.train.used", right=True),
    Column("holdout", "examples.holdout", right=True),
]


def examples(
    limit: Limit = 20,
    offset: Offset = 0,
    task: TaskFilter = None,
    split: Annotated[str | None, typer.Option(metavar="SPLIT", help="Only train, or only holdout.")] = None,
    as_json: Json = False,
    socket: Socket = None,
) -> None:
    """What passes learn from, and what is held out to judge them."""
    answer = Daemon(socket).get("/admin/examples", limit=limit, offset=offset, task=task, split=split)
    if as_json:
        output.document(answer)
    else:
        output.listing(answer["examples"], _EXAMPLES)


def tasks(as_json: Json = False, socket: Socket = None) -> None:
    """What there is to learn: each task's choices, and how many examples it has."""
    answer = Daemon(socket).get("/admin/tasks")
    if as_json:
        output.document(answer)
    else:
        output.listing([_choices(row) for row in answer["tasks"]], _TASKS, empty="no tasks yet")


def _choices(row: JSON) -> JSON:
    """On a terminal, the choices as a person writes them; a pipe gets them as they are."""
    if not output.on_terminal():
        return row
    return row | {"choices": ", ".join(row["choices"]) or "(free text)"}
