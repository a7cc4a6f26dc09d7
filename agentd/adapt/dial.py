"""The dial while a pass runs: memory is read again and again, and backpropagation is moved to what fits now.

Nothing is lost by a move. The trainer writes its matrices behind its current step and ends, which frees all it had; the
next setting starts from them, at the same place of its own schedule. Where no setting with backpropagation fits, MeZO
steps are taken, which need no trainer; where not even these fit, the pass waits.
"""

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from agentd.adapt.planning import Setting
from agentd.adapt.progress import MemoryWatch, Progress
from agentd.adapt.training import Training
from agentd.budget.footprint import MIB
from agentd.errors import PassFailed, PassRefused

INTERVAL = 0.25  # seconds between two looks at memory
PRESSURE = 30.0  # percent of the last 10 s in which something waited for memory (PSI "some avg10")
_DWELL = 8.0  # seconds between two looks at whether the dial can be turned up
_EARLY = 0.7  # of a schedule; behind it a larger setting has no time left to make up for its start
_ROOM = 1.15  # a larger setting must fit with this factor before it is taken, so that the dial does not swing
_PARK = 20.0  # seconds for the trainer's current step; then it is killed, and what it wrote last counts
_LIMIT, _SLACK = 1.25, 32 * MIB  # of what the plan says of the trainer; beyond, the plan is wrong
_PATIENCE = 1800.0  # seconds that a pass waits for memory

Replan = Callable[[int, int | None], Awaitable[Setting]]
"""(bytes that the pass holds besides its trainer, most that a plan may need or None) -> the best setting now."""

Note = Callable[..., Awaitable[None]]


@dataclass
class Move:
    """Why the trainer was stopped. `lost`: it was killed; what it learned since it last wrote, seconds ago, is gone."""

    reason: str
    lost: bool = False
    smaller: bool = False


class Dial:
    """`note(kind, message, **data)` records an event; `replan` raises PassRefused where nothing fits."""

    def __init__(self, memory: MemoryWatch, floor: int, replan: Replan, note: Note) -> None:
        self._memory, self._floor, self._replan, self._note = memory, floor, replan, note
        self.moves = 0
        self.move: Move | None = None  # why the running trainer was told to stop, as soon as it was

    @property
    def squeezed(self) -> str | None:
        """Why the rest of the device needs memory now; None if it does not."""
        low, pressure = self._memory.low, self._memory.pressure
        if low is not None and low < self._floor:
            return f"{low / 1e6:.0f} MB are free, under memory.floor ({self._floor / 1e6:.0f} MB)"
        if pressure is not None and pressure > PRESSURE:
            return f"processes waited for memory {pressure:.0f} % of the last 10 s"
        return None

    async def watch(self, setting: Setting, training: Training, progress: Progress) -> None:
        """Returns once the trainer of this setting has had to stop; `move` says why."""
        self.move = None
        looked = time.monotonic()
        limit = trainer_limit(setting)
        while True:
            await asyncio.sleep(INTERVAL)
            taken = self._memory.now.get("trainer", 0)
            if taken > limit:
                why = f"the trainer took {taken / 1e6:.0f} MB of the {limit / 1e6:.0f} MB allowed"
                self.move = Move(why, lost=True, smaller=True)
                training.kill()
                return
            if reason := self.squeezed:
                await self._park(training, Move(reason, smaller=True))
                return
            if time.monotonic() - looked > _DWELL:
                looked = time.monotonic()
                is_early = progress.steps and progress.step < _EARLY * progress.steps
                if is_early and await self._better_fits(setting):
                    await self._park(training, Move("there is memory again"))
                    return

    async def next(self, setting: Setting, move: Move) -> Setting:
        """What to go on with after a move, once something fits. Raises PassFailed when memory does not return."""
        self.moves += 1
        await asyncio.sleep(2 * INTERVAL)  # until the reading knows what the trainer gave back
        waited_since: float | None = None
        # After a squeeze what was too much must not come again at once, however the reading looks for a moment.
        ceiling = setting.choice.plan.needed - 1 if move.smaller else None
        while True:
            try:
                if self.squeezed:
                    raise PassRefused(self.squeezed)
                found = await self._replan(self.held, ceiling)
            except PassRefused as error:
                if waited_since is None:
                    waited_since = time.monotonic()
                    await self._note("paused", f"no setting fits: {error}", free_bytes=self._memory.low)
                if time.monotonic() - waited_since > _PATIENCE:
                    raise PassFailed(f"memory did not return within {_PATIENCE:.0f} s: {error}") from None
                await asyncio.sleep(1.0)
                ceiling = None if self.squeezed is None else ceiling
                continue
            if waited_since is not None:
                seconds = time.monotonic() - waited_since
                await self._note("resumed", f"after {seconds:.0f} s", free_bytes=self._memory.low)
            was, now = setting.choice.plan, found.choice.plan
            if was.setting != now.setting:
                message = f"{was.setting} -> {now.setting}: {move.reason}"
                facts = {"from": was.setting, "to": now.setting, "reason": move.reason, "needed_bytes": now.needed}
                await self._note("dial", message, free_bytes=self._memory.low, **facts)
            return found

    @property
    def held(self) -> int:
        """Bytes that the pass has taken already and keeps: the engine's and the daemon's."""
        before = self._memory.before
        return sum(max(0, size - before.get(name, 0)) for name, size in self._memory.now.items() if name != "trainer")

    async def _better_fits(self, setting: Setting) -> bool:
        """Whether a plan that is expected to bring more fits with room to spare, the trainer's own memory included."""
        held = self.held + self._memory.now.get("trainer", 0)
        with contextlib.suppress(PassRefused):
            found = await self._replan(held, None)
            plan, now = found.choice.plan, setting.choice.plan
            if (plan.method, plan.blocks, plan.checkpoint) == (now.method, now.blocks, now.checkpoint):
                return False
            return plan.needed > now.needed and _ROOM * plan.needed <= found.choice.budget
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


def trainer_limit(setting: Setting) -> int:
    """Bytes that the trainer may take."""
    return int(_LIMIT * setting.choice.plan.needed_by("trainer")) + _SLACK


def place(step: int, steps: int, new_steps: int) -> int:
    """The step of another schedule that is as far on as `step` of `steps`; never its end, so that something is done."""
    return min(new_steps - 1, round(step / max(1, steps) * new_steps))
