import mmap
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from agentd.host.memory import Meter, anonymous, pss, read, reclaimable

MIB = 2**20


def write(root: Path, files: dict[str, object]) -> None:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{content}\n")


V2_MOUNT = "30 23 0:26 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate"


def test_this_machine() -> None:
    reading = read()
    assert 0 < reading.available <= psutil.virtual_memory().total
    assert reading.system_available == pytest.approx(psutil.virtual_memory().available, rel=0.2)
    assert reading.at.endswith("Z")
    assert reading.as_json()["available"] == reading.available
    if Path("/proc/pressure/memory").exists():
        assert reading.pressure is not None


def test_every_limit_on_the_way_up_counts(tmp_path: Path) -> None:
    write(
        tmp_path,
        {
            "proc/self/cgroup": "0::/edge.slice/agentd.service",
            "proc/self/mountinfo": V2_MOUNT,
            "sys/fs/cgroup/edge.slice/memory.max": 900 * MIB,
            "sys/fs/cgroup/edge.slice/memory.high": "max",
            "sys/fs/cgroup/edge.slice/memory.current": 700 * MIB,
            "sys/fs/cgroup/edge.slice/memory.stat": f"anon 1\ninactive_file {100 * MIB}\nactive_file {50 * MIB}",
            "sys/fs/cgroup/edge.slice/agentd.service/memory.max": "max",
            "sys/fs/cgroup/edge.slice/agentd.service/memory.high": 800 * MIB,
            "sys/fs/cgroup/edge.slice/agentd.service/memory.current": 200 * MIB,
            "sys/fs/cgroup/edge.slice/agentd.service/memory.stat": "inactive_file 0",
        },
    )
    reading = read(tmp_path, lambda: 4096 * MIB)
    assert [(limit.name, limit.free) for limit in reading.limits] == [
        ("memory.high", 600 * MIB),
        ("memory.max", 300 * MIB),
    ]
    assert reading.available == 300 * MIB
    assert reading.bound_by == "/sys/fs/cgroup/edge.slice/memory.max"
    assert read(tmp_path, lambda: 100 * MIB).available == 100 * MIB
    assert read(tmp_path, lambda: 100 * MIB).bound_by == "system"


def test_usage_beyond_the_limit_leaves_nothing(tmp_path: Path) -> None:
    write(
        tmp_path,
        {
            "proc/self/cgroup": "0::/a",
            "proc/self/mountinfo": V2_MOUNT,
            "sys/fs/cgroup/a/memory.high": 10,
            "sys/fs/cgroup/a/memory.current": 20,
        },
    )
    assert read(tmp_path, lambda: 100).available == 0


def test_version_1(tmp_path: Path) -> None:
    write(
        tmp_path,
        {
            "proc/self/cgroup": "5:cpu,cpuacct:/x\n4:memory:/docker/abc\n0::/ignored",
            "proc/self/mountinfo": (
                "33 23 0:29 /docker/abc /sys/fs/cgroup/memory rw shared:9 - cgroup cgroup rw,memory\n"
                "34 23 0:30 / /sys/fs/cgroup/cpu rw shared:9 - cgroup cgroup rw,cpu,cpuacct"
            ),
            "sys/fs/cgroup/memory/memory.limit_in_bytes": 512 * MIB,
            "sys/fs/cgroup/memory/memory.usage_in_bytes": 200 * MIB,
            "sys/fs/cgroup/memory/memory.stat": f"inactive_file 1\ntotal_inactive_file {8 * MIB}",
        },
    )
    assert read(tmp_path, lambda: 4096 * MIB).available == 320 * MIB
    write(tmp_path, {"sys/fs/cgroup/memory/memory.limit_in_bytes": 0x7FFFFFFFFFFFF000})
    assert read(tmp_path, lambda: 4096 * MIB).limits == ()


def test_file_cache_that_is_not_mapped_is_free() -> None:
    """The libraries of a trainer that has ended; what is mapped is the model that serves."""
    text = "inactive_file 10\nactive_file 200\nfile_mapped {}\n"
    assert reclaimable(text.format(90), 2) == 120
    assert reclaimable(text.format(300), 2) == 0  # shared memory is mapped, too
    assert reclaimable("inactive_file 7\nactive_file 9", 2) == 7  # it is not known what is mapped
    assert reclaimable("total_inactive_file 7\ntotal_active_file 9\ntotal_mapped_file 4", 1) == 12
    assert reclaimable("", 1) == 0


def test_a_container_whose_path_points_out_of_its_namespace(tmp_path: Path) -> None:
    write(
        tmp_path,
        {
            "proc/self/cgroup": "0::/../outside",
            "proc/self/mountinfo": V2_MOUNT,
            "sys/fs/cgroup/memory.max": 64 * MIB,
            "sys/fs/cgroup/memory.current": 4 * MIB,
        },
    )
    assert read(tmp_path, lambda: 4096 * MIB).available == 60 * MIB


def test_pressure_of_the_system_and_of_the_own_group(tmp_path: Path) -> None:
    psi = "some avg10={} avg60=0.10 avg300=0.00 total=4711\nfull avg10=99.00 avg60=0.00 avg300=0.00 total=0"
    assert read(tmp_path, lambda: 1).pressure is None
    write(tmp_path, {"proc/pressure/memory": psi.format("1.25")})
    assert read(tmp_path, lambda: 1).pressure == 1.25
    write(
        tmp_path,
        {
            "proc/self/cgroup": "0::/a",
            "proc/self/mountinfo": V2_MOUNT,
            "sys/fs/cgroup/a/memory.pressure": psi.format("7.50"),
        },
    )
    assert read(tmp_path, lambda: 1).pressure == 7.5


def test_a_machine_that_tells_nothing(tmp_path: Path) -> None:
    reading = read(tmp_path, lambda: 5)
    assert (reading.available, reading.limits, reading.pressure, reading.bound_by) == (5, (), None, "system")


def test_swap_is_not_memory(tmp_path: Path) -> None:
    """A group may swap as much as it likes: what counts is its limit on memory itself."""
    write(
        tmp_path,
        {
            "proc/self/cgroup": "0::/a",
            "proc/self/mountinfo": V2_MOUNT,
            "sys/fs/cgroup/a/memory.max": 100 * MIB,
            "sys/fs/cgroup/a/memory.current": 90 * MIB,
            "sys/fs/cgroup/a/memory.swap.max": 8192 * MIB,
            "sys/fs/cgroup/a/memory.swap.current": 0,
        },
    )
    assert read(tmp_path, lambda: 4096 * MIB).available == 10 * MIB


@pytest.fixture
def holder() -> Iterator[subprocess.Popen[str]]:
    """A process that holds 40 MiB."""
    code = "import time; data = bytearray(b'x') * (40 << 20); print('ready', flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        yield process
        process.kill()


def test_memory_of_a_real_process(holder: "subprocess.Popen[str]") -> None:
    own = pss(holder.pid)
    assert own is not None
    assert 40 * MIB < own <= psutil.Process(holder.pid).memory_info().rss


def test_a_process_that_is_gone() -> None:
    process = subprocess.Popen([sys.executable, "-c", ""])
    deadline = time.monotonic() + 10
    while psutil.Process(process.pid).status() != psutil.STATUS_ZOMBIE and time.monotonic() < deadline:
        time.sleep(0.02)
    assert pss(process.pid) is None
    process.wait()
    assert pss(process.pid) is None


def test_resident_set_where_the_kernel_does_not_tell(tmp_path: Path) -> None:
    write(tmp_path, {"proc/7/statm": "1000 300 200 1 0 100 0"})
    assert pss(7, tmp_path) == 300 * os.sysconf("SC_PAGESIZE")
    write(tmp_path, {"proc/7/smaps_rollup": "5581-7ffc ---p 00000000 00:00 0 [rollup]\nRss:   1200 kB\nPss:    512 kB"})
    assert pss(7, tmp_path) == 512 * 1024


def test_a_meter_walks_seldom_and_follows_what_a_process_takes(tmp_path: Path) -> None:
    page, now = os.sysconf("SC_PAGESIZE"), 0.0

    def holds(resident: int, proportional: int) -> None:
        rollup = f"Rss: {resident // 1024} kB\nPss: {proportional // 1024} kB"
        write(tmp_path, {"proc/7/statm": f"1 {resident // page} 1", "proc/7/smaps_rollup": rollup})

    meter = Meter(lambda: now, tmp_path)
    holds(100 * MIB, 60 * MIB)
    assert meter.read(7) == 60 * MIB
    holds(110 * MIB, 71 * MIB)  # a little more: taken for its own, nothing is walked
    assert meter.read(7) == 70 * MIB
    holds(90 * MIB, 52 * MIB)
    assert meter.read(7) == 50 * MIB
    holds(140 * MIB, 99 * MIB)  # much more
    assert meter.read(7) == 99 * MIB
    holds(139 * MIB, 70 * MIB)  # what was shared is its own no longer, and that shows after a while
    assert meter.read(7) == 98 * MIB
    now = 5.0
    assert meter.read(7) == 70 * MIB
    write(tmp_path, {"proc/7/statm": ""})
    assert meter.read(7) is None
    holds(10 * MIB, 5 * MIB)  # another process with that number
    assert meter.read(7) == 5 * MIB


def test_anonymous_memory_leaves_pages_of_files_out(tmp_path: Path) -> None:
    page = os.sysconf("SC_PAGESIZE")
    assert anonymous(7, tmp_path) is None
    write(tmp_path, {"proc/7/statm": "1000 300 200 1 0 100 0"})
    assert anonymous(7, tmp_path) == 100 * page
    large = tmp_path / "large"
    large.write_bytes(bytes(64 * MIB))
    before = anonymous(os.getpid())
    assert before is not None
    with large.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        assert sum(mapped[::page]) == 0  # all of it is resident
        grown = anonymous(os.getpid())
        assert grown is not None
        assert grown - before < 8 * MIB
    # Mapped afresh: the heap of a process that has run other tests may have 32 MiB that are free and resident.
    with mmap.mmap(-1, 32 * MIB, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as own:
        own.write(b"1" * (32 * MIB))
        grown = anonymous(os.getpid())
        assert grown is not None
        assert grown - before > 24 * MIB


def test_a_meter_agrees_with_the_kernel(holder: "subprocess.Popen[str]") -> None:
    meter = Meter()
    for _ in range(3):
        assert meter.read(holder.pid) == pytest.approx(pss(holder.pid), rel=0.02)
