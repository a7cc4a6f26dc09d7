"""A large file's sha256: what is known of it, and a reading that is interrupted."""

import hashlib
import os
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from agentd.host import file_digest
from agentd.host.file_digest import DigestCache, DigestMemory, FileDigest
from agentd.host.sha256 import Sha256, resumable
from agentd.store.database import Store
from agentd.store.model_files import ModelFiles

PART = file_digest._PART


@pytest.fixture
def memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[DigestMemory]:
    monkeypatch.setattr(file_digest, "_SAVED", PART)
    with closing(Store(tmp_path / "agentd.db")) as store:
        yield ModelFiles(store, DigestCache(tmp_path / "cache.json"))


@pytest.fixture
def large(tmp_path: Path) -> Path:
    path = tmp_path / "large"
    path.write_bytes(b"begin")
    os.truncate(path, 5 * PART + 77)
    return path


@pytest.mark.parametrize("size", [0, 1, 63, 64, 65, 1000, 3 << 20])
def test_it_is_sha256_whereever_it_is_put_aside(size: int) -> None:
    data = os.urandom(size)
    first = Sha256()
    first.update(data[: size // 3])
    second = Sha256(first.state()) if resumable() else first
    second.update(data[size // 3 :])
    assert second.hexdigest() == hashlib.sha256(data).hexdigest()


def test_without_libcrypto_there_is_no_state(
    monkeypatch: pytest.MonkeyPatch, memory: DigestMemory, large: Path
) -> None:
    interrupted = file_digest.read(large, memory)
    assert [next(interrupted) for _ in range(3)] == [PART] * 3
    monkeypatch.setattr("agentd.host.sha256._library", lambda: None)
    assert not resumable()
    assert file_digest.sha256(large, memory) == hashlib.sha256(large.read_bytes()).hexdigest()


def test_a_reading_that_is_interrupted_goes_on_in_another_process(
    tmp_path: Path, large: Path, memory: DigestMemory
) -> None:
    if not resumable():
        pytest.skip("this Python has libcrypto built in")
    interrupted = file_digest.read(large, memory)
    assert [next(interrupted) for _ in range(4)] == [PART] * 4
    assert file_digest.known(large, memory) is None
    interrupted.close()
    memory.store.close()  # type: ignore[attr-defined]
    with closing(Store(tmp_path / "agentd.db")) as store:
        again = ModelFiles(store, DigestCache(tmp_path / "cache.json"))
        sizes: list[int] = []
        assert file_digest.sha256(large, again, sizes.append) == hashlib.sha256(large.read_bytes()).hexdigest()
        assert sizes == [4 * PART, PART, 77]
        sizes.clear()
        assert file_digest.sha256(large, again, sizes.append) == file_digest.known(large, again)
        assert sizes == [5 * PART + 77]


def test_what_was_known_stays_known_while_the_file_is_read_again(memory: DigestMemory, large: Path) -> None:
    digest = file_digest.sha256(large, memory)
    reading = file_digest.read(large, memory)
    assert next(reading) == PART
    assert file_digest.known(large, memory) == digest
    assert sum(reading) == 4 * PART + 77
    assert file_digest.known(large, memory) == digest


def test_a_file_that_changed_is_read_from_its_beginning(memory: DigestMemory, large: Path) -> None:
    interrupted = file_digest.read(large, memory)
    assert [next(interrupted) for _ in range(4)] == [PART] * 4
    interrupted.close()
    with large.open("r+b") as file:
        file.write(b"other")
    assert file_digest.sha256(large, memory) == hashlib.sha256(large.read_bytes()).hexdigest()


def test_what_is_written_to_while_it_is_read_is_not_known(memory: DigestMemory, large: Path) -> None:
    reading = file_digest.read(large, memory)
    next(reading)
    with large.open("r+b") as file:
        file.write(b"other")
    for _ in reading:
        pass
    assert file_digest.known(large, memory) is None


def test_the_daemon_knows_what_was_read_before_there_was_a_database(tmp_path: Path, large: Path) -> None:
    cache = DigestCache(tmp_path / "cache.json")
    digest = file_digest.sha256(large, cache)
    (tmp_path / "other.json").write_text('{"/m": ["not a row"], "/n": 3}')
    with closing(Store(tmp_path / "agentd.db")) as store:
        assert file_digest.known(large, ModelFiles(store, DigestCache(tmp_path / "cache.json"))) == digest
        assert ModelFiles(store, DigestCache(tmp_path / "other.json")).recall("/m") is None
        odd = ModelFiles(store, cache)
        odd.remember("/surrogate\udcff", FileDigest(file_digest.stamp(large), digest))  # a name that is no Unicode
        assert odd.recall("/surrogate\udcff") is not None
        assert ModelFiles(store, cache).recall("/another\udcff") is None
