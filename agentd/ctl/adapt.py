"""Starting, stopping and holding back passes."""

from pathlib import Path
from typing import Annotated

import typer

from agentd.ctl import output
from agentd.ctl.budget import TERMS
from agentd.ctl.client import JSON, Daemon
from agentd.ctl.errors import UsageError
from agentd.ctl.options import Json, Socket
from agentd.ctl.passes import watch


def adapt(
    method: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="By name (agentctl budget lists them) or auto; as configured if left out.",
        ),
    ] = None,
    blocks: Annotated[
        str | None, typer.Option(metavar="K", help="Last blocks trained by backpropagation: a number, or auto.")
    ] = None,
    zo_steps: Annotated[
        str | None, typer.Option("--zo-steps", metavar="N", help="Zeroth-order steps: a number, or auto.")
    ] = None,
    objective: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="likelihood, or metric: the share of right answers, which zeroth-order methods alone can learn.",
        ),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only print the plan.")] = False,
    no_wait: Annotated[bool, typer.Option("--no-wait", help="Start the pass and do not follow it.")] = False,
    as_json: Json = False,
    socket: Socket = None,
) -> None:
    """Start a pass now, and follow it until it ends.

    Ctrl-C detaches; the pass goes on.
    """
    body: JSON = {"dry_run": True} if dry_run else {}
    for name, value in (("method", method), ("objective", objective)):
        if value is not None:
            body[name] = value
    for name, value in (("blocks", blocks), ("zo_steps", zo_steps)):
        if value is not None:
            body[name] = _count(name, value)
    _start(body, socket, follow=not dry_run and not no_wait, as_json=as_json)


def consolidate(
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only print the plan.")] = False,
    no_wait: Annotated[bool, typer.Option("--no-wait", help="Start the pass and do not follow it.")] = False,
    as_json: Json = False,
    socket: Socket = None,
) -> None:
    """Learn everything again from the base, in one pass, and follow it until it ends.

    What comes of it serves if it is no worse on any task than what serves now. Ctrl-C detaches; the pass goes on.
    """
    body: JSON = {"consolidate": True, **({"dry_run": True} if dry_run else {})}
    _start(body, socket, follow=not dry_run and not no_wait, as_json=as_json)


def _start(body: JSON, socket: Path | None, *, follow: bool, as_json: bool) -> None:
    daemon = Daemon(socket)
    answer = daemon.post("/admin/adapt", body)
    if follow:
        if not as_json:
            output.say(f"pass {answer['pass']} started")
        watch(daemon, answer["pass"], as_json)
    elif "plan" in answer and not as_json:
        _plan(answer["plan"])
    else:
        output.show(answer, as_json)


def _plan(plan: JSON) -> None:
    """The facts of a plan, and for a person its terms; `agentctl budget` has the other plans."""
    output.facts({name: value for name, value in plan.items() if name not in ("terms", "considered")})
    if output.on_terminal() and plan.get("terms"):
        print()
        output.listing(plan["terms"], TERMS)


def _count(name: str, value: str) -> int | str:
    if value == "auto":
        return value
    if not (value.isascii() and value.isdigit()):
        raise UsageError(f"--{name.replace('_', '-')} {value!r} is neither a number nor auto")
    return int(value)


def cancel(as_json: Json = False, socket: Socket = None) -> None:
    """Stop the running pass; what serves stays as it is."""
    output.show(Daemon(socket).post("/admin/cancel"), as_json)


def pause(as_json: Json = False, socket: Socket = None) -> None:
    """Let no pass start by itself until `agentctl resume`."""
    output.show(Daemon(socket).post("/admin/pause"), as_json)


def resume(as_json: Json = False, socket: Socket = None) -> None:
    """Let passes start by themselves again."""
    output.show(Daemon(socket).post("/admin/resume"), as_json)
