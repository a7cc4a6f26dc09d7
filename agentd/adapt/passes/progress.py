"""Where a pass is, for whoever watches it; and what memory it takes meanwhile."""

import asyncio
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any

from agentd.host import memory
from agentd.learn.optimise import StepResult


@dataclass
class Progress:
    """The live side of a pass. Losses in nats, times in seconds, memory in bytes."""

    id: int
    state: str = "triggered"
    phase: str = "plan"
    step: int = 0
    steps: int = 0
    loss: float | None = None
    dev_loss: float | None = None
    accuracy: float | None = None
    memory_bytes: int = 0
    predicted_bytes: int = 0
    method: str | None = None
    blocks: int | None = None
    message: str = ""
    controls_memory: bool = False  # the pass itself takes less, or waits, while memory is short
    done: bool = False
    outcome: str | None = None
    reason: str | None = None
    stop_reason: str | None = None  # why it is to end, from when someone wants that: before its task is cancelled
    ending: bool = False
    phases: dict[str, float] = field(default_factory=dict)
    clock: Callable[[], float] = time.monotonic
    _started: float = 0.0
    _phase_started: float = 0.0
    _ended: float | None = None

    def __post_init__(self) -> None:
        self.go_on()

    def go_on(self) -> None:
        """The time begins to count, behind that of its phases so far."""
        self._phase_started = self.clock()
        self._started = self._phase_started - sum(self.phases.values())

    def end(self, task: "asyncio.Task[Any]", reason: str) -> None:
        """Has the pass end whose task this is; once: another cancellation would come into what it does about this
        one, as it would into what is done when all is over."""
        if not (self.ending or self.done):
            self.ending, self.stop_reason = True, reason
            task.cancel()

    def begin(self, phase: str, steps: int = 0, message: str = "") -> None:
        """Enters a phase; the time of the one before is noted."""
        self.close_phase()
        self.phase, self.step, self.steps, self.message = phase, 0, steps, message

    def note(self, result: StepResult) -> None:
        """A zeroth-order step was taken."""
        self.step, self.loss = result.step, result.loss
        self.dev_loss = result.dev_loss if result.dev_loss is not None else self.dev_loss

    def close_phase(self) -> None:
        self.phases = self.phases_so_far
        self._phase_started = self.clock()

    @property
    def phases_so_far(self) -> dict[str, float]:
        """With the one that it is in."""
        spent = self.phases.get(self.phase, 0.0) + self.clock() - self._phase_started
        return {**self.phases, self.phase: round(spent, 3)}

    def finish(self, outcome: str, reason: str | None) -> None:
        self.close_phase()
        self.state, self.done, self.outcome, self.reason = outcome, True, outcome, reason
        self._ended = self.clock()

    @property
    def seconds(self) -> float:
        return (self._ended or self.clock()) - self._started

    @property
    def seconds_left(self) -> float | None:
        """Of this phase, from its pace so far."""
        if self.done or not self.steps or not self.step:
            return None
        return (self.clock() - self._phase_started) / self.step * (self.steps - self.step)

    def as_json(self) -> dict[str, Any]:
        names = (
            "id state phase step steps loss dev_loss accuracy memory_bytes predicted_bytes method blocks message done "
            "outcome reason"
        )
        left = self.seconds_left
        return {name: getattr(self, name) for name in names.split()} | {
            "seconds": round(self.seconds, 1),
            "seconds_left": None if left is None else round(left, 1),
        }


class MemoryWatch:
    """Samples the proportional set size of the processes while a pass runs; keeps each one's peak and their sum's.

    Of those in `mapping`, whose weights are pages of files that come and go as they are used, anonymous memory counts
    alone: the other pages are memory that the kernel calls available.
    """

    def __init__(
        self, pids: Callable[[], dict[str, int | None]], interval: float = 0.25, mapping: Collection[str] = ()
    ) -> None:
        self._pids, self._interval, self._mapping = pids, interval, mapping
        self._meter = memory.Meter()
        self.peaks: dict[str, int] = {}
        self.before: dict[str, int] = {}
        self.total = 0
        self.now_added = 0
        self.now: dict[str, int] = {}
        self.low: int | None = None
        self.pressure: float | None = None
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> "MemoryWatch":
        self.before = await asyncio.to_thread(self.read)
        self._task = asyncio.create_task(self._run())
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._task:
            self._task.cancel()

    @property
    def added(self) -> int:
        """Bytes that all processes together took at their peak beyond what they had before the pass."""
        return max(0, self.total - sum(self.before.values()))

    def read(self) -> dict[str, int]:
        sizes = {
            name: memory.anonymous(pid) if name in self._mapping else self._meter.read(pid)
            for name, pid in self._pids().items()
            if pid is not None
        }
        return {name: size for name, size in sizes.items() if size is not None}

    async def _run(self) -> None:
        while True:
            self.now = sizes = await asyncio.to_thread(self.read)
            for name, size in sizes.items():
                self.peaks[name] = max(size, self.peaks.get(name, 0))
            self.total = max(self.total, sum(sizes.values()))
            self.now_added = max(0, sum(sizes.values()) - sum(self.before.values()))
            reading = await asyncio.to_thread(memory.read)
            self.low, self.pressure = reading.available, reading.pressure
            await asyncio.sleep(self._interval)
