"""How many threads `auto` takes: files of control groups under another root."""

import os
from pathlib import Path

import pytest

from agentd.host import cpu

V2 = "30 23 0:26 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw"
V1 = "31 23 0:27 / /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct"


def machine(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    return root


@pytest.fixture(autouse=True)
def eight_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))


@pytest.mark.parametrize(
    ("quota", "outer", "threads"),
    [
        ("max 100000", "max 100000", 8),
        ("100000 100000", "max 100000", 1),
        ("400000 100000", "max 100000", 4),
        ("350000 100000", "max 100000", 3),
        ("50000 100000", "max 100000", 1),
        ("400000 100000", "200000 100000", 2),
        ("99999999 100000", "max 100000", 8),
        ("damaged", "max 100000", 8),
    ],
)
def test_version_2(tmp_path: Path, quota: str, outer: str, threads: int) -> None:
    files = {"proc/self/cgroup": "0::/a/b", "proc/self/mountinfo": V2}
    files |= {"sys/fs/cgroup/a/b/cpu.max": quota, "sys/fs/cgroup/a/cpu.max": outer}
    assert cpu.cores(machine(tmp_path, files)) == threads


@pytest.mark.parametrize(("quota", "threads"), [("-1", 8), ("150000", 1), ("200000", 2)])
def test_version_1(tmp_path: Path, quota: str, threads: int) -> None:
    files = {"proc/self/cgroup": "4:cpu,cpuacct:/a\n3:memory:/m", "proc/self/mountinfo": V1}
    files |= {
        "sys/fs/cgroup/cpu,cpuacct/a/cpu.cfs_quota_us": quota,
        "sys/fs/cgroup/cpu,cpuacct/a/cpu.cfs_period_us": "100000",
    }
    assert cpu.cores(machine(tmp_path, files)) == threads


def test_this_machine() -> None:
    assert 1 <= cpu.cores() <= 8
