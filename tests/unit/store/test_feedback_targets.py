"""What feedback teaches: a thumb is a label where there is no doubt, a preference its chosen text."""

import json
from typing import Any

import pytest

from agentd.store import examples, feedback, forgetting, tasks
from agentd.store.database import Store
from agentd.store.feedback import NewFeedback
from agentd.store.feedback_targets import FeedbackTarget, feedback_target
from agentd.store.forgetting import Selection
from agentd.store.tasks import Task
from tests.support.store_samples import recorded


def task(*choices: str, grows: bool = False) -> Task:
    return Task("reviews", list(choices), grows, "accuracy" if choices else "loss", None, "config", "")


TWO, THREE, OPEN, FREE = task("yes", "no"), task("good", "bad", "so so"), task("yes", "no", grows=True), task()

PAIR = FeedbackTarget("preference", '{"chosen":"Fine.","rejected":"Bad."}')


@pytest.mark.parametrize(
    ("kind", "value", "output", "task", "target"),
    [
        ("label", "no", "yes", None, FeedbackTarget("label", "no")),
        ("demonstration", "No.", "yes", TWO, FeedbackTarget("demonstration", "No.")),
        ("boolean", True, "yes", TWO, FeedbackTarget("label", "yes")),
        ("boolean", True, " Yes.\n", TWO, FeedbackTarget("label", "yes")),
        ("boolean", False, "**Yes**", TWO, FeedbackTarget("label", "no")),
        ("boolean", True, "So so!", THREE, FeedbackTarget("label", "so so")),
        ("boolean", False, "bad", THREE, None),  # two others are left
        ("boolean", False, "yes", OPEN, None),  # there may be more
        ("boolean", True, "no", OPEN, FeedbackTarget("label", "no")),
        ("boolean", True, "Yes, it is wonderful", TWO, None),  # no answer of the task: no one meant a label
        ("boolean", False, "", TWO, None),
        ("boolean", True, "A fine film.", FREE, FeedbackTarget("thumb", '{"answer":"A fine film.","good":true}')),
        ("boolean", False, "yes", None, FeedbackTarget("thumb", '{"answer":"yes","good":false}')),
        ("boolean", True, "", FREE, None),
        ("float", 0.25, "Fine.", FREE, FeedbackTarget("score", '{"answer":"Fine.","score":0.25}')),
        ("boolean", True, "A", task("a", "A"), FeedbackTarget("label", "A")),
        ("boolean", True, "A.", task("a", "A"), None),  # either of them
        ("preference", {"chosen": "No", "rejected": "yes"}, "yes", TWO, FeedbackTarget("label", "no")),
        ("preference", {"chosen": "maybe", "rejected": "yes"}, "yes", TWO, None),
        ("preference", {"chosen": "Fine.", "rejected": "Bad."}, "Bad.", FREE, PAIR),
        ("preference", {"chosen": "Fine.", "rejected": "Bad."}, "Bad.", None, PAIR),
        ("preference", {"chosen": "Fine.", "rejected": ""}, "", FREE, FeedbackTarget("demonstration", "Fine.")),
        ("float", 1.0, "yes", TWO, None),
        ("comment", "yes", "yes", TWO, None),
    ],
)
def test_targets(kind: str, value: Any, output: str, task: Task | None, target: FeedbackTarget | None) -> None:
    assert feedback_target(kind, value, output, task) == target


@pytest.fixture
def inference(store: Store) -> str:
    store.do(tasks.declare, TWO)
    return store.do(recorded, task="reviews", output="Yes.")


def targets(store: Store) -> list[tuple[str, str]]:
    return [(example.kind, example.target) for example in store.do(examples.list_, 10)]


def test_a_thumb_becomes_an_example_that_later_feedback_replaces(store: Store, inference: str) -> None:
    row, _ = store.do(feedback.add, NewFeedback(inference, "boolean", True))
    assert row.example_id is not None
    assert (row.task, row.value, row.state) == ("reviews", True, "accepted")
    assert targets(store) == [("label", "yes")]
    assert store.do(feedback.add, NewFeedback(inference, "boolean", True))[0].state == "duplicate"
    store.do(feedback.add, NewFeedback(inference, "boolean", False))
    assert targets(store) == [("label", "no")]
    store.do(feedback.add, NewFeedback(inference, "label", "yes"))
    assert targets(store) == [("label", "yes")]


def test_a_source_that_is_believed_less_does_not_outweigh_a_label_with_a_thumb(store: Store, inference: str) -> None:
    weights = {"implicit": 0.3}
    store.do(feedback.add, NewFeedback(inference, "label", "yes"), weights)
    row, _ = store.do(feedback.add, NewFeedback(inference, "boolean", False, source="implicit"), weights)
    assert row.state == "outweighed"
    assert targets(store) == [("label", "yes")]


def test_a_thumb_that_was_kept_apart_teaches_when_it_is_released(store: Store, inference: str) -> None:
    row, _ = store.do(feedback.add, NewFeedback(inference, "boolean", False, quarantine="a flood"))
    assert (row.state, targets(store)) == ("quarantined", [])
    (released,) = store.do(feedback.release, [row.id])
    assert released.state == "accepted"
    assert targets(store) == [("label", "no")]


def test_what_is_forgotten_leaves_the_answer_that_an_earlier_thumb_gave(store: Store, inference: str) -> None:
    store.do(feedback.add, NewFeedback(inference, "boolean", True, author="uid:1"))
    label, _ = store.do(feedback.add, NewFeedback(inference, "label", "no", author="uid:2"))
    assert targets(store) == [("label", "no")]
    store.do(forgetting.forget, Selection(feedback=(label.id,)))
    (example,) = store.do(examples.list_, 10)
    assert (example.kind, example.target, example.author) == ("label", "yes", "uid:1")
    store.do(forgetting.forget, Selection(authors=("uid:1",)))
    assert targets(store) == []


@pytest.fixture
def said(store: Store) -> str:
    return store.do(recorded, task="prose", output="It rained.")


def judged(store: Store) -> list[tuple[str, Any]]:
    return [(kind, json.loads(target) if target[0] == "{" else target) for kind, target in targets(store)]


def test_a_thumb_on_free_text_judges_the_answer_as_it_was(store: Store, said: str) -> None:
    store.do(feedback.add, NewFeedback(said, "boolean", True))
    assert judged(store) == [("thumb", {"answer": "It rained.", "good": True})]
    store.do(feedback.add, NewFeedback(said, "boolean", False))
    assert judged(store) == [("thumb", {"answer": "It rained.", "good": False})]


def test_what_is_released_does_not_replace_what_is_better(store: Store, said: str) -> None:
    thumb, _ = store.do(feedback.add, NewFeedback(said, "boolean", False, quarantine="a flood"))
    store.do(feedback.add, NewFeedback(said, "demonstration", "It snowed."))
    (released,) = store.do(feedback.release, [thumb.id])
    assert (released.state, released.example_id) == ("outweighed", None)
    assert "better" in (released.reason or "")
    assert judged(store) == [("demonstration", "It snowed.")]


def test_each_answer_to_an_input_has_a_verdict_of_its_own(store: Store) -> None:
    states = []
    for n in range(feedback.CHANGES_OF_MIND + 2):  # the same question, answered by chance
        answer = store.do(recorded, task="prose", output=f"Joke {n}.")
        states.append(store.do(feedback.add, NewFeedback(answer, "float", float(n)))[0].state)
    assert set(states) == {"accepted"}
    for n in range(feedback.CHANGES_OF_MIND):
        states.append(store.do(feedback.add, NewFeedback(answer, "float", 100.0 + n))[0].state)
    assert states[-1] == "quarantined"


def test_what_stays_when_something_is_forgotten_keeps_its_weight(store: Store, said: str) -> None:
    weights = {"human": 1.0, "program": 0.5, "implicit": 0.25}

    def say(source: str, value: object, kind: str = "boolean") -> str:
        return store.do(feedback.add, NewFeedback(said, kind, value, source=source), weights)[0].id

    def weight() -> float:
        (example,) = store.do(examples.list_, 10)
        return example.weight

    say("implicit", False)
    same = say("human", False)
    right = say("human", "It snowed.", "demonstration")
    store.do(forgetting.forget, Selection(feedback=(right,)), weights)
    assert (judged(store)[0][0], weight()) == ("thumb", 1.0)
    store.do(forgetting.forget, Selection(feedback=(same,)), weights)
    assert weight() == 0.25


def test_a_thumb_on_calls_judges_the_message(store: Store) -> None:
    tool = {
        "type": "function",
        "function": {"name": "light", "parameters": {"properties": {"on": {"type": "boolean"}}}},
    }
    call = {"id": "c9", "type": "function", "function": {"name": "light", "arguments": '{"on": true}'}}
    input = {"messages": [{"role": "user", "content": "Dark here."}], "tools": [tool]}
    inference = store.do(recorded, input=input, output="", tool_calls=[call], finish_reason="tool_calls")
    store.do(feedback.add, NewFeedback(inference, "boolean", False))
    (thumb,) = judged(store)
    function = {"name": "light", "arguments": '{"on":true}'}
    calls = [{"id": "call_0", "type": "function", "function": function}]
    assert thumb == ("thumb", {"answer": {"role": "assistant", "content": "", "tool_calls": calls}, "good": False})
    store.do(feedback.add, NewFeedback(inference, "preference", {"chosen": "It is day."}))
    assert judged(store)[0][1]["rejected"] == thumb[1]["answer"]


@pytest.mark.parametrize("finish", ["length", "streaming", "cancelled"])
def test_a_thumb_on_half_an_answer_teaches_nothing(store: Store, finish: str) -> None:
    inference = store.do(recorded, task="prose", output="It rai", finish_reason=finish)
    for kind, value in (("boolean", True), ("boolean", False), ("float", 0.1)):
        assert store.do(feedback.add, NewFeedback(inference, kind, value))[0].example_id is None


def test_what_is_right_outweighs_a_thumb_on_another_answer(store: Store, said: str) -> None:
    store.do(feedback.add, NewFeedback(said, "demonstration", "It poured."))
    for kind, value in (("boolean", False), ("boolean", True), ("float", 0.9)):
        row, _ = store.do(feedback.add, NewFeedback(said, kind, value))
        assert row.state == "outweighed"
    assert targets(store) == [("demonstration", "It poured.")]
    again = store.do(recorded, task="prose", output="It poured.")
    store.do(feedback.add, NewFeedback(again, "boolean", False))  # now that one is said to be wrong
    assert judged(store) == [("thumb", {"answer": "It poured.", "good": False})]


def test_the_better_of_two_scored_answers_is_learned(store: Store, said: str) -> None:
    other = store.do(recorded, task="prose", output="Rain.")
    store.do(feedback.add, NewFeedback(said, "float", 0.6))
    assert store.do(feedback.add, NewFeedback(other, "float", 0.2))[0].state == "outweighed"
    store.do(feedback.add, NewFeedback(other, "float", 0.9))
    assert judged(store) == [("score", {"answer": "Rain.", "score": 0.9})]
    store.do(feedback.add, NewFeedback(other, "float", 0.1))  # of the same answer the last word counts
    assert judged(store) == [("score", {"answer": "Rain.", "score": 0.1})]


def test_a_label_gives_choices_to_a_task_that_only_thumbs_had_named(store: Store, said: str) -> None:
    store.do(feedback.add, NewFeedback(said, "boolean", True))
    other = store.do(recorded, text="another", task="prose", output="yes")
    store.do(feedback.add, NewFeedback(other, "label", "yes"))
    task = store.do(tasks.get, "prose")
    assert (task.choices, task.open, task.metric) == (["yes"], True, "accuracy")
    states = {example.kind: example.state for example in store.do(examples.list_, 10)}
    assert states == {"label": "new", "thumb": "stale"}
    assert store.do(feedback.add, NewFeedback(other, "boolean", True))[0].state == "accepted"
