"""How much memory there is now, and what our processes take. Swap is not memory.

psutil does not see control groups: a limit anywhere on the way up to the root, of version 1 or 2, may leave less
than /proc/meminfo says. The memory of a GPU is not read here: asking CUDA for it takes torch and a CUDA context, which
would cost this process more than it spends in a year. The trainer, which has both, checks its own device; on boards
whose GPU shares the system's memory (Jetson) this reading covers it.
"""

import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

from agentd import ids
from agentd.host.sensors import Sensors

_UNLIMITED = 1 << 60  # version 1 writes the largest multiple of the page size for "no limit"
_ROOT = Path("/")
_WALK_EVERY = 5.0  # seconds
_WALK_BEYOND = 16 << 20  # bytes above the last walk


@dataclass(frozen=True)
class Limit:
    """One limit of one control group, in bytes. `cache` is file cache that the kernel gives back without harm."""

    path: str
    name: str
    limit: int
    usage: int
    cache: int

    @property
    def free(self) -> int:
        return max(0, self.limit - max(0, self.usage - self.cache))


@dataclass(frozen=True)
class Reading:
    """Memory at one moment, in bytes. `pressure` is the PSI "some avg10" in percent: the share of the last 10 s in
    which something waited for memory; None where the kernel does not tell."""

    at: str
    system_available: int
    limits: tuple[Limit, ...]
    pressure: float | None
    sensors: Sensors = Sensors()

    @property
    def available(self) -> int:
        """What could be allocated without swapping, reclaim of hot pages, or the OOM killer."""
        return min([self.system_available, *(limit.free for limit in self.limits)])

    @property
    def bound_by(self) -> str:
        """What sets `available`: "system", or the tightest limit's file."""
        tightest = min(self.limits, key=lambda limit: limit.free, default=None)
        if tightest is None or tightest.free >= self.system_available:
            return "system"
        return f"{tightest.path}/{tightest.name}"

    def as_json(self) -> dict[str, Any]:
        limits = [{**asdict(limit), "free": limit.free} for limit in self.limits]
        return {**asdict(self), "limits": limits, "available": self.available, "bound_by": self.bound_by}


def _system_available() -> int:
    return int(psutil.virtual_memory().available)


def read(
    root: Path = _ROOT,
    system_available: Callable[[], int] = _system_available,
    sensors: Callable[[], Sensors] | None = None,
) -> Reading:
    """Reads everything now, the sensors if `sensors` is given (sensors.py; some are slow). Never raises OSError.

    `root` is where proc/ and the mount points are looked for.
    """
    hierarchy = list(groups(root))
    limits = tuple(limit for directory, version in hierarchy for limit in _limits(directory, version, root))
    files = [root / "proc/pressure/memory"]
    files += [directory / "memory.pressure" for directory, version in hierarchy[:1] if version == 2]
    pressures = [value for value in map(_pressure, files) if value is not None]
    measured = sensors() if sensors else Sensors()
    return Reading(ids.now(), system_available(), limits, max(pressures, default=None), measured)


def groups(root: Path, controller: str = "memory") -> Iterator[tuple[Path, int]]:
    """The control groups of this process as (directory, version), innermost first, up to each mount."""
    own: dict[int, str] = {}
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if not controllers:
            own[2] = path
        elif controller in controllers.split(","):
            own[1] = path
    for version, mount, mounted in sorted(_mounts(root, controller), reverse=True):
        if version not in own:
            continue
        path = own[version]
        # In a container the mount may begin at our own group, or the path may point out of the namespace.
        inside = path[len(mounted) :] if mounted != "/" and path.startswith(mounted) else path
        parts = [part for part in inside.split("/") if part and part != ".."]
        for depth in range(len(parts), -1, -1):
            directory = mount.joinpath(*parts[:depth])
            if directory.is_dir():
                yield directory, version


def _mounts(root: Path, controller: str) -> Iterator[tuple[int, Path, str]]:
    """(version, mount point, the group mounted there) of the hierarchies that may limit it (proc(5), mountinfo)."""
    for line in _text(root / "proc/self/mountinfo").splitlines():
        fields = line.split()
        kind = fields[fields.index("-") + 1]
        if kind == "cgroup2" or (kind == "cgroup" and controller in fields[-1].split(",")):
            point = fields[4].replace("\\040", " ")
            yield (2 if kind == "cgroup2" else 1), root / point.lstrip("/"), fields[3]


def _limits(directory: Path, version: int, root: Path) -> Iterator[Limit]:
    names = ("memory.max", "memory.high") if version == 2 else ("memory.limit_in_bytes",)
    usage = _number(directory / ("memory.current" if version == 2 else "memory.usage_in_bytes"))
    if usage is None:
        return
    cache = reclaimable(_text(directory / "memory.stat"), version)
    for name in names:
        limit = _number(directory / name)
        if limit is not None and limit < _UNLIMITED:
            yield Limit("/" + str(directory.relative_to(root)), name, limit, usage, cache)


def reclaimable(statistics: str, version: int) -> int:
    """Bytes of file cache that the kernel gives back without harm, from a group's memory.stat.

    That is what no process maps, for instance the libraries of a trainer that has ended. What is mapped is the model
    that serves: the kernel would take it, and read it again for every answer.
    """
    counters = dict(line.split() for line in statistics.splitlines() if line.count(" ") == 1)
    names = ("inactive_file", "active_file", "file_mapped")
    if version == 1:
        names = ("total_inactive_file", "total_active_file", "total_mapped_file")
    inactive, active, mapped = (int(counters.get(name, 0)) for name in names)
    return max(0, inactive + active - mapped) if names[2] in counters else inactive


def _number(path: Path) -> int | None:
    text = _text(path).strip()
    return int(text) if text.isdigit() else None


def _pressure(path: Path) -> float | None:
    for line in _text(path).splitlines():
        if line.startswith("some "):
            values = dict(field.split("=") for field in line.split()[1:])
            return float(values["avg10"])
    return None


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError):
        return ""  # not on this kernel, not mounted, or gone between two reads


def pss(pid: int, root: Path = _ROOT) -> int | None:
    """The proportional set size of a process in bytes: shared pages are divided among their users (proc(5)).

    Where the kernel does not tell (no smaps_rollup, or not allowed) its resident set; None when there is no process.
    """
    for line in _text(root / f"proc/{pid}/smaps_rollup").splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) * 1024
    return rss(pid, root)


def rss(pid: int, root: Path = _ROOT) -> int | None:
    """The resident set size of a process in bytes, shared pages counted in full; None when there is no process."""
    fields = _text(root / f"proc/{pid}/statm").split()
    if len(fields) < 2 or fields[1] == "0":  # a zombie has given all memory back
        return None
    return int(fields[1]) * os.sysconf("SC_PAGESIZE")


def anonymous(pid: int, root: Path = _ROOT) -> int | None:
    """What of a process's resident set belongs to no file, in bytes: what the kernel cannot have back while it runs.

    None when there is no process.
    """
    fields = _text(root / f"proc/{pid}/statm").split()
    if len(fields) < 3 or fields[1] == "0":
        return None
    return (int(fields[1]) - int(fields[2])) * os.sysconf("SC_PAGESIZE")


class Meter:
    """Proportional set sizes, often and cheaply.

    For one the kernel walks through all pages of the process, which meanwhile cannot map or unmap any: 20 times a
    second cost a trainer of 600 MB a fifth of its speed. The resident set size costs nothing. What a process gains or
    loses between two walks is nearly always its own memory, and that changes both by the same.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic, root: Path = _ROOT) -> None:
        self._clock, self._root = clock, root
        self._walks: dict[int, tuple[float, int, int]] = {}  # when, resident and proportional size, by process

    def read(self, pid: int) -> int | None:
        """The size now; None when there is no process."""
        resident, now = rss(pid, self._root), self._clock()
        if resident is None:
            self._walks.pop(pid, None)
            return None
        at, walked, size = self._walks.get(pid, (-math.inf, 0, 0))
        if now - at >= _WALK_EVERY or resident > walked + _WALK_BEYOND:
            share = pss(pid, self._root)
            if share is None:
                return None
            self._walks[pid] = (now, resident, share)
            return share
        return max(0, size + resident - walked)
