import asyncio
import time
from collections.abc import Callable
from datetime import datetime, timezone

import pytest

from agentd.adapt.triggers import Ages, Triggers
from agentd.config.schema import TriggerSettings

NOON = datetime(2026, 5, 4, 12, 0)


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


async def _nothing() -> tuple[int, float]:
    return 0, 0.0


async def _start(reason: str) -> None:
    raise AssertionError(reason)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def make(clock: Clock) -> Callable[..., Triggers]:
    def make(**settings: object) -> Triggers:
        return Triggers(TriggerSettings(**settings), _nothing, _start, clock)  # type: ignore[arg-type]  # test settings

    return make


def test_enough_new_examples_and_no_request_waiting(make: Callable[..., Triggers]) -> None:
    triggers = make(min_examples=64, idle=30.0)
    assert triggers.due(64, 30.0, NOON) == "examples"
    assert triggers.due(63, 30.0, NOON) is None
    assert triggers.due(64, 29.9, NOON) is None


def test_the_clock_starts_a_pass_only_if_there_is_something_new(make: Callable[..., Triggers]) -> None:
    triggers = make(min_examples=64, every=3600.0)
    assert triggers.due(1, 60.0, NOON, Ages(last_pass=3599)) is None
    assert triggers.due(1, 60.0, NOON, Ages(last_pass=3600)) == "interval"
    assert triggers.due(0, 60.0, NOON, Ages(last_pass=3600)) is None


def test_a_client_that_never_stops_cannot_keep_a_pass_away(make: Callable[..., Triggers]) -> None:
    triggers = make(min_examples=64, idle=30.0, latest=86400.0)
    assert triggers.due(64, 20.0, NOON, Ages(enough=3600.0)) is None
    assert "30 s without a request" in str(triggers.waits_for)
    assert "in 23.0 h" in str(triggers.waits_for)
    assert triggers.due(64, 20.0, NOON, Ages(enough=86400.0)) == "examples"
    assert not triggers.waits_for
    assert triggers.due(63, 20.0, NOON, Ages(last_pass=1e9)) is None
    by_clock = make(min_examples=64, idle=30.0, latest=7200.0, every=3600.0)
    assert by_clock.due(1, 0.0, NOON, Ages(last_pass=3600.0 + 7199)) is None
    assert by_clock.due(1, 0.0, NOON, Ages(last_pass=3600.0 + 7200)) == "interval"
    quiet = make(min_examples=1, latest=0.0, quiet_hours="08:00-18:00")
    assert quiet.due(1, 0.0, NOON, Ages(enough=1e6)) is None
    assert "08:00-18:00" in str(quiet.waits_for)


def test_quiet_hours_follow_the_time_zone_of_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """`timedatectl set-timezone` while the daemon runs: libc remembers the zone until it is told to look again."""
    started: list[str] = []

    async def facts() -> tuple[int, float]:
        return 1, 100.0

    async def start(reason: str) -> None:
        started.append(reason)

    def consider(zone: str) -> list[str]:
        monkeypatch.setenv("TZ", zone)
        asyncio.run(triggers.consider())
        return started

    hour = datetime.now(timezone.utc).hour
    span = f"{hour:02}:00-{(hour + 2) % 24:02}:00"
    triggers = Triggers(TriggerSettings(min_examples=1, quiet_hours=span), facts, start)
    try:
        assert consider("UTC0") == []
        assert consider("XXX-6") == ["examples"]
    finally:
        monkeypatch.undo()
        time.tzset()


@pytest.mark.parametrize(
    ("hours", "time", "due"),
    [
        ("08:00-18:00", "12:00", False),
        ("08:00-18:00", "07:59", True),
        ("08:00-18:00", "18:00", True),
        ("22:00-06:00", "23:30", False),
        ("22:00-06:00", "05:59", False),
        ("22:00-06:00", "12:00", True),
    ],
)
def test_quiet_hours(make: Callable[..., Triggers], hours: str, time: str, due: bool) -> None:
    moment = datetime.strptime(f"2026-05-04 {time}", "%Y-%m-%d %H:%M")
    assert (make(quiet_hours=hours).due(1000, 60.0, moment) is not None) is due


def test_a_pass_that_failed_is_not_tried_again_on_the_same_examples(
    make: Callable[..., Triggers], clock: Clock
) -> None:
    triggers = make(min_examples=64)
    triggers.note(100, committed=False)
    assert triggers.due(100, 60.0, NOON) is None
    for more in range(1, 64):  # each example past the first would start a pass that comes to nothing again
        assert triggers.due(100 + more, 60.0, NOON) is None
    assert triggers.due(164, 60.0, NOON) == "examples"
    clock.now += 601
    assert triggers.due(100, 60.0, NOON) == "examples"
    triggers.note(100, committed=False)
    clock.now += 601
    assert triggers.due(100, 60.0, NOON) is None, "what came to nothing twice waits longer"
    clock.now += 600
    assert triggers.due(100, 60.0, NOON) == "examples"


def test_after_a_commit_the_next_examples_count_at_once(make: Callable[..., Triggers]) -> None:
    triggers = make(min_examples=64)
    triggers.note(0, committed=True)
    assert triggers.due(64, 60.0, NOON) == "examples"
