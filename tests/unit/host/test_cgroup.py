"""A limit of its own for the trainer: made where it is permitted, kept by the kernel, gone afterwards."""

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import pytest

from agentd.adapt.passes.trainer_process import Training
from agentd.engine.process.activity import Activity
from agentd.errors import TrainerOverLimit
from agentd.formats.gguf_header import read_header
from agentd.host import cgroup
from agentd.host.cgroup import Group
from agentd.learn.encoded import Encoded

MIB = 1 << 20
MISSING = 1 << 30  # no process has this number
MOUNT = "30 23 0:26 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate"


@pytest.fixture
def group() -> Iterator[Group]:
    own = cgroup.make("agentd-test")
    if own is None:
        pytest.skip("no control group can be made here")
    yield own
    own.remove()
    assert not own.path.exists()


def run_in(group: Group, code: str) -> subprocess.CompletedProcess[str]:
    join = f"open({str(group.path / 'cgroup.procs')!r}, 'w').write('0')\n"
    return subprocess.run([sys.executable, "-c", join + code], capture_output=True, text=True, timeout=60)


def test_the_kernel_ends_what_takes_more(group: Group) -> None:
    group.limit(64 * MIB)
    assert run_in(group, "x = bytearray(20 << 20); print(len(x))").stdout == f"{20 * MIB}\n"
    assert group.kills == 0
    assert run_in(group, "x = bytearray(200 << 20)").returncode == -9
    assert group.kills == 1


def test_a_trainer_over_its_limit_is_ended_and_says_so(group: Group, real_model: Path, tmp_path: Path) -> None:
    """As a pass runs it; the limit is far below what importing torch takes."""
    n = read_header(real_model).block_count
    encoded = tmp_path / "encoded.jsonl"
    encoded.write_text(json.dumps(asdict(Encoded.of([[1, 2, 3, 4]], [], 0, [(0, 3, 1)]))) + "\n")
    spec = {
        "model": str(real_model), "first_block": n - 1, "end_block": n, "tap": str(tmp_path), "encoded": str(encoded),
        "train": [0], "starts": [0], "options": {"threads": 1}, "output": str(tmp_path / "adapter.gguf"),
    }  # fmt: skip
    training = Training(Activity(), tmp_path / "log", group)

    async def train() -> None:
        await training.run(spec, tmp_path / "spec.json", lambda _: None, limit=64 * MIB)

    with pytest.raises(TrainerOverLimit, match="more than the 67 MB it was allowed"):
        asyncio.run(train())
    assert json.loads((tmp_path / "spec.json").read_text())["first_block"] == n - 1


def tree(root: Path, procs: str, controllers: str = "cpu memory pids") -> Path:
    """A delegated group of version 2 as this process would see it."""
    own = root / "sys/fs/cgroup/system.slice/agentd.service"
    own.mkdir(parents=True)
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text("0::/system.slice/agentd.service\n")
    (root / "proc/self/mountinfo").write_text(MOUNT + "\n")
    (own / "cgroup.controllers").write_text(controllers + "\n")
    (own / "cgroup.subtree_control").write_text("\n")
    (own / "cgroup.procs").write_text(procs)
    return own


def test_a_delegated_group_is_divided(tmp_path: Path) -> None:
    own = tree(tmp_path, f"{os.getpid()}\n")
    left = own / f"trainer-{MISSING}"
    left.mkdir()
    group = cgroup.make("trainer", tmp_path)
    assert not left.exists()  # of a daemon that was killed
    trainer = own / f"trainer-{os.getpid()}"
    assert group == Group(trainer, 2)
    assert (own / "daemon/cgroup.procs").read_text() == str(os.getpid())
    assert (own / "cgroup.subtree_control").read_text() == "+memory"
    group.limit(100)
    assert (trainer / "memory.max").read_text() == "100"
    assert (trainer / "memory.swap.max").read_text() == "0"
    assert group.kills == 0
    (trainer / "memory.events").write_text("low 0\nmax 7\noom 1\noom_kill 2\n")
    assert group.kills == 2


def test_other_peoples_processes_stay_where_they_are(tmp_path: Path) -> None:
    """A terminal's group belongs to its user, too."""
    own = tree(tmp_path, f"{os.getpid()}\n1\n")
    assert cgroup.make("trainer", tmp_path) is None
    assert not (own / "daemon").exists()


def test_without_a_memory_controller_there_is_no_group(tmp_path: Path) -> None:
    tree(tmp_path, f"{os.getpid()}\n", controllers="cpu pids")
    assert cgroup.make("trainer", tmp_path) is None
    assert cgroup.make("trainer", tmp_path / "nothing") is None
