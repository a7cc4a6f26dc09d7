"""What the admin API and feedback cost with a large store: 300,000 inferences and 200,000 examples by default.

    python -m tools.bench store [--inferences N] [--examples N] [--json FILE]

Fills a database through the store's own functions, starts a daemon on it (with a tiny model, or --model) and asks it
over its sockets as agentctl and clients do. Every figure is the median and the slowest of some requests, in
milliseconds. Exits with 1 where a median is over its target.
"""

import argparse
import itertools
import json
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from sqlite_utils import Database

from agentd import ids
from agentd.store import examples, feedback, imports, inferences, passes, tasks
from agentd.store.database import Store
from agentd.store.examples import NewExample
from agentd.store.feedback import NewFeedback
from agentd.store.inferences import Inference
from tools.daemon import DaemonProcess, ToolFailed

TASKS = {"reviews": 2, "intents": 8, "routes": 40, "support": 3, "replies": 0}  # name -> labels; 0: free text
TARGETS = {"status": 20.0, "tasks": 20.0, "examples": 20.0, "dry run": 1000.0, "feedback": 10.0}  # milliseconds
_BATCH = 5000  # rows in one transaction
_FEEDBACK_EVERY = 10  # inferences
_REQUESTS = 20
_WORDS = ("light", "rain", "kept", "us", "inside", "so", "we", "watched", "this", "quiet", "film", "twice", "again")


@dataclass(frozen=True)
class Figure:
    """What one call took, in milliseconds."""

    name: str
    median: float
    slowest: float

    @property
    def target(self) -> float | None:
        return TARGETS.get(self.name)

    @property
    def good(self) -> bool:
        return self.target is None or self.median <= self.target


def fill(store: Store, n_inferences: int, n_examples: int) -> None:
    """Rows of all kinds: answers, a tenth of them with feedback, examples most of which a committed pass has used."""
    draw = random.Random(1)
    for numbers in _batches(n_inferences):
        store.do(_ask, [_inference(draw, number) for number in numbers])
    now = ids.now()
    for name, labels in TASKS.items():
        choices = [f"label {label}" for label in range(labels)]
        task = tasks.Task(name, choices, False, "accuracy" if labels else "loss", None, "feedback", now)
        store.do(tasks.declare, task)
    for numbers in _batches(n_examples):
        store.do(imports.add_many, [_example(draw, number) for number in numbers])
    store.do(_learned, n_examples)
    store.do(_judge, range(0, n_inferences, _FEEDBACK_EVERY))


def _batches(number: int) -> Iterator[range]:
    return (range(start, min(start + _BATCH, number)) for start in range(0, number, _BATCH))


def _text(draw: random.Random, number: int) -> str:
    return f"{number}: {' '.join(draw.choices(_WORDS, k=40))}"


def _inference(draw: random.Random, number: int) -> Inference:
    return Inference(
        id=f"inf-{number}",
        created_at=ids.now(),
        revision=0,
        kind="chat",
        task=draw.choice(list(TASKS)),
        input={"messages": [{"role": "user", "content": _text(draw, number)}]},
        output=_text(draw, number),
        params={"max_tokens": 64},
        finish_reason="stop",
        prompt_tokens=60,
        completion_tokens=40,
        ttft_ms=12.0,
        latency_ms=300.0,
        author="uid:1000",
    )


def _ask(db: Database, rows: list[Inference]) -> None:
    for row in rows:
        inferences.record(db, row)


def _example(draw: random.Random, number: int) -> NewExample:
    task = draw.choice(list(TASKS))
    labels = TASKS[task]
    kind, target = ("label", f"label {draw.randrange(labels)}") if labels else ("demonstration", _text(draw, number))
    weight = draw.choice((1.0, 1.0, 1.0, 0.5))
    input = {"messages": [{"role": "user", "content": _text(draw, number)}]}
    return NewExample(task, kind, input, target, author="uid:1000", weight=weight)


def _learned(db: Database, number: int) -> None:
    """A committed pass has learned nine tenths of the examples and was judged by 2,000; some cannot be used."""
    row = passes.create(db, "manual", 0, 0, {})
    db.execute("UPDATE passes SET state = 'committed', finished_at = ? WHERE id = ?", [ids.now(), row.id])
    judges = "SELECT ?, id, 'holdout' FROM examples WHERE split = 'holdout' ORDER BY rowid LIMIT 2000"
    db.execute(f"INSERT INTO pass_examples {judges}", [row.id])
    rows = db.execute("SELECT id FROM examples ORDER BY rowid LIMIT ?", [number * 9 // 10]).fetchall()
    known = [id for (id,) in rows]
    examples.mark_used(db, known)
    examples.exclude(db, known[::500])


def _judge(db: Database, numbers: range) -> None:
    for number in numbers:
        feedback.add(db, NewFeedback(f"inf-{number}", "boolean", number % 3 > 0, task="replies"))


def measure(daemon: DaemonProcess, store_size: int) -> list[Figure]:
    """Every call that agentctl makes often, and feedback, on a daemon that has such a store."""
    numbers = itertools.count()
    calls = {
        "status": lambda: daemon.get("/admin/status", admin=True).status,
        "tasks": lambda: daemon.get("/admin/tasks", admin=True).status,
        "examples": lambda: daemon.get("/admin/examples?limit=50", admin=True).status,
        "examples of a task": lambda: daemon.get("/admin/examples?task=routes&split=train", admin=True).status,
        "examples that are new": lambda: daemon.get("/admin/examples?state=new", admin=True).status,
        "inferences": lambda: daemon.get("/admin/inferences?limit=50", admin=True).status,
        "feedback list": lambda: daemon.get("/admin/feedback?limit=50&task=replies", admin=True).status,
        "metrics": lambda: daemon.get("/metrics", admin=True).status,
        "dry run": lambda: daemon.post("/admin/adapt", {"dry_run": True}, admin=True).status,
        "feedback": lambda: daemon.post("/v1/feedback", _piece(next(numbers), store_size)).status,
    }
    return [_timed(name, call) for name, call in calls.items()]


def _piece(number: int, store_size: int) -> dict[str, Any]:
    chosen = 1 + (number * 7919 * _FEEDBACK_EVERY) % (store_size - 1)
    return {"inference_id": f"inf-{chosen}", "kind": "label", "value": f"label {number % 3}", "task": "support"}


def _timed(name: str, call: Callable[[], int]) -> Figure:
    status = call()  # the first one warms caches; that of a dry run starts the trainer to ask what it can do
    if status not in (200, 201):
        raise ToolFailed(f"{name} was answered with {status}")
    took = []
    for _ in range(_REQUESTS):
        begin = time.perf_counter()
        call()
        took.append((time.perf_counter() - begin) * 1000)
    return Figure(name, statistics.median(took), max(took))


def main() -> int:
    parser = argparse.ArgumentParser(description="What calls cost with a large store.")
    parser.add_argument("--inferences", type=int, default=300_000, metavar="N")
    parser.add_argument("--examples", type=int, default=200_000, metavar="N")
    parser.add_argument("--model", type=Path, help="a GGUF file; a tiny model without it")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    options = parser.parse_args()
    console = Console(stderr=True)
    with DaemonProcess(options.model, {"feedback": {"limit": 100_000}}) as daemon:
        daemon.state.mkdir(mode=0o700)
        begin = time.monotonic()
        store = Store(daemon.state / "agentd.db")
        fill(store, options.inferences, options.examples)
        store.close()
        size = (daemon.state / "agentd.db").stat().st_size
        console.print(f"filled in {time.monotonic() - begin:.0f} s: {size / 1e6:.0f} MB")
        begin = time.monotonic()
        daemon.start()
        console.print(f"started in {time.monotonic() - begin:.1f} s")
        try:
            figures = measure(daemon, options.inferences)
        except ToolFailed as error:
            console.print(str(error))
            return 1
    print("| call | median, ms | slowest, ms | target, ms |\n|---|--:|--:|--:|")
    for figure in figures:
        target = f"{figure.target:g}" if figure.target else ""
        print(f"| {figure.name} | {figure.median:.1f} | {figure.slowest:.1f} | {target} |")
    if options.json:
        options.json.write_text(json.dumps([vars(figure) for figure in figures], indent=1))
    return 0 if all(figure.good for figure in figures) else 1


if __name__ == "__main__":
    sys.exit(main())
