"""The crash matrix: every named point and every call that changes a file, times what can go wrong there.

AGENTD_CRASH_MATRIX=full tries every point and every kind of fault in every scenario (half an hour on 2 cores); without
it, points that several scenarios pass take turns in them, and the kinds at every few calls.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tools import tiny_model

HERE = Path(__file__).parent
Run = tuple[str, str, int, str]
SCENARIOS = [
    "first start and pass",
    "rejected",
    "taken back",
    "stopped in a trial",
    "trainer dies",
    "start in a trial",
    "rebuilt",
    "stopped in training",
    "start with a parked pass",
]
KINDS = ["ENOSPC", "EIO", "EROFS", "kill", "power cut", "power cut, names kept"]
FULL = os.environ.get("AGENTD_CRASH_MATRIX") == "full"
# Every state change there is. One that no scenario passes any more would go untested.
POINTS = {
    *("schema made", "meanings added", "labels changed", "labels not changed"),
    *("feedback stored", "feedback forgotten", "examples used"),
    *(f"pass {state}" for state in ["triggered", "refused", "planned", "tapped", "trained", "gated", "staged"]),
    *(f"pass {state}" for state in ["rejected", "failed", "trial", "committed", "rolled_back"]),
    *(f"pass {state}" for state in ["parked", "resumed"]),
    *(f"revision {state}" for state in ["staged", "trial", "committed", "rolled_back", "discarded", "activated"]),
    *("trial started", "trial attempt spent", "trial passed", "trial failed"),
}
FILES = {
    *("revision files written", "revision files renamed", "revision files synced", "swap staged", "swap done"),
}


class Drivers:
    """Processes that run scenarios; one for each core."""

    def __init__(self, directory: Path) -> None:
        preload, model = directory / "preload.so", tiny_model.write(directory / "tiny.gguf", blocks=2)
        source = str(HERE / "preload.c")
        subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-o", str(preload), source, "-ldl"], check=True)
        self._processes = [self._start(directory / f"driver{i}", model, preload) for i in range(2)]
        self._free = list(self._processes)
        self._lock = threading.Semaphore(len(self._processes))
        self._pool = ThreadPoolExecutor(len(self._processes))

    def _start(self, directory: Path, model: Path, preload: Path) -> "subprocess.Popen[str]":
        directory.mkdir()
        command = [sys.executable, "-m", "tests.crash.driver", str(model), str(directory), str(preload)]
        environment = {name: value for name, value in os.environ.items() if not name.startswith("AGENTD_")}
        root = str(HERE.parent.parent)
        return subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**environment, "LD_PRELOAD": str(preload), "PYTHONPATH": root, "OMP_NUM_THREADS": "1"},
        )

    def run(self, scenario: str, fault: str | None = None, n: int = 0, at: str = "") -> dict[str, Any]:
        with self._lock:
            process = self._free.pop()
            try:
                assert process.stdin is not None
                assert process.stdout is not None
                process.stdin.write(json.dumps({"scenario": scenario, "fault": fault, "n": n, "at": at}) + "\n")
                process.stdin.flush()
                line = process.stdout.readline()
                assert line, "the driver has died"
                result: dict[str, Any] = json.loads(line)
                return result
            finally:
                self._free.append(process)

    def run_all(self, runs: "list[Run]") -> "list[tuple[Run, dict[str, Any]]]":
        """Every (scenario, fault, n, point) with its result."""
        return list(zip(runs, self._pool.map(lambda run: self.run(*run), runs), strict=True))

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)
        for process in self._processes:
            process.kill()
            process.wait()
            for stream in (process.stdin, process.stdout):
                if stream:
                    stream.close()


@pytest.fixture(scope="module")
def drivers() -> Iterator[Drivers]:
    if shutil.which("cc") is None:
        pytest.skip("a C compiler is needed for the library that lets calls fail")
    # in memory: some hundred starts sync a lot, and what is synced where is not what is tested here
    memory = Path("/dev/shm")
    directory = Path(tempfile.mkdtemp(prefix="crash-", dir=memory if os.access(memory, os.W_OK) else "/tmp"))
    running = Drivers(directory)
    yield running
    running.close()
    shutil.rmtree(directory, ignore_errors=True)


@pytest.fixture(scope="module")
def clean(drivers: Drivers) -> dict[str, dict[str, Any]]:
    """Every scenario without a fault."""
    results = {scenario: drivers.run(scenario) for scenario in SCENARIOS}
    for scenario, result in results.items():
        assert result["problem"] is None, (scenario, result["problem"])
        assert result["outcome"] == "done", (scenario, result)
    return results


def failures(results: list[tuple[Run, dict[str, Any]]]) -> list[str]:
    return [f"{run} {result['points']}: {result['problem']}" for run, result in results if result["problem"]]


def test_every_state_change_has_a_name(clean: dict[str, dict[str, Any]]) -> None:
    passed = {name for result in clean.values() for name in result["points"]}
    assert passed == POINTS | {f"{name}, committed" for name in POINTS} | FILES


def test_kill_9_at_every_named_point(
    drivers: Drivers, clean: dict[str, dict[str, Any]], note: Callable[[str], None]
) -> None:
    times = {scenario: Counter(clean[scenario]["points"]) for scenario in SCENARIOS}
    runs = [(s, "point", n + 1, name) for s in SCENARIOS for name in times[s] for n in range(times[s][name])]
    if not FULL:
        runs = [(_turn(name, times), "point", 1, name) for name in sorted(set().union(*times.values()))]
    results = drivers.run_all(runs)
    assert not failures(results), "\n".join(failures(results))
    assert [run for run, result in results if result["outcome"] != "killed"] == []
    note(f"crash matrix: kill -9 at {len({run[3] for run in runs})} named points, {len(runs)} runs, all green")


def _turn(name: str, times: dict[str, Counter[str]]) -> str:
    """One of the scenarios that pass the point; over the names, all of them come up."""
    passing = [scenario for scenario in SCENARIOS if name in times[scenario]]
    return passing[sum(name.encode()) % len(passing)]


# How many calls to go on by; not divisors of each other's, so that the kinds meet different calls.
STRIDES = {"first start and pass": 11, "rejected": 23, "taken back": 19, "trainer dies": 19, "start in a trial": 13}
STRIDES |= {"rebuilt": 17, "stopped in a trial": 19, "stopped in training": 23, "start with a parked pass": 13}


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_every_call_that_changes_a_file_fails_in_turn(
    drivers: Drivers, clean: dict[str, dict[str, Any]], scenario: str, note: Callable[[str], None]
) -> None:
    """The n-th call fails, for growing n, until a run passes clean."""
    counts: Counter[str] = Counter()
    results: list[tuple[Run, dict[str, Any]]] = []
    n, stride, turn, finished = 1, 1 if FULL else STRIDES[scenario], SCENARIOS.index(scenario), False
    while not finished:
        runs: list[Run] = []
        for _ in range(4):
            kinds = KINDS if FULL else [KINDS[turn % len(KINDS)]]
            runs += [(scenario, kind, n, "") for kind in kinds]
            n, turn = n + stride, turn + 1
        done = drivers.run_all(runs)
        results += done
        counts.update(run[1] for run, result in done if result["calls"] >= run[2])
        finished = all(result["calls"] < run[2] for run, result in done[-2:])
    by_kind = ", ".join(f"{kind} {counts[kind]}" for kind in KINDS)
    verdict = "RED" if failures(results) else "all green"
    note(f"crash matrix: {scenario}, {clean[scenario]['calls']} calls: {by_kind}; {verdict}")
    assert not failures(results), "\n".join(failures(results)[:20])
    assert min(counts.values()) > 0
