from dataclasses import replace
from typing import Any

import pytest

from agentd.errors import Conflict, InvalidRequest, LabelNotInChoices, NotFound
from agentd.store import examples, feedback, inferences, tasks
from agentd.store.database import Store
from agentd.store.feedback import NewFeedback
from tests.support.store_samples import recorded


@pytest.fixture
def inference(store: Store) -> str:
    return store.do(recorded)


def test_a_label_becomes_an_example_of_the_task_it_declares(store: Store, inference: str) -> None:
    row, created = store.do(
        feedback.add,
        NewFeedback(inference, "label", "good", task="sentiment", choices=["good", "bad"], tags={"user": "7"}),
    )
    assert created
    assert store.do(feedback.get, row.id) == row
    assert (row.task, row.value, row.tags, row.source) == ("sentiment", "good", {"user": "7"}, "human")
    task = store.do(tasks.get, "sentiment")
    assert (task.choices, task.open, task.metric, task.source) == (["good", "bad"], False, "accuracy", "feedback")
    (example,) = store.do(examples.list_, 10)
    assert example.id == row.example_id
    assert (example.kind, example.target, example.source_inference_id) == ("label", "good", inference)
    assert example.input == store.do(inferences.get, inference).input


def test_a_demonstration_becomes_an_example_of_free_text(store: Store, inference: str) -> None:
    row, _ = store.do(feedback.add, NewFeedback(inference, "demonstration", "A fine film indeed."))
    assert row.task == "default"
    task = store.do(tasks.get, "default")
    assert (task.choices, task.open, task.metric) == ([], False, "auto")
    assert [example.target for example in store.do(examples.list_, 10)] == ["A fine film indeed."]
    with pytest.raises(InvalidRequest, match="free text"):
        store.do(feedback.add, NewFeedback(inference, "label", "good"))


def test_the_task_is_the_one_given_or_that_of_the_inference_or_default(store: Store) -> None:
    inference = store.do(recorded, task="asked")
    for task, expected in ((None, "asked"), ("given", "given")):
        assert store.do(feedback.add, NewFeedback(inference, "label", "x", task=task))[0].task == expected
    assert store.do(feedback.add, NewFeedback(store.do(recorded), "label", "x"))[0].task == "default"
    assert store.do(feedback.add, NewFeedback(store.do(recorded), "boolean", True))[0].task is None


def test_choices_grow_until_they_are_given(store: Store, inference: str) -> None:
    def label(value: str, choices: list[str] | None = None) -> None:
        store.do(feedback.add, NewFeedback(inference, "label", value, task="t", choices=choices))

    label("a")
    label("b")
    label("a")
    assert store.do(tasks.get, "t").choices == ["a", "b"]
    with pytest.raises(Conflict, match="choices"):
        label("c", ["c", "d"])
    label("c", ["a", "b", "c"])
    label("b", ["c", "b", "a"])
    assert (store.do(tasks.get, "t").choices, store.do(tasks.get, "t").open) == (["a", "b", "c"], False)
    with pytest.raises(LabelNotInChoices):
        label("d")
    with pytest.raises(Conflict):
        label("d", ["a", "b", "c", "d"])
    store.do(feedback.add, NewFeedback(inference, "demonstration", "because it rained", task="t"))
    assert store.do(tasks.get, "t").choices == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("kind", "value", "stored"),
    [
        ("boolean", False, False),
        ("float", -2.5, -2.5),
        ("float", 3, 3),
        ("comment", "too long, but right ☀", "too long, but right ☀"),
        ("preference", {"chosen": "Yes.", "rejected": "No."}, {"chosen": "Yes.", "rejected": "No."}),
        ("preference", {"chosen": "Yes."}, {"chosen": "Yes.", "rejected": "It was great."}),
    ],
)
def test_all_but_a_comment_make_an_example(
    store: Store, inference: str, kind: str, value: object, stored: object
) -> None:
    new, _ = store.do(feedback.add, NewFeedback(inference, kind, value))
    row = store.do(feedback.get, new.id)
    assert row.value == stored
    assert type(row.value) is type(stored)
    assert [example.id for example in store.do(examples.list_, 10)] == ([] if kind == "comment" else [row.example_id])


@pytest.mark.parametrize(
    ("kind", "value", "expected"),
    [
        ("label", 1, "value of a label must be one of the task's choices"),
        ("label", "", "value of a label"),
        ("demonstration", "", "value of a demonstration must be the text"),
        ("demonstration", ["a"], "value of a demonstration"),
        ("boolean", 1, "value of a boolean must be true or false"),
        ("boolean", "true", "value of a boolean"),
        ("float", True, "value of a float must be a finite number"),
        ("float", float("nan"), "value of a float"),
        ("float", float("-inf"), "value of a float"),
        ("float", 10**400, "value of a float"),
        ("float", "0.5", "value of a float"),
        ("comment", None, "value of a comment must be a text"),
        ("preference", "Yes.", "value of a preference must be an object"),
        ("preference", {"rejected": "No."}, "value of a preference"),
        ("preference", {"chosen": "Yes.", "rejected": 1}, "value of a preference"),
        ("preference", {"chosen": "Yes.", "other": "No."}, "value of a preference"),
        ("preference", {"chosen": "It was great."}, "are the same"),
        ("thumbs", True, "kind must be one of label, demonstration, boolean, float, preference, comment, not 'thumbs'"),
    ],
)
def test_a_value_that_does_not_fit_its_kind_is_refused(
    store: Store, inference: str, kind: str, value: object, expected: str
) -> None:
    with pytest.raises(InvalidRequest, match=expected) as caught:
        store.do(feedback.add, NewFeedback(inference, kind, value))
    assert (caught.value.status, caught.value.param) == (400, "kind" if kind == "thumbs" else "value")
    assert store.do(feedback.count) == 0


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"inference_id": "unknown"}, NotFound),
        ({"source": "robot"}, InvalidRequest),
        ({"task": ""}, InvalidRequest),
        ({"choices": ["good"]}, InvalidRequest),
        ({"choices": ["good", "good"]}, InvalidRequest),
        ({"choices": ["good", ""]}, InvalidRequest),
        ({"choices": ["bad", "awful"]}, LabelNotInChoices),
        ({"kind": "demonstration", "choices": ["good", "bad"]}, InvalidRequest),
        ({"kind": "comment", "choices": ["good", "bad"]}, InvalidRequest),
        ({"tags": {"user": "\ud800"}}, InvalidRequest),
    ],
)
def test_a_refused_feedback_leaves_no_trace(
    store: Store, inference: str, changes: dict[str, Any], error: type[InvalidRequest]
) -> None:
    with pytest.raises(error):
        store.do(feedback.add, replace(NewFeedback(inference, "label", "good", task="t"), **changes))
    assert store.do(feedback.count) == 0
    assert store.do(examples.list_, 10) == []
    assert store.do(tasks.all) == []


def test_the_same_key_and_body_are_stored_once(store: Store, inference: str) -> None:
    body = NewFeedback(inference, "label", "good", task="t", tags={"a": 1, "b": 2}, idempotency_key="k")
    first, created = store.do(feedback.add, body)
    assert created
    store.do(feedback.add, replace(body, value="bad", idempotency_key=None))
    again, created = store.do(feedback.add, replace(body, tags={"b": 2, "a": 1}))
    assert (again, created) == (first, False)
    assert store.do(feedback.count) == 2
    # The replay of the first must not undo the correction that came after it.
    assert [example.target for example in store.do(examples.list_, 10)] == ["bad"]
    for other in (replace(body, value="bad"), replace(body, task="u"), replace(body, inference_id=store.do(recorded))):
        with pytest.raises(Conflict, match="'k' came with another body before"):
            store.do(feedback.add, other)
    assert store.do(feedback.count) == 2


def test_an_idempotency_key_is_its_authors(store: Store, inference: str) -> None:
    """An equal key of another user must neither swallow what they say nor refuse it."""
    body = NewFeedback(inference, "label", "good", task="t", idempotency_key="1")
    first, second, third = (replace(body, author=author) for author in ("uid:1", "uid:2", None))
    ids = {store.do(feedback.add, new)[0].id for new in (first, second, replace(third, value="bad"))}
    assert len(ids) == 3
    for new in (first, second, replace(third, value="bad")):
        row, created = store.do(feedback.add, new)
        assert (created, row.id in ids) == (False, True)
    with pytest.raises(Conflict):
        store.do(feedback.add, replace(second, value="bad"))


def test_without_a_key_the_same_body_counts_twice(store: Store, inference: str) -> None:
    body = NewFeedback(inference, "boolean", True)
    assert store.do(feedback.add, body)[0].id != store.do(feedback.add, body)[0].id
    assert store.do(feedback.count) == 2


def test_lists_are_filtered_and_paged_from_the_newest(store: Store, inference: str) -> None:
    rows = [store.do(feedback.add, NewFeedback(inference, "float", n, task=f"t{n % 2}"))[0] for n in range(6)]
    store.do(feedback.add, NewFeedback(inference, "comment", "hm", task="t0"))
    assert store.do(feedback.list_, 2, 1, {"kind": "float"}) == [rows[4], rows[3]]
    assert store.do(feedback.list_, 10, 0, {"kind": "float", "task": "t1"}) == [rows[5], rows[3], rows[1]]
    assert (store.do(feedback.count), store.do(feedback.count, {"task": "t0"})) == (7, 4)
    with pytest.raises(NotFound, match="no feedback 'x'"):
        store.do(feedback.get, "x")


def test_an_example_has_what_the_request_said_its_answer_must_be(store: Store) -> None:
    form = {"type": "json_schema", "json_schema": {"schema": {"type": "object"}}}
    inference = store.do(recorded, params={"temperature": 0.0, "response_format": form})
    row, _ = store.do(feedback.add, NewFeedback(inference, "demonstration", "{}"))
    again, _ = store.do(feedback.add, NewFeedback(inference, "demonstration", "{}"))
    assert (row.state, again.state) == ("accepted", "duplicate")
    (example,) = store.do(examples.list_, 10)
    assert example.input == {**store.do(inferences.get, inference).input, "response_format": form}


def test_a_label_in_another_spelling_is_the_same_again(store: Store, inference: str) -> None:
    states = []
    for label in ("Caf\u00e9", "cafe\u0301", " CAF\u00c9 ", "ca\u200bf\u00e9", "Caf\u00e9\x00", *["caf\u00e9"] * 4):
        states.append(store.do(feedback.add, NewFeedback(inference, "label", label, task="places"))[0].state)
    assert states == ["accepted", *["duplicate"] * 8]
    assert store.do(tasks.get, "places").choices == ["Caf\u00e9"]
    with pytest.raises(InvalidRequest, match="something to read"):
        store.do(feedback.add, NewFeedback(inference, "label", "\x00\x1b", task="places"))


def test_what_is_preferred_to_an_answer_that_still_comes_is_learned_alone(store: Store) -> None:
    """Of the answer no more than its first piece is known then."""
    streaming = store.do(recorded, output=" The", finish_reason="streaming")
    row, _ = store.do(feedback.add, NewFeedback(streaming, "preference", {"chosen": "It snowed."}, task="prose"))
    (example,) = store.do(examples.list_, 10)
    assert (row.example_id, example.kind, example.target) == (example.id, "demonstration", "It snowed.")
    both = {"chosen": "It snowed.", "rejected": "It rained."}
    store.do(feedback.add, NewFeedback(streaming, "preference", both, task="prose"))
    assert [example.kind for example in store.do(examples.list_, 10)] == ["preference"]


def test_nothing_to_read_is_preferred_to_no_answer(store: Store, inference: str) -> None:
    with pytest.raises(InvalidRequest, match="something to read"):
        store.do(feedback.add, NewFeedback(inference, "preference", {"chosen": " \n", "rejected": "x"}, task="prose"))
