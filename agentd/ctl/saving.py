"""What the daemon sends, as a file: there as a whole or not at all, and never in place of another."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from agentd.ctl import output
from agentd.ctl.errors import CtlError, UsageError


def refuse_existing(path: Path) -> None:
    """Raises UsageError; before the daemon is asked for anything."""
    if path.exists():
        raise UsageError(f"{path} exists already")


def save(path: Path, parts: Iterable[bytes], as_json: bool) -> None:
    """Writes `path` (mode 0600) and says how large it is. Raises CtlError where that cannot be done."""
    show(write(path, parts), as_json)


def show(written: dict[str, Any], as_json: bool) -> None:
    if as_json:
        output.document(written)
    else:
        output.facts(written)


def write(path: Path, parts: Iterable[bytes]) -> dict[str, Any]:
    """The same without a word; returns path and bytes."""
    from agentd.durable import new_file, replacement  # agentctl starts with nothing of the daemon

    try:
        with replacement(path) as temporary, new_file(temporary, "wb") as file:
            for part in parts:
                file.write(part)
        return {"path": str(path), "bytes": path.stat().st_size}
    except OSError as error:
        raise CtlError(f"cannot write {path}: {error.strerror}") from None
