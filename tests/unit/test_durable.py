"""Directories that are made survive a power cut, and a disk that fails is told in agentd's words."""

import errno
import os
from pathlib import Path

import pytest

from agentd import durable
from agentd.durable import make_directory
from agentd.errors import AgentdError, StorageFailed, StorageFull


def test_all_that_leads_to_a_new_directory_is_synced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[Path] = []
    monkeypatch.setattr(durable, "sync_directory", synced.append)
    make_directory(tmp_path / "a" / "b")
    assert set(synced) == {tmp_path, tmp_path / "a"}
    assert (tmp_path / "a" / "b").stat().st_mode & 0o777 == 0o700
    synced.clear()
    make_directory(tmp_path / "a" / "b")
    assert synced == []


@pytest.mark.parametrize(("number", "kind"), [(errno.ENOSPC, StorageFull), (errno.EROFS, StorageFailed)])
def test_a_failing_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, kind: type[AgentdError]) -> None:
    def fail(directory: Path) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(durable, "sync_directory", fail)
    with pytest.raises(kind, match="state"):
        make_directory(tmp_path / "state")
