"""Examples: what feedback became, and how much of it each task has."""

from typing import Annotated
from urllib.parse import quote

import typer

from agentd.ctl import accuracy, output
from agentd.ctl.client import JSON, Daemon
from agentd.ctl.errors import UsageError
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
    Column("answers", "answers", right=True),
    Column("accuracy", "accuracy", right=True),
    Column("latest", "latest", right=True),
    Column("recall", "recall.setting"),
    Column("on", "recall.on"),
    Column("corrections", "recall.k", right=True),
    Column("why", "recall.reason", wide=True),
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
    output.document(answer) if as_json else output.listing(answer["examples"], _EXAMPLES)


def tasks(context: typer.Context, as_json: Json = False, socket: Socket = None) -> None:
    """What there is to learn: each task's choices and examples, and how often its answers were right as served."""
    if context.invoked_subcommand is not None:
        return
    answer = Daemon(socket).get("/admin/tasks")
    if as_json:
        output.document(answer)
    else:
        rows = [_choices(row) | accuracy.overall(row["scores"]) for row in answer["tasks"]]
        output.listing(rows, _TASKS, empty="no tasks yet")
        if output.on_terminal():
            accuracy.draw({row["name"]: row["scores"] for row in answer["tasks"]})


def edit(
    task: Annotated[str, typer.Argument(metavar="TASK", help="The task's name.")],
    merge: Annotated[
        list[str] | None,
        typer.Option("--merge", metavar="OLD=NEW", help="Examples of OLD become NEW; repeatable."),
    ] = None,
    remove: Annotated[
        list[str] | None, typer.Option("--remove", metavar="LABEL", help="Set aside its examples; repeatable.")
    ] = None,
    as_json: Json = False,
    socket: Socket = None,
) -> None:
    """Take choices away that feedback has declared: merged into others, or removed with their examples."""
    if not merge and not remove:
        raise UsageError("name what to change: --merge OLD=NEW or --remove LABEL")
    pairs = [pair.partition("=") for pair in merge or []]
    if wrong := [old + new for old, sign, new in pairs if not (old and sign and new)]:
        raise UsageError(f"--merge takes OLD=NEW, not {wrong[0]!r}")
    body = {"merge": {old: new for old, _, new in pairs}, "remove": remove or []}
    answer = Daemon(socket).post(f"/admin/tasks/{quote(task, safe='')}", body)
    output.show(answer, as_json)


def meaning(
    task: Annotated[str, typer.Argument(metavar="TASK", help="The task's name.")],
    since: Annotated[
        str | None, typer.Option(metavar="DAY", help="What was said before, such as 2026-01-31 (UTC), is set aside.")
    ] = None,
    label: Annotated[
        list[str] | None, typer.Option("--label", metavar="LABEL", help="Of these alone; repeatable. Default: all.")
    ] = None,
    undo: Annotated[bool, typer.Option("--undo", help="They always meant what they do: examples come back.")] = False,
    as_json: Json = False,
    socket: Socket = None,
) -> None:
    """Say that labels have changed their meaning, or that they have not where agentd found so."""
    if undo == (since is not None) or (undo and label):
        raise UsageError("say --since DAY, for some with --label LABEL, or --undo")
    answer = Daemon(socket).post(
        f"/admin/tasks/{quote(task, safe='')}/meaning", {"since": since, "labels": label or []}
    )
    output.show(answer, as_json)


def recall(
    task: Annotated[str, typer.Argument(metavar="TASK", help="The task's name.")],
    setting: Annotated[str, typer.Argument(metavar="on|off|auto", help="auto: where it was shown to help.")],
    as_json: Json = False,
    socket: Socket = None,
) -> None:
    """Say whether past corrections are put into the task's prompts."""
    if setting not in ("on", "off", "auto"):
        raise UsageError(f"recall is on, off or auto, not {setting!r}")
    answer = Daemon(socket).post(f"/admin/tasks/{quote(task, safe='')}/recall", {"recall": setting})
    if as_json:
        output.document(answer)
    else:
        output.facts({"task": task, **answer["recall"]})


def _choices(row: JSON) -> JSON:
    """On a terminal, the choices as a person writes them; a pipe gets them as they are."""
    if not output.on_terminal():
        return row
    return row | {"choices": ", ".join(row["choices"]) or "(free text)"}
