"""The real control of memory, planner included, with readings of memory and a trainer's size put in."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest

from agentd.adapt.passes import memory_control
from agentd.adapt.passes.memory_control import MemoryControl, Move, trainer_limit
from agentd.adapt.passes.progress import MemoryWatch, Progress
from agentd.adapt.planning.setting import NONE, Conditions, Setting
from agentd.budget import planner
from agentd.budget.model_shapes import ModelShapes
from agentd.budget.plan import Plan
from agentd.budget.workload import Workload

MB = 10**6
LONGEST = 1800.0  # seconds that a pass may train
MEZO_CHUNKS = 34  # of zeroth-order steps, all there are in a pass
SHAPES = ModelShapes.dense("llama", n_layer=30, n_embd=576, n_head=9, n_head_kv=3, n_ff=1536, n_vocab=49152, tied=True)
WORK = Workload(seq_len=60, tokens=24_000, examples=400, prefix=30)


@dataclass
class Trainer:
    """A trainer that has what `size` says of its plan, as soon as memory is read."""

    memory: MemoryWatch
    size: Callable[[Plan], int]
    pid: int | None = None
    ended: list[str] = field(default_factory=list)

    def start(self, setting: Setting) -> None:
        self.pid, self.memory.now["trainer"] = 1, self.size(setting.choice.plan)

    def kill(self) -> None:
        self._end("killed")

    def park(self) -> None:
        self._end("parked")

    def _end(self, how: str) -> None:
        self.pid = None
        self.memory.now.pop("trainer", None)
        self.ended.append(how)


class Pass:
    """The loop of a pass around the control: train until told to stop, go on with what is next."""

    def __init__(self, available: int, size: Callable[[Plan], int]) -> None:
        self.available = available
        self.memory = MemoryWatch(dict)
        self.memory.low = available
        self.trainer = Trainer(self.memory, size)
        self.now = 0.0
        self.events: list[tuple[str, str]] = []
        self.settings: list[Setting] = []
        self.control = MemoryControl(self.memory, 0, LONGEST, self.replan, self.note, lambda: self.now)

    async def replan(self, conditions: Conditions = NONE) -> Setting:
        choice = planner.choose(
            SHAPES,
            WORK,
            available=self.available - self.memory.now.get("trainer", 0) + conditions.held,
            reserve=0,
            limit=conditions.ceiling,
            overruns=conditions.overruns,
        )
        return Setting(choice.plan.method, choice.plan.blocks, 0, 8, choice)

    async def note(self, kind: str, message: str, **_: Any) -> None:
        self.events.append((kind, message))

    async def run(self, on_segment: Callable[[int], None] = lambda i: None) -> Setting | None:
        """The setting that trained to its end, None where training had to end."""
        setting: Setting | None = await self.replan()
        progress = Progress(1, steps=1000, step=10)
        left = MEZO_CHUNKS
        for i in range(100):
            assert setting is not None
            self.settings.append(setting)
            on_segment(i)
            if not setting.blocks:
                left -= 1
                if not left:
                    return setting
                setting = await self.control.next(setting, Move("MeZO steps taken meanwhile"))
            else:
                self.trainer.start(setting)
                training: Any = self.trainer
                watch = asyncio.ensure_future(self.control.watch(setting, training, progress))
                for _ in range(200):  # looks at memory after which this one is through
                    await asyncio.sleep(memory_control.INTERVAL)
                    self.now += 0.25
                    if watch.done():
                        break
                if not watch.done():
                    watch.cancel()
                    return setting
                assert self.control.move is not None
                setting = await self.control.next(setting, self.control.move)
            if setting is None:
                return None
        raise AssertionError("the pass did not end")


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_control, "INTERVAL", 0.0005)


def trained(plan: Plan) -> tuple[str, int, bool, bool]:
    return plan.method, plan.blocks, plan.checkpoint, plan.small


@pytest.mark.parametrize("factor", [1.6, 2.5, 6.0])
@pytest.mark.parametrize("available", [700 * MB, 2000 * MB, 20_000 * MB])
def test_a_plan_that_was_wrong_is_wrong_for_the_rest_of_the_pass(factor: float, available: int) -> None:
    """As in the issue: what is planned for is taken and more, the trainer is ended, and there is memory again."""
    going = Pass(available, lambda plan: int(factor * plan.by_formula))
    last = asyncio.run(going.run())
    tried = [trained(setting.choice.plan) for setting in going.settings if setting.blocks]
    assert len(tried) > 1
    assert len(tried) == len(set(tried)), "a plan was taken up again"
    sizes = [setting.choice.plan.by_formula for setting in going.settings if setting.blocks]
    assert sizes == sorted(sizes, reverse=True), tried
    if last is not None and last.blocks:
        assert going.trainer.size(last.choice.plan) <= trainer_limit(last)
    assert going.control.moves <= memory_control.MOVES


def test_what_was_taken_is_planned_for_at_once() -> None:
    """A trainer that takes twice what the formulas say needs one move for each kind of plan, not one for each plan."""
    going = Pass(3000 * MB, lambda plan: 2 * _by_formula(plan))
    last = asyncio.run(going.run())
    assert last is not None
    assert last.blocks
    ended = [how for how in going.trainer.ended if how == "killed"]
    assert 1 <= len(ended) <= len({setting.choice.plan.family for setting in going.settings if setting.blocks})
    assert last.choice.plan.needed_by("trainer") >= 2 * _by_formula(last.choice.plan) - MB


def _by_formula(plan: Plan) -> int:
    return sum(t.bytes for t in plan.terms if t.process == "trainer" and t.name != "calibration")


def test_memory_that_comes_and_goes_for_ever_ends_the_pass() -> None:
    going = Pass(3000 * MB, lambda plan: plan.needed_by("trainer"))

    def swing(i: int) -> None:
        # Taken away while it trains, and back before the next look: each time the larger plan fits again.
        going.available = (300 if i % 2 else 3000) * MB
        going.memory.pressure = 90.0

    async def run() -> Setting | None:
        async def calm() -> None:
            while True:
                await asyncio.sleep(memory_control.INTERVAL)
                if going.trainer.pid is None:
                    going.memory.pressure = 0.0

        relief = asyncio.ensure_future(calm())
        try:
            return await going.run(swing)
        finally:
            relief.cancel()

    assert asyncio.run(run()) is None
    assert going.control.moves == memory_control.MOVES
    assert going.events[-1][0] == "stopped"
    assert "16 times" in going.events[-1][1]


def test_a_pass_without_time_left_ends_with_what_it_has() -> None:
    going = Pass(3000 * MB, lambda plan: plan.needed_by("trainer"))

    def late(i: int) -> None:
        going.now = 1.1 * LONGEST + 1

    assert asyncio.run(going.run(late)) is None
    assert going.trainer.ended == ["parked"], "what it had learned was thrown away"
    assert going.control.out_of_time
    assert "30 minutes have passed" in going.events[-1][1]


def test_the_dial_is_turned_up_when_there_is_memory_again() -> None:
    going = Pass(400 * MB, lambda plan: plan.needed_by("trainer"))

    def more(i: int) -> None:
        going.available = 3000 * MB

    last = asyncio.run(going.run(more))
    assert last is not None
    assert going.trainer.ended == ["parked"]
    assert last.needed > going.settings[0].needed
    assert going.control.moves == 1
