"""What feedback teaches: a thumb is a label where there is no doubt, a preference its chosen text."""

from typing import Any

import pytest
from store_samples import recorded

from agentd.store import examples, feedback, forgetting, tasks
from agentd.store.database import Store
from agentd.store.feedback import NewFeedback
from agentd.store.forgetting import Selection
from agentd.store.lessons import Lesson, lesson
from agentd.store.tasks import Task


def task(*choices: str, grows: bool = False) -> Task:
    return Task("reviews", list(choices), grows, "accuracy" if choices else "loss", None, "config", "")


TWO, THREE, OPEN, FREE = task("yes", "no"), task("good", "bad", "so so"), task("yes", "no", grows=True), task()


@pytest.mark.parametrize(
    ("kind", "value", "output", "task", "taught"),
    [
        ("label", "no", "yes", None, Lesson("label", "no")),
        ("demonstration", "No.", "yes", TWO, Lesson("demonstration", "No.")),
        ("boolean", True, "yes", TWO, Lesson("label", "yes")),
        ("boolean", True, " Yes.\n", TWO, Lesson("label", "yes")),
        ("boolean", False, "**Yes**", TWO, Lesson("label", "no")),
        ("boolean", True, "So so!", THREE, Lesson("label", "so so")),
        ("boolean", False, "bad", THREE, None),  # two others are left
        ("boolean", False, "yes", OPEN, None),  # there may be more
        ("boolean", True, "no", OPEN, Lesson("label", "no")),
        ("boolean", True, "Yes, it is wonderful", TWO, None),  # no answer of the task: nobody meant a label
        ("boolean", False, "", TWO, None),
        ("boolean", True, "A fine film.", FREE, None),
        ("boolean", True, "yes", None, None),
        ("boolean", True, "A", task("a", "A"), Lesson("label", "A")),
        ("boolean", True, "A.", task("a", "A"), None),  # either of them
        ("preference", {"chosen": "No", "rejected": "yes"}, "yes", TWO, Lesson("label", "no")),
        ("preference", {"chosen": "maybe", "rejected": "yes"}, "yes", TWO, None),
        ("preference", {"chosen": "Fine.", "rejected": "Bad."}, "Bad.", FREE, Lesson("demonstration", "Fine.")),
        ("preference", {"chosen": "Fine.", "rejected": "Bad."}, "Bad.", None, None),
        ("float", 1.0, "yes", TWO, None),
        ("comment", "yes", "yes", TWO, None),
    ],
)
def test_lessons(kind: str, value: Any, output: str, task: Task | None, taught: Lesson | None) -> None:
    assert lesson(kind, value, output, task) == taught


@pytest.fixture
def asked(store: Store) -> str:
    store.do(tasks.declare, TWO)
    return store.do(recorded, task="reviews", output="Yes.")


def targets(store: Store) -> list[tuple[str, str]]:
    return [(example.kind, example.target) for example in store.do(examples.list_, 10)]


def test_a_thumb_becomes_an_example_that_later_feedback_replaces(store: Store, asked: str) -> None:
    given, _ = store.do(feedback.add, NewFeedback(asked, "boolean", True))
    assert given.example_id is not None
    assert (given.task, given.value, given.state) == ("reviews", True, "accepted")
    assert targets(store) == [("label", "yes")]
    assert store.do(feedback.add, NewFeedback(asked, "boolean", True))[0].state == "duplicate"
    store.do(feedback.add, NewFeedback(asked, "boolean", False))
    assert targets(store) == [("label", "no")]
    store.do(feedback.add, NewFeedback(asked, "label", "yes"))
    assert targets(store) == [("label", "yes")]


def test_a_source_that_is_believed_less_does_not_outweigh_a_label_with_a_thumb(store: Store, asked: str) -> None:
    weights = {"implicit": 0.3}
    store.do(feedback.add, NewFeedback(asked, "label", "yes"), weights)
    given, _ = store.do(feedback.add, NewFeedback(asked, "boolean", False, source="implicit"), weights)
    assert given.state == "outweighed"
    assert targets(store) == [("label", "yes")]


def test_a_thumb_that_was_kept_apart_teaches_when_it_is_released(store: Store, asked: str) -> None:
    given, _ = store.do(feedback.add, NewFeedback(asked, "boolean", False, quarantine="a flood"))
    assert (given.state, targets(store)) == ("quarantined", [])
    (released,) = store.do(feedback.release, [given.id])
    assert released.state == "accepted"
    assert targets(store) == [("label", "no")]


def test_what_is_forgotten_leaves_the_answer_that_an_earlier_thumb_gave(store: Store, asked: str) -> None:
    store.do(feedback.add, NewFeedback(asked, "boolean", True, author="uid:1"))
    label, _ = store.do(feedback.add, NewFeedback(asked, "label", "no", author="uid:2"))
    assert targets(store) == [("label", "no")]
    store.do(forgetting.forget, Selection(feedback=(label.id,)))
    (example,) = store.do(examples.list_, 10)
    assert (example.kind, example.target, example.author) == ("label", "yes", "uid:1")
    store.do(forgetting.forget, Selection(authors=("uid:1",)))
    assert targets(store) == []
