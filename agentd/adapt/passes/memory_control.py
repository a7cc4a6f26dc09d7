"""The dial while a pass runs: memory is read again and again, and backpropagation is moved to what fits now.

Nothing is lost by a move. The trainer writes its matrices behind its current step and ends, which frees all it had; the
next setting starts from them, at the same place of its own schedule. Where no setting with backpropagation fits, MeZO
steps are taken, which need no trainer; where not even these fit, the pass waits.

A plan whose trainer took more than it was allowed was wrong, and stays wrong however much memory there is later: the
pass calibrates by what was taken, and does not return to that plan or to a larger one. Moves and time have a bound, so
every pass ends.
"""

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace

from agentd.adapt.passes.progress import MemoryWatch, Progress
from agentd.adapt.passes.trainer_process import Training
from agentd.adapt.planning.setting import Conditions, Setting
from agentd.budget.footprint import MIB
from agentd.budget.plan import Overrun, Plan
from agentd.budget.workload import Workload
from agentd.errors import PassRefused

INTERVAL = 0.25  # seconds between two looks at memory
PRESSURE = 30.0  # percent of the last 10 s in which something waited for memory (PSI "some avg10")
LOW_FOR = 20.0  # seconds under memory.floor that a pass outlasts where it cannot take less
DWELL = 8.0  # seconds between two looks at whether the dial can be turned up
MOVES = 16  # in a pass; then training ends with what it has
MOVES_UP = 8  # moves after which the dial is not turned up any more: the others are for memory that goes away
_LATE = 1.1  # of the time that training has, after which a trainer that has not ended by itself is stopped
_EARLY = 0.7  # of a schedule; behind it a larger setting has no time left to make up for its start
_ROOM = 1.15  # a larger setting must fit with this factor before it is taken, so that the dial does not swing
_PARK = 20.0  # seconds for the trainer's current step; then it is killed, and what it wrote last counts
_LIMIT, _SLACK = 1.25, 32 * MIB  # of what the plan says of the trainer; beyond, the plan is wrong
_PATIENCE = 1800.0  # seconds that a pass waits for memory


Replan = Callable[[Conditions], Awaitable[Setting]]
"""The best setting now. Raises PassRefused where nothing fits."""

Note = Callable[..., Awaitable[None]]


@dataclass
class Move:
    """Why the trainer was stopped.

    lost           it was killed; what it learned since it last wrote, seconds ago, is gone
    smaller        the next plan must need less
    trainer_bytes  what the trainer had when its plan turned out to be wrong; None for a plan that was right
    """

    reason: str
    lost: bool = False
    smaller: bool = False
    trainer_bytes: int | None = None


class MemoryControl:
    """`longest`: seconds from the pass's start to the end of its training, of which `spent` lie before a restart.
    `note(kind, message, **data)` records an event; `clock` tells seconds."""

    def __init__(
        self,
        memory: MemoryWatch,
        floor: int,
        longest: float,
        replan: Replan,
        note: Note,
        clock: Callable[[], float] = time.monotonic,
        spent: float = 0.0,
    ) -> None:
        self._memory, self._floor, self._replan, self._note, self._clock = memory, floor, replan, note, clock
        self._longest = longest
        self._started = clock() - spent
        self._overruns: tuple[Overrun, ...] = ()
        self._workload: Workload | None = None
        self.moves = 0
        self.move: Move | None = None  # why the running trainer was told to stop, as soon as it was

    @property
    def squeezed(self) -> str | None:
        """Why the rest of the device needs memory now; None if it does not."""
        pressure = self._memory.pressure
        if reason := under_floor(self._memory, self._floor):
            return reason
        if pressure is not None and pressure > PRESSURE:
            return f"processes waited for memory {pressure:.0f} % of the last 10 s"
        return None

    @property
    def out_of_time(self) -> bool:
        """Whether training has to end now."""
        return not self.seconds_until_stopped

    @property
    def seconds_left(self) -> float:
        """For training."""
        return max(0.0, self._started + self._longest - self._clock())

    @property
    def seconds_until_stopped(self) -> float:
        """Until training is `out_of_time`."""
        return max(0.0, self._started + _LATE * self._longest - self._clock())

    @property
    def exhausted(self) -> str | None:
        """Why training ends with what it has; None as long as it may go on."""
        if self.out_of_time:
            return f"{self._longest / 60:.0f} minutes have passed since the pass began (adapt.max_time)"
        if self.moves >= MOVES:
            return f"memory made it stop {self.moves} times"
        return None

    async def plan(self, workload: Workload, prefers: tuple[str, int] | None = None) -> Setting:
        """The best setting for the examples as the engine encoded them, now and in what follows: until then there were
        their texts only. `prefers`: method and blocks that are taken where they fit. Raises PassRefused."""
        self._workload = workload
        return await self._replan(replace(self._conditions(self.held), prefers=prefers))

    async def watch(self, setting: Setting, training: Training, progress: Progress) -> None:
        """Returns once the trainer of this setting has had to stop; `move` says why."""
        self.move = None
        looked = self._clock()
        limit = trainer_limit(setting)
        while True:
            await asyncio.sleep(INTERVAL)
            trainer_bytes = self._memory.now.get("trainer", 0)
            if trainer_bytes > limit:
                why = f"the trainer took {trainer_bytes / 1e6:.0f} MB of the {limit / 1e6:.0f} MB allowed"
                self.move = Move(why, lost=True, smaller=True, trainer_bytes=trainer_bytes)
                training.kill()
                return
            if reason := self.squeezed:
                await self._park(training, Move(reason, smaller=True))
                return
            if self.out_of_time:
                await self._park(training, Move("there is no time left"))
                return
            if self._clock() - looked > DWELL:
                looked = self._clock()
                is_early = progress.steps and progress.step < _EARLY * progress.steps
                if is_early and self.moves < MOVES_UP and await self._better_fits(setting):
                    await self._park(training, Move("there is memory again"))
                    return

    async def next(self, setting: Setting, move: Move) -> Setting | None:
        """What to go on with after a move, once something fits; None where training ends with what it has."""
        self.moves += bool(setting.blocks)  # MeZO steps in between stop no trainer
        if move.trainer_bytes is not None:
            self._overruns = (*self._overruns, Overrun.of(setting.choice.plan, move.trainer_bytes))
        await asyncio.sleep(2 * INTERVAL)  # until the reading knows what the trainer gave back
        waited_since: float | None = None
        # After a squeeze what was too much must not come again at once, however the reading looks for a moment.
        ceiling = setting.choice.plan.needed - 1 if move.smaller else None
        while (why := self.exhausted) is None:
            try:
                if self.squeezed:
                    raise PassRefused(self.squeezed)
                following = await self._replan(self._conditions(self.held, ceiling))
            except PassRefused as error:
                if waited_since is None:
                    waited_since = self._clock()
                    await self._note("paused", f"no setting fits: {error}", free_bytes=self._memory.low)
                if self._clock() - waited_since > _PATIENCE:
                    why = f"memory did not return within {_PATIENCE:.0f} s: {error}"
                    break
                await asyncio.sleep(4 * INTERVAL)
                ceiling = None if self.squeezed is None else ceiling
                continue
            if waited_since is not None:
                seconds = self._clock() - waited_since
                await self._note("resumed", f"after {seconds:.0f} s", free_bytes=self._memory.low)
            was, now = setting.choice.plan, following.choice.plan
            if was.setting != now.setting:
                message = f"{was.setting} -> {now.setting}: {move.reason}"
                facts = {"from": was.setting, "to": now.setting, "reason": move.reason, "needed_bytes": now.needed}
                await self._note("dial", message, free_bytes=self._memory.low, **facts)
            return following
        await self._note("stopped", f"training ends here: {why}", free_bytes=self._memory.low, reason=move.reason)
        return None

    @property
    def held(self) -> int:
        """Bytes that the pass has taken already and keeps: the engine's and the daemon's."""
        before = self._memory.before
        return sum(max(0, size - before.get(name, 0)) for name, size in self._memory.now.items() if name != "trainer")

    def _conditions(self, held: int, ceiling: int | None = None) -> Conditions:
        return Conditions(held, ceiling, self._overruns, self._workload)

    async def _better_fits(self, setting: Setting) -> bool:
        """Whether a plan that is expected to bring more fits with room to spare, the trainer's own memory included."""
        held = self.held + self._memory.now.get("trainer", 0)
        with contextlib.suppress(PassRefused):
            better = await self._replan(self._conditions(held))
            plan, now = better.choice.plan, setting.choice.plan
            if _same(plan, now):
                return False
            return plan.needed > now.needed and _ROOM * plan.needed <= better.choice.budget
        return False

    async def _park(self, training: Training, move: Move) -> None:
        self.move = move
        training.park()
        deadline = time.monotonic() + _PARK
        while training.pid is not None:
            if time.monotonic() > deadline:
                training.kill()
                move.lost = True
                break
            await asyncio.sleep(0.05)


def _same(a: Plan, b: Plan) -> bool:
    return (a.method, a.blocks, a.checkpoint) == (b.method, b.blocks, b.checkpoint)


def under_floor(memory: MemoryWatch, floor: int) -> str | None:
    """Says so while less is free than the rest of the device is to have; `floor` in bytes."""
    if memory.low is None or memory.low >= floor:
        return None
    return f"{memory.low / 1e6:.0f} MB are free, under memory.floor ({floor / 1e6:.0f} MB)"


async def outlast(memory: MemoryWatch, floor: Callable[[], int], progress: Progress) -> str:
    """Returns once the pass has to end, with the reason: memory stayed short, and there was nothing to turn down."""
    low_since: float | None = None
    while True:
        progress.memory_bytes = memory.now_added
        reason = None if progress.controls_memory else under_floor(memory, floor())
        low_since = None if reason is None else low_since or time.monotonic()
        if low_since is not None and time.monotonic() - low_since > LOW_FOR:
            return f"for {LOW_FOR:.0f} s of its phase {progress.phase}, {reason}"
        await asyncio.sleep(INTERVAL)


def trainer_limit(setting: Setting) -> int:
    """Bytes that the trainer may take."""
    return int(_LIMIT * setting.choice.plan.needed_by("trainer")) + _SLACK


def place(step: int, steps: int, new_steps: int) -> int:
    """The step of another schedule that is as far on as `step` of `steps`; never its end, so that something is done."""
    return min(new_steps - 1, round(step / max(1, steps) * new_steps))
