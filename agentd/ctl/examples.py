"""Examples: what feedback became, and how much of it each task has."""

from typing import Annotated

import typer

from agentd.ctl import output
from agentd.ctl.client import Daemon
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
    Column("task", "task"),
    Column("new", "train.new", right=True),
    Column("used", "train.used", right=True),
    Column("holdout", "holdout", right=True),
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
    """How many examples each task has."""
    counts = Daemon(socket).get("/admin/status")["examples"]
    if as_json:
        output.document(counts)
    else:
        output.listing([{"task": task} | figures for task, figures in counts.items()], _TASKS)
