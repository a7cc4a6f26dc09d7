"""Where things live unless the configuration says otherwise. Standard library only: agentctl reads it too."""

import os
from pathlib import Path


def state_dir() -> Path:
    """The directory for the database and the revisions: systemd's, the administrator's, or the user's."""
    if directories := os.environ.get("STATE_DIRECTORY"):
        return Path(directories.split(":")[0])
    base = os.environ.get("XDG_STATE_HOME") or str(Path.home() / ".local" / "state")
    return Path(base) / "agentd"


def cache_dir() -> Path:
    """The directory for downloaded models; safe to delete."""
    if directories := os.environ.get("CACHE_DIRECTORY"):
        return Path(directories.split(":")[0])
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "agentd"


def runtime_dir(state: Path | None = None) -> Path:
    """The directory for the sockets. Falls back to the state directory where no runtime directory exists."""
    if directories := os.environ.get("RUNTIME_DIRECTORY"):
        return Path(directories.split(":")[0])
    base = os.environ.get("XDG_RUNTIME_DIR")
    if base and os.path.isdir(base):
        return Path(base) / "agentd"
    return state or state_dir()
