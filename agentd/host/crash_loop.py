"""Counts starts that came to nothing, as boot loaders do: the file outlives the process, success removes it."""

import contextlib
from pathlib import Path

LIMIT = 4  # starts in a row without success after which nothing learned is trusted


class StartCounter:
    def __init__(self, path: Path) -> None:
        self._path = path

    def begin(self) -> int:
        """Notes one more start and returns how many there were since the last success, this one included."""
        try:
            count = int(self._path.read_text()) + 1
        except (OSError, ValueError):
            count = 1
        with contextlib.suppress(OSError):  # a full disk is no reason not to start
            self._path.write_text(str(count))
        return count

    def succeeded(self) -> None:
        with contextlib.suppress(OSError):
            self._path.unlink(missing_ok=True)
