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
from typing import Any

from agentd import __version__, ids
from agentd.durable import new_file, sha256, sync_directory
from agentd.errors import BackupUnusable, StorageFailed
from agentd.formats import tar
from agentd.store.database import Store

DATABASE, INDEX = "agentd.db", "backup.json"
_KEPT = ("committed", "trial", "rolled_back", "staged")


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
    with new_file(archive) as file, tarfile.open(fileobj=file, mode="w") as packed:
        for name, path in _members(database, revisions, numbers):
            sums[name] = sha256(path)
            with path.open("rb") as member:
                tar.add(packed, name, path.stat().st_size, member)
        index = {"agentd": __version__, "created_at": ids.now(), "revisions": numbers, "sha256": sums}
        text = json.dumps(index, indent=2).encode()
        tar.add(packed, INDEX, len(text), io.BytesIO(text))
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
        _give_to_owner(fresh, state)
        sync_directory(fresh)
        aside = state / f"replaced-{ids.now().replace(':', '')}"
        if occupied:
            aside.mkdir(mode=0o700)
            _give_to_owner(aside, state)
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


def _give_to_owner(folder: Path, state: Path) -> None:
    """What root restores belongs to whom the state belongs to: the service could not read it otherwise."""
    owner = state.stat()
    if os.geteuid() == 0:
        for path in (folder, *folder.rglob("*")):
            os.chown(path, owner.st_uid, owner.st_gid, follow_symlinks=False)


def _members(database: Path, revisions: Path, numbers: list[int]) -> Iterator[tuple[str, Path]]:
    yield DATABASE, database
    for number in numbers:
        for path in sorted((revisions / str(number)).glob("*")):
            yield f"revisions/{number}/{path.name}", path


def _unpack(archive: Path, target: Path) -> dict[str, Any]:
    """Every member is a plain file with one of our names, and what the index says it is."""
    try:
        with tarfile.open(archive, "r:") as packed:
            digests: dict[str, str] = {}
            index: dict[str, Any] | None = None
            for member in packed:
                parts = PurePosixPath(member.name).parts
                ours = parts in ((DATABASE,), (INDEX,)) or (
                    len(parts) == 3 and parts[0] == "revisions" and parts[1].isdigit() and parts[2] not in (".", "..")
                )
                file = packed.extractfile(member) if member.isfile() and ours else None
                if file is None:
                    raise BackupUnusable(archive, f"{member.name!r} does not belong into a backup")
                data = file.read()
                if member.name == INDEX:
                    index = json.loads(data)
                    continue
                path = target.joinpath(*parts)
                path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
                with new_file(path) as to:
                    to.write(data)
                digests[member.name] = hashlib.sha256(data).hexdigest()
    except (tarfile.TarError, EOFError, ValueError) as error:
        raise BackupUnusable(archive, str(error) or type(error).__name__) from None
    if index is None or not isinstance(index, dict) or index.get("sha256") != digests or DATABASE not in digests:
        raise BackupUnusable(archive, "it is incomplete, or not what was written")
    return index
