"""What opinions teach: preferences, thumbs and scores on free text, beside the right answers themselves.

    python -m tools.bench opinions [MODEL.gguf] [--kinds preference,thumb,score,demonstration] [--examples 300]

Movie reviews of tools/reviews.py with a question that is answered in a sentence; the task has no choices. A pair
prefers the right sentence to the wrong one; thumbs and scores are on one of the two, drawn by chance: right ones get a
thumb up, or a score of 0.5 to 1, wrong ones a thumb down, or 0 to 0.5. Every kind is learned in one pass of a daemon of
its own, from the same reviews. Judged are other reviews, before and after, by which of both sentences is the likelier
as a whole answer, as requests with `choices` are answered. `p` is McNemar's, that no more of them are right.
"""

import argparse
import json
import random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from agentd import models
from agentd.ctl.progress import follow, view
from agentd.learn.significance import mcnemar
from tools import reviews
from tools.daemon import DaemonProcess, ToolFailed

KINDS = ("preference", "thumb", "score", "demonstration")
QUESTION = "What did this reviewer think of the movie?\n\n{text}"
SENTENCE = {"yes": "The reviewer liked it.", "no": "The reviewer did not like it."}
TASK = "opinions"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, nargs="?", help="a GGUF file; else the default model")
    parser.add_argument("--kinds", default=",".join(KINDS))
    parser.add_argument("--examples", type=int, default=300)
    parser.add_argument("--judged", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0, help="of what is drawn")
    parser.add_argument("--method", default="auto")
    options = parser.parse_args()
    kinds = options.kinds.split(",")
    if unknown := set(kinds) - set(KINDS):
        parser.error(f"--kinds: {', '.join(sorted(unknown))} is none of {', '.join(KINDS)}")
    table = Table("", "right before", "after", "p", "verdict", "drift", "seconds")
    for kind in kinds:
        row = learned(kind, options)
        print(json.dumps(row), file=sys.stderr, flush=True)
        drift = "–" if row["drift"] is None else f"{row['drift']:.3f}"
        cells = [f"{row['before']:.3f}", f"{row['after']:.3f}", f"{row['p']:.4f}", row["outcome"], drift]
        table.add_row(kind, *cells, f"{row['seconds']:.0f}")
    Console().print(table)
    return 0


def learned(kind: str, options: argparse.Namespace) -> dict[str, Any]:
    """One pass on opinions of this kind. Raises ToolFailed, CtlError where the daemon refuses it."""
    draw = random.Random(f"{options.seed} {kind}")
    lines = [line(kind, row, draw) for row in reviews.liked("train")[: options.examples]]
    held = reviews.liked("heldout")[: options.judged]
    settings = {"adapt": {"enabled": False, "trial": {"duration": "1s"}}}
    with DaemonProcess(options.model or models.fetch_default(), settings) as daemon:
        daemon.start()
        before = judged(daemon, held)
        answer = daemon.post("/v1/examples", "\n".join(map(json.dumps, lines)).encode())
        if answer.status != 200:
            raise ToolFailed(answer.body.decode())
        number = daemon.ctl.post("/admin/adapt", {} if options.method == "auto" else {"method": options.method})["pass"]
        with view() as progress:
            ended = follow(daemon.ctl, number, progress)
        after = judged(daemon, held)
    row = ended.answer["pass"]
    return {
        "kind": kind,
        "examples": len(lines),
        "judged": len(held),
        "before": sum(before) / len(held),
        "after": sum(after) / len(held),
        "p": mcnemar(before, after),
        "outcome": ended.outcome,
        "reason": row["reason"],
        "drift": row["gate"].get("drift"),
        "method": f"{row['method']}, k = {row['blocks']}",
        "seconds": round(sum(row["phases"].values()), 1),
    }


def line(kind: str, row: dict[str, Any], draw: random.Random) -> dict[str, Any]:
    input = {"task": TASK, "messages": [{"role": "user", "content": QUESTION.format(text=row["text"])}]}
    right, wrong = SENTENCE[row["label"]], SENTENCE["no" if row["label"] == "yes" else "yes"]
    if kind == "demonstration":
        return {**input, "completion": right}
    if kind == "preference":
        return {**input, "chosen": right, "rejected": wrong}
    is_right = draw.random() < 0.5
    said = {**input, "completion": right if is_right else wrong}
    if kind == "thumb":
        return {**said, "label": is_right}
    return {**said, "score": round((0.5 if is_right else 0.0) + draw.random() / 2, 2)}


def judged(daemon: DaemonProcess, rows: Sequence[dict[str, Any]]) -> list[bool]:
    """Whether the right sentence is the likelier one."""
    hits = []
    for row in rows:
        body = {
            "messages": [{"role": "user", "content": QUESTION.format(text=row["text"])}],
            "choices": list(SENTENCE.values()),
            "max_tokens": 16,
            "store": False,
        }
        answer = daemon.post("/v1/chat/completions", body)
        if answer.status != 200:
            raise ToolFailed(answer.body.decode())
        hits.append(answer.json["choices"][0]["message"]["content"] == SENTENCE[row["label"]])
    return hits


if __name__ == "__main__":
    sys.exit(main())
