"""A simulated life: tasks come and go, corrections drip in, and a daemon learns from them by its own triggers.

    python -m tools.bench continual --first [--names reviews] [--sizes 5,10,25,50,100,200,400] [--columns base,recall]
    python -m tools.bench continual --tasks [--names reviews,intents,home,notes] [--corrections 300] [--orders 3]
    python -m tools.bench continual --days 90 [--names reviews,intents,home,notes] [--a-day 20]
    python -m tools.bench continual --report life.jsonl [--plot life.png]

All take [MODEL.gguf] [--seeds 1] [--judged 100] [--threads N] [--output life.jsonl] [--sarcasm FILE]: with the file
there is a fifth task, headlines of `evals`. Every figure is what a client sees: held-out rows asked at the API. Nothing
starts a pass but the daemon; a night is over when nothing is due and nothing runs.

--first  the first corrections of a task, at every size: the base alone, with recall, the weights as passes made them,
         both, and what a client gets who says nothing (auto), with milliseconds of a request
--tasks  the tasks one after the other, and (order "joint") all at once: accuracy on each after each
--days   corrections a day over the tasks; every night the daemon's date goes on by a day, where Debian's libfaketime is
         installed. From a third of the days on the first task's labels mean their opposite (the next ones, where there
         are more than two), of the second's corrections 15 % are wrong, and the last ends at half of the days. An
         answer is scored before it is corrected. --recall off leaves it all to the weights
"""

import argparse
import contextlib
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from agentd import models
from agentd.errors import AgentdError
from tools.bench import continual_report
from tools.bench.continual_tasks import NAMES, LifeTask, Row, tasks
from tools.daemon import DaemonProcess, ToolFailed

COLUMNS = ("base", "recall", "weights", "both", "auto")
_WRONG = 0.15  # of the corrections of the second task of --days
_PATIENCE = 10  # times that a request is sent that was not answered in time
_LOOK = 1.0  # seconds between two looks at whether a night is over


class Life:
    """A daemon that lives with tasks. `learns`: passes start by themselves."""

    def __init__(
        self,
        model: Path | None,
        life: Sequence[LifeTask],
        threads: int | str,
        *,
        learns: bool,
        calendar: "Calendar | None" = None,
        recall: str = "auto",
    ) -> None:
        trigger = {"idle": "2s", "check": "1s"}
        settings: dict[str, Any] = {
            "model": {"threads": threads},
            "adapt": {"enabled": learns, "trigger": trigger, "trial": {"duration": "5s"}, "recall": recall},
            "tasks": {task.name: task.settings for task in life},
        }
        self.daemon = DaemonProcess(model, settings, environment=calendar.environment if calendar else None)
        self.learns = learns
        self._told = 0  # number of the last pass that a night has told of

    def __enter__(self) -> "Life":
        try:
            self.daemon.start()
        except BaseException:
            self.daemon.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.daemon.close()

    def ask(self, task: LifeTask, row: Row, **more: Any) -> dict[str, Any]:
        answer = None
        for _ in range(_PATIENCE):  # beside other work a client's own patience may end first
            with contextlib.suppress(TimeoutError):
                answer = self.daemon.post("/v1/chat/completions", {**task.request(row), **more})
                break
        if answer is None:
            raise ToolFailed("the daemon has not answered in time")
        if answer.status != 200:
            raise ToolFailed(answer.body.decode())
        tree: dict[str, Any] = answer.json
        return tree

    def correct(self, task: LifeTask, row: Row, right: Any) -> bool:
        """Asks as a client does, and says what would have been right; returns whether it was."""
        answer = self.ask(task, row)
        said = self.daemon.post("/v1/feedback", task.feedback(answer["id"], right))
        if said.status != 201:
            raise ToolFailed(said.body.decode())
        return task.is_right(row, answer["choices"][0]["message"])

    def teach(self, task: LifeTask, rows: Sequence[Row]) -> None:
        """All at once, as a file."""
        if rows and self.daemon.post("/v1/examples", b"\n".join(map(task.line, rows))).status != 200:
            raise ToolFailed(f"the daemon did not take the corrections of {task.name}")

    def judge(self, task: LifeTask, n: int, **more: Any) -> dict[str, Any]:
        """The share of held-out rows that are answered right, and what a request takes in milliseconds."""
        right, took, tokens = 0, [], []
        rows = task.held[:n]
        for row in rows:
            began = time.perf_counter()
            answer = self.ask(task, row, store=False, **more)
            took.append(1e3 * (time.perf_counter() - began))
            tokens.append(answer["usage"]["prompt_tokens"])
            right += task.is_right(row, answer["choices"][0]["message"])
        figures = {"right": right / len(rows), "judged": len(rows), "ms": round(statistics.median(took), 1)}
        return {**figures, "prompt_tokens": round(statistics.fmean(tokens), 1)}

    def night(self, longest: float) -> dict[str, Any]:
        """Waits until nothing is due and nothing runs; says how long that took and what passes came of it."""
        began, quiet = time.monotonic(), 0
        while quiet < 3 and time.monotonic() - began < longest:
            time.sleep(_LOOK)
            quiet = 0 if self._busy() else quiet + 1
        new = [row for row in self._passes() if row["id"] > self._told]  # one may have begun before the night
        self._told += len(new)
        states = [{name: row[name] for name in ("id", "state", "reason", "method", "options")} for row in new[::-1]]
        return {"seconds": round(time.monotonic() - began, 1), "over": quiet >= 3, "passes": states}

    def _passes(self) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = self.daemon.get("/admin/passes?limit=1000", admin=True).json["passes"]
        return rows

    def _busy(self) -> bool:
        status = self.daemon.status()
        trigger, progress = status["next_trigger"], self.daemon.get("/admin/progress", admin=True).json["pass"]
        if progress is not None and not progress["done"]:
            return True
        if self.learns and trigger["new_examples"] >= trigger["min_examples"]:
            return True
        waits = [row["recall"]["waits_for"] for row in self.daemon.get("/admin/tasks", admin=True).json["tasks"]]
        return self.learns and any(wait and "more corrections" not in wait for wait in waits)

    def footprint(self) -> dict[str, Any]:
        """Bytes of memory of all processes, and on disk; the revision that serves."""
        status = self.daemon.status()
        sizes = [path.stat().st_size for path in self.daemon.state.rglob("*") if path.is_file()]
        memory = sum(size or 0 for size in status["memory"]["processes"].values())
        return {"memory_bytes": memory, "disk_bytes": sum(sizes), "revision": status["revision"]}


class Calendar:
    """What day it is for a daemon with this `environment`: so many days on. Else its clock is the machine's."""

    def __init__(self, library: Path, folder: Path) -> None:
        self._file = folder / "calendar"
        self.day(0)
        self.environment = {
            "LD_PRELOAD": str(library),
            "FAKETIME_TIMESTAMP_FILE": str(self._file),
            "FAKETIME_CACHE_DURATION": str(int(_LOOK)),
            "FAKETIME_DONT_FAKE_MONOTONIC": "1",
            "NO_FAKE_STAT": "1",
        }

    def day(self, number: int) -> None:
        self._file.write_text(f"+{number}d")


@contextlib.contextmanager
def calendar() -> Iterator[Calendar | None]:
    """None where libfaketime is not installed."""
    found = sorted(Path("/usr/lib").glob("*/faketime/libfaketime.so.1"))
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        yield Calendar(found[0], Path(folder)) if found else None


def first(options: argparse.Namespace, model: Path | None) -> Iterator[dict[str, Any]]:
    """The first corrections of every task, each alone."""
    plain = [name for name in options.columns if name in ("base", "recall")]
    learned = [name for name in options.columns if name not in ("base", "recall")]
    for seed in range(options.seeds):
        for task in tasks(options.names, seed, options.sarcasm):
            for columns in filter(None, (plain, learned)):
                with Life(model, [task], options.threads, learns=columns is learned) as life:
                    yield from _sizes(options, life, task, columns, {"part": "first", "seed": seed, "task": task.name})


def _sizes(
    options: argparse.Namespace, life: Life, task: LifeTask, columns: Sequence[str], about: dict[str, Any]
) -> Iterator[dict[str, Any]]:
    wishes: dict[str, dict[str, Any]] = {"base": {"recall": False}, "recall": {"recall": True}, "auto": {}}
    wishes |= {"weights": wishes["base"], "both": wishes["recall"]}
    sent = 0
    base: dict[str, Any] | None = None
    for size in options.sizes:
        if size > len(task.train):
            break
        life.teach(task, task.train[sent:size])
        sent = size
        night = life.night(options.night) if life.learns else None
        for column in columns:
            figures = base if column == "base" and base else life.judge(task, options.judged, **wishes[column])
            base = figures if column == "base" else base
            row = {**about, "corrections": size, "column": column, **figures}
            yield {**row, "night": night, "revision": life.daemon.status()["revision"]} if night else row


def in_turn(options: argparse.Namespace, model: Path | None) -> Iterator[dict[str, Any]]:
    """One task after the other, in several orders, and all at once."""
    for seed in range(options.seeds):
        every = tasks(options.names, seed, options.sarcasm)
        for number in range(options.orders):
            order = random.Random(number).sample(every, len(every)) if number else every
            about = {"part": "tasks", "seed": seed, "order": [task.name for task in order]}
            with Life(model, order, options.threads, learns=True) as life:
                yield {**about, "after": None, "right": _all(options, life, order)}
                for task in order:
                    life.teach(task, task.train[: options.corrections])
                    night = life.night(options.night)
                    yield {**about, "after": task.name, "right": _all(options, life, order), "night": night}
        with Life(model, every, options.threads, learns=True) as life:
            for task in every:
                life.teach(task, task.train[: options.corrections])
            night = life.night(options.night)
            about = {"part": "tasks", "seed": seed, "order": "joint"}
            yield {**about, "after": "joint", "right": _all(options, life, every), "night": night}


def _all(options: argparse.Namespace, life: Life, every: Sequence[LifeTask]) -> dict[str, float]:
    return {task.name: life.judge(task, options.judged)["right"] for task in every}


def days(options: argparse.Namespace, model: Path | None) -> Iterator[dict[str, Any]]:
    """Days one after the other, as fast as their nights are over."""
    for seed in range(options.seeds):
        draw, life_tasks = random.Random(seed), tasks(options.names, seed, options.sarcasm)
        drift, end = options.days // 3, options.days // 2
        how = {"learns": True, "recall": options.recall}
        with calendar() as dates, Life(model, life_tasks, options.threads, calendar=dates, **how) as life:
            asked = dict.fromkeys(options.names, 0)
            for day in range(options.days):
                if dates is not None:
                    dates.day(day)
                    time.sleep(2 * _LOOK)  # until the daemon has seen it
                if day == drift:
                    life_tasks[0] = _drifted(life_tasks[0])
                present = life_tasks[:-1] if day >= end and len(life_tasks) > 1 else life_tasks
                right: dict[str, list[bool]] = {task.name: [] for task in present}
                for i in range(options.a_day):
                    task = present[i % len(present)]
                    row = task.train[asked[task.name] % len(task.train)]
                    asked[task.name] += 1
                    mistaken = len(life_tasks) > 1 and task is life_tasks[1] and draw.random() < _WRONG
                    value = task.wrong(row, draw) if mistaken else task.right(row)
                    right[task.name].append(life.correct(task, row, value))
                night = life.night(options.night)
                shares = {name: sum(each) / len(each) for name, each in right.items() if each}
                counts = {name: len(each) for name, each in right.items()}
                date = life.daemon.get("/admin/inferences?limit=1", admin=True).json["inferences"][0]["created_at"][:10]
                about = {"part": "days", "seed": seed, "day": day, "date": date, "drift": drift, "end": end}
                yield {**about, "right": shares, "n": counts, "night": night, **life.footprint()}


def _drifted(task: LifeTask) -> LifeTask:
    if not task.choices:
        return task
    return replace(task, labels=dict(zip(task.choices, (*task.choices[1:], task.choices[0]), strict=True)))


def main() -> int:
    options = _options()
    try:
        if options.report is None:
            model = (
                None if options.model == "tiny" else Path(options.model) if options.model else models.fetch_default()
            )
            part = first if options.first else days if options.days else in_turn
            rows = []
            for row in part(options, model):
                rows.append(row)
                if options.output:
                    with options.output.open("a", encoding="utf-8") as file:
                        file.write(json.dumps(row) + "\n")
                print(json.dumps(row), file=sys.stderr, flush=True)
        else:
            rows = [json.loads(line) for line in options.report.read_text(encoding="utf-8").splitlines()]
    except (ToolFailed, AgentdError, ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    print(continual_report.table(rows))
    if options.plot:
        continual_report.plot(rows, options.plot)
    return 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parts = parser.add_mutually_exclusive_group(required=True)
    parts.add_argument("--first", action="store_true", help="the first corrections of every task")
    parts.add_argument("--tasks", action="store_true", help="the tasks one after the other, and all at once")
    parts.add_argument("--days", type=_number, default=0, metavar="N", help="so many days with corrections")
    parts.add_argument("--report", type=Path, metavar="FILE.jsonl", help="what was measured before")
    parser.add_argument("model", nargs="?", help="a GGUF file, or tiny; the default model if left out")
    parser.add_argument("--names", type=_names, default=None, metavar="A,B", help=f"of {', '.join(NAMES)}")
    parser.add_argument("--sizes", type=_sorted, default="5,10,25,50,100,200,400", metavar="N,N")
    parser.add_argument("--columns", type=_columns, default=",".join(COLUMNS), help=f"of {', '.join(COLUMNS)}")
    parser.add_argument("--corrections", type=_number, default=300, metavar="N", help="of a task, in --tasks")
    parser.add_argument("--orders", type=_number, default=3, metavar="N")
    parser.add_argument("--a-day", type=_number, default=20, metavar="N", help="corrections a day")
    parser.add_argument("--recall", choices=("auto", "off"), default="auto", help="in --days; off: weights alone learn")
    parser.add_argument("--seeds", type=_number, default=1, metavar="N")
    parser.add_argument("--judged", type=_number, default=100, metavar="N", help="held-out rows that are asked")
    parser.add_argument("--night", type=float, default=7200.0, metavar="SECONDS", help="that one lasts at most")
    parser.add_argument("--threads", default="auto", type=lambda text: text if text == "auto" else int(text))
    parser.add_argument("--sarcasm", type=Path, metavar="FILE", help="sarcasm/samples.jsonl of evals 3.0.1.post1")
    parser.add_argument("--output", type=Path, metavar="FILE.jsonl", help="rows are appended to it")
    parser.add_argument("--plot", type=Path, metavar="FILE.png")
    options = parser.parse_args()
    if options.names is None:
        options.names = [name for name in NAMES if name != "sarcasm" or options.sarcasm]
    return options


def _number(text: str) -> int:
    if (number := int(text)) < 1:
        raise ValueError(text)
    return number


def _sorted(text: str) -> list[int]:
    return sorted({_number(part) for part in text.split(",")})


def _names(text: str) -> list[str]:
    return _known(text, NAMES)


def _columns(text: str) -> list[str]:
    return _known(text, COLUMNS)


def _known(text: str, known: Sequence[str]) -> list[str]:
    names = text.split(",")
    if unknown := [name for name in names if name not in known]:
        raise argparse.ArgumentTypeError(f"{', '.join(unknown)}: there are {', '.join(known)}")
    return names


if __name__ == "__main__":
    sys.exit(main())
