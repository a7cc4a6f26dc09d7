"""API keys for programs that come over TCP."""

import re
from typing import Annotated

import typer

from agentd.ctl import output
from agentd.ctl.client import Daemon, segment
from agentd.ctl.errors import UsageError
from agentd.ctl.options import Json, Socket
from agentd.ctl.output import Column

_SCOPES = ("ask", "feedback", "admin")
_KEYS = [
    Column("name", "name"),
    Column("scopes", "scopes"),
    Column("a minute", "rate", right=True),
    Column("created", "created_at"),
    Column("last used", "last_used_at"),
    Column("revoked", "revoked_at"),
]
Name = Annotated[str, typer.Argument(metavar="NAME", help="The key's name, by which its feedback is known.")]


def add(
    name: Name,
    scope: Annotated[
        str, typer.Option("--scope", metavar="SCOPES", help="What it may do: ask, feedback, admin; with commas.")
    ] = "ask,feedback",
    rate: Annotated[
        str | None, typer.Option("--rate", metavar="N/min", help="Requests a minute; as many as it likes if left out.")
    ] = None,
    as_json: Json = False,
    socket: Socket = None,
) -> None:
    """Make a key and print it, this once: the daemon keeps only its sha256."""
    scopes = [each.strip() for each in scope.split(",")]
    if wrong := [each for each in scopes if each not in _SCOPES]:
        raise UsageError(f"--scope takes {', '.join(_SCOPES)}, not {wrong[0]!r}")
    answer = Daemon(socket).post("/admin/keys", {"name": name, "scopes": scopes, "rate": _rate(rate)})
    if as_json:
        output.document(answer)
        return
    print(answer["key"])
    may = ", ".join(answer["scopes"])
    output.say(f"key {name}: {may}; it is not shown again. Send it as Authorization: Bearer KEY")


def list_(as_json: Json = False, socket: Socket = None) -> None:
    """Which keys there are, what they may do, and when they were used."""
    answer = Daemon(socket).get("/admin/keys")
    if as_json:
        output.document(answer)
        return
    rows = answer["keys"]
    if output.on_terminal():
        rows = [row | {"scopes": ", ".join(row["scopes"])} for row in rows]
    output.listing(rows, _KEYS, empty="no keys yet")


def revoke(name: Name, as_json: Json = False, socket: Socket = None) -> None:
    """Let a key be of no use from now on."""
    answer = Daemon(socket).post(f"/admin/keys/{segment(name)}/revoke")
    output.show(answer, as_json)


def _rate(text: str | None) -> int | None:
    if text is None:
        return None
    match = re.fullmatch(r"(\d{1,9})(/min)?", text)
    if match is None:
        raise UsageError(f"--rate takes requests a minute, such as 60/min, not {text!r}")
    return int(match[1])
