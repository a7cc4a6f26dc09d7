"""Which machine this is: what was measured on one says little about another."""

import contextlib
import os
import platform
from pathlib import Path


def identity(root: Path = Path("/")) -> list[str]:
    """Its architecture, processor, number of cores and, where the system has one, its id (machine-id(5))."""
    parts = [platform.machine(), str(os.cpu_count())]
    with contextlib.suppress(OSError):
        lines = (root / "proc/cpuinfo").read_text().splitlines()
        names = ("model name", "Model", "CPU part")
        parts += sorted({line for line in lines if line.split("\t")[0].split(":")[0].strip() in names})
    with contextlib.suppress(OSError):
        parts.append((root / "etc/machine-id").read_text().strip())
    return parts
