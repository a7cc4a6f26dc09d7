from typing import Any

import pytest
from store_samples import inference, recorded

from agentd.errors import NotFound
from agentd.store import feedback, inferences
from agentd.store.database import Store
from agentd.store.feedback import NewFeedback


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


def test_an_unknown_inference_is_not_found(store: Store) -> None:
    with pytest.raises(NotFound, match="no inference 'nothing'") as caught:
        store.do(inferences.get, "nothing")
    assert caught.value.status == 404


def test_latest_pages_from_the_newest(store: Store) -> None:
    made = [store.do(recorded, str(n)) for n in range(5)]
    assert [found.id for found in store.do(inferences.latest, 2, 1)] == [made[3], made[2]]


def test_prune_keeps_the_recent_and_what_has_feedback(store: Store) -> None:
    old = "2026-01-01T00:00:00.000Z"
    rated = store.do(recorded, "rated", created_at=old)
    store.do(recorded, "forgotten", created_at=old)
    recent = store.do(recorded, "recent", created_at="2026-03-01T00:00:00.000Z")
    store.do(feedback.add, NewFeedback(rated, "boolean", True))
    assert store.do(inferences.prune, "2026-02-01T00:00:00.000Z") == 1
    assert {found.id for found in store.do(inferences.latest, 10)} == {rated, recent}
