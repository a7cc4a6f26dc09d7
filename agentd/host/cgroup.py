"""A control group for one process, so that the kernel ends that process, and nothing else, at a limit of its own.

Version 2 lets only those divide a group to whom it was delegated (systemd: Delegate=memory), and a group that has
children may hold no processes: this process and what it has started move into a child group of their own first. In
version 1 a child group can be made wherever its directory can be written to. See cgroups(7).
"""

import contextlib
import os
from dataclasses import dataclass
from pathlib import Path

import psutil

from agentd.host import memory

_REST = "daemon"  # what moves out of the way in version 2


@dataclass(frozen=True)
class Group:
    """A group below this process's own. Nothing here raises: a limit that cannot be set is one that is not there."""

    path: Path
    version: int

    def limit(self, size: int) -> None:
        """Bytes that the group's processes may take together, swap included where the kernel counts it."""
        names = ("memory.max",) if self.version == 2 else ("memory.limit_in_bytes", "memory.memsw.limit_in_bytes")
        for name in names:
            _write(self.path / name, str(size))
        if self.version == 2:
            _write(self.path / "memory.swap.max", "0")

    @property
    def kills(self) -> int:
        """How often the kernel has ended a process of this group for its memory."""
        name = "memory.events" if self.version == 2 else "memory.oom_control"
        with contextlib.suppress(OSError, ValueError):
            for line in (self.path / name).read_text().splitlines():
                key, _, value = line.partition(" ")
                if key == "oom_kill":
                    return int(value)
        return 0

    def remove(self) -> None:
        """The group has to be empty; otherwise it stays until the service's own group goes."""
        with contextlib.suppress(OSError):
            self.path.rmdir()


def make(name: str, root: Path = Path("/")) -> Group | None:
    """A group below this process's own, or None where that is not permitted. `name` is the first part of its name, this
    process's number the second, because others may do the same.

    `root` is where proc/ and the mount points are looked for.
    """
    innermost: dict[int, Path] = {}
    for directory, version in memory.groups(root):
        innermost.setdefault(version, directory)
    for version, own in innermost.items():
        path = own / f"{name}-{os.getpid()}"
        if os.access(own, os.W_OK) and (version == 1 or _divide(own)):
            with contextlib.suppress(OSError):
                _sweep(own, name)
                path.mkdir(exist_ok=True)
                return Group(path, version)
    return None


def _sweep(own: Path, name: str) -> None:
    """Removes what processes left that were killed."""
    for path in own.glob(f"{name}-*"):
        number = path.name.rpartition("-")[2]
        if number.isdigit() and not psutil.pid_exists(int(number)):
            with contextlib.suppress(OSError):
                path.rmdir()


def _divide(own: Path) -> bool:
    """Sees to it that children of a version 2 group get a memory controller. False where that is not permitted."""
    controllers, subtree = own / "cgroup.controllers", own / "cgroup.subtree_control"
    try:
        if "memory" not in controllers.read_text().split() or not os.access(subtree, os.W_OK):
            return False
        if "memory" in subtree.read_text().split():
            return True
        members = {int(line) for line in (own / "cgroup.procs").read_text().split()}
        this = psutil.Process()
        if not members <= {this.pid, *(child.pid for child in this.children(recursive=True))}:
            return False  # a shell's group, say: other people's processes stay where they are
        rest = own / _REST
        rest.mkdir(exist_ok=True)
        for pid in members:
            with contextlib.suppress(ProcessLookupError):
                (rest / "cgroup.procs").write_text(str(pid))
        subtree.write_text("+memory")
    except (OSError, ValueError, psutil.Error):
        return False
    return True


def _write(path: Path, text: str) -> None:
    with contextlib.suppress(OSError):
        path.write_text(text)
