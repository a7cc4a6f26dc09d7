"""Heat, a low battery and memory pressure hold passes. The sensors and the clock are made up, the rest is real."""

import asyncio
import os
import signal
from pathlib import Path

import anyio
import psutil
import pytest

from agentd.adapt.holds import Holds
from agentd.adapt.passes.trainer_process import Training
from agentd.config.schema import HoldSettings
from agentd.engine.process.activity import Activity
from agentd.errors import ModelUnusable
from agentd.host.clock import WallClock
from agentd.host.pressure import MemoryPressure
from agentd.host.sensors import Sensors


class Device:
    def __init__(self) -> None:
        self.now, self.sensors = 0.0, Sensors()
        self.events: list[tuple[str, str]] = []
        self.activity = Activity()
        self.config = HoldSettings(temperature=80, battery=20)
        self.model_problem: ModelUnusable | None = None
        sensors, clock = lambda: self.sensors, lambda: self.now
        self.holds = Holds(lambda: self.config, self.activity, sensors, self.tell, self.verify, clock)

    def verify(self) -> None:
        if self.model_problem:
            raise self.model_problem

    async def tell(self, kind: str, message: str) -> None:
        self.events.append((kind, message))

    def look(self, **sensors: object) -> bool:
        """Whether passes are held with these readings."""
        self.sensors = Sensors(**sensors)  # type: ignore[arg-type]
        asyncio.run(self.holds.look())
        return self.activity.held


def test_heat_holds_until_it_is_cooler_by_some_degrees() -> None:
    device = Device()
    assert [device.look(temperature=t, hottest="cpu") for t in (79, 81, 79, 76, 74, 79)] == [
        False,
        True,
        True,
        True,
        False,
        False,
    ]
    assert [kind for kind, _ in device.events] == ["adaptation held", "adaptation released"]
    assert "cpu reads 81 °C, adapt.hold.temperature is 80" in device.events[0][1]


def test_a_low_battery_holds_unless_it_is_charged() -> None:
    device = Device()
    assert not device.look(battery=10.0, plugged=True)
    assert not device.look(battery=50.0, plugged=False)
    assert device.look(battery=10.0, plugged=False)
    assert device.look(battery=22.0, plugged=False)
    assert not device.look(battery=22.0, plugged=True)
    assert not device.look(battery=None, plugged=None)


def test_a_model_that_was_replaced_holds() -> None:
    device = Device()
    device.model_problem = ModelUnusable("m.gguf", "it is another one")
    assert device.look()
    assert device.holds.reasons == {"model": "cannot use the model m.gguf: it is another one"}
    device.model_problem = None
    assert not device.look()


def test_limits_can_be_off_and_both_can_hold() -> None:
    device = Device()
    assert device.look(temperature=95, battery=5.0, plugged=False)
    assert device.holds.reasons.keys() == {"temperature", "battery"}
    assert device.look(temperature=50, battery=5.0, plugged=False)
    device.config = HoldSettings(temperature=None, battery=None)
    assert not device.look(temperature=95, battery=5.0, plugged=False)


def test_memory_pressure_holds_for_a_while() -> None:
    device = Device()
    asyncio.run(device.holds.pressure())
    assert device.activity.held
    device.now = 14
    assert device.look()
    device.now = 16
    assert not device.look()


def test_a_held_trainer_is_stopped_and_goes_on(tmp_path: Path) -> None:
    """The trainer is a real process; that it is one of ours does not matter to a signal."""
    activity = Activity()
    training = Training(activity, tmp_path / "log")

    async def run() -> list[str]:
        states: list[str] = []
        process = await asyncio.create_subprocess_exec("sleep", "60")
        try:
            training._process, training._started = process, True
            with activity.listen(training._give_way):
                for held in (True, False):
                    activity.hold(held)
                    await asyncio.sleep(0.2)
                    states.append(psutil.Process(process.pid).status())
                with activity.request():  # a request ends while the hold goes on
                    activity.hold(True)
                await asyncio.sleep(0.2)
                states.append(psutil.Process(process.pid).status())
        finally:
            process.send_signal(signal.SIGCONT)
            process.kill()
            await process.wait()
        return states

    stopped, running, still = asyncio.run(run())
    assert (stopped, running, still) == (psutil.STATUS_STOPPED, psutil.STATUS_SLEEPING, psutil.STATUS_STOPPED)


def test_background_work_waits_while_held() -> None:
    activity = Activity()

    async def run() -> bool:
        activity.hold(True)
        waiting = asyncio.create_task(activity.released())
        await asyncio.sleep(0.05)
        before = waiting.done()
        activity.hold(False)
        with anyio.fail_after(1):
            await waiting
        return before

    assert asyncio.run(run()) is False


def test_reported_memory_pressure_reaches_us(tmp_path: Path) -> None:
    """A pipe stands for the control group's file, which systemd.exec(5) allows too; its own needs a newer kernel."""
    pipe = tmp_path / "pressure"
    os.mkfifo(pipe)
    environment = {"MEMORY_PRESSURE_WATCH": str(pipe), "MEMORY_PRESSURE_WRITE": "", "PATH": "/bin"}
    watched = MemoryPressure(environment)
    assert environment == {"PATH": "/bin"}
    reported = 0

    async def run() -> None:
        async def react() -> None:
            nonlocal reported
            reported += 1

        task = asyncio.create_task(watched.watch(react))
        await asyncio.sleep(0.1)
        writer = os.open(pipe, os.O_WRONLY | os.O_NONBLOCK)
        os.write(writer, b"x")
        await asyncio.sleep(0.2)
        os.close(writer)
        task.cancel()
        await asyncio.wait({task})

    asyncio.run(run())
    assert reported == 1


@pytest.mark.parametrize("path", ["", "/dev/null", "/nonexistent/pressure"])
def test_where_no_pressure_is_reported_nothing_happens(path: str) -> None:
    async def never() -> None:
        raise AssertionError

    async def run() -> None:
        with anyio.fail_after(1):
            await MemoryPressure({"MEMORY_PRESSURE_WATCH": path}).watch(never)

    asyncio.run(run())


def test_jumps_of_the_wall_clock_are_noticed_and_large_ones_not_trusted() -> None:
    wall, monotonic = 1000.0, 50.0
    clock = WallClock(lambda: wall, lambda: monotonic)
    wall, monotonic = 1005.0, 55.5
    assert clock.look() is None
    wall += 30
    jump = clock.look()
    assert jump is not None
    assert 29 < jump < 31
    assert clock.look() is None
    assert clock.trusted
    wall -= 86400
    assert (clock.look() or 0) < -86000
    trusted = [clock.trusted]
    monotonic, wall = monotonic + 86401, wall + 86401
    assert clock.look() is None
    assert [*trusted, clock.trusted] == [False, True]


@pytest.mark.parametrize(
    ("ahead", "trusted"), [(0.0, True), (86400.0, True), (-86400.0, False), (30 * 86400.0, False), (-60.0, True)]
)
def test_a_start_at_another_time_than_the_state_knows_deletes_nothing_for_a_day(ahead: float, trusted: bool) -> None:
    now = 1_000_000_000.0
    monotonic = 50.0
    clock = WallClock(lambda: now + ahead, lambda: monotonic, known=now)
    assert clock.trusted is trusted
    monotonic += WallClock.SETTLE
    assert clock.trusted
