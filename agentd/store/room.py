"""Room for what matters when the disk is full: feedback first, then deleting; answers are what goes.

A file beside the database holds space that nothing else on the disk can take. Where a transaction finds none, the file
is given back, the write-ahead log moved into the database, and the oldest answers that no one gave feedback on are
deleted, so that their pages take what is new. Afterwards the file is made again as far as the disk allows.
"""

import logging
import os
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from enum import IntEnum
from pathlib import Path
from typing import TypeVar

from sqlite_utils import Database

from agentd.errors import AgentdError, StorageFull
from agentd.store import events

logger = logging.getLogger(__name__)

F = TypeVar("F", bound=Callable[..., object])

FULL, ROOM = "disk full", "disk has room"
_MOST = 8 << 20  # bytes of the reserve
_PART = 8  # of the file system is the most that the reserve may take
_KEPT = 10  # the newest answers, of which feedback may still come
_QUIET = 5.0  # seconds without a refusal after which there may be room again
_STEP = 256  # pages that are handed back to the file system at a time
_MARK = "priority of a full disk"
_LENGTH = "length(input) + length(output) + length(params)"
_MAY_GO = (
    "rowid <= (SELECT max(rowid) FROM inferences) - ? AND finish_reason != 'streaming'"
    " AND NOT EXISTS (SELECT 1 FROM feedback WHERE inference_id = inferences.id)"
)


class Priority(IntEnum):
    """What a transaction may use when there is no room."""

    EXPENDABLE = 0  # the pages of older answers
    NORMAL = 1  # half of the reserve as well
    DELETING = 2  # all of it


def priority(value: Priority) -> Callable[[F], F]:
    """Marks a function that is run as a transaction; others are NORMAL."""

    def mark(fn: F) -> F:
        setattr(fn, _MARK, value)
        return fn

    return mark


def priority_of(fn: Callable[..., object]) -> Priority:
    priority: Priority = getattr(fn, _MARK, Priority.NORMAL)
    return priority


class Room:
    """Of the database `db` in `folder`; used in the store's thread, outside of transactions. `problem` says in a
    sentence what is the matter while the disk is full."""

    def __init__(self, db: Database, folder: Path, guard: Callable[[Callable[[], object]], None]) -> None:
        """`guard` runs something with what SQLite and the file system raise turned into agentd's errors."""
        self._db, self._folder, self._guard = db, folder, guard
        self.size = min(_MOST, shutil.disk_usage(folder).total // _PART)
        self._files = {name: folder / f"reserve-{name}" for name in ("deleting", "feedback")}
        self._refused_at = -_QUIET
        self._dropped = 0
        self._told = False
        self.problem: str | None = None
        # Moving the log into the database takes as much again, until the log is empty: a part of the reserve must do.
        (page,) = db.execute("PRAGMA page_size").fetchone()
        db.execute(f"PRAGMA wal_autocheckpoint = {max(1, min(1000, self.size // 4 // page))}").fetchone()
        db.execute(f"PRAGMA journal_size_limit = {self.size // 4}").fetchone()
        self._checkpoint()
        self._secure()

    def make(self, priority: Priority) -> bool:
        """After a refusal: finds room for a transaction of this priority; False where there is none for it. `settle`
        follows the transaction."""
        self._refused_at = time.monotonic()
        if priority is Priority.EXPENDABLE and not self._has_pages() and not self._oldest(1):
            self._describe()
            return False
        self._give_back("feedback", "deleting")
        self._checkpoint()
        if self._free_pages() < self._goal() // 4:
            self._drop(self._goal())
        self._describe()
        if priority < Priority.DELETING:
            self._secure("deleting")
        if priority is Priority.EXPENDABLE and not self._has_pages():
            self._secure()
            return False
        return True

    def claim(self, size: int, what: str) -> None:
        """Sees to it that `size` bytes find room at once, which is more than the reserve holds: at the expense of the
        oldest answers, where these are enough. Raises StorageFull, having changed nothing, where they are not."""
        if self.piece(size) is None:
            return
        short = size - self._available()
        free = self._free_pages()
        if free + (answers := self._expendable()) < short:
            left = max(0, self._available() + free + answers)
            there = f"{left / 1e6:.1f} MB are to be had: take less at a time"
            raise StorageFull(f"{what} takes some {size / 1e6:.1f} MB at once, and {there}")
        self._refused_at = time.monotonic()
        self._give_back("feedback", "deleting")
        self._checkpoint()
        self._drop(short - free)
        while self._available() < size and self.hand_back():
            pass
        self._describe()

    def piece(self, size: int) -> int | None:
        """Bytes that a transaction may have on this disk, where there is no room for `size` of them, else None."""
        return None if size <= max(self.size // 2, self._available()) else self.size // 8

    def settle(self) -> None:
        """After what `make` or `claim` made room for."""
        self._checkpoint()
        self._secure()

    def look(self) -> None:
        """Notices a disk that others fill, and one that has room again; to be called every few seconds."""
        if self.problem is None:
            if not self._secure() or self._available() < self.size // 2:
                self._describe()
        elif time.monotonic() - self._refused_at >= _QUIET and self._secure() and self._available() >= 2 * self.size:
            self.problem, self._dropped, self._told = None, 0, False
            self._tell(ROOM, "answers are kept again")
        if self.problem is not None and not self._told:
            self._told = self._tell(FULL, self.problem)

    def hand_back(self) -> bool:
        """Gives some of the database's pages that hold nothing any more to the file system; whether there are more."""
        if not (before := self._free_pages()):
            return False
        try:
            self._guard(lambda: self._db.conn.execute(f"PRAGMA incremental_vacuum({_STEP})").fetchall())
        except AgentdError:
            return False
        self._checkpoint()
        return self._free_pages() < before

    # --- the reserve

    def _secure(self, *names: str) -> bool:
        """Makes the files that are missing, of these names or of all; whether all are there."""
        for name in names or self._files:
            if not self._there(name):
                try:
                    self._write(self._files[name])
                except OSError:
                    self._give_back(name)
                    return False
        return all(map(self._there, self._files))

    def _there(self, name: str) -> bool:
        path = self._files[name]
        return path.exists() and path.stat().st_size >= self.size // 2

    def _write(self, path: Path) -> None:
        descriptor = os.open(path, os.O_CREAT | os.O_WRONLY | os.O_CLOEXEC, 0o600)
        try:
            os.posix_fallocate(descriptor, 0, max(1, self.size // 2))
        finally:
            os.close(descriptor)

    def _give_back(self, *names: str) -> None:
        for name in names:
            with suppress(OSError):
                self._files[name].unlink(missing_ok=True)

    def _available(self) -> int:
        return shutil.disk_usage(self._folder).free

    # --- the database

    def _free_pages(self) -> int:
        """Bytes of pages that hold nothing."""
        (free,) = self._db.execute("PRAGMA freelist_count").fetchone()
        (page,) = self._db.execute("PRAGMA page_size").fetchone()
        return int(free * page)

    def _has_pages(self) -> bool:
        """Whether an answer goes where others were, and not into the reserve."""
        return self._free_pages() >= self._goal() // 8

    def _goal(self) -> int:
        """Bytes of answers to drop at once, so that it need not be done for every new one."""
        (pages,) = self._db.execute("PRAGMA page_count").fetchone()
        (page,) = self._db.execute("PRAGMA page_size").fetchone()
        return min(self.size, int(pages * page) // 4)

    def _checkpoint(self) -> None:
        with suppress(AgentdError):
            self._guard(lambda: self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone())

    def _expendable(self) -> int:
        """Bytes of all answers that may go."""
        (size,) = self._db.execute(
            f"SELECT coalesce(sum({_LENGTH}), 0) FROM inferences WHERE {_MAY_GO}", [_KEPT]
        ).fetchone()
        return int(size)

    def _oldest(self, limit: int) -> list[tuple[int, int]]:
        """(rowid, bytes) of the oldest answers that may go."""
        statement = f"SELECT rowid, {_LENGTH} FROM inferences WHERE {_MAY_GO} ORDER BY rowid LIMIT ?"
        return list(self._db.execute(statement, [_KEPT, limit]).fetchall())

    def _drop(self, size: int) -> None:
        """Deletes the oldest answers, `size` bytes or more, little by little: the log of each piece must fit."""
        while size > 0 and (rows := self._oldest(100)):
            piece: list[int] = []
            freed = 0
            for rowid, length in rows:
                if piece and freed + length > self.size // 8:
                    break
                piece.append(rowid)
                freed += length
            try:
                self._guard(lambda piece=piece: self._delete(piece))  # type: ignore[misc]
            except AgentdError as error:
                logger.warning("answers could not be dropped: %s", error)
                return
            self._checkpoint()
            self._dropped += len(piece)
            size -= max(1, freed)

    def _delete(self, rowids: list[int]) -> None:
        with self._db.atomic():
            for rowid in rowids:
                self._db.execute("DELETE FROM inferences WHERE rowid = ?", [rowid])

    # --- what is said

    def _describe(self) -> None:
        dropped = f"; {self._dropped} of the oldest answers without feedback were dropped" if self._dropped else ""
        self.problem = f"the disk of {self._folder} is full: what is left is for feedback and for deleting{dropped}"

    def _tell(self, kind: str, message: str) -> bool:
        logger.warning("%s: %s", kind, message)
        try:
            self._guard(lambda: self._add(kind, message))
        except AgentdError:
            return False
        return True

    def _add(self, kind: str, message: str) -> None:
        with self._db.atomic():
            events.add(self._db, kind, message)
