"""What the daemon sends, as a file: there as a whole or not at all, and never in place of another."""

import os
from collections.abc import Iterable
from pathlib import Path

from agentd.ctl import output
from agentd.ctl.errors import CtlError, UsageError


def refuse_existing(path: Path) -> None:
    """Raises UsageError; before the daemon is asked for anything."""
    if path.exists():
        raise UsageError(f"{path} exists already")


def save(path: Path, parts: Iterable[bytes], as_json: bool) -> None:
    """Writes `path` (mode 0600) and says how large it is. Raises CtlError where that cannot be done."""
    temporary = path.with_name(f".{path.name}.part")
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            for part in parts:
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
