import asyncio
import os
import resource
import shutil
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from pathlib import Path

import pytest
from sqlite_utils import Database

from agentd.errors import InvalidRequest, StateTooNew, StorageFailed, StorageFull
from agentd.store import events, examples, feedback, inferences, tasks
from agentd.store.database import Store
from agentd.store.feedback import NewFeedback
from tests.support.store_samples import recorded

WRITER = """
import sys
from pathlib import Path
from agentd.store import feedback
from agentd.store.database import Store
from tests.support.store_samples import recorded
store = Store(Path(sys.argv[1]))
for n in range(1000):
    inference = store.do(recorded, f"text {n}")
    given, _ = store.do(feedback.add, feedback.NewFeedback(inference, "label", f"label {n % 3}", task="sentiment"))
    print(given.id, flush=True)
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "agentd.db"


@pytest.fixture
def store(path: Path) -> Iterator[Store]:
    with closing(Store(path)) as opened:
        yield opened


def say(db: Database, message: str) -> int:
    return events.add(db, "test", message).id


def messages(db: Database) -> list[str]:
    return [event.message for event in events.latest(db, 10_000)]


def crashed_copy(path: Path, to: Path) -> Path:
    """What a power cut now would leave of the open database at `path`."""
    to.mkdir()
    for file in path.parent.glob(f"{path.name}*"):
        if not file.name.endswith("-shm"):
            shutil.copy(file, to)
    return to / path.name


def test_only_the_owner_may_read_the_database(path: Path) -> None:
    path.touch(mode=0o644)
    with closing(Store(path)) as store:
        store.do(say, "hello")
        assert {file.name for file in path.parent.iterdir()} == {"agentd.db", "agentd.db-wal", "agentd.db-shm"}
        assert {file.stat().st_mode & 0o777 for file in path.parent.iterdir()} == {0o600}


def test_commits_are_synced_and_foreign_keys_enforced(store: Store) -> None:
    def pragma(db: Database, name: str) -> object:
        return db.execute(f"PRAGMA {name}").fetchone()[0]

    assert store.do(pragma, "journal_mode") == "wal"
    assert store.do(pragma, "synchronous") == 2
    assert store.do(pragma, "foreign_keys") == 1


def test_what_was_stored_is_there_after_reopening(path: Path) -> None:
    for n in range(3):
        with closing(Store(path)) as store:
            store.do(say, str(n))
            assert store.do(messages) == [str(i) for i in range(n + 1)]


def test_sqlite_utils_does_not_bring_numpy_into_the_daemon() -> None:
    code = "import sys, agentd.store.database; sys.exit('numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=30).returncode == 0


def test_feedback_that_was_acknowledged_survives_kill_9(path: Path) -> None:
    command = [sys.executable, "-c", WRITER, str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdout is not None
        acknowledged = [writer.stdout.readline().strip() for _ in range(40)]
        writer.send_signal(signal.SIGKILL)
        acknowledged += writer.stdout.read().split()
    assert writer.returncode == -signal.SIGKILL
    with closing(Store(path)) as store:
        stored = store.do(feedback.list_, 2000)
        # One more may have been stored, and not have come to be acknowledged.
        assert [row.id for row in reversed(stored)][: len(acknowledged)] == acknowledged
        assert len(stored) - len(acknowledged) in (0, 1)
        assert len(store.do(examples.list_, 2000)) == len(stored)
        assert store.do(tasks.get, "sentiment").choices == ["label 0", "label 1", "label 2"]


def test_a_first_opening_that_was_cut_short_is_done_again(path: Path, tmp_path: Path) -> None:
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA cache_size = 1")
        connection.execute("BEGIN")
        connection.execute("CREATE TABLE half (a)")
        connection.executemany("INSERT INTO half VALUES (?)", (["x" * 1000] for _ in range(200)))
        assert connection.in_transaction
        copy = crashed_copy(path, tmp_path / "crash")
    assert copy.with_name("agentd.db-journal").stat().st_size > 0
    with closing(Store(copy)) as store:
        assert store.do(lambda db: "half" in db.table_names()) is False
        assert store.do(say, "hello") == 1


@pytest.mark.parametrize("clean", [True, False])
def test_the_database_of_a_newer_agentd_is_refused_untouched(path: Path, tmp_path: Path, clean: bool) -> None:
    store = Store(path)
    record = "INSERT INTO _sqlite_migrations (migration_set, name, applied_at) VALUES ('agentd', 'm999_next', '')"
    store.do(lambda db: db.execute(record).rowcount)
    if clean:
        store.close()
    else:
        path = crashed_copy(path, tmp_path / "crash")
    path.chmod(0o640)
    wal = path.with_name("agentd.db-wal")
    before = path.read_bytes(), wal.read_bytes() if not clean else b""
    with pytest.raises(StateTooNew, match="m999_next"):
        Store(path)
    assert path.read_bytes() == before[0]
    assert (wal.read_bytes() if wal.exists() else b"") == before[1]
    assert path.stat().st_mode & 0o777 == 0o640
    store.close()


@pytest.mark.parametrize("content", [b"SQLite format 4\0" + bytes(5000), b"not a database at all"])
def test_a_corrupt_header_is_reported_and_left_alone(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    with pytest.raises(StorageFailed, match=r"file is not a database.*backup"):
        Store(path)
    assert path.read_bytes() == content


def test_a_damaged_page_is_found_at_opening(path: Path) -> None:
    with closing(Store(path)) as store:
        for n in range(200):
            store.do(say, f"{n} " * 100)
    content = bytearray(path.read_bytes())
    middle = len(content) // 2 // 4096 * 4096
    content[middle : middle + 4096] = os.urandom(4096)
    path.write_bytes(content)
    with pytest.raises(StorageFailed, match="is damaged"):
        Store(path)


def test_a_place_that_is_not_there_is_reported(tmp_path: Path) -> None:
    with pytest.raises(StorageFailed, match="No such file or directory"):
        Store(tmp_path / "missing" / "agentd.db")
    with pytest.raises(StorageFailed):
        Store(tmp_path)


def label(db: Database, inference: str, task: str, text: str) -> None:
    feedback.add(db, NewFeedback(inference, "label", text, task=task))


def fill(store: Store, name: str) -> int:
    """Stores feedback until there is no room; returns how much was stored."""
    for n in range(100_000):
        try:
            inference = store.do(recorded, f"{name} {n} " * 100)
            store.do(label, inference, f"{name} {n}", "fine " * 400)
        except StorageFailed:  # a kind of StorageFull, and not what is meant
            raise
        except StorageFull:
            return n
    pytest.fail("the disk never filled")


def check_nothing_is_half_stored(db: Database, n: int, fills: int = 1) -> None:
    assert db.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    assert db.execute("PRAGMA foreign_key_check").fetchall() == []
    assert feedback.count(db) == len(examples.list_(db, 100_000)) == len(tasks.all(db)) == n
    # At the end of each fill the inference may have found room, and its feedback none.
    assert n <= len(inferences.latest(db, 100_000)) <= n + fills


def test_a_full_database_stores_all_of_a_feedback_or_nothing(store: Store) -> None:
    def limit(db: Database, pages: int) -> None:
        db.execute(f"PRAGMA max_page_count = {pages}").fetchone()

    store.do(limit, 155)
    n = fill(store, "task")
    assert n > 10
    store.do(check_nothing_is_half_stored, n)
    store.do(limit, 10_000)
    store.do(label, store.do(recorded), "after", "all is well again")
    assert store.do(feedback.count) == n + 1


def test_a_full_disk_stores_all_of_a_feedback_or_nothing(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(disk)]
    try:
        subprocess.run(mount, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("mounting a small file system needs root")
    try:
        ballast = disk / "ballast"
        ballast.write_bytes(bytes(2**19))
        path = disk / "agentd.db"
        with closing(Store(path)) as store:
            n = fill(store, "first")
            assert n > 10
            store.do(check_nothing_is_half_stored, n)
            ballast.unlink()
            store.do(label, store.do(recorded), "after", "all is well again")
            full = [n + 1, fill(store, "second")]
        with closing(Store(path)) as store:  # a full disk does not keep the daemon from starting
            store.do(check_nothing_is_half_stored, sum(full), fills=2)
        for file in disk.iterdir():
            file.unlink()
        ballast.write_bytes(bytes(shutil.disk_usage(disk).free))
        check_the_first_opening_needs_room(path, ballast)
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)


def check_the_first_opening_needs_room(path: Path, ballast: Path) -> None:
    """From no room at all, one page more at a time, with what the attempts before left behind."""
    for failures in range(300):
        try:
            store = Store(path)
        except StorageFailed:
            raise
        except StorageFull:
            os.truncate(ballast, ballast.stat().st_size - 4096)
        else:
            with closing(store):
                assert failures > 10
                ballast.unlink()
                assert store.do(say, "hello") == 1
            return
    pytest.fail("the database never opened")


def test_an_error_of_the_device_is_told_from_a_full_disk(store: Store, path: Path) -> None:
    store.do(say, "before")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.with_name("agentd.db-wal").stat().st_size, hard))
    try:  # writes fail with EFBIG
        with pytest.raises(StorageFailed, match="disk I/O error"):
            store.do(say, "lost " * 10_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    store.do(say, "after")
    assert store.do(messages) == ["before", "after"]


def test_a_function_that_raises_leaves_no_trace(store: Store) -> None:
    def fail(db: Database) -> None:
        events.add(db, "test", "half")
        raise KeyError("a bug")

    with pytest.raises(KeyError, match="a bug"):
        store.do(fail)
    store.do(say, "whole")
    assert store.do(messages) == ["whole"]


def test_a_broken_constraint_is_a_bug_and_no_trouble_with_the_disk(store: Store) -> None:
    with pytest.raises(sqlite3.IntegrityError):
        store.do(lambda db: db.execute("INSERT INTO activations VALUES (1, '', 77, 0, '')"))
    assert store.do(lambda db: db.execute("SELECT count(*) FROM activations").fetchone()[0]) == 0


def test_text_that_is_no_unicode_is_the_callers_mistake(store: Store) -> None:
    with pytest.raises(InvalidRequest, match=r"lone surrogate '\\ud800'"):
        store.do(recorded, "half a pair: \ud800")
    assert store.do(inferences.latest, 10) == []


def test_threads_and_coroutines_write_at_the_same_time(store: Store) -> None:
    inference = store.do(recorded)

    def work(worker: int) -> None:
        for n in range(25):
            store.do(label, store.do(recorded, f"{worker} {n}"), "shared", f"label {n}")

    async def work_too(worker: int) -> None:
        for n in range(25):
            await store.call(label, await store.call(recorded, f"{worker} {n}"), "shared", f"label {n}")

    async def coroutines() -> None:
        await asyncio.gather(*(work_too(worker) for worker in range(4, 8)))

    with ThreadPoolExecutor(5) as pool:
        for future in [*(pool.submit(work, worker) for worker in range(4)), pool.submit(asyncio.run, coroutines())]:
            future.result()
    assert store.do(feedback.count) == 200
    assert sorted(store.do(tasks.get, "shared").choices) == sorted(f"label {n}" for n in range(25))
    assert len(store.do(examples.list_, 1000)) == 200
    assert store.do(inferences.get, inference).output == "It was great."


def test_work_is_done_in_the_order_it_was_handed_in(store: Store) -> None:
    for n in range(50):
        store.submit(say, str(n))
    assert store.do(messages) == [str(n) for n in range(50)]


def test_a_cancelled_coroutine_does_not_undo_what_had_begun(store: Store) -> None:
    async def run() -> None:
        started, go = asyncio.Event(), asyncio.Event()
        loop = asyncio.get_running_loop()

        def slow(db: Database) -> None:
            loop.call_soon_threadsafe(started.set)
            asyncio.run_coroutine_threadsafe(go.wait(), loop).result()
            say(db, "finished")

        task = asyncio.create_task(store.call(slow))
        await started.wait()
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task
        go.set()
        assert await store.call(messages) == ["finished"]

    asyncio.run(run())


def test_close_finishes_what_is_queued_and_refuses_more(path: Path) -> None:
    store = Store(path)
    for n in range(20):
        store.submit(say, str(n))
    store.close()
    store.close()
    with pytest.raises(StorageFailed, match="closed"):
        store.do(messages)
    assert not path.with_name("agentd.db-wal").exists()
    with closing(Store(path)) as again:
        assert len(again.do(messages)) == 20
