from dataclasses import replace

import pytest

from agentd import ids
from agentd.errors import NotFound
from agentd.store import examples, tasks
from agentd.store.database import Store
from agentd.store.examples import NewExample
from agentd.store.tasks import Task

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
    assert {example.target for example in store.do(examples.for_training, 100, 0)} == {"good"}
    assert {example.target for example in store.do(examples.holdout, "sentiment", 100)} == {"good"}
    assert len(store.do(examples.list_, 100, state="stale")) == 20
    store.do(tasks.declare, SENTIMENT)
    assert store.do(examples.count) == before
