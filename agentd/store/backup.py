"""Copies of the state that can be put back: the database as it is at one moment, and the revisions it knows.

A backup is a tar archive: agentd.db, revisions/<n>/..., and last backup.json with the sha256 of every other member. An
archive without it was cut short.
"""

import contextlib
import hashlib
import io
import json
import os
import shutil
import sqlite3
import tarfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import IO, Any

from agentd import __version__, ids
from agentd.durable import sync_directory
from agentd.errors import BackupUnusable, StorageFailed
from agentd.store.database import Store

DATABASE, INDEX = "agentd.db", "backup.json"
_KEPT = ("committed", "trial", "rolled_back", "staged")
_CHUNK = 1 << 20  # bytes in memory at a time: a revision may hold most of a model's weights


def snapshot(store: Store, target: Path) -> None:
    """Writes the database as it is now to `target`, while others go on using it. Raises StorageFull, StorageFailed."""

    def copy(connection: sqlite3.Connection) -> None:
        target.unlink(missing_ok=True)
        with contextlib.closing(sqlite3.connect(target)) as to:
            connection.backup(to)
        target.chmod(0o600)

    store.raw(copy)


def write(database: Path, revisions: Path, archive: Path) -> dict[str, Any]:
    """Packs a snapshot and the revisions it knows into `archive` (mode 0600) and returns the index."""
    with contextlib.closing(sqlite3.connect(f"{database.absolute().as_uri()}?mode=ro", uri=True)) as db:
        marks = ", ".join("?" * len(_KEPT))
        rows = db.execute(f"SELECT id FROM revisions WHERE state IN ({marks}) ORDER BY id", _KEPT)
        numbers = [number for (number,) in rows]
    sums: dict[str, str] = {}
    with archive.open("xb") as file, tarfile.open(fileobj=file, mode="w") as tar:
        os.fchmod(file.fileno(), 0o600)
        for name, path in _members(database, revisions, numbers):
            with path.open("rb") as member:
                sums[name] = _sha256(member)
                _add(tar, name, member.tell(), member)
        index = {"agentd": __version__, "created_at": ids.now(), "revisions": numbers, "sha256": sums}
        text = json.dumps(index, indent=2).encode()
        _add(tar, INDEX, len(text), io.BytesIO(text))
        tar.close()
        file.flush()
        os.fsync(file.fileno())
    return index


def restore(archive: Path, state: Path, *, replace: bool = False) -> dict[str, Any]:
    """Puts a backup into the state directory, which no daemon may be using, and returns its index.

    Everything is checked before anything is changed. What is there already is only moved away, into
    `replaced-<time>`, and only with `replace`. Raises BackupUnusable, StorageFailed.
    """
    occupied = [path for path in (state / DATABASE, state / "revisions") if path.exists()]
    if occupied and not replace:
        raise BackupUnusable(archive, f"{state} holds a state already; --replace moves it aside")
    fresh = state / ".restored"
    shutil.rmtree(fresh, ignore_errors=True)
    try:
        fresh.mkdir(mode=0o700)
        index = _unpack(archive, fresh)
        Store(fresh / DATABASE).close()  # refuses what is damaged or of a newer version, and migrates forward
        sync_directory(fresh)
        aside = state / f"replaced-{ids.now().replace(':', '')}"
        if occupied:
            aside.mkdir(mode=0o700)
            for path in (*occupied, *(state / f"{DATABASE}{suffix}" for suffix in ("-wal", "-shm"))):
                if path.exists():
                    path.rename(aside / path.name)
        # The database last: a restore that is cut short leaves a state without one, which starts afresh.
        if (fresh / "revisions").exists():
            (fresh / "revisions").rename(state / "revisions")
        (fresh / DATABASE).rename(state / DATABASE)
        sync_directory(state)
    except OSError as error:
        raise StorageFailed(f"{error.filename or state}: {error.strerror}") from None
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    return index


def _members(database: Path, revisions: Path, numbers: list[int]) -> Iterator[tuple[str, Path]]:
    yield DATABASE, database
    for number in numbers:
        for path in sorted((revisions / str(number)).glob("*")):
            yield f"revisions/{number}/{path.name}", path


def _sha256(file: IO[bytes]) -> str:
    digest = hashlib.sha256()
    while part := file.read(_CHUNK):
        digest.update(part)
    return digest.hexdigest()


def _add(tar: tarfile.TarFile, name: str, size: int, file: IO[bytes]) -> None:
    member = tarfile.TarInfo(name)
    member.size, member.mode = size, 0o600
    file.seek(0)
    tar.addfile(member, file)


def _unpack(archive: Path, target: Path) -> dict[str, Any]:
    """Every member is a plain file with one of our names, and what the index says it is."""
    try:
        with tarfile.open(archive, "r:") as tar:
            found: dict[str, str] = {}
            index: dict[str, Any] | None = None
            for member in tar:
                parts = PurePosixPath(member.name).parts
                ours = parts in ((DATABASE,), (INDEX,)) or (
                    len(parts) == 3 and parts[0] == "revisions" and parts[1].isdigit() and parts[2] not in (".", "..")
                )
                file = tar.extractfile(member) if member.isfile() and ours else None
                if file is None:
                    raise BackupUnusable(archive, f"{member.name!r} does not belong into a backup")
                data = file.read()
                if member.name == INDEX:
                    index = json.loads(data)
                    continue
                path = target.joinpath(*parts)
                path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
                with path.open("xb") as to:
                    os.fchmod(to.fileno(), 0o600)
                    to.write(data)
                    to.flush()
                    os.fsync(to.fileno())
                found[member.name] = hashlib.sha256(data).hexdigest()
    except (tarfile.TarError, EOFError, ValueError) as error:
        raise BackupUnusable(archive, str(error) or type(error).__name__) from None
    if index is None or not isinstance(index, dict) or index.get("sha256") != found or DATABASE not in found:
        raise BackupUnusable(archive, "it is incomplete, or not what was written")
    return index
