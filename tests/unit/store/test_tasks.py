from dataclasses import replace

import pytest

from agentd import ids
from agentd.errors import Conflict, InvalidRequest, NotFound
from agentd.store import examples, feedback, selection, tasks
from agentd.store.database import Store
from agentd.store.examples import NewExample
from agentd.store.feedback import NewFeedback
from agentd.store.tasks import Task
from tests.support.store_samples import recorded

SENTIMENT = Task("sentiment", ["good", "bad"], False, "accuracy", "{text} It was", "config", ids.now())


def test_a_task_comes_back_as_it_was(store: Store) -> None:
    store.do(tasks.declare, SENTIMENT)
    assert store.do(tasks.get, "sentiment") == SENTIMENT
    assert store.do(tasks.all) == [SENTIMENT]
    assert SENTIMENT.as_json()["open"] is False


def test_an_unknown_task_is_not_found(store: Store) -> None:
    assert store.do(tasks.find, "sentiment") is None
    with pytest.raises(NotFound, match="no task 'sentiment'"):
        store.do(tasks.get, "sentiment")


def test_the_configuration_replaces_what_feedback_declared_and_not_the_other_way(store: Store) -> None:
    learned = Task("sentiment", ["good"], True, "accuracy", None, "feedback", ids.now())
    store.do(tasks.declare, learned)
    store.do(tasks.declare, SENTIMENT)
    assert store.do(tasks.get, "sentiment") == replace(SENTIMENT, created_at=learned.created_at)
    store.do(tasks.declare, learned)
    assert store.do(tasks.get, "sentiment").choices == ["good", "bad"]


def test_examples_rest_while_their_label_is_no_choice(store: Store) -> None:
    store.do(tasks.declare, SENTIMENT)
    for n in range(40):
        store.do(examples.add, NewExample("sentiment", "label", {"prompt": str(n)}, SENTIMENT.choices[n % 2]))
    before = store.do(examples.count)
    store.do(tasks.declare, replace(SENTIMENT, choices=["good", "awful"]))
    assert {example.target for example in store.do(selection.for_training, 100, 0).examples} == {"good"}
    assert {example.target for example in store.do(selection.holdout, "sentiment", 100)} == {"good"}
    assert len(store.do(examples.list_, 100, state="stale")) == 20
    store.do(tasks.declare, SENTIMENT)
    assert store.do(examples.count) == before


def test_choices_are_merged_and_removed(store: Store) -> None:
    for n, label in enumerate(["on", "switch on", "off", "noise", "on"]):
        store.do(examples.add, NewExample("lights", "label", {"prompt": f"command number {n}"}, label))
    store.do(examples.mark_used, [example.id for example in store.do(examples.list_, 9)])
    task, counts = store.do(tasks.edit, "lights", {"switch on": "on"}, ["noise"])
    assert (task.choices, counts) == (["on", "off"], {"relabelled": 1, "set_aside": 1})
    rows = {example.input["prompt"][-1]: (example.target, example.state) for example in store.do(examples.list_, 9)}
    assert rows["1"] == ("on", "new")
    assert rows["3"] == ("noise", "stale")
    assert rows["0"] == ("on", "used")

    renamed, _ = store.do(tasks.edit, "lights", {"off": "out"}, [])
    assert renamed.choices == ["on", "out"]


def test_a_choice_may_get_another_spelling_and_two_the_same(store: Store) -> None:
    for n, label in enumerate(["good", "bad", "poor"]):
        store.do(examples.add, NewExample("films", "label", {"prompt": f"film number {n}"}, label))
    task, counts = store.do(tasks.edit, "films", {"good": "Good"}, [])
    assert (task.choices, counts["relabelled"]) == (["bad", "poor", "Good"], 1)
    task, _ = store.do(tasks.edit, "films", {"bad": "Not good", "poor": " not  GOOD"}, [])
    assert task.choices == ["Good", "Not good"]
    assert sorted(example.target for example in store.do(examples.list_, 9)) == ["Good", "Not good", "Not good"]
    with pytest.raises(InvalidRequest, match="something to read"):
        store.do(tasks.edit, "films", {"Good": "\u200b"}, [])


@pytest.mark.parametrize("choices", [None, ["on", "off"]])
def test_a_choice_that_is_said_again_brings_its_examples_back(store: Store, choices: list[str] | None) -> None:
    asked = [store.do(recorded, f"text {i}", task="lights") for i in range(3)]
    for inference, label in zip(asked, ("on", "off", "off"), strict=True):
        store.do(feedback.add, NewFeedback(inference, "label", label))
    store.do(tasks.edit, "lights", {}, ["off"])
    again, _ = store.do(feedback.add, NewFeedback(asked[1], "label", "off", choices=choices))
    assert again.state == "duplicate"
    assert set(store.do(tasks.get, "lights").choices) == {"on", "off"}
    assert [example.state for example in store.do(examples.list_, 10)] == ["new"] * 3


@pytest.mark.parametrize(
    ("merge", "remove", "error"),
    [({"red": "on"}, [], "no choice"), ({}, ["red"], "no choice"), ({"on": "off"}, ["off"], "taken away and kept")],
)
def test_an_edit_that_fits_nothing_changes_nothing(
    store: Store, merge: dict[str, str], remove: list[str], error: str
) -> None:
    for n, label in enumerate(["on", "off"]):
        store.do(examples.add, NewExample("lights", "label", {"prompt": f"command number {n}"}, label))
    with pytest.raises(InvalidRequest, match=error):
        store.do(tasks.edit, "lights", merge, remove)
    assert store.do(tasks.get, "lights").choices == ["on", "off"]


def test_what_the_configuration_declares_is_edited_there(store: Store) -> None:
    store.do(tasks.declare, SENTIMENT)
    with pytest.raises(Conflict, match="configuration"):
        store.do(tasks.edit, "sentiment", {"good": "bad"}, [])
