from dataclasses import replace
from typing import Any

import pytest

from agentd import ids
from agentd.errors import NotFound
from agentd.store import feedback, forgetting, inferences, tasks
from agentd.store.database import Store
from agentd.store.feedback import NewFeedback
from agentd.store.forgetting import Selection
from agentd.store.tasks import Task
from tests.support.store_samples import inference, recorded


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"kind": "completion", "input": {"prompt": "Es war schön ☀\0\n"}, "ttft_ms": None, "task": "weather"},
        {"input": {"messages": []}, "params": {"stop": ["\n"], "seed": 2**62, "nested": {"a": None}}, "output": ""},
    ],
)
def test_an_inference_comes_back_as_it_was(store: Store, changes: dict[str, Any]) -> None:
    sample = inference(**changes)
    store.do(inferences.record, sample)
    assert store.do(inferences.get, sample.id) == sample
    assert sample.as_json()["input"] == sample.input


def test_an_answer_is_there_from_its_first_chunk_and_completed_later(store: Store) -> None:
    begun = inference(output="It", finish_reason=inferences.STREAMING, completion_tokens=1)
    store.do(inferences.record, begun)
    row, _ = store.do(feedback.add, NewFeedback(begun.id, "comment", "go on"))
    whole = replace(begun, output="It was great.", finish_reason="stop", completion_tokens=5)
    store.do(inferences.record, whole)
    assert store.do(inferences.get, begun.id) == whole
    assert store.do(feedback.get, row.id).inference_id == begun.id
    assert store.do(inferences.end_streams) == 0


def test_a_thumb_on_half_an_answer_teaches_nothing(store: Store) -> None:
    store.do(tasks.declare, Task("t", ["no", "not sure"], False, "accuracy", None, "config", ids.now()))
    half = store.do(recorded, output="no", finish_reason=inferences.STREAMING, task="t")
    assert store.do(feedback.add, NewFeedback(half, "boolean", True))[0].example_id is None
    said = store.do(recorded, output="no", task="t")
    assert store.do(feedback.add, NewFeedback(said, "boolean", True))[0].example_id is not None


def test_streams_of_a_daemon_that_is_gone_are_cancelled(store: Store) -> None:
    cut, whole = store.do(recorded, "a", finish_reason=inferences.STREAMING), store.do(recorded, "b")
    assert store.do(inferences.end_streams) == 1
    assert store.do(inferences.get, cut).finish_reason == "cancelled"
    assert store.do(inferences.get, whole).finish_reason == "stop"


def test_an_unknown_inference_is_not_found(store: Store) -> None:
    with pytest.raises(NotFound, match="no inference 'nothing'") as caught:
        store.do(inferences.get, "nothing")
    assert caught.value.status == 404


def test_latest_pages_from_the_newest(store: Store) -> None:
    ids = [store.do(recorded, str(n)) for n in range(5)]
    assert [row.id for row in store.do(inferences.latest, 2, 1)] == [ids[3], ids[2]]


def test_prune_knows_what_a_wrong_clock_has_stamped(store: Store) -> None:
    """A board without a battery starts in 1970 until the network comes up."""
    old, cutoff = "2026-01-01T00:00:00.000Z", "2026-02-01T00:00:00.000Z"
    store.do(recorded, "old", created_at=old)
    young = store.do(recorded, "young", created_at="2026-03-01T00:00:00.000Z")
    younger = store.do(recorded, "younger", created_at="1970-01-01T00:00:07.000Z")
    future = store.do(recorded, "future", created_at="9999-01-01T00:00:07.000Z")
    assert store.do(inferences.prune, cutoff) == 1
    assert {row.id for row in store.do(inferences.latest, 10)} == {young, younger, future}


def test_prune_keeps_the_recent_and_what_has_feedback(store: Store) -> None:
    old = "2026-01-01T00:00:00.000Z"
    rated = store.do(recorded, "rated", created_at=old)
    store.do(recorded, "forgotten", created_at=old)
    recent = store.do(recorded, "recent", created_at="2026-03-01T00:00:00.000Z")
    store.do(feedback.add, NewFeedback(rated, "boolean", True))
    assert store.do(inferences.prune, "2026-02-01T00:00:00.000Z") == 1
    assert {row.id for row in store.do(inferences.latest, 10)} == {rated, recent}


def test_what_no_one_has_judged_is_found_and_a_mistake_can_be_taken_back(store: Store) -> None:
    judged, remarked, inferred, fresh = (store.do(recorded, f"text {i}", task="t") for i in range(4))
    store.do(inferences.record, inference(finish_reason=inferences.STREAMING, task="t"))

    def queue(**only: Any) -> list[str]:
        return [row.id for row in store.do(inferences.latest, 10, **only, unjudged=True)]

    label, _ = store.do(feedback.add, NewFeedback(judged, "label", "yes", choices=["yes", "no"]))
    store.do(feedback.add, NewFeedback(remarked, "comment", "hm"))
    store.do(feedback.add, NewFeedback(inferred, "boolean", False, source="implicit"))
    assert queue() == queue(task="t") == [fresh, inferred, remarked]
    assert queue(task="other") == []
    store.do(forgetting.forget, Selection(feedback=(label.id,), keep_inferences=True))
    assert queue() == [fresh, inferred, remarked, judged]
    again, _ = store.do(feedback.add, NewFeedback(judged, "label", "no"))
    store.do(forgetting.forget, Selection(feedback=(again.id,)))
    assert judged not in queue()
