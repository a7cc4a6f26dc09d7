"""Files that survive a power cut: what is synced may still be lost with the directory entry that leads to it."""

import contextlib
import errno
import hashlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Literal

from agentd.errors import StorageFailed, StorageFull

_CHUNK = 1 << 20  # bytes in memory at a time


def sync(file: IO[bytes]) -> None:
    """Returns once what was written to `file` is on disk. Raises OSError."""
    file.flush()
    os.fsync(file.fileno())


def sync_directory(directory: Path) -> None:
    """Returns once the names in `directory` are on disk. Raises OSError."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def new_file(path: Path, mode: Literal["xb", "wb"] = "xb") -> Iterator[IO[bytes]]:
    """A file to write, for its owner alone; it is on disk when the block has ended, its name only with its directory.

    Raises OSError.
    """
    with path.open(mode) as file:
        os.fchmod(file.fileno(), 0o600)
        yield file
        sync(file)


def publish(temporary: Path, path: Path) -> None:
    """Gives a finished file its name: after a power cut `path` is this file as a whole, or what it was before.

    Raises OSError.
    """
    with temporary.open("rb") as file:
        os.fsync(file.fileno())
    temporary.replace(path)
    sync_directory(path.parent)


@contextlib.contextmanager
def replacement(path: Path, *, durable: bool = True) -> Iterator[Path]:
    """Where to write what is to become `path`; it does so at the end of the block, and is dropped where that fails.

    durable  without it there is no fsync, for files that no one needs after a power cut
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        if durable:
            publish(temporary, path)
        else:
            temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def make_directory(directory: Path) -> None:
    """Makes it for its owner alone, with all that leads to it, and returns once that is on disk.

    Raises StorageFull and StorageFailed.
    """
    try:
        missing = [path for path in (directory, *directory.parents) if not path.exists()]
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        for path in missing:
            sync_directory(path.parent)
    except OSError as error:
        raise storage_error(error, str(directory)) from None


def storage_error(error: OSError, what: str) -> StorageFailed | StorageFull:
    """The error to raise where `what` could not be written."""
    kind = StorageFull if error.errno in (errno.ENOSPC, errno.EDQUOT) else StorageFailed
    return kind(f"{what}: {error.strerror or error}")


def sha256(path: Path, on_read: Callable[[int], None] = lambda size: None) -> str:
    """Of a file's bytes; `on_read` gets the size of each part that was read. Raises OSError."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(_CHUNK):
            digest.update(part)
            on_read(len(part))
    return digest.hexdigest()
