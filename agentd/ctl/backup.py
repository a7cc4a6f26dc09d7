"""A copy of the whole state, made while the daemon runs."""

from pathlib import Path
from typing import Annotated

import typer

from agentd.ctl.client import Daemon
from agentd.ctl.options import Json, Socket
from agentd.ctl.saving import refuse_existing, save


def backup(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="The archive to write; it must not exist yet.")],
    as_json: Json = False,
    socket: Socket = None,
) -> None:
    """Write database and revisions into one archive; `agentd restore` puts it back."""
    refuse_existing(path)
    save(path, Daemon(socket, timeout=600).download("/admin/backup"), as_json)
