"""Past corrections in the prompt against the base model, by how many corrections there are; and what a look-up costs.

    python -m tools.bench recall [MODEL.gguf] [--tasks reviews,home] [--sizes 5,10,25,50,100,200] [--judged 100]
    python -m tools.bench recall --lookup 200000

One daemon gets the corrections as JSONL, the first n of the training rows (one in five of them is held out, as in any
store, and so never recalled), and is asked held-out rows greedily, once with `recall: false` and for every n with
`recall: true`: reviews of tools/reviews.py with two choices, home commands of tools/home.py (sentence templates that no
training row has) with `tool_choice: required`. Milliseconds are those of whole requests at the client, one at a time.
`--lookup` fills a store with examples whose words are drawn like those of the reviews, and looks up inputs alike:
milliseconds by the clock, and of the processor, which other programs on the machine do not lengthen.
"""

import argparse
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from sqlite_utils import Database

from agentd import models
from agentd.adapt.recall.turns import recollect
from agentd.learn.metrics import same_calls
from agentd.store import imports
from agentd.store.database import Store
from agentd.store.examples import NewExample
from tools import home, reviews
from tools.daemon import DaemonProcess, ToolFailed

PROMPT = "Did the reviewer like this movie? Answer yes or no.\n\n{text}"
CHOICES = ["yes", "no"]
_SYSTEM = {"role": "system", "content": "You control a home."}
_LOOKUPS = 200


def main() -> int:
    options = _options()
    if options.lookup:
        print(json.dumps(lookup(options.lookup)))
        return 0
    table = Table("task", "corrections", "right", "ms", "prompt tokens")
    for task in options.tasks:
        for row in curve(task, options.model or models.fetch_default(), options.sizes, options.judged):
            print(json.dumps(row), file=sys.stderr, flush=True)
            table.add_row(
                task,
                "none" if row["corrections"] == 0 else str(row["corrections"]),
                f"{row['right']:.3f} of {row['judged']}",
                f"{row['ms']:.0f}",
                f"{row['prompt_tokens']:.0f}",
            )
    Console().print(table)
    return 0


def curve(task: str, model: Path, sizes: Sequence[int], judged: int) -> list[dict[str, Any]]:
    """The base, and recall with every number of corrections."""
    rows, held = (reviews.liked("train"), reviews.liked("heldout")) if task == "reviews" else _commands()
    settings = {
        "model": {"context": 4096, "threads": "auto"},
        "serve": {"slots": 1},
        "tasks": {"reviews": {"choices": CHOICES, "prompt": PROMPT}, "home": {"metric": "call"}},
    }
    figures = []
    with DaemonProcess(model, settings) as daemon:
        daemon.start()
        sent = 0
        for size in (0, *sizes):
            lines = [_line(task, row) for row in rows[sent:size]]
            if lines and daemon.post("/v1/examples", b"\n".join(lines)).status != 200:
                raise ToolFailed("the daemon did not take the corrections")
            sent = max(sent, size)
            figures.append({"task": task, "corrections": size, **asked(daemon, task, held[:judged], size > 0)})
    return figures


def asked(daemon: DaemonProcess, task: str, rows: Sequence[dict[str, Any]], recall: bool) -> dict[str, Any]:
    """The share of right answers, and what a request took."""
    right, milliseconds, tokens = 0, [], []
    for row in rows:
        began = time.perf_counter()
        answer = daemon.post("/v1/chat/completions", {**_request(task, row), "recall": recall})
        milliseconds.append(1e3 * (time.perf_counter() - began))
        if answer.status != 200:
            raise ToolFailed(answer.body.decode())
        message = answer.json["choices"][0]["message"]
        tokens.append(answer.json["usage"]["prompt_tokens"])
        right += (
            message["content"] == row["label"] if task == "reviews" else same_calls(message["tool_calls"], [_call(row)])
        )
    n = len(rows)
    ms = statistics.median(milliseconds)
    return {"judged": n, "right": right / n, "ms": round(ms, 1), "prompt_tokens": statistics.fmean(tokens)}


def lookup(n: int) -> dict[str, Any]:
    """Milliseconds of a look-up among `n` examples of two tasks, and of adding 2000 of them."""
    draw = random.Random(0)
    words = [row["text"].lower().split() for row in reviews.rows()]
    pool = [word for text in words for word in text]

    def text() -> str:
        mixed = [draw.choice(pool) if draw.random() < 0.4 else word for word in draw.choice(words)]
        return " ".join([*mixed, *([f"{draw.randrange(50_000)}"] if draw.random() < 0.5 else [])])

    def input(text: str) -> dict[str, Any]:
        return {"messages": [{"role": "user", "content": text}]}

    with tempfile.TemporaryDirectory() as folder, closing(Store(Path(folder) / "agentd.db")) as store:
        added = []
        for start in range(0, n, 2000):
            many = [
                NewExample("many" if draw.random() < 0.9 else "few", "label", input(text()), draw.choice(CHOICES))
                for _ in range(min(2000, n - start))
            ]
            began = time.perf_counter()
            store.do(imports.add_many, many)
            added.append(1e3 * (time.perf_counter() - began))
        figures: dict[str, Any] = {"examples": n, "adding_2000_ms": round(statistics.median(added), 1)}
        for task in ("many", "few"):
            took, used = [], []
            for _ in range(_LOOKUPS):
                asked = partial(_look_up, task=task, input=input(text()))
                began, cpu = time.perf_counter(), time.process_time()
                store.do(asked)
                took.append(1e3 * (time.perf_counter() - began))
                used.append(1e3 * (time.process_time() - cpu))
            figures[task] = {"median_ms": round(statistics.median(took), 2), "slowest_ms": round(max(took), 2)}
            figures[task] |= {"median_cpu_ms": round(statistics.median(used), 2), "most_cpu_ms": round(max(used), 2)}
        return figures


def _look_up(db: Database, task: str, input: dict[str, Any]) -> None:
    recollect(db, task, input, CHOICES, k=4, tokens=512, form={})


def _commands() -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    return home.commands("train"), home.commands("heldout")


def _line(task: str, row: dict[str, Any]) -> bytes:
    if task == "reviews":
        return json.dumps({"task": task, **row}).encode()
    messages = [*_request(task, row)["messages"], {"role": "assistant", "tool_calls": [_call(row)]}]
    return json.dumps({"task": task, "messages": messages, "tools": home.TOOLS, "tool_choice": "required"}).encode()


def _request(task: str, row: dict[str, Any]) -> dict[str, Any]:
    asked = {"temperature": 0, "max_tokens": 96, "metadata": {"task": task}, "store": False}
    if task == "reviews":
        return {**asked, "messages": [{"role": "user", "content": PROMPT.replace("{text}", row["text"])}]}
    messages = [_SYSTEM, {"role": "user", "content": row["text"]}]
    return {**asked, "messages": messages, "tools": home.TOOLS, "tool_choice": "required"}


def _call(row: dict[str, Any]) -> dict[str, Any]:
    arguments = json.dumps(home.order(row["name"], row["arguments"]))
    return {"id": "call_0", "type": "function", "function": {"name": row["name"], "arguments": arguments}}


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("model", nargs="?", type=Path, help="a GGUF file; the default model if left out")
    parser.add_argument("--tasks", default="reviews,home", type=lambda text: text.split(","))
    parser.add_argument("--sizes", default="5,10,25,50,100,200", type=lambda text: [int(n) for n in text.split(",")])
    parser.add_argument("--judged", default=100, type=int, metavar="N", help="held-out rows that are asked")
    parser.add_argument("--lookup", type=int, metavar="N", help="what a look-up costs among so many examples")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
