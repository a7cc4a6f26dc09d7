"""The daemon's journal of what happened."""

import time
from typing import Annotated

import typer

from agentd.ctl import output
from agentd.ctl.client import Daemon
from agentd.ctl.options import Json, Limit, Socket
from agentd.ctl.output import Column

POLL = 1.0  # seconds between two looks for new events
_PAGE = 1000

_EVENTS = [
    Column("id", "id", right=True),
    Column("at", "at"),
    Column("kind", "kind"),
    Column("pass", "pass_id", right=True),
    Column("revision", "revision", right=True),
    Column("message", "message", wide=True),
]


def events(
    limit: Limit = 20,
    after: Annotated[int | None, typer.Option(min=0, metavar="ID", help="Only events after this one.")] = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on printing events as they happen.")] = False,
    as_json: Json = False,
    socket: Socket = None,
) -> None:
    """What happened, the latest last. With -f and --json, one JSON object a line."""
    daemon = Daemon(socket)
    answer = daemon.get("/admin/events", after=after, limit=limit)
    rows = sorted(answer["events"], key=lambda event: int(event["id"]))
    if not follow:
        output.document(answer) if as_json else output.listing(rows, _EVENTS)
        return
    last = after or 0
    while True:
        for row in rows:
            last = max(last, row["id"])
            if as_json:
                output.line(row)
            elif output.on_terminal():
                print(output.clean(f"{row['at']}  {row['kind']:<12}  {row['message']}", lines=False), flush=True)
            else:
                output.listing([row], _EVENTS)
        time.sleep(POLL)
        answer = daemon.get("/admin/events", after=last, limit=_PAGE)
        rows = sorted(answer["events"], key=lambda event: int(event["id"]))
