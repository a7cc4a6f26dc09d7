"""The trainer process as the daemon sees it: spawned for one pass, stopped while requests are served, then gone."""

import asyncio
import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from agentd.engine.process.activity import Activity
from agentd.errors import TrainerFailed, TrainerKilled, TrainerOverLimit
from agentd.host.cgroup import Group

_RESUME_AFTER = 0.05  # seconds without a request before the trainer goes on

Answer = Callable[[dict[str, Any]], Awaitable[dict[str, Any]]]


class Training:
    """Runs `python -m agentd.trainer`. Two thread pools on the same cores slow each other down several times, so the
    process is stopped (SIGSTOP) from the first byte of a request to the last."""

    def __init__(self, activity: Activity, log: Path, group: Group | None = None) -> None:
        self._activity, self._log, self._group = activity, log, group
        self._process: asyncio.subprocess.Process | None = None
        self._stopped = False
        self._started = False

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process and self._process.returncode is None else None

    async def run(
        self,
        spec: dict[str, Any],
        path: Path,
        on_event: Callable[[dict[str, Any]], None],
        answer: Answer | None = None,
        limit: int | None = None,
    ) -> dict[str, Any]:
        """Trains as specified and returns the `done` event, or `parked` after `park`.

        answer  gives what the trainer asks for while it trains, see trainer/blockwise.py
        limit   bytes after which the kernel ends it, where it can have a control group of its own
        Raises TrainerFailed with the trainer's own reason, TrainerKilled, TrainerOverLimit, and what `answer` raises.
        """
        path.write_text(json.dumps(spec))
        kills = 0
        if self._group and limit is not None:
            self._group.limit(limit)
            kills = self._group.kills
        last: dict[str, Any] = {}

        def keep(event: dict[str, Any]) -> None:
            last.update(event)
            on_event(event)

        code = await self._spawn([str(path)], keep, answer)
        if last.get("event") in ("done", "parked") and code == 0:
            return last
        if self._group and limit is not None and self._group.kills > kills:
            raise TrainerOverLimit(limit)
        if code == -signal.SIGKILL:
            raise TrainerKilled()
        if last.get("event") == "error":
            raise TrainerFailed(f"the trainer failed: {last['message']}")
        raise TrainerFailed(f"the trainer ended with status {code}{self._last_words()}")

    def park(self) -> None:
        """Lets the trainer write what it has after its current step, and end."""
        if self._started:
            self._signal(signal.SIGUSR1)
            self._signal(signal.SIGCONT)  # it gives its memory back sooner than a request would let it go on

    def kill(self) -> None:
        """Ends the trainer at once; what it had since it last wrote is lost."""
        self._signal(signal.SIGKILL)

    async def finish(self, seconds: float) -> bool:
        """Lets the trainer write where it is, for a pass that goes on after a restart, and end; kills it where that
        takes longer. Returns whether there was one."""
        if self.pid is None:
            return False
        self._signal(signal.SIGTERM)
        deadline = time.monotonic() + seconds
        while self.pid is not None and time.monotonic() < deadline:
            self._signal(signal.SIGCONT)  # no request is waiting any more for what it takes
            await asyncio.sleep(0.02)
        self.kill()
        return True

    async def probe(self, model: Path, sample: Path | None = None) -> dict[str, Any]:
        """Whether the trainer can build this model's blocks: {"supported", "reason", ...}, see trainer/probe.py."""
        answer: dict[str, Any] = {"supported": False, "reason": "the trainer gave no answer"}
        more = [] if sample is None else ["--sample", str(sample)]
        await self._spawn(["--probe", str(model), *more], answer.update)
        return answer

    async def _spawn(
        self, arguments: list[str], on_event: Callable[[dict[str, Any]], None], answer: Answer | None = None
    ) -> int:
        self._started = self._stopped = False
        with self._log.open("ab") as log:
            self._process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "agentd.trainer",
                *arguments,
                stdin=asyncio.subprocess.PIPE if answer else asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=log,
                env=_environment(self._group),
                limit=1 << 24,
            )
        try:
            with self._activity.listen(self._give_way):
                assert self._process.stdout is not None
                async for line in self._process.stdout:
                    if not self._started:
                        # Before its first line it has not yet seen to it that it dies with the daemon: a process
                        # stopped then would stay for ever if the daemon was killed.
                        self._started = True
                        self._give_way(self._activity.busy)
                    try:
                        event = json.loads(line)
                    except ValueError:
                        continue
                    if event.get("event") == "ask" and answer is not None:
                        await self._reply(await answer(event))
                    elif event.get("event") != "started":
                        on_event(event)
                return await self._process.wait()
        finally:
            if self._process.returncode is None:
                self._process.kill()
                await self._process.wait()

    async def _reply(self, answer: dict[str, Any]) -> None:
        assert self._process is not None
        assert self._process.stdin is not None
        with contextlib.suppress(ConnectionError):  # it is gone; its exit status will say why
            self._process.stdin.write(json.dumps(answer).encode() + b"\n")
            await self._process.stdin.drain()

    def _give_way(self, busy: bool) -> None:
        if busy and self._started and not self._stopped:
            self._signal(signal.SIGSTOP)
            self._stopped = True
        elif not busy:
            asyncio.get_running_loop().call_later(_RESUME_AFTER, self._resume)

    def _resume(self) -> None:
        if self._stopped and not self._activity.busy:
            self._stopped = False
            self._signal(signal.SIGCONT)

    def _signal(self, number: signal.Signals) -> None:
        if self.pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def _last_words(self) -> str:
        with contextlib.suppress(OSError):
            lines = self._log.read_text(errors="replace").strip().splitlines()
            if lines:
                return f": {lines[-1][:300]}"
        return ""


def _environment(group: Group | None) -> dict[str, str]:
    inherited = {k: v for k, v in os.environ.items() if k not in ("NOTIFY_SOCKET", "LISTEN_FDS", "LISTEN_PID")}
    quiet = {
        "AGENTD_DAEMON_PID": str(os.getpid()),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "MALLOC_ARENA_MAX": "1",
        "GOMP_SPINCOUNT": "20000",  # beside busy processes threads that spin for long make no progress
        "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "64",  # each shape of a matrix product has one; the default keeps 1024
    }
    apart = {"AGENTD_CGROUP": str(group.path)} if group else {}
    return {**inherited, **quiet, **apart}
