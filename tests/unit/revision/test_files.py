import errno
import hashlib
import json
import os
from pathlib import Path

import pytest

from agentd.errors import RevisionCorrupt, StorageFailed, StorageFull
from agentd.revision.files import ADAPTER, CONTROL, LEDGER, MANIFEST, NETWORK, RevisionFiles

BASE = "ab" * 32


@pytest.fixture
def files(tmp_path: Path) -> RevisionFiles:
    return RevisionFiles(tmp_path / "revisions", BASE)


@pytest.fixture
def sources(tmp_path: Path) -> dict[str, Path]:
    paths = {}
    for name, data in ((ADAPTER, b"adapter" * 100), (CONTROL, b"control" * 50)):
        path = tmp_path / f"source-{name}"
        path.write_bytes(data)
        paths[name] = path
    return paths


def test_a_revision_comes_back_as_it_was_written(files: RevisionFiles, sources: dict[str, Path]) -> None:
    digest = files.write(3, sources, {"parent": 0, "method": "elasticzo"})
    adapter, control = files.weights(3)
    assert adapter is not None
    assert control is not None
    assert adapter.read_bytes() == sources[ADAPTER].read_bytes()
    assert control.read_bytes() == sources[CONTROL].read_bytes()
    manifest = files.manifest(3)
    assert manifest is not None
    assert (manifest["revision"], manifest["parent"], manifest["base_sha256"]) == (3, 0, BASE)
    assert digest == hashlib.sha256((files.directory(3) / MANIFEST).read_bytes()).hexdigest()
    assert {path.stat().st_mode & 0o777 for path in files.directory(3).iterdir()} == {0o600}
    assert files.directory(3).stat().st_mode & 0o777 == 0o700
    assert files.size(3) == sum(path.stat().st_size for path in files.directory(3).iterdir())


def test_the_base_needs_no_files(files: RevisionFiles) -> None:
    assert files.weights(0) == (None, None)
    assert files.manifest(0) is None
    assert files.size(0) == 0


@pytest.mark.parametrize("name", [ADAPTER, CONTROL])
@pytest.mark.parametrize("damage", ["flip", "truncate", "extend", "remove", "empty"])
def test_every_damage_to_a_file_is_seen(files: RevisionFiles, sources: dict[str, Path], name: str, damage: str) -> None:
    files.write(1, sources, {})
    path = files.directory(1) / name
    data = path.read_bytes()
    changed = {"flip": data[:-1] + bytes([data[-1] ^ 1]), "truncate": data[:-1], "extend": data + b"x", "empty": b""}
    if damage == "remove":
        path.unlink()
    else:
        path.write_bytes(changed[damage])
    with pytest.raises(RevisionCorrupt, match=name):
        files.weights(1)


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b"null", b'{"files": 3}', b"\xff\xfe", b'{"files": {}}'])
def test_a_damaged_manifest_is_seen(files: RevisionFiles, sources: dict[str, Path], text: bytes) -> None:
    files.write(1, sources, {})
    (files.directory(1) / MANIFEST).write_bytes(text)
    with pytest.raises(RevisionCorrupt):
        files.verified(1)


def test_a_missing_directory_is_a_corrupt_revision(files: RevisionFiles) -> None:
    with pytest.raises(RevisionCorrupt, match="manifest"):
        files.verified(9)


def test_a_manifest_cannot_lead_out_of_its_directory(files: RevisionFiles, sources: dict[str, Path]) -> None:
    files.write(1, sources, {})
    path = files.directory(1) / MANIFEST
    tree = json.loads(path.read_text())
    tree["files"] = {"../../source-adapter.gguf": {"sha256": hashlib.sha256(b"adapter" * 100).hexdigest()}}
    path.write_text(json.dumps(tree))
    with pytest.raises(RevisionCorrupt):
        files.verified(1)


def test_revisions_of_another_model_are_not_loaded(files: RevisionFiles, sources: dict[str, Path]) -> None:
    files.write(1, sources, {})
    other = RevisionFiles(files.directory(1).parent, "cd" * 32)
    with pytest.raises(RevisionCorrupt, match="another base model"):
        other.verified(1)


@pytest.mark.parametrize(
    ("number", "kind"), [(errno.ENOSPC, StorageFull), (errno.EDQUOT, StorageFull), (errno.EIO, StorageFailed)]
)
@pytest.mark.parametrize("call", ["fsync", "open", "rename"])
def test_a_write_that_fails_leaves_nothing(
    files: RevisionFiles,
    sources: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
    number: int,
    kind: type[Exception],
    call: str,
) -> None:
    """Every one of the calls fails in turn, until a run passes."""
    owner = os if call == "fsync" else Path
    real = getattr(owner, call)
    for failing in range(1, 20):
        calls = 0

        def fail(*arguments: object, failing: int = failing, **options: object) -> object:
            nonlocal calls
            calls += 1
            if calls == failing:
                raise OSError(number, os.strerror(number))
            return real(*arguments, **options)

        with monkeypatch.context() as patch:
            patch.setattr(owner, call, fail)
            try:
                files.write(1, sources, {})
            except kind:
                assert [
                    path.name for path in files.directory(1).parent.iterdir() if not path.name.startswith("1")
                ] == []
                files.reconcile(set())
                continue
        break
    else:
        raise AssertionError("no run passed")
    assert failing > 1
    assert set(files.verified(1)) == {ADAPTER, CONTROL}


def test_what_a_crash_left_behind_is_removed(files: RevisionFiles, sources: dict[str, Path]) -> None:
    files.write(1, sources, {})
    files.write(2, sources, {})
    (files.directory(1).parent / ".3.tmp").mkdir()
    assert sorted(files.reconcile({1})) == [".3.tmp", "2"]
    assert set(files.verified(1)) == {ADAPTER, CONTROL}


@pytest.mark.parametrize("name", [ADAPTER, CONTROL, NETWORK])
def test_a_twin_has_the_same_weights_on_any_way_to_them(files: RevisionFiles, tmp_path: Path, name: str) -> None:
    weights, changed, ledger = (tmp_path / what for what in ("weights", "changed", "ledger"))
    for path, data in ((weights, b"weights"), (changed, b"weightz"), (ledger, b"steps")):
        path.write_bytes(data)
    files.write(1, {name: changed}, {"parent": 0})
    files.write(2, {name: weights, LEDGER: ledger}, {"parent": 0})
    assert files.twin({name: weights}, [1, 2]) == 2
    assert files.twin({name: weights}, [1]) is None
