"""Following a pass until it ends: live bars on a terminal, a line now and then elsewhere."""

import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol

from agentd.ctl import output
from agentd.ctl.client import JSON, Daemon, segment
from agentd.ctl.errors import ExitCode, NotReachable

if TYPE_CHECKING:
    from rich.progress import TaskID

POLL = 0.5  # seconds between two looks at the progress
PATIENCE = 60.0  # seconds a daemon may take to come back, e.g. from a restart, before following ends
_LINE_EVERY = 10.0  # seconds between two plain lines of one phase


class View(AbstractContextManager["View"], Protocol):
    """Something that shows the progress objects of GET /admin/progress."""

    def show(self, progress: JSON) -> None: ...

    def note(self, message: str) -> None: ...


@dataclass(frozen=True)
class Ended:
    """How a pass ended: `outcome` is its last state, `answer` what GET /admin/passes/P says about it."""

    outcome: str
    reason: str | None
    answer: JSON

    @property
    def exit_code(self) -> ExitCode:
        return {"committed": ExitCode.OK, "refused": ExitCode.REFUSED}.get(self.outcome, ExitCode.NOT_COMMITTED)


def view(*, quiet: bool = False) -> View:
    """Bars where stdout is a terminal, otherwise lines on stderr; nothing if `quiet`."""
    if quiet:
        return Lines(say=lambda message: None)
    return Bars() if output.on_terminal() else Lines()


def follow(
    daemon: Daemon,
    pass_id: int,
    view: View,
    *,
    sleep: Callable[[float], None] = time.sleep,
    clock: Callable[[], float] = time.monotonic,
) -> Ended:
    """Shows the progress of a pass until it ends. A daemon that restarts meanwhile is waited for.

    Raises NotReachable when it stays away for longer than PATIENCE.
    """
    lost: float | None = None
    while True:
        try:
            progress = daemon.get("/admin/progress")["pass"]
            mine = progress is not None and progress["id"] == pass_id
            if mine:
                view.show(progress)
            if not mine or progress["done"]:
                answer = daemon.get(f"/admin/passes/{segment(pass_id)}")
                row = answer["pass"]
                if mine:
                    return Ended(progress["outcome"] or row["state"], progress["reason"] or row["reason"], answer)
                if row["finished_at"] is not None:
                    return Ended(row["state"], row["reason"], answer)
            lost = None
        except NotReachable as error:
            if lost is None:
                lost = clock()
                view.note(f"{error.reason}; waiting for the daemon to come back")
            if clock() - lost > PATIENCE:
                raise
        sleep(POLL)


class Lines:
    """A line when the phase changes, and every ten seconds within one."""

    def __init__(self, say: Callable[[str], None] = output.say, clock: Callable[[], float] = time.monotonic) -> None:
        self._say = say
        self._clock = clock
        self._phase: str | None = None
        self._said = 0.0

    def __enter__(self) -> "Lines":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None

    def show(self, progress: JSON) -> None:
        now = self._clock()
        if progress["phase"] == self._phase and now - self._said < _LINE_EVERY and not progress["done"]:
            return
        self._phase, self._said = progress["phase"], now
        parts = [f"pass {progress['id']}: {progress['phase']}", steps(progress), loss(progress), memory(progress)]
        self._say("  ".join(part for part in [*parts, left(progress)] if part))

    def note(self, message: str) -> None:
        self._say(message)


class Bars:
    """One bar per phase; the bars of finished phases stay, with the time they took."""

    def __init__(self) -> None:
        from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

        def text(field: str) -> TextColumn:
            return TextColumn(f"{{task.fields[{field}]}}", markup=False)

        columns: list[Any] = [SpinnerColumn(finished_text="✓"), TextColumn("{task.description}", markup=False)]
        columns += [BarColumn(bar_width=24), text("steps"), text("loss"), text("memory")]
        self._progress = Progress(*columns, TimeElapsedColumn(), text("left"), console=output.console())
        self._task: TaskID | None = None
        self._phase: str | None = None

    def __enter__(self) -> "Bars":
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def show(self, progress: JSON) -> None:
        fields: dict[str, Any] = {
            "steps": steps(progress),
            "loss": loss(progress),
            "memory": memory(progress),
            "left": left(progress),
        }
        fields = {name: output.clean(field, lines=False) for name, field in fields.items()}
        if progress["phase"] != self._phase or self._task is None:
            self._finish()
            self._phase = progress["phase"]
            # no total: the bar pulses, for a phase that cannot say how far it is
            self._task = self._progress.add_task(str(self._phase), total=progress["steps"] or None, **fields)
        total, step = progress["steps"] or None, progress["step"]
        self._progress.update(self._task, total=total, completed=step, **fields)
        if progress["done"]:
            self._finish()

    def note(self, message: str) -> None:
        self._progress.console.print(output.clean(message, lines=False))

    def _finish(self) -> None:
        if self._task is not None:
            task = self._progress.tasks[self._task]
            total = task.total or 1
            self._progress.update(self._task, total=total, completed=total, left="")


def steps(progress: JSON) -> str:
    return f"{progress['step']}/{progress['steps']}" if progress["steps"] else ""


def loss(progress: JSON) -> str:
    values = {"loss": progress["loss"], "dev loss": progress["dev_loss"], "accuracy": progress["accuracy"]}
    return "  ".join(f"{name} {value:.3f}" for name, value in values.items() if value is not None)


def memory(progress: JSON) -> str:
    """Memory of all processes now against the plan's prediction."""
    now, predicted = progress["memory_bytes"], progress["predicted_bytes"]
    if not now:
        return ""
    return f"{output.size(now)} of {output.size(predicted)}" if predicted else output.size(now)


def left(progress: JSON) -> str:
    seconds = progress["seconds_left"]
    return "" if seconds is None or progress["done"] else f"{output.duration(seconds)} left"
