"""Passes under real limits: the same daemon, model and examples, with less and less memory free for adaptation.

    python -m tools.bench limits --model MODEL.gguf [--free 1500,700,400,200,60] [--json FILE]
    python -m tools.bench limits --model MODEL.gguf --ballast 50   one pass from whose middle memory is taken away, at
                                                                   50 MB a second; 0: all at once

For each size the daemon runs in a control group whose limit leaves it this many MB beyond what serving takes and
memory.reserve. It plans by itself; other clients ask meanwhile. A row says what was planned and measured, how the pass
ended, what the gate saw on holdout, how many requests there were and failed, and whether the kernel killed anything.
Exits with 1 if a pass did not end, a request failed or a process was killed. Needs a place to make a control group.
"""

import argparse
import asyncio
import contextlib
import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from agentd.config import schema
from agentd.ctl.errors import CtlError
from agentd.host import cgroup
from agentd.host.memory import reclaimable
from tools import reviews
from tools.daemon import REVIEWS, DaemonProcess, ToolFailed, followed
from tools.demo.reviews import TASK, ReviewAgent
from tools.demo.traffic import Traffic

MB = 10**6
EXAMPLES = 300
_WARM_UP = 15.0  # seconds of other clients' requests after which serving has all the memory it needs
_TAKEN_AFTER, _TAKEN_FOR = 8.0, 25.0  # seconds into training, and for how long
_LEFT = 100 * MB  # of what was free then
_BALLAST = """
import sys, time
group, size, rate = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
open(group, "w").write("0")
kept = []
while size > 0:
    piece = min(size, rate // 10 or size)
    kept.append(b"1" * piece)
    size -= piece
    time.sleep(0.1)
input()
"""


@dataclass
class Limited:
    """A daemon in a control group of its own, which `free` sets the limit of."""

    daemon: DaemonProcess
    group: cgroup.Group
    agent: ReviewAgent
    reserve: int
    limit: int = 0

    @property
    def left(self) -> int:
        """Bytes up to the limit."""
        return self.limit - self._in_use()

    def free(self, size: int) -> None:
        """Lets a pass find `size` bytes: the limit is what is in use now, the reserve and these."""
        self.limit = self._in_use() + self.reserve + size
        self.group.limit(self.limit)

    def _in_use(self) -> int:
        """Bytes of the group without the file cache that the kernel gives back."""
        version = self.group.version
        used = int((self.group.path / f"memory.{'current' if version == 2 else 'usage_in_bytes'}").read_text())
        return used - reclaimable((self.group.path / "memory.stat").read_text(), version)


@asynccontextmanager
async def limited(model: Path) -> AsyncIterator[Limited]:
    """Raises ToolFailed where no control group can be made, or the daemon does not start."""
    group = cgroup.make("agentd-bench")
    if group is None:
        raise ToolFailed("no control group can be made here; run this as root, or in a delegated group")
    known = schema.load(REVIEWS, {})
    try:
        settings = {"adapt": {"enabled": False, "trial": {"duration": "1s"}}, "memory": {"limit": "1024GiB"}}
        with DaemonProcess(model, settings, config=REVIEWS) as daemon:
            daemon.start(wait=False)
            (group.path / "cgroup.procs").write_text(str(daemon.pid))
            await asyncio.to_thread(daemon.wait_until_ready)
            agent = ReviewAgent(daemon.api, known.tasks[TASK].prompt or "{text}")
            try:
                rows = reviews.liked("train")
                async with Traffic(agent):
                    await asyncio.sleep(_WARM_UP)
                await agent.teach(rows[:EXAMPLES])
                yield Limited(daemon, group, agent, known.memory.reserve)
            finally:
                await agent.close()
    finally:
        group.remove()


async def measure(model: Path, free: int, mezo_steps: int | None) -> dict[str, Any]:
    """One pass with `free` bytes to adapt in."""
    async with limited(model) as at:
        at.free(free)
        async with Traffic(at.agent) as traffic:
            ended = await _adapt(at, mezo_steps)
        return {"free": free, **_found(ended, traffic, at)}


async def squeeze(model: Path, rate: int) -> dict[str, Any]:
    """A pass with plenty of room, from whose middle another process takes nearly all of it, `rate` bytes a second (0:
    all at once), and keeps it for a while."""
    async with limited(model) as at:
        at.free(1500 * MB)
        async with Traffic(at.agent) as traffic:
            taking = asyncio.create_task(_take(at, rate))
            ended = await _adapt(at, None)
            taking.cancel()
            await asyncio.gather(taking, return_exceptions=True)
        moves = [e["message"] for e in ended["events"] if e["kind"] in ("dial", "paused", "resumed")]
        return {"moves": moves, **_found(ended, traffic, at)}


async def _take(at: Limited, rate: int) -> None:
    """A process in the same group that takes nearly all of what is left."""
    while True:
        running = (await asyncio.to_thread(at.daemon.ctl.get, "/admin/status"))["pass"] or {}
        if running.get("phase") == "train" and running.get("step"):
            break
        await asyncio.sleep(0.5)
    await asyncio.sleep(_TAKEN_AFTER)
    # What the trainer gives back meanwhile is not taken as well: it must be enough for something smaller.
    size = max(0, at.left - _LEFT)
    command = [sys.executable, "-c", _BALLAST, str(at.group.path / "cgroup.procs"), str(size), str(rate)]
    ballast = subprocess.Popen(command, stdin=subprocess.PIPE)
    try:
        await asyncio.sleep(_TAKEN_FOR + (size / rate if rate else 0))
    finally:
        ballast.kill()
        ballast.wait()


async def _adapt(at: Limited, mezo_steps: int | None) -> dict[str, Any]:
    wishes: dict[str, Any] = {}
    if mezo_steps is not None:
        with contextlib.suppress(CtlError):
            plan = (await asyncio.to_thread(at.daemon.ctl.post, "/admin/adapt", {"dry_run": True}))["plan"]
            wishes = {"zo_steps": mezo_steps} if plan["method"] == "mezo" else {}
    number = (await asyncio.to_thread(at.daemon.ctl.post, "/admin/adapt", wishes))["pass"]
    return dict((await followed(at.daemon.ctl, number)).answer)


def _found(ended: dict[str, Any], traffic: Traffic, at: Limited) -> dict[str, Any]:
    row = ended["pass"]
    tasks = row["gate"].get("tasks", {}).values()
    accuracies = [[part["accuracy"] for part in (task["before"], task["after"])] for task in tasks]
    return {
        "plan": _setting(row["plan"]),
        "budget": row["plan"].get("budget_bytes"),
        "why": row["plan"].get("why"),
        "peaks": row["peaks"],
        "needed": row["predicted_bytes"],
        "measured": row["peak_bytes"],
        "outcome": row["state"],
        "reason": row["reason"],
        "holdout": accuracies[0] if accuracies else None,
        "requests": len(traffic.answers) + len(traffic.failures),
        "failed": len(traffic.failures),
        "kills": at.group.kills,
    }


def _setting(plan: dict[str, Any]) -> str | None:
    if not plan:
        return None
    details = ", one in memory" if plan["checkpoint"] and plan["blocks"] else ""
    details += ", small micro-batches" if plan["small"] else ""
    return f"{plan['method']} k={plan['blocks']}{details}"


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| free, MB | found, MB | plan | predicted, MB | measured, MB | holdout | ended | requests, failed | killed |",
        "|--:|--:|---|--:|--:|---|---|--:|--:|",
    ]
    for row in rows:
        budget, *size = [f"{row[name] / MB:.0f}" if row[name] else "–" for name in ("budget", "needed", "measured")]
        holdout = "–" if row["holdout"] is None else " → ".join(f"{part:.1%}" for part in row["holdout"])
        cells = [f"{row['free'] / MB:.0f}", budget, row["plan"] or "–", *size, holdout, row["outcome"]]
        cells += [f"{row['requests']}, {row['failed']}", str(row["kills"])]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description="Passes with less and less memory.")
    parser.add_argument("--model", type=Path, default=os.environ.get("AGENTD_MODEL_PATH"), help="a GGUF file")
    parser.add_argument("--free", default="1500,700,400,200,60", help="MB free for adaptation, one run each")
    parser.add_argument(
        "--ballast", type=int, metavar="MB", help="one run, from whose middle so much is taken a second; 0: at once"
    )
    parser.add_argument("--mezo-steps", type=int, metavar="N", help="steps where the plan is MeZO")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there too")
    options = parser.parse_args()
    if options.model is None:
        parser.error("--model is needed")
    console = Console(stderr=True)
    rows: list[dict[str, Any]] = []
    try:
        if options.ballast is not None:
            rows = [asyncio.run(squeeze(options.model, options.ballast * MB))]
            print("\n".join(rows[0]["moves"]) + f"\n{rows[0]['outcome']}: {rows[0]['reason']}")
        else:
            for size in map(int, options.free.split(",")):
                rows.append(asyncio.run(measure(options.model, size * MB, options.mezo_steps)))
                console.print(f"{size} MB: {rows[-1]['plan']}: {rows[-1]['outcome']}: {rows[-1]['reason']}")
            print(table(rows))
    except ToolFailed as error:
        console.print(str(error))
        return 1
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))
    return 0 if all(row["outcome"] != "failed" and not row["failed"] and not row["kills"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
