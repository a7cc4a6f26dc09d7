"""Runs scenarios in forked processes, each with one fault. Commands and results are JSON lines on stdin and stdout.

    python -m tests.crash.driver MODEL DIRECTORY PRELOAD.so       with LD_PRELOAD=PRELOAD.so

{"scenario", "fault": null, "n": 0}   runs clean; the result has "points", the names passed, and "calls", how many calls
                                      changed something
{"scenario", "fault": "point", "at": name, "n"}   kill -9 at the n-th time that the point is passed
{"scenario", "fault": "kill" | "ENOSPC" | "EIO" | "EROFS", "n"}   at the n-th call
{"scenario", "fault": "power cut" | "power cut, names kept", "n"}   at the n-th call: what was not synced is gone
The result: {"outcome", "problem", "calls", ...}; a problem is None when every invariant holds.
"""

import asyncio
import ctypes
import errno
import json
import logging
import os
import shutil
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any

from agentd import faults
from tests.crash import power_cut, scenarios

TIMEOUT = 30.0  # seconds of one run
NAMES_KEPT = "power cut, names kept"
POWER_CUTS = {"power cut", NAMES_KEPT}
LASTING = {"ENOSPC", "EROFS"}  # a full disk stays full, one that was remounted read-only stays so


class Driver:
    def __init__(self, model: Path, directory: Path, preload: Path) -> None:
        self._model, self._directory = model, directory
        self._shim = ctypes.CDLL(str(preload))
        self._shim.fault_calls.restype = ctypes.c_long
        self._shim.fault_arm(b"/nowhere", ctypes.c_long(0), 0, 0)  # the counter, shared with all that is forked
        self._templates = directory / "templates"

    def run(self, scenario: str, fault: str | None = None, n: int = 0, at: str = "") -> dict[str, Any]:
        adapt, template = scenarios.GIVEN[scenario]
        place = self._directory / "run"
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir(parents=True)
        if template != "nothing":
            shutil.copytree(self._template(template), place / "state")
        config = scenarios.settings(self._model, place, **adapt)
        synced = place / "synced"
        if fault in POWER_CUTS:
            power_cut.begin(config.state.dir, synced)
        self._shim.fault_keep(str(synced).encode() if fault in POWER_CUTS else b"")
        began = time.monotonic()
        outcome, lines = self._forked(lambda pipe: self._live(scenario, config, fault, n, at, pipe))
        result: dict[str, Any] = {"outcome": outcome, "problem": None}
        acknowledged = [line[4:] for line in lines if line.startswith("ack ")]
        points = [line[6:] for line in lines if line.startswith("point ")]
        result["points"] = points if fault is None else points[-1:]
        result["error"] = next((line[2:] for line in reversed(lines) if line.startswith("! ")), None)
        result["calls"] = self._shim.fault_calls()
        if outcome not in ("done", "error", "killed"):
            result["problem"] = "\n".join(line for line in lines if line.startswith("! ")) or outcome
            return result
        if fault in POWER_CUTS:
            power_cut.happen(config.state.dir, synced, names_kept=fault == NAMES_KEPT)
        self._shim.fault_keep(b"")
        checked, said = self._forked(lambda pipe: self._check(config, acknowledged, pipe))
        if checked != "done":
            result["problem"] = f"after the restart ({checked}): " + "\n".join(said)
        result["seconds"] = round(time.monotonic() - began, 3)
        return result

    def _live(self, scenario: str, config: Any, fault: str | None, n: int, at: str, pipe: int) -> None:
        passed = 0

        def hook(name: str) -> None:
            nonlocal passed
            passed += name == at
            os.write(pipe, f"point {name}\n".encode())
            if fault == "point" and name == at and passed == n:
                os.kill(os.getpid(), signal.SIGKILL)

        async def live() -> None:
            async with scenarios.running(config) as services:
                await scenarios.SCENARIOS[scenario](services, lambda id: _tell(pipe, f"ack {id}"))

        faults.hook = hook
        number = getattr(errno, fault, 0) if fault else 0
        at_call = n if fault not in (None, "point") else 0
        self._shim.fault_arm(str(config.state.dir).encode(), ctypes.c_long(at_call), number, fault in LASTING)
        asyncio.run(live())

    def _check(self, config: Any, acknowledged: list[str], pipe: int) -> None:
        asyncio.run(scenarios.check(config, acknowledged))

    def _template(self, name: str) -> Path:
        """A state to begin with; made once."""
        target = self._templates / name.replace(" ", "-")
        if target.exists():
            return target
        place = self._directory / "making"
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir(parents=True)
        scenario, fault, stop = "first start and pass", None, ""
        if name == "a trial":
            scenario, fault, stop = "taken back", "point", "trial started, committed"
            shutil.copytree(self._template("one revision"), place / "state")
        if name == "a parked pass":
            scenario = "stopped in training"
            shutil.copytree(self._template("one revision"), place / "state")
        if name == "one revision serves":
            fault, stop = "point", "pass committed, committed"
        adapt, _ = scenarios.GIVEN[scenario]
        config = scenarios.settings(self._model, place, **adapt)
        n = 1 if stop else 0
        outcome, lines = self._forked(lambda pipe: self._live(scenario, config, fault, n, stop, pipe))
        if outcome != ("killed" if stop else "done"):
            raise RuntimeError(f"making {name!r}: {outcome}: {lines[-5:]}")
        self._templates.mkdir(parents=True, exist_ok=True)
        (place / "state").rename(target)
        return target

    def _forked(self, work: Any) -> tuple[str, list[str]]:
        """Runs `work(pipe)` in a process of its own: how it ended, and the lines it wrote into the pipe."""
        reader, writer = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(reader)
            os.setpgid(0, 0)
            os._exit(_guarded(work, writer))
        os.close(writer)
        data, deadline = b"", time.monotonic() + TIMEOUT
        os.set_blocking(reader, False)
        status: int | None = None
        while status is None and time.monotonic() < deadline:
            ended, raw = os.waitpid(pid, os.WNOHANG)
            status = os.waitstatus_to_exitcode(raw) if ended else None
            data += _read(reader)
            time.sleep(0.002)
        if status is None:
            os.killpg(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        data += _read(reader)
        os.close(reader)
        outcome = {0: "done", 3: "error", 4: "bug", -9: "killed", None: "hung"}.get(status, f"ended with {status}")
        return outcome, data.decode(errors="replace").splitlines()


def _guarded(work: Any, pipe: int) -> int:
    """The exit status: 0 done, 3 an error that agentd raises on purpose, 4 any other."""
    try:
        os.umask(0o077)
        work(pipe)
    except BaseException as error:
        text = "".join(traceback.format_exception(error))
        os.write(pipe, "".join(f"! {line}\n" for line in text.splitlines()[-25:]).encode())
        return 3 if scenarios.expected(error) else 4
    return 0


def _tell(pipe: int, line: str) -> None:
    os.write(pipe, line.encode() + b"\n")


def _read(descriptor: int) -> bytes:
    data = b""
    while True:
        try:
            part = os.read(descriptor, 65536)
        except BlockingIOError:
            return data
        if not part:
            return data
        data += part


def main() -> None:
    model, directory, preload = map(Path, sys.argv[1:4])
    logging.disable(logging.CRITICAL)
    scenarios.prepare()
    driver = Driver(model, directory, preload)
    for line in sys.stdin:
        print(json.dumps(driver.run(**json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
