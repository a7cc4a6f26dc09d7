"""Names that survive a power cut: a file that is synced may still be lost with the directory entry that leads to it."""

import errno
import os
from pathlib import Path

from agentd.errors import StorageFailed, StorageFull


def sync_directory(directory: Path) -> None:
    """Returns once the names in `directory` are on disk. Raises OSError."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


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
        kind = StorageFull if error.errno in (errno.ENOSPC, errno.EDQUOT) else StorageFailed
        raise kind(f"{directory}: {error.strerror}") from None
