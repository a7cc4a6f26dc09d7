"""Revisions: what is served, what was served when, and going back."""

import sys
from typing import Annotated

import typer

from agentd.ctl import accuracy, output
from agentd.ctl.client import JSON, Daemon, segment
from agentd.ctl.errors import CtlError, ExitCode, UsageError
from agentd.ctl.options import Json, Limit, Socket, Yes
from agentd.ctl.output import Column
from agentd.ctl.passes import list_skills

_ACTIVATIONS = [
    Column("at", "at"),
    Column("revision", "revision", right=True),
    Column("previous", "previous", right=True),
    Column("reason", "reason", wide=True),
]
_REVISIONS = [
    Column("revision", "id", right=True),
    Column("parent", "parent", right=True),
    Column("state", "state"),
    Column("serving", "serving"),
    Column("created", "created_at"),
    Column("pass", "pass_id", right=True),
    Column("method", "method"),
    Column("blocks", "blocks", right=True),
    Column("size", "size_bytes", right=True),
    Column("reason", "reason", wide=True),
]
_SUMMARY = [Column("task", "task"), *(Column(name, name, right=True) for name in ("before", "after", "n"))]

Revision = Annotated[int, typer.Argument(metavar="R", help="Number of a revision.", min=0)]


def history(limit: Limit = 20, as_json: Json = False, socket: Socket = None) -> None:
    """Which revision served when, why it changed, and how often each task's answers were right."""
    answer = Daemon(socket).get("/admin/history", limit=limit)
    if as_json:
        output.document(answer)
    else:
        output.listing(answer["activations"], _ACTIVATIONS, empty="revision 0, the base model, has always served")
        if output.on_terminal():
            accuracy.draw(answer["scores"])


def revisions(as_json: Json = False, socket: Socket = None) -> None:
    """Every revision there is; 0 is the base model."""
    answer = Daemon(socket).get("/admin/revisions")
    output.document(answer) if as_json else output.listing(answer["revisions"], _REVISIONS)


def show(revision: Revision, as_json: Json = False, socket: Socket = None) -> None:
    """One revision: its origin, what it improved, its files."""
    answer = Daemon(socket).get(f"/admin/revisions/{segment(revision)}")
    if as_json:
        output.document(answer)
    elif output.on_terminal():
        lineage = " ← ".join(str(ancestor) for ancestor in answer["lineage"])
        manifest = answer["manifest"] or {}
        skills = manifest.get("skills") or {}
        rest = {name: value for name, value in manifest.items() if name != "skills"}
        facts = {name: value for name, value in answer.items() if name != "summary"}
        output.facts(facts | {"manifest": rest, "lineage": lineage})
        rows = [{"task": task} | figures for task, figures in (answer["summary"] or {}).items()]
        if rows:
            print()
            output.listing(rows, _SUMMARY)
        list_skills(skills)
    else:
        output.facts(answer)


def diff(
    a: Annotated[int, typer.Argument(metavar="A", help="A revision.", min=0)],
    b: Annotated[int, typer.Argument(metavar="B", help="Another revision.", min=0)],
    as_json: Json = False,
    socket: Socket = None,
) -> None:
    """In what two revisions differ."""
    daemon = Daemon(socket)
    first, second = (daemon.get(f"/admin/revisions/{segment(revision)}") for revision in (a, b))
    if as_json:
        output.document({"a": first, "b": second})
        return
    left, right = dict(output.flatten(first)), dict(output.flatten(second))
    rows = [
        {"name": name, "a": _show(name, left.get(name)), "b": _show(name, right.get(name))}
        for name in dict.fromkeys([*left, *right])
        if left.get(name) != right.get(name)
    ]
    columns = [Column("", "name"), Column(f"revision {a}", "a", wide=True), Column(f"revision {b}", "b", wide=True)]
    output.listing(rows, columns, empty=f"revisions {a} and {b} do not differ")


def _show(name: str, value: object) -> object:
    return output.human(name, value) if output.on_terminal() else value


def rollback(
    revision: Annotated[
        int | None, typer.Argument(metavar="R", help="The revision to serve; if left out, what served before.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would change.")] = False,
    reason: Annotated[str | None, typer.Option(metavar="TEXT", help="Why, for the history.")] = None,
    yes: Yes = False,
    as_json: Json = False,
    socket: Socket = None,
) -> None:
    """Serve another committed revision, older or newer."""
    daemon = Daemon(socket)
    if dry_run or not yes:
        all_ = daemon.get("/admin/revisions")["revisions"]
        serving, target = _target(all_, revision)
        plan = f"revision {target['id']} ({target['state']}) would serve instead of revision {serving['id']}"
        if dry_run:
            if as_json:
                output.document({"revision": target["id"], "previous": serving["id"], "dry_run": True})
            else:
                print(plan)
            return
        if not sys.stdin.isatty():
            raise UsageError(f"{plan}: add -y to do it without being asked")
        typer.confirm(f"{plan}. Go on?", abort=True, err=True)
    body: JSON = {"revision": revision}
    answer = daemon.post("/admin/rollback", body | ({"reason": reason} if reason is not None else {}))
    if as_json:
        output.document(answer)
    elif output.on_terminal():
        swap = output.human("swap_ms", answer["swap_ms"])
        print(f"revision {answer['revision']} serves instead of {answer['previous']} (swapped in {swap})")
    else:
        output.facts(answer)


def _target(revisions: list[JSON], number: int | None) -> tuple[JSON, JSON]:
    """The serving revision and the one to go to. Raises CtlError where there is none."""
    known = {revision["id"]: revision for revision in revisions}
    serving = next((revision for revision in revisions if revision["serving"]), known[0])
    goal = serving["predecessor"] if number is None else number
    if goal is None:
        raise CtlError("the base model serves: there is nothing to roll back to; name a revision to roll forward")
    if goal not in known:
        error = CtlError(f"there is no revision {goal}; `agentctl revisions` lists them")
        error.exit_code = ExitCode.NOT_FOUND
        raise error
    return serving, known[goal]
