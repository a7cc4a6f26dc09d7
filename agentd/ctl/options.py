"""Options that several commands share."""

from pathlib import Path
from typing import Annotated

import typer

SOCKET_VARIABLE = "AGENTD_ADMIN_SOCKET"

Socket = Annotated[
    Path | None,
    typer.Option(envvar=SOCKET_VARIABLE, metavar="PATH", help="The daemon's admin socket.", show_default=False),
]
Json = Annotated[bool, typer.Option("--json", help="Print the daemon's answer as JSON, as it came.")]
Limit = Annotated[int, typer.Option("--limit", "-n", min=1, metavar="N", help="How many, the newest first.")]
Offset = Annotated[int, typer.Option(min=0, metavar="N", help="How many of the newest to leave out.")]
TaskFilter = Annotated[str | None, typer.Option("--task", metavar="NAME", help="Only those of this task.")]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")]
