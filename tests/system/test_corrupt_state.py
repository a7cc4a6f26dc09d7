"""Damaged files: always a clear error, and a good revision served. Every byte class, and truncations."""

import asyncio
import hashlib
import json
import os
import random
import shutil
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from agentd.daemon import locked
from agentd.errors import BackupUnusable, RevisionCorrupt, StorageFailed
from agentd.learn import ledger
from agentd.revision.files import ADAPTER, CONTROL, LEDGER, MANIFEST, RevisionFiles
from agentd.store import backup, events, revisions
from agentd.store.database import Store
from agentd.store.revisions import Revision
from tests.support.engine_samples import write_lora
from tools import tiny_model
from tools.daemon import DaemonProcess

BASE = "ab" * 32
BITS = (0x01, 0x80, 0xFF)


@pytest.fixture
def written(tmp_path: Path) -> tuple[RevisionFiles, Path]:
    """A revision with every kind of file."""
    files = RevisionFiles(tmp_path / "revisions", BASE)
    sources = {}
    for name in (ADAPTER, CONTROL):
        (tmp_path / name).write_bytes(b"GGUF" + random.Random(name).randbytes(600))
        sources[name] = tmp_path / name
    step = ledger.Step(7, 0.25, 0.01, 0.1)
    ledger.write(tmp_path / LEDGER, ledger.Ledger(0, [step] * 5))
    sources[LEDGER] = tmp_path / LEDGER
    files.write(1, sources, {"parent": 0, "method": "elasticzo", "blocks": 1, "tasks": {"reviews": {"n": 60}}})
    return files, tmp_path / "revisions" / "1"


@pytest.mark.parametrize("name", [MANIFEST, ADAPTER, CONTROL, LEDGER])
def test_every_single_byte_of_a_revision_counts(written: tuple[RevisionFiles, Path], name: str) -> None:
    files, directory = written
    data = (directory / name).read_bytes()
    for place in range(len(data)):
        for bits in BITS:
            damaged = bytearray(data)
            damaged[place] ^= bits
            (directory / name).write_bytes(damaged)
            with pytest.raises(RevisionCorrupt, match="revision 1 cannot be used"):
                files.verified(1)
    (directory / name).write_bytes(data)
    assert set(files.verified(1)) == {ADAPTER, CONTROL, LEDGER}


@pytest.mark.parametrize("name", [MANIFEST, ADAPTER, CONTROL, LEDGER])
def test_every_length_but_the_right_one_is_noticed(written: tuple[RevisionFiles, Path], name: str) -> None:
    files, directory = written
    data = (directory / name).read_bytes()
    for length in range(len(data)):
        (directory / name).write_bytes(data[:length])
        with pytest.raises(RevisionCorrupt):
            files.verified(1)
    (directory / name).write_bytes(data + b"\n")
    with pytest.raises(RevisionCorrupt):
        files.verified(1)


def test_a_damaged_ledger_is_never_half_read(written: tuple[RevisionFiles, Path], tmp_path: Path) -> None:
    data = (written[1] / LEDGER).read_bytes()
    path = tmp_path / "damaged"
    for place in range(len(data)):
        path.write_bytes(data[:place] + bytes([data[place] ^ 0x40]) + data[place + 1 :])
        with pytest.raises(ValueError, match=str(path)):
            ledger.read(path)
    for length in range(len(data)):
        path.write_bytes(data[:length])
        with pytest.raises(ValueError, match=str(path)):
            ledger.read(path)


@pytest.fixture
def database(tmp_path: Path) -> Path:
    path = tmp_path / "agentd.db"
    with closing(Store(path)) as store:
        for n in range(50):
            store.do(events.add, "test", f"event {n} " * 20)
    return path


def intact(path: Path) -> bool:
    """Opens the database: True if all is there, False for a clear error; anything else fails."""
    try:
        with closing(Store(path)) as store:
            return len(store.do(events.latest, 100)) == 50
    except StorageFailed:
        return False


def test_every_byte_of_the_database_s_header(database: Path) -> None:
    """A changed byte is found, or does no harm (counters and reserved bytes); nothing is lost without a word."""
    original = database.read_bytes()
    noticed = 0
    for place in range(100):
        for bits in (0x01, 0xFF):
            for file in database.parent.glob("agentd.db-*"):
                file.unlink()
            database.write_bytes(original[:place] + bytes([original[place] ^ bits]) + original[place + 1 :])
            noticed += not intact(database)
    assert noticed >= 2 * 16 + 2 * 2, "at least the magic and the page size"
    database.write_bytes(original)
    assert intact(database)


def test_a_database_that_is_cut_short(database: Path) -> None:
    original = database.read_bytes()
    for length in [1, 15, 16, 50, 99, 100, 511, *range(1024, len(original), 3000), len(original) - 1]:
        for file in database.parent.glob("agentd.db-*"):
            file.unlink()
        database.write_bytes(original[:length])
        assert not intact(database), length


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
def test_what_root_restores_belongs_to_the_owner_of_the_state(database: Path, tmp_path: Path) -> None:
    with closing(Store(database)) as store:
        backup.snapshot(store, tmp_path / "copy.db")
    backup.write(tmp_path / "copy.db", tmp_path / "none", tmp_path / "backup.tar")
    target = tmp_path / "target"
    target.mkdir()
    os.chown(target, 4711, 4712)
    for _ in range(2):
        with locked(target):
            backup.restore(tmp_path / "backup.tar", target, replace=True)
    owners = {(path.name, path.stat().st_uid, path.stat().st_gid) for path in target.rglob("*")}
    assert {"agentd.db", "lock"} <= {name for name, _, _ in owners}
    assert {(uid, gid) for _, uid, gid in owners} == {(4711, 4712)}


def test_a_backup_that_is_damaged_changes_nothing(database: Path, tmp_path: Path) -> None:
    with closing(Store(database)) as store:
        backup.snapshot(store, tmp_path / "copy.db")
    archive = tmp_path / "backup.tar"
    backup.write(tmp_path / "copy.db", tmp_path / "none", archive)
    good = archive.read_bytes()
    target = tmp_path / "target"
    places = [*range(0, 512, 7), *range(512, len(good) - 10_240, 997)]
    for place in places:
        archive.write_bytes(good[:place] + bytes([good[place] ^ 0xFF]) + good[place + 1 :])
        target.mkdir()
        try:
            backup.restore(archive, target)
        except (BackupUnusable, StorageFailed):
            assert list(target.iterdir()) == []
        else:
            assert intact(target / "agentd.db"), place  # a byte of the archive's own padding or times
        shutil.rmtree(target)
    for length in range(0, len(good) - 10_240, 1500):
        archive.write_bytes(good[:length])
        target.mkdir()
        with pytest.raises(BackupUnusable):
            backup.restore(archive, target)
        assert list(target.iterdir()) == []
        target.rmdir()


def adapter(state: Path, model: Path) -> None:
    """Two committed revisions with real adapters, the second of them serving."""
    store = Store(state / "agentd.db")
    files = RevisionFiles(state / "revisions", hashlib.sha256(model.read_bytes()).hexdigest())
    for number in (1, 2):
        path = write_lora(state / "new.gguf", model, seed=number, size=0.5)
        digest = files.write(number, {ADAPTER: path}, {"parent": number - 1})
        path.unlink()
        row = Revision(number, number - 1, None, "2026-01-01", "committed", None, "suffix-bp", 1, digest, {})
        store.do(revisions.add, row)
        store.do(revisions.activate, number, "made for a test")
    store.close()


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DaemonProcess]:
    model = tiny_model.write(tmp_path_factory.mktemp("model") / "tiny.gguf")
    with DaemonProcess(model) as process:
        process.state.mkdir(mode=0o700)
        adapter(process.state, model)
        yield process


def damage(directory: Path, how: str) -> None:
    manifest, weights = directory / MANIFEST, directory / ADAPTER
    if how == "manifest flipped":
        data = bytearray(manifest.read_bytes())
        data[len(data) // 2] ^= 2
        manifest.write_bytes(data)
    elif how == "manifest empty":
        manifest.write_bytes(b"")
    elif how == "manifest rewritten":
        tree: dict[str, Any] = json.loads(manifest.read_bytes())
        manifest.write_text(json.dumps({**tree, "files": {}}))
    elif how == "adapter cut":
        os.truncate(weights, weights.stat().st_size // 2)
    elif how == "adapter gone":
        weights.unlink()
    else:
        shutil.rmtree(directory)


@pytest.mark.parametrize(
    "how",
    ["manifest flipped", "manifest empty", "manifest rewritten", "adapter cut", "adapter gone", "directory gone"],
)
def test_the_daemon_serves_the_next_best_and_says_so(daemon: DaemonProcess, how: str) -> None:
    saved = daemon.directory / "saved"
    shutil.rmtree(saved, ignore_errors=True)
    shutil.copytree(daemon.state, saved)
    try:
        damage(daemon.state / "revisions" / "2", how)
        daemon.start()
        assert daemon.ask().json["agentd"]["revision"] == 1
        (event,) = [
            e for e in daemon.get("/admin/events", admin=True).json["events"] if e["kind"] == "revision corrupt"
        ]
        assert "revision 2 cannot be used" in event["message"]
        revision = daemon.get("/admin/revisions/2", admin=True).json
        assert (revision["problem"] is None) == how.startswith("adapter")
        refused = daemon.post("/admin/rollback", {"revision": 2}, admin=True)
        assert (refused.status, refused.error["code"]) == (500, "revision_corrupt")
        assert daemon.ask().json["agentd"]["revision"] == 1
        history = daemon.get("/admin/history", admin=True).json["activations"]
        assert history[0]["revision"] == 1
    finally:
        daemon.kill()
        shutil.rmtree(daemon.state)
        saved.rename(daemon.state)


def test_with_every_revision_damaged_the_base_serves(daemon: DaemonProcess) -> None:
    for number in (1, 2):
        damage(daemon.state / "revisions" / str(number), "manifest empty")
    daemon.start()
    assert daemon.ask().json["agentd"]["revision"] == 0
    with closing(sqlite3.connect(f"{(daemon.state / 'agentd.db').as_uri()}?mode=ro", uri=True)) as db:
        assert db.execute("SELECT revision FROM activations ORDER BY id DESC LIMIT 1").fetchone() == (0,)
    daemon.kill()


def test_a_snapshot_while_others_write_is_whole(tmp_path: Path) -> None:
    store = Store(tmp_path / "agentd.db")

    async def run() -> None:
        for n in range(20):
            await store.call(events.add, "test", f"{n}")
        writing = [asyncio.create_task(store.call(events.add, "test", f"{n}" * 500)) for n in range(200)]
        await asyncio.to_thread(backup.snapshot, store, tmp_path / "copy.db")
        await asyncio.gather(*writing)

    asyncio.run(run())
    store.close()
    with closing(Store(tmp_path / "copy.db")) as copy:
        assert 20 <= len(copy.do(events.latest, 1000)) <= 220
