"""Who is being served, and who is told."""

import pytest

from agentd.engine.process.activity import Activity
from agentd.errors import AgentdError, EngineUnavailable, InvalidRequest


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_listeners_hear_of_the_first_and_the_last_request() -> None:
    activity, heard = Activity(), list[bool]()
    with activity.listen(heard.append):
        with activity.request(), activity.request():
            assert heard == [True]
            assert activity.active == 2
        assert heard == [True, False]
    with activity.request():
        pass
    assert heard == [True, False]


def test_a_listener_that_comes_late_is_told_at_once() -> None:
    activity, heard = Activity(), list[bool]()
    with activity.request(), activity.listen(heard.append):
        assert heard == [True]


def test_idle_time_counts_from_the_last_end() -> None:
    clock = Clock()
    activity = Activity(clock)
    clock.now += 5
    assert activity.idle_seconds == 5
    with activity.request():
        clock.now += 3
        assert activity.idle_seconds == 0
    clock.now += 2
    assert activity.idle_seconds == 2


def test_an_error_is_a_failure_and_a_client_that_leaves_is_not() -> None:
    activity = Activity()
    with activity.request():
        pass
    with pytest.raises(ValueError, match="x"), activity.request():
        raise ValueError("x")
    with pytest.raises(GeneratorExit), activity.request():
        raise GeneratorExit
    assert (activity.served, activity.failed, activity.active) == (1, 1, 0)


@pytest.mark.parametrize(("error", "failed"), [(InvalidRequest("x"), 0), (EngineUnavailable("x"), 1)])
def test_a_clients_own_mistake_is_no_failure(error: AgentdError, failed: int) -> None:
    activity = Activity()
    with pytest.raises(type(error)), activity.request():
        raise error
    assert (activity.served, activity.failed, activity.active) == (0, failed, 0)
