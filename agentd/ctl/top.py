"""The daemon as it works, drawn again and again."""

import sys
import time
from collections import deque
from collections.abc import Iterator
from itertools import pairwise
from typing import TYPE_CHECKING, Annotated

import typer

from agentd.ctl import accuracy, output, progress
from agentd.ctl.client import JSON, Daemon
from agentd.ctl.errors import NotReachable, UsageError
from agentd.ctl.keys import keys
from agentd.ctl.options import Json, Socket
from agentd.ctl.status import next_pass

if TYPE_CHECKING:
    from rich.text import Text

_BLOCKS = " ▁▂▃▄▅▆▇█"
_BAR = 30  # cells
_TICKS = 40  # of the requests' little chart
_COLOURS = {"daemon": "cyan", "engine": "blue", "trainer": "yellow"}


class Rate:
    """Answers a second, from how many were served when."""

    def __init__(self) -> None:
        self._seen: deque[tuple[float, int]] = deque(maxlen=_TICKS + 1)

    def note(self, at: float, served: int) -> None:
        if self._seen and served < self._seen[-1][1]:  # the daemon began anew
            self._seen.clear()
        self._seen.append((at, served))

    @property
    def ticks(self) -> list[float]:
        seen = list(self._seen)
        return [(b[1] - a[1]) / max(1e-3, b[0] - a[0]) for a, b in pairwise(seen)]


def top(
    interval: Annotated[float, typer.Option(min=0.2, max=3600, metavar="S", help="Seconds between two looks.")] = 1.0,
    once: Annotated[bool, typer.Option("--once", help="Look once, print it and leave.")] = False,
    as_json: Json = False,
    socket: Socket = None,
) -> None:
    """Watch the daemon live: requests, memory, learning, tasks, events. `q` leaves."""
    daemon = Daemon(socket)
    if as_json:
        _as_json(daemon, interval, once)
    elif once:
        output.console().print(frame(_look(daemon), Rate(), sys.maxsize))
    elif not (output.on_terminal() and sys.stdin.isatty()):
        raise UsageError("top draws on a terminal; elsewhere use --once or --json")
    else:
        _live(daemon, interval)


def _look(daemon: Daemon) -> JSON:
    """All that one frame shows."""
    status = daemon.get("/admin/status")
    return {
        "status": status,
        "tasks": daemon.get("/admin/tasks")["tasks"],
        "events": daemon.get("/admin/events", limit=20)["events"],
    }


def _as_json(daemon: Daemon, interval: float, once: bool) -> None:
    while True:
        look = _look(daemon)
        if once:
            output.document(look)
            return
        output.line(look)
        time.sleep(interval)


def _live(daemon: Daemon, interval: float) -> None:
    from rich.live import Live
    from rich.text import Text

    console, rate, lost = output.console(), Rate(), ""
    shown: JSON | None = None
    with keys() as pressed, Live(console=console, screen=True, auto_refresh=False) as live:
        while True:
            try:
                shown, lost = _look(daemon), ""
                rate.note(time.monotonic(), shown["status"]["requests"]["served"])
            except NotReachable as error:
                lost = f"{error.reason}; waiting for the daemon to come back"
            picture = Text() if shown is None else frame(shown, rate, console.height - bool(lost))
            if lost:
                picture = Text.assemble((lost + "\n", "bold red"), picture)
            picture.no_wrap, picture.overflow = True, "ellipsis"
            live.update(picture, refresh=True)
            if pressed(interval) in ("q", "Q", "\x04"):
                return


def frame(look: JSON, rate: Rate, height: int) -> "Text":
    """One picture of at most `height` lines; what happened last gets the lines that are left."""
    from rich.text import Text

    status = look["status"]
    lines = [
        *_head(status),
        *_memory(status["memory"]),
        _requests(status["requests"], rate),
        *_learning(status),
        Text(),
    ]
    lines += [*_tasks(look["tasks"]), Text()]
    room = min(len(look["events"]), max(0, height - len(lines) - 1))
    events = sorted(look["events"], key=lambda event: int(event["id"]))[-room:] if room else []
    for event in events:
        text = output.clean(f"{event['kind']}: {event['message']}", lines=False)
        lines.append(Text.assemble((event["at"][11:19], "dim"), "  ", text))
    return Text("\n").join(lines[: max(1, height - 1)])


def _head(status: JSON) -> "Iterator[Text]":
    from rich.text import Text

    model = output.clean(str(status["model"]["name"]), lines=False)
    good = status["state"] == "serving" and not status.get("problem")
    serving = f"revision {status['revision']}" if status["revision"] else "the base model"
    up = output.duration(status["uptime_seconds"])
    state = (status["state"], "bold green" if good else "bold red")
    yield Text.assemble(("agentd ", "bold"), f"{status['version']}  {model}  ", state, f"  {serving}  up {up}")
    for problem in (status.get("problem"), *status.get("held", {}).values()):
        if problem:
            yield Text(output.clean(str(problem), lines=False), "red")
    if trial := status["trial"]:
        left = "" if trial["seconds_left"] is None else f", {output.duration(trial['seconds_left'])} left"
        yield Text(f"revision {trial['revision']} is on trial{left}", "yellow")


def _memory(memory: JSON) -> "Iterator[Text]":
    from rich.text import Text

    sizes = {name: n for name, n in memory["processes"].items() if n}
    used, free = sum(sizes.values()), memory["available_bytes"]
    budget, whole = max(0, free - memory["reserve_bytes"]), max(1, used + free)
    bar = Text("memory    ", "bold")
    cells = 0
    for name, n in sizes.items():
        width = max(1, round(_BAR * n / whole))
        bar.append("█" * width, _COLOURS.get(name, "white"))
        cells += width
    line = round(_BAR * (used + budget) / whole)
    bar.append("".join("│" if cell == line else "░" for cell in range(cells, _BAR + 1)), "dim")
    bar.append(f"  {output.size(used)}; a pass may take {output.size(budget)}")
    yield bar
    each = [(f"{name} {output.size(n)}  ", _COLOURS.get(name, "white")) for name, n in sizes.items()]
    yield Text.assemble(" " * 10, *each)


def _requests(requests: JSON, rate: Rate) -> "Text":
    from rich.text import Text

    ticks = rate.ticks
    high = max(ticks, default=0.0)
    chart = "".join(_BLOCKS[round((len(_BLOCKS) - 1) * tick / high)] if high else _BLOCKS[1] for tick in ticks)
    pace = f"  {ticks[-1]:.1f}/s " if ticks else ""
    counts = f"{requests['active']} now, {requests['waiting']} waiting, {requests['served']} served"
    failed = (f", {requests['failed']} failed", "red" if requests["failed"] else "")
    return Text.assemble(("requests  ", "bold"), counts, failed, pace, (chart, "green"))


def _learning(status: JSON) -> "Iterator[Text]":
    from rich.text import Text

    running = status["pass"]
    if running is None:
        yield Text.assemble(("learning  ", "bold"), output.clean(next_pass(status["next_trigger"]), lines=False))
        if last := status.get("last_pass"):
            reason = f": {last['reason']}" if last["reason"] else ""
            text = output.clean(f"last: pass {last['id']} {last['state']}{reason}", lines=False)
            yield Text(" " * 10 + text, "dim")
        return
    share = running["step"] / running["steps"] if running["steps"] else 0.0
    bar = "█" * round(_BAR * share)
    parts = [progress.steps(running), progress.loss(running), progress.memory(running), progress.left(running)]
    about = "  ".join(part for part in parts if part)
    rest = ("░" * (_BAR - len(bar)), "dim")
    about = f"  pass {running['id']}, {running['phase']}  {about}"
    yield Text.assemble(("learning  ", "bold"), (bar, "green"), rest, about)


def _tasks(tasks: list[JSON]) -> "Iterator[Text]":
    from rich.text import Text

    yield Text(f"{'task':<24} {'new':>6} {'used':>6} {'holdout':>8} {'answers':>8} {'right':>7} {'latest':>7}", "bold")
    if not tasks:
        yield Text("no tasks yet", "dim")
    for task in tasks:
        counts, scores = task["examples"], task["scores"]
        judged = accuracy.overall(scores) if scores else {"answers": 0, "accuracy": None, "latest": None}
        shares = [" " * 6 + "–" if each is None else f"{each:>7.1%}" for each in (judged["accuracy"], judged["latest"])]
        name = output.clean(task["name"], lines=False)
        name = name if len(name) <= 24 else f"{name[:23]}…"
        train = counts["train"]
        figures = f"{train['new']:>6} {train['used']:>6} {counts['holdout']:>8} {judged['answers']:>8}"
        yield Text(f"{name:<24} {figures} {shares[0]} {shares[1]}")
