from collections.abc import Callable
from datetime import datetime

import pytest

from agentd.adapt.triggers import Triggers
from agentd.config import Trigger

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
        return Triggers(Trigger(**settings), _nothing, _start, clock)  # type: ignore[arg-type]  # test settings

    return make


def test_enough_new_examples_and_nobody_waiting(make: Callable[..., Triggers]) -> None:
    triggers = make(min_examples=64, idle=30.0)
    assert triggers.due(64, 30.0, NOON) == "examples"
    assert triggers.due(63, 30.0, NOON) is None
    assert triggers.due(64, 29.9, NOON) is None


def test_the_clock_starts_a_pass_only_if_there_is_something_new(make: Callable[..., Triggers], clock: Clock) -> None:
    triggers = make(min_examples=64, every=3600.0)
    clock.now += 3599
    assert triggers.due(1, 60.0, NOON) is None
    clock.now += 1
    assert triggers.due(1, 60.0, NOON) == "interval"
    assert triggers.due(0, 60.0, NOON) is None


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
    moment = datetime.fromisoformat(f"2026-05-04T{time}:00")
    assert (make(quiet_hours=hours).due(1000, 60.0, moment) is not None) is due


def test_a_pass_that_failed_is_not_tried_again_on_the_same_examples(
    make: Callable[..., Triggers], clock: Clock
) -> None:
    triggers = make(min_examples=64)
    triggers.note(100, committed=False)
    assert triggers.due(100, 60.0, NOON) is None
    assert triggers.due(101, 60.0, NOON) == "examples"
    clock.now += 601
    assert triggers.due(100, 60.0, NOON) == "examples"


def test_after_a_commit_the_next_examples_count_at_once(make: Callable[..., Triggers]) -> None:
    triggers = make(min_examples=64)
    triggers.note(0, committed=True)
    assert triggers.due(64, 60.0, NOON) == "examples"
