"""Every method of engine transformers as a pass of a real daemon, beside clients that ask: what it brings and takes.

    python -m tools.bench passes MODEL [--methods lora,bp:4,elasticzo:1,mezo@200] [--examples 448] [--output FILE.jsonl]
                                       [--sparse 10]

MODEL is a GGUF file or a directory of transformers. A method is NAME, NAME:BLOCKS or NAME@STEPS, where STEPS are those
of zeroth-order methods. Each begins at the base, in a daemon of its own, with the same movie reviews as examples; the
reviews that are judged afterwards are others. The clients ask every two seconds, and ten at once every twenty, or
`--sparse` times as seldom. What FILE holds is not run again; the table is printed from all of it.
"""

import argparse
import asyncio
import json
import re
import sys
from pathlib import Path
from typing import Any

from rich.console import Console

from agentd.config import schema
from tools import reviews
from tools.daemon import REVIEWS, DaemonProcess, ToolFailed, followed
from tools.demo.reviews import TASK, ReviewAgent, accuracy
from tools.demo.traffic import Traffic

MB = 1e6
METHODS = "lora,bp:1,bp:4,elasticzo:1,loho:1,mezo-lora,adazeta,sparse-mezo,mezo"
_METHOD = re.compile(r"([a-z-]+)(?::(\d+))?(?:@(\d+))?")


async def measure(model: Path, method: str, examples: int, judged: int, sparse: float) -> dict[str, Any]:
    """One pass. Raises ToolFailed, CtlError where the daemon refuses it."""
    name, blocks, steps = _parts(method)
    wishes = {"method": name, **({"blocks": blocks} if blocks else {}), **({"zo_steps": steps} if steps else {})}
    settings: dict[str, Any] = {"engine": "transformers", "adapt": {"enabled": False, "trial": {"duration": "1s"}}}
    settings["memory"] = {"limit": None}  # the demo's is one for engine llama.cpp: most methods here would be refused
    prompt = schema.load(REVIEWS, {}).tasks[TASK].prompt or "{text}"
    with DaemonProcess(model, settings, config=REVIEWS) as daemon:
        await asyncio.to_thread(daemon.start)
        agent = ReviewAgent(daemon.api, prompt)
        try:
            await agent.teach(reviews.liked("train")[:examples])
            rows = reviews.liked("heldout")[:judged]
            await agent.judge_all(rows[:8], lambda: None)  # serving has the memory that it needs
            number = (await asyncio.to_thread(daemon.ctl.post, "/admin/adapt", wishes))["pass"]
            async with Traffic(agent, sparse) as traffic:
                ended = await followed(daemon.ctl, number)
            answers = await agent.judge_all(rows, lambda: None)
        finally:
            await agent.close()
    row = dict(ended.answer)["pass"]
    gate = next(iter(row["gate"].get("tasks", {}).values()), None)
    return {
        "method": method,
        "examples": examples,
        "sparse": sparse,
        "outcome": row["state"],
        "reason": row["reason"],
        "steps": len({step["step"] for step in dict(ended.answer)["steps"]}),
        "seconds": round(sum(row["phases"].get(phase, 0.0) for phase in ("train", "zo")), 1),
        "gate": gate and [[gate[side][key] for key in ("accuracy", "loss")] for side in ("before", "after")],
        "drift": row["gate"].get("drift"),
        "accuracy": accuracy(answers, rows),
        "predicted_bytes": row["predicted_bytes"],
        "peak_bytes": row["peak_bytes"],
        "requests": len(traffic.answers) + len(traffic.failures),
        "failed": len(traffic.failures),
    }


def _parts(method: str) -> tuple[str, int, int]:
    match = _METHOD.fullmatch(method)
    if match is None:
        raise ToolFailed(f"{method!r} is no method: NAME, NAME:BLOCKS or NAME@STEPS")
    return match[1], int(match[2] or 0), int(match[3] or 0)


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: a row a pass."""
    lines = [
        "| method | steps | seconds of learning | ended | holdout accuracy | holdout loss | judged reviews "
        "| predicted | measured | predicted / measured | requests, failed |",
        "|---|--:|--:|---|---|---|--:|--:|--:|--:|--:|",
    ]
    for row in rows:
        before, after = row["gate"] or [[None, None], [None, None]]
        needed, peak = row["predicted_bytes"] or 0, row["peak_bytes"] or 0
        lines.append(
            f"| {row['method']} | {row['steps']} | {row['seconds']:.0f} | {row['outcome']} "
            f"| {share(before[0])} → {share(after[0])} | {loss(before[1])} → {loss(after[1])} "
            f"| {row['accuracy']:.1%} | {needed / MB:.0f} MB | {peak / MB:.0f} MB | {needed / max(1, peak):.2f} "
            f"| {row['requests']}, {row['failed']} |"
        )
    return "\n".join(lines)


def share(value: float | None) -> str:
    return "–" if value is None else f"{value:.1%}"


def loss(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def main() -> int:
    parser = argparse.ArgumentParser(description="The methods of engine transformers as passes.")
    parser.add_argument("model", type=Path)
    parser.add_argument("--methods", default=METHODS)
    parser.add_argument("--examples", type=int, default=448)
    parser.add_argument("--judged", type=int, default=300)
    parser.add_argument("--sparse", type=float, default=1.0, metavar="N", help="requests come N times as seldom")
    parser.add_argument("--output", type=Path, metavar="FILE")
    options = parser.parse_args()
    lines = options.output.read_text().splitlines() if options.output and options.output.exists() else []
    rows: list[dict[str, Any]] = [json.loads(line) for line in lines]
    there = {(row["method"], row["examples"], row["sparse"]) for row in rows}
    console = Console(stderr=True)
    try:
        for method in options.methods.split(","):
            if (method, options.examples, options.sparse) in there:
                continue
            rows.append(asyncio.run(measure(options.model, method, options.examples, options.judged, options.sparse)))
            console.print(f"{method}: {rows[-1]['outcome']}: {rows[-1]['reason']}")
            if options.output:
                with options.output.open("a") as file:
                    file.write(json.dumps(rows[-1]) + "\n")
    except ToolFailed as error:
        console.print(str(error))
        return 1
    print(table(rows))
    return 0 if all(row["outcome"] != "failed" and not row["failed"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
