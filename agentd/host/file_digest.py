"""A large file's sha256: taken once, known from then on by the file's stamp, and never begun anew.

The stamp holds the time of the last change of the inode: unlike that of the contents, a copy does not bring it along
(cp -p, rsync -t, tar), and no program can set it.
"""

import json
import os
import threading
from collections.abc import Callable, Generator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple, Protocol

from agentd import durable
from agentd.host.sha256 import Sha256, resumable

_PART = 4 << 20  # bytes read at a time
_SAVED = 64 << 20  # bytes after which it is remembered how far a reading is

_reading = threading.Lock()


class Stamp(NamedTuple):
    """Of a file's contents; times in nanoseconds."""

    size: int
    modified: int
    changed: int
    inode: int


@dataclass(frozen=True)
class FileDigest:
    """What is known of a file's contents as long as its stamp stays the same."""

    stamp: Stamp
    sha256: str | None = None  # None: it was not read to its end yet
    offset: int = 0  # bytes that a reading has done so far
    state: bytes = b""  # of its SHA-256 there


class DigestMemory(Protocol):
    """Where that is kept, by the file's absolute path."""

    def recall(self, path: str) -> FileDigest | None: ...

    def remember(self, path: str, digest: FileDigest) -> None: ...


class DigestCache:
    """Kept in a file that may be lost at the cost of time. What is known of a half-read file is not kept."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._known: dict[str, FileDigest] = {}

    def recall(self, path: str) -> FileDigest | None:
        if path not in self._known and (row := self._rows().get(path)):
            *stamp, sha256 = row
            self._known[path] = FileDigest(Stamp(*map(int, stamp)), str(sha256))
        return self._known.get(path)

    def remember(self, path: str, digest: FileDigest) -> None:
        self._known[path] = digest
        if digest.sha256 is None or digest.offset:
            return
        with suppress(OSError):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with durable.replacement(self._path, durable=False) as part:
                part.write_text(json.dumps({**self._rows(), path: [*digest.stamp, digest.sha256]}, indent=1))

    def _rows(self) -> dict[str, list[int | str]]:
        try:
            rows = json.loads(self._path.read_text())
        except (OSError, ValueError):
            return {}
        if not isinstance(rows, dict):
            return {}
        return {path: row for path, row in rows.items() if isinstance(row, list) and len(row) == 5}


def stamp(path: Path) -> Stamp:
    """Raises OSError."""
    return _stamp(path.stat())


def known(path: Path, memory: DigestMemory) -> str | None:
    """The file's sha256, if it was read before and has the same stamp. Raises OSError."""
    digest = memory.recall(str(path.absolute()))
    return digest.sha256 if digest and digest.stamp == stamp(path) else None


def sha256(path: Path, memory: DigestMemory, on_read: Callable[[int], None] = lambda size: None) -> str:
    """A file's sha256; it is read only where it is not known. `on_read` gets the size of each part. Raises OSError."""
    with _reading:  # two who ask for the same file read it once
        if digest := known(path, memory):
            on_read(path.stat().st_size)
            return digest
        steps = read(path, memory)
        while True:
            try:
                on_read(next(steps))
            except StopIteration as end:
                return str(end.value)


def read(path: Path, memory: DigestMemory) -> Generator[int, None, str]:
    """Reads a file from where a reading was interrupted; yields the bytes of each part and returns the sha256 of all.

    What was known stays known until the end. Raises OSError.
    """
    key = str(path.absolute())
    with path.open("rb") as file:
        now = _stamp(os.fstat(file.fileno()))
        before = memory.recall(key)
        if before is None or before.stamp != now:
            before = FileDigest(now)
        if not (before.state and resumable()):
            before = replace(before, offset=0, state=b"")
        digest = Sha256(before.state)
        done = saved = file.seek(before.offset)
        if done:
            yield done
        while part := file.read(_PART):
            digest.update(part)
            done += len(part)
            if done - saved >= _SAVED and (state := digest.state()):
                memory.remember(key, replace(before, offset=done, state=state))
                saved = done
            yield len(part)
        result = digest.hexdigest()
        if _stamp(os.fstat(file.fileno())) == now:  # else it was written to meanwhile
            memory.remember(key, FileDigest(now, result))
        return result


def _stamp(status: os.stat_result) -> Stamp:
    return Stamp(status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino)
