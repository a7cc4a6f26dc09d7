"""Taking feedback back: forget, rebuild, and out of quarantine."""

import sys
from typing import Annotated, Any

import typer

from agentd.ctl import output
from agentd.ctl.client import JSON, Daemon
from agentd.ctl.errors import UsageError
from agentd.ctl.options import Json, Socket, Yes

Inferences = Annotated[
    list[str] | None, typer.Option("--inference", metavar="ID", help="An answer and all said about it; repeatable.")
]
Examples = Annotated[list[str] | None, typer.Option("--example", metavar="ID", help="An example; repeatable.")]
Authors = Annotated[
    list[str] | None,
    typer.Option("--author", metavar="WHO", help="All that one user asked and said, such as uid:1000; repeatable."),
]
Tags = Annotated[
    list[str] | None, typer.Option("--tag", metavar="NAME=TEXT", help="Feedback with this tag; repeatable.")
]


def forget(
    feedback: Annotated[list[str] | None, typer.Argument(metavar="[ID]...", help="Ids of feedback.")] = None,
    inference: Inferences = None,
    example: Examples = None,
    author: Authors = None,
    tag: Tags = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would go.")] = False,
    yes: Yes = False,
    as_json: Json = False,
    socket: Socket = None,
) -> None:
    """Delete feedback with what came of it, and name the revisions that learned from it."""
    chosen = _selection(feedback, inference, example, author, tag)
    if chosen is None:
        raise UsageError("name what to forget: ids of feedback, --inference, --example, --author or --tag")
    daemon = Daemon(socket)
    if not dry_run:
        _confirm(daemon, chosen, yes, "forget")
    answer = daemon.post("/admin/forget", {**chosen, "dry_run": dry_run})
    output.show(answer, as_json)
    if answer["revisions"] and output.on_terminal() and not as_json:
        numbers = ", ".join(map(str, answer["revisions"]))
        output.say(f"revisions {numbers} have learned from it; `agentctl rebuild` learns again without it")


def rebuild(
    without: Annotated[
        list[str] | None, typer.Option("--without", metavar="ID", help="Feedback to forget before; repeatable.")
    ] = None,
    inference: Inferences = None,
    example: Examples = None,
    author: Authors = None,
    tag: Tags = None,
    yes: Yes = False,
    as_json: Json = False,
    socket: Socket = None,
) -> None:
    """Give up the revisions that learned from what is forgotten, and learn again without it."""
    daemon = Daemon(socket)
    chosen = _selection(without, inference, example, author, tag)
    if chosen is not None:
        _confirm(daemon, chosen, yes, "forget and rebuild without")
    elif not yes:
        _ask("the revisions that learned from what was forgotten would be given up", "rebuild")
    answer = daemon.post("/admin/rebuild", {} if chosen is None else {"without": chosen})
    output.show(answer, as_json)
    if output.on_terminal() and not as_json:
        started = answer["pass"]
        output.say("there is nothing to rebuild" if started is None else f"`agentctl pass {started} -f` follows it")


def release(
    feedback: Annotated[list[str], typer.Argument(metavar="ID...", help="Ids of quarantined feedback.")],
    as_json: Json = False,
    socket: Socket = None,
) -> None:
    """Let feedback out of quarantine, so that it is learned from."""
    answer = Daemon(socket).post("/admin/release", {"feedback": feedback})
    output.show(answer, as_json)


def _selection(
    feedback: list[str] | None,
    inferences: list[str] | None,
    examples: list[str] | None,
    authors: list[str] | None,
    tags: list[str] | None,
) -> JSON | None:
    for pair in tags or []:
        if "=" not in pair.lstrip("="):
            raise UsageError(f"--tag {pair!r} is not of the form NAME=TEXT")
    fields: dict[str, Any] = {
        "feedback": feedback,
        "inferences": inferences,
        "examples": examples,
        "authors": authors,
        "tags": dict(pair.split("=", 1) for pair in tags or []),
    }
    return {name: value for name, value in fields.items() if value} or None


def _confirm(daemon: Daemon, chosen: JSON, yes: bool, what: str) -> None:
    if yes:
        return
    result = daemon.post("/admin/forget", {**chosen, "dry_run": True})
    plan = f"{result['feedback']} feedback, {result['examples']} examples and {result['inferences']} answers would go"
    if result["revisions"]:
        plan += f"; revisions {', '.join(map(str, result['revisions']))} have learned from them"
    _ask(plan, what)


def _ask(plan: str, what: str) -> None:
    if not sys.stdin.isatty():
        raise UsageError(f"{plan}: add -y to {what} without being asked")
    typer.confirm(f"{plan}. Go on?", abort=True, err=True)
