"""What this machine's processor is good at, and how much of it this process may use."""

import contextlib
import os
from pathlib import Path

from agentd.host.memory import groups

_BF16 = ("avx512_bf16", "amx_bf16", "bf16")  # processors that multiply in bfloat16 at twice the speed, or more


def multiplies_bf16() -> bool:
    """Whether this processor has instructions for matrices of bfloat16."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return False
    flags = next((line.split(":", 1)[1].split() for line in lines if line.startswith(("flags", "Features"))), [])
    return any(flag in flags for flag in _BF16)


def cores(root: Path = Path("/")) -> int:
    """How many threads can compute at the same time: what affinity and the CPU quotas of the control groups allow.

    More threads than that wait for each other: at a quota of one core, two take a third longer than one.
    """
    quotas = [float(len(os.sched_getaffinity(0)))]
    for directory, version in groups(root, "cpu"):
        with contextlib.suppress(OSError, ValueError):  # not limited, or no such file
            if version == 2:
                quota, period = (directory / "cpu.max").read_text().split()
            else:
                quota, period = ((directory / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
            if float(quota) > 0:
                quotas.append(float(quota) / float(period))
    return max(1, int(min(quotas) + 0.1))
