"""A copy of the whole state, made while the daemon runs."""

import os
from pathlib import Path
from typing import Annotated

import typer

from agentd.ctl import output
from agentd.ctl.client import Daemon
from agentd.ctl.errors import CtlError, UsageError
from agentd.ctl.options import Json, Socket


def backup(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="The archive to write; it must not exist yet.")],
    as_json: Json = False,
    socket: Socket = None,
) -> None:
    """Write database and revisions into one archive; `agentd restore` puts it back."""
    if path.exists():
        raise UsageError(f"{path} exists already")
    temporary = path.with_name(f".{path.name}.part")
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            for part in Daemon(socket, timeout=600).download("/admin/backup"):
                file.write(part)
            file.flush()
            os.fsync(file.fileno())
        size = temporary.stat().st_size
        temporary.rename(path)
    except OSError as error:
        raise CtlError(f"cannot write {path}: {error.strerror}") from None
    finally:
        temporary.unlink(missing_ok=True)
    answer = {"path": str(path), "bytes": size}
    if as_json:
        output.document(answer)
    else:
        output.facts(answer)
