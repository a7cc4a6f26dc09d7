"""The outcome of an episode is shared out among its steps."""

import pytest

from agentd.errors import InvalidRequest, NotFound
from agentd.store import examples, feedback, forgetting
from agentd.store.database import Store
from agentd.store.feedback import Feedback, NewFeedback
from agentd.store.forgetting import Selection
from tests.support.store_samples import recorded


@pytest.fixture
def steps(store: Store) -> list[str]:
    return [store.do(recorded, text=f"step {i}", task="home", output=f"done {i}", episode="night") for i in range(4)]


def outcome(store: Store, value: object, kind: str = "boolean", **more: object) -> Feedback:
    new = NewFeedback(None, kind, value, episode="night", **more)  # type: ignore[arg-type]
    return store.do(feedback.add, new)[0]


def states(store: Store) -> list[str]:
    return [row.state for row in reversed(store.do(feedback.list_, 20)) if row.part_of]


def test_every_step_has_its_share(store: Store, steps: list[str]) -> None:
    store.do(recorded, text="another episode", task="home", episode="day")
    whole = outcome(store, True, source="program", idempotency_key="k", tags={"a": "b"})
    assert (whole.inference_id, whole.example_id, whole.episode) == (None, None, "night")
    assert store.do(feedback.parts, whole.id) == (4, 4)
    rows = store.do(examples.list_, 10)
    assert {example.weight for example in rows} == {0.25}
    assert {example.source_inference_id for example in rows} == set(steps)
    again, created = store.do(
        feedback.add,
        NewFeedback(None, "boolean", True, episode="night", source="program", idempotency_key="k", tags={"a": "b"}),
    )
    assert (again.id, created) == (whole.id, False)


def test_what_is_said_of_a_step_wins_whenever_it_is_said(store: Store, steps: list[str]) -> None:
    store.do(feedback.add, NewFeedback(steps[0], "boolean", False))
    store.do(feedback.add, NewFeedback(steps[1], "demonstration", "done well"))
    outcome(store, True)
    assert states(store) == ["outweighed", "outweighed", "accepted", "accepted"]
    low = {"program": 0.1}
    said, _ = store.do(feedback.add, NewFeedback(steps[2], "boolean", False, source="program"), low)
    assert said.state == "accepted"
    by_step = {example.source_inference_id: example for example in store.do(examples.list_, 10)}
    assert [by_step[step].weight for step in steps] == [1.0, 1.0, 0.1, 0.25]
    assert '"good":false' in by_step[steps[2]].target


def test_what_an_outcome_said_before_is_said_of_the_step_all_the_same(store: Store, steps: list[str]) -> None:
    outcome(store, True)
    assert store.do(feedback.add, NewFeedback(steps[0], "boolean", True))[0].state == "accepted"
    by_step = {example.source_inference_id: example.weight for example in store.do(examples.list_, 10)}
    assert [by_step[step] for step in steps] == [1.0, 0.25, 0.25, 0.25]
    outcome(store, False)
    assert states(store)[4:] == ["outweighed", "accepted", "accepted", "accepted"]


def test_what_is_said_of_another_answer_to_the_same_input_wins_too(store: Store, steps: list[str]) -> None:
    outcome(store, True)
    other = store.do(recorded, text="step 0", task="home", output="done badly")
    assert store.do(feedback.add, NewFeedback(other, "boolean", False))[0].state == "accepted"
    (example,) = [each for each in store.do(examples.list_, 10) if each.source_inference_id == other]
    assert (example.weight, '"good":false' in example.target) == (1.0, True)


def test_a_share_that_is_released_does_not_win_over_a_step(store: Store, steps: list[str]) -> None:
    outcome(store, True, quarantine="a flood")
    store.do(feedback.add, NewFeedback(steps[0], "boolean", False))
    shares = [row.id for row in store.do(feedback.list_, 20) if row.part_of]
    released = {row.inference_id: row.state for row in store.do(feedback.release, shares)}
    assert [released[step] for step in steps] == ["outweighed", "accepted", "accepted", "accepted"]


def test_a_later_outcome_replaces_an_earlier_one(store: Store, steps: list[str]) -> None:
    outcome(store, True)
    outcome(store, False)
    assert states(store) == ["accepted"] * 8
    assert all('"good":false' in example.target for example in store.do(examples.list_, 10))


def test_forgetting_it_takes_its_shares_along(store: Store, steps: list[str]) -> None:
    whole = outcome(store, 0.75, kind="float")
    store.do(forgetting.forget, Selection(feedback=(whole.id,)))
    assert store.do(feedback.list_, 10) == []
    assert store.do(examples.list_, 10) == []


def test_a_comment_is_kept_and_shared_with_no_step(store: Store, steps: list[str]) -> None:
    assert store.do(feedback.parts, outcome(store, "a calm night", kind="comment").id) == (0, 0)


def test_what_only_a_step_can_be_told(store: Store, steps: list[str]) -> None:
    with pytest.raises(InvalidRequest, match="about one step"):
        outcome(store, "yes", kind="label")
    with pytest.raises(NotFound, match="episode"):
        store.do(feedback.add, NewFeedback(None, "boolean", True, episode="none"))
    assert store.do(feedback.list_, 10) == []
