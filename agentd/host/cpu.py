"""What this machine's processor is good at, and how much of it this process may use."""

import contextlib
import os
from functools import cache
from pathlib import Path

from agentd.host.memory import groups

_BF16 = ("avx512_bf16", "amx_bf16", "bf16")  # processors that multiply in bfloat16 at twice the speed, or more


def multiplies_bf16() -> bool:
    """Whether this processor has instructions for matrices of bfloat16."""
    return any(flag in _flags() for flag in _BF16)


def has_amx() -> bool:
    """Whether it multiplies them in tiles (Intel's AMX)."""
    return "amx_bf16" in _flags()


@cache
def _flags() -> frozenset[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return frozenset()
    lists = (line.split(":", 1)[1].split() for line in lines if line.startswith(("flags", "Features")))
    return frozenset(next(lists, []))


def cores(root: Path = Path("/")) -> int:
    """How many threads compute fastest together: what affinity and the CPU quotas of the control groups allow, of
    hyperthreads one a core, and of slow cores beside fast ones none that would keep the others waiting.

    More threads than that wait for each other: at a quota of one core, two take a third longer than one.
    """
    quotas = [float(_fastest_together(_capacities(root)))]
    for directory, version in groups(root, "cpu"):
        with contextlib.suppress(OSError, ValueError):  # not limited, or no such file
            if version == 2:
                quota, period = (directory / "cpu.max").read_text().split()
            else:
                quota, period = ((directory / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
            if float(quota) > 0:
                quotas.append(float(quota) / float(period))
    return max(1, int(min(quotas) + 0.1))


def _capacities(root: Path) -> list[float]:
    """Of each core that this process may use, relative to the fastest of the machine's where the kernel knows (1024);
    hyperthreads of one core are one. The fastest come first."""
    capacities: dict[str, float] = {}
    for number in sorted(os.sched_getaffinity(0)):
        directory = root / f"sys/devices/system/cpu/cpu{number}"
        core, capacity = str(number), 1024.0
        for name in ("core_cpus_list", "thread_siblings_list"):  # since Linux 5.3, and before
            with contextlib.suppress(OSError):
                core = (directory / "topology" / name).read_text().strip() or core
                break
        with contextlib.suppress(OSError, ValueError):
            capacity = float((directory / "cpu_capacity").read_text())
        capacities[core] = max(capacity, capacities.get(core, 0.0))
    return sorted(capacities.values(), reverse=True)


def _fastest_together(capacities: list[float]) -> int:
    """How many of the fastest cores do most: all have an equal share of each product, and wait for the slowest."""
    return max(range(1, len(capacities) + 1), key=lambda n: (n * capacities[n - 1], -n), default=1)
