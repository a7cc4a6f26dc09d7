"""The database: one connection, owned by one thread, used by every other through transactions on that thread."""

import asyncio
import shutil
import sqlite3
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Concatenate, ParamSpec, TypeVar

from sqlite_utils import Database

from agentd import faults
from agentd.durable import storage_error
from agentd.errors import InvalidRequest, StorageFailed, StorageFull
from agentd.store.migrations import migrations, refuse_other
from agentd.store.room import Priority, Room, priority_of

P = ParamSpec("P")
T = TypeVar("T")

_SHM_REGION = 32 * 2**10  # bytes by which SQLite grows the shared-memory file of a write-ahead log


class Store:
    """The state of one daemon in SQLite: write-ahead log, synced at every commit (an acknowledged write survives a
    power cut), foreign keys enforced, deleted content overwritten.

    More than one connection that writes is what the WAL-reset bug of SQLite before 3.51.3 needs to corrupt a
    database, hence one connection in one thread. Work is done in the order it was handed in.
    """

    def __init__(self, path: Path) -> None:
        """Opens or creates the database at `path` (mode 0600, in a directory that exists) and migrates it.

        Raises StateTooNew or StateTooOld, having changed nothing, if a newer agentd wrote it, or one that was never
        released; StorageFailed if it is damaged or cannot be opened; StorageFull if there is no room.
        """
        self.path = path
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="store")
        try:
            self._db = self._thread.submit(self._open).result()
        except BaseException:
            self._thread.shutdown()
            raise
        self._room: Room | None = None

    def keep_room(self) -> None:
        """From now on a full disk has room for feedback and for deleting, see `store.room`."""
        self._thread.submit(self._keep_room).result()

    @property
    def problem(self) -> str | None:
        """What is the matter with the disk, in a sentence."""
        return self._room.problem if self._room is not None else None

    async def look(self) -> None:
        """Notices that the disk has become full, or has room again."""
        if self._room is not None:
            await asyncio.wrap_future(self._thread.submit(self._room.look))

    async def claim(self, size: int, what: str) -> None:
        """Sees to it that `what`, a transaction of some `size` bytes, finds room on a disk that is nearly full, see
        `Room.claim`. Raises StorageFull."""
        if self._room is not None:
            await asyncio.wrap_future(self._thread.submit(self._room.claim, size, what))

    async def piece(self, size: int) -> int | None:
        """Bytes to delete at a time on a disk without room for the log of `size` bytes; None where there is room."""
        if self._room is None:
            return None
        return await asyncio.wrap_future(self._thread.submit(self._room.piece, size))

    def submit(self, fn: Callable[Concatenate[Database, P], T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """Queues `fn(db, *args, **kwargs)` as one transaction: all of it is stored when it returns, or nothing.

        The future raises StorageFull, StorageFailed, or what `fn` raised.
        """
        try:
            return self._thread.submit(self._transaction, lambda db: fn(db, *args, **kwargs), priority_of(fn))
        except RuntimeError:
            raise StorageFailed(f"{self.path} is closed") from None

    def do(self, fn: Callable[Concatenate[Database, P], T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """`submit`, and waits for the result. For plain threads; it would block an event loop."""
        return self.submit(fn, *args, **kwargs).result()

    async def call(self, fn: Callable[Concatenate[Database, P], T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """`submit`, and awaits the result. If the caller is cancelled, work that has begun is still completed."""
        return await asyncio.wrap_future(self.submit(fn, *args, **kwargs))

    def raw(self, work: Callable[[sqlite3.Connection], T]) -> T:
        """Runs `work` in the store's thread outside of any transaction, for what SQLite does only there; waits."""

        def run() -> T:
            with _storage_errors(self.path):
                return work(self._db.conn)

        return self._thread.submit(run).result()

    async def checkpoint(self) -> None:
        """Moves the write-ahead log into the database file and empties it: nothing deleted is left in it. Pages that
        hold nothing any more go back to the file system."""
        await asyncio.wrap_future(self._thread.submit(self._checkpoint))
        if self._room is not None:
            while await asyncio.wrap_future(self._thread.submit(self._room.hand_back)):
                pass  # others have their turn in between

    def _checkpoint(self) -> None:
        with _storage_errors(self.path):
            self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()

    def close(self) -> None:
        """Does the work that is queued, then closes the database. May be called again."""
        try:
            self._thread.submit(self._db.close)
        except RuntimeError:  # closed before
            return
        self._thread.shutdown()

    def _transaction(self, work: Callable[[Database], T], priority: Priority) -> T:
        try:
            return self._once(work)
        except StorageFull:
            if self._room is None or not self._room.make(priority):
                raise
        try:
            return self._once(work)
        finally:
            self._room.settle()

    def _once(self, work: Callable[[Database], T]) -> T:
        faults.begin()
        with _storage_errors(self.path), self._db.atomic():
            result = work(self._db)
        faults.committed()
        return result

    def _keep_room(self) -> None:
        def guard(work: Callable[[], object]) -> None:
            with _storage_errors(self.path):
                work()

        with _storage_errors(self.path):
            self._room = Room(self._db, self.path.parent, guard)

    def _open(self) -> Database:
        with _storage_errors(self.path):
            # A rollback journal is only there if the very first opening was cut short, before the switch to WAL.
            if self.path.exists() and not self.path.with_name(self.path.name + "-journal").exists():
                _refuse_other(self.path)
            else:
                self.path.touch(mode=0o600)
            self.path.chmod(0o600)
            connection = sqlite3.connect(self.path)
            try:
                db = Database(connection, execute_plugins=False)
                _check(db, self.path)
                # An empty database becomes one whose pages can be handed back; said again, it would be written again.
                if db.execute("PRAGMA auto_vacuum").fetchone() == (0,):
                    db.execute("PRAGMA auto_vacuum = INCREMENTAL")
                for pragma in ("journal_mode = WAL", "synchronous = FULL", "foreign_keys = ON", "secure_delete = ON"):
                    db.execute(f"PRAGMA {pragma}")
                faults.begin()
                migrations.apply(db)
                faults.committed()
            except BaseException:
                connection.close()
                raise
            return db


def _refuse_other(path: Path) -> None:
    """Looks through a read-only connection: closing a writing one would move the log into the database file."""
    with closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)) as connection:
        refuse_other(Database(connection, execute_plugins=False), path)


def _check(db: Database, path: Path) -> None:
    """Reads every page. Raises sqlite3.DatabaseError at the first that is damaged."""
    # SQLite takes what is missing of the last page for zeros. With a log, that page is whole in there.
    (page,) = db.execute("PRAGMA page_size").fetchone()
    wal = path.with_name(path.name + "-wal")
    if path.stat().st_size % page and not (wal.exists() and wal.stat().st_size):
        raise sqlite3.DatabaseError("the file ends in the middle of a page")
    (problem,) = db.execute("PRAGMA quick_check(1)").fetchone()
    if problem != "ok":
        raise sqlite3.DatabaseError(problem)


@contextmanager
def _storage_errors(path: Path) -> Iterator[None]:
    """Turns what SQLite and the file system report into agentd's errors; bugs in statements stay what they are."""
    try:
        yield
    except OSError as error:
        raise storage_error(error, str(path)) from error
    except sqlite3.OperationalError as error:
        # Python 3.10 does not tell the result code (SQLITE_FULL), only its text; and growing the shared-memory file on
        # a full disk is reported as an I/O error.
        full = "is full" in str(error) or ("I/O" in str(error) and shutil.disk_usage(path.parent).free < _SHM_REGION)
        kind = StorageFull if full else StorageFailed
        raise kind(f"{path}: {error}") from error
    except sqlite3.DatabaseError as error:
        if type(error) is not sqlite3.DatabaseError:  # a constraint, a wrong parameter
            raise
        raise StorageFailed(
            f"{path} is damaged ({error}); put a backup in its place, or move it and its -wal file away to start afresh"
        ) from error
    except UnicodeEncodeError as error:
        raise InvalidRequest(
            f"not valid Unicode: a text holds the lone surrogate {error.object[error.start]!r}"
        ) from error
