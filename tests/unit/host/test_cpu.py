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


def topology(cores: list[tuple[str, int | None]]) -> dict[str, str]:
    """Files of sysfs: per CPU the list of those it shares a core with, and its capacity."""
    files = {}
    for number, (siblings, capacity) in enumerate(cores):
        directory = f"sys/devices/system/cpu/cpu{number}"
        files[f"{directory}/topology/core_cpus_list"] = siblings
        if capacity is not None:
            files[f"{directory}/cpu_capacity"] = str(capacity)
    return files


def alone(*capacities: int) -> list[tuple[str, int | None]]:
    return [(str(number), capacity) for number, capacity in enumerate(capacities)]


@pytest.mark.parametrize(
    ("cores", "threads"),
    [
        ([(f"{number // 2 * 2}-{number // 2 * 2 + 1}", None) for number in range(8)], 4),  # hyperthreads
        ([(f"{number % 4},{number % 4 + 4}", 1024) for number in range(8)], 4),
        ([(str(number), None) for number in range(8)], 8),
        (alone(*[398] * 4, *[1024] * 4), 4),  # four small ones, four big ones
        (alone(*[485] * 4, *[1024] * 2), 6),  # two big ones do less than all six
        (alone(*[326] * 3, *[870] * 4, 1024), 5),
        ([], 8),  # a kernel that says nothing
    ],
)
def test_physical_cores_and_big_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cores: list[tuple[str, int | None]], threads: int
) -> None:
    if cores:
        monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(len(cores))))
    assert cpu.cores(machine(tmp_path, topology(cores))) == threads


def test_a_quota_and_an_affinity_count_on_top_of_the_topology(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = topology([(f"{number // 2 * 2}-{number // 2 * 2 + 1}", None) for number in range(8)])
    files |= {"proc/self/cgroup": "0::/a", "proc/self/mountinfo": V2, "sys/fs/cgroup/a/cpu.max": "300000 100000"}
    root = machine(tmp_path, files)
    assert cpu.cores(root) == 3
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2})
    assert cpu.cores(root) == 2
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {5})
    assert cpu.cores(root) == 1


def test_this_machine() -> None:
    assert 1 <= cpu.cores() <= 8
